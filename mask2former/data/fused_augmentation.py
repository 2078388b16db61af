"""Detectron2's augmentations with the same result in less time: a crop says what a resize computes.

Detectron2 applies each transform before it draws the next, so an image grows to four times the
pixels of which a crop then keeps a quarter. Most augmentations look at nothing but the size of the
image. So transforms are drawn first and wait until somebody looks at pixels:

    augmentations → augment → image, labels, transforms → apply_labels, apply_polygons

Random numbers are drawn as Detectron2 does, and every pixel is the same. Transforms that are not
known here are applied as Detectron2 does, at their place in the order.

Shape letters: h w pixels before a resize, H W after it.
"""

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import shapely
from detectron2.data import transforms as T
from PIL import Image

# Those that read the shape of the image and no pixel. Subclasses may read more.
_READ_SHAPE_ONLY = (
    T.FixedSizeCrop,
    T.RandomCrop,
    T.RandomFlip,
    T.ResizeScale,
    T.ResizeShortestEdge,
)
# Those whose result's size is known beforehand.
_CAN_WAIT = (
    T.CropTransform,
    T.HFlipTransform,
    T.NoOpTransform,
    T.PadTransform,
    T.ResizeTransform,
    T.VFlipTransform,
)


def augment(
    augmentations: Sequence, image: np.ndarray, sem_seg: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None, T.TransformList]:
    """As Detectron2's `AugmentationList` on an `AugInput`.

    Args:
        augmentations: Detectron2 augmentations and transforms, applied in this order.
        image: (h, w, 3) uint8.
        sem_seg: (h, w) labels.

    Returns:
        The image, the labels, and the transforms that were applied.
    """
    inputs = _WaitingInput(image, sem_seg)
    transforms = []
    for augmentation in T.AugmentationList(augmentations).augs:
        inputs.shape_is_enough = _reads_shape_only(augmentation)
        transforms.append(augmentation(inputs))
    inputs.shape_is_enough = False
    return inputs.image, inputs.sem_seg, T.TransformList(transforms)


def _reads_shape_only(augmentation: T.Augmentation) -> bool:
    if type(augmentation) is T.RandomCrop_CategoryAreaConstraint:
        return augmentation.single_category_max_area >= 1
    return type(augmentation) in _READ_SHAPE_ONLY


class _WaitingInput(T.AugInput):
    """Image and labels whose transforms wait until their pixels are read.

    Attributes:
        shape_is_enough: give an empty stand-in of the right shape for the image.
    """

    boxes = None

    def __init__(self, image: np.ndarray, sem_seg: np.ndarray | None) -> None:
        self.shape_is_enough = False
        self._image = image
        self._sem_seg = sem_seg
        self._waiting: list[T.Transform] = []
        self._size = image.shape[:2]

    @property
    def image(self) -> np.ndarray:
        if self.shape_is_enough:
            return np.broadcast_to(np.uint8(0), (*self._size, *self._image.shape[2:]))
        self._apply_waiting()
        return self._image

    @property
    def sem_seg(self) -> np.ndarray | None:
        if not self.shape_is_enough:
            self._apply_waiting()
        return self._sem_seg

    def transform(self, tfm: T.Transform) -> None:
        for transform in T.TransformList([tfm]).transforms:
            if type(transform) in _CAN_WAIT:
                self._waiting.append(transform)
                self._size = _size_after(transform, self._size)
                continue
            self._apply_waiting()
            self._image = transform.apply_image(self._image)
            if self._sem_seg is not None:
                self._sem_seg = transform.apply_segmentation(self._sem_seg)
            self._size = self._image.shape[:2]

    def _apply_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._image = _apply(waiting, self._image, "apply_image", _resize_crop_image)
        if self._sem_seg is not None:
            self._sem_seg = _apply(
                waiting, self._sem_seg, "apply_segmentation", _resize_crop_labels
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
    """Rows and columns that a crop keeps of an image of a size."""
    rows = range(size[0])[crop.y0 : crop.y0 + crop.h]
    columns = range(size[1])[crop.x0 : crop.x0 + crop.w]
    return slice(rows.start, rows.stop), slice(columns.start, columns.stop)


def _apply(
    transforms: Sequence[T.Transform], pixels: np.ndarray, method: str, resize_crop: Callable
) -> np.ndarray:
    """Apply transforms one after the other, but a resize and the crop that follows together."""
    i = 0
    while i < len(transforms):
        transform = transforms[i]
        follower = transforms[i + 1] if i + 1 < len(transforms) else None
        if type(transform) is T.ResizeTransform and type(follower) is T.CropTransform:
            pixels = resize_crop(pixels, transform, follower)
            i += 2
            continue
        if type(transform) is T.HFlipTransform and pixels.ndim == 3 and pixels.dtype == np.uint8:
            # Detectron2 gives a view with negative strides, slow to read for all that follow.
            pixels = cv2.flip(pixels, 1)
        else:
            pixels = getattr(transform, method)(pixels)
        i += 1
    return pixels


def _resize_crop_image(
    image: np.ndarray, resize: T.ResizeTransform, crop: T.CropTransform
) -> np.ndarray:
    """A window of the resized image, to the bit.

    An image that does not become lower is resized by Pillow along its rows, rounded to 8 bits, and
    then resized along its columns. (Others some versions resize along their columns first.) Each
    pass on its own is exact on a part of the image; Pillow's `box` rounds its corners to float32.
    """
    height, width = resize.new_h, resize.new_w
    rows, columns = _window(crop, (height, width))
    whole = rows == slice(0, height) and columns == slice(0, width)
    plain = image.dtype == np.uint8 and image.shape[2:] == (3,) and resize.interp == Image.BILINEAR
    if whole or not plain or height < resize.h:
        return crop.apply_image(resize.apply_image(image))
    assert image.shape[:2] == (resize.h, resize.w)
    scale = resize.h / height
    # Source rows under the filter, and two more so that rounding cannot matter.
    reach = max(scale, 1.0) + 2
    first = max(math.floor(rows.start * scale - reach), 0)
    last = min(math.ceil(rows.stop * scale + reach), resize.h)

    strip = Image.fromarray(image[first:last])
    strip = strip.resize((width, last - first), Image.BILINEAR)
    # Back to the full height, since the positions of the second pass depend on it.
    strip = strip.crop((columns.start, -first, columns.stop, resize.h - first))
    strip = strip.resize((strip.width, height), Image.BILINEAR)
    return np.asarray(strip.crop((0, rows.start, strip.width, rows.stop)))


def _resize_crop_labels(
    labels: np.ndarray, resize: T.ResizeTransform, crop: T.CropTransform
) -> np.ndarray:
    """A window of the resized labels: `resize` itself says which pixels it takes.

    Args:
        labels: (h, w).
        resize: of Detectron2; it takes other pixels of uint8 labels than of others.
        crop: the window of the result.
    """
    assert labels.shape == (resize.h, resize.w)
    rows, columns = _window(crop, (resize.new_h, resize.new_w))
    taken_rows = _nearest(resize.h, resize.new_h, labels.dtype)[rows]
    taken_columns = _nearest(resize.w, resize.new_w, labels.dtype)[columns]
    return labels.take(taken_columns, axis=1).take(taken_rows, axis=0)


def _nearest(size: int, new_size: int, dtype: np.dtype) -> np.ndarray:
    """Which of `size` pixels in a row a resize takes for each of `new_size`, (new_size,) int64."""
    resize = T.ResizeTransform(1, size, 1, new_size)
    positions = np.arange(size)
    if dtype != np.uint8:
        return resize.apply_segmentation(positions[None].astype(np.float64))[0].astype(np.int64)
    # Positions do not fit uint8: two bytes each, of which the resize makes the same choice.
    low = resize.apply_segmentation((positions[None] & 255).astype(np.uint8))[0]
    high = resize.apply_segmentation((positions[None] >> 8).astype(np.uint8))[0]
    return low.astype(np.int64) | high.astype(np.int64) << 8


def apply_labels(transforms: T.TransformList, labels: np.ndarray) -> np.ndarray:
    """As `transforms.apply_segmentation(labels)`, for labels (h, w)."""
    return _apply(transforms.transforms, labels, "apply_segmentation", _resize_crop_labels)


def padding_mask(transforms: T.TransformList, image_size: tuple[int, int]) -> np.ndarray:
    """Where the augmented image is not image, (H, W) bool.

    Args:
        transforms: what was applied.
        image_size: (h, w) before.
    """
    known = all(type(transform) in _CAN_WAIT for transform in transforms.transforms)
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
    # Which value a crop pads segmentations with depends on Detectron2's version: 0 or 255.
    return apply_labels(transforms, np.ones(image_size, dtype=np.uint8)) != 1


def apply_polygons(transforms: T.TransformList, polygons: list[np.ndarray]) -> list[np.ndarray]:
    """As `transforms.apply_polygons(polygons)` of (points, 2) each, also in place.

    Crops build no geometry for polygons that lie on one side of their border.
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
    # What crosses itself is repaired by Detectron2, which changes its outline.
    if inside and shapely.is_valid(shapely.Polygon(polygon)):
        return [crop.apply_coords(polygon)]
    return crop.apply_polygons([polygon])
