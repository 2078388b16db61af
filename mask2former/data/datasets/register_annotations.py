"""Registers annotations of any format in the table `formats/annotation_formats.py`.

    your files ─ reader ─→ COCO instance JSON in the cache ─ register_instances ─→ as any data

so that loader, checks, evaluators and tools need to know nothing of the format.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from ..formats.annotated_images import (
    AnnotatedImages,
    AnnotationFormat,
    ReadOptions,
    coco_instances,
)
from ..formats.annotation_formats import FORMATS, check_options, recognise_format
from ..formats.findings import Findings
from ..formats.json_files import decode_value, read_sections
from .annotation_cache import cached, stamp, stamp_folder, stamp_tree, write_json
from .arguments import class_list, make_changes
from .register_custom import is_own, register_changed_instances
from .selection import short_list

_logger = logging.getLogger(__name__)
# Says what has been found, before the loggers of a run are set up.
_logger.setLevel(logging.INFO)

AUTO = "auto"
# Name → arguments of the registration. In one process, changed files do not change a data set.
_known: dict[str, dict[str, Any]] = {}


class _Info(msgspec.Struct):
    """What a converted JSON says about its source.

    Attributes:
        image_root: folder of the images.
        images, objects, crowds: how many it has.
        outside: folders of images that are neither in the folder of the annotations nor in that
            of the images.
        sources: other files and folders there.
        outside_digest: of the content of both.
    """

    image_root: str
    images: int
    objects: int
    crowds: int
    outside: list[str]
    sources: list[str]
    outside_digest: str


def register_annotations(
    name: str,
    root: str,
    type: str = AUTO,
    *,
    split: str | None = None,
    image_root: str | None = None,
    mask_root: str | None = None,
    classes: Sequence[str] | str | None = None,
    rename: Mapping[str, str | None] | None = None,
    share: Sequence[float] | None = None,
    share_seed: int = 0,
    image_list: str | None = None,
    class_attribute: str | None = None,
    boxes_as_masks: bool = False,
) -> None:
    """Register annotations of a labelling tool or data set format, for instance segmentation.

    They are converted once; the result is kept in the cache (`annotation_cache.py`).

    Args:
        name: name to register.
        root: folder or file of the annotations.
        type: a name of `FORMATS`, or "auto" to recognise the format.
        split: which part of the data, such as "train"; None: it has one part.
        image_root: folder of the images where they are not where the format puts them.
        mask_root: folder of masks whose names begin with that of their image, see `mask_files.py`.
        classes: all classes in order, or a text file with one per line; under the names of the
            files or under those of `rename`. Formats without names take them from here. None:
            those of the files.
        rename: old class name → new name; None leaves the class out; the key "*" stands for all
            classes that neither `rename` nor `classes` names. Classes of one name are merged.
        share: [low, high) in [0, 1]: the images whose hash of the file name falls into it. Shares
            that do not overlap have no image in common.
        share_seed: of the hashes.
        image_list: text file with one image per line: a path, its end, or either without extension.
        class_attribute: see `ReadOptions`.
        boxes_as_masks: see `ReadOptions`.

    Raises:
        FileNotFoundError: a file, a folder or a listed image does not exist.
        ValueError: the format is unknown, a file is damaged, the classes do not fit, no image is
            left, or the name is taken.
        WriteError: the cache cannot be written.
    """
    arguments = {key: value for key, value in locals().items() if key != "name"}
    if is_own(name) and _known.get(name) == arguments:
        return
    where = f"Data set {name!r}"
    path = Path(root).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{where}: ROOT {root} does not exist (in {os.getcwd()}).")
    images, masks = (None if f is None else Path(f).expanduser() for f in (image_root, mask_root))
    for key, given, folder in (("IMAGE", image_root, images), ("MASK", mask_root, masks)):
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(f"{where}: {key}_ROOT {given} is no folder (in {os.getcwd()}).")
    listed = None if classes is None else class_list(name, classes)
    options = ReadOptions(
        split=split,
        image_root=images,
        mask_root=masks,
        classes=None if listed is None else tuple(listed),
        rename=rename,
        class_attribute=class_attribute,
        boxes_as_masks=boxes_as_masks,
    )
    try:
        reader, found = _find_format(path, type)
        check_options(reader, options)
        json_file = convert_annotations(path, reader, options)
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{where}: {error}") from error
    sections = _sections(json_file)
    info = _info(sections)
    names = [category["name"] for category in decode_value(sections["categories"])]
    what = f"TYPE {reader.name} ({found or reader.title})"
    part = "" if split is None else f", split {split}"
    crowds = f", {info.crowds} of them crowds" if info.crowds else ""
    _logger.info(
        f"{where}: {what}{part}: {info.images} images, {info.objects} objects{crowds}, "
        f"{len(names)} classes: {short_list(names)}"
    )
    changes = make_changes(name, listed, rename, share, share_seed, image_list)
    register_changed_instances(name, info.image_root, json_file, changes, root)
    _known[name] = arguments


def _find_format(root: Path, type: str) -> tuple[AnnotationFormat, str | None]:
    """The format to read, and what of it was found if it was to be recognised."""
    if type == AUTO:
        return recognise_format(root)
    if type not in FORMATS:
        raise ValueError(f"type {type!r} is unknown; allowed: {', '.join((AUTO, *FORMATS))}.")
    return FORMATS[type], None


def convert_annotations(root: Path, reader: AnnotationFormat, options: ReadOptions) -> str:
    """The COCO instance JSON of annotations; made once, see `annotation_cache.py`.

    Args:
        root: folder or file of the annotations.
        reader: their format.
        options: how to read them.

    Returns:
        The JSON. Its "info" has the folder of the images.

    Raises:
        FileNotFoundError, ValueError: of the reader, or it finds no image.
        WriteError: the cache cannot be written.
    """
    roots = (root, options.mask_root, options.image_root)
    folders = [str(folder) for folder in roots if folder is not None and folder.is_dir()]
    key = [
        reader.name,
        os.path.abspath(root),
        {name: None if v is None else str(v) for name, v in vars(options).items()},
        [stamp(str(root))] if root.is_file() else [],
        [stamp_tree(folder) for folder in folders],
    ]
    source = "_".join(part for part in (root.absolute().stem, options.split, reader.name) if part)
    write = partial(_write, root, folders, reader, options)
    outside: str | None = None
    while True:
        json_file = cached(source, ".json", [*key, outside], write)
        info = _info(_sections(json_file))
        now = _digest(info.outside, info.sources)
        if now == info.outside_digest:
            return json_file
        # Files elsewhere have changed since.
        outside = now


def _write(
    root: Path, folders: Sequence[str], reader: AnnotationFormat, options: ReadOptions, path: str
) -> None:
    content = reader.read(root, options)
    if not content.images:
        raise ValueError(f"{root} has no images ({reader.title}).")
    parent = [str(root.parent)] if root.is_file() else []
    image_root = _image_root(content, [*parent, *folders])
    for image in content.images:
        image.path = Path(os.path.abspath(image.path))
    coco = coco_instances(content, Path(image_root))
    _warn_of_no_pixel(coco, root)
    outside = _outside({str(image.path.parent) for image in content.images}, folders)
    sources = _outside(map(os.path.abspath, content.sources), folders)
    info = _Info(
        image_root=image_root,
        images=len(content.images),
        objects=len(coco["annotations"]),
        crowds=sum(annotation["iscrowd"] for annotation in coco["annotations"]),
        outside=outside,
        sources=sources,
        outside_digest=_digest(outside, sources),
    )
    write_json(path, msgspec.json.encode({"info": info} | coco))


def _warn_of_no_pixel(coco: Mapping[str, Any], root: Path) -> None:
    """Warn of objects whose mask has no pixel, such as polygons without width."""
    empty = [a for a in coco["annotations"] if a["area"] == 0]
    if empty:
        names = {image["id"]: image["file_name"] for image in coco["images"]}
        listed = [names[i] for i in dict.fromkeys(a["image_id"] for a in empty)]
        _logger.warning(
            f"{root}: {len(empty)} objects cover no pixel, such as polygons without width, in the "
            f"images {short_list(listed)}"
        )


def _image_root(content: AnnotatedImages, folders: Sequence[str]) -> str:
    """The folder to which names of images are relative: the inner one of those stated, if it can.

    Names then stay the same when images are added, and with them the shares.
    """
    parents = {os.path.dirname(os.path.abspath(image.path)) for image in content.images}
    for folder in map(os.path.abspath, reversed(folders)):
        if all(_is_in(parent, folder) for parent in parents):
            return folder
    return os.path.commonpath(parents)


def _is_in(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder


def _outside(paths: Iterable[str], folders: Sequence[str]) -> list[str]:
    """The files and folders that are in none of `folders`."""
    roots = [os.path.abspath(folder) for folder in folders]
    return sorted(path for path in set(paths) if not any(_is_in(path, root) for root in roots))


def _digest(folders: Sequence[str], sources: Sequence[str]) -> str:
    stamps = [stamp_folder(folder) for folder in folders]
    stamps += [[stamp(path)] if os.path.isfile(path) else stamp_tree(path) for path in sources]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]


def _sections(json_file: str) -> dict[str, Any]:
    findings = Findings()
    sections = read_sections(json_file, findings)
    findings.raise_first(is_data=False)
    assert sections is not None
    return sections


def _info(sections: Mapping[str, Any]) -> _Info:
    return msgspec.convert(decode_value(sections["info"]), _Info)
