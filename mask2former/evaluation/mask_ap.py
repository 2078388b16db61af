"""Mask AP by the official COCO rules: by pycocotools, or compiled with the same digits.

hotcoco is the compiled implementation: its matching and its precision, recall and score arrays
equal those of pycocotools bit by bit. The official code summarises the arrays of either. Unusual
input that hotcoco treats differently is evaluated by pycocotools, with a log message.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import hotcoco
import numpy as np
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def evaluate_masks(
    gt: COCO,
    results: Sequence[dict[str, Any]],
    *,
    max_dets: Sequence[int] = (1, 10, 100),
    use_cats: bool = True,
    img_ids: Sequence[Any] | None = None,
    use_fast_impl: bool = True,
) -> COCOeval:
    """Match predicted masks with the ground truth and accumulate, without summarising.

    Args:
        gt: annotations in COCO's format.
        results: at least one, in the COCO result format; not modified. Areas are taken from the
            masks, even if there are boxes.
        max_dets: numbers of top-scoring detections per image to evaluate; AP uses the last one.
        use_cats: False pools all classes into one.
        img_ids: the images to evaluate; all by default.
        use_fast_impl: True for hotcoco, False for pycocotools.

    Returns:
        An evaluation with `params` and `eval`, ready for `summarize()`. Only pycocotools fills
        `evalImgs` and `ious`.

    Raises:
        ValueError: a result belongs to an image that `gt` does not list.
    """
    unknown = {result["image_id"] for result in results}.difference(gt.imgs)
    if unknown:
        raise ValueError(
            f"Predictions exist for {len(unknown)} images that the ground truth does not list: "
            f"{list(unknown)[:5]}"
        )
    # The official summary only supports a limit of 100.
    is_default = len(max_dets) < 3 or max_dets[2] == 100
    evaluation = (COCOeval if is_default else COCOevalMaxDets)(iouType="segm")
    evaluation.cocoGt = gt
    params = evaluation.params
    params.imgIds = sorted(set(gt.getImgIds() if img_ids is None else img_ids))
    params.catIds = sorted(set(gt.getCatIds()))
    params.maxDets = sorted(max_dets)
    params.useCats = int(use_cats)
    reason = _why_not_compiled(gt, results) if use_fast_impl else None
    if reason is not None:
        logging.getLogger(__name__).warning(
            f"Evaluating masks by pycocotools, which is slower: {reason}."
        )
    if use_fast_impl and reason is None:
        logging.getLogger(__name__).info("Evaluating masks by hotcoco")
        evaluation.eval = _compiled_arrays(evaluation, results)
        params.catIds = params.catIds if use_cats else [-1]
    else:
        masks = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
        evaluation.cocoDt = gt.loadRes(masks)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _why_not_compiled(gt: COCO, results: Sequence[dict[str, Any]]) -> str | None:
    if 0 in gt.anns:
        return "an annotation has id 0, which the official code uses for unmatched detections"
    if any(math.isnan(result["score"]) for result in results):
        return "a score is NaN"
    for annotation in gt.anns.values():
        polygons = annotation["segmentation"]
        if isinstance(polygons, list) and (not polygons or len(polygons[0]) < 6):
            return f"annotation {annotation['id']} is not a polygon of at least three points"
    return None


class CompiledMasks(NamedTuple):
    """Ground truth and results in hotcoco, which needs positive integer ids: position + 1."""

    evaluation: hotcoco.COCOeval
    image_ids: list  # by hotcoco's id - 1
    class_ids: list
    annotations: list[dict[str, Any]]  # ground truth
    results: list[dict[str, Any]]


def compile_masks(
    gt: COCO, results: Sequence[dict[str, Any]], img_ids: Sequence[Any], cat_ids: Sequence[Any]
) -> CompiledMasks:
    """Hand ground truth and results to hotcoco, without evaluating.

    Args:
        gt: annotations in COCO's format.
        results: in the COCO result format, not modified.
        img_ids, cat_ids: the images and classes to evaluate, sorted.
    """
    images = {image_id: number for number, image_id in enumerate(img_ids, start=1)}
    classes = {class_id: number for number, class_id in enumerate(cat_ids, start=1)}

    def is_evaluated(annotation: dict[str, Any]) -> bool:
        return annotation["image_id"] in images and annotation["category_id"] in classes

    def remap(annotation: dict[str, Any], *names: str) -> dict[str, Any]:
        return {
            "image_id": images[annotation["image_id"]],
            "category_id": classes[annotation["category_id"]],
            **{name: annotation[name] for name in names},
        }

    annotations = list(filter(is_evaluated, gt.loadAnns(gt.getAnnIds(imgIds=img_ids))))
    gt_masks = [
        {"id": number, **remap(annotation, "segmentation", "area", "iscrowd")}
        for number, annotation in enumerate(annotations, start=1)
    ]
    results = list(filter(is_evaluated, results))
    pred_masks = [remap(result, "segmentation", "score") for result in results]
    used = {mask["image_id"] for mask in (*gt_masks, *pred_masks)}
    compiled_gt = hotcoco.COCO(
        {
            "images": [
                {
                    "id": number,
                    "height": gt.imgs[image_id]["height"],
                    "width": gt.imgs[image_id]["width"],
                }
                for image_id, number in images.items()
                if number in used
            ],
            "annotations": gt_masks,
            "categories": [{"id": number, "name": str(number)} for number in classes.values()],
        }
    )
    compiled = hotcoco.COCOeval(compiled_gt, compiled_gt.load_res(pred_masks), "segm")
    return CompiledMasks(compiled, list(images), list(classes), annotations, results)


def _compiled_arrays(evaluation: COCOeval, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the arrays of the official `accumulate`."""
    params = evaluation.params
    compiled = compile_masks(evaluation.cocoGt, results, params.imgIds, params.catIds).evaluation
    compiled.params.max_dets = params.maxDets
    compiled.params.use_cats = bool(params.useCats)
    compiled.evaluate()
    compiled.accumulate()
    arrays = {name: np.asarray(compiled.eval[name]) for name in ("precision", "recall", "scores")}
    return {"params": params, "counts": list(arrays["precision"].shape), **arrays}
