"""Label maps of targets that do not overlap: uint8, cheap to augment and to send.

    Runs.layers → transform_layers → pack_layers, layers_to_boxes

Layer 0 holds the first 254 of N targets under the labels 1 to 254, layer 1 the next, and so on: 0
is nothing and 255 what Detectron2's crops pad with.

Shape letters: N targets, H W pixels.
"""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes

from .lazy_augmentation import apply_labels
from .packed_masks import LABELS_PER_PLANE, PackedMasks


def present_values(labels: np.ndarray) -> np.ndarray:
    """The distinct values of a label map, ascending.

    Neighbouring pixels mostly agree, so one value per run is sorted instead of every pixel.
    """
    return Runs(labels).values


class Runs:
    """A label map as runs of equal labels, row by row: few where neighbours mostly agree."""

    def __init__(self, labels: np.ndarray) -> None:
        flat = labels.reshape(-1)
        is_start = np.ones(flat.shape, dtype=bool)
        np.not_equal(flat[1:], flat[:-1], out=is_start[1:])
        starts = np.flatnonzero(is_start)
        self._size = labels.shape
        self._lengths = np.diff(starts, append=flat.size)
        # The labels that occur, ascending, and which of them each run has.
        self.values, self._indices = np.unique(flat[starts], return_inverse=True)

    def layers(self, values: np.ndarray) -> list[np.ndarray]:
        """Label maps (H, W) uint8: the first 254 values become 1 to 254 of the first, and so on.

        Args:
            values: distinct labels, each of which occurs.
        """
        layers = []
        for start in range(0, len(values), LABELS_PER_PLANE):
            chunk = values[start : start + LABELS_PER_PLANE]
            new_labels = np.zeros(self.values.shape, dtype=np.uint8)
            new_labels[np.searchsorted(self.values, chunk)] = np.arange(1, len(chunk) + 1)
            layers.append(np.repeat(new_labels[self._indices], self._lengths).reshape(self._size))
        return layers


def transform_layers(layers: Sequence[np.ndarray], transforms: T.TransformList) -> list[np.ndarray]:
    """Apply to each layer what was applied to the image.

    Raises:
        ValueError: a transform pads with a value that the layers use for a segment.
    """
    for transform in transforms.transforms:
        if (
            isinstance(transform, T.PadTransform)
            and 0 < transform.seg_pad_value <= LABELS_PER_PLANE
        ):
            raise ValueError(
                f"An augmentation pads segmentations with {transform.seg_pad_value}; panoptic maps "
                "can be padded with 0 or 255 (seg_pad_value)."
            )
    return [apply_labels(transforms, layer) for layer in layers]


def pack_layers(
    layers: Sequence[np.ndarray], num_masks: int, image_size: tuple[int, int]
) -> PackedMasks:
    """Masks that do not overlap from label maps; empty where a label does not occur.

    Args:
        layers: (H, W) uint8, labelled as by `segment_layers`.
        num_masks: N.
        image_size: (H, W), needed when there is no layer.
    """
    planes = np.stack(layers) if layers else np.empty((0, *image_size), dtype=np.uint8)
    return PackedMasks(torch.from_numpy(planes), num_masks, overlapping=False)


def layers_to_boxes(layers: Sequence[np.ndarray], num_segments: int) -> Boxes:
    """The tight boxes of augmented layers; zeros where a segment was cropped away."""
    boxes = [np.empty((0, 4))]
    for start, layer in zip(range(0, num_segments, LABELS_PER_PLANE), layers, strict=True):
        boxes.append(_label_boxes(layer, min(num_segments - start, LABELS_PER_PLANE)))
    return Boxes(torch.from_numpy(np.concatenate(boxes)).float())


def _label_boxes(labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Boxes (num_labels, 4) of the labels 1, 2, ... as `BitMasks.get_bounding_boxes` gives them.

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
