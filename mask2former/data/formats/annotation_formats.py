"""The table of the annotation formats that are read besides COCO JSON and label images.

Each has a typed reader in this package. Libraries that read many formats do not fit: datumaro pins
older versions of OpenCV and Pillow, labelme needs Qt, and supervision rasterises polygons and
leaves out what it does not know without a word.
"""

from pathlib import Path

from .annotated_images import AnnotatedImages, AnnotationFormat, ReadOptions
from .coco_export import COCO
from .cvat_xml import CVAT
from .labelme import LABELME
from .mask_files import MASK_FILES
from .via import VIA
from .voc import VOC
from .yolo import YOLO

__all__ = [
    "FORMATS",
    "AnnotatedImages",
    "AnnotationFormat",
    "ReadOptions",
    "recognise_format",
]

_FORMATS = (YOLO, LABELME, VIA, CVAT, VOC, MASK_FILES, COCO)
# Name, which is the TYPE in configs → format.
FORMATS: dict[str, AnnotationFormat] = {item.name: item for item in _FORMATS}


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
        raise ValueError(f"{root} holds no annotations of a known format. Known: {looked_for}.")
    listed = "; ".join(f"{item.name}: {what}" for item, what in found)
    raise ValueError(
        f"{root} holds annotations of more than one format ({listed}). State its TYPE, or name the "
        "folder or file of one."
    )
