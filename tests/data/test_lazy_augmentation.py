"""Same pixels and random draws as Detectron2's transforms applied one by one."""

import random

import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.structures import polygons_to_bitmask

from mask2former.data.augmentations import ColorAugSSDTransform
from mask2former.data.lazy_augmentation import (
    apply_labels,
    apply_polygons,
    augment,
    padding_mask,
)

SIZES = [(30, 47), (64, 31), (1, 1), (60, 9)]
JITTER = [T.RandomFlip(), T.ResizeScale(0.1, 2.0, 40, 40), T.FixedSizeCrop((40, 40))]
RESIZE_CROP = [
    T.ResizeShortestEdge((16, 31, 57), 90, "choice"),
    T.RandomCrop("relative_range", (0.3, 0.3)),
    ColorAugSSDTransform("RGB"),
    T.RandomFlip(),
]
AUGMENTATIONS = {
    "jitter": JITTER,
    "vertical jitter": [T.RandomFlip(horizontal=False, vertical=True), *JITTER[1:]],
    "jitter to a rectangle": [T.ResizeScale(0.5, 3, 50, 20), T.FixedSizeCrop((50, 20))],
    "no padding": [JITTER[1], T.FixedSizeCrop((40, 40), pad=False)],
    "padded with 0, then flipped": [
        JITTER[1],
        T.FixedSizeCrop((40, 40), pad_value=7.0, seg_pad_value=0),
        T.RandomFlip(),
    ],
    "resize and crop": RESIZE_CROP,
    "crop by category area": [
        RESIZE_CROP[0],
        T.RandomCrop_CategoryAreaConstraint("relative", (0.4, 0.4), 0.6, 3),
        *RESIZE_CROP[2:],
    ],
    "crop by category area, without a limit": [
        RESIZE_CROP[0],
        T.RandomCrop_CategoryAreaConstraint("relative", (0.4, 0.4), 1.0, 3),
    ],
    "bicubic": [T.ResizeScale(1, 2, 40, 40, interp=3), T.FixedSizeCrop((40, 40))],
    "pixel reads in between": [
        T.RandomContrast(0.5, 1.5),
        JITTER[1],
        T.RandomSaturation(0.5, 1.5),
        T.FixedSizeCrop((40, 40)),
        T.RandomRotation(30),
        T.RandomExtent((0.5, 1.5), (0.1, 0.1)),
        T.RandomCrop("relative", (0.7, 0.7)),
        T.RandomLighting(10),
    ],
    "plain transforms": [T.HFlipTransform(8), T.NoOpTransform()],
    "none": [],
}


def make_inputs(size: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, blocks of labels, and noise labels."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    blocks = rng.integers(0, 5, (size[0] // 5 + 1, size[1] // 5 + 1))
    labels = np.kron(blocks, np.ones((5, 5)))[: size[0], : size[1]]
    return image, labels, rng.integers(0, 255, size, dtype=np.uint8)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_same_as_detectron2(name, size):
    augmentations = AUGMENTATIONS[name]
    for seed in range(12):
        image, sem_seg, labels = make_inputs(size, seed)
        if seed % 2:
            image = image[..., ::-1]  # a view with negative strides, like BGR images
        # Detectron2 cannot flip one float64 label.
        if (image.size == 3 or seed % 4 == 3) and "category area" not in name:
            sem_seg = None
        random.seed(seed)
        np.random.seed(seed)
        expected = T.AugInput(image, sem_seg=sem_seg)
        expected_transforms = T.AugmentationList(augmentations)(expected)
        expected_draws = random.random(), np.random.rand()

        random.seed(seed)
        np.random.seed(seed)
        result, result_sem_seg, transforms = augment(augmentations, image, sem_seg)
        assert (random.random(), np.random.rand()) == expected_draws
        assert result.dtype == expected.image.dtype and result.shape == expected.image.shape
        assert (result == expected.image).all()
        if sem_seg is None:
            assert result_sem_seg is None
        else:
            assert result_sem_seg.dtype == expected.sem_seg.dtype
            assert (result_sem_seg == expected.sem_seg).all()
        assert list(map(type, transforms.transforms)) == list(
            map(type, expected_transforms.transforms)
        )
        expected_labels = expected_transforms.apply_segmentation(labels)
        assert (apply_labels(transforms, labels) == expected_labels).all()
        ones = expected_transforms.apply_segmentation(np.ones(size, dtype=np.uint8))
        assert (padding_mask(transforms, size) == (ones != 1)).all()


@pytest.mark.parametrize("new_size", [(700, 1100), (1533, 2048), (231, 90)])
def test_large_sizes(new_size):
    """Indices of more than one byte and positions beyond float32 precision."""
    image, sem_seg, labels = make_inputs((427, 640), 0)
    height, width = new_size
    crop = T.CropTransform(width // 3, height // 5, width // 2, height // 2)
    transforms = T.TransformList([T.ResizeTransform(427, 640, height, width), crop])
    result, result_sem_seg, _ = augment(
        [Given(transform) for transform in transforms.transforms], image, sem_seg
    )
    assert (result == transforms.apply_image(image)).all()
    assert (result_sem_seg == transforms.apply_segmentation(sem_seg)).all()
    assert (apply_labels(transforms, labels) == transforms.apply_segmentation(labels)).all()


class Given(T.RandomFlip):
    """Subclass of a known augmentation that returns the given transform."""

    def __init__(self, transform: T.Transform) -> None:
        super().__init__()
        self.transform = transform

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return self.transform


def test_subclass_that_reads_pixels():
    class FlipIfDark(T.RandomFlip):
        def get_transform(self, image):
            seen.append(image.copy())
            return super().get_transform(image)

    seen = []
    image, _, _ = make_inputs((30, 47), 0)
    np.random.seed(0)
    augment([JITTER[1], FlipIfDark()], image)
    np.random.seed(0)
    expected = T.AugInput(image)
    T.AugmentationList([JITTER[1]])(expected)
    assert (seen[0] == expected.image).all()


def random_polygon(rng: np.random.Generator, simple: bool) -> np.ndarray:
    """A star around a point, or corners in random order, most of which cross themselves."""
    num_points = rng.integers(3, 12)
    if not simple:
        return rng.uniform(0, 40, (num_points, 2))
    angles = np.sort(rng.uniform(0, 2 * np.pi, num_points))
    radii = rng.uniform(0.3, 15, (num_points, 1))
    return rng.uniform(0, 40, 2) + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)


@pytest.mark.parametrize("simple", [True, False])
@pytest.mark.parametrize("digits", [0, 1, 2, 9])
def test_cropped_polygons(simple, digits):
    """Same pixels and boxes as from Detectron2's geometry."""
    rng = np.random.default_rng(digits)
    num_inside = 0
    for _ in range(150):
        polygon = random_polygon(rng, simple).round(digits)
        repeated = np.repeat(polygon, rng.integers(1, 3, len(polygon)), axis=0)
        x0, y0 = rng.integers(0, 20, 2)
        crop = T.CropTransform(x0, y0, *rng.integers(8, 30, 2))
        transforms = T.TransformList([T.HFlipTransform(40), crop])
        expected = transforms.apply_polygons([repeated.copy()])
        result = apply_polygons(transforms, [repeated.copy()])
        assert len(result) == len(expected)
        if not expected:
            continue
        size = (int(crop.h), int(crop.w))
        masks = [
            polygons_to_bitmask([p.reshape(-1) for p in polygons], *size)
            for polygons in (result, expected)
        ]
        assert (masks[0] == masks[1]).all()
        for ours, theirs in zip(result, expected, strict=True):
            assert (ours.min(axis=0) == theirs.min(axis=0)).all()
            assert (ours.max(axis=0) == theirs.max(axis=0)).all()
        num_inside += len(result) == 1 and (result[0].max() < 30)
    assert num_inside > 5 or not simple


def test_polygon_on_the_border():
    crop = T.TransformList([T.CropTransform(10, 10, 20, 20)])
    beside = np.array([[0.0, 0], [10, 0], [10, 30], [0, 30]])
    along = np.array([[10.0, 10], [30, 10], [30, 30], [10, 30]])
    assert apply_polygons(crop, [beside]) == []
    (inside,) = apply_polygons(crop, [along])
    assert inside.tolist() == [[0, 0], [20, 0], [20, 20], [0, 20]]
