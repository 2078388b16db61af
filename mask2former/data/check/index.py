"""The images and annotations that a data set lists, with all mistakes in its JSON and folders.

The loaders for training stop at the first mistake, so this module itself reads COCO JSON (instance
and panoptic) and folders of label maps. Other data sets are read through their loader.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import BoxMode

from ..class_counts import class_names
from ..datasets.checks import check_builtin
from ..evaluator_types import EVALUATOR_TYPES

_IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_COCO_URL = "http://images.cocodataset.org/"


class Finding(NamedTuple):
    """A problem or a warning."""

    file: str
    id: int | str | None
    why: str


@dataclass
class Item:
    """An image and its annotations as the data set lists them.

    Attributes:
        file_name: path of the image.
        image_id: id in the data set, if it has ids.
        size: (height, width) stated by the data set, if any.
        annotations: COCO annotations with category ids of the data set; None: no instance labels.
        pan_seg_file_name: panoptic PNG.
        segments_info: its segments, with category ids of the data set.
        sem_seg_file_name: label map.
    """

    file_name: str
    image_id: int | str | None = None
    size: tuple[int, int] | None = None
    annotations: list[dict[str, Any]] | None = None
    pan_seg_file_name: str | None = None
    segments_info: list[dict[str, Any]] = field(default_factory=list)
    sem_seg_file_name: str | None = None


@dataclass
class Index:
    """The content of a data set.

    Attributes:
        name: registered name.
        classes: names in the order of contiguous ids.
        thing_ids: contiguous ids of things.
        contiguous_ids: category id of the data set → contiguous id.
        ignore_label: ignore label of label maps.
        items: the images.
        folders: folders that should contain only files of the data set.
        problems: mistakes in the JSON and the folders.
        warnings: irregularities that may be intended.
    """

    name: str
    classes: list[str]
    thing_ids: set[int] = field(default_factory=set)
    contiguous_ids: dict[int, int] = field(default_factory=dict)
    ignore_label: int = 255
    items: list[Item] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    problems: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def problem(self, file: str, id: int | str | None, why: str) -> None:
        self.problems.append(Finding(file, id, why))

    def warn(self, file: str, id: int | str | None, why: str) -> None:
        self.warnings.append(Finding(file, id, why))


def build_index(name: str) -> Index:
    """Index a registered data set.

    Args:
        name: of the data set.

    Returns:
        Its index; all mistakes are in `problems`.
    """
    metadata = MetadataCatalog.get(name)
    evaluator_type = metadata.get("evaluator_type")
    index = Index(name, list(class_names(name) or []))
    index.ignore_label = metadata.get("ignore_label", 255)
    if evaluator_type not in EVALUATOR_TYPES:
        index.warn(
            name,
            None,
            f"its metadata has evaluator_type {evaluator_type!r}, which is unknown: it can be "
            "trained on but not evaluated, and its classes are not checked",
        )
    if evaluator_type in ("coco", "lvis") and metadata.get("json_file"):
        _index_instances(index, metadata)
    elif metadata.get("panoptic_json") and evaluator_type != "cityscapes_panoptic_seg":
        _index_panoptic(index, metadata)
    elif evaluator_type == "sem_seg" and metadata.get("sem_seg_root"):
        _index_semantic(index, metadata)
    else:
        _index_loaded(index, metadata)
    if not index.items and not index.problems:
        index.problem(name, None, "the data set has no images")
    return index


def _existing_folder(index: Index, folder: str, what: str) -> bool:
    if os.path.isdir(folder):
        return True
    index.problem(folder, None, f"the folder of the {what} does not exist")
    return False


def _read_json(index: Index, file: str, keys: tuple[str, ...]) -> dict[str, Any] | None:
    """The content of a COCO JSON, or None after adding a problem if it is unusable."""
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
    except OSError as error:
        index.problem(file, None, f"cannot be read: {error.strerror or error}")
        return None
    except ValueError as error:
        index.problem(file, None, f"is not valid JSON: {error}")
        return None
    lacking = [
        key
        for key in keys
        if not isinstance(content, dict) or not isinstance(content.get(key), list)
    ]
    if lacking:
        index.problem(file, None, f"has no list {' and no list '.join(map(repr, lacking))}")
        return None
    return content


def _complete(
    index: Index, file: str, entries: list, keys: tuple[str, ...], what: str
) -> Iterator[dict[str, Any]]:
    """Yield the entries that are mappings with the given keys; add a problem for each other."""
    for i, entry in enumerate(entries):
        lacking = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if lacking:
            named = entry.get("id", f"number {i}") if isinstance(entry, dict) else f"number {i}"
            index.problem(file, named, f"{what} has no {' and no '.join(map(repr, lacking))}")
        else:
            yield entry


def _unique(index: Index, file: str, entries: Iterator[dict], key: str, what: str) -> dict:
    """Entries by the value of `key`; adds a problem for each repeated value."""
    by_key: dict[Any, dict] = {}
    for entry in entries:
        if entry[key] in by_key:
            index.problem(file, entry[key], f"{what}: {key} {entry[key]!r} occurs more than once")
        else:
            by_key[entry[key]] = entry
    return by_key


def _compare_categories(index: Index, file: str, content: dict) -> None:
    """Compare the categories of a JSON with the registered classes of the data set."""
    ids, num_classes = index.contiguous_ids, len(index.classes)
    if len(ids) != num_classes:
        why = f"the metadata has {num_classes} class names, but ids of {len(ids)} categories"
        index.problem(index.name, None, why)
    expected = {i: index.classes[c] for i, c in ids.items() if c < num_classes}
    entries = _complete(index, file, content.get("categories", []), ("id", "name"), "a category")
    listed = {
        c["id"]: c["name"] for c in _unique(index, file, entries, "id", "categories").values()
    }
    if listed and len(listed) != len(expected):
        index.problem(
            file, None, f"lists {len(listed)} categories, but {len(expected)} are registered"
        )
    for category_id in sorted(listed.keys() & expected.keys()):
        if listed[category_id] != expected[category_id]:
            index.warn(
                file,
                category_id,
                f"the category is {listed[category_id]!r} here, but registered as "
                f"{expected[category_id]!r}",
            )


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    return (image["height"], image["width"]) if {"height", "width"} <= image.keys() else None


# ---- COCO instance JSON ----


def _index_instances(index: Index, metadata: Metadata) -> None:
    file, root = metadata.json_file, metadata.image_root
    _existing_folder(index, root, "images")
    content = _read_json(index, file, ("images", "annotations", "categories"))
    if content is None:
        return
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    if ids is None:
        # Registered without classes: Detectron2 orders them by id when it loads the data set. LVIS
        # ids start at 1 without gaps.
        categories = sorted(
            _complete(index, file, content["categories"], ("id", "name"), "a category"),
            key=lambda category: category["id"],
        )
        index.classes = index.classes or [category["name"] for category in categories]
        ids = {category["id"]: i for i, category in enumerate(categories)}
    index.contiguous_ids = dict(ids)
    index.thing_ids = set(ids.values())
    _compare_categories(index, file, content)

    entries = _complete(index, file, content["images"], ("id",), "an image")
    images = _unique(index, file, entries, "id", "images")
    items: dict[Any, Item] = {}
    for image in images.values():
        name = image.get("file_name") or image.get("coco_url", "").removeprefix(_COCO_URL)
        if not name:
            index.problem(file, image["id"], "an image has no 'file_name'")
            continue
        items[image["id"]] = Item(os.path.join(root, name), image["id"], _size(image), [])
    keys = ("id", "image_id", "category_id")
    entries = _complete(index, file, content["annotations"], keys, "an annotation")
    annotations = _unique(index, file, entries, "id", "annotations")
    if metadata.evaluator_type == "coco":
        _check_evaluation_keys(index, file, list(annotations.values()))
    for annotation in annotations.values():
        image_id = annotation["image_id"]
        if image_id in items:
            items[image_id].annotations.append(annotation)
        elif image_id not in images:
            why = f"the annotation belongs to image {image_id!r}, which the JSON does not list"
            index.problem(file, annotation["id"], why)
    index.items = list(items.values())
    index.folders = {os.path.dirname(item.file_name) for item in index.items}
    _check_repeated_files(index, file)


def _check_evaluation_keys(index: Index, file: str, annotations: list[dict]) -> None:
    for key in ("area", "iscrowd"):
        without = [annotation["id"] for annotation in annotations if key not in annotation]
        if without:
            why = f"{len(without)} annotations have no {key!r}, which AP evaluation requires"
            index.problem(file, without[0], why)


def _check_repeated_files(index: Index, file: str) -> None:
    seen: dict[str, Item] = {}
    for item in index.items:
        first = seen.setdefault(item.file_name, item)
        if first is not item:
            why = f"image {first.image_id!r} has the same file {item.file_name}"
            index.problem(file, item.image_id, why)


# ---- COCO panoptic JSON and PNGs ----


def _index_panoptic(index: Index, metadata: Metadata) -> None:
    file, image_root, png_root = (
        metadata.panoptic_json,
        metadata.image_root,
        metadata.panoptic_root,
    )
    _existing_folder(index, image_root, "images")
    _existing_folder(index, png_root, "panoptic PNGs")
    things = metadata.get("thing_dataset_id_to_contiguous_id", {})
    index.contiguous_ids = {**metadata.get("stuff_dataset_id_to_contiguous_id", {}), **things}
    index.thing_ids = set(things.values())
    content = _read_json(index, file, ("annotations",))
    if content is None:
        return
    _compare_categories(index, file, content)
    entries = _complete(index, file, content.get("images", []), ("id", "file_name"), "an image")
    images = _unique(index, file, entries, "id", "images")
    sem_seg_root = metadata.get("sem_seg_root")
    if sem_seg_root is not None and not os.path.isdir(sem_seg_root):
        index.warn(sem_seg_root, None, "the folder of the semantic PNGs does not exist")
        sem_seg_root = None
    keys = ("image_id", "file_name", "segments_info")
    entries = _complete(index, file, content["annotations"], keys, "an annotation")
    annotations = _unique(index, file, entries, "image_id", "annotations")
    for image_id, annotation in annotations.items():
        png = annotation["file_name"]
        image = images.get(image_id, {})
        if images and not image:
            index.problem(file, image_id, "the JSON does not list the image of this annotation")
        name = image.get("file_name", os.path.splitext(png)[0] + ".jpg")
        index.items.append(
            Item(
                os.path.join(image_root, name),
                image_id,
                _size(image),
                pan_seg_file_name=os.path.join(png_root, png),
                segments_info=annotation["segments_info"],
                sem_seg_file_name=os.path.join(sem_seg_root, png) if sem_seg_root else None,
            )
        )
    for image_id in [i for i in images if i not in annotations]:
        index.warn(file, image_id, "the image has no annotation and is not used")
    index.folders = {os.path.dirname(item.file_name) for item in index.items} | {png_root}
    _check_repeated_files(index, file)


# ---- images and label maps of the same names ----


def _index_semantic(index: Index, metadata: Metadata) -> None:
    image_root, label_root = metadata.image_root, metadata.sem_seg_root
    folders = ((image_root, "images", "image_ext"), (label_root, "label maps", "label_ext"))
    files: list[dict[str, str]] = []
    for folder, what, key in folders:
        if not _existing_folder(index, folder, what):
            return
        suffixes = (metadata.get(key),) if metadata.get(key) else _IMAGE_EXTENSIONS
        names = sorted(f for f in os.listdir(folder) if f.lower().endswith(suffixes))
        files.append({os.path.splitext(f)[0]: os.path.join(folder, f) for f in names})
    images, labels = files
    index.folders = {image_root, label_root}
    for stem in sorted(images.keys() & labels.keys()):
        index.items.append(Item(images[stem], sem_seg_file_name=labels[stem]))
    for stem in sorted(images.keys() - labels.keys()):
        index.problem(images[stem], None, f"the image has no label map in {label_root}")
    for stem in sorted(labels.keys() - images.keys()):
        index.problem(labels[stem], None, f"the label map has no image in {image_root}")


# ---- everything else ----


def _index_loaded(index: Index, metadata: Metadata) -> None:
    try:
        check_builtin(index.name)
        records = DatasetCatalog.get(index.name)
    # A loader of another project can raise any error on invalid data.
    except Exception as error:
        index.problem(index.name, None, f"cannot be loaded: {type(error).__name__}: {error}")
        return
    # The loader may set the classes.
    index.classes = index.classes or list(
        metadata.get("stuff_classes") or metadata.get("thing_classes") or []
    )
    index.contiguous_ids = {i: i for i in range(len(index.classes))}
    for record in records:
        annotations = record.get("annotations")
        segments = record.get("segments_info", [])
        index.thing_ids |= {s["category_id"] for s in segments if s.get("isthing", True)}
        if annotations is not None and not segments:
            index.thing_ids |= {annotation["category_id"] for annotation in annotations}
        index.items.append(
            Item(
                record["file_name"],
                record.get("image_id"),
                _size(record),
                None
                if annotations is None
                else [_with_xywh(a, i) for i, a in enumerate(annotations)],
                record.get("pan_seg_file_name"),
                segments,
                record.get("sem_seg_file_name"),
            )
        )


def _with_xywh(annotation: dict[str, Any], number: int) -> dict[str, Any]:
    """A Detectron2 annotation with id and bbox as in COCO JSON."""
    converted = {"id": f"number {number}"} | annotation
    if "bbox" in annotation and "bbox_mode" in annotation:
        box = [float(value) for value in annotation["bbox"]]
        converted["bbox"] = BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYWH_ABS)
    return converted


# ---- unlisted files ----


def find_unlisted(indices: list[Index]) -> list[Finding]:
    """Image files in the folders of the data sets that no data set lists.

    Args:
        indices: data sets that may share folders, such as the splits of one data set.
    """
    listed: set[str] = set()
    for index in indices:
        listed |= {file.file for file in (*index.problems, *index.warnings)}
        for item in index.items:
            listed.add(item.file_name)
            listed |= {f for f in (item.pan_seg_file_name, item.sem_seg_file_name) if f}
    listed = {os.path.normpath(file) for file in listed}
    findings = []
    for folder in sorted({os.path.normpath(f) for index in indices for f in index.folders}):
        if not os.path.isdir(folder):
            continue
        for entry in sorted(os.listdir(folder)):
            path = os.path.join(folder, entry)
            if entry.lower().endswith(_IMAGE_EXTENSIONS) and path not in listed:
                findings.append(Finding(path, None, "no record of the data set lists this file"))
    return findings
