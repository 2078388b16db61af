"""Panoptic quality of semantic segmentation: all pixels of a class in an image form one segment.

The paper compares semantic models with panoptic ones this way. The rules are the official ones:
segments match if their IoU, computed without the ignored pixels of the ground truth, exceeds 0.5; a
predicted segment with more than half of its area in ignored pixels is no false positive.
"""

import math
from collections.abc import Sequence

import numpy as np


class SemanticPQ:
    """Accumulates images; returns PQ, SQ and RQ averaged over the classes that occur, and mIoU."""

    def __init__(self, class_names: Sequence[str], ignore_label: int) -> None:
        """
        Args:
            class_names: in the order of the labels.
            ignore_label: label of pixels without ground truth.
        """
        self._names = class_names
        self._ignore_label = ignore_label
        num_classes = len(class_names)
        # IoUs of matched segments by class, one per image: summed exactly, in any order.
        self._ious: list[list[float]] = [[] for _ in class_names]
        self._tp, self._fp, self._fn = np.zeros((3, num_classes), dtype=np.int64)
        # Pixels by ground truth and prediction; the last row and column are for void.
        self._pixels = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)

    def add(self, gt: np.ndarray, prediction: np.ndarray) -> None:
        """Add one image.

        Args:
            gt: (H, W) labels, or the ignore label.
            prediction: (H, W) labels, -1 for pixels without a prediction.

        Raises:
            ValueError: the sizes differ.
        """
        if gt.shape != prediction.shape:
            raise ValueError(
                f"the prediction has shape {prediction.shape}, the ground truth has {gt.shape}"
            )
        num_classes = len(self._names)
        gt = np.where(gt == self._ignore_label, num_classes, gt).astype(np.int64)
        prediction = np.where(prediction < 0, num_classes, prediction)
        pairs = gt * (num_classes + 1) + prediction
        pixels = np.bincount(pairs.ravel(), minlength=self._pixels.size)
        pixels = pixels.reshape(self._pixels.shape)
        self._pixels += pixels

        intersection = pixels.diagonal()[:-1]
        gt_area = pixels[:-1].sum(1)
        pred_area, in_void = pixels[:, :-1].sum(0), pixels[-1, :-1]
        union = gt_area + pred_area - intersection - in_void
        iou = intersection / np.maximum(union, 1)
        matched = iou > 0.5
        for label in np.flatnonzero(matched).tolist():
            self._ious[label].append(float(iou[label]))
        self._tp += matched
        self._fn += ~matched & (gt_area > 0)
        self._fp += ~matched & (pred_area > 0) & (2 * in_void <= pred_area)

    def results(self) -> dict[str, float]:
        """Return {"PQ", "SQ", "RQ", "mIoU", "PQ-<class>", ...} in percent, NaN where undefined."""
        iou_sum = np.array([math.fsum(values) for values in self._ious])
        counted = self._tp + 0.5 * (self._fp + self._fn)
        with np.errstate(invalid="ignore"):
            pq = iou_sum / counted
            rq = self._tp / counted
            sq = np.where(self._tp > 0, iou_sum / self._tp, 0)
            known = self._pixels[:-1, :-1]
            gt_area = known.sum(1)
            union = gt_area + known.sum(0) - known.diagonal()
            iou = known.diagonal() / union
        occurs = counted > 0
        results = {
            "PQ": _mean(pq[occurs]),
            "SQ": _mean(sq[occurs]),
            "RQ": _mean(rq[occurs]),
            "mIoU": _mean(iou[gt_area > 0]),
        }
        results |= {f"PQ-{name}": value for name, value in zip(self._names, pq, strict=True)}
        return {name: 100 * float(value) for name, value in results.items()}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
