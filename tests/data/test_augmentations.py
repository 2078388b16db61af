"""The augmentations of a config and the order of their random draws."""

import random

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import transforms as T
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.projects.point_rend.color_augmentation import (
    ColorAugSSDTransform as PointRendColorAug,
)

from mask2former import add_maskformer2_config
from mask2former.data.augmentations import (
    ColorAugSSDTransform,
    ResizeScale,
    ResizeShortestEdge,
    build_resize_crop_gen,
    build_transform_gen,
)


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = (20, 24, 28)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    cfg.INPUT.MAX_SIZE_TRAIN = 100
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute"
    cfg.INPUT.CROP.SIZE = (16, 16)
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.7
    cfg.INPUT.COLOR_AUG_SSD = True
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 200
    cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, cfg.INPUT.IMAGE_SIZE = 0.5, 1.5, 32
    return cfg


def names(augmentations: list) -> list[str]:
    return [type(augmentation).__name__ for augmentation in augmentations]


def run(augmentations: list, seed: int):
    """Augmented image and labels, and the next number of each random generator."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    sem_seg = np.kron(rng.integers(0, 4, (3, 4)), np.ones((10, 10)))
    random.seed(seed)
    np.random.seed(seed)
    inputs = T.AugInput(image, sem_seg=sem_seg)
    T.AugmentationList(augmentations)(inputs)
    return inputs.image, inputs.sem_seg, random.random(), np.random.rand()


def assert_same_stream(augmentations: list, reference: list) -> None:
    images = []
    for seed in range(6):
        actual, expected = run(augmentations, seed), run(reference, seed)
        assert actual[0].shape == expected[0].shape
        assert (actual[0] == expected[0]).all()
        assert (actual[1] == expected[1]).all()
        assert actual[2:] == expected[2:]
        images.append(expected[0].tobytes())
    assert len(set(images)) > 1, "all seeds give the same image, so the test compares nothing"


@pytest.mark.parametrize("limit", [True, False])
def test_resize_crop_draws_in_the_original_order(cfg, limit):
    crop = (
        T.RandomCrop_CategoryAreaConstraint("absolute", (16, 16), 0.7, 200)
        if limit
        else T.RandomCrop("absolute", (16, 16))
    )
    reference = [
        T.ResizeShortestEdge((20, 24, 28), 100, "choice"),
        crop,
        PointRendColorAug(img_format="RGB"),
        T.RandomFlip(),
    ]
    assert_same_stream(build_resize_crop_gen(cfg, limit_category_area=limit), reference)


def test_crop_and_colour_can_be_off(cfg):
    cfg.INPUT.CROP.ENABLED = False
    cfg.INPUT.COLOR_AUG_SSD = False
    for limit in (True, False):
        augmentations = build_resize_crop_gen(cfg, limit_category_area=limit)
        assert names(augmentations) == ["ResizeShortestEdge", "RandomFlip"]


def test_category_limit_reads_the_config(cfg):
    crop = build_resize_crop_gen(cfg, limit_category_area=True)[1]
    assert crop.single_category_max_area == 0.7
    assert crop.ignored_category == 200


@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
def test_jitter_draws_in_the_original_order(cfg, flip):
    cfg.INPUT.RANDOM_FLIP = flip
    reference = [
        T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical"),
        T.ResizeScale(0.5, 1.5, 32, 32),
        T.FixedSizeCrop((32, 32)),
    ]
    assert_same_stream(build_transform_gen(cfg, is_train=True), reference)


def test_jitter_without_flip(cfg):
    cfg.INPUT.RANDOM_FLIP = "none"
    assert names(build_transform_gen(cfg, True)) == ["ResizeScale", "FixedSizeCrop"]


def test_jitter_bad_values(cfg):
    with pytest.raises(ValueError, match="for training"):
        build_transform_gen(cfg, is_train=False)
    cfg.INPUT.RANDOM_FLIP = "diagonal"
    with pytest.raises(ValueError, match="INPUT.RANDOM_FLIP is 'diagonal'.*horizontal, vertical"):
        build_transform_gen(cfg, is_train=True)


def test_colour_jitter_keeps_the_geometry():
    transform = ColorAugSSDTransform("RGB", brightness_delta=32, hue_delta=18)
    image = np.full((4, 6, 3), 100, dtype=np.uint8)
    random.seed(1)
    results = [transform.apply_image(image) for _ in range(8)]
    assert all(r.shape == image.shape and r.dtype == np.uint8 for r in results)
    assert any((r != image).any() for r in results)
    labels = np.arange(24).reshape(4, 6)
    assert transform.apply_segmentation(labels) is labels


def test_colour_jitter_of_zero_strength():
    transform = ColorAugSSDTransform("BGR", 0, 1, 1, 1, 1, 0)
    image = np.full((4, 6, 3), 100, dtype=np.uint8)
    assert all((transform.apply_image(image) == image).all() for _ in range(8))


@pytest.mark.parametrize("size", [(3, 3000), (3000, 3), (1, 1)])
def test_at_least_one_pixel_is_left(size):
    image = np.zeros((*size, 3), np.uint8)
    for augmentation in (ResizeShortestEdge(64, 96), ResizeScale(0.1, 0.1, 64, 64)):
        resized = augmentation.get_transform(image).apply_image(image)
        assert 1 <= min(resized.shape[:2]) and max(resized.shape[:2]) <= 96
