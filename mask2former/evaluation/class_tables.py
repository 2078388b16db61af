"""Tables of metrics and ground-truth counts per class, as evaluators write them.

I images, K classes, T IoU thresholds.

panoptic_seg   PQ, SQ, RQ in percent; TP, FP, FN and gt segments
segm           AP, AP50, AP75 in percent; gt objects without crowds
sem_seg        IoU, accuracy in percent; gt and predicted pixels
"""

import json
import logging
import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from panopticapi.evaluation import PQStat
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from ..utils.files import atomic_write, make_folder

# A log shows a longer table by its best and worst classes.
_MAX_LOGGED = 20
_NUM_EXTREMES = 5

Row = dict[str, Any]

_logger = logging.getLogger(__name__)


def result_file(kind: str, dataset: str, task: str) -> str:
    """Return the name, without extension, of a file of an evaluation.

    Args:
        kind: such as "per_class" or "per_image".
        dataset: registered name; several test sets may share a folder.
        task: "panoptic_seg", "segm" or "sem_seg".
    """
    return f"{kind}_{re.sub(r'[^-.0-9A-Za-z]', '_', dataset)}_{task}"


def panoptic_rows(stat: PQStat, categories: Mapping[int, Mapping[str, Any]]) -> list[Row]:
    """Return one row per category, in the order of `categories`; NaN where none occurs."""
    rows = []
    for category_id, category in categories.items():
        counts = stat[category_id]
        total = counts.tp + 0.5 * (counts.fp + counts.fn)
        rows.append(
            {
                "id": category_id,
                "class": str(category.get("name", category_id)),
                "PQ": 100 * counts.iou / total if total else math.nan,
                "SQ": (100 * counts.iou / counts.tp if counts.tp else 0.0) if total else math.nan,
                "RQ": 100 * counts.tp / total if total else math.nan,
                "TP": counts.tp,
                "FP": counts.fp,
                "FN": counts.fn,
                "gt": counts.tp + counts.fn,
            }
        )
    return rows


def mask_rows(
    gt: COCO, evaluation: COCOeval | None, class_names: Sequence[str], img_ids: Collection | None
) -> list[Row]:
    """Return one row per class in ascending order of ids; NaN AP without any gt object.

    Args:
        gt: the annotations.
        evaluation: accumulated; None without predictions.
        class_names: in ascending order of class ids.
        img_ids: the images evaluated; all by default.
    """
    class_ids = sorted(gt.getCatIds())
    images = set(gt.imgs if img_ids is None else img_ids)
    objects = dict.fromkeys(class_ids, 0)
    for annotation in gt.anns.values():
        if annotation["image_id"] in images and not annotation.get("iscrowd", 0):
            objects[annotation["category_id"]] += 1
    rows = []
    for k, (class_id, name) in enumerate(zip(class_ids, class_names, strict=True)):
        row: Row = {"id": class_id, "class": name}
        for metric, threshold in (("AP", None), ("AP50", 0.5), ("AP75", 0.75)):
            row[metric] = math.nan if evaluation is None else _ap(evaluation, k, threshold)
        rows.append(row | {"gt": objects[class_id]})
    return rows


def _ap(evaluation: COCOeval, k: int, threshold: float | None) -> float:
    precision = evaluation.eval["precision"][:, :, k, 0, -1]  # (T, recalls): all areas
    if threshold is not None:
        precision = precision[np.isclose(evaluation.params.iouThrs, threshold)]
    precision = precision[precision > -1]
    return float(100 * precision.mean()) if precision.size else math.nan


def semantic_rows(confusion: np.ndarray, class_names: Sequence[str]) -> list[Row]:
    """Return one row per class; pixels without ground truth do not count.

    Args:
        confusion: (K, K) pixels by prediction and ground truth.
        class_names: K names.
    """
    tp, gt, pred = confusion.diagonal(), confusion.sum(0), confusion.sum(1)
    return [
        {
            "id": k,
            "class": name,
            "IoU": float(100 * tp[k] / (gt[k] + pred[k] - tp[k])) if gt[k] else math.nan,
            "accuracy": float(100 * tp[k] / gt[k]) if gt[k] else math.nan,
            "gt": int(gt[k]),
            "predicted": int(pred[k]),
        }
        for k, name in enumerate(class_names)
    ]


def write_class_table(
    folder: str | None,
    dataset: str,
    task: str,
    rows: Sequence[Row],
    *,
    gt_file: str | None = None,
    image_root: str | None = None,
    results_file: str | None = None,
) -> None:
    """Write per_class_DATASET_TASK.{json,md} atomically and log the table, or its extremes.

    Args:
        folder: created if missing; None only logs.
        dataset: registered name.
        task: "panoptic_seg", "segm" or "sem_seg".
        rows: "id", "class", metrics in percent and counts; the first metric ranks them in the log.
        gt_file, image_root, results_file: the annotation file, the folder of the images and the
            name of the file of predictions, noted in the JSON for tools that read them later.

    Raises:
        WriteError: a file cannot be written.
    """
    if folder:
        make_folder(folder)
        path = os.path.join(folder, result_file("per_class", dataset, task))
        content = {
            "dataset": dataset,
            "task": task,
            "gt_file": gt_file,
            "image_root": image_root,
            "results_file": results_file,
            "classes": [
                {
                    key: None if isinstance(value, float) and math.isnan(value) else value
                    for key, value in row.items()
                }
                for row in rows
            ],
        }
        with atomic_write(f"{path}.json") as file:
            json.dump(content, file, indent=1)
        with atomic_write(f"{path}.md") as file:
            file.write(f"# {dataset}, {task}: classes\n\n{table(rows)}\n")
    if rows:
        _logger.info(f"Classes of {dataset}, {task}:\n{_extremes(rows)}")


def table(rows: Sequence[Row]) -> str:
    """Return rows of the same keys as a Markdown table; floats with two decimals, NaN as a dash."""
    if not rows:
        return "none"
    cells = [[_cell(value) for value in row.values()] for row in rows]
    align = ["left" if isinstance(value, str) else "right" for value in rows[0].values()]
    return tabulate(cells, list(rows[0]), tablefmt="pipe", colalign=align, disable_numparse=True)


def _extremes(rows: Sequence[Row]) -> str:
    if len(rows) <= _MAX_LOGGED:
        return table(rows)
    metric = list(rows[0])[2]
    ranked = sorted(
        (row for row in rows if not math.isnan(row[metric])),
        key=lambda row: row[metric],
        reverse=True,
    )
    if len(ranked) <= 2 * _NUM_EXTREMES:
        return table(ranked)
    return (
        f"best {_NUM_EXTREMES} of {len(rows)} by {metric}\n{table(ranked[:_NUM_EXTREMES])}\n"
        f"worst {_NUM_EXTREMES}\n{table(ranked[-_NUM_EXTREMES:])}"
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.2f}"
    return str(value).replace("|", r"\|").replace("\n", " ")
