"""Panoptic quality of semantic segmentation: all pixels of a class in an image are one segment.

The paper compares semantic models with panoptic ones this way. The rules are the official ones: a
segment is found when its IoU is above one half, where the ignored pixels of the truth do not count;
a predicted segment that lies in ignored pixels by more than half is not wrong.
"""

from collections.abc import Sequence

import numpy as np


class SemanticPQ:
    """Counts over images; then PQ, SQ and RQ over the classes that occur, and mIoU."""

    def __init__(self, class_names: Sequence[str], ignore_label: int) -> None:
        """
        Args:
            class_names: in the order of the labels.
            ignore_label: of the truth.
        """
        self._names = class_names
        self._ignore_label = ignore_label
        num_classes = len(class_names)
        self._iou_sum = np.zeros(num_classes)
        self._tp, self._fp, self._fn = np.zeros((3, num_classes), dtype=np.int64)
        # Pixels by truth and prediction; the last row and column are for neither class.
        self._pixels = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)

    def add(self, truth: np.ndarray, prediction: np.ndarray) -> None:
        """Count an image.

        Args:
            truth: (H, W) labels, or the ignore label.
            prediction: (H, W) labels, or -1 where there is none.

        Raises:
            ValueError: the sizes differ.
        """
        if truth.shape != prediction.shape:
            raise ValueError(
                f"the prediction has {prediction.shape} pixels, the truth has {truth.shape}"
            )
        num_classes = len(self._names)
        truth = np.where(truth == self._ignore_label, num_classes, truth).astype(np.int64)
        prediction = np.where(prediction < 0, num_classes, prediction)
        pairs = truth * (num_classes + 1) + prediction
        pixels = np.bincount(pairs.ravel(), minlength=self._pixels.size)
        pixels = pixels.reshape(self._pixels.shape)
        self._pixels += pixels

        intersection = pixels.diagonal()[:-1]
        true_area = pixels[:-1].sum(1)
        predicted_area, in_void = pixels[:, :-1].sum(0), pixels[-1, :-1]
        union = true_area + predicted_area - intersection - in_void
        iou = intersection / np.maximum(union, 1)
        matched = iou > 0.5
        self._iou_sum += np.where(matched, iou, 0)
        self._tp += matched
        self._fn += ~matched & (true_area > 0)
        self._fp += ~matched & (predicted_area > 0) & (2 * in_void <= predicted_area)

    def results(self) -> dict[str, float]:
        """Returns {"PQ", "SQ", "RQ", "mIoU", "PQ-<class>", ...} in percent, NaN where undefined."""
        counted = self._tp + 0.5 * (self._fp + self._fn)
        with np.errstate(invalid="ignore"):
            pq = self._iou_sum / counted
            rq = self._tp / counted
            sq = np.where(self._tp > 0, self._iou_sum / self._tp, 0)
            known = self._pixels[:-1, :-1]
            true_area = known.sum(1)
            union = true_area + known.sum(0) - known.diagonal()
            iou = known.diagonal() / union
        occurs = counted > 0
        results = {
            "PQ": _mean(pq[occurs]),
            "SQ": _mean(sq[occurs]),
            "RQ": _mean(rq[occurs]),
            "mIoU": _mean(iou[true_area > 0]),
        }
        results |= {f"PQ-{name}": value for name, value in zip(self._names, pq, strict=True)}
        return {name: 100 * float(value) for name, value in results.items()}


def _mean(values: np.ndarray) -> float:
    return values.mean() if len(values) else float("nan")
