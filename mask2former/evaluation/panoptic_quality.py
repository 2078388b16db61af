"""Panoptic quality (PQ) counted image by image by the official rules, to the official digits.

H W pixels of an image. Segment ids rarely change along a row, so we count runs of pixels instead of
pixels. Sums over images are exact, so they depend neither on the order of the images nor on the
number of workers or CPUs; the official code adds up per CPU core and differs in the last bits.
"""

import contextlib
import io
import math
import multiprocessing
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from panopticapi.evaluation import PQStat, pq_compute_single_core

from ..data.formats.images import read_panoptic_png
from ..data.label_maps import count_values

_VOID = 0
# Segment ids have 24 bits: a PNG stores them as colours.
_ID_BITS = 24
_ID_MASK = (1 << _ID_BITS) - 1


class SegmentCounts(NamedTuple):
    """What one image contributes to PQ: category ids, with the IoU for matched segments."""

    matched: list[tuple[int, float]]
    missed: list[int]
    wrong: list[int]


def read_segment_ids(file_name: str) -> np.ndarray:
    """Read the segment ids (H, W) uint32 of a panoptic PNG.

    Raises:
        ValueError: the image cannot be read or does not have three colour channels.
    """
    colours = read_panoptic_png(file_name)
    return cv2.cvtColor(colours, cv2.COLOR_RGB2RGBA).view("<u4")[..., 0] & _ID_MASK


def with_sufficient_areas(annotation: dict[str, Any], gt_ids: np.ndarray) -> dict[str, Any]:
    """The annotation of an image with areas that are at least the pixels in the PNG.

    The official code takes areas from the JSON. Missing or smaller ones, such as 0, would give a PQ
    of more than 100. Larger ones stay: those of ADE20K include what other segments occlude, and its
    official scores depend on them. Segments that share an id keep their areas too.

    Args:
        annotation: with `segments_info`.
        gt_ids: (H, W) uint32.
    """
    segments = annotation["segments_info"]
    times = Counter(segment["id"] for segment in segments)
    values, counts = count_values(gt_ids)
    areas = dict(zip(values.tolist(), counts.tolist(), strict=True))
    counted = []
    for segment in segments:
        area, pixels = segment.get("area"), areas.get(segment["id"], 0)
        if area is None:
            area = pixels
        elif times[segment["id"]] == 1:
            area = max(area, pixels)
        counted.append(segment | {"area": area})
    return annotation | {"segments_info": counted}


def as_segment_ids(panoptic_map: np.ndarray) -> np.ndarray:
    """Convert a predicted integer map (H, W) to uint32, keeping the bits that a PNG would keep."""
    return panoptic_map.astype(np.uint32) & _ID_MASK


class Matches(NamedTuple):
    """The segments of one image, matched by the official rules."""

    matched: list[tuple[int, int, float]]  # gt id, predicted id, IoU
    missed: list[int]  # gt ids: false negatives
    wrong: list[int]  # predicted ids: false positives


def count_segments(
    gt_ids: np.ndarray,
    pred_ids: np.ndarray,
    annotation: dict[str, Any],
    pred_segments: Sequence[dict[str, Any]],
    categories: Collection[int],
) -> SegmentCounts:
    """Match the segments of one image.

    Args:
        gt_ids: (H, W) uint32, 0 for void.
        pred_ids: (H, W) uint32, 0 for void.
        annotation: ground truth of the image: `image_id`, `file_name`, `segments_info`.
        pred_segments: predicted segments: `id`, `category_id` of the data set.
        categories: the known category ids.

    Raises:
        ValueError: the sizes differ.
        KeyError: `pred_ids` and `pred_segments` have different ids, or a category is unknown.
    """
    overlaps = segment_overlaps(gt_ids, pred_ids, annotation)
    matches = match_segments(overlaps, annotation, pred_segments, categories)
    return category_counts(matches, annotation, pred_segments)


def match_segments(
    overlaps: dict[tuple[int, int], int],
    annotation: dict[str, Any],
    pred_segments: Sequence[dict[str, Any]],
    categories: Collection[int],
) -> Matches:
    """Match segments of the same class with IoU > 0.5.

    Args:
        overlaps: of `segment_overlaps`.
        annotation, pred_segments, categories: as in `count_segments`.

    Raises:
        KeyError: pixels and `pred_segments` have different ids, or a category is unknown.
    """
    gt_by_id = {segment["id"]: segment for segment in annotation["segments_info"]}
    pred_by_id = {segment["id"]: segment for segment in pred_segments}
    pred_areas: dict[int, int] = {}
    for (_, pred_id), area in overlaps.items():
        pred_areas[pred_id] = pred_areas.get(pred_id, 0) + area
    _check_predictions(annotation["image_id"], pred_areas, pred_by_id, categories)

    matched: list[tuple[int, int, float]] = []
    matched_gt_ids, matched_pred_ids = set(), set()
    for (gt_id, pred_id), intersection in overlaps.items():
        if gt_id not in gt_by_id or pred_id not in pred_by_id:
            continue
        segment = gt_by_id[gt_id]
        if segment["iscrowd"] == 1 or segment["category_id"] != pred_by_id[pred_id]["category_id"]:
            continue
        in_void = overlaps.get((_VOID, pred_id), 0)
        union = pred_areas[pred_id] + segment["area"] - intersection - in_void
        # Only a wrong area in the annotation file makes the union zero.
        iou = intersection / union if union else math.inf
        if iou > 0.5:
            matched.append((gt_id, pred_id, iou))
            matched_gt_ids.add(gt_id)
            matched_pred_ids.add(pred_id)

    missed: list[int] = []
    crowds: dict[int, int] = {}
    for gt_id, segment in gt_by_id.items():
        if gt_id in matched_gt_ids:
            continue
        if segment["iscrowd"] == 1:
            crowds[segment["category_id"]] = gt_id
        else:
            missed.append(gt_id)

    wrong: list[int] = []
    for pred_id, segment in pred_by_id.items():
        if pred_id in matched_pred_ids:
            continue
        category = segment["category_id"]
        ignored = overlaps.get((_VOID, pred_id), 0)
        if category in crowds:
            ignored += overlaps.get((crowds[category], pred_id), 0)
        if ignored / pred_areas[pred_id] <= 0.5:
            wrong.append(pred_id)
    return Matches(matched, missed, wrong)


def category_counts(
    matches: Matches, annotation: dict[str, Any], pred_segments: Sequence[dict[str, Any]]
) -> SegmentCounts:
    """Return the categories of matched, missed and wrong segments."""
    gt = {segment["id"]: segment["category_id"] for segment in annotation["segments_info"]}
    pred = {segment["id"]: segment["category_id"] for segment in pred_segments}
    return SegmentCounts(
        [(gt[gt_id], iou) for gt_id, _, iou in matches.matched],
        [gt[gt_id] for gt_id in matches.missed],
        [pred[pred_id] for pred_id in matches.wrong],
    )


def image_stat(counts: SegmentCounts) -> PQStat:
    """Convert the counts of one image to the official structure."""
    stat = PQStat()
    for category, iou in counts.matched:
        stat[category].tp += 1
        stat[category].iou += iou
    for category in counts.missed:
        stat[category].fn += 1
    for category in counts.wrong:
        stat[category].fp += 1
    return stat


def official_image_stats(
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    gt_folder: str,
    pred_folder: str,
    categories: dict[int, dict[str, Any]],
    num_workers: int | None = None,
) -> list[PQStat]:
    """Run the official code on each image by itself.

    Args:
        pairs: (ground truth annotation, prediction) of each image.
        gt_folder: folder of the ground truth PNGs.
        pred_folder: folder of the predicted PNGs.
        categories: by id.
        num_workers: number of processes; by default one per CPU.

    Returns:
        One `PQStat` per image, in the order of `pairs`.
    """
    compute = partial(
        _official_image_stat,
        gt_folder=gt_folder,
        pred_folder=pred_folder,
        categories=categories,
    )
    with multiprocessing.Pool(num_workers) as pool:
        return pool.map(compute, pairs)


def add_up(image_stats: Sequence[PQStat]) -> PQStat:
    """Add up images; IoUs exactly, by `math.fsum`, so that order and grouping do not matter."""
    total = PQStat()
    ious: dict[int, list[float]] = {}
    for stat in image_stats:
        for category, counts in stat.pq_per_cat.items():
            total[category].tp += counts.tp
            total[category].fp += counts.fp
            total[category].fn += counts.fn
            ious.setdefault(category, []).append(counts.iou)
    for category, values in ious.items():
        total[category].iou = math.fsum(values)
    return total


def _official_image_stat(
    pair: tuple[dict[str, Any], dict[str, Any]],
    gt_folder: str,
    pred_folder: str,
    categories: dict[int, dict[str, Any]],
) -> PQStat:
    # Silence its progress lines, two per image.
    with contextlib.redirect_stdout(io.StringIO()):
        return pq_compute_single_core(0, [pair], gt_folder, pred_folder, categories)


def segment_overlaps(
    gt_ids: np.ndarray, pred_ids: np.ndarray, annotation: dict[str, Any]
) -> dict[tuple[int, int], int]:
    """Count the pixels of each pair (gt id, pred id) that occurs, in ascending order.

    Args:
        gt_ids, pred_ids: (H, W) uint32, 0 for void.
        annotation: with `image_id` and `file_name`, for errors.

    Raises:
        ValueError: the sizes differ.
    """
    if gt_ids.shape != pred_ids.shape:
        raise ValueError(
            f"The prediction for image {annotation['image_id']} has shape {pred_ids.shape}, but "
            f"the ground truth {annotation['file_name']} has shape {gt_ids.shape}."
        )
    gt_ids, pred_ids = gt_ids.ravel(), pred_ids.ravel()
    changes = gt_ids[1:] != gt_ids[:-1]
    changes |= pred_ids[1:] != pred_ids[:-1]
    starts = np.concatenate(([0], np.flatnonzero(changes) + 1))
    lengths = np.diff(starts, append=len(gt_ids))
    pairs = gt_ids[starts].astype(np.uint64) << np.uint64(_ID_BITS)
    pairs, pair_of_run = np.unique(pairs | pred_ids[starts], return_inverse=True)
    # bincount adds in float64, which is exact for integers of this size.
    areas = np.bincount(pair_of_run, weights=lengths)
    return {
        (pair >> _ID_BITS, pair & _ID_MASK): int(area)
        for pair, area in zip(pairs.tolist(), areas.tolist(), strict=True)
    }


def _check_predictions(
    image_id: Any,
    areas: dict[int, int],
    segments: dict[int, dict[str, Any]],
    categories: Collection[int],
) -> None:
    """Raise the errors of the official code, with the same text and in the same order."""
    absent = set(segments)
    for pred_id in sorted(areas):
        if pred_id in segments:
            absent.remove(pred_id)
            category = segments[pred_id]["category_id"]
            if category not in categories:
                raise KeyError(
                    f"In the image with ID {image_id} segment with ID {pred_id} has unknown "
                    f"category_id {category}."
                )
        elif pred_id != _VOID:
            raise KeyError(
                f"In the image with ID {image_id} segment with ID {pred_id} is presented in PNG "
                "and not presented in JSON."
            )
    if absent:
        raise KeyError(
            f"In the image with ID {image_id} the following segment IDs {list(absent)} are "
            "presented in JSON and not presented in PNG."
        )
