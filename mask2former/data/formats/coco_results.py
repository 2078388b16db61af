"""Reads predictions in the COCO result format: a list of masks as RLEs.

    read_instance_results  image_id, category_id, segmentation, score; `bbox` and others are ignored
    read_semantic_results  file_name, category_id, segmentation, as `sem_seg_predictions.json` has

Nothing that evaluation cannot use is left out in silence: the first mistake is an error that names
its place, such as `$[3].segmentation`.
"""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import pycocotools.mask as mask_util

from .coco_schemas import Id, Number, Rle
from .findings import Findings
from .json_files import convert_list, decode_value, read_json
from .masks import rle_problems


class InstanceResult(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    segmentation: Rle
    score: Number


class SemanticResult(msgspec.Struct, gc=False):
    file_name: str
    category_id: Id
    segmentation: Rle


R = TypeVar("R", InstanceResult, SemanticResult)


def read_instance_results(
    file: str, image_sizes: Mapping[Id, tuple[int, int]], category_ids: Collection[Id], gt: str
) -> list[dict[str, Any]]:
    """Read predicted instances for evaluation with pycocotools or hotcoco.

    Args:
        file: such as `coco_instances_results.json`.
        image_sizes: image id → (h, w) of the ground truth.
        category_ids: of the ground truth.
        gt: file of the ground truth, for errors.

    Returns:
        `image_id`, `category_id`, `segmentation`, a compressed RLE, and `score` of each instance.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it has another format, or a mask does not fit the ground truth.
    """
    findings = Findings()
    results = _read(file, InstanceResult, "a list of masks, the COCO result format", findings)
    for i, result in enumerate(results):
        image_id, size = result.image_id, tuple(result.segmentation.size)
        if image_id not in image_sizes:
            why = f"image {image_id!r} is not one of the images that {gt} lists"
            findings.problem(file, f"$[{i}].image_id", why)
        elif size != image_sizes[image_id]:
            why = f"the mask has (height, width) {size}, but image {image_id!r} has "
            findings.problem(file, f"$[{i}].segmentation", f"{why}{image_sizes[image_id]}")
        if result.category_id not in category_ids:
            why = f"category {result.category_id!r} is not one of the categories that {gt} lists"
            findings.problem(file, f"$[{i}].category_id", why)
        if not math.isfinite(result.score):
            findings.problem(file, f"$[{i}].score", f"the score is {result.score}")
    findings.raise_first(is_data=False)
    return [
        {
            "image_id": result.image_id,
            "category_id": result.category_id,
            "segmentation": _compressed(result.segmentation),
            "score": result.score,
        }
        for result in results
    ]


def read_semantic_results(
    file: str, images: Collection[str], category_ids: Collection[Id], dataset_name: str
) -> dict[str, list[dict[str, Any]]]:
    """Read predicted masks of classes.

    Args:
        file: such as `sem_seg_predictions.json`.
        images: names of the images without extension.
        category_ids: of the data set.
        dataset_name: for errors.

    Returns:
        Image name without extension → `category_id` and `segmentation` of its masks, at least one
        for each image.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it has another format, a mask does not fit the data set, or an image has none.
    """
    findings = Findings()
    what = "a sem_seg_predictions.json, which is a list of masks"
    by_image: dict[str, list[dict[str, Any]]] = {image: [] for image in images}
    for i, result in enumerate(_read(file, SemanticResult, what, findings)):
        masks = by_image.get(os.path.splitext(os.path.basename(result.file_name))[0])
        if masks is None:
            why = f"image {result.file_name} is not one of {dataset_name}"
            findings.problem(file, f"$[{i}].file_name", why)
            continue
        if result.category_id not in category_ids:
            why = f"category_id {result.category_id!r} is not one of the data set's categories"
            findings.problem(file, f"$[{i}].category_id", why)
        size = result.segmentation.size
        if masks and masks[0]["segmentation"]["size"] != size:
            expected = masks[0]["segmentation"]["size"]
            why = f"the mask has (height, width) {size}, but another of this image {expected}"
            findings.problem(file, f"$[{i}].segmentation", why)
        rle = _compressed(result.segmentation)
        masks.append({"category_id": result.category_id, "segmentation": rle})
    missing = [image for image, masks in by_image.items() if not masks]
    if missing:
        why = (
            f"has no prediction for {len(missing)} of {len(by_image)} images of {dataset_name}, "
            f"the first is {missing[0]}"
        )
        findings.problem(file, None, why)
    findings.raise_first(is_data=False)
    return by_image


def _read(file: str, kind: type[R], what: str, findings: Findings) -> Sequence[R]:
    """Read a list of results and check their RLEs.

    Raises:
        FileNotFoundError, ValueError: the file or an entry cannot be read.
    """
    section = read_json(file, findings)
    findings.raise_first(is_data=False)
    entries = decode_value(section)
    keys = ", ".join(kind.__struct_fields__)
    if not isinstance(entries, list):
        is_gt = isinstance(entries, dict) and {"images", "annotations"} <= entries.keys()
        found = "; it is COCO ground truth" if is_gt else ""
        raise ValueError(f"{file} is not {what}, each with {keys}{found}.")
    converted = convert_list(entries, kind, "$", file, findings, "a mask")
    findings.raise_first(hint=f" Each entry must have {keys}.", is_data=False)
    results = [result for result in converted if result is not None]
    rles = [result.segmentation for result in results]
    # Sizes are multiplied, so they are checked before.
    for i, rle in enumerate(rles):
        if min(rle.size) < 1:
            findings.problem(file, f"$[{i}].segmentation", f"has the size {rle.size}")
    findings.raise_first(is_data=False)
    reasons = rle_problems([rle.counts for rle in rles], [math.prod(rle.size) for rle in rles])
    for i, reason in enumerate(reasons):
        if reason is not None:
            why = f"is an RLE that cannot be decoded: {reason}"
            findings.problem(file, f"$[{i}].segmentation", why)
    findings.raise_first(is_data=False)
    return results


def _compressed(rle: Rle) -> dict[str, Any]:
    if isinstance(rle.counts, str):
        return rle.as_dict()
    compressed = mask_util.frPyObjects(rle.as_dict(), *rle.size)
    return {"size": rle.size, "counts": compressed["counts"].decode()}
