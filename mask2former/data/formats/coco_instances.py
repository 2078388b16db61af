"""Reads COCO instance JSON: polygons or RLEs of objects, their images and categories.

What may be absent, and what it then means everywhere (null means the same, except for `bbox`):

    images       `height`, `width`   those of the image file
                 `file_name`         the end of `coco_url`, as in LVIS
    annotations  `iscrowd`           0
                 `area`              the pixels of the mask; only the sizes of AP use it
                 `bbox`, `keypoints` nothing: masks do not need them
    `annotations`                    nothing to train on or to compare with

Ids of images, categories and annotations are numbers or texts, kept as written, but 3.0 is 3.

Polygons of fewer than three points are left out with a warning; an object needs at least one other,
except in data that Detectron2 loads, where the object is then left out as well.
Polygons may end a little outside the image. The farthest accepted is one image side away.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from msgspec import UNSET
from pycocotools.coco import COCO

from .coco_schemas import (
    COCO_JSON,
    Annotation,
    Category,
    Id,
    Image,
    InstanceSchema,
    Number,
    Rle,
)
from .coco_tools import has_head_of_cvat
from .findings import Findings
from .images import read_size
from .json_files import decode_list, read_sections, without_gc
from .masks import farthest, is_polygon, polygon_extents, reach_outside, rle_problems

# Pixels that polygons may end outside the image without a warning.
_TOLERANCE = 2.0
# Numbers beyond it are mistakes, and not exact as floats.
_MAX_NUMBER = 1e15
_COCO_URL = "http://images.cocodataset.org/"


@dataclass
class Instances:
    """The usable content of a COCO instance JSON.

    Attributes:
        file: the JSON.
        image_root: folder of the images.
        images: in the order of the file.
        annotations: image id → its annotations in the order of the file; every image has an entry.
        categories: in the order of the file.
        has_annotations: whether the JSON has the list `annotations`.
    """

    file: str
    image_root: str
    images: list[Image] = field(default_factory=list)
    annotations: dict[Id, list[Annotation]] = field(default_factory=dict)
    categories: list[Category] = field(default_factory=list)
    has_annotations: bool = False

    def path(self, image: Image) -> str:
        """The file of an image; its id if the JSON names no file."""
        return os.path.join(self.image_root, image.file_name or f"image {image.id}")

    def category_ids(self) -> list[Id]:
        return sorted(category.id for category in self.categories)

    def records(self, contiguous_ids: Mapping[Id, int] | None = None) -> list[dict[str, Any]]:
        """Records as Detectron2's `load_coco_json` makes them, sorted by image id.

        Args:
            contiguous_ids: category id → contiguous id; default: in the order of the ids.
        """
        if contiguous_ids is None:
            contiguous_ids = {key: i for i, key in enumerate(self.category_ids())}
        with without_gc():
            return [
                {
                    "file_name": self.path(image),
                    "height": image.height,
                    "width": image.width,
                    "image_id": image.id,
                    "annotations": [
                        _record(annotation, contiguous_ids)
                        for annotation in self.annotations[image.id]
                    ],
                }
                for image in sorted(self.images, key=lambda image: image.id)
            ]

    def as_coco(self) -> COCO:
        """The content for evaluation with pycocotools or hotcoco, with all keys that it reads."""
        images = [
            {"id": i.id, "file_name": i.file_name, "height": i.height, "width": i.width}
            for i in self.images
        ]
        sizes = {image.id: (image.height, image.width) for image in self.images}
        listed = list(chain.from_iterable(self.annotations[image.id] for image in self.images))
        # The official code stores ids of matches as numbers.
        renumber = any(isinstance(annotation.id, str) for annotation in listed)
        annotations = [
            _for_evaluation(annotation, sizes[annotation.image_id], i if renumber else None)
            for i, annotation in enumerate(listed, start=1)
        ]
        categories = [{"id": c.id, "name": c.name} for c in self.categories]
        coco = COCO()
        coco.dataset = {"info": {}, "images": images, "categories": categories}
        if self.has_annotations:
            coco.dataset["annotations"] = annotations
        coco.createIndex()
        return coco


def read_instances(
    json_file: str,
    image_root: str,
    findings: Findings,
    *,
    contiguous_ids: Iterable[Id] | None = None,
    needs_files: bool = True,
    schema: InstanceSchema = COCO_JSON,
    adapt: Callable[[dict[str, Any]], None] | None = None,
) -> Instances | None:
    """Read and check a COCO instance JSON.

    Args:
        json_file: the JSON.
        image_root: folder of the images.
        findings: gets all mistakes in the JSON.
        contiguous_ids: the registered category ids; default: those that the JSON lists.
        needs_files: whether images need file names; evaluation needs only their sizes.
        schema: one of `coco_schemas.py`.
        adapt: changes the sections of the JSON (see `read_sections`) before they are decoded.

    Returns:
        What is usable, or None if that is nothing.
    """
    with without_gc():
        sections = read_sections(json_file, findings)
        if sections is None:
            return None
        if adapt is not None:
            adapt(sections)
        data = Instances(json_file, image_root, has_annotations="annotations" in sections)
        images = decode_list(sections, "images", schema.image, json_file, findings, "an image")
        annotations: Sequence[Annotation | None] | None = []
        if data.has_annotations or schema.needs_annotations:
            kind = schema.annotation
            annotations = decode_list(
                sections, "annotations", kind, json_file, findings, "an annotation"
            )
        if annotations is None:  # maybe of another task
            return None
        categories = read_categories(sections, json_file, findings, kind=schema.category)
        if images is None or categories is None:
            return None
        masks_are_crowds = adapt is None and has_head_of_cvat(sections)
        del sections
        data.categories = categories
        known = {c.id for c in categories} if contiguous_ids is None else set(contiguous_ids)
        if not images:
            findings.problem(json_file, None, "lists no images")
        listed = [image for image in images if image is not None]
        if schema.is_lvis:
            for image in listed:
                image.file_name = "/".join((image.coco_url or "").split("/")[-2:])
        ids_in_json = {image.id for image in listed}
        data.images = _usable_images(data, listed, findings, needs_files)
        _assign(data, annotations, ids_in_json, known, findings)
        _check_masks(data, findings, schema)
        if masks_are_crowds:
            _warn_of_crowds(data, findings)
        return data


def read_categories(
    sections: dict[str, Any],
    json_file: str,
    findings: Findings,
    *,
    needs_names: bool = True,
    kind: type[Category] = Category,
) -> list[Category] | None:
    """The categories of a COCO JSON, with distinct ids and names; None if it has no list of them.

    Args:
        sections: of the JSON.
        json_file: the JSON.
        findings: gets all mistakes.
        needs_names: whether each must have a name.
        kind: schema of a category.
    """
    categories = decode_list(sections, "categories", kind, json_file, findings, "a category")
    if categories is None:
        return None
    usable = [category for category in categories if category is not None]
    if not categories:
        why = (
            "lists no categories; for masks without classes list one, such as "
            '{"id": 1, "name": "object"}, and give all annotations its id'
        )
        findings.problem(json_file, None, why)
    for key in ("id", "name"):
        seen: set[Any] = set()
        for category in usable:
            value = getattr(category, key)
            if value in seen and value is not None:
                why = f"categories: {key} {value!r} occurs more than once; each class needs its own"
                findings.problem(json_file, category.id, why)
            seen.add(value)
    for category in usable:
        if needs_names and not category.name:
            findings.problem(json_file, category.id, "a category has no 'name'")
    if not check_one_type("category", (c.id for c in usable), json_file, findings):
        return None
    return usable


def check_one_type(what: str, ids: Iterable[Id], file: str, findings: Findings) -> bool:
    """Whether ids are all numbers or all texts, so that they can be sorted; else adds a problem."""
    kinds = {type(value) for value in ids}
    if len(kinds) < 2:
        return True
    why = f"some {what} ids are numbers and some are texts; write all of them in one way"
    findings.problem(file, None, why)
    return False


# ---- images ----


def image_file(image: Image) -> str | None:
    """The file of an image relative to the folder of the images, if the JSON names it."""
    if not image.file_name and image.coco_url:
        return image.coco_url.removeprefix(_COCO_URL)
    return image.file_name


def _usable_images(
    data: Instances, images: Sequence[Image], findings: Findings, needs_files: bool
) -> list[Image]:
    usable: list[Image] = []
    files: dict[str, Image] = {}
    ids: set[Id] = set()
    for image in images:
        if image.id in ids:
            findings.problem(data.file, image.id, f"images: id {image.id!r} occurs more than once")
            continue
        ids.add(image.id)
        image.file_name = image_file(image)
        has_size = image.height is not None and image.width is not None
        if not image.file_name and (needs_files or not has_size):
            findings.problem(data.file, image.id, "an image has no 'file_name'")
            continue
        if not has_size:
            size = read_size(data.path(image))
            if size is None:
                why = (
                    "the image has no 'height' and 'width', and they cannot be read from "
                    f"{data.path(image)}"
                )
                findings.problem(data.file, image.id, why)
                continue
            image.height, image.width = size
        first = files.setdefault(image.file_name, image) if image.file_name else image
        if first is not image:
            why = f"image {first.id!r} has the same file {data.path(image)}"
            findings.problem(data.file, image.id, why)
        usable.append(image)
    if not check_one_type("image", (image.id for image in usable), data.file, findings):
        usable = []
    return usable


# ---- annotations ----


def _assign(
    data: Instances,
    annotations: Sequence[Annotation | None],
    listed: set[Id],
    categories: set[Id],
    findings: Findings,
) -> None:
    """Give each image its annotations, without unusable ones."""
    data.annotations = {image.id: [] for image in data.images}
    ids: set[Id] = set()
    # The official COCO 2014 minival files repeat annotations.
    allow_repeated = "minival" in data.file
    for annotation in annotations:
        if annotation is None:
            continue
        key, image_id = annotation.id, annotation.image_id
        if key in ids and not allow_repeated:
            findings.problem(data.file, key, f"annotations: id {key!r} occurs more than once")
            continue
        ids.add(key)
        if image_id not in data.annotations:
            if image_id not in listed:
                why = f"the annotation belongs to image {image_id!r}, which the JSON does not list"
                findings.problem(data.file, key, why)
            continue
        if annotation.category_id not in categories:
            why = (
                f"the annotation of image {image_id!r} has category_id "
                f"{annotation.category_id!r}, which is not one of the categories"
            )
            findings.problem(data.file, f"annotation {key}", why)
            continue
        if annotation.ignore:
            why = "the annotation has 'ignore', which is not supported; write iscrowd 1 instead"
            findings.problem(data.file, f"annotation {key}", why)
            continue
        data.annotations[image_id].append(annotation)
    if 0 in ids:
        why = "the official AP code takes an annotation with id 0 for unmatched; number from 1"
        findings.warn(data.file, 0, why)


def _check_masks(data: Instances, findings: Findings, schema: InstanceSchema) -> None:
    """Check everything that reaches C code; drops annotations with problems and unusable ones."""
    listed = list(chain.from_iterable(data.annotations.values()))
    if listed and not any(annotation.segmentation for annotation in listed):
        why = (
            "no annotation has a segmentation: the JSON has boxes or keypoints only, but the model "
            "learns masks, as polygons or RLEs"
        )
        findings.problem(data.file, None, why)
        data.annotations = {image.id: [] for image in data.images}
        return
    sizes = {image.id: (image.height, image.width) for image in data.images}
    paths = {image.id: data.path(image) for image in data.images}
    bad: set[int] = set()  # identities of annotations

    def problem(annotation: Annotation, why: str) -> None:
        bad.add(id(annotation))
        findings.problem(paths[annotation.image_id], f"annotation {annotation.id}", why)

    def unusable(annotation: Annotation, why: str) -> None:
        if not schema.allow_unusable:
            problem(annotation, why)
            return
        bad.add(id(annotation))
        where = f"annotation {annotation.id}"
        findings.warn(paths[annotation.image_id], where, f"{why}. The object is left out")

    polygons: list[list[Number]] = []
    polygon_owners: list[Annotation] = []
    rles: list[tuple[Annotation, Rle]] = []
    for annotation in listed:
        shape, size = annotation.segmentation, sizes[annotation.image_id]
        why = _number_problem(annotation)
        if why is not None:
            problem(annotation, why)
        if isinstance(shape, Rle):
            if tuple(shape.size) == size:
                rles.append((annotation, shape))
                continue
            why = f"has an RLE of (height, width) {tuple(shape.size)}, but its image has {size}"
            problem(annotation, why)
        elif not shape:
            unusable(annotation, "has no segmentation; it must be a list of polygons or an RLE")
        else:
            kept = [polygon for polygon in shape if is_polygon(polygon)]
            if len(kept) < len(shape):
                why = _wrong_length(next(p for p in shape if not is_polygon(p)))
                if not kept:
                    unusable(annotation, why)
                    continue
                if not schema.allow_partial:
                    problem(annotation, why)
                    continue
                where = f"annotation {annotation.id}"
                findings.warn(paths[annotation.image_id], where, f"{why}. That part is left out")
                annotation.segmentation = kept
            polygons += kept
            polygon_owners += [annotation] * len(kept)

    _check_polygons(polygons, polygon_owners, sizes, paths, problem, findings)
    reasons = rle_problems(
        [rle.counts for _, rle in rles], [rle.size[0] * rle.size[1] for _, rle in rles]
    )
    for (annotation, _), reason in zip(rles, reasons, strict=True):
        if reason is not None:
            problem(annotation, f"has an RLE that cannot be decoded: {reason}")
    if bad:
        for image_id, listed in data.annotations.items():
            data.annotations[image_id] = [a for a in listed if id(a) not in bad]


def _warn_of_crowds(data: Instances, findings: Findings) -> None:
    """Masks that CVAT and Datumaro mark as crowds, which are neither trained nor evaluated."""
    listed = chain.from_iterable(data.annotations.values())
    number = sum(isinstance(a.segmentation, Rle) and a.iscrowd in (1, True) for a in listed)
    if number:
        why = (
            f"{number} masks are marked as crowds (iscrowd 1) and are neither trained nor "
            "evaluated. CVAT and Datumaro mark every mask so; if each is one object, read the data "
            "with TYPE: coco"
        )
        findings.warn(data.file, None, why)


def _number_problem(annotation: Annotation) -> str | None:
    numbers = [] if annotation.area is None else [annotation.area]
    if annotation.bbox is not UNSET:
        numbers += annotation.bbox
    # NaN compares false.
    if not all(-_MAX_NUMBER < number < _MAX_NUMBER for number in numbers):
        return "has a bbox or area that is not a finite number"
    if annotation.area is not None and annotation.area < 0:
        return f"has area {annotation.area}"
    return None


def _wrong_length(numbers: Sequence[Number]) -> str:
    return (
        f"has a polygon of {len(numbers)} coordinates; a polygon is x1, y1, x2, y2, ... of at "
        f"least 3 points{', not a box' if len(numbers) == 4 else ''}"
    )


def _check_polygons(
    polygons: list[list[Number]],
    owners: list[Annotation],
    sizes: Mapping[Id, tuple[int, int]],
    paths: Mapping[Id, str],
    problem: Callable[[Annotation, str], None],
    findings: Findings,
) -> None:
    """Check the coordinates of polygons, one owner each."""
    if not polygons:
        return
    extents = polygon_extents(polygons)
    image_sizes = np.array([sizes[owner.image_id] for owner in owners])
    outside = reach_outside(extents, image_sizes)
    # NaN compares false.
    for i in np.flatnonzero(~(outside <= _TOLERANCE)).tolist():
        owner, size = owners[i], tuple(image_sizes[i].tolist())
        left, top, right, bottom = extents[i].tolist()
        if not np.isfinite(extents[i]).all():
            problem(owner, "has a polygon with coordinates that are not finite")
            continue
        spans = f"x {left:g} to {right:g}, y {top:g} to {bottom:g}"
        beyond = f"a polygon spans {spans}, beyond the {size[1]} x {size[0]} pixels of the image"
        if outside[i] > farthest(size):
            problem(owner, f"{beyond}, by more than its longest side; correct the coordinates")
        else:
            findings.warn(paths[owner.image_id], f"annotation {owner.id}", beyond)


# ---- what programs need ----


def _record(annotation: Annotation, contiguous_ids: Mapping[Id, int]) -> dict[str, Any]:
    """An annotation as Detectron2's loader makes it."""
    record: dict[str, Any] = {}
    if annotation.iscrowd is not UNSET:
        record["iscrowd"] = int(annotation.iscrowd or 0)
    if annotation.bbox is not UNSET:
        record["bbox"] = annotation.bbox
    if annotation.keypoints:
        # Pixel indices become coordinates; every third number is the visibility.
        record["keypoints"] = [
            value if i % 3 == 2 else value + 0.5 for i, value in enumerate(annotation.keypoints)
        ]
    record["category_id"] = contiguous_ids[annotation.category_id]
    shape = _plain(annotation.segmentation)
    if isinstance(shape, dict):
        if isinstance(shape["counts"], list):
            shape = mask_util.frPyObjects(shape, *shape["size"])
    record["segmentation"] = shape
    record["bbox_mode"] = BoxMode.XYWH_ABS
    return record


def _for_evaluation(
    annotation: Annotation, size: tuple[int, int], new_id: int | None
) -> dict[str, Any]:
    shape = _plain(annotation.segmentation)
    iscrowd = 0 if annotation.iscrowd is UNSET else int(annotation.iscrowd or 0)
    result: dict[str, Any] = {
        "id": annotation.id if new_id is None else new_id,
        "image_id": annotation.image_id,
        "category_id": annotation.category_id,
        "segmentation": shape,
        "area": annotation.area,
        "iscrowd": iscrowd,
    }
    if annotation.bbox is not UNSET:
        result["bbox"] = annotation.bbox
    if annotation.area is None:
        result["area"] = float(mask_util.area(_compressed(shape, size)))
    return result


def _plain(shape: Any) -> Any:
    return shape.as_dict() if isinstance(shape, Rle) else shape


def _compressed(shape: Any, size: tuple[int, int]) -> Any:
    if isinstance(shape, list):
        return mask_util.merge(mask_util.frPyObjects(shape, *size))
    return mask_util.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape


def raw_annotations(data: Instances, image: Image) -> Iterator[dict[str, Any]]:
    """The annotations of an image as records, but with `id` and the category id of the data set."""
    for annotation in data.annotations[image.id]:
        category_id = annotation.category_id
        ids = {"id": annotation.id, "category_id": category_id}
        yield _record(annotation, {category_id: 0}) | ids
