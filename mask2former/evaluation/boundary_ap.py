"""Boundary AP (Cheng et al., CVPR 2021): mask AP that also requires a high boundary IoU.

The boundary of a mask is its pixels within a distance of its edge: 2% of the image diagonal. The
overlap of two objects is the minimum of mask IoU and boundary IoU; for crowd regions it is the mask
IoU alone. The rest is official COCO evaluation.
"""

import contextlib
import io
import logging

import cv2
import numpy as np
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.formats.coco_results import read_instance_results
from .ground_truth import read_coco
from .mask_ap import evaluate_masks

DILATION_RATIO = 0.02
METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)


def mask_to_boundary(mask: np.ndarray, dilation_ratio: float = DILATION_RATIO) -> np.ndarray:
    """Return the boundary of a mask: its pixels within a distance of a pixel outside it.

    Args:
        mask: (H, W) uint8, 0 or 1. Pixels beyond the image border count as outside.
        dilation_ratio: the distance as a fraction of the image diagonal.
    """
    boundary = np.zeros_like(mask)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        return boundary
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    distance = max(1, round(dilation_ratio * float(np.hypot(*mask.shape))))
    kernel = np.ones((2 * distance + 1, 2 * distance + 1), dtype=np.uint8)
    # Copy the crop: OpenCV would read the pixels around a view.
    inside = np.ascontiguousarray(mask[box])
    eroded = cv2.erode(inside, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    boundary[box] = inside - eroded
    return boundary


class BoundaryEval(COCOeval):
    """Official mask evaluation with boundary overlaps."""

    def __init__(self, gt: COCO, predictions: COCO, dilation_ratio: float = DILATION_RATIO) -> None:
        super().__init__(gt, predictions, iouType="segm")
        self._dilation_ratio = dilation_ratio

    def computeIoU(self, imgId: int, catId: int) -> np.ndarray | list:
        """Return overlaps (predictions in descending score order, gt objects) in one image."""
        ious = super().computeIoU(imgId, catId)
        gt, predictions = self._gts[imgId, catId], self._dts[imgId, catId]
        columns = [i for i, annotation in enumerate(gt) if not annotation["iscrowd"]]
        if not columns or not predictions:
            return ious
        order = np.argsort([-p["score"] for p in predictions], kind="mergesort")
        predictions = [predictions[i] for i in order[: len(ious)]]
        boundary_ious = mask_util.iou(
            [self._boundary(p) for p in predictions],
            [self._boundary(gt[i]) for i in columns],
            [0] * len(columns),
        )
        ious[:, columns] = np.minimum(ious[:, columns], boundary_ious)
        return ious

    def _boundary(self, annotation: dict) -> dict:
        mask = mask_util.decode(annotation["segmentation"])
        boundary = mask_to_boundary(mask, self._dilation_ratio)
        return mask_util.encode(np.asfortranarray(boundary))


def evaluate_boundary_ap(
    gt_file: str,
    predictions_file: str,
    dilation_ratio: float = DILATION_RATIO,
    iou_type: str = "boundary",
) -> dict[str, float]:
    """Compute boundary AP of predictions in the COCO result format.

    Args:
        gt_file: COCO instance JSON.
        predictions_file: such as `coco_instances_results.json` of `InstanceSegEvaluator`.
        dilation_ratio: width of boundaries as a fraction of the image diagonal.
        iou_type: "boundary", or "segm" for mask AP.

    Returns:
        The twelve COCO metrics in percent, NaN where undefined.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: `iou_type` is unknown, or a file has a mistake; see `formats/coco_results.py`.
    """
    if iou_type not in ("boundary", "segm"):
        raise ValueError(f"iou_type is {iou_type!r}; allowed: 'boundary', 'segm'")
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        gt = read_coco(gt_file)
    sizes = {key: (image["height"], image["width"]) for key, image in gt.imgs.items()}
    results = read_instance_results(predictions_file, sizes, set(gt.getCatIds()), gt_file)
    if not results:
        logging.getLogger(__name__).warning(f"{predictions_file} has no predictions.")
        return dict.fromkeys(METRICS, float("nan"))
    with contextlib.redirect_stdout(log):
        if iou_type == "boundary":
            evaluation = BoundaryEval(gt, gt.loadRes(results), dilation_ratio)
            evaluation.evaluate()
            evaluation.accumulate()
        else:
            evaluation = evaluate_masks(gt, results)
        evaluation.summarize()
    logging.getLogger(__name__).debug(log.getvalue())
    return {
        name: 100 * float(value) if value >= 0 else float("nan")
        for name, value in zip(METRICS, evaluation.stats, strict=True)
    }
