"""Panoptic quality counted image by image, by the official rules and with the official digits.

H W pixels of an image. Segments change seldom along a row, so that runs of pixels are counted in
place of pixels.
"""

import math
import multiprocessing
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from panopticapi.evaluation import PQStat
from PIL import Image

_VOID = 0
# Ids have 24 bits: they are the colours of PNG files.
_ID_BITS = 24
_ID_MASK = (1 << _ID_BITS) - 1


class SegmentCounts(NamedTuple):
    """What one image adds to the quality: category ids, for matched segments with their IoU."""

    matched: list[tuple[int, float]]
    missed: list[int]
    wrong: list[int]


def read_segment_ids(file_name: str) -> np.ndarray:
    """The segment ids (H, W) uint32 of a panoptic PNG.

    Raises:
        ValueError: the image has no three colour channels.
    """
    with Image.open(file_name) as image:
        if image.mode not in ("RGB", "RGBA"):
            raise ValueError(
                f"{file_name} is an image of mode {image.mode}: a panoptic PNG has the ids of its "
                "segments in three colour channels."
            )
        pixels = image.convert("RGB").tobytes("raw", "RGBX")
        ids = np.frombuffer(pixels, dtype="<u4").reshape(image.height, image.width)
    return ids & _ID_MASK


def as_segment_ids(panoptic_map: np.ndarray) -> np.ndarray:
    """A predicted map (H, W) of integers as uint32, with the bits that a PNG would keep."""
    return panoptic_map.astype(np.uint32) & _ID_MASK


def count_segments(
    true_ids: np.ndarray,
    found_ids: np.ndarray,
    truth: dict[str, Any],
    found: Sequence[dict[str, Any]],
    categories: Collection[int],
) -> SegmentCounts:
    """Match the segments of one image.

    Args:
        true_ids: (H, W) uint32, 0 where there is no segment.
        found_ids: (H, W) uint32, likewise.
        truth: annotation of the image: `image_id`, `segments_info`.
        found: predicted segments: `id`, `category_id` of the data set.
        categories: the ids of the categories that may be predicted.

    Raises:
        ValueError: the sizes differ.
        KeyError: predicted map and `found` have different ids, or a category is unknown.
    """
    if true_ids.shape != found_ids.shape:
        raise ValueError(
            f"The prediction for image {truth['image_id']} has {found_ids.shape} pixels, the truth "
            f"{truth['file_name']} has {true_ids.shape}."
        )
    overlaps = _overlaps(true_ids, found_ids)
    true_segments = {segment["id"]: segment for segment in truth["segments_info"]}
    found_segments = {segment["id"]: segment for segment in found}
    areas: dict[int, int] = {}
    for (_, found_id), area in overlaps.items():
        areas[found_id] = areas.get(found_id, 0) + area
    _check_found(truth["image_id"], areas, found_segments, categories)

    matched, true_matches, found_matches = [], set(), set()
    for (true_id, found_id), intersection in overlaps.items():
        if true_id not in true_segments or found_id not in found_segments:
            continue
        segment = true_segments[true_id]
        category = segment["category_id"]
        if segment["iscrowd"] == 1 or category != found_segments[found_id]["category_id"]:
            continue
        in_void = overlaps.get((_VOID, found_id), 0)
        union = areas[found_id] + segment["area"] - intersection - in_void
        # Only a wrong area in the annotation file can make it zero.
        iou = intersection / union if union else math.inf
        if iou > 0.5:
            matched.append((category, iou))
            true_matches.add(true_id)
            found_matches.add(found_id)

    missed, crowds = [], {}
    for true_id, segment in true_segments.items():
        if true_id in true_matches:
            continue
        if segment["iscrowd"] == 1:
            crowds[segment["category_id"]] = true_id
        else:
            missed.append(segment["category_id"])

    wrong = []
    for found_id, segment in found_segments.items():
        if found_id in found_matches:
            continue
        category = segment["category_id"]
        ignored = overlaps.get((_VOID, found_id), 0)
        if category in crowds:
            ignored += overlaps.get((crowds[category], found_id), 0)
        if ignored / areas[found_id] <= 0.5:
            wrong.append(category)
    return SegmentCounts(matched, missed, wrong)


def add_up(counts: Sequence[SegmentCounts]) -> PQStat:
    """The sums over images, added in the order of the official code.

    It adds up the images of each CPU core first. So its last digits depend on the number of cores,
    and these do in the same way.
    """
    total = PQStat()
    for part in np.array_split(np.arange(len(counts)), multiprocessing.cpu_count()):
        of_part = PQStat()
        for index in part:
            of_image = counts[index]
            for category, iou in of_image.matched:
                of_part[category].tp += 1
                of_part[category].iou += iou
            for category in of_image.missed:
                of_part[category].fn += 1
            for category in of_image.wrong:
                of_part[category].fp += 1
        total += of_part
    return total


def _overlaps(true_ids: np.ndarray, found_ids: np.ndarray) -> dict[tuple[int, int], int]:
    """Pixels of each pair (true id, found id) that occurs, in ascending order."""
    true_ids, found_ids = true_ids.ravel(), found_ids.ravel()
    changes = true_ids[1:] != true_ids[:-1]
    changes |= found_ids[1:] != found_ids[:-1]
    starts = np.concatenate(([0], np.flatnonzero(changes) + 1))
    lengths = np.diff(starts, append=len(true_ids))
    pairs = true_ids[starts].astype(np.uint64) << np.uint64(_ID_BITS)
    pairs, pair_of_run = np.unique(pairs | found_ids[starts], return_inverse=True)
    # Sums in float64, which are exact.
    areas = np.bincount(pair_of_run, weights=lengths)
    return {
        (pair >> _ID_BITS, pair & _ID_MASK): int(area)
        for pair, area in zip(pairs.tolist(), areas.tolist(), strict=True)
    }


def _check_found(
    image_id: Any,
    areas: dict[int, int],
    segments: dict[int, dict[str, Any]],
    categories: Collection[int],
) -> None:
    """Raises the errors of the official code, in its words and in its order."""
    absent = set(segments)
    for found_id in sorted(areas):
        if found_id in segments:
            absent.remove(found_id)
            category = segments[found_id]["category_id"]
            if category not in categories:
                raise KeyError(
                    f"In the image with ID {image_id} segment with ID {found_id} has unknown "
                    f"category_id {category}."
                )
        elif found_id != _VOID:
            raise KeyError(
                f"In the image with ID {image_id} segment with ID {found_id} is presented in PNG "
                "and not presented in JSON."
            )
    if absent:
        raise KeyError(
            f"In the image with ID {image_id} the following segment IDs {list(absent)} are "
            "presented in JSON and not presented in PNG."
        )
