"""Mask AP by the official COCO rules: by pycocotools, or compiled with the same digits.

The compiled evaluation is hotcoco's: matching and the precision, recall and score arrays, which
are equal bit by bit. The official code summarises them in either case. Odd input that hotcoco
treats differently is left to it altogether, which is logged.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import hotcoco
import numpy as np
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def evaluate_masks(
    truth: COCO,
    results: Sequence[dict[str, Any]],
    *,
    max_dets: Sequence[int] = (1, 10, 100),
    use_cats: bool = True,
    img_ids: Sequence[Any] | None = None,
    use_fast_impl: bool = True,
) -> COCOeval:
    """Match predicted masks with true ones and accumulate; nothing is summarised yet.

    Args:
        truth: annotations in COCO's format.
        results: at least one, in the COCO result format; areas are those of the masks, whatever
            the boxes. They are not changed.
        max_dets: how many detections of an image count, by falling score; AP is for the last.
        use_cats: whether classes count. If not, all are one.
        img_ids: the images to evaluate; all by default.
        use_fast_impl: compiled, or by pycocotools.

    Returns:
        With `params` and `eval`, ready for `summarize()`; `evalImgs`, `ious` only by pycocotools.

    Raises:
        ValueError: a result is of an image that the truth does not list.
    """
    unknown = {result["image_id"] for result in results}.difference(truth.imgs)
    if unknown:
        raise ValueError(
            f"There are predictions for {len(unknown)} images that the truth does not list: "
            f"{list(unknown)[:5]}"
        )
    # The official summary knows no other limit than 100.
    is_default = len(max_dets) < 3 or max_dets[2] == 100
    evaluation = (COCOeval if is_default else COCOevalMaxDets)(iouType="segm")
    evaluation.cocoGt = truth
    params = evaluation.params
    params.imgIds = sorted(set(truth.getImgIds() if img_ids is None else img_ids))
    params.catIds = sorted(set(truth.getCatIds()))
    params.maxDets = sorted(max_dets)
    params.useCats = int(use_cats)
    reason = _why_not_compiled(truth, results) if use_fast_impl else None
    if reason is not None:
        logging.getLogger(__name__).warning(
            f"Masks are evaluated by pycocotools, which takes longer: {reason}."
        )
    if use_fast_impl and reason is None:
        logging.getLogger(__name__).info("Evaluating masks by hotcoco, to pycocotools' digits")
        evaluation.eval = _compiled_arrays(evaluation, results)
        params.catIds = params.catIds if use_cats else [-1]
    else:
        masks = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
        evaluation.cocoDt = truth.loadRes(masks)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _why_not_compiled(truth: COCO, results: Sequence[dict[str, Any]]) -> str | None:
    if 0 in truth.anns:
        return "an annotation has the id 0, by which the official code says that none is matched"
    if any(math.isnan(result["score"]) for result in results):
        return "a score is not a number"
    for annotation in truth.anns.values():
        polygons = annotation["segmentation"]
        if isinstance(polygons, list) and (not polygons or len(polygons[0]) < 6):
            return f"annotation {annotation['id']} is no polygon of at least three points"
    return None


def _compiled_arrays(evaluation: COCOeval, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The arrays that the official `accumulate` makes.

    hotcoco takes positive integers as ids: images and classes are numbered in the order of theirs.
    """
    truth, params = evaluation.cocoGt, evaluation.params
    images = {image_id: number for number, image_id in enumerate(params.imgIds, start=1)}
    classes = {class_id: number for number, class_id in enumerate(params.catIds, start=1)}

    def counts(annotation: dict[str, Any]) -> bool:
        return annotation["image_id"] in images and annotation["category_id"] in classes

    def numbered(annotation: dict[str, Any], *names: str) -> dict[str, Any]:
        return {
            "image_id": images[annotation["image_id"]],
            "category_id": classes[annotation["category_id"]],
            **{name: annotation[name] for name in names},
        }

    true_masks = [
        {"id": number, **numbered(annotation, "segmentation", "area", "iscrowd")}
        for number, annotation in enumerate(
            filter(counts, truth.loadAnns(truth.getAnnIds(imgIds=params.imgIds))), start=1
        )
    ]
    found_masks = [numbered(r, "segmentation", "score") for r in results if counts(r)]
    used = {mask["image_id"] for mask in (*true_masks, *found_masks)}
    compiled_truth = hotcoco.COCO(
        {
            "images": [
                {
                    "id": number,
                    "height": truth.imgs[image_id]["height"],
                    "width": truth.imgs[image_id]["width"],
                }
                for image_id, number in images.items()
                if number in used
            ],
            "annotations": true_masks,
            "categories": [{"id": number, "name": str(number)} for number in classes.values()],
        }
    )
    compiled = hotcoco.COCOeval(compiled_truth, compiled_truth.load_res(found_masks), "segm")
    compiled.params.max_dets = params.maxDets
    compiled.params.use_cats = bool(params.useCats)
    compiled.evaluate()
    compiled.accumulate()
    arrays = {name: np.asarray(compiled.eval[name]) for name in ("precision", "recall", "scores")}
    return {"params": params, "counts": list(arrays["precision"].shape), **arrays}
