"""Reads XML of CVAT in the format "CVAT for images 1.1".

- Polygons, masks, ellipses and rectangles (also turned ones) are objects. Polylines, points,
  cuboids and skeletons are refused by name. Tags of whole images are left out, with a warning.
- Shapes of one label and `group_id` are parts of one object. Objects are ordered by `z_order`.
- Images are in the folder `images` beside the XML, maybe in folders named after the subset, or
  anywhere below if only one has the name. Frames of videos are named without extension.
- Classes are the labels of the project or task, in its order.
- Tracks ("CVAT for video 1.1") are refused: the format for images has them frame by frame.

`ReadOptions.split` is the subset of the images in the XML, or the name of a folder that holds an
XML; `image_root` is one more folder of images.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import iterparse

from .annotated_images import AnnotatedImage, AnnotatedImages, AnnotationFormat, ReadOptions
from .drawings import Drawings, ellipse, rectangle, rotate
from .splits import ImageFinder, choose_split, files_below, split_folder

_OPEN = ("polyline", "points", "cuboid", "skeleton")
_SHAPES = ("polygon", "mask", "ellipse", "box")
# Only the beginning of an XML is read to recognise it.
_HEAD = 64 * 1024


def read_cvat(root: Path, options: ReadOptions) -> AnnotatedImages:
    """Read an XML; see the module.

    Args:
        root: the XML, or its folder.
        options: `split`, `image_root` and `boxes_as_masks`.

    Raises:
        FileNotFoundError, ValueError: naming file, image and shape.
    """
    file, split = _find_xml(root, options.split)
    drawings = Drawings("CVAT")
    classes: list[str] = []
    images: list[Element] = []
    for element in _elements(file):
        if element.tag == "label":
            # The points of a skeleton are labels with a parent.
            if element.find("parent") is None:
                classes.append((element.findtext("name") or "").strip())
        elif element.tag == "image":
            images.append(element)
        else:
            raise ValueError(
                f"{file} holds tracks (CVAT for video): export the task in the format CVAT for "
                "images 1.1, which has the tracks frame by frame."
            )
    if len(set(classes)) < len(classes):
        classes = list(dict.fromkeys(classes))  # a project repeats the labels of its tasks
    subsets: dict[str, list[Element]] = {}
    for element in images:
        subsets.setdefault(element.get("subset") or "default", []).append(element)
    if split is not None or len(subsets) > 1:
        images = choose_split(subsets, split, file)
    folder = file.parent
    finder = ImageFinder(
        [options.image_root, folder / "images", folder / "images" / "default", folder], folder
    )
    for element in images:
        _read_image(file, element, finder, set(classes), drawings)
    used = drawings.class_names()
    ordered = [*classes, *sorted(used.difference(classes))]
    return drawings.finish(ordered, boxes_as_masks=options.boxes_as_masks)


def _find_xml(root: Path, split: str | None) -> tuple[Path, str | None]:
    """The XML, and the subset to read of it."""
    if root.is_file():
        return root, split
    found = _xmls(root)
    if len(found) > 1:
        folder = split_folder(root, split)
        found = [file for file in found if folder in file.parents]
        split = None
    if len(found) == 1:
        return found[0], split
    if not found:
        raise FileNotFoundError(f"{root} holds no XML of CVAT.")
    listed = ", ".join(map(str, found[:5]))
    raise ValueError(f"{root} holds {len(found)} XMLs of CVAT ({listed}): name one.")


def _xmls(root: Path) -> list[Path]:
    return [file for file in files_below(root, ".xml") if _is_cvat(file)]


def _is_cvat(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError:
        return False
    if b"<annotations" not in head:
        return False
    return any(word in head for word in (b"<meta", b"<image ", b"<track ", b"<version>1."))


def _elements(file: Path) -> Iterator[Element]:
    """The labels, images and tracks of an XML."""
    depth, parents = 0, []
    try:
        for event, element in iterparse(str(file), events=("start", "end")):
            if event == "start":
                depth += 1
                parents.append(element)
                if depth == 1 and element.tag != "annotations":
                    raise ValueError(f"{file} is not XML of CVAT: it begins with {element.tag!r}.")
                continue
            depth -= 1
            parents.pop()
            if element.tag == "label" and parents and parents[-1].tag == "labels":
                yield element
            elif depth == 1 and element.tag in ("image", "track"):
                yield element
    except (ParseError, DefusedXmlException) as error:
        raise ValueError(f"{file} is not valid XML: {error}.") from error


def _read_image(
    file: Path, element: Element, finder: ImageFinder, classes: set[str], drawings: Drawings
) -> None:
    name, stated = str(file), element.get("name") or ""
    subset = element.get("subset")
    folders = [file.parent / "images" / subset] if subset else []
    try:
        path = finder.find(stated, folders)
    except (FileNotFoundError, ValueError) as error:
        is_missing = isinstance(error, FileNotFoundError)
        drawings.findings.problem(name, None, str(error), is_missing=is_missing)
        return
    try:
        size = int(element.attrib["height"]), int(element.attrib["width"])
    except (KeyError, ValueError):
        size = None
    image = drawings.add_image(path, name, stated, size)
    if image is None:
        return
    for i, shape in enumerate(element):
        where = f"{stated}, {shape.tag} {i}"
        if shape.tag == "tag":
            drawings.findings.warn(name, where, "a tag of the whole image is left out")
            continue
        if shape.get("outside") == "1":
            continue
        label = shape.get("label")
        if shape.tag in _OPEN:
            why = f"the shape {shape.tag!r} of {label!r} has no mask; draw a polygon, or remove it"
            drawings.findings.problem(name, where, why)
        elif shape.tag not in _SHAPES:
            drawings.findings.problem(name, where, f"the shape {shape.tag!r} is unknown")
        elif not label or (classes and label not in classes):
            why = f"the label {label!r} is not one of those in the head of the file"
            drawings.findings.problem(name, where, why)
        else:
            _add_shape(shape, label, image, name, where, drawings)


def _add_shape(
    shape: Element, label: str, image: AnnotatedImage, name: str, where: str, drawings: Drawings
) -> None:
    attributes = shape.attrib
    group = attributes.get("group_id")
    place: dict[str, Any] = {"group": None if group in (None, "", "0") else group}
    try:
        place["order"] = int(attributes.get("z_order", 0))
        if shape.tag == "mask":
            patch, corner = _patch(attributes)
            drawings.add_mask(image, label, patch, corner, name, where, **place)
            return
        coordinates = _coordinates(shape.tag, attributes)
    except KeyError as error:
        drawings.findings.problem(name, where, f"a {shape.tag} has no {error.args[0]!r}")
    except (ValueError, OverflowError) as error:
        drawings.findings.problem(name, where, f"a {shape.tag} that cannot be read: {error}")
    else:
        is_box = shape.tag == "box"
        drawings.add_polygon(image, label, coordinates, name, where, is_box=is_box, **place)


def _coordinates(kind: str, attributes: Mapping[str, str]) -> list[float]:
    angle = math.radians(float(attributes.get("rotation", 0)))
    if kind == "polygon":
        points = attributes["points"].replace(";", ",").split(",")
        return [float(value) for value in points if value.strip()]
    if kind == "ellipse":
        x, y, radius_x, radius_y = (float(attributes[key]) for key in ("cx", "cy", "rx", "ry"))
        return ellipse(x, y, radius_x, radius_y, angle)
    corners = rectangle(*(float(attributes[key]) for key in ("xtl", "ytl", "xbr", "ybr")))
    return rotate(corners, angle) if angle else corners


def _patch(attributes: Mapping[str, str]) -> tuple[np.ndarray, tuple[int, int]]:
    """The mask of a `mask` and its corner: runs of background and object, row by row."""
    left, top, width, height = (
        int(float(attributes[key])) for key in ("left", "top", "width", "height")
    )
    counts = np.array([int(value) for value in attributes["rle"].split(",") if value.strip()])
    total = int(counts.sum()) if len(counts) else 0
    if width < 1 or height < 1 or (counts < 0).any() or total != width * height:
        raise ValueError(
            f"its rle counts {total} of {width} x {height} pixels; it is cut off or damaged"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(height, width), (left, top)


def _recognise(root: Path) -> str | None:
    if root.is_file():
        return "XML of CVAT" if root.suffix.lower() == ".xml" and _is_cvat(root) else None
    found = _xmls(root)
    return f"{found[0].name} of CVAT" if found else None


CVAT = AnnotationFormat("cvat", "XML of CVAT for images 1.1", read_cvat, _recognise)
