"""The augmentations of the mappers.

Their order determines both the result and the sequence of random draws.
"""

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform as PointRendColorAugSSDTransform

__all__ = [
    "ColorAugSSDTransform",
    "ResizeBandsTransform",
    "ResizeScale",
    "ResizeShortestEdge",
    "build_detr_crop_gen",
    "build_detr_gen",
    "build_resize_crop_gen",
    "build_transform_gen",
]


class ResizeBandsTransform(T.ResizeTransform):
    """Detectron2's, but each band is resized on its own.

    Pillow takes the fourth channel for opacity, with which it weighs the others, and has no images
    of more channels.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """(h, w, C) uint8 → (H, W, C)."""
        if img.ndim < 3:  # labels
            return super().apply_image(img, interp)
        bands = [super(ResizeBandsTransform, self).apply_image(x, interp) for x in _bands(img)]
        return np.stack(bands, axis=2)

    def inverse(self) -> T.Transform:
        return ResizeBandsTransform(self.new_h, self.new_w, self.h, self.w, self.interp)


def _bands(image: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(image[:, :, i]) for i in range(image.shape[2])]


def _resize_for(image: np.ndarray, transform: T.Transform) -> T.Transform:
    """A resize for the channels of this image.

    It keeps one row and one column of images so long that nothing else would be left.
    """
    if not isinstance(transform, T.ResizeTransform):
        return transform
    size = max(1, transform.new_h), max(1, transform.new_w)
    if image.shape[2:] not in ((), (3,)):
        return ResizeBandsTransform(transform.h, transform.w, *size, transform.interp)
    transform.new_h, transform.new_w = size
    return transform


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, but an image of 3 x 3000 pixels keeps at least one row."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return _resize_for(image, super().get_transform(image))


class ResizeScale(T.ResizeScale):
    """Detectron2's, but an image of 3 x 3000 pixels keeps at least one row."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return _resize_for(image, super().get_transform(image))


class ColorAugSSDTransform(PointRendColorAugSSDTransform):
    """Detectron2's colour jitter, computed once for the 256 pixel values as a lookup table."""

    def convert(self, img: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        """uint8 `img` times alpha plus beta, rounded and clipped as in Detectron2."""
        return cv2.LUT(img, super().convert(np.arange(256, dtype=np.uint8), alpha, beta))


def build_resize_crop_gen(cfg: CfgNode, *, limit_category_area: bool) -> list:
    """Augmentations of the mask_former_* mappers: resize shortest edge, crop, colour jitter, flip.

    Reads `INPUT.{MIN_SIZE_TRAIN, MAX_SIZE_TRAIN, MIN_SIZE_TRAIN_SAMPLING, CROP, COLOR_AUG_SSD,
    FORMAT}` and `MODEL.SEM_SEG_HEAD.IGNORE_VALUE`.

    Args:
        cfg: the config.
        limit_category_area: reject crops in which one category covers more than
            `INPUT.CROP.SINGLE_CATEGORY_MAX_AREA` of the labelled pixels; needs semantic labels.

    Returns:
        Detectron2 augmentations and transforms.
    """
    crop = cfg.INPUT.CROP
    augmentations = [
        ResizeShortestEdge(
            cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        )
    ]
    if crop.ENABLED and limit_category_area:
        augmentations.append(
            T.RandomCrop_CategoryAreaConstraint(
                crop.TYPE,
                crop.SIZE,
                crop.SINGLE_CATEGORY_MAX_AREA,
                cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            )
        )
    elif crop.ENABLED:
        augmentations.append(T.RandomCrop(crop.TYPE, crop.SIZE))
    if cfg.INPUT.COLOR_AUG_SSD:
        augmentations.append(ColorAugSSDTransform(img_format=cfg.INPUT.FORMAT))
    augmentations.append(T.RandomFlip())
    return augmentations


def build_transform_gen(cfg: CfgNode, is_train: bool) -> list:
    """Large-scale jittering (paper, section 4.1): flip, rescale, then crop or pad to a square.

    Reads `INPUT.{RANDOM_FLIP, MIN_SCALE, MAX_SCALE, IMAGE_SIZE}`.

    Args:
        cfg: the config.
        is_train: must be True; jittering is not used at test time.

    Returns:
        Detectron2 augmentations.

    Raises:
        ValueError: `is_train` is False, or INPUT.RANDOM_FLIP is unknown.
    """
    if not is_train:
        raise ValueError("Large-scale jittering is for training; evaluate with DatasetMapper.")
    flip, side = cfg.INPUT.RANDOM_FLIP, cfg.INPUT.IMAGE_SIZE
    if flip not in ("horizontal", "vertical", "none"):
        raise ValueError(f"INPUT.RANDOM_FLIP is {flip!r}; allowed: horizontal, vertical, none.")
    augmentations = []
    if flip != "none":
        augmentations.append(
            T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    augmentations += [
        ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, side, side),
        T.FixedSizeCrop((side, side)),
    ]
    return augmentations


# Short sides in pixels to which DETR resizes an image before it crops it.
_DETR_SIZES_BEFORE_CROP = (400, 500, 600)


def build_detr_gen(cfg: CfgNode, is_train: bool) -> list:
    """DETR's augmentation without crops: flip in training, then resize shortest edge.

    Reads `INPUT.{MIN_SIZE_TRAIN, MAX_SIZE_TRAIN, MIN_SIZE_TRAIN_SAMPLING}`, or in inference
    `INPUT.{MIN_SIZE_TEST, MAX_SIZE_TEST}`.

    Returns:
        Detectron2 augmentations, the resize last.
    """
    sizes = cfg.INPUT
    if not is_train:
        return [ResizeShortestEdge(sizes.MIN_SIZE_TEST, sizes.MAX_SIZE_TEST)]
    resize = ResizeShortestEdge(
        sizes.MIN_SIZE_TRAIN, sizes.MAX_SIZE_TRAIN, sizes.MIN_SIZE_TRAIN_SAMPLING
    )
    return [T.RandomFlip(), resize]


def build_detr_crop_gen(cfg: CfgNode) -> list:
    """What DETR puts before the resize of half of the images: resize shortest edge, then crop.

    Reads `INPUT.CROP.{TYPE, SIZE}`.

    Returns:
        Detectron2 augmentations.
    """
    crop = cfg.INPUT.CROP
    resize = ResizeShortestEdge(_DETR_SIZES_BEFORE_CROP, sample_style="choice")
    return [resize, T.RandomCrop(crop.TYPE, crop.SIZE)]
