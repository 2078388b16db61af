"""Checks of records that a function registered with Detectron2's DatasetCatalog returns.

Files are checked when they are read; this is about the records themselves: keys, types, boxes, and
RLEs, which reach C code. Records of the loaders here have been checked by their readers.
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from .formats.findings import NO_LABELLED_PIXEL, Findings
from .formats.masks import rle_problems
from .formats.semantic_folders import has_labelled_pixel
from .formats.whole_numbers import as_whole

_FILE_KEYS = ("file_name", "pan_seg_file_name", "sem_seg_file_name")


def check_records(records: Iterable[Any], name: str, findings: Findings) -> list[dict[str, Any]]:
    """Check records in Detectron2's format.

    Args:
        records: of one or several data sets.
        name: of the data set, for errors.
        findings: gets the first problem of each record.

    Returns:
        Those without problem.
    """
    usable = []
    for i, record in enumerate(records):
        place = f"record {i} (from 0)"
        if not isinstance(record, dict):
            findings.problem(name, place, f"is {str(record)[:40]!r}, not a dict")
            continue
        why = next(_problems(record), None)
        if why is None:
            usable.append(record)
        else:
            findings.problem(str(record.get("file_name", name)), place, why)
    return usable


def check_labels(
    records: Sequence[dict[str, Any]], ignore_label: int | None, findings: Findings
) -> None:
    """Check that semantic training data has a pixel of a class.

    Args:
        records: of training, checked.
        ignore_label: label of pixels without a class.
        findings: gets a problem if there are only label maps, without any other label.
    """
    objects = {"annotations", "segments_info"}
    label_maps = [r["sem_seg_file_name"] for r in records if "sem_seg_file_name" in r]
    is_semantic = len(label_maps) == len(records) and not any(objects & {*r} for r in records)
    if label_maps and is_semantic and not has_labelled_pixel(label_maps, ignore_label):
        why = NO_LABELLED_PIXEL.format(ignore_label=ignore_label)
        findings.problem(os.path.dirname(label_maps[0]), None, why)


def _problems(record: dict[str, Any]) -> Iterator[str]:
    if "file_name" not in record:
        yield "has no 'file_name'"
    for key in _FILE_KEYS:
        if key in record and not isinstance(record[key], str):
            yield f"has the {key} {str(record[key])[:40]!r}, which is no text"
    for key in ("height", "width"):
        if key in record and not (_is_whole(record[key]) and record[key] > 0):
            yield f"has the {key} {str(record[key])[:40]!r}; it must be a number of pixels"
    for key, check in (("annotations", _annotation_problems), ("segments_info", _segment_problems)):
        entries = record.get(key, [])
        if not isinstance(entries, list | tuple):
            yield f"has {key} {str(entries)[:40]!r}, which is no list"
            return
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                yield f"{key}[{i}] is {str(entry)[:40]!r}, not a dict"
                return
            why = next(check(entry), None)
            if why is not None:
                yield f"{key}[{i}] {why}"
    yield from _rle_problems(record)


def with_whole_numbers(record: dict[str, Any]) -> dict[str, Any]:
    """A record with its size and id as int, where a loader read them as whole floats.

    The record is not copied deeply.
    """
    keys = [key for key in ("height", "width", "image_id") if key in record]
    return record | {key: as_whole(record[key]) for key in keys}


def _is_whole(value: Any) -> bool:
    value = as_whole(value)
    return isinstance(value, Integral) and not isinstance(value, bool | np.bool_)


def _class_problems(entry: dict[str, Any]) -> Iterator[str]:
    if "category_id" not in entry:
        yield "has no 'category_id'"
    elif not _is_whole(entry["category_id"]) or entry["category_id"] < 0:
        yield f"has category_id {entry['category_id']!r}; it must be a contiguous id from 0"
    if entry.get("iscrowd", 0) not in (0, 1):
        yield f"has iscrowd {entry['iscrowd']!r}, which is neither 0 nor 1"


def _annotation_problems(annotation: dict[str, Any]) -> Iterator[str]:
    yield from _class_problems(annotation)
    if "bbox" in annotation:
        box = annotation["bbox"]
        numbers = list(box) if isinstance(box, list | tuple | np.ndarray) else []
        if len(numbers) != 4 or not all(isinstance(n, Real) and math.isfinite(n) for n in numbers):
            yield f"has bbox {str(box)[:60]!r}; it must be four finite numbers"
        elif "bbox_mode" not in annotation:
            yield "has a bbox without 'bbox_mode', such as BoxMode.XYWH_ABS"
    shape = annotation.get("segmentation", [])
    if not isinstance(shape, list | dict | np.ndarray):
        yield f"has segmentation {str(shape)[:40]!r}; it must be polygons, an RLE or a mask"
    if isinstance(shape, dict):
        size = shape.get("size")
        if "counts" not in shape or not _is_size(size):
            yield "has a segmentation that is a dict, but no RLE with 'size' [h, w] and 'counts'"


def _is_size(size: Any) -> bool:
    return (
        isinstance(size, list | tuple | np.ndarray)
        and len(size) == 2
        and all(_is_whole(side) and side > 0 for side in size)
    )


def _segment_problems(segment: dict[str, Any]) -> Iterator[str]:
    yield from _class_problems(segment)
    if "id" not in segment:
        yield "has no 'id'"
    elif not _is_whole(segment["id"]) or not 0 < segment["id"] < 1 << 24:
        yield f"has id {segment['id']!r}; it must be the colour of the segment, 1 to 2^24 - 1"


def _rle_problems(record: dict[str, Any]) -> Iterator[str]:
    rles: dict[int, dict[str, Any]] = {
        i: annotation["segmentation"]
        for i, annotation in enumerate(record.get("annotations", ()))
        if isinstance(annotation.get("segmentation"), dict)
    }
    sizes: Sequence[int] = [int(rle["size"][0]) * int(rle["size"][1]) for rle in rles.values()]
    reasons = rle_problems([rle["counts"] for rle in rles.values()], sizes)
    for i, why in zip(rles, reasons, strict=True):
        if why is not None:
            yield f"annotations[{i}] has an RLE that cannot be decoded: {why}"
