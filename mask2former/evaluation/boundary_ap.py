"""Boundary AP (Cheng et al., CVPR 2021): mask AP where the IoU of boundaries must be high too.

The boundary of a mask is what lies within a distance of its edge, 2% of the image diagonal. The
overlap of two objects is the lesser of mask IoU and the IoU of the boundaries, except with crowd
regions, for which it is the mask's alone. The rest is official COCO evaluation.
"""

import contextlib
import io
import json
import logging

import cv2
import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .mask_ap import evaluate_masks

DILATION_RATIO = 0.02
METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)


def mask_to_boundary(mask: np.ndarray, dilation_ratio: float = DILATION_RATIO) -> np.ndarray:
    """The boundary of a mask: its pixels within a distance of a pixel outside it.

    Args:
        mask: (H, W) uint8, 0 or 1. The image ends the mask: beyond its border is outside.
        dilation_ratio: the distance as a part of the image diagonal.
    """
    boundary = np.zeros_like(mask)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        return boundary
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    distance = max(1, round(dilation_ratio * float(np.hypot(*mask.shape))))
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), dtype=np.uint8)
    border = {"borderType": cv2.BORDER_CONSTANT, "borderValue": 0}
    # A copy, for OpenCV would see the pixels around a part of an array.
    inside = np.ascontiguousarray(mask[box])
    boundary[box] = inside - cv2.erode(inside, kernel, **border)
    return boundary


class BoundaryEval(COCOeval):
    """The official evaluation of masks with the overlap of boundaries."""

    def __init__(
        self, truth: COCO, predictions: COCO, dilation_ratio: float = DILATION_RATIO
    ) -> None:
        super().__init__(truth, predictions, iouType="segm")
        self._dilation_ratio = dilation_ratio

    def computeIoU(self, imgId: int, catId: int) -> np.ndarray | list:
        """Overlaps (predictions by falling score, true objects) in one image."""
        ious = super().computeIoU(imgId, catId)
        truth, predictions = self._gts[imgId, catId], self._dts[imgId, catId]
        columns = [i for i, annotation in enumerate(truth) if not annotation["iscrowd"]]
        if not columns or not predictions:
            return ious
        order = np.argsort([-p["score"] for p in predictions], kind="mergesort")
        predictions = [predictions[i] for i in order[: len(ious)]]
        boundary_ious = mask_util.iou(
            [self._boundary(p) for p in predictions],
            [self._boundary(truth[i]) for i in columns],
            [0] * len(columns),
        )
        ious[:, columns] = np.minimum(ious[:, columns], boundary_ious)
        return ious

    def _boundary(self, annotation: dict) -> dict:
        mask = mask_util.decode(annotation["segmentation"])
        boundary = mask_to_boundary(mask, self._dilation_ratio)
        return mask_util.encode(np.asfortranarray(boundary))


def evaluate_boundary_ap(
    truth_file: str,
    predictions_file: str,
    dilation_ratio: float = DILATION_RATIO,
    iou_type: str = "boundary",
) -> dict[str, float]:
    """Boundary AP of predictions in the COCO result format.

    Args:
        truth_file: COCO instance JSON.
        predictions_file: such as `coco_instances_results.json` of `InstanceSegEvaluator`.
        dilation_ratio: width of boundaries as a part of the image diagonal.
        iou_type: "boundary", or "segm" for mask AP.

    Returns:
        The twelve COCO metrics in percent, NaN where undefined.

    Raises:
        ValueError: an unknown `iou_type`, or predictions in another format.
    """
    if iou_type not in ("boundary", "segm"):
        raise ValueError(f"iou_type is {iou_type!r}; allowed: 'boundary', 'segm'")
    with open(predictions_file) as file:
        results = json.load(file)
    if not isinstance(results, list) or not all("segmentation" in r for r in results):
        raise ValueError(
            f"{predictions_file} is not in the COCO result format: a list of masks, each with "
            "image_id, category_id, score and segmentation."
        )
    for result in results:
        # Else areas would be those of the boxes.
        result.pop("bbox", None)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        truth = COCO(truth_file)
        known = set(truth.getImgIds())
    unknown = {result["image_id"] for result in results} - known
    if unknown:
        raise ValueError(
            f"{predictions_file} has predictions for images that {truth_file} does not list: "
            f"{sorted(unknown)[:5]}"
        )
    if not results:
        return dict.fromkeys(METRICS, float("nan"))
    with contextlib.redirect_stdout(log):
        if iou_type == "boundary":
            evaluation = BoundaryEval(truth, truth.loadRes(results), dilation_ratio)
            evaluation.evaluate()
            evaluation.accumulate()
        else:
            evaluation = evaluate_masks(truth, results)
        evaluation.summarize()
    logging.getLogger(__name__).debug(log.getvalue())
    return {
        name: 100 * float(value) if value >= 0 else float("nan")
        for name, value in zip(METRICS, evaluation.stats, strict=True)
    }
