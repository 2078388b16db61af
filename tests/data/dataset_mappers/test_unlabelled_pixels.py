"""INPUT.IGNORE_UNLABELLED: which pixels of a sample have no label."""

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T

from mask2former.data.dataset_mappers import (
    DATASET_MAPPER_REGISTRY,
    COCOPanopticNewBaselineDatasetMapper,
    build_mapper,
)
from mask2former.data.packed_masks import PackedMasks

NAMES = [
    "coco_instance_lsj",
    "coco_panoptic_lsj",
    "detr_panoptic",
    "mask_former_instance",
    "mask_former_panoptic",
    "mask_former_semantic",
]
# Columns 2 and 3 of rows 1 and 2; column 2 is also of the object.
CROWD = {"category_id": 2, "iscrowd": 1, "segmentation": [[2, 1, 4, 1, 4, 3, 2, 3]]}


def expected(name: str, gt) -> np.ndarray:
    """The pixels of the 4x6 image without a label."""
    if name == "mask_former_semantic":
        return gt.sem_seg == 255
    if "panoptic" in name:
        return (gt.pan_seg == 0) | (gt.pan_seg == 9)  # void and the crowd
    crowd = np.zeros((4, 6), dtype=bool)
    crowd[1:3, 3] = True
    return crowd


@pytest.fixture
def record(request, records):
    def make(name: str) -> dict:
        record = dict(records[name])
        if "instance" in name:
            record["annotations"] = [*record["annotations"][:2], CROWD]
        return record

    return make


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flip", [False, True])
def test_unlabelled_pixels(name, flip, record, build, gt):
    augmentations = [T.HFlipTransform(6)] if flip else []
    sample = build(name, augmentations, ignore_unlabelled=True)(record(name))
    assert sample["ignored"].dtype == torch.bool
    assert (sample["ignored"].numpy() == expected(name, gt)[:, :: -1 if flip else 1]).all()
    # Only that differs.
    without = build(name, augmentations)(record(name))
    assert without.keys() == sample.keys() - {"ignored"}
    assert torch.equal(without["instances"].gt_masks, sample["instances"].gt_masks)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("mask_former")])
def test_padding_has_no_label(name, record, build, gt):
    sample = build(name, [], size_divisibility=8, ignore_unlabelled=True)(record(name))
    padded = np.pad(expected(name, gt), ((0, 4), (0, 2)), constant_values=True)
    assert (sample["ignored"].numpy() == padded).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("lsj")])
def test_padding_of_jittered_images_has_no_label(name, cfg, record, gt):
    cfg.INPUT.DATASET_MAPPER_NAME = name
    cfg.INPUT.IGNORE_UNLABELLED = True
    cfg.INPUT.IMAGE_SIZE = 12
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 0.5
    sample = build_mapper(cfg)(record(name))
    padded = np.pad(expected(name, gt), ((0, 8), (0, 6)), constant_values=True)
    assert (sample["ignored"].numpy() == padded).all()


@pytest.mark.parametrize("name", ["coco_instance_lsj", "mask_former_instance"])
def test_image_of_crowds_only_and_of_nothing(name, records, build):
    record = dict(records[name], annotations=[CROWD])
    sample = build(name, [], ignore_unlabelled=True)(record)
    assert len(sample["instances"]) == 0
    assert sample["ignored"].nonzero().tolist() == [[1, 2], [1, 3], [2, 2], [2, 3]]
    record["annotations"] = []
    assert not build(name, [], ignore_unlabelled=True)(record)["ignored"].any()


def test_broken_crowd_is_named(records, build):
    crowd = {"id": 31, "category_id": 0, "iscrowd": 1, "segmentation": {"size": [9, 9]}}
    record = dict(records["coco_instance_lsj"], annotations=[crowd])
    with pytest.raises(ValueError, match="annotation id 31"):
        build("coco_instance_lsj", [], ignore_unlabelled=True)(record)


@pytest.mark.parametrize("name", NAMES)
def test_config_turns_it_on(name, cfg):
    cfg.INPUT.DATASET_MAPPER_NAME = name
    cfg.INPUT.IMAGE_SIZE = 12
    assert not build_mapper(cfg).ignore_unlabelled
    cfg.INPUT.IGNORE_UNLABELLED = True
    assert build_mapper(cfg).ignore_unlabelled


def test_subclass_that_cannot_is_refused(cfg, monkeypatch):
    class Original(COCOPanopticNewBaselineDatasetMapper):
        def __init__(self, is_train=True, *, tfm_gens, image_format):
            self.tfm_gens, self.img_format, self.is_train = tfm_gens, image_format, is_train

        @classmethod
        def from_config(cls, cfg, is_train=True):
            return super().from_config(cfg, is_train)

    monkeypatch.setitem(DATASET_MAPPER_REGISTRY._obj_map, "original", Original)
    cfg.INPUT.DATASET_MAPPER_NAME = "original"
    # The original's constructor is called with its own arguments.
    assert set(Original.from_config(cfg)) == {"is_train", "tfm_gens", "image_format"}
    cfg.INPUT.IGNORE_UNLABELLED = True
    with pytest.raises(ValueError, match="IGNORE_UNLABELLED is True.*Original"):
        Original.from_config(cfg)


@pytest.mark.parametrize("overlapping", [False, True])
def test_uncovered_pixels_of_packed_masks(overlapping):
    # 255, with which crops pad, is a bit pattern but no label.
    planes = torch.tensor([[[0, 1, 254, 255]], [[0, 0, 0, 0]]], dtype=torch.uint8)
    masks = PackedMasks(planes, 16, overlapping=overlapping)
    assert masks.uncovered().tolist() == [[True, False, False, not overlapping]]
    nothing = PackedMasks(planes[:0], 0, overlapping=overlapping)
    assert nothing.uncovered().tolist() == [[True] * 4]
