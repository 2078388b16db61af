"""Reads COCO panoptic JSON: the segments of each panoptic PNG, their categories and images.

What may be absent or null, and what it then means everywhere:

    segments     `iscrowd`   0
                 `area`      the pixels of the segment in the PNG, which evaluation also takes if
                             they are more: a wrong area cannot give a PQ above 100
                 `bbox`      nothing: no program reads it
    `images`                 the image of a PNG has its name, with the extension .jpg
    images       `file_name` as above
                 `height`, `width`   those of the image file
    `categories`             those of the registered classes
    categories   `isthing`   as registered

Ids of images and categories are numbers or texts, kept as written, but 3.0 is 3. Ids of segments
are the colours of the PNG, red + 256 green + 65536 blue. Id 0, black, is void and never a segment.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from .coco_instances import check_one_type, read_categories
from .coco_schemas import Category, Id, Number
from .findings import Findings
from .json_files import decode_list, decode_value, read_sections, without_gc

_MAX_SIDE = 1 << 20
_MAX_SEGMENT_ID = (1 << 24) - 1


class _Image(msgspec.Struct, gc=False):
    id: Id
    file_name: str | None = None
    height: Annotated[int, Meta(ge=1, le=_MAX_SIDE)] | None = None
    width: Annotated[int, Meta(ge=1, le=_MAX_SIDE)] | None = None


class _Segment(msgspec.Struct, gc=False):
    id: int
    category_id: Id
    area: Number | None = None
    iscrowd: Literal[0, 1] | bool | None = None


class _Annotation(msgspec.Struct, gc=False):
    image_id: Id
    file_name: str
    segments_info: list[_Segment]


@dataclass
class Panoptic:
    """The usable content of a COCO panoptic JSON.

    Attributes:
        file: the JSON.
        content: all of the JSON, with the usable annotations.
        images: image id → its entry; empty if the JSON has none.
        annotations: the entries, with all their keys, in the order of the file; each segment has
            `iscrowd`.
        categories: in the order of the file; empty if the JSON has none.
    """

    file: str
    content: dict[str, Any] = field(default_factory=dict)
    images: dict[Id, dict[str, Any]] = field(default_factory=dict)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    categories: list[Category] = field(default_factory=list)

    def image_name(self, annotation: dict[str, Any]) -> str:
        """The file name of the image of an annotation."""
        name = self.images.get(annotation["image_id"], {}).get("file_name")
        return name or os.path.splitext(annotation["file_name"])[0] + ".jpg"

    def image_size(self, annotation: dict[str, Any]) -> tuple[int, int] | None:
        """(h, w) of the image of an annotation, if the JSON says it."""
        image = self.images.get(annotation["image_id"], {})
        size = (image.get("height"), image.get("width"))
        return None if None in size else size


def read_panoptic(
    json_file: str,
    findings: Findings,
    *,
    category_ids: Iterable[Id] | None = None,
    allow_repeated_ids: bool = False,
    allow_unannotated: bool = True,
) -> Panoptic | None:
    """Read and check a COCO panoptic JSON.

    Args:
        json_file: the JSON.
        findings: gets all mistakes in the JSON.
        category_ids: the registered ids; default: those that the JSON lists.
        allow_repeated_ids: whether two segments of an image may share an id, which only evaluation
            tolerates.
        allow_unannotated: whether images without annotation are a warning, not a problem.

    Returns:
        What is usable, or None if that is nothing.
    """
    with without_gc():
        sections = read_sections(json_file, findings)
        if sections is None:
            return None
        data = Panoptic(json_file)
        known = None if category_ids is None else set(category_ids)
        typed = decode_list(
            sections, "annotations", _Annotation, json_file, findings, "an annotation"
        )
        if typed is None:
            return None
        if "categories" in sections:
            categories = read_categories(sections, json_file, findings, needs_names=False)
            data.categories = categories or []
            _check_categories(data, known, findings)
        known = {c.id for c in data.categories} if known is None else known
        if "images" in sections:
            _read_images(data, sections, findings)
        entries = decode_value(sections["annotations"])
        _assign(data, entries, typed, known, allow_repeated_ids, findings)
        if entries:
            _check_images(data, allow_unannotated, findings)
        else:
            findings.problem(json_file, None, "has no annotations, so the data set has no images")
        data.content = _content(data, sections, findings)
        return data


def _content(data: Panoptic, sections: dict[str, Any], findings: Findings) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, section in sections.items():
        try:
            content[key] = data.annotations if key == "annotations" else decode_value(section)
        except (ValueError, RecursionError) as error:
            findings.problem(data.file, f"$.{key}", f"is not valid JSON: {error}")
    return content


def _check_categories(data: Panoptic, known: set[Id] | None, findings: Findings) -> None:
    listed = {category.id for category in data.categories}
    missing = (known or set()) - listed
    # Some files list no categories; others list additional ones, such as for unlabelled pixels.
    if listed and missing:
        why = (
            f"lists {len(listed)} categories, but {len(known)} are registered; {len(missing)} are "
            f"missing, such as id {min(missing, key=str)!r}"
        )
        findings.problem(data.file, None, why)


def _read_images(data: Panoptic, sections: dict[str, Any], findings: Findings) -> None:
    typed = decode_list(sections, "images", _Image, data.file, findings, "an image")
    if typed is None:
        return
    for image, entry in zip(typed, decode_value(sections["images"]), strict=True):
        if image is None:
            continue
        if image.id in data.images:
            findings.problem(data.file, image.id, f"images: id {image.id!r} occurs more than once")
        data.images[image.id] = entry


def _assign(
    data: Panoptic,
    entries: list[Any],
    typed: Sequence[_Annotation | None],
    categories: set[Id],
    allow_repeated_ids: bool,
    findings: Findings,
) -> None:
    """Keep the usable annotations."""
    seen: set[Id] = set()
    for entry, annotation in zip(entries, typed, strict=True):
        if annotation is None:
            continue
        image_id = annotation.image_id
        if image_id in seen:
            why = f"annotations: image_id {image_id!r} occurs more than once"
            findings.problem(data.file, image_id, why)
            continue
        seen.add(image_id)
        why = _segment_problem(annotation.segments_info, categories, allow_repeated_ids)
        if why is not None:
            findings.problem(data.file, annotation.file_name, why)
            continue
        for segment in entry["segments_info"]:
            segment["iscrowd"] = int(segment.get("iscrowd") or 0)
        data.annotations.append(entry)
    if not check_one_type("image", seen, data.file, findings):
        data.annotations = []


def _segment_problem(
    segments: Sequence[_Segment], categories: set[Id], allow_repeated_ids: bool
) -> str | None:
    ids = set()
    for segment in segments:
        key = segment.id
        if not 0 < key <= _MAX_SEGMENT_ID:
            meaning = "black, which is void" if key == 0 else "no colour of a PNG"
            return f"a segment has the id {key}, {meaning}; give it an id of 1 to {_MAX_SEGMENT_ID}"
        if key in ids and not allow_repeated_ids:
            return f"two segments have the same id {key}, so their pixels cannot be told apart"
        ids.add(key)
        if segment.category_id not in categories:
            return (
                f"segment {key} has category_id {segment.category_id!r}, which is not one of the "
                f"data set's {len(categories)} classes"
            )
    return None


def _check_images(data: Panoptic, allow_unannotated: bool, findings: Findings) -> None:
    """Compare the images with the annotations."""
    if not data.images:
        return
    annotated = {annotation["image_id"] for annotation in data.annotations}
    for image_id in annotated - data.images.keys():
        why = "the JSON does not list the image of this annotation"
        findings.problem(data.file, image_id, why)
    bare = [image_id for image_id in data.images if image_id not in annotated]
    if allow_unannotated:
        for image_id in bare:
            findings.warn(data.file, image_id, "the image has no annotation and is not used")
    elif bare:
        name = data.images[bare[0]].get("file_name", bare[0])
        why = f"has no annotation of the image {name} ({len(bare)} images without annotation)"
        findings.problem(data.file, None, why)
    files: dict[str, Id] = {}
    for image_id, image in data.images.items():
        name = image.get("file_name") or f"image {image_id}"
        first = files.setdefault(name, image_id)
        if first != image_id:
            why = f"image {first!r} has the same file {name}"
            findings.problem(data.file, image_id, why)
