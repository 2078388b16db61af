"""Reads an image and its annotations as training does, and collects all their problems.

H W pixels of the image.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from panopticapi.utils import rgb2id

from ..formats.findings import Finding
from ..formats.images import (
    orientation_warning,
    read_colours,
    read_header,
    read_image,
    read_panoptic_png,
)
from ..label_maps import check_whole
from ..targets import annotation_boxes, present_values, rasterise, read_annotations
from .index import Index, Item

# Tolerance in pixels for boxes against their polygons or mask, and for polygons outside the image.
_TOLERANCE = 2.0


@dataclass
class ItemReport:
    """Findings in one image.

    Attributes:
        problems, warnings: see `Index`.
        size: (height, width), if the image can be read.
        pixels: contiguous class → pixels.
        objects: contiguous class → instances or segments, without crowds.
        areas: pixels of each thing, without crowds.
        num_crowds: crowd annotations.
        num_ignored: pixels of a label map with the ignore label.
    """

    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    size: tuple[int, int] | None = None
    pixels: Counter[int] = field(default_factory=Counter)
    objects: Counter[int] = field(default_factory=Counter)
    areas: list[int] = field(default_factory=list)
    num_crowds: int = 0
    num_ignored: int = 0


class ItemChecker:
    """Checks items of one data set. Holds no items, because it is sent to worker processes."""

    def __init__(self, index: Index) -> None:
        self._num_classes = len(index.classes)
        self._thing_ids = index.thing_ids
        self._contiguous_ids = index.contiguous_ids
        self._ignore_label = index.ignore_label

    def __call__(self, item: Item) -> ItemReport:
        """Check one item; never fails."""
        report = ItemReport()
        try:
            self._check(item, report)
        # Damaged data can raise any error in a decoder, and the other images must still be checked.
        except Exception as error:
            why = f"cannot be checked: {type(error).__name__}: {error}"
            report.problems.append(Finding(item.file_name, item.image_id, why))
        return report

    def _check(self, item: Item, report: ItemReport) -> None:
        image = _read(item.file_name, item.image_id, read_colours, report)
        if image is not None:
            report.size = image.shape[:2]
            turned = self._check_orientation(item, report)
            if item.size is not None and report.size != tuple(item.size):
                why = f"is {_by(report.size)} pixels, but the annotation says {_by(item.size)}"
                # Panoptic training takes the size from the image.
                findings = report.warnings if item.annotations is None else report.problems
                findings.append(Finding(item.file_name, item.image_id, why + turned))
        # Check the annotations even if the image is broken.
        size = report.size or item.size
        if item.annotations is not None and size is not None:
            self._check_instances(item, (size[0], size[1]), report)
        if item.pan_seg_file_name is not None:
            self._check_panoptic(item, size, report)
        if item.sem_seg_file_name is not None:
            self._check_semantic(item, size, report)

    def _check_orientation(self, item: Item, report: ItemReport) -> str:
        """Warn of an EXIF orientation; returns what a wrong size may come from."""
        orientation = read_header(item.file_name).orientation
        if orientation == 1:
            return ""
        report.warnings.append(
            Finding(item.file_name, item.image_id, orientation_warning(orientation))
        )
        return " (the EXIF orientation swaps them)" if orientation > 4 else ""

    # ---- instances ----

    def _check_instances(self, item: Item, size: tuple[int, int], report: ItemReport) -> None:
        for annotation in item.annotations:
            problems: list[str] = []
            warnings: list[str] = []
            mask = self._check_instance(annotation, size, item, problems, warnings)
            named = f"annotation {annotation.get('id')}"
            report.problems += [Finding(item.file_name, named, why) for why in problems]
            report.warnings += [Finding(item.file_name, named, why) for why in warnings]
            class_id = self._contiguous_ids.get(annotation["category_id"])
            if mask is None or class_id is None:
                continue
            if annotation.get("iscrowd", 0):
                report.num_crowds += 1
                continue
            area = int(mask.sum())
            report.pixels[class_id] += area
            report.objects[class_id] += 1
            report.areas.append(area)

    def _check_instance(
        self,
        annotation: dict[str, Any],
        size: tuple[int, int],
        item: Item,
        problems: list[str],
        warnings: list[str],
    ) -> np.ndarray | None:
        """Append the findings of an annotation; returns its mask (H, W), or None if invalid."""
        category_id = annotation["category_id"]
        if category_id not in self._contiguous_ids:
            problems.append(f"category_id {category_id!r} is not one of the categories")
        try:
            # Read as in training; the mask does not depend on category and crowd.
            plain = annotation | {"category_id": 0, "iscrowd": 0}
            _, shapes = read_annotations([plain], size, item.file_name)
        except ValueError as error:
            problems.append(str(error).removeprefix(f"{item.file_name}: "))
            return None
        if isinstance(shapes[0], list) and not item.is_read:
            points = np.concatenate(shapes[0]).reshape(-1, 2)
            (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
            outside = max(-left, -top, right - size[1], bottom - size[0])
            if outside > _TOLERANCE:
                warnings.append(
                    f"a polygon spans x {left:g} to {right:g}, y {top:g} to {bottom:g}, beyond "
                    f"the {_by(size)} pixels of the image"
                )
        if "bbox" in annotation and not _is_box(annotation["bbox"]):
            problems.append(f"bbox is {annotation['bbox']!r}, not four numbers x, y, width, height")
        elif "bbox" in annotation:
            tight = annotation_boxes(shapes).tensor[0].tolist()
            warnings += _check_box(annotation["bbox"], tight)
        mask = rasterise(shapes, size)[0].numpy()
        if not mask.any():
            warnings.append("the mask covers no pixel")
            return None
        return mask

    # ---- panoptic ----

    def _check_panoptic(self, item: Item, size: tuple[int, int] | None, report: ItemReport) -> None:
        png = item.pan_seg_file_name

        def problem(id: int | str | None, why: str) -> None:
            report.problems.append(Finding(png, id, why))

        colours = _read(png, item.image_id, read_panoptic_png, report)
        if colours is None:
            return
        if size is not None and colours.shape[:2] != tuple(size):
            problem(
                item.image_id,
                f"is {_by(colours.shape[:2])} pixels, but its image {item.file_name} {_by(size)}",
            )
        values, counts = np.unique(rgb2id(colours), return_counts=True)
        pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
        listed: set[int] = set()
        for segment in item.segments_info:
            lacking = [key for key in ("id", "category_id") if key not in segment]
            if lacking:
                problem(item.image_id, f"a segment of the JSON has no {lacking[0]!r}")
                continue
            segment_id, class_id = segment["id"], self._contiguous_ids.get(segment["category_id"])
            named = f"segment {segment_id}"
            if segment_id in listed:
                problem(named, "the JSON lists the segment more than once")
                continue
            listed.add(segment_id)
            if class_id is None:
                why = f"category_id {segment['category_id']!r} is not one of the categories"
                problem(named, why)
            area = pixels.get(segment_id)
            if area is None:
                problem(named, "the JSON lists the segment, but no pixel of the PNG has its id")
                continue
            if segment.get("area", area) != area:
                why = f"has {area} pixels, but the JSON says area {segment['area']}"
                report.warnings.append(Finding(png, named, why))
            if class_id is None:
                continue
            report.pixels[class_id] += area
            if segment.get("iscrowd", 0):
                report.num_crowds += 1
                continue
            report.objects[class_id] += 1
            if class_id in self._thing_ids:
                report.areas.append(area)
        for segment_id in sorted(pixels.keys() - listed - {0}):
            why = f"{pixels[segment_id]} pixels have this id, which the JSON does not list"
            problem(f"segment {segment_id}", why)

    # ---- semantic ----

    def _check_semantic(self, item: Item, size: tuple[int, int] | None, report: ItemReport) -> None:
        file = item.sem_seg_file_name

        def problem(why: str) -> None:
            report.problems.append(Finding(file, item.image_id, why))

        labels = _read(file, item.image_id, read_image, report)
        if labels is None:
            return
        if labels.ndim != 2:
            problem(
                f"has {labels.shape[-1]} channels; a label map has one, the class of each pixel "
                "(VALUE_MAP in DATASETS.CUSTOM maps colours)"
            )
            return
        if size is not None and labels.shape != tuple(size):
            problem(f"is {_by(labels.shape)} pixels, but its image {item.file_name} {_by(size)}")
        try:
            check_whole(labels, file)
        except ValueError as error:
            problem(str(error).removeprefix(f"{file} "))
            return
        values = present_values(labels)
        bad = values[
            ((values < 0) | (values >= self._num_classes)) & (values != self._ignore_label)
        ]
        if bad.size:
            listed = ", ".join(f"{float(v):g}" for v in bad[:5]) + ", ..." * (bad.size > 5)
            problem(
                f"has labels that are neither in [0, {self._num_classes}) nor the ignore label "
                f"{self._ignore_label}: {listed}"
            )
        good = np.setdiff1d(values, [*bad, self._ignore_label])
        if not good.size:
            why = "has no labelled pixel"
            report.warnings.append(Finding(file, item.image_id, why))
        if item.pan_seg_file_name is None:
            # In a panoptic data set, pixels are counted per segment.
            report.pixels += Counter({int(v): int((labels == v).sum()) for v in good})
            report.num_ignored = int((labels == self._ignore_label).sum())


def _read(
    file: str,
    image_id: int | str | None,
    reader: Callable[[str], np.ndarray],
    report: ItemReport,
) -> np.ndarray | None:
    """The image, or None after adding a problem if it cannot be read."""
    try:
        return reader(file)
    except FileNotFoundError:
        why = "does not exist"
    except (OSError, ValueError) as error:
        why = str(error).removeprefix(f"{file} ")
        why = f"is empty; {why}" if os.path.isfile(file) and not os.path.getsize(file) else why
    report.problems.append(Finding(file, image_id, why))
    return None


def _is_box(box: Any) -> bool:
    numbers = isinstance(box, list) and all(isinstance(value, int | float) for value in box)
    return numbers and len(box) == 4 and bool(np.isfinite(box).all())


def _check_box(box: list[float], tight: list[float]) -> list[str]:
    """Warnings of a box [x, y, width, height] against the tight one [left, top, right, bottom]."""
    stated = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    off = max(abs(a - b) for a, b in zip(tight, stated, strict=True))
    if off <= _TOLERANCE:
        return []
    left, top, right, bottom = (round(value, 1) for value in tight)
    return [
        f"bbox spans x {stated[0]:g} to {stated[2]:g}, y {stated[1]:g} to {stated[3]:g}, but the "
        f"segmentation x {left:g} to {right:g}, y {top:g} to {bottom:g}"
    ]


def _by(size: tuple[int, int]) -> str:
    """Width x height of (height, width)."""
    return f"{size[1]} x {size[0]}"
