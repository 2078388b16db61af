"""Mappers subclassed and patched as other projects do, who know only the original's interface."""

import numpy as np
import pytest
import torch
from detectron2.config import configurable
from detectron2.data import transforms as T

from mask2former.data.dataset_mappers import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    MaskFormerSemanticDatasetMapper,
    coco_instance_new_baseline_dataset_mapper,
    coco_panoptic_new_baseline_dataset_mapper,
)

LSJ = ["coco_instance_lsj", "coco_panoptic_lsj"]
RESIZE_CROP = ["mask_former_instance", "mask_former_panoptic", "mask_former_semantic"]
NAMES = [*LSJ, *RESIZE_CROP]


def own_init(name: str, parent: type) -> type:
    """A subclass that sets the original's attributes itself, without `super().__init__`."""

    def __init__(self):
        self.is_train = True
        self.tfm_gens = [T.HFlipTransform(6)]
        self.img_format = "RGB"
        if name in RESIZE_CROP:
            self.size_divisibility = 8
        if name in ("mask_former_panoptic", "mask_former_semantic"):
            self.ignore_label = 255

    return type("Mapper", (parent,), {"__init__": __init__})


@pytest.mark.parametrize("name", NAMES)
def test_own_init_without_super(name, mappers, records, gt):
    sample = own_init(name, mappers[name])()(records[name])
    classes, masks = gt.targets(name)
    padding = (0, 8 - 6, 0, 8 - 4) if name in RESIZE_CROP else (0, 0, 0, 0)
    flipped = torch.from_numpy(masks[:, :, ::-1].copy())
    assert sample["instances"].gt_classes.tolist() == classes
    expected = torch.nn.functional.pad(flipped, padding)
    assert torch.equal(sample["instances"].gt_masks, expected)


@pytest.mark.parametrize("name", NAMES)
def test_attributes_with_the_names_of_our_helpers(name, mappers, records):
    mapper = own_init(name, mappers[name])()
    for attribute in (
        "augment",
        "augment_image",
        "load",
        "pad",
        "padding",
        "require",
        "load_pan_seg",
    ):
        setattr(mapper, attribute, None)
    assert "instances" in mapper(records[name])


@pytest.mark.parametrize(
    "name, key", [("coco_instance_lsj", "annotations"), ("coco_panoptic_lsj", "pan_seg_file_name")]
)
def test_record_without_annotation(name, key, build, records, gt):
    """As in the original, the sample gets no `instances`: the caller adds them."""
    record = {k: v for k, v in records[name].items() if k != key}
    sample = build(name, [])(record)
    assert (sample["image"].numpy() == gt.pixels.transpose(2, 0, 1)).all()
    assert "instances" not in sample
    assert record.keys() <= sample.keys()
    assert ("padding_mask" in sample) == (name == "coco_instance_lsj")


def test_panoptic_mapper_keeps_annotations_for_training(build, records):
    record = records["coco_panoptic_lsj"] | {"annotations": [{"category_id": 1}]}
    mapper = build("coco_panoptic_lsj", [])
    sample = mapper(record)
    assert sample["annotations"] == record["annotations"]
    assert sample["annotations"][0] is not record["annotations"][0]
    mapper.is_train = False
    assert "annotations" not in mapper(record)


def test_original_constructor_arguments(cfg):
    """The original's constructors do not take `num_classes`."""

    class Mapper(MaskFormerSemanticDatasetMapper):
        @configurable
        def __init__(
            self, is_train=True, *, augmentations, image_format, ignore_label, size_divisibility
        ):
            super().__init__(
                is_train,
                augmentations=augmentations,
                image_format=image_format,
                ignore_label=ignore_label,
                size_divisibility=size_divisibility,
            )

    class JitterMapper(COCOPanopticNewBaselineDatasetMapper):
        @configurable
        def __init__(self, is_train=True, *, tfm_gens, image_format):
            super().__init__(is_train, tfm_gens=tfm_gens, image_format=image_format)

    assert Mapper(cfg).num_classes is None
    assert JitterMapper(cfg, True).num_classes is None


@pytest.mark.parametrize("name", NAMES)
def test_from_config_extended(name, cfg, mappers, records):
    """A subclass changes the parent's arguments and adds one of its own."""

    class Mapper(mappers[name]):
        @configurable
        def __init__(self, is_train=True, *, own, **kwargs):
            super().__init__(is_train, **kwargs)
            self.own = own

        @classmethod
        def from_config(cls, cfg, is_train=True):
            arguments = super().from_config(cfg, is_train)
            key = "tfm_gens" if "tfm_gens" in arguments else "augmentations"
            arguments[key] = [T.VFlipTransform(4)]
            return arguments | {"own": 5}

    mapper = Mapper(cfg, True)
    assert mapper.own == 5
    sample = mapper(records[name])
    plain = mappers[name](cfg, True)
    plain.tfm_gens = []  # attributes are read at each call
    assert torch.equal(sample["image"], plain(records[name])["image"].flip(1))


@pytest.mark.parametrize(
    "module, cls",
    [
        (coco_instance_new_baseline_dataset_mapper, COCOInstanceNewBaselineDatasetMapper),
        (coco_panoptic_new_baseline_dataset_mapper, COCOPanopticNewBaselineDatasetMapper),
    ],
)
def test_patched_build_transform_gen(module, cls, cfg, monkeypatch):
    augmentations = [T.FixedSizeCrop((3, 3))]
    monkeypatch.setattr(module, "build_transform_gen", lambda cfg, is_train: augmentations)
    assert cls(cfg, True).tfm_gens is augmentations


def test_targets_made_by_a_subclass(cfg, records):
    """The parent augments the image, the subclass makes the instances."""

    class Mapper(COCOInstanceNewBaselineDatasetMapper):
        def __call__(self, dataset_dict):
            annotations = dataset_dict["annotations"]
            rest = {k: v for k, v in dataset_dict.items() if k != "annotations"}
            return super().__call__(rest) | {"instances": annotations}

    np.random.seed(0)
    sample = Mapper(cfg, True)(records["coco_instance_lsj"])
    assert sample["image"].shape == (3, 6, 6) and len(sample["instances"]) == 3
