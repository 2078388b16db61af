"""Reads JSON of the VGG Image Annotator (VIA) 1 and 2: a project, or an export of annotations.

- Polygons, rectangles, circles and ellipses are objects; points and polylines have no area and are
  refused by name.
- The class is the value of a region attribute. If regions have several, `class_attribute` must say
  which. If none has any, as in data of one class, all are of the one class in `classes`, or else of
  the class `object`.
- Images are beside the JSON, in its folder `images`, or in `default_filepath` of the project.
- Classes are the options of the attribute in the order of the project, then others in the order of
  the alphabet, of all JSONs of the folder.

`ReadOptions.split` is the name of a folder; `image_root` is one more folder of images.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from .annotated_images import AnnotatedImage, AnnotatedImages, AnnotationFormat, ReadOptions
from .drawings import Drawings, ellipse, rectangle
from .findings import Findings
from .json_files import decode_value, explain, json_object, read_json
from .splits import ImageFinder, files_below, split_folder

_METADATA, _ATTRIBUTES, _SETTINGS = "_via_img_metadata", "_via_attributes", "_via_settings"
_OPEN = ("point", "polyline", "line")
# Class of data without attributes.
_ONE_CLASS = "object"
_MAX_NUMBER = 1e15
# Numbers that each closed shape has.
_NUMBERS = {
    "rect": ("x", "y", "width", "height"),
    "circle": ("cx", "cy", "r"),
    "ellipse": ("cx", "cy", "rx", "ry"),
}


class _Region(msgspec.Struct, gc=False):
    shape: dict[str, Any] = msgspec.field(name="shape_attributes")
    attributes: dict[str, Any] | None = msgspec.field(name="region_attributes", default=None)


class _Image(msgspec.Struct, gc=False):
    file_name: str = msgspec.field(name="filename")
    regions: list[_Region] | dict[str, _Region] | None = None

    def listed(self) -> list[tuple[str, _Region]]:
        """The regions, each with its key: VIA 1 numbers them, VIA 2 lists them."""
        if isinstance(self.regions, dict):
            return list(self.regions.items())
        return [(str(i), region) for i, region in enumerate(self.regions or ())]


class _Project(msgspec.Struct):
    """A JSON of VIA.

    Attributes:
        file: the JSON.
        images: by the key of VIA.
        options: attribute → its values in order, of those that have a list.
        image_folder: where the project says the images are.
    """

    file: Path
    images: dict[str, _Image]
    options: dict[str, list[str]]
    image_folder: str | None = None


def read_via(root: Path, options: ReadOptions) -> AnnotatedImages:
    """Read the JSONs of VIA in a folder; see the module.

    Args:
        root: a JSON, or the folder of one or several.
        options: `split`, `image_root`, `class_attribute`, `classes` and `boxes_as_masks`.

    Raises:
        FileNotFoundError, ValueError: naming file, image and region.
    """
    folder = split_folder(root, options.split)
    drawings = Drawings("VIA")
    files = [root] if root.is_file() else files_below(root, ".json")
    projects = [p for file in files if (p := _decode(file, drawings.findings)) is not None]
    attribute = _class_attribute(projects, options.class_attribute)
    if attribute is None:
        classes = [_one_class(options.classes)]
    else:
        classes = _classes(projects, attribute)
    for project in projects:
        file = project.file
        if file != folder and folder not in file.parents:
            continue
        stated = None
        if project.image_folder:
            stated = file.parent / project.image_folder.replace("\\", "/")
        finder = ImageFinder(
            [options.image_root, file.parent, stated, file.parent / "images"], file.parent
        )
        for key, entry in project.images.items():
            _read_image(file, key, entry, finder, attribute, classes, drawings)
    return drawings.finish(classes, boxes_as_masks=options.boxes_as_masks)


# ---- files ----


def _decode(file: Path, findings: Findings) -> _Project | None:
    """A JSON of VIA; None, with a problem or warning, for others."""
    number = len(findings.problems)
    raw = read_json(str(file), findings)
    if len(findings.problems) > number:
        return None
    try:
        content = decode_value(raw)
    except (ValueError, RecursionError) as error:
        findings.problem(str(file), None, f"is not valid JSON: {error or type(error).__name__}")
        return None
    if _is_via3(content):
        why = "is a project of VIA 3; export its annotations for VIA 2, which is read"
        findings.problem(str(file), None, why)
        return None
    if not _is_via(content):
        findings.warn(str(file), None, "is no JSON of VIA and not read")
        return None
    images = content.get(_METADATA, content)
    try:
        decoded = msgspec.convert(images, dict[str, _Image])
    except (msgspec.ValidationError, RecursionError) as error:
        findings.problem(str(file), None, explain(str(error), "$", "an image or region"))
        return None
    project = _Project(file, decoded, {})
    attributes = content.get(_ATTRIBUTES)
    regions = attributes.get("region") if isinstance(attributes, dict) else None
    for name, attribute in (regions if isinstance(regions, dict) else {}).items():
        listed = attribute.get("options") if isinstance(attribute, dict) else None
        project.options[name] = list(listed) if isinstance(listed, dict) else []
    settings = content.get(_SETTINGS)
    core = settings.get("core") if isinstance(settings, dict) else None
    if isinstance(core, dict) and isinstance(core.get("default_filepath"), str):
        project.image_folder = core["default_filepath"]
    return project


def _is_via(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    if _METADATA in content:
        return isinstance(content[_METADATA], dict)
    first = next(iter(content.values()), None)
    return isinstance(first, dict) and {"filename", "regions"} <= first.keys()


def _is_via3(content: Any) -> bool:
    return isinstance(content, dict) and {"project", "metadata", "view"} <= content.keys()


# ---- classes ----


def _value(region: _Region, attribute: str) -> str | None:
    """The value of an attribute; None if it has none. Of check boxes exactly one must be set."""
    value = (region.attributes or {}).get(attribute)
    if isinstance(value, dict):
        chosen = [str(name) for name, is_set in value.items() if is_set]
        return chosen[0] if len(chosen) == 1 else None
    if isinstance(value, str):
        return value.strip() or None
    return None if value is None or isinstance(value, list) else str(value)


def _class_attribute(projects: Sequence[_Project], stated: str | None) -> str | None:
    """The attribute with the class; None: no region has any attribute."""
    regions = [
        region
        for project in projects
        for image in project.images.values()
        for _, region in image.listed()
    ]
    present = dict.fromkeys(name for region in regions for name in region.attributes or {})
    with_values = [name for name in present if any(_value(r, name) is not None for r in regions)]
    if stated is not None:
        if stated in present or any(stated in project.options for project in projects):
            return stated
        listed = ", ".join(present) or "none"
        raise ValueError(
            f"No region has the CLASS_ATTRIBUTE {stated!r}; the attributes are: {listed}."
        )
    if len(with_values) > 1:
        raise ValueError(
            f"{projects[0].file}: regions have the attributes {', '.join(with_values)}; state "
            "which of them is the class as CLASS_ATTRIBUTE."
        )
    return with_values[0] if with_values else None


def _one_class(given: Sequence[str] | None) -> str:
    if given is not None and len(given) != 1:
        raise ValueError(
            f"CLASSES has {', '.join(given)}, but no region has an attribute that tells them "
            "apart; give one class."
        )
    name = _ONE_CLASS if given is None else given[0]
    logging.getLogger(__name__).info(
        f"No region has an attribute: all are of class {name!r}"
        f"{' (CLASSES names it)' if given is None else ''}."
    )
    return name


def _classes(projects: Sequence[_Project], attribute: str) -> list[str]:
    ordered = dict.fromkeys(
        option for project in projects for option in project.options.get(attribute, ())
    )
    used = {
        value
        for project in projects
        for image in project.images.values()
        for _, region in image.listed()
        if (value := _value(region, attribute)) is not None
    }
    return [*ordered, *sorted(used - ordered.keys())]


# ---- images and regions ----


def _read_image(
    file: Path,
    key: str,
    entry: _Image,
    finder: ImageFinder,
    attribute: str | None,
    classes: Sequence[str],
    drawings: Drawings,
) -> None:
    name = str(file)
    try:
        path = finder.find(entry.file_name)
    except (FileNotFoundError, ValueError) as error:
        is_missing = isinstance(error, FileNotFoundError)
        drawings.findings.problem(name, key, str(error), is_missing=is_missing)
        return
    image = drawings.add_image(path, name, entry.file_name)
    if image is None:
        return
    for region_key, region in entry.listed():
        where = f"{entry.file_name}, region {region_key}"
        class_name = classes[0] if attribute is None else _value(region, attribute)
        if class_name is None:
            given = (region.attributes or {}).get(attribute)
            why = f"has the value {given!r}, not one class, of the attribute {attribute!r}"
            drawings.findings.problem(name, where, why)
            continue
        _add_region(region.shape, class_name, image, name, where, drawings)


def _add_region(
    shape: dict[str, Any],
    class_name: str,
    image: AnnotatedImage,
    name: str,
    where: str,
    drawings: Drawings,
) -> None:
    kind = shape.get("name")
    if kind in _OPEN:
        why = f"the shape {kind!r} has no area; draw a polygon, or remove it"
        drawings.findings.problem(name, where, why)
        return
    if kind == "polygon":
        xs, ys = shape.get("all_points_x"), shape.get("all_points_y")
        if not _are_numbers(xs) or not _are_numbers(ys) or len(xs) != len(ys):
            why = "a polygon needs as many numbers in all_points_x as in all_points_y"
            drawings.findings.problem(name, where, why)
            return
        coordinates = [value for point in zip(xs, ys, strict=True) for value in point]
    elif isinstance(kind, str) and kind in _NUMBERS:
        numbers = [shape.get(key) for key in _NUMBERS[kind]]
        if not _are_numbers(numbers):
            why = f"the shape {kind!r} needs the numbers {', '.join(_NUMBERS[kind])}"
            drawings.findings.problem(name, where, why)
            return
        if kind == "rect":
            x, y, width, height = numbers
            coordinates = rectangle(x, y, x + width, y + height)
        elif kind == "circle":
            x, y, radius = numbers
            coordinates = ellipse(x, y, radius, radius)
        else:
            x, y, radius_x, radius_y = numbers
            angle = shape.get("theta", 0)
            coordinates = ellipse(x, y, radius_x, radius_y, angle if _are_numbers([angle]) else 0)
    else:
        drawings.findings.problem(name, where, f"the shape {kind!r} is unknown")
        return
    drawings.add_polygon(image, class_name, coordinates, name, where, is_box=kind == "rect")


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int | float)
        and not isinstance(value, bool)
        # More than this is no length in pixels, and overflows.
        and abs(value) < _MAX_NUMBER
        for value in values
    )


def _recognise(root: Path) -> str | None:
    for file in [root] if root.is_file() else files_below(root, ".json"):
        if file.suffix.lower() != ".json":
            continue
        sections = json_object(file, b'"regions"', b'"_via', b'"view"')
        content = {key: decode_value(value) for key, value in (sections or {}).items()}
        if _is_via(content) or _is_via3(content):
            return f"{file.name} of VIA"
    return None


VIA = AnnotationFormat("via", "JSON of the VGG Image Annotator (VIA)", read_via, _recognise)
