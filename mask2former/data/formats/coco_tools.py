"""What the tools that export COCO instance JSON write differently.

Sections are values of the JSON by key, decoded or not (`json_files.read_sections`).
"""

from typing import Any

import msgspec

from .drawings import rectangle

# What CVAT and Datumaro write for every annotation.
_OCCLUDED = "occluded"
# JSON of an absent mask.
_NO_MASK = (b"null", b"[]", b"[[]]", b"{}", b'""')
_NO_LICENSE = [{"name": "", "id": 0, "url": ""}]


class _Shape(msgspec.Struct, gc=False):
    """Box and mask of an annotation; the mask stays JSON, which is fast."""

    bbox: Any = None
    segmentation: msgspec.Raw = msgspec.Raw(b"null")


class _Facts(msgspec.Struct, gc=False):
    """What tells the tool that wrote an annotation."""

    category_id: Any = None
    attributes: Any = None


def has_head_of_cvat(sections: dict[str, Any]) -> bool:
    """Whether the JSON begins as CVAT and Datumaro begin it: with empty licence and information."""
    info = _decoded(sections.get("info"), dict[str, Any])
    licenses = _decoded(sections.get("licenses"), list[dict[str, Any]])
    return licenses == _NO_LICENSE and bool(info) and not any(info.values())


def marks_masks_as_crowds(sections: dict[str, Any]) -> bool:
    """Whether the tool writes every mask as a crowd, as CVAT and Datumaro do."""
    return has_head_of_cvat(sections) or any(
        isinstance(fact.attributes, dict) and _OCCLUDED in fact.attributes
        for fact in _facts(sections)
    )


def drop_root_category(sections: dict[str, Any]) -> str | None:
    """Drop the category that Roboflow writes first: the supercategory of all others.

    Returns:
        Its name, or None if there is no such category, or an object has it.
    """
    categories = _decoded(sections.get("categories"), list[dict[str, Any]])
    if not categories or len(categories) < 2:
        return None
    root, *others = categories
    if root.get("supercategory") not in (None, "", "none"):
        return None
    if any(item.get("supercategory") != root.get("name") for item in others):
        return None
    if any(fact.category_id == root.get("id") for fact in _facts(sections)):
        return None
    sections["categories"] = others
    return str(root.get("name"))


def count_boxes(sections: dict[str, Any]) -> int:
    """How many annotations have a box and no mask."""
    return sum(map(_is_box, _decoded(sections.get("annotations"), list[_Shape]) or []))


def make_masks_of_boxes(sections: dict[str, Any]) -> None:
    """Give annotations without a mask the rectangle of their box."""
    shapes = _decoded(sections["annotations"], list[_Shape]) or []
    annotations = _decoded(sections["annotations"], list[dict[str, Any]]) or []
    for shape, annotation in zip(shapes, annotations, strict=True):
        if _is_box(shape):
            x, y, width, height = shape.bbox
            annotation["segmentation"] = [rectangle(x, y, x + width, y + height)]
    sections["annotations"] = annotations


def _is_box(shape: _Shape) -> bool:
    box = shape.bbox
    if bytes(shape.segmentation).strip() not in _NO_MASK or not isinstance(box, list):
        return False
    return len(box) == 4 and all(isinstance(value, int | float) for value in box)


def _facts(sections: dict[str, Any]) -> list[_Facts]:
    return _decoded(sections.get("annotations"), list[_Facts]) or []


def _decoded(section: Any, kind: Any) -> Any:
    """A section, or None if it is absent or something else."""
    try:
        if isinstance(section, msgspec.Raw):
            return msgspec.json.decode(section, type=kind)
        return None if section is None else msgspec.convert(section, kind)
    except (ValueError, RecursionError):  # the reader names what is wrong
        return None
