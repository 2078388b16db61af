"""TEST.TILES: the evaluators of whole images give 100 for exact predictions of tiles."""

import json

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as coco_mask
from tile_scenes import GRASS, OBJECTS, SIZE, SKY, ExactModel, make_scene
from torch import nn

from mask2former.config import add_maskformer2_config
from mask2former.data import register_panoptic
from mask2former.inference.tiled_model import TiledModel
from mask2former.predictor import Predictor
from mask2former.trainer import Trainer

NAME = "tiled_evaluation"


class ExactNetwork(nn.Module):
    """`ExactModel` with a model's inputs: red are object numbers, green classes."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, inputs):
        tiles = [x["image"].permute(1, 2, 0).numpy() for x in inputs]
        for x, tile in zip(inputs, tiles, strict=True):
            assert (x["height"], x["width"]) == tile.shape[:2]
        self.sizes += [tile.shape for tile in tiles]
        return ExactModel()([tile[:, :, :2].astype(np.int32) for tile in tiles])


@pytest.fixture
def root(tmp_path):
    numbers, classes = make_scene()
    ids = numbers + (numbers == 0) * (100 + classes.astype(np.int32))
    segments, annotations = [], []
    for i in np.unique(ids).tolist():
        mask = ids == i
        label, x, y = (
            int(classes[mask][0]),
            np.flatnonzero(mask.any(0)),
            np.flatnonzero(mask.any(1)),
        )
        common = {
            "category_id": label + 1,
            "area": int(mask.sum()),
            "iscrowd": 0,
            "bbox": [int(x[0]), int(y[0]), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1],
        }
        segments.append({"id": i, **common})
        if label < SKY:
            rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            rle["counts"] = rle["counts"].decode()
            annotations.append({"id": i, "image_id": 1, "segmentation": rle, **common})
    categories = [
        {"id": label + 1, "name": f"class {label}", "isthing": int(label < SKY)}
        for label in range(GRASS + 1)
    ]
    images = [{"id": 1, "file_name": "a.png", "height": SIZE, "width": SIZE}]
    for folder, pixels in (
        ("images", np.dstack([numbers, classes, classes])),
        ("panoptic", np.dstack([ids, 0 * ids, 0 * ids])),
    ):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / "a.png")
    panoptic = [{"image_id": 1, "file_name": "a.png", "segments_info": segments}]
    for name, gt, known in (
        ("panoptic", panoptic, categories),
        ("instances", annotations, categories[:SKY]),
    ):
        content = {"images": images, "annotations": gt, "categories": known}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    register_panoptic(
        NAME,
        str(tmp_path / "images"),
        str(tmp_path / "panoptic"),
        str(tmp_path / "panoptic.json"),
        str(tmp_path / "instances.json"),
    )
    yield tmp_path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)


@pytest.fixture
def cfg(root):
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 6
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (NAME,), (NAME,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 96
    test = cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.INSTANCE_ON = test.SEMANTIC_ON = True
    tiles = cfg.TEST.TILES
    tiles.SIZE, tiles.OVERLAP, tiles.BATCH_SIZE = 96, 32, 3
    cfg.OUTPUT_DIR = str(root / "output")
    return cfg


def test_evaluators_see_the_image_as_a_whole(cfg, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE * SIZE // 4)  # refuses twice as many
    model = ExactNetwork()
    results = Trainer.test(cfg, model)
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)
    assert model.sizes == [(96, 96, 3)] * 16


def test_image_of_another_size_than_its_record(cfg, root):
    record = {"file_name": str(root / "images" / "a.png"), "height": SIZE, "width": SIZE + 1}
    with pytest.raises(
        ValueError, match=r"a.png has .* \(256, 256\), but its record has \(256, 25"
    ):
        TiledModel(ExactNetwork(), cfg)([record])


@pytest.mark.parametrize("boxes_on", [False, True])
def test_instances_are_what_other_evaluators_read(cfg, root, boxes_on):
    cfg.TEST.BOXES = boxes_on
    (output,) = TiledModel(ExactNetwork(), cfg)([{"file_name": str(root / "images" / "a.png")}])
    found = output["instances"].to("cpu")
    assert len(found) == len(OBJECTS)
    areas = [(rows.stop - rows.start) * (x.stop - x.start) for _, rows, x in OBJECTS]
    masks = [found.pred_masks[i].numpy().astype("uint8") for i in range(len(found))]
    assert sorted(mask.sum() for mask in masks) == sorted(areas)
    boxes = [[*map(float, box)] for box in found.pred_boxes.tensor.tolist()]
    assert ([20.0, 100.0, 40.0, 160.0] in boxes) == boxes_on


def test_predictor_with_tiles(cfg, root):
    predictor = Predictor.from_model(ExactNetwork(), cfg, MetadataCatalog.get(NAME))
    numbers, classes = make_scene()
    file = str(root / "images" / "a.png")
    result = predictor.predict(file, tile_size=96, overlap=32, batch_size=4)
    assert np.array_equal(result.semantic, classes)
    assert len(result.panoptic.segments) == 9
    assert {(s.label, s.is_thing, s.area) for s in result.panoptic.segments} >= {
        (0, True, 60 * 20),
        (2, True, 20 * 56),
    }
    assert np.array_equal(result.image[..., 0], numbers)
    assert result.file_name == file and result.names.count("class 2") == 2
    # Arrays, several images, and the default overlap of a quarter.
    pixels = np.asarray(Image.open(file))
    several = predictor.predict([pixels, file], tile_size=96, keep_image=False)
    for other in several:
        assert np.array_equal(other.panoptic.segment_ids > 0, result.panoptic.segment_ids > 0)
        assert len(other.panoptic.segments) == 9 and other.image is None
    with pytest.raises(ValueError, match="tile_size and overlap are 96 and 96"):
        predictor.predict(file, tile_size=96, overlap=96)
