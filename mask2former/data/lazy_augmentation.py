"""Detectron2's augmentations, applied lazily: a resize computes only the pixels its crop keeps.

Detectron2 applies each transform before it draws the next one. Large-scale jittering enlarges an
image up to four times and then crops most of it away. Most augmentations read only the size of the
image, so here transforms are drawn first and applied when an augmentation or the caller reads
pixels:

    augmentations → augment → image, labels, transforms → apply_labels, apply_polygons

Random draws and every pixel are the same as Detectron2's. Unknown transforms are applied at once,
as in Detectron2.

Shape letters: h w pixels before a resize, H W after it.
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import shapely
from detectron2.data import transforms as T
from PIL import Image

from .augmentations import ResizeBandsTransform, ResizeScale, ResizeShortestEdge

# Augmentations that read the shape of the image but no pixel. Subclasses may read pixels.
_SHAPE_ONLY = (
    T.FixedSizeCrop,
    T.RandomCrop,
    T.RandomFlip,
    T.ResizeScale,
    T.ResizeShortestEdge,
    ResizeScale,
    ResizeShortestEdge,
)
# Transforms that can be deferred, because the size of their result is known without applying them.
_DEFERRABLE = (
    T.CropTransform,
    T.HFlipTransform,
    T.NoOpTransform,
    T.PadTransform,
    T.ResizeTransform,
    T.VFlipTransform,
    ResizeBandsTransform,
)


def augment(
    augmentations: Sequence, image: np.ndarray, sem_seg: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None, T.TransformList]:
    """Same result as Detectron2's `AugmentationList` on an `AugInput`.

    Args:
        augmentations: Detectron2 augmentations and transforms, applied in this order.
        image: (h, w, 3) uint8.
        sem_seg: (h, w) labels.

    Returns:
        The augmented image and labels, and the applied transforms.
    """
    inputs = _LazyInput(image, sem_seg)
    transforms = []
    for augmentation in T.AugmentationList(augmentations).augs:
        inputs.shape_only = _reads_shape_only(augmentation)
        transforms.append(augmentation(inputs))
    inputs.shape_only = False
    return inputs.image, inputs.sem_seg, T.TransformList(transforms)


def _reads_shape_only(augmentation: T.Augmentation) -> bool:
    if type(augmentation) is T.RandomCrop_CategoryAreaConstraint:
        return augmentation.single_category_max_area >= 1
    return type(augmentation) in _SHAPE_ONLY


class _LazyInput(T.AugInput):
    """Image and labels that apply pending transforms when their pixels are read.

    Attributes:
        shape_only: return a zero-stride dummy of the right shape as the image.
    """

    boxes = None

    def __init__(self, image: np.ndarray, sem_seg: np.ndarray | None) -> None:
        self.shape_only = False
        self._image = image
        self._sem_seg = sem_seg
        self._pending: list[T.Transform] = []
        self._size = image.shape[:2]

    @property
    def image(self) -> np.ndarray:
        if self.shape_only:
            return np.broadcast_to(np.uint8(0), (*self._size, *self._image.shape[2:]))
        self._apply_pending()
        return self._image

    @property
    def sem_seg(self) -> np.ndarray | None:
        if not self.shape_only:
            self._apply_pending()
        return self._sem_seg

    def transform(self, tfm: T.Transform) -> None:
        for transform in T.TransformList([tfm]).transforms:
            if type(transform) in _DEFERRABLE:
                self._pending.append(transform)
                self._size = _size_after(transform, self._size)
                continue
            self._apply_pending()
            self._image = transform.apply_image(self._image)
            if self._sem_seg is not None:
                self._sem_seg = transform.apply_segmentation(self._sem_seg)
            self._size = self._image.shape[:2]

    def _apply_pending(self) -> None:
        pending, self._pending = self._pending, []
        self._image = _apply(pending, self._image, "apply_image", _resize_crop_image)
        if self._sem_seg is not None:
            self._sem_seg = _apply(
                pending, self._sem_seg, "apply_segmentation", _resize_crop_labels
            )


def _size_after(transform: T.Transform, size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if isinstance(transform, T.ResizeTransform):
        return transform.new_h, transform.new_w
    if isinstance(transform, T.CropTransform):
        rows, columns = _window(transform, size)
        return rows.stop - rows.start, columns.stop - columns.start
    if isinstance(transform, T.PadTransform):
        return height + transform.y0 + transform.y1, width + transform.x0 + transform.x1
    return size


def _window(crop: T.CropTransform, size: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns that a crop keeps of an image of the given size."""
    rows = range(size[0])[crop.y0 : crop.y0 + crop.h]
    columns = range(size[1])[crop.x0 : crop.x0 + crop.w]
    return slice(rows.start, rows.stop), slice(columns.start, columns.stop)


def _apply(
    transforms: Sequence[T.Transform], pixels: np.ndarray, method: str, resize_crop: Callable
) -> np.ndarray:
    """Apply transforms in order, a resize and the crop after it in one step."""
    i = 0
    while i < len(transforms):
        transform = transforms[i]
        follower = transforms[i + 1] if i + 1 < len(transforms) else None
        if type(transform) is T.ResizeTransform and type(follower) is T.CropTransform:
            pixels = resize_crop(pixels, transform, follower)
            i += 2
            continue
        # OpenCV drops the last dimension of one channel.
        is_image = pixels.shape[2:] == (3,) and pixels.dtype == np.uint8
        if type(transform) is T.HFlipTransform and is_image:
            # Detectron2 returns a view with negative strides, which is slow to read later.
            pixels = cv2.flip(pixels, 1)
        else:
            pixels = getattr(transform, method)(pixels)
        i += 1
    return pixels


def _resize_crop_image(
    image: np.ndarray, resize: T.ResizeTransform, crop: T.CropTransform
) -> np.ndarray:
    """Window of the resized image, bit-exact.

    If the image is not downscaled vertically, Pillow resizes horizontally, rounds to 8 bits and
    then resizes vertically. (Otherwise some versions resize vertically first.) Each pass can be
    restricted to a part of the image without changing a pixel; Pillow's `box` argument cannot,
    because it rounds its corners to float32.
    """
    height, width = resize.new_h, resize.new_w
    rows, columns = _window(crop, (height, width))
    whole = rows == slice(0, height) and columns == slice(0, width)
    is_plain = (
        image.dtype == np.uint8
        and image.shape[2:] == (3,)
        and resize.interp == Image.Resampling.BILINEAR
    )
    if whole or not is_plain or height < resize.h:
        return crop.apply_image(resize.apply_image(image))
    assert image.shape[:2] == (resize.h, resize.w)
    scale = resize.h / height
    # Source rows under the filter, plus two as a margin for rounding.
    reach = max(scale, 1.0) + 2
    first = max(math.floor(rows.start * scale - reach), 0)
    last = min(math.ceil(rows.stop * scale + reach), resize.h)

    strip = Image.fromarray(image[first:last])
    strip = strip.resize((width, last - first), Image.Resampling.BILINEAR)
    # Restore the full height, on which the sampling positions of the second pass depend.
    strip = strip.crop((columns.start, -first, columns.stop, resize.h - first))
    strip = strip.resize((strip.width, height), Image.Resampling.BILINEAR)
    return np.asarray(strip.crop((0, rows.start, strip.width, rows.stop)))


def _resize_crop_labels(
    labels: np.ndarray, resize: T.ResizeTransform, crop: T.CropTransform
) -> np.ndarray:
    """Window of the resized labels (h, w), which `resize` reads by nearest neighbour."""
    assert labels.shape == (resize.h, resize.w)
    rows, columns = _window(crop, (resize.new_h, resize.new_w))
    source_rows = _nearest(resize.h, resize.new_h, labels.dtype)[rows]
    source_columns = _nearest(resize.w, resize.new_w, labels.dtype)[columns]
    return labels.take(source_columns, axis=1).take(source_rows, axis=0)


def _nearest(size: int, new_size: int, dtype: np.dtype) -> np.ndarray:
    """Source index of each of `new_size` pixels when a row of `size` is resized, (new_size,) int64.

    Computed by resizing indices, since Detectron2 picks other pixels for uint8 than for float64.
    """
    resize = T.ResizeTransform(1, size, 1, new_size)
    positions = np.arange(size)
    if dtype != np.uint8:
        return resize.apply_segmentation(positions[None].astype(np.float64))[0].astype(np.int64)
    # Indices do not fit into uint8, so their two bytes are resized separately.
    low = resize.apply_segmentation((positions[None] & 255).astype(np.uint8))[0]
    high = resize.apply_segmentation((positions[None] >> 8).astype(np.uint8))[0]
    return low.astype(np.int64) | high.astype(np.int64) << 8


def apply_labels(transforms: T.TransformList, labels: np.ndarray) -> np.ndarray:
    """Same as `transforms.apply_segmentation(labels)`, for labels (h, w)."""
    return _apply(transforms.transforms, labels, "apply_segmentation", _resize_crop_labels)


def padding_mask(transforms: T.TransformList, image_size: tuple[int, int]) -> np.ndarray:
    """Mask (H, W) bool, True where the augmented image is padding.

    Args:
        transforms: applied to the image.
        image_size: (h, w) before augmentation.
    """
    known = all(type(transform) in _DEFERRABLE for transform in transforms.transforms)
    *earlier, last = transforms.transforms or [T.NoOpTransform()]
    if known and not any(type(transform) is T.PadTransform for transform in earlier):
        size = image_size
        for transform in (*earlier, last):
            size = _size_after(transform, size)
        mask = np.zeros(size, dtype=bool)
        if isinstance(last, T.PadTransform):
            mask[...] = True
            rows = slice(last.y0, size[0] - last.y1)
            mask[rows, last.x0 : size[1] - last.x1] = False
        return mask
    # Crops pad segmentations with 0 or 255, depending on Detectron2's version.
    return apply_labels(transforms, np.ones(image_size, dtype=np.uint8)) != 1


def apply_polygons(transforms: T.TransformList, polygons: list[np.ndarray]) -> list[np.ndarray]:
    """Same as `transforms.apply_polygons(polygons)`, (points, 2) each, also in place.

    Polygons completely inside or outside a crop skip the slow geometric intersection.
    """
    for transform in transforms.transforms:
        if type(transform) is T.CropTransform:
            polygons = [part for polygon in polygons for part in _crop_polygon(transform, polygon)]
        else:
            polygons = transform.apply_polygons(polygons)
    return polygons


def _crop_polygon(crop: T.CropTransform, polygon: np.ndarray) -> list[np.ndarray]:
    left, top = polygon.min(axis=0)
    right, bottom = polygon.max(axis=0)
    x1, y1 = crop.x0 + crop.w, crop.y0 + crop.h
    if right <= crop.x0 or left >= x1 or bottom <= crop.y0 or top >= y1:
        return []
    inside = crop.x0 <= left and right <= x1 and crop.y0 <= top and bottom <= y1
    # Detectron2 repairs polygons that cross themselves, which changes their outline.
    if inside and shapely.is_valid(shapely.Polygon(polygon)):
        return [crop.apply_coords(polygon)]
    return crop.apply_polygons([polygon])
