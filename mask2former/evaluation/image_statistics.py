"""What each image contributes to PQ and mIoU, in files that runs are compared by.

I images, K classes, R resamples of the images.

An evaluation writes per_image_DATASET_TASK.json. Its sums over images give the metrics, so images
can be resampled without predictions or ground truth.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from panopticapi.evaluation import PQStat

from ..utils.files import atomic_write, make_folder
from .class_tables import result_file

_VERSION = 1


class ImageStatistics(Protocol):
    """Metrics of any weighted sum of images."""

    image_ids: list
    class_names: list[str]

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics, the most important first."""

    def scores(self, weights: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Evaluate weighted images.

        Args:
            weights: (R, I), how often each image counts.

        Returns:
            {metric: (R,)} and the first metric per class (R, K), all in percent, NaN if undefined.
        """

    def gt_counts(self) -> np.ndarray:
        """(I, K) ground truth per image and class, which two runs must share."""


@dataclass
class PanopticStatistics:
    """PQ counts per image and class."""

    image_ids: list
    class_names: list[str]
    is_thing: np.ndarray  # (K,) bool
    iou: np.ndarray  # (I, K) sums over matched segments
    tp: np.ndarray  # (I, K)
    fp: np.ndarray  # (I, K)
    fn: np.ndarray  # (I, K)
    metric_names = ("PQ", "SQ", "RQ", "PQ_th", "PQ_st")

    def scores(self, weights: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        weights = weights.astype(float)
        iou, tp = weights @ self.iou, weights @ self.tp
        total = tp + 0.5 * (weights @ (self.fp + self.fn))
        with np.errstate(invalid="ignore", divide="ignore"):
            occurs = total > 0
            pq = np.where(occurs, 100 * iou / total, np.nan)
            rq = np.where(occurs, 100 * tp / total, np.nan)
            sq = np.where(tp > 0, 100 * iou / tp, np.where(occurs, 0.0, np.nan))
        metrics = {
            "PQ": row_means(pq),
            "SQ": row_means(sq),
            "RQ": row_means(rq),
            "PQ_th": row_means(pq[:, self.is_thing]),
            "PQ_st": row_means(pq[:, ~self.is_thing]),
        }
        return metrics, pq

    def gt_counts(self) -> np.ndarray:
        return self.tp + self.fn


@dataclass
class SemanticStatistics:
    """Pixels per image and class."""

    image_ids: list
    class_names: list[str]
    tp: np.ndarray  # (I, K)
    gt: np.ndarray  # (I, K)
    pred: np.ndarray  # (I, K), where there is ground truth
    metric_names = ("mIoU", "fwIoU", "mACC", "pACC")

    def scores(self, weights: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        weights = weights.astype(float)
        tp, gt, pred = weights @ self.tp, weights @ self.gt, weights @ self.pred
        with np.errstate(invalid="ignore", divide="ignore"):
            iou = np.where(gt > 0, 100 * tp / (gt + pred - tp), np.nan)
            accuracy = np.where(gt > 0, 100 * tp / gt, np.nan)
            metrics = {
                "mIoU": row_means(iou),
                "fwIoU": np.nansum(iou * gt, 1) / gt.sum(1),
                "mACC": row_means(accuracy),
                "pACC": 100 * tp.sum(1) / gt.sum(1),
            }
        return metrics, iou

    def gt_counts(self) -> np.ndarray:
        return self.gt


def row_means(values: np.ndarray) -> np.ndarray:
    """Mean of each row of (R, K) over the classes that are not NaN; NaN without any."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(1) / known.sum(1)


# ---- files ----


def write_panoptic_statistics(
    folder: str,
    dataset: str,
    categories: Mapping[int, Mapping[str, Any]],
    image_ids: Sequence,
    stats: Sequence[PQStat],
) -> None:
    """Write the counts of each image atomically: rows [class id, IoU sum, TP, FP, FN].

    Raises:
        WriteError: the file cannot be written.
    """
    classes = [
        {"id": k, "name": str(c.get("name", k)), "isthing": int(c["isthing"])}
        for k, c in categories.items()
    ]
    rows = [
        [
            [k, c.iou if math.isfinite(c.iou) else None, c.tp, c.fp, c.fn]
            for k, c in sorted(stat.pq_per_cat.items())
        ]
        for stat in stats
    ]
    _write(folder, dataset, "panoptic_seg", classes, list(zip(image_ids, rows, strict=True)))


def write_semantic_statistics(
    folder: str, dataset: str, class_names: Sequence[str], images: Mapping[str, list[list[int]]]
) -> None:
    """Write the pixels of each image atomically: rows [predicted class, gt class, pixels].

    Args:
        folder: where.
        dataset: registered name.
        class_names: in the order of the labels.
        images: rows by file name. The folder that all files share is left out, so that runs of
            different machines have the same names.

    Raises:
        WriteError: the file cannot be written.
    """
    folders = [name.split("/")[:-1] for name in images]
    depth = len(os.path.commonprefix(folders)) if folders else 0
    rows = sorted(("/".join(name.split("/")[depth:]), rows) for name, rows in images.items())
    classes = [{"id": k, "name": name} for k, name in enumerate(class_names)]
    _write(folder, dataset, "sem_seg", classes, rows)


def _write(folder: str, dataset: str, task: str, classes: list, images: Sequence) -> None:
    make_folder(folder)
    content = {
        "version": _VERSION,
        "dataset": dataset,
        "task": task,
        "classes": classes,
        "images": images,
    }
    path = os.path.join(folder, f"{result_file('per_image', dataset, task)}.json")
    with atomic_write(path) as file:
        # `dumps` is much faster than `dump`.
        file.write(json.dumps(content, separators=(",", ":")))


def read_statistics(path: str) -> tuple[str, str, PanopticStatistics | SemanticStatistics]:
    """Read a file that an evaluation wrote.

    Returns:
        Data set, task and statistics.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is not such a file, or of another version.
    """
    with open(path) as file:
        try:
            content = json.load(file)
            version = content["version"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a per_image file of an evaluation: {error}") from error
    if version != _VERSION:
        raise ValueError(
            f"{path} has format {version}, but {_VERSION} is known: evaluate again with this "
            "version."
        )
    try:
        task, dataset = content["task"], content["dataset"]
        if task == "panoptic_seg":
            return dataset, task, _read_panoptic(content)
        if task == "sem_seg":
            return dataset, task, _read_semantic(content)
        raise ValueError(f"unknown task {task!r}")
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): evaluate again."
        ) from error


def _read_panoptic(content: dict[str, Any]) -> PanopticStatistics:
    classes, images = content["classes"], content["images"]
    columns = {c["id"]: k for k, c in enumerate(classes)}
    counts = np.zeros((4, len(images), len(classes)))
    for i, (_, rows) in enumerate(images):
        for class_id, *values in rows:
            counts[:, i, columns[class_id]] = [math.inf if v is None else v for v in values]
    return PanopticStatistics(
        image_ids=[image_id for image_id, _ in images],
        class_names=[c["name"] for c in classes],
        is_thing=np.array([c["isthing"] == 1 for c in classes], dtype=bool),
        iou=counts[0],
        tp=counts[1],
        fp=counts[2],
        fn=counts[3],
    )


def _read_semantic(content: dict[str, Any]) -> SemanticStatistics:
    classes, images = content["classes"], content["images"]
    tp, gt, pred = np.zeros((3, len(images), len(classes)))
    for i, (_, rows) in enumerate(images):
        for predicted, label, pixels in rows:
            pred[i, predicted] += pixels
            gt[i, label] += pixels
            if predicted == label:
                tp[i, label] += pixels
    return SemanticStatistics(
        image_ids=[name for name, _ in images],
        class_names=[c["name"] for c in classes],
        tp=tp,
        gt=gt,
        pred=pred,
    )


def confusion_of(path: str) -> tuple[list[str], np.ndarray]:
    """Sum a per_image file of semantic segmentation: class names, (K, K) by prediction and gt."""
    with open(path) as file:
        content = json.load(file)
    names = [c["name"] for c in content["classes"]]
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    for _, rows in content["images"]:
        for predicted, label, pixels in rows:
            confusion[predicted, label] += pixels
    return names, confusion
