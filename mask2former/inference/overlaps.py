"""Which masks of an image are duplicates, and which parts of masks and label maps are fragments.

N instances, H W pixels of the image, h w pixels of a crop.
"""

from collections.abc import Iterator

import cv2
import numpy as np
from scipy import ndimage

from ..utils.instance_masks import InstanceMasks
from ..utils.windows import Window, intersection, shifted

# Diagonal neighbours belong to the same component.
_CONNECTIVITY = 8


def mask_nms(
    masks: InstanceMasks, scores: np.ndarray, max_iou: float, labels: np.ndarray | None = None
) -> np.ndarray:
    """Choose masks in descending order of scores, leaving out those that overlap a chosen one.

    Only pairs whose boxes and areas allow such an overlap are compared pixel by pixel.

    Args:
        masks: N of them.
        scores: (N,).
        max_iou: intersection over union above which two masks are duplicates.
        labels: (N,); if given, only masks of the same label are duplicates.

    Returns:
        (M,) int64 indices of the masks to keep, ascending. Masks without pixels are no duplicates.
    """
    areas, boxes = masks.areas(), masks.boxes()
    order = np.argsort(-scores, kind="stable")
    is_kept = np.ones(len(masks), bool)
    for position, i in enumerate(order.tolist()):
        if not is_kept[i]:
            continue
        others = order[position + 1 :]
        others = others[is_kept[others]]
        if labels is not None:
            others = others[labels[others] == labels[i]]
        sides = np.minimum(boxes[i, 2:], boxes[others, 2:]) - np.maximum(
            boxes[i, :2], boxes[others, :2]
        )
        max_shared = np.minimum(sides.clip(min=0).prod(1), np.minimum(areas[i], areas[others]))
        possible = max_shared > max_iou * (areas[i] + areas[others] - max_shared)
        for j in others[possible].tolist():
            shared = _shared_pixels(masks, i, j)
            if shared > max_iou * (areas[i] + areas[j] - shared):
                is_kept[j] = False
    return np.flatnonzero(is_kept)


def _shared_pixels(masks: InstanceMasks, i: int, j: int) -> int:
    """Pixels that two masks share."""
    windows = masks.window(i), masks.window(j)
    shared = intersection(*windows)
    first, second = (
        masks.crops[k][shifted(shared, window)] for k, window in zip((i, j), windows, strict=True)
    )
    return int(np.count_nonzero(first & second))


def small_components(mask: np.ndarray, min_pixels: int) -> np.ndarray:
    """The connected parts of (h, w) booleans that have fewer pixels.

    Pixels that touch at a corner are connected.

    Returns:
        (h, w) int32: 0 elsewhere, from 1 on the number of the part.
    """
    if not mask.size:
        return mask.astype(np.int32)
    _, components, stats, _ = cv2.connectedComponentsWithStats(
        np.ascontiguousarray(mask).view(np.uint8), connectivity=_CONNECTIVITY
    )
    is_small = stats[:, cv2.CC_STAT_AREA] < min_pixels
    is_small[0] = False  # the background
    return np.where(is_small, is_small.cumsum(), 0).astype(np.int32)[components]


def without_fragments(masks: InstanceMasks, min_pixels: int) -> InstanceMasks:
    """Masks without their connected parts of fewer pixels, in crops of the same size."""
    crops = [crop & (small_components(crop, min_pixels) == 0) for crop in masks.crops]
    return InstanceMasks(crops, masks.offsets, masks.image_size)


def without_segment_fragments(ids: np.ndarray, min_pixels: int) -> np.ndarray:
    """A map of segment ids (H, W) with 0 in the connected parts of fewer pixels."""
    cleaned = ids.copy()
    for place, parts in _fragments(ids, min_pixels):
        cleaned[place][parts > 0] = 0
    return cleaned


def _fragments(labels: np.ndarray, min_pixels: int) -> Iterator[tuple[Window, np.ndarray]]:
    """Yield the box of each label from 1 on in a map (H, W), and its `small_components`."""
    for label, place in enumerate(ndimage.find_objects(labels), start=1):
        if place is not None:
            yield place, small_components(labels[place] == label, min_pixels)


def fill_fragments(labels: np.ndarray, min_pixels: int) -> np.ndarray:
    """Give the small connected parts of a label map the label of what surrounds them.

    A fragment takes the most frequent label of the pixels next to it, corners included, that belong
    to no fragment; of equally frequent ones the smallest. Fragments among fragments follow, from
    outside to inside. If the whole map is fragments, it stays.

    Args:
        labels: (H, W) unsigned integers.
        min_pixels: smaller parts are fragments.

    Returns:
        (H, W), of the same type.
    """
    fragments, count = np.zeros(labels.shape, np.int32), 0
    for place, parts in _fragments(labels.astype(np.int32) + 1, min_pixels):
        fragments[place] += np.where(parts > 0, parts + count, 0)
        count += int(parts.max(initial=0))
    labels = labels.copy()
    while fragments.any():
        numbers, votes = _neighbours(fragments, labels)
        if not len(numbers):
            break
        pairs, counts = np.unique(np.stack((numbers, votes), 1), axis=0, return_counts=True)
        # The last of each fragment: most votes, then smallest label.
        pairs = pairs[np.lexsort((-pairs[:, 1], counts, pairs[:, 0]))]
        winners = pairs[np.r_[pairs[1:, 0] != pairs[:-1, 0], True]]
        new_label = np.full(int(fragments.max()) + 1, -1, np.int64)
        new_label[winners[:, 0]] = winners[:, 1]
        filled = (fragments > 0) & (new_label[fragments] >= 0)
        labels[filled] = new_label[fragments[filled]]
        fragments[filled] = 0
    return labels


def _neighbours(fragments: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pair of a fragment's pixel and a pixel next to it of no fragment.

    Returns:
        The number of the fragment and the label of the other pixel, int64.
    """
    padded = np.pad(fragments, 1, constant_values=-1)  # outside of the image
    labels = np.pad(labels.astype(np.int64), 1)
    rows, columns = np.nonzero(fragments > 0)
    numbers = fragments[rows, columns].astype(np.int64)
    free_numbers, votes = [], []
    for down in (0, 1, 2):
        for right in (0, 1, 2):
            is_free = padded[rows + down, columns + right] == 0
            free_numbers.append(numbers[is_free])
            votes.append(labels[rows[is_free] + down, columns[is_free] + right])
    return np.concatenate(free_numbers), np.concatenate(votes)
