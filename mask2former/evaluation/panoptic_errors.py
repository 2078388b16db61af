"""Why panoptic segments count as false positives or false negatives: this project's own kinds.

TIDE defines kinds of errors for detections with scores; these are an analogue for segments, which
have none. Each false positive and false negative of the official PQ gets the first kind that holds:

wrong class     IoU > 0.5 with a segment of another class
merged          a prediction covers more than half of each of several gt segments of its class
split           a gt segment covers more than half of each of several predictions of its class
poor overlap    best IoU 0.1 to 0.5, with a segment of the same class
both            best IoU 0.1 to 0.5, with a segment of another class only
background      false positives: IoU < 0.1 with every gt segment
missed          false negatives: IoU < 0.1 with every prediction
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..utils.files import atomic_write, make_folder
from .class_tables import result_file
from .panoptic_quality import Matches

KINDS = ("wrong class", "merged", "split", "poor overlap", "both", "background", "missed")
# An overlap below this IoU is none, as in TIDE.
_MIN_IOU = 0.1
_VOID = 0


class SegmentError(NamedTuple):
    """A false positive or false negative."""

    is_fp: bool
    kind: str
    gt_category: int | None  # of the other side: that of the best overlap
    pred_category: int | None
    iou: float
    gt_id: int | None
    pred_id: int | None
    area: int  # pixels of the segment itself


def find_errors(
    overlaps: dict[tuple[int, int], int],
    matches: Matches,
    annotation: dict[str, Any],
    pred_segments: Sequence[dict[str, Any]],
) -> list[SegmentError]:
    """Classify the false positives and false negatives of one image.

    Args:
        overlaps: pixels of each (gt id, predicted id).
        matches: of `match_segments`.
        annotation: with `segments_info`, areas included.
        pred_segments: `id`, `category_id`.
    """
    gt = {s["id"]: s for s in annotation["segments_info"] if s["iscrowd"] != 1}
    pred = {s["id"]: s for s in pred_segments}
    areas: Counter[int] = Counter()
    for (_, pred_id), pixels in overlaps.items():
        areas[pred_id] += pixels
    pairs = {}  # (gt id, pred id) → IoU, gt covered, prediction covered
    for (gt_id, pred_id), pixels in overlaps.items():
        if gt_id in gt and pred_id in pred:
            known = areas[pred_id] - overlaps.get((_VOID, pred_id), 0)
            gt_area = gt[gt_id]["area"]
            union = known + gt_area - pixels
            pairs[gt_id, pred_id] = (
                pixels / union if union else 1.0,
                2 * pixels > gt_area,
                2 * pixels > known,
            )

    def is_same(pair: tuple[int, int]) -> bool:
        return gt[pair[0]]["category_id"] == pred[pair[1]]["category_id"]

    # Predictions that cover several gt segments, and gt segments that cover several predictions.
    covered = Counter(p for (g, p), (_, in_pred, _) in pairs.items() if in_pred and is_same((g, p)))
    pieces = Counter(g for (g, p), (_, _, in_gt) in pairs.items() if in_gt and is_same((g, p)))

    def classify(segment_id: int, side: int) -> SegmentError:
        own = {pair: values for pair, values in pairs.items() if pair[side] == segment_id}
        best = max(own, key=lambda pair: own[pair][0], default=None)
        kind, other = "missed" if side == 0 else "background", None
        if best is not None:
            same = [pair for pair in own if is_same(pair)]
            closest = max(same, key=lambda pair: own[pair][0], default=None)
            if own[best][0] > 0.5 and not is_same(best):
                kind, other = "wrong class", best
            elif merged := [pair for pair in same if own[pair][1] and covered[pair[1]] > 1]:
                kind, other = "merged", merged[0]
            elif split := [pair for pair in same if own[pair][2] and pieces[pair[0]] > 1]:
                kind, other = "split", split[0]
            elif closest is not None and own[closest][0] >= _MIN_IOU:
                kind, other = "poor overlap", closest
            elif own[best][0] >= _MIN_IOU:
                kind, other = "both", best
        gt_id, pred_id = other or ((segment_id, None) if side == 0 else (None, segment_id))
        return SegmentError(
            is_fp=side == 1,
            kind=kind,
            gt_category=None if gt_id is None else gt[gt_id]["category_id"],
            pred_category=None if pred_id is None else pred[pred_id]["category_id"],
            iou=round(own[other][0], 4) if other else 0.0,
            gt_id=gt_id,
            pred_id=pred_id,
            area=int(gt[segment_id]["area"] if side == 0 else areas[segment_id]),
        )

    return [classify(gt_id, 0) for gt_id in matches.missed] + [
        classify(pred_id, 1) for pred_id in matches.wrong
    ]


def write_errors(
    folder: str,
    dataset: str,
    categories: Mapping[int, Mapping[str, Any]],
    gt_folder: str,
    images: Mapping[str, Sequence[SegmentError]],
) -> None:
    """Write segment_errors_DATASET_panoptic_seg.json atomically.

    Args:
        folder: created if missing.
        dataset: registered name.
        categories: by id.
        gt_folder: of the panoptic PNGs.
        images: errors by the file name of the panoptic PNG.

    Raises:
        WriteError: the file cannot be written.
    """
    make_folder(folder)
    content = {
        "dataset": dataset,
        "gt_folder": gt_folder,
        "classes": {k: str(c.get("name", k)) for k, c in categories.items()},
        "columns": SegmentError._fields,
        "images": images,
    }
    name = result_file("segment_errors", dataset, "panoptic_seg")
    with atomic_write(os.path.join(folder, f"{name}.json")) as file:
        file.write(json.dumps(content, separators=(",", ":")))


def error_table(
    classes: Sequence[Mapping[str, Any]], errors: Sequence[SegmentError]
) -> list[dict[str, Any]]:
    """Count errors by kind, with the PQ gained if those of one kind did not count.

    Args:
        classes: rows of the table per class: `id`, `TP`, `FP`, `FN`, `SQ` in percent.
        errors: of all images.
    """
    base = _pq(classes, Counter(), Counter())
    rows = []
    for kind in KINDS:
        fp = Counter(e.pred_category for e in errors if e.kind == kind and e.is_fp)
        fn = Counter(e.gt_category for e in errors if e.kind == kind and not e.is_fp)
        rows.append(
            {
                "kind": kind,
                "FP": fp.total(),
                "FN": fn.total(),
                "dPQ": _pq(classes, fp, fn) - base,
            }
        )
    return rows


def _pq(classes: Sequence[Mapping[str, Any]], fp: Counter, fn: Counter) -> float:
    values = []
    for row in classes:
        if row["TP"] + row["FP"] + row["FN"] == 0:
            continue
        k = row["id"]
        total = row["TP"] + 0.5 * (row["FP"] - fp[k] + row["FN"] - fn[k])
        # A class without anything left has no PQ of its own: it keeps 0.
        values.append(row["SQ"] * row["TP"] / total if total else 0.0)
    return sum(values) / len(values) if values else math.nan
