"""Reads annotations of any format and writes them as COCO instance JSON."""

import os
from pathlib import Path
from typing import NamedTuple

from ..formats.annotated_images import (
    AnnotatedImages,
    ReadOptions,
    coco_instances,
    image_folder,
)
from ..formats.annotation_formats import FORMATS, check_options, recognise_format
from ..formats.coco_schemas import Image
from ..formats.coco_tools import drop_root_category, marks_masks_as_crowds
from ..formats.findings import Findings
from ..formats.json_files import decode_list, read_sections
from .output import write_json

AUTO = "auto"

_ANNOTATIONS, _INSTANCES = "annotations", "instances_"


class InstanceSource(NamedTuple):
    """A COCO instance JSON and its images.

    Attributes:
        json_file: the JSON.
        image_root: folder of the images.
        found: what it is, in words.
    """

    json_file: Path
    image_root: Path
    found: str


def read_annotations(
    source: Path, format_name: str = AUTO, options: ReadOptions | None = None
) -> tuple[AnnotatedImages, str]:
    """Read annotations of any format of `FORMATS`.

    Args:
        source: folder or file.
        format_name: of `FORMATS`; "auto": recognised.
        options: what the files do not say.

    Returns:
        The images with absolute paths, and what was found, in words.

    Raises:
        FileNotFoundError: `source`, or a file it needs, does not exist.
        ValueError: the format is unknown, an annotation is damaged, or there are no images.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist.")
    if format_name == AUTO:
        chosen, found = recognise_format(source)
    elif format_name in FORMATS:
        chosen, found = FORMATS[format_name], "as stated"
    else:
        allowed = ", ".join((AUTO, *FORMATS))
        raise ValueError(f"The format {format_name!r} is unknown. Allowed: {allowed}.")
    options = ReadOptions() if options is None else options
    check_options(chosen, options)
    content = chosen.read(source, options)
    if not content.images:
        raise ValueError(f"{source} lists no images.")
    for image in content.images:
        image.path = Path(os.path.abspath(image.path))
    return content, f"{chosen.title} ({found})"


def folder_of_images(content: AnnotatedImages, image_root: Path | None = None) -> Path:
    """The folder that all images are in, absolute.

    Args:
        content: from `read_annotations`.
        image_root: a folder to prefer.
    """
    preferred = None if image_root is None else Path(os.path.abspath(image_root))
    if preferred and all(image.path.is_relative_to(preferred) for image in content.images):
        return preferred
    return image_folder(content)


def write_instances(content: AnnotatedImages, json_file: Path, image_root: Path) -> None:
    """Write COCO instance JSON atomically.

    Raises:
        WriteError: it cannot be written.
    """
    write_json(json_file, coco_instances(content, image_root))


# ---- sources of panoptic data ----


def is_coco_json(source: Path) -> bool:
    """Whether a source is one file of COCO JSON."""
    if not source.is_file() or source.suffix.lower() != ".json":
        return False
    sections = read_sections(str(source), Findings()) or {}
    return {"images", "categories"} <= sections.keys()


def _is_particular(json_file: Path) -> bool:
    """Whether a tool wrote a COCO JSON in a way that only the reader of exports knows."""
    sections = read_sections(str(json_file), Findings()) or {}
    return marks_masks_as_crowds(sections) or drop_root_category(sections) is not None


def find_images(json_file: Path, image_root: Path | None = None) -> Path:
    """The folder of the images of a COCO JSON.

    Args:
        json_file: the JSON.
        image_root: the folder, if it is known; else it is looked for beside the JSON.

    Raises:
        FileNotFoundError: it does not exist, or none has the first image.
        ValueError: the JSON is damaged.
    """
    if image_root is not None:
        if not image_root.is_dir():
            raise FileNotFoundError(f"The folder of the images {image_root} does not exist.")
        return image_root
    findings = Findings()
    sections = read_sections(str(json_file), findings) or {}
    images = decode_list(sections, "images", Image, str(json_file), findings, "an image")
    findings.raise_first(is_data=False)
    first = next((image.file_name for image in images or [] if image and image.file_name), "")
    folder, split = json_file.parent, json_file.stem.removeprefix(_INSTANCES)
    outer = folder.parent if folder.absolute().name == _ANNOTATIONS else folder
    names = (".", "images", split, f"images/{split}")
    folders = list(dict.fromkeys([folder, *(outer / name for name in names)]))
    for folder in folders:
        if (folder / first).is_file():
            return folder
    listed = ", ".join(map(str, folders))
    raise FileNotFoundError(
        f"The images of {json_file} are not in {listed}. Name their folder (--image-root)."
    )


def as_instances(
    source: Path, folder: Path, format_name: str = AUTO, options: ReadOptions | None = None
) -> InstanceSource:
    """A source of any format as COCO instance JSON.

    Args:
        source: a COCO instance JSON, which is used as it is, with its ids; or a source of
            `read_annotations`, among them COCO JSON as some tools export it.
        folder: where the JSON of another source is written.
        format_name, options: see `read_annotations`.

    Raises:
        FileNotFoundError, ValueError: see `read_annotations` and `find_images`.
        WriteError: the JSON cannot be written.
    """
    options = ReadOptions() if options is None else options
    is_plain = options == ReadOptions(image_root=options.image_root)
    if format_name == AUTO and is_plain and is_coco_json(source) and not _is_particular(source):
        return InstanceSource(source, find_images(source, options.image_root), "COCO JSON")
    content, found = read_annotations(source, format_name, options)
    image_root = folder_of_images(content, options.image_root)
    json_file = folder / "source.json"
    write_instances(content, json_file, image_root)
    return InstanceSource(json_file, image_root, found)
