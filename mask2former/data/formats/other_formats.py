"""Recognises files of other annotation tools that are given as COCO JSON, to say the way out.

The way out of a format in `annotation_formats.py` is its TYPE in DATASETS.CUSTOM.
"""

import re
from collections.abc import Mapping
from typing import Any

CONVERT = "export or convert it as COCO JSON with masks"

_VIA = "a file of the VGG Image Annotator (VIA)"


def _read_as(type_name: str, what: str = "it") -> str:
    return f"read {what} with TYPE: {type_name} in DATASETS.CUSTOM"


# Keys of a JSON object → the format and the way out.
_KEYS = (
    ({"_via_img_metadata"}, _VIA, _read_as("via")),
    ({"project", "metadata", "view"}, f"{_VIA}, version 3", CONVERT),
    (
        {"shapes", "imagePath"},
        "a file of LabelMe, which holds one image",
        _read_as("labelme", "its folder"),
    ),
    ({"imgHeight", "imgWidth", "objects"}, "a file of Cityscapes, which holds one image", CONVERT),
    ({"size", "objects"}, "a file of Supervisely, which holds one image", CONVERT),
    ({"classes", "tags"}, "the meta.json of a Supervisely project", CONVERT),
    ({"items", "categories"}, "a file of Datumaro", CONVERT),
    ({"type", "features"}, "GeoJSON", CONVERT),
)
# Keys of the entries of a JSON list → the format.
_ENTRY_KEYS = (
    ({"image_id", "score"}, "a list of predictions (COCO results), not ground truth"),
    ({"data", "annotations"}, f"an export of Label Studio; {CONVERT}, and {_read_as('coco')}"),
    ({"name", "labels"}, f"a file of Scalabel or BDD100K; {CONVERT}"),
    ({"shapes", "imagePath"}, f"a list of LabelMe files; {CONVERT}"),
)
# The first bytes of a file → what it is and what to do.
_MAGIC = (
    (b"PK\x03\x04", "a zip archive; unpack it and name the JSON in it"),
    (b"\x1f\x8b", "compressed with gzip; unpack it"),
    (b"\x89PNG", "an image (PNG), not COCO JSON"),
    (b"\xff\xd8\xff", "an image (JPEG), not COCO JSON"),
)
# Class, and a box or polygon in fractions of the image.
_YOLO_LINE = re.compile(rb"\s*\d+( +[-+.\deE]+){4,}\s*(\n|$)")
_YOLO_KEYS = re.compile(rb"^(path|train|val|test|nc|names) *:", re.MULTILINE)
_CSV_HEADER = re.compile(
    rb"#?\"?(filename|file_name|ImageID|image_id|image|img|id)\"?,", re.IGNORECASE
)


def name_bytes(data: bytes) -> str | None:
    """What a file that is no JSON is, if it is known."""
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    text = data.removeprefix(b"\xef\xbb\xbf").lstrip()
    if is_yolo_label(data):
        way_out = _read_as("yolo", "the folder of its data.yaml")
        return f"a label file of YOLO, which has one for each image; {way_out}"
    if len(set(_YOLO_KEYS.findall(text))) >= 2:
        return f"a data.yaml of YOLO, whose labels are in other files; {_read_as('yolo')}"
    if text.startswith(b"<"):
        if b"<annotations" in text:
            return f"XML of CVAT; {_read_as('cvat')}"
        if b"<annotation" in text:
            way_out = _read_as("voc", "the folder with SegmentationObject")
            return f"XML of Pascal VOC, which holds the boxes of one image; {way_out}"
        return f"XML; {CONVERT}"
    if _CSV_HEADER.match(text):
        return f"a CSV table; {CONVERT}"
    first, _, rest = text.partition(b"\n")
    if first.startswith(b"{") and first.rstrip().endswith(b"}") and rest.startswith(b"{"):
        return f"a list of JSON lines; {CONVERT}"
    return None


def is_yolo_label(data: bytes) -> bool:
    """Whether the beginning of a file is that of a label file of YOLO."""
    return _YOLO_LINE.match(data.removeprefix(b"\xef\xbb\xbf").lstrip()) is not None


def name_object(content: Mapping[str, Any], first: bytes) -> str | None:
    """The format of a JSON object without the lists of COCO, if it is known.

    Args:
        content: the object.
        first: JSON of its first value.
    """
    for keys, name, way_out in _KEYS:
        if keys <= content.keys():
            return f"{name}, not COCO JSON; {way_out}"
    # An export of VIA is an object of images.
    if b'"regions"' in first and b'"filename"' in first:
        return f"{_VIA}, not COCO JSON; {_read_as('via')}"
    return None


def name_list(entries: list[Any]) -> str | None:
    """What a JSON list given as COCO JSON is, if it is known."""
    first = entries[0] if entries else None
    if not isinstance(first, dict):
        return None
    return next((name for keys, name in _ENTRY_KEYS if keys <= first.keys()), None)


def name_annotations(entries: list[Any], required: set[str]) -> str | None:
    """What the annotations of a COCO JSON are, if they are of another task.

    Args:
        entries: the annotations.
        required: keys that annotations of the task must have.
    """
    first = entries[0] if entries else None
    if not isinstance(first, dict) or required <= first.keys():
        return None
    if "segments_info" in first and "segments_info" not in required:
        return (
            "is COCO panoptic JSON, not instance JSON; register it as panoptic data (TYPE: "
            "panoptic in DATASETS.CUSTOM), or give the instance JSON"
        )
    if "segmentation" in first and "segments_info" in required:
        return (
            "is COCO instance JSON, not panoptic JSON; register it as instance data (TYPE: "
            "instance in DATASETS.CUSTOM), or give the panoptic JSON"
        )
    if "caption" in first:
        return "is COCO captions JSON, which has no masks; give the instance JSON"
    return None
