"""Reads LabelMe: one JSON an image, with the shapes drawn on it.

- Polygons, rectangles (also turned ones), circles and masks are objects. Points, lines and line
  strips have no area and are refused by name.
- Shapes of one label and `group_id` are parts of one object.
- Shapes labelled `__ignore__`, whose pixels LabelMe leaves without a class, are left out, with a
  warning.
- `imagePath` is relative to the JSON, maybe with backslashes; an image that was moved is looked for
  beside the JSON under its name or that of the JSON. `imageData`, a copy of the image, is not read.
- Classes are the labels, in the order of the alphabet, of all parts of the data.
- JSONs of other programs in the folder are left out, with a warning.

`ReadOptions.split` is the name of a folder; `image_root` is one more folder of images.
"""

import base64
import binascii
import io
import math
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from PIL import Image

from .annotated_images import AnnotatedImage, AnnotatedImages, AnnotationFormat, ReadOptions
from .coco_schemas import Number, Side
from .drawings import Drawings, ellipse, rectangle
from .findings import Findings
from .json_files import decode_value, explain, json_object, read_json
from .splits import ImageFinder, files_below, split_folder, warn_of_unlabelled

_Point = Annotated[list[Number], Meta(min_length=2, max_length=2)]
# Shapes without an area.
_OPEN = ("point", "points", "line", "linestrip")
# Label of regions without a class; LabelMe's own conversions leave them out.
_IGNORED = "__ignore__"
_TURNED = ("oriented_rectangle", "rotation")


class _Shape(msgspec.Struct, gc=False):
    label: str
    points: list[_Point]
    shape_type: str | None = None
    group_id: int | str | None = None
    mask: str | None = None


class _File(msgspec.Struct, gc=False):
    shapes: list[_Shape]
    image_path: str | None = msgspec.field(name="imagePath", default=None)
    height: Side | None = msgspec.field(name="imageHeight", default=None)
    width: Side | None = msgspec.field(name="imageWidth", default=None)


def read_labelme(root: Path, options: ReadOptions) -> AnnotatedImages:
    """Read the JSONs of a folder and its folders; see the module.

    Args:
        root: the folder, or one JSON.
        options: `split`, `image_root` and `boxes_as_masks`.

    Raises:
        FileNotFoundError, ValueError: naming file and shape.
    """
    folder = split_folder(root, options.split)
    drawings = Drawings("LabelMe")
    finder = ImageFinder([options.image_root])
    classes: set[str] = set()
    jsons = [root] if root.is_file() else files_below(root, ".json")
    for file in jsons:
        content = _decode(file, drawings.findings)
        if content is None:
            continue
        classes |= {shape.label for shape in content.shapes if shape.label != _IGNORED}
        if file == folder or folder in file.parents:
            _read_file(file, content, finder, drawings)
    images = drawings.finish(sorted(classes), boxes_as_masks=options.boxes_as_masks)
    if folder.is_dir():
        warn_of_unlabelled(folder, images, "has no JSON of LabelMe")
    return images


def _decode(file: Path, findings: Findings) -> _File | None:
    number = len(findings.problems)
    content = read_json(str(file), findings)
    if len(findings.problems) > number:
        return None
    try:
        if isinstance(content, msgspec.Raw):
            return msgspec.json.decode(content, type=_File)
        return msgspec.convert(content, _File)
    except (msgspec.ValidationError, RecursionError) as error:
        try:
            plain = decode_value(content)
        except (ValueError, RecursionError):
            plain = None
        if not _is_labelme(plain):
            findings.warn(str(file), None, "is no JSON of LabelMe and not read")
            return None
        findings.problem(str(file), None, explain(str(error), "$", "a shape"))
    return None


def _is_labelme(content: Any) -> bool:
    return isinstance(content, dict) and "shapes" in content and "imagePath" in content


def _read_file(file: Path, content: _File, finder: ImageFinder, drawings: Drawings) -> None:
    name = str(file)
    stated = content.image_path or file.stem
    try:
        path = _find_image(file, stated, finder)
    except (FileNotFoundError, ValueError) as error:
        is_missing = isinstance(error, FileNotFoundError)
        drawings.findings.problem(name, None, str(error), is_missing=is_missing)
        return
    size = None
    if content.height is not None and content.width is not None:
        size = content.height, content.width
    image = drawings.add_image(path, name, size=size)
    if image is None:
        return
    for i, shape in enumerate(content.shapes):
        where = f"$.shapes[{i}]"
        if shape.label == _IGNORED:
            why = f"a shape labelled {_IGNORED} is left out; its pixels become background"
            drawings.findings.warn(name, where, why)
        else:
            _add_shape(shape, image, name, where, drawings)


def _find_image(file: Path, stated: str, finder: ImageFinder) -> Path:
    try:
        return finder.find(stated, [file.parent])
    except FileNotFoundError:
        last = stated.replace("\\", "/").rpartition("/")[2]
        # Image and JSON have the same name, also after both were moved or renamed.
        for moved in (last, file.stem):
            if Path(moved).stem == file.stem or moved == file.stem:
                try:
                    return finder.find(moved, [file.parent])
                except FileNotFoundError:
                    continue
        raise


def _add_shape(
    shape: _Shape, image: AnnotatedImage, name: str, where: str, drawings: Drawings
) -> None:
    kind = shape.shape_type or "polygon"
    points = shape.points
    if not shape.label:
        drawings.findings.problem(name, where, "a shape has no label")
        return
    if kind in _OPEN:
        why = f"the shape {kind!r} of {shape.label!r} has no area; draw a polygon, or remove it"
        drawings.findings.problem(name, where, why)
        return
    needed = {"circle": (2,), "mask": (2,), "rectangle": (2, 4)}.get(kind)
    if kind in _TURNED:
        needed = (4,)
    if needed is not None and len(points) not in needed:
        why = f"the shape {kind!r} has {len(points)} points, not {needed[0]}"
        drawings.findings.problem(name, where, why)
        return
    if kind == "mask":
        _add_mask(shape, image, name, where, drawings)
        return
    if kind == "polygon" or kind in _TURNED or (kind == "rectangle" and len(points) == 4):
        coordinates = [value for point in points for value in point]
    elif kind == "circle":
        (x, y), on_circle = points
        radius = math.dist((x, y), on_circle)
        coordinates = ellipse(x, y, radius, radius)
    elif kind == "rectangle":
        coordinates = rectangle(*points[0], *points[1])
    else:
        drawings.findings.problem(name, where, f"the shape {kind!r} is unknown")
        return
    drawings.add_polygon(
        image,
        shape.label,
        coordinates,
        name,
        where,
        group=shape.group_id,
        is_box=kind == "rectangle" or kind in _TURNED,
    )


def _add_mask(
    shape: _Shape, image: AnnotatedImage, name: str, where: str, drawings: Drawings
) -> None:
    if not shape.mask:
        drawings.findings.problem(name, where, "a shape of type 'mask' has no mask")
        return
    try:
        data = base64.b64decode(shape.mask, validate=True)
        with Image.open(io.BytesIO(data)) as picture:
            patch = np.asarray(picture.convert("L")) > 0
        left, top = (round(value) for value in shape.points[0])
    # A damaged picture can raise anything in a decoder.
    except Exception as error:
        what = "base64" if isinstance(error, binascii.Error) else "an image"
        drawings.findings.problem(name, where, f"its mask cannot be read as {what}: {error}")
        return
    drawings.add_mask(image, shape.label, patch, (left, top), name, where, group=shape.group_id)


def _recognise(root: Path) -> str | None:
    if root.is_file():
        return "a JSON of LabelMe" if root.suffix == ".json" and _has_shapes(root) else None
    files = files_below(root, ".json")
    found = [file for file in files if _has_shapes(file)]
    return f"{len(found)} JSONs of LabelMe" if found else None


def _has_shapes(file: Path) -> bool:
    return _is_labelme(json_object(file, b'"shapes"'))


LABELME = AnnotationFormat("labelme", "LabelMe, one JSON an image", read_labelme, _recognise)
