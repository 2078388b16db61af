"""Registers your own data: COCO panoptic JSON and PNGs, COCO instance JSON, or label images.

Other formats are converted to COCO instance JSON, see `register_annotations.py`.

Either list the splits in DATASETS.CUSTOM of a config (`custom_entries.py`) or call a function of
this module once per split. Then name the splits in DATASETS.TRAIN and DATASETS.TEST; the number of
classes is derived from them (`data/class_counts.py`).

Paths are relative to the working directory; `~` is the home folder. Registering the same data again
does nothing, because every process registers it; other data under the same name is an error.
"""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..formats.coco_instances import Category, read_categories
from ..formats.findings import Findings
from ..formats.json_files import read_sections
from .arguments import (
    check_extensions,
    class_list,
    existing_file,
    existing_folder,
    list_extensions,
    make_changes,
)
from .colours import class_colours
from .derived_json import Changes, derive_instances, derive_panoptic
from .label_values import Value, ValueMap, make_labels
from .loading import load_instances
from .register_coco_panoptic_annos_semseg import register_coco_panoptic_annos_sem_seg
from .selection import make_selection
from .semantic_source import SemanticSource, load_source

_PANOPTIC_KEYS = ("id", "name", "isthing")

# Registered name → content of the data set.
_registered: dict[str, dict[str, Any]] = {}


def is_own(name: str) -> bool:
    """Whether this module registered the data set."""
    return name in DatasetCatalog and name in _registered


def _is_registered(name: str, content: dict[str, Any]) -> bool:
    """Whether exactly this content is registered under the name.

    Raises:
        ValueError: other content is registered under the name.
    """
    if name not in DatasetCatalog:
        return False
    if name not in _registered:
        raise ValueError(
            f"Data set {name!r} is already registered by other code. Choose another name."
        )
    for key in {**_registered[name], **content}:
        before, now = _registered[name].get(key), content.get(key)
        if before != now:
            raise ValueError(
                f"Data set {name!r} is already registered with {key} {before!r}, which differs "
                f"from {now!r}. Choose another name."
            )
    return True


def panoptic_metadata(categories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Class names, colours and the map from data set ids to contiguous ids.

    Contiguous ids number the things first, then the stuff, each in the order given. As in COCO
    panoptic with semantic labels, the "stuff" entries list all classes, because semantic
    segmentation predicts things too; the "thing" entries list only things.

    Args:
        categories: dicts with ``id``, ``name``, ``isthing`` and optionally ``color`` (RGB), the
            ``categories`` of a COCO panoptic JSON.
    """
    ordered = sorted(categories, key=lambda category: not category["isthing"])
    contiguous = {category["id"]: i for i, category in enumerate(ordered)}
    if len(contiguous) != len(ordered):
        raise ValueError(f"category ids repeat: {sorted(c['id'] for c in categories)}")
    things = [category for category in ordered if category["isthing"]]
    metadata = {
        "thing_classes": [c["name"] for c in things],
        "thing_dataset_id_to_contiguous_id": {c["id"]: contiguous[c["id"]] for c in things},
        "stuff_classes": [c["name"] for c in ordered],
        "stuff_dataset_id_to_contiguous_id": contiguous,
    }
    if all("color" in category for category in ordered):
        metadata["thing_colors"] = [c["color"] for c in things]
        metadata["stuff_colors"] = [c["color"] for c in ordered]
    return metadata


def register_panoptic(
    name: str,
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    instances_json: str | None = None,
    sem_seg_root: str | None = None,
    *,
    classes: Sequence[str] | str | None = None,
    rename: Mapping[str, str] | None = None,
    share: Sequence[float] | None = None,
    share_seed: int = 0,
    image_list: str | None = None,
) -> None:
    """Register a data set in the COCO panoptic format.

    Args:
        name: name to register.
        image_root: folder of the images.
        panoptic_root: folder of the panoptic PNGs.
        panoptic_json: their COCO panoptic JSON; classes are read from it.
        instances_json: COCO instance JSON of the same images, for AP.
        sem_seg_root: folder of semantic PNGs with contiguous labels, 255 for unlabelled pixels;
            if None, semantic labels are derived from the panoptic annotation.
        classes, share, share_seed, image_list: see `register_annotations`.
        rename: likewise, but no class can be left out and no stuff merged, as the PNGs stay.

    Raises:
        FileNotFoundError: a file, a folder or a listed image does not exist.
        ValueError: a JSON is damaged, the two JSONs list different things, the classes do not fit,
            no image is left, or the name is taken.
        WriteError: the cache cannot be written.
    """
    image_root = existing_folder(name, image_root, "images")
    panoptic_root = existing_folder(name, panoptic_root, "panoptic PNGs")
    if sem_seg_root is not None:
        sem_seg_root = existing_folder(name, sem_seg_root, "semantic PNGs")
    panoptic_json = existing_file(name, panoptic_json, "panoptic JSON")
    changes = make_changes(name, classes, rename, share, share_seed, image_list)
    if sem_seg_root is not None and (changes.classes or changes.rename):
        raise ValueError(
            f"Data set {name!r}: SEM_SEG_ROOT has labels of the classes as they are, which CLASSES "
            "and RENAME would change: leave it out, and labels are derived from the panoptic PNGs."
        )
    categories = _read_categories(name, panoptic_json, _PANOPTIC_KEYS)
    listed_things: list[Category] = []
    if instances_json is not None:
        instances_json = existing_file(name, instances_json, "instance JSON")
        listed_things = _read_categories(name, instances_json)
        _compare_things(name, panoptic_json, categories, instances_json, listed_things)
    if changes:
        panoptic_json, instances_json = derive_panoptic(
            name, panoptic_json, instances_json, categories, listed_things, changes
        )
        categories = _read_categories(name, panoptic_json, _PANOPTIC_KEYS)
    metadata = panoptic_metadata([category.as_dict() for category in categories])
    content = {
        "type": "panoptic",
        "image_root": image_root,
        "panoptic_root": panoptic_root,
        "panoptic_json": panoptic_json,
        "instances_json": instances_json,
        "sem_seg_root": sem_seg_root,
        "classes": metadata["stuff_dataset_id_to_contiguous_id"],
        "class names": metadata["stuff_classes"],
    }
    if _is_registered(name, content):
        return
    register_coco_panoptic_annos_sem_seg(
        name, metadata, image_root, panoptic_root, panoptic_json, sem_seg_root, instances_json
    )
    MetadataCatalog.get(name).is_selection = not changes.selection.is_all
    _registered[name] = content


def _compare_things(
    name: str,
    panoptic_json: str,
    categories: Sequence[Category],
    instances_json: str,
    listed: Sequence[Category],
) -> None:
    things = {category.id: category.name for category in categories if category.isthing}
    if {category.id: category.name for category in listed} != things:
        raise ValueError(
            f"Data set {name!r}: the categories of {instances_json} are "
            f"{_short({c.id: c.name for c in listed})}, but the things of {panoptic_json} are "
            f"{_short(things)}. They must be the same."
        )


def register_instances(
    name: str,
    image_root: str,
    instances_json: str,
    *,
    classes: Sequence[str] | str | None = None,
    rename: Mapping[str, str | None] | None = None,
    share: Sequence[float] | None = None,
    share_seed: int = 0,
    image_list: str | None = None,
) -> None:
    """Register a data set in the COCO instance format (polygons or RLE).

    Args:
        name: name to register.
        image_root: folder of the images.
        instances_json: COCO instance JSON; classes are read from it.
        classes, rename, share, share_seed, image_list: see `register_annotations`.

    Raises:
        FileNotFoundError: the JSON, the folder or a listed image does not exist.
        ValueError: the JSON is damaged, the classes do not fit, no image is left, or the name is
            taken.
        WriteError: the cache cannot be written.
    """
    image_root = existing_folder(name, image_root, "images")
    instances_json = existing_file(name, instances_json, "instance JSON")
    changes = make_changes(name, classes, rename, share, share_seed, image_list)
    register_changed_instances(name, image_root, instances_json, changes, instances_json)


def register_changed_instances(
    name: str, image_root: str, instances_json: str, changes: Changes, source: str
) -> None:
    """Register what `register_instances` does.

    Args:
        name, image_root, instances_json: see there; the paths exist.
        changes: of images and classes.
        source: what the JSON was made of, for errors.
    """
    if changes:
        categories = _read_categories(name, instances_json)
        instances_json = derive_instances(name, instances_json, categories, changes, source)
    # In the order of Detectron2's loader, which would set it only after reading the annotations.
    ordered = sorted(_read_categories(name, instances_json), key=lambda category: category.id)
    metadata: dict[str, Any] = {
        "thing_classes": [c.name for c in ordered],
        "thing_dataset_id_to_contiguous_id": {c.id: i for i, c in enumerate(ordered)},
    }
    colours = class_colours(len(ordered))
    metadata["thing_colors"] = [
        c.color or colour for c, colour in zip(ordered, colours, strict=True)
    ]
    content = {
        "type": "instance",
        "image_root": image_root,
        "instances_json": instances_json,
        "classes": metadata["thing_dataset_id_to_contiguous_id"],
        "class names": metadata["thing_classes"],
    }
    if _is_registered(name, content):
        return
    DatasetCatalog.register(name, partial(load_instances, instances_json, image_root, name))
    MetadataCatalog.get(name).set(
        image_root=image_root,
        json_file=instances_json,
        is_selection=not changes.selection.is_all,
        evaluator_type="coco",
        **metadata,
    )
    _registered[name] = content


def register_semantic(
    name: str,
    image_root: str,
    label_root: str,
    classes: Sequence[str] | str | None = None,
    ignore_label: int | None = None,
    image_ext: str | Sequence[str] = "jpg",
    label_ext: str | Sequence[str] = "png",
    *,
    value_map: ValueMap | None = None,
    ignore_labels: Sequence[Value] = (),
    rename: Mapping[str, str | None] | None = None,
    share: Sequence[float] | None = None,
    share_seed: int = 0,
    image_list: str | None = None,
) -> None:
    """Register a folder of images and a folder of label images of the same names.

    If a folder has no image itself, all below it are read: images/train/x.png belongs to
    labels/train/x.png. Labels that `value_map`, `ignore_labels` or `rename` change are written to
    the cache (`annotation_cache.py`) when the data set is first loaded.

    Args:
        name: name to register.
        image_root: folder of the images.
        label_root: folder of the label images: of one channel, with a palette, or with `value_map`
            of colours.
        classes: names in the order of the labels, or a text file with one name per line. With
            `value_map` the order of the classes, under the names there or those of `rename`.
        ignore_label: label of pixels that are ignored in training and evaluation; None: 255, or
            with `value_map` none.
        image_ext: file name extensions of the images, or ends of their names, such as
            "_leftImg8bit.png"; the rest pairs image and label. Images of other formats are
            read too, where no image with these extensions has the same name.
        label_ext: file name extensions of the labels, likewise.
        value_map: value of the label images → class name, or None to ignore the pixels. All values
            are integers (of palette images the indices), or all are colours: "#rrggbb", "r, g, b"
            or (r, g, b). Several values may have one class.
        ignore_labels: more values whose pixels are ignored.
        rename, share, share_seed, image_list: see `register_annotations`; pixels of a class that is
            left out are ignored.

    Raises:
        FileNotFoundError: a folder, the class file or the image list does not exist.
        ValueError: a folder has no such files, the classes or values are invalid, or the name is
            taken.
    """
    image_root = existing_folder(name, image_root, "images")
    label_root = existing_folder(name, label_root, "labels")
    extensions = tuple(map(list_extensions, (image_ext, label_ext)))
    for folder, listed, key in zip(
        (image_root, label_root), extensions, ("image_ext", "label_ext"), strict=True
    ):
        check_extensions(name, folder, listed, key)
    names = None if classes is None else class_list(name, classes)
    labels = make_labels(name, names, value_map, ignore_label, ignore_labels, rename)
    source = SemanticSource(
        name=name,
        image_root=image_root,
        label_root=label_root,
        image_ext=extensions[0],
        label_ext=extensions[1],
        selection=make_selection(name, share, share_seed, image_list),
        labels=labels,
    )
    content = {"type": "semantic", "class names": labels.classes} | vars(source)
    if _is_registered(name, content):
        return
    DatasetCatalog.register(name, partial(load_source, source))
    MetadataCatalog.get(name).set(
        stuff_classes=labels.classes,
        stuff_colors=labels.colours or class_colours(len(labels.classes)),
        image_root=image_root,
        sem_seg_root=label_root,
        semantic_source=source,
        is_selection=not source.selection.is_all,
        evaluator_type="sem_seg",
        ignore_label=labels.ignore_label,
    )
    _registered[name] = content


# ---- categories ----


def _short(categories: dict[int | str, str]) -> str:
    text = ", ".join(f"{i}: {name}" for i, name in list(categories.items())[:8])
    return f"{{{text}{', ...' * (len(categories) > 8)}}} ({len(categories)})"


def _read_categories(
    name: str, json_file: str, keys: Sequence[str] = ("id", "name")
) -> list[Category]:
    """The categories of a COCO JSON, checked.

    Raises:
        ValueError: the JSON has no categories, one lacks a key, or ids or names repeat.
    """
    status = os.stat(json_file)
    categories, findings = _categories(json_file, status.st_mtime_ns, status.st_size)
    findings.raise_first(name)
    if not categories:
        raise ValueError(f"Data set {name!r}: {json_file} has no list of 'categories'.")
    for category in categories:
        lacking = [key for key in keys if getattr(category, key) is None]
        if lacking:
            raise ValueError(
                f"Data set {name!r}: category {category.id!r} ({category.name!r}) of {json_file} "
                f"has no {lacking[0]!r}."
            )
    return categories


@lru_cache(maxsize=16)
def _categories(json_file: str, mtime_ns: int, size: int) -> tuple[list[Category] | None, Findings]:
    """The categories of a JSON, cached until the file changes, because it may be large."""
    findings = Findings()
    sections = read_sections(json_file, findings)
    categories = None
    if sections is not None:
        categories = read_categories(sections, json_file, findings)
    return categories, findings
