"""Errors of instance segmentation: TIDE's kinds, sizes, confused classes, label-error candidates.

TIDE (Bolya et al., ECCV 2020) and the confusion matrix are hotcoco's. K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from .mask_ap import CompiledMasks, compile_masks

# Area in pixels below which an object is of this size, as in COCO.
SIZES = (("small", 32**2), ("medium", 96**2), ("large", float("inf")))
TIDE_KINDS = {
    "Cls": "classification",
    "Loc": "localisation",
    "Both": "classification and localisation",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
}
_POSITIVE_IOU = 0.5
# Below it there is no object, as in TIDE.
_NO_IOU = 0.1
# A confident prediction of the right class that overlaps its object less than this contradicts its
# mask.
_POOR_IOU = 0.75
# A prediction with more of its area in a crowd needs no object of its own.
_MAX_IN_CROWD = 0.5


@dataclass
class MaskErrors:
    """Counts at IoU 0.5 and what fixing them would gain."""

    ap50: float  # percent
    kinds: list[dict[str, Any]]  # kind, count, dAP in percent points
    sizes: list[dict[str, Any]]
    confusions: list[dict[str, Any]]  # in descending order
    candidates: list[dict[str, Any]]  # label errors, in descending order of rank


def analyze_masks(gt: COCO, results: Sequence[dict[str, Any]], min_score: float) -> MaskErrors:
    """Find out what costs mask AP.

    Args:
        gt: annotations in COCO's format.
        results: in the COCO result format.
        min_score: of predictions that count as confident, in confusions and label errors.
    """
    image_ids, class_ids = sorted(set(gt.getImgIds())), sorted(set(gt.getCatIds()))
    compiled = compile_masks(gt, results, image_ids, class_ids)
    evaluation = compiled.evaluation
    evaluation.evaluate()
    tide = evaluation.tide_errors(pos_thr=_POSITIVE_IOU)
    kinds = [
        {
            "kind": title,
            "count": int(tide["counts"][kind]),
            "dAP": 100 * float(tide["delta_ap"][kind]),
        }
        for kind, title in TIDE_KINDS.items()
    ]
    diagnostics = evaluation.image_diagnostics(iou_thr=_POSITIVE_IOU, score_thr=min_score)
    names = [category["name"] for category in gt.loadCats(class_ids)]
    matrix = evaluation.confusion_matrix(iou_thr=_POSITIVE_IOU, min_score=min_score)["matrix"]
    found = {i - 1 for i, status in diagnostics["gt_status"].items() if status == "matched"}
    return MaskErrors(
        ap50=100 * float(tide["ap_base"]),
        kinds=kinds,
        sizes=_by_size(compiled.annotations, found),
        confusions=confused_pairs(np.asarray(matrix)[:-1, :-1], names),
        candidates=_candidates(
            compiled, diagnostics, dict(zip(class_ids, names, strict=True)), min_score
        ),
    )


def confused_pairs(matrix: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """List the cells off the diagonal in descending order.

    Args:
        matrix: (K, K) counts by ground truth and prediction.
        names: K names.
    """
    matrix = matrix.copy()
    totals = matrix.sum(1)
    np.fill_diagonal(matrix, 0)
    rows, columns = np.nonzero(matrix)
    order = np.argsort(-matrix[rows, columns].astype(float), kind="stable")
    return [
        {
            "gt": names[k],
            "predicted": names[j],
            "count": int(matrix[k, j]),
            "percent of gt": 100 * float(matrix[k, j] / totals[k]),
        }
        for k, j in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
    ]


def size_of(area: float) -> str:
    """Name the size of an object as COCO does."""
    return next(name for name, limit in SIZES if area < limit)


def _by_size(annotations: Sequence[dict[str, Any]], found: set[int]) -> list[dict[str, Any]]:
    rows = []
    for size, _ in SIZES:
        objects = [
            i
            for i, annotation in enumerate(annotations)
            if not annotation["iscrowd"] and size_of(annotation["area"]) == size
        ]
        number = sum(i in found for i in objects)
        rows.append(
            {
                "size": size,
                "objects": len(objects),
                "found": number,
                "missed": len(objects) - number,
                "recall": 100 * number / len(objects) if objects else float("nan"),
            }
        )
    return rows


def _candidates(
    compiled: CompiledMasks, diagnostics: dict[str, Any], names: dict[Any, str], min_score: float
) -> list[dict[str, Any]]:
    """Objects that confident predictions contradict, at most one each, in descending order of rank.

    hotcoco's own candidates compare boxes, and here masks count.
    """
    objects: dict[Any, list[int]] = {}
    for number, annotation in enumerate(compiled.annotations):
        objects.setdefault(annotation["image_id"], []).append(number)
    statuses, gt_matches = diagnostics["dt_status"], diagnostics["gt_match"]
    best: dict[Any, dict[str, Any]] = {}
    for number, result in enumerate(compiled.results):
        if result["score"] < min_score or number + 1 not in statuses:
            continue
        in_image = objects.get(result["image_id"], [])
        annotations = [compiled.annotations[i] for i in in_image]
        iou = _iou(result, annotations)
        annotation, rank = None, result["score"]
        overlap = max(
            (v for v, a in zip(iou, annotations, strict=True) if not a["iscrowd"]), default=0.0
        )
        if statuses[number + 1] == "tp":
            gt_id = diagnostics["dt_match"].get(number + 1)
            if gt_id is None or compiled.annotations[gt_id - 1]["iscrowd"]:
                continue
            annotation = compiled.annotations[gt_id - 1]
            overlap = iou[in_image.index(gt_id - 1)]
            if overlap >= _POOR_IOU:
                continue
            kind, rank = "poor mask", rank * (1 - overlap)
        elif any(a["iscrowd"] and v > _MAX_IN_CROWD for a, v in zip(annotations, iou, strict=True)):
            continue
        elif overlap >= _POSITIVE_IOU:
            closest = next(i for i in range(len(iou)) if iou[i] == overlap)
            annotation = annotations[closest]
            match = gt_matches.get(in_image[closest] + 1)
            is_confirmed = match and compiled.results[match - 1]["score"] >= min_score
            if is_confirmed or annotation["category_id"] == result["category_id"]:
                continue
            kind = "wrong class"
        elif overlap < _NO_IOU:
            kind = "missing label"
        else:
            continue
        key = ("new", number) if annotation is None else annotation["id"]
        if key in best and best[key]["rank"] >= rank:
            continue
        best[key] = {
            "kind": kind,
            "rank": float(rank),
            "image_id": result["image_id"],
            "annotation_id": None if annotation is None else annotation["id"],
            "gt_class": None if annotation is None else names[annotation["category_id"]],
            "predicted_class": names[result["category_id"]],
            "score": float(result["score"]),
            "iou": float(overlap),
            "result": result,
            "annotation": annotation,
        }
    return sorted(best.values(), key=lambda row: -row["rank"])


def _iou(result: dict[str, Any], annotations: Sequence[dict[str, Any]]) -> list[float]:
    """IoU with objects; with a crowd, the share of the prediction in it."""
    if not annotations:
        return []
    size = result["segmentation"]["size"]
    masks = [encoded(a["segmentation"], size) for a in annotations]
    crowds = [int(a["iscrowd"]) for a in annotations]
    return mask_util.iou([encoded(result["segmentation"], size)], masks, crowds)[0].tolist()


def encoded(segmentation: Any, size: Sequence[int]) -> dict[str, Any]:
    """Convert polygons or an RLE, compressed or not, to a compressed RLE of a size (H, W)."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, *size)
    return segmentation
