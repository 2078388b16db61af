"""INPUT.TILES: what a mapper makes of a tile is what it makes of an image cut from the whole."""

import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from mask2former.config import add_maskformer2_config
from mask2former.config_checks import check_config
from mask2former.data import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    MaskFormerInstanceDatasetMapper,
    MaskFormerSemanticDatasetMapper,
)
from mask2former.data.loader import build_train_loader
from mask2former.data.tiles import TILE, split_records

HEIGHT, WIDTH, SIZE, OVERLAP = 40, 70, 32, 8
CROP = [T.NoOpTransform()]
# Tiles start at rows 0 and 8, and at columns 0, 19, 38.
BOXES = [(2, 2, 12, 9), (15, 10, 50, 20), (60, 33, 68, 39)]  # x0 y0 x1 y1


def mask_of(box):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask


def polygon_of(box):
    x0, y0, x1, y1 = box
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def rle_of(box):
    return mask_util.encode(np.asfortranarray(mask_of(box)))


def counts_of(box):
    changes = np.flatnonzero(np.diff(mask_of(box).flatten(order="F"))) + 1
    return {
        "size": [HEIGHT, WIDTH],
        "counts": np.diff([0, *changes, HEIGHT * WIDTH]).tolist(),
    }


@pytest.fixture
def record(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    labels = np.full((HEIGHT, WIDTH), 3, np.uint8)
    colours = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    colours[..., 1] = 1  # id 256
    for i, (x0, y0, x1, y1) in enumerate(BOXES):
        labels[y0:y1, x0:x1], colours[y0:y1, x0:x1] = i, (i + 1, 0, 0)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    Image.fromarray(colours).save(tmp_path / "panoptic.png")
    return {
        "file_name": str(tmp_path / "image.png"),
        "image_id": 1,
        "height": HEIGHT,
        "width": WIDTH,
        "pixels": pixels,
        "labels": labels,
    }


def tiles_of(record, drop_empty=False, **keys):
    keys = {k: v for k, v in (record | keys).items() if k not in ("pixels", "labels")}
    before = copy.deepcopy(keys)
    tiles = split_records([keys], SIZE, OVERLAP, drop_empty)
    assert str(keys) == str(before)
    return tiles


def check_image(sample, record):
    rows, columns = sample[TILE].window
    expected = record["pixels"][rows, columns]
    assert np.array_equal(sample["image"].numpy().transpose(1, 2, 0), expected)
    return rows, columns


@pytest.mark.parametrize("mapper_type", ["mask_former", "lsj"])
@pytest.mark.parametrize("encode", [polygon_of, rle_of, counts_of, mask_of])
def test_instances(record, encode, mapper_type):
    annotations = [
        {"category_id": i, "segmentation": encode(box), "iscrowd": 0, "bbox": [0, 0, 1, 1]}
        for i, box in enumerate(BOXES)
    ]
    for annotation, (x0, y0, x1, y1) in zip(annotations, BOXES, strict=True):
        annotation |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "bbox_mode": BoxMode.XYWH_ABS}
    tiles = tiles_of(record, annotations=annotations)
    assert [(tile[TILE].y, tile[TILE].x) for tile in tiles] == [
        (y, x) for y in (0, 8) for x in (0, 19, 38)
    ]
    arguments = {"is_train": True, "image_format": "RGB"}
    if mapper_type == "lsj":
        mapper = COCOInstanceNewBaselineDatasetMapper(tfm_gens=CROP, **arguments)
    else:
        mapper = MaskFormerInstanceDatasetMapper(
            augmentations=CROP, size_divisibility=-1, **arguments
        )
    seen = 0
    for tile in tiles:
        sample = mapper(tile)
        rows, columns = check_image(sample, record)
        masks = [mask_of(box)[rows, columns] for box in BOXES]
        present = [i for i, mask in enumerate(masks) if mask.any()]
        assert sample["instances"].gt_classes.tolist() == present
        found = sample["instances"].gt_masks.numpy()
        assert np.array_equal(found, np.array(masks)[present].astype(bool).reshape(found.shape))
        seen += len(present)
    assert seen == 2 + 6 + 1  # 12 columns and 7 rows; all tiles; the last one


def test_tiles_without_objects_are_dropped_or_kept(record):
    box = polygon_of(BOXES[2])
    annotations = [
        {"category_id": 0, "segmentation": box, "iscrowd": 0},
        {"category_id": 0, "segmentation": polygon_of((0, 0, 3, 3)), "iscrowd": 1},
    ]
    assert len(tiles_of(record, annotations=annotations)) == 6
    (tile,) = tiles_of(record, drop_empty=True, annotations=annotations)
    assert (tile[TILE].y, tile[TILE].x) == (8, 38)
    assert len(tile["annotations"]) == 1
    # What label maps hold is not known before they are read.
    assert len(tiles_of(record, drop_empty=True, sem_seg_file_name="labels.png")) == 6


def test_an_empty_tile_is_a_sample_without_targets(record):
    (tile, *_) = tiles_of(record, annotations=[])
    mapper = COCOInstanceNewBaselineDatasetMapper(is_train=True, tfm_gens=CROP, image_format="RGB")
    assert len(mapper(tile)["instances"]) == 0


def test_semantic(record, tmp_path):
    mapper = MaskFormerSemanticDatasetMapper(
        is_train=True,
        augmentations=CROP,
        image_format="RGB",
        ignore_label=255,
        size_divisibility=-1,
    )
    for tile in tiles_of(record, sem_seg_file_name=str(tmp_path / "labels.png")):
        sample = mapper(tile)
        rows, columns = check_image(sample, record)
        assert np.array_equal(sample["sem_seg"].numpy(), record["labels"][rows, columns])


def test_panoptic(record, tmp_path):
    segments = [{"id": i, "category_id": i - 1, "iscrowd": 0} for i in (1, 2, 3)]
    segments.append({"id": 256, "category_id": 3, "iscrowd": 0})
    mapper = COCOPanopticNewBaselineDatasetMapper(is_train=True, tfm_gens=CROP, image_format="RGB")
    keys = {"pan_seg_file_name": str(tmp_path / "panoptic.png"), "segments_info": segments}
    for tile in tiles_of(record, **keys):
        sample = mapper(tile)
        rows, columns = check_image(sample, record)
        labels = record["labels"][rows, columns]
        classes = sample["instances"].gt_classes.tolist()
        assert classes == np.unique(labels).tolist()
        masks = sample["instances"].gt_masks.numpy()
        assert np.array_equal(masks, [labels == label for label in classes])
        assert [s["category_id"] for s in sample["segments_info"]] == classes


def test_an_image_within_a_tile_keeps_its_record(record):
    keys = {"file_name": record["file_name"]}
    assert split_records([keys], WIDTH, 0, False) == [keys]  # size from the file
    assert len(split_records([keys], WIDTH - 1, 0, False)) == 2


def test_label_map_of_another_size(record, tmp_path):
    Image.fromarray(record["labels"][1:]).save(tmp_path / "cut.png")
    (tile, *_) = tiles_of(record, sem_seg_file_name=str(tmp_path / "cut.png"))
    mapper = MaskFormerSemanticDatasetMapper(
        is_train=True,
        augmentations=CROP,
        image_format="RGB",
        ignore_label=255,
        size_divisibility=-1,
    )
    with pytest.raises(ValueError, match=r"cut.png has .* \(39, 70\), but .*image.png, has \(40"):
        mapper(tile)


def test_malformed_annotations_are_refused_as_in_whole_images(record):
    mapper = COCOInstanceNewBaselineDatasetMapper(is_train=True, tfm_gens=CROP, image_format="RGB")
    for shape, error in (
        ([[1.0, 2.0, 3.0]], "polygon of 3 coordinates"),
        ([["a", 1, 2, 3, 4, 5]], "not a list of numbers"),
        (np.zeros((3, 3)), r"a mask, has \(height, width\) \(3, 3\)"),
        (None, "segmentation 'None'"),
    ):
        annotation = {"category_id": 0, "segmentation": shape}
        (tile, *_) = tiles_of(record, annotations=[annotation])
        with pytest.raises(ValueError, match=error):
            mapper(tile)


@pytest.fixture
def cfg(record):
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    annotations = [{"category_id": 0, "segmentation": polygon_of(BOXES[2]), "iscrowd": 0}]
    keys = {k: v for k, v in record.items() if k not in ("pixels", "labels")}
    records = [keys | {"annotations": annotations}]
    DatasetCatalog.register("tiles_test", lambda: copy.deepcopy(records))
    cfg.DATASETS.TRAIN = ("tiles_test",)
    cfg.MODEL.DEVICE = "cpu"
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.TILES.SIZE, cfg.INPUT.TILES.OVERLAP = SIZE, OVERLAP
    yield cfg
    DatasetCatalog.remove("tiles_test")
    MetadataCatalog.pop("tiles_test", None)


def test_loader_draws_tiles(cfg):
    loader = build_train_loader(cfg, lambda record: record)
    assert len(loader.dataset) == 1
    (record,) = next(iter(loader))
    assert record[TILE][:4] == (8, 38, SIZE, SIZE)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    loader = build_train_loader(cfg, lambda record: record)
    batches = iter(loader)
    drawn = {next(batches)[0][TILE][:2] for _ in range(6)}  # an epoch
    assert drawn == {(y, x) for y in (0, 8) for x in (0, 19, 38)}


def test_weighted_samplers_are_refused(cfg):
    cfg.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [("tiles_test", 1.0)]
    with pytest.raises(ValueError, match="WeightedTrainingSampler, which weights images"):
        build_train_loader(cfg, lambda record: record)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["INPUT.TILES.OVERLAP", 17], "INPUT.TILES.SIZE and INPUT.TILES.OVERLAP are 32 and 17"),
        (["TEST.TILES.SIZE", 8, "TEST.TILES.OVERLAP", 8], "TEST.TILES.OVERLAP are 8 and 8"),
        (["TEST.TILES.SIZE", 8, "TEST.AUG.ENABLED", True], "TEST.AUG.ENABLED is True, but"),
        (["INPUT.TILES.SIZE", -1], "INPUT.TILES.SIZE"),
    ],
)
def test_config_is_checked(cfg, options, error):
    cfg.merge_from_list(options)
    with pytest.raises(ValueError, match=error):
        check_config(cfg)
