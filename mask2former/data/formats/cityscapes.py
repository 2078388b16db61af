"""Reads the annotations of Cityscapes images: `_gtFine_polygons.json` and the headers of PNGs.

The polygons are `objects`, each with `label`, a class or the group of a class, and `polygon`, at
least three points [x, y]; `imgHeight` and `imgWidth` are the size. Objects with the key `deleted`
are ignored.
"""

from collections.abc import Collection
from typing import Annotated, Any

import msgspec
import numpy as np
from detectron2.utils.file_io import PathManager
from msgspec import UNSET, Meta

from .coco_schemas import Number, Side
from .findings import Findings
from .images import read_header
from .json_files import explain
from .masks import farthest, polygon_extents, reach_outside

_GROUP = "group"
_ONE_CHANNEL = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")

_Point = Annotated[list[Number], Meta(min_length=2, max_length=2)]


class _Object(msgspec.Struct, gc=False):
    label: str
    polygon: list[_Point]
    deleted: Any = UNSET


class _Size(msgspec.Struct, gc=False):
    height: Side = msgspec.field(name="imgHeight")
    width: Side = msgspec.field(name="imgWidth")


class _Polygons(_Size, gc=False):
    objects: list[_Object] = msgspec.field(name="objects")


def read_polygons(
    json_file: str, labels: Collection[str] | None, findings: Findings
) -> tuple[int, int] | None:
    """Read and check a `_gtFine_polygons.json`.

    Args:
        json_file: the JSON.
        labels: names of the classes; None: only the size is needed.
        findings: gets the mistakes.

    Returns:
        (h, w) of the image, or None if the JSON cannot be read.
    """
    try:
        with PathManager.open(json_file, "rb") as stream:
            kind = _Size if labels is None else _Polygons
            content = msgspec.json.decode(stream.read(), type=kind)
    except FileNotFoundError:
        findings.problem(json_file, None, "does not exist", is_missing=True)
        return None
    except msgspec.ValidationError as error:
        findings.problem(json_file, None, explain(str(error), "$", "an entry"))
        return None
    except (OSError, ValueError, RecursionError) as error:
        why = f"is not valid JSON: {error or type(error).__name__}"
        findings.problem(json_file, None, why)
        return None
    size = content.height, content.width
    objects = content.objects if isinstance(content, _Polygons) else []
    for i, item in enumerate(objects):
        if item.deleted is not UNSET:
            continue
        why = _object_problem(item, size, labels or ())
        if why is not None:
            findings.problem(json_file, f"$.objects[{i}]", why)
    return size


def _object_problem(item: _Object, size: tuple[int, int], labels: Collection[str]) -> str | None:
    if item.label not in labels and item.label.removesuffix(_GROUP) not in labels:
        return f"the label {item.label!r} is no class of Cityscapes"
    if len(item.polygon) < 3:
        return f"a polygon of {len(item.polygon)} points; it needs at least 3"
    extents = polygon_extents([[value for point in item.polygon for value in point]])
    outside = float(reach_outside(extents, np.array([size]))[0])
    # NaN compares false.
    if not outside <= farthest(size):
        return (
            f"a polygon ends outside the {size[1]} x {size[0]} pixels of the image by more than "
            "its longest side; correct the coordinates"
        )
    return None


def check_label_map(file: str, size: tuple[int, int], whose: str, findings: Findings) -> None:
    """Check the header of a label map.

    Args:
        file: the label map.
        size: expected (h, w).
        whose: what has this size, for the error.
        findings: gets what is wrong.
    """
    try:
        header = read_header(file)
    except (OSError, ValueError) as error:
        why = str(error).removeprefix(f"{file} ")
        findings.problem(file, None, why, is_missing=isinstance(error, FileNotFoundError))
        return
    if header.size != size:
        why = f"is {header.size[1]} x {header.size[0]} pixels, but {whose} {size[1]} x {size[0]}"
        findings.problem(file, None, why)
    elif header.mode not in _ONE_CHANNEL:
        why = f"is an image of mode {header.mode}: a label map has one channel"
        findings.problem(file, None, why)
