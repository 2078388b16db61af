"""Targets that do not overlap as uint8 label maps, which are cheap to augment and transfer.

    Runs.layers → transform_layers → pack_layers, layers_to_boxes

Layer 0 holds the first 254 of N targets as labels 1 to 254, layer 1 the next 254, and so on. 0 is
background, and Detectron2's crops pad with 255.

Shape letters: N targets, H W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes

from .lazy_augmentation import apply_labels
from .packed_masks import LABELS_PER_PLANE, PackedMasks

_COUNTED_PIXELS = 2**22


def present_values(labels: np.ndarray) -> np.ndarray:
    """The distinct values of a label map, ascending; faster than `np.unique` on all pixels."""
    return Runs(labels).values


def check_whole(labels: np.ndarray, file_name: str) -> None:
    """Check that a label map of floats holds whole numbers; others do.

    Args:
        labels: (h, w), as stored.
        file_name: of the label map, for the error.

    Raises:
        ValueError: it has other labels, such as NaN, which no cast to int tells from classes.
    """
    if labels.dtype.kind != "f":
        return
    is_whole = np.isfinite(labels) & (np.floor(labels) == labels)
    if not is_whole.all():
        listed = [f"{value:g}" for value in np.unique(labels[~is_whole])[:6].tolist()]
        raise ValueError(
            f"{file_name} has labels that are not whole numbers: {', '.join(listed[:5])}"
            f"{', ...' * (len(listed) > 5)}; a label map stores the class of each pixel, so save "
            "it with integers"
        )


def count_values(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of a label map, ascending, and how many pixels each has."""
    runs = Runs(labels)
    return runs.values, runs.counts()


def count_ids(ids: np.ndarray, max_id: int) -> np.ndarray:
    """Pixels of each id, (at least max_id + 1,) int64, in an (H, W) map of ids from 0 on."""
    counts = np.zeros(max(int(ids.max(initial=0)), max_id) + 1, np.int64)
    # NumPy counts in 64-bit copies, of a few rows at a time.
    step = max(1, _COUNTED_PIXELS // max(1, ids.shape[1]))
    for start in range(0, len(ids), step):
        counts += np.bincount(ids[start : start + step].reshape(-1), minlength=len(counts))
    return counts


class Runs:
    """A label map as runs of equal labels in row order: far fewer than pixels."""

    def __init__(self, labels: np.ndarray) -> None:
        flat = labels.reshape(-1)
        is_start = np.ones(flat.shape, dtype=bool)
        np.not_equal(flat[1:], flat[:-1], out=is_start[1:])
        starts = np.flatnonzero(is_start)
        self._size = labels.shape
        self._lengths = np.diff(starts, append=flat.size)
        # The distinct labels, ascending, and the index of each run's label among them.
        self.values, self._indices = np.unique(flat[starts], return_inverse=True)

    def counts(self) -> np.ndarray:
        """Pixels of each of `values`."""
        # bincount adds in float64, which is exact for integers of this size.
        return np.bincount(self._indices, self._lengths, len(self.values)).astype(np.int64)

    def replaced(self, new_values: np.ndarray) -> np.ndarray:
        """The label map (H, W) with each of `values` replaced by the new value at its place."""
        return np.repeat(new_values[self._indices], self._lengths).reshape(self._size)

    def layers(self, values: np.ndarray) -> list[np.ndarray]:
        """Layers (H, W) uint8 of the given values: the first 254 become 1 to 254 of layer 0.

        Args:
            values: distinct labels of the map.
        """
        layers = []
        for start in range(0, len(values), LABELS_PER_PLANE):
            chunk = values[start : start + LABELS_PER_PLANE]
            new_labels = np.zeros(self.values.shape, dtype=np.uint8)
            new_labels[np.searchsorted(self.values, chunk)] = np.arange(1, len(chunk) + 1)
            layers.append(np.repeat(new_labels[self._indices], self._lengths).reshape(self._size))
        return layers


def transform_layers(layers: Sequence[np.ndarray], transforms: T.TransformList) -> list[np.ndarray]:
    """Apply the transforms of the image to each layer.

    Raises:
        ValueError: a transform pads with a label of a segment.
    """
    for transform in transforms.transforms:
        if (
            isinstance(transform, T.PadTransform)
            and 0 < transform.seg_pad_value <= LABELS_PER_PLANE
        ):
            raise ValueError(
                f"An augmentation pads segmentations with {transform.seg_pad_value}; set its "
                "seg_pad_value to 0 or 255, the only values that panoptic maps can be padded with."
            )
    return [apply_labels(transforms, layer) for layer in layers]


def pack_layers(
    layers: Sequence[np.ndarray], num_masks: int, image_size: tuple[int, int]
) -> PackedMasks:
    """Pack label maps as masks that do not overlap; a mask without pixels is empty.

    Args:
        layers: (H, W) uint8, from `Runs.layers`, possibly augmented.
        num_masks: N.
        image_size: (H, W), needed if `layers` is empty.
    """
    planes = np.stack(layers) if layers else np.empty((0, *image_size), dtype=np.uint8)
    return PackedMasks(torch.from_numpy(planes), num_masks, overlapping=False)


def layers_to_boxes(layers: Sequence[np.ndarray], num_segments: int) -> Boxes:
    """Tight boxes of the segments in augmented layers; zeros for segments outside the crop."""
    boxes = [np.empty((0, 4))]
    for start, layer in zip(range(0, num_segments, LABELS_PER_PLANE), layers, strict=True):
        boxes.append(_label_boxes(layer, min(num_segments - start, LABELS_PER_PLANE)))
    return Boxes(torch.from_numpy(np.concatenate(boxes)).float())


def _label_boxes(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Boxes (num_labels, 4) of the labels 1, 2, ..., equal to `BitMasks.get_bounding_boxes`.

    Args:
        labels: (H, W) uint8.
        num_labels: at most 255.
    """
    height, width = labels.shape
    is_start = np.ones(labels.shape, dtype=bool)  # of a run of equal labels in a row
    np.not_equal(labels[:, 1:], labels[:, :-1], out=is_start[:, 1:])
    starts = np.flatnonzero(is_start)
    values, rows = labels.reshape(-1)[starts], starts // width
    columns, lengths = starts - rows * width, np.diff(starts, append=labels.size)
    boxes = np.zeros((256, 4), dtype=np.int64)
    boxes[:, :2] = width, height
    np.minimum.at(boxes[:, 0], values, columns)
    np.minimum.at(boxes[:, 1], values, rows)
    np.maximum.at(boxes[:, 2], values, columns + lengths)
    np.maximum.at(boxes[:, 3], values, rows + 1)
    boxes[boxes[:, 2] == 0] = 0
    return boxes[1 : num_labels + 1]
