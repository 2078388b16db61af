"""The table of the annotation formats that are read besides COCO JSON and label images.

Each has a typed reader in this package. Libraries that read many formats do not fit: datumaro pins
older versions of OpenCV and Pillow, labelme needs Qt, and supervision rasterises polygons and
leaves out what it does not know without a word.
"""

import json
from pathlib import Path

from . import other_formats
from .annotated_images import AnnotatedImages, AnnotationFormat, ReadOptions
from .coco_export import COCO
from .cvat_xml import CVAT
from .labelme import LABELME
from .mask_files import MASK_FILES
from .splits import files_below
from .via import VIA
from .voc import VOC
from .yolo import YOLO

__all__ = [
    "FORMATS",
    "AnnotatedImages",
    "AnnotationFormat",
    "ReadOptions",
    "check_options",
    "recognise_format",
]

_FORMATS = (YOLO, LABELME, VIA, CVAT, VOC, MASK_FILES, COCO)
# Files that are looked at to name a format that is not read, and the largest of them.
_NUM_TRIED, _MAX_BYTES = 20, 16 << 20
# Name, which is the TYPE in configs → format.
FORMATS: dict[str, AnnotationFormat] = {item.name: item for item in _FORMATS}


# Options of single formats → those that read them.
_READERS_OF = {
    "class_attribute": ("via",),
    "mask_root": ("mask_files",),
    "boxes_as_masks": ("coco", "cvat", "labelme", "via", "yolo"),
}


def check_options(item: AnnotationFormat, options: ReadOptions) -> None:
    """Check that a format reads the options that are set.

    Raises:
        ValueError: it does not.
    """
    for key, readers in _READERS_OF.items():
        if getattr(options, key) and item.name not in readers:
            raise ValueError(
                f"{key.upper()} is for TYPE {', '.join(readers)}, but this is {item.name}."
            )


def recognise_format(root: Path) -> tuple[AnnotationFormat, str]:
    """The format of the annotations in a folder or file.

    Args:
        root: the folder or file.

    Returns:
        The format, and what of it was found, in words.

    Raises:
        FileNotFoundError: `root` does not exist.
        ValueError: it holds none of the formats, or several.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist.")
    found = [(item, what) for item in _FORMATS if (what := item.recognise(root)) is not None]
    if len(found) == 1:
        return found[0]
    if not found:
        looked_for = "; ".join(f"{item.name}: {item.title}" for item in _FORMATS)
        other = _other_format(root)
        is_known = "" if other is None else f" {other[0]} seems to be {other[1]}."
        raise ValueError(
            f"{root} holds no annotations of a known format.{is_known} Known: {looked_for}. Label "
            "images, whose pixels are classes, are TYPE: semantic."
        )
    listed = "; ".join(f"{item.name}: {what}" for item, what in found)
    raise ValueError(
        f"{root} holds annotations of more than one format ({listed}). State its TYPE, or name the "
        "folder or file of one."
    )


def _other_format(root: Path) -> tuple[Path, str] | None:
    """A file in a folder that is of a format which is not read, and what it is."""
    files = [root] if root.is_file() else files_below(root, ".json", ".csv", ".xml")
    for file in files[:_NUM_TRIED]:
        if file.stat().st_size > _MAX_BYTES:
            continue
        data = file.read_bytes()
        name = other_formats.name_bytes(data)
        try:
            content = json.loads(data) if name is None else None
        except (ValueError, RecursionError):
            continue
        if isinstance(content, list):
            name = other_formats.name_list(content)
        elif isinstance(content, dict):
            first = json.dumps(next(iter(content.values()), None))
            name = other_formats.name_object(content, first.encode())
        if name is not None:
            return file, name
    return None
