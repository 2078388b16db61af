"""Mask AP of weighted images, from the matches of one evaluation.

I images, K classes, T IoU thresholds, D detections of a class, N of them true positives,
R resamples of the images.

hotcoco matches each image once. A resample counts an image's detections and objects as often as it
was drawn, which needs no new matching. Only the order of equal scores in different images may
differ from an evaluation of copied images.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO

from .image_statistics import row_means
from .mask_ap import compile_masks

_AREAS = [0.0, 1e10]
# Values of one weighted cumulative sum.
_CHUNK = 4_000_000


class _ClassMatches(NamedTuple):
    """Detections of a class in descending order of scores."""

    image: np.ndarray  # (D,) index
    tp: np.ndarray  # (T, D) bool
    ignored: np.ndarray  # (T, D) bool


@dataclass
class MaskStatistics:
    """Matches of detections with objects, as `ImageStatistics`."""

    image_ids: list
    class_names: list[str]
    thresholds: np.ndarray  # (T,) IoU
    recalls: np.ndarray
    matches: list[_ClassMatches]  # K
    objects: np.ndarray  # (I, K) without crowds
    metric_names = ("AP", "AP50", "AP75")

    def scores(self, weights: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        ap = np.stack([self._class_ap(k, weights) for k in range(len(self.matches))], 2)
        per_threshold = {0.5: None, 0.75: None} | {
            round(float(t), 2): row_means(values)
            for t, values in zip(self.thresholds, ap, strict=True)
        }
        # Each class with an object has a value at every threshold, so means of means are the mean.
        metrics = {
            "AP": row_means(ap.mean(0)),
            "AP50": per_threshold[0.5],
            "AP75": per_threshold[0.75],
        }
        return metrics, ap.mean(0)

    def gt_counts(self) -> np.ndarray:
        return self.objects

    def _class_ap(self, k: int, weights: np.ndarray) -> np.ndarray:
        """AP (T, R) in percent, NaN without an object."""
        matches = self.matches[k]
        num_objects = weights @ self.objects[:, k]  # (R,)
        ap = np.zeros((len(self.thresholds), len(weights)))
        step = max(1, _CHUNK // max(1, len(matches.image)))
        for start in range(0, len(weights), step):
            rows = slice(start, start + step)
            counted = weights[rows][:, matches.image]  # (r, D)
            for t in range(len(self.thresholds)):
                ap[t, rows] = self._average_precision(
                    counted, matches.tp[t], matches.ignored[t], num_objects[rows]
                )
        return np.where(num_objects > 0, 100 * ap, np.nan)

    def _average_precision(
        self, counted: np.ndarray, tp: np.ndarray, ignored: np.ndarray, num_objects: np.ndarray
    ) -> np.ndarray:
        """Area under the interpolated curve (r,) of detections counted (r, D) times."""
        # Precision is highest, and recall rises, at true positives only.
        positions = np.flatnonzero(tp & ~ignored)
        if not len(positions):
            return np.zeros(len(counted))
        seen = np.cumsum(counted * ~ignored, axis=1, dtype=float)[:, positions]  # (r, N)
        true = np.cumsum(counted[:, positions], axis=1, dtype=float)
        precision = np.divide(true, seen, out=np.zeros_like(true), where=seen > 0)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = true / np.maximum(num_objects, 1)[:, None]
        # How many of the recall thresholds each true positive is the first to reach.
        reached = np.searchsorted(self.recalls, recall, side="right")
        steps = np.diff(reached, axis=1, prepend=0)
        return (steps * precision).sum(1) / len(self.recalls)


def match_masks(
    gt: COCO, results: Sequence[dict[str, Any]], max_detections: int = 100
) -> MaskStatistics:
    """Match the results of one run with the ground truth.

    Args:
        gt: annotations in COCO's format.
        results: in the COCO result format.
        max_detections: per image, as AP counts them.

    Raises:
        ValueError: a result belongs to an image that `gt` does not list.
    """
    unknown = {result["image_id"] for result in results}.difference(gt.imgs)
    if unknown:
        raise ValueError(
            f"predictions exist for {len(unknown)} images that the ground truth does not list: "
            f"{list(unknown)[:5]}"
        )
    image_ids, class_ids = sorted(set(gt.getImgIds())), sorted(set(gt.getCatIds()))
    compiled = compile_masks(gt, results, image_ids, class_ids)
    evaluation = compiled.evaluation
    evaluation.params.area_rng, evaluation.params.area_rng_lbl = [_AREAS], ["all"]
    evaluation.params.max_dets = [max_detections]
    evaluation.evaluate()
    thresholds = np.array(evaluation.params.iou_thrs)
    objects = np.zeros((len(image_ids), len(class_ids)))
    parts: list[list[tuple[np.ndarray, ...]]] = [[] for _ in class_ids]
    for entry in evaluation.eval_imgs:
        if entry is None:
            continue
        i, k = entry["image_id"] - 1, entry["category_id"] - 1
        objects[i, k] = len(entry["gtIgnore"]) - sum(entry["gtIgnore"])
        scores = np.array(entry["dtScores"])
        shape = (len(thresholds), len(scores))
        tp = np.array(entry["dtMatched"], dtype=bool).reshape(shape)
        ignored = np.array(entry["dtIgnore"], dtype=bool).reshape(shape)
        parts[k].append((np.full(len(scores), i), scores, tp, ignored))
    matches = []
    for k in range(len(class_ids)):
        # The official order: by image, then a stable sort.
        rows = sorted(parts[k], key=lambda part: part[0][0] if len(part[0]) else -1)
        if not rows:
            none = np.zeros((len(thresholds), 0), dtype=bool)
            matches.append(_ClassMatches(np.zeros(0, dtype=int), none, none))
            continue
        image, score, tp, ignored = (
            np.concatenate(columns, axis=-1) for columns in zip(*rows, strict=True)
        )
        order = np.argsort(-score, kind="mergesort")
        matches.append(_ClassMatches(image[order], tp[:, order], ignored[:, order]))
    return MaskStatistics(
        image_ids=image_ids,
        class_names=[category["name"] for category in gt.loadCats(class_ids)],
        thresholds=thresholds,
        recalls=np.array(evaluation.params.rec_thrs),
        matches=matches,
        objects=objects,
    )


def read_results(path: str) -> list[dict[str, Any]]:
    """Read a file in the COCO result format with masks.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is something else.
    """
    with open(path) as file:
        try:
            results = json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    keys = {"image_id", "category_id", "segmentation", "score"}
    if not isinstance(results, list) or not all(
        isinstance(result, dict) and keys <= set(result) for result in results
    ):
        raise ValueError(f"{path} is not a list of results with the keys {sorted(keys)}.")
    return results
