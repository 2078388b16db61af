"""Masks of the instances of one image, kept as crops.

A full-size mask takes H · W bytes whatever it shows; a crop takes as much as its object's box. A
thousand objects in an image of 20,000 x 20,000 pixels fit into memory that way, and COCO run
lengths are made from crops without a full-size mask.

N instances, H W pixels of the image, h w pixels of a crop, R runs of foreground in columns.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from .windows import Window


class InstanceMasks:
    """N masks of one image.

    `masks[3]` and `masks[-1]` are full-size masks; a slice, or an array of indices or booleans,
    gives the `InstanceMasks` of a selection.

    Attributes:
        crops: N boolean arrays (h, w), as tight as the masks if `from_full` or `from_rle` made
            them; (0, 0) for a mask without pixels.
        offsets: (N, 2) int64, the place of each crop's first pixel in the image, as (x, y).
        image_size: (H, W).
    """

    def __init__(
        self, crops: Sequence[np.ndarray], offsets: Any, image_size: tuple[int, int]
    ) -> None:
        """
        Raises:
            ValueError: a crop is no boolean (h, w), lies outside of the image, or has no offset.
        """
        self.crops = list(crops)
        self.offsets = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        self.image_size = (int(image_size[0]), int(image_size[1]))
        if len(self.crops) != len(self.offsets):
            raise ValueError(f"{len(self.crops)} crops need as many offsets, not {offsets!r}")
        height, width = self.image_size
        for i, (crop, (x, y)) in enumerate(zip(self.crops, self.offsets.tolist(), strict=True)):
            if crop.ndim != 2 or crop.dtype != np.bool_:
                raise ValueError(
                    f"crop {i} is {crop.dtype} {crop.shape}; allowed: boolean (height, width)"
                )
            if x < 0 or y < 0 or x + crop.shape[1] > width or y + crop.shape[0] > height:
                raise ValueError(
                    f"crop {i} of {crop.shape} pixels at x={x}, y={y} is not inside the image of "
                    f"{self.image_size}"
                )

    @classmethod
    def from_full(cls, masks: np.ndarray | Tensor) -> "InstanceMasks":
        """Cut full-size masks.

        Args:
            masks: (N, H, W), an array or a tensor on any device; what is not 0 is foreground.

        Raises:
            ValueError: another number of dimensions.
        """
        if masks.ndim != 3:
            raise ValueError(f"masks have the shape {tuple(masks.shape)}; allowed: (N, H, W)")
        size = (int(masks.shape[1]), int(masks.shape[2]))
        is_on_cpu = isinstance(masks, Tensor) and masks.device.type == "cpu"
        if is_on_cpu and masks.dtype != torch.bfloat16:  # which NumPy lacks
            masks = np.asarray(masks)
        crops, offsets = [], np.zeros((len(masks), 2), np.int64)
        for i, (crop, x, y) in enumerate(_cut(masks)):
            crops.append(crop)
            offsets[i] = x, y
        return cls(crops, offsets, size)

    @classmethod
    def empty(cls, image_size: tuple[int, int]) -> "InstanceMasks":
        """No masks of an image of (H, W) pixels."""
        return cls([], np.zeros((0, 2), np.int64), image_size)

    def __len__(self) -> int:
        return len(self.crops)

    def window(self, i: int) -> Window:
        """The rows and columns of the image that a crop covers."""
        (x, y), (height, width) = self.offsets[i].tolist(), self.crops[i].shape
        return slice(y, y + height), slice(x, x + width)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int | np.integer):
            return self._full(int(index))
        chosen = np.arange(len(self))[index].reshape(-1)
        crops = [self.crops[i] for i in chosen.tolist()]
        return InstanceMasks(crops, self.offsets[chosen], self.image_size)

    def __repr__(self) -> str:
        height, width = self.image_size
        return f"InstanceMasks({len(self)} masks of {height} x {width} pixels)"

    def _full(self, i: int) -> np.ndarray:
        crop, window = self.crops[i], self.window(i)  # IndexError ends iterations
        mask = np.zeros(self.image_size, bool)
        mask[window] = crop
        return mask

    def full(self) -> np.ndarray:
        """(N, H, W) bool. It takes N · H · W bytes."""
        masks = np.zeros((len(self), *self.image_size), bool)
        for i, mask in enumerate(masks):
            mask[self.window(i)] = self.crops[i]
        return masks

    def areas(self) -> np.ndarray:
        """Pixels of each mask, (N,) int64."""
        return np.array([np.count_nonzero(crop) for crop in self.crops], np.int64)

    def boxes(self) -> np.ndarray:
        """Tight boxes, (N, 4) float32 x0 y0 x1 y1 in pixels; all 0 for a mask without pixels.

        A mask of the pixel at column 3 and row 5 alone has the box 3 5 4 6.
        """
        boxes = np.zeros((len(self), 4), np.float32)
        for i, crop in enumerate(self.crops):
            x0, y0, x1, y1 = _extents(crop.any(1).reshape(1, -1), crop.any(0).reshape(1, -1))[
                0
            ].tolist()
            if x1 > x0:
                x, y = self.offsets[i].tolist()
                boxes[i] = x + x0, y + y0, x + x1, y + y1
        return boxes

    def to_rle(self) -> list[dict[str, Any]]:
        """COCO's compressed run lengths, {"size": [H, W], "counts": text} of each mask."""
        height, width = self.image_size
        encoded = []
        for crop, (x, y) in zip(self.crops, self.offsets.tolist(), strict=True):
            starts, ends = _column_runs(crop)
            # In the image, whose columns follow each other.
            starts, ends = ((x + column) * height + y + row for column, row in (starts, ends))
            # A run to the bottom of a column goes on if the next column starts with one.
            joins = starts[1:] == ends[:-1]
            starts = starts[np.r_[True, ~joins]] if len(starts) else starts
            ends = ends[np.r_[~joins, True]] if len(ends) else ends
            edges = np.stack((starts, ends), 1).reshape(-1)
            counts = np.diff(edges, prepend=0, append=height * width)
            if len(counts) > 1 and counts[-1] == 0:
                counts = counts[:-1]
            rle = {"size": [height, width], "counts": counts.tolist()}
            rle = coco_mask.frPyObjects(rle, height, width)
            encoded.append({"size": [height, width], "counts": rle["counts"].decode()})
        return encoded

    @classmethod
    def from_rle(
        cls, encoded: Sequence[dict[str, Any]], image_size: tuple[int, int] | None = None
    ) -> "InstanceMasks":
        """Decode COCO run lengths, compressed (text or bytes) or as a list of numbers.

        Args:
            encoded: with `size` and `counts`, all of the same size.
            image_size: (H, W); needed if nothing is encoded.

        Raises:
            ValueError: the sizes differ, are unknown, or are not those of the run lengths.
        """
        sizes = {tuple(map(int, rle["size"])) for rle in encoded}
        sizes |= set() if image_size is None else {tuple(image_size)}
        if len(sizes) != 1:
            raise ValueError(f"run lengths need one image size, got {sorted(sizes)}")
        height, width = sizes.pop()
        crops, offsets = [], np.zeros((len(encoded), 2), np.int64)
        for i, rle in enumerate(encoded):
            counts = rle["counts"]
            if isinstance(counts, str | bytes):
                counts = _counts(counts.encode() if isinstance(counts, str) else counts)
            counts = np.asarray(counts, np.int64).reshape(-1)
            if (counts < 0).any() or counts.sum() != height * width:
                raise ValueError(
                    f"run lengths {i} add up to {counts.sum()}, not to {height} x {width}"
                )
            crop, offsets[i] = _crop_of_counts(counts, height)
            crops.append(crop)
        return cls(crops, offsets, (height, width))


def _cut(masks: Any) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yield a copy of the box of each mask (N, H, W), and its x and y."""
    if isinstance(masks, Tensor):
        # The boxes of all masks in one copy from the device.
        masks = masks != 0
        boxes = _extents(masks.any(2).cpu().numpy(), masks.any(1).cpu().numpy())
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist(), strict=True):
            yield mask[y0:y1, x0:x1].cpu().numpy().copy(), x0, y0
        return
    for values in masks:  # one by one, which stays in the cache
        mask = values if values.dtype == np.bool_ else values != 0
        rows, columns = mask.any(1).reshape(1, -1), mask.any(0).reshape(1, -1)
        ((x0, y0, x1, y1),) = _extents(rows, columns).tolist()
        yield mask[y0:y1, x0:x1].copy(), x0, y0


def _extents(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) x0 y0 x1 y1, from the rows and columns that have a pixel; 0 without."""
    if not rows.size or not columns.size:
        return np.zeros((len(rows), 4), np.int64)
    x0, y0 = columns.argmax(1), rows.argmax(1)
    x1 = columns.shape[1] - columns[:, ::-1].argmax(1)
    y1 = rows.shape[1] - rows[:, ::-1].argmax(1)
    return np.stack((x0, y0, x1, y1), 1) * rows.any(1, keepdims=True)


def _column_runs(crop: np.ndarray) -> tuple[tuple, tuple]:
    """Starts and ends of the runs in the columns of (h, w), each as (R,) columns and rows."""
    height, width = crop.shape
    padded = np.zeros((width, height + 2), np.int8)
    padded[:, 1:-1] = crop.T
    steps = np.diff(padded, axis=1)  # (w, h + 1)
    return np.nonzero(steps == 1), np.nonzero(steps == -1)


def _crop_of_counts(counts: np.ndarray, height: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The crop (h, w) and its offset (x, y) of run lengths in columns of `height` pixels."""
    edges = counts.cumsum()
    edges = edges[: len(edges) // 2 * 2].reshape(-1, 2)
    starts, ends = edges[edges[:, 1] > edges[:, 0]].T
    if not len(starts):
        return np.zeros((0, 0), bool), (0, 0)
    # Cut the runs at the ends of columns.
    first, last = starts // height, (ends - 1) // height
    repeats = last - first + 1
    run = np.repeat(np.arange(len(starts)), repeats)
    column = np.arange(len(run)) - np.repeat(repeats.cumsum() - repeats, repeats) + first[run]
    top = np.maximum(starts[run] - column * height, 0)
    bottom = np.minimum(ends[run] - column * height, height)
    x, y = column[0], top.min()
    steps = np.zeros((column[-1] - x + 1, bottom.max() - y + 1), np.int8)  # (w, h + 1)
    # Not assigned: run lengths of 0 let a run start where another ends.
    np.add.at(steps, (column - x, top - y), 1)
    np.add.at(steps, (column - x, bottom - y), -1)
    crop = steps.cumsum(1, dtype=np.int8)[:, :-1].T.astype(bool)
    return np.ascontiguousarray(crop), (int(x), int(y))


def _counts(text: bytes) -> np.ndarray:
    """Run lengths from COCO's compressed text: 6-bit characters, 5 bits of a number each.

    From the fourth on, numbers are differences from the number two before.
    """
    characters = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if len(characters) and (characters.min() < 0 or characters.max() > 63 or characters[-1] & 32):
        raise ValueError("counts are no COCO run lengths")
    is_last = (characters & 32) == 0
    number = np.r_[0, is_last.cumsum()[:-1]] if len(characters) else characters
    starts = np.flatnonzero(np.r_[True, is_last[:-1]]) if len(characters) else characters
    place = np.arange(len(characters)) - starts[number]
    if len(place) and place.max() > 12:
        raise ValueError("counts are no COCO run lengths")
    values = np.zeros(int(is_last.sum()), np.int64)
    np.add.at(values, number, (characters & 31) << (5 * place))
    # The fifth bit of the last character is the sign.
    negative = (characters[is_last] & 16) != 0
    values[negative] -= 1 << (5 * (place[is_last][negative] + 1))
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values
