"""The mapper detr_panoptic: DETR's augmentation, pixel by pixel, and what it does at the edges."""

import copy

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from panopticapi.utils import id2rgb, rgb2id
from PIL import Image

from mask2former import DETRPanopticDatasetMapper
from mask2former.config import load_config
from mask2former.data.dataset_mappers import build_mapper

SIZES = (48, 64, 80)


@pytest.fixture
def detr_cfg(cfg):
    cfg.INPUT.DATASET_MAPPER_NAME = "detr_panoptic"
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = SIZES, 133
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = "absolute_range", (384, 600)
    return cfg


def write_record(folder, size: tuple[int, int], seed: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """A record of noise in two segments, its pixels and its segment ids."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    ids = np.where(np.arange(size[1])[None] < size[1] // 2, 7, 70001) * np.ones(size, dtype=int)
    ids[0, -1] = 0
    Image.fromarray(pixels).save(folder / "image.png")
    Image.fromarray(id2rgb(ids)).save(folder / "panoptic.png")
    record = {
        "file_name": str(folder / "image.png"),
        "pan_seg_file_name": str(folder / "panoptic.png"),
        "segments_info": [
            {"id": 70001, "category_id": 2, "iscrowd": 0, "isthing": False},
            {"id": 7, "category_id": 1, "iscrowd": 0, "isthing": True},
        ],
    }
    return record, pixels, ids


def detr_augmentations(crop: bool) -> list:
    """As DETR: flip, then resize; or flip, resize, crop and resize."""
    before = [T.ResizeShortestEdge([400, 500, 600], sample_style="choice")]
    before.append(T.RandomCrop("absolute_range", (384, 600)))
    resize = T.ResizeShortestEdge(SIZES, 133, "choice")
    return [T.RandomFlip(), *(before if crop else []), resize]


@pytest.mark.parametrize("size", [(48, 64), (71, 33), (7, 9), (1, 3)])
def test_pixels_and_draws_are_those_of_detr(size, detr_cfg, tmp_path):
    mapper = build_mapper(detr_cfg)
    record, pixels, ids = write_record(tmp_path, size, 0)
    crops = []
    for seed in range(8):
        np.random.seed(seed)
        sample = mapper(record)
        draw = np.random.rand()
        np.random.seed(seed)
        crops.append(not np.random.rand() > 0.5)
        inputs = T.AugInput(pixels)
        transforms = T.AugmentationList(detr_augmentations(crops[-1]))(inputs)
        assert draw == np.random.rand()
        assert (sample["image"].numpy() == inputs.image.transpose(2, 0, 1)).all()
        expected = rgb2id(transforms.apply_segmentation(id2rgb(ids)))
        instances = sample["instances"]
        assert instances.gt_classes.tolist() == [2, 1]
        for mask, segment_id in zip(instances.gt_masks, (70001, 7), strict=True):
            assert (mask.numpy() == (expected == segment_id)).all()
    assert len(set(crops)) == 2


def test_crop_turned_off(detr_cfg, tmp_path):
    detr_cfg.INPUT.CROP.ENABLED = False
    mapper = build_mapper(detr_cfg)
    assert mapper.crop_gen is None
    record, pixels, _ = write_record(tmp_path, (48, 64), 1)
    np.random.seed(0)
    sample = mapper(record)
    np.random.seed(0)
    inputs = T.AugInput(pixels)
    T.AugmentationList(detr_augmentations(False))(inputs)
    assert (sample["image"].numpy() == inputs.image.transpose(2, 0, 1)).all()


def test_image_without_segments_and_segment_outside_the_crop(detr_cfg, tmp_path):
    record, *_ = write_record(tmp_path, (8, 8), 2)
    mapper = DETRPanopticDatasetMapper(
        crop_gen=[T.CropTransform(4, 0, 4, 8)],
        tfm_gens=[T.NoOpTransform()],
        image_format="RGB",
    )
    np.random.seed(1)  # draws below 1/2
    instances = mapper(record)["instances"]
    assert instances.gt_masks.sum(dim=(1, 2)).tolist() == [31, 0]  # and a void pixel
    assert instances.gt_boxes.tensor.tolist() == [[0, 0, 4, 8], [0, 0, 0, 0]]

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "panoptic.png")
    sample = build_mapper(detr_cfg)(record | {"segments_info": []})
    height, width = sample["image"].shape[-2:]
    assert sample["instances"].gt_masks.shape == (0, height, width)
    assert sample["instances"].gt_classes.dtype == torch.int64


def test_record_stays_as_it_is_and_inference_has_no_targets(detr_cfg, tmp_path):
    record, pixels, _ = write_record(tmp_path, (48, 64), 3)
    before = copy.deepcopy(record)
    detr_cfg.INPUT.MIN_SIZE_TEST, detr_cfg.INPUT.MAX_SIZE_TEST = 96, 1333
    mapper = build_mapper(detr_cfg, is_train=False)
    sample = mapper(record)
    assert record == before
    assert "instances" not in sample
    expected = T.ResizeTransform(48, 64, 96, 128).apply_image(pixels)
    assert (sample["image"].numpy() == expected.transpose(2, 0, 1)).all()


def test_bad_records_name_the_file(detr_cfg, tmp_path):
    mapper = build_mapper(detr_cfg)
    record, *_ = write_record(tmp_path, (8, 8), 4)
    with pytest.raises(ValueError, match=r"image\.png has no 'segments_info'.*DETRPanoptic"):
        mapper({k: v for k, v in record.items() if k != "segments_info"})
    record["segments_info"][0]["category_id"] = 3
    with pytest.raises(ValueError, match=r"panoptic\.png"):
        mapper(record)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.RANDOM_FLIP", "none"),
        ("INPUT.COLOR_AUG_SSD", True),
        ("INPUT.SIZE_DIVISIBILITY", 32),
        ("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 0.5),
        ("INPUT.MIN_SIZE_TRAIN", [-1]),
        ("INPUT.MAX_SIZE_TRAIN", 0),
        ("INPUT.CROP.SIZE", [600, 384]),
        ("INPUT.CROP.SIZE", [0, 384]),
    ],
)
def test_rejected_values(key, value, request):
    recipe = "configs/maskformer/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml"
    with pytest.raises(ValueError, match=key):
        load_config(str(request.config.rootpath / recipe), [key, str(value)])
