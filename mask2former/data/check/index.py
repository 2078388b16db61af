"""The images and annotations that a data set lists, with all mistakes in its JSON and folders.

The loaders for training stop at the first mistake, so this module itself reads COCO JSON (instance
and panoptic) and folders of label maps. Other data sets are read through their loader.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.structures import BoxMode

from ..class_counts import class_names
from ..datasets.checks import (
    builtin_findings,
    check_loaded_panoptic,
    is_loaded_instances,
    is_loaded_panoptic,
    loader_module,
    read_loaded_instances,
)
from ..datasets.loading import read_registered_instances
from ..datasets.register_ade20k_panoptic import allows_repeated_ids
from ..evaluator_types import EVALUATOR_TYPES
from ..formats.coco_instances import raw_annotations
from ..formats.coco_panoptic import Panoptic, read_panoptic
from ..formats.findings import NOTHING_TO_TRAIN_ON, Finding, Findings
from ..formats.semantic_folders import IMAGE_EXTENSIONS, read_semantic_folders
from ..records import check_records


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
        is_read: whether a reader of `formats/` has checked the annotations.
    """

    file_name: str
    image_id: int | str | None = None
    size: tuple[int, int] | None = None
    annotations: list[dict[str, Any]] | None = None
    pan_seg_file_name: str | None = None
    segments_info: list[dict[str, Any]] = field(default_factory=list)
    sem_seg_file_name: str | None = None
    is_read: bool = False


@dataclass
class Index:
    """The content of a data set.

    Attributes:
        name: registered name.
        classes: names in the order of contiguous ids.
        thing_ids: contiguous ids of things.
        contiguous_ids: category id of the data set → contiguous id.
        ignore_label: ignore label of label maps.
        for_training: whether it is a problem if it has nothing to train on.
        items: the images.
        folders: folders that should contain only files of the data set.
        findings: mistakes in the JSON and the folders, and irregularities.
    """

    name: str
    classes: list[str]
    thing_ids: set[int] = field(default_factory=set)
    contiguous_ids: dict[int | str, int] = field(default_factory=dict)
    ignore_label: int = 255
    for_training: bool = True
    items: list[Item] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    findings: Findings = field(default_factory=Findings)

    @property
    def problems(self) -> list[Finding]:
        return self.findings.problems

    @property
    def warnings(self) -> list[Finding]:
        return self.findings.warnings

    def problem(self, file: str, id: int | str | None, why: str) -> None:
        self.findings.problem(file, id, why)

    def warn(self, file: str, id: int | str | None, why: str) -> None:
        self.findings.warn(file, id, why)


def build_index(name: str, for_training: bool = True) -> Index:
    """Index a registered data set.

    Args:
        name: of the data set.
        for_training: whether it is a problem if it has nothing to train on.

    Returns:
        Its index; all mistakes are in `problems`.
    """
    metadata = MetadataCatalog.get(name)
    evaluator_type = metadata.get("evaluator_type")
    index = Index(name, list(class_names(name) or []), for_training=for_training)
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
    elif metadata.get("panoptic_json") and not _is_trained_otherwise(metadata):
        _index_panoptic(index, metadata)
    elif evaluator_type == "sem_seg" and metadata.get("sem_seg_root"):
        _index_semantic(index, metadata)
    else:
        _index_loaded(index, metadata)
    if metadata.get("is_selection"):
        index.folders.clear()  # the other files are of other splits
    if not index.items and not index.problems:
        index.problem(name, None, "the data set has no images")
    elif not index.problems and not any(map(_has_target, index.items)):
        report = index.problem if for_training else index.warn
        file = metadata.get("panoptic_json") or metadata.get("json_file") or name
        report(file, None, NOTHING_TO_TRAIN_ON)
    return index


def _is_trained_otherwise(metadata: Metadata) -> bool:
    """Whether training reads another annotation than the panoptic JSON of a data set."""
    is_separated = "sem_seg_root" in metadata.as_dict() and loader_module(metadata.name) is not None
    return metadata.evaluator_type == "cityscapes_panoptic_seg" or is_separated


def _has_target(item: Item) -> bool:
    objects = item.segments_info if item.pan_seg_file_name is not None else item.annotations
    return objects is None or any(not one.get("iscrowd", 0) for one in objects)


def _existing_folder(index: Index, folder: str, what: str) -> bool:
    if os.path.isdir(folder):
        return True
    index.problem(folder, None, f"the folder of the {what} does not exist")
    return False


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    return (image["height"], image["width"]) if {"height", "width"} <= image.keys() else None


# ---- COCO instance JSON ----


def _index_instances(index: Index, metadata: Metadata) -> None:
    _existing_folder(index, metadata.image_root, "images")
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    classes = metadata.get("thing_classes")
    if ids is not None and classes is not None and len(ids) != len(classes):
        why = f"the metadata has {len(classes)} class names, but ids of {len(ids)} categories"
        index.problem(index.name, None, why)
    if not is_loaded_instances(index.name):
        data, index.contiguous_ids = read_registered_instances(
            metadata.json_file, metadata.image_root, metadata, index.findings
        )
    else:
        try:
            data, index.contiguous_ids = read_loaded_instances(
                index.name, metadata, index.findings, for_evaluation=True
            )
        except (FileNotFoundError, ModuleNotFoundError) as error:
            index.problem(index.name, None, str(error))
            return
    if data is None:
        return
    names = {category.id: category.name for category in data.categories}
    index.classes = index.classes or [names.get(key, str(key)) for key in index.contiguous_ids]
    index.thing_ids = set(index.contiguous_ids.values())
    index.items = [
        Item(
            data.path(image),
            image.id,
            None if image.height is None else (image.height, image.width),
            list(raw_annotations(data, image)),
            is_read=True,
        )
        for image in data.images
    ]
    index.folders = {os.path.dirname(item.file_name) for item in index.items}


# ---- COCO panoptic JSON and PNGs ----


def _index_panoptic(index: Index, metadata: Metadata) -> None:
    image_root, png_root = metadata.image_root, metadata.panoptic_root
    _existing_folder(index, image_root, "images")
    _existing_folder(index, png_root, "panoptic PNGs")
    things = metadata.get("thing_dataset_id_to_contiguous_id", {})
    index.contiguous_ids = {**metadata.get("stuff_dataset_id_to_contiguous_id", {}), **things}
    index.thing_ids = set(things.values())
    if len(index.contiguous_ids) != len(index.classes):
        why = (
            f"the metadata has {len(index.classes)} class names, but ids of "
            f"{len(index.contiguous_ids)} categories"
        )
        index.problem(index.name, None, why)
    data = read_panoptic(
        metadata.panoptic_json,
        index.findings,
        category_ids=index.contiguous_ids,
        allow_repeated_ids=allows_repeated_ids(index.name),
        allow_unannotated=metadata.evaluator_type == "coco_panoptic_seg",
    )
    if is_loaded_panoptic(index.name):
        check_loaded_panoptic(data, metadata.panoptic_json, index.findings)
    if data is None:
        return
    _compare_names(index, data)
    sem_seg_root = metadata.get("sem_seg_root")
    if sem_seg_root is not None and not os.path.isdir(sem_seg_root):
        index.warn(sem_seg_root, None, "the folder of the semantic PNGs does not exist")
        sem_seg_root = None
    for annotation in data.annotations:
        png = annotation["file_name"]
        index.items.append(
            Item(
                os.path.join(image_root, data.image_name(annotation)),
                annotation["image_id"],
                data.image_size(annotation),
                pan_seg_file_name=os.path.join(png_root, png),
                segments_info=annotation["segments_info"],
                sem_seg_file_name=os.path.join(sem_seg_root, png) if sem_seg_root else None,
                is_read=True,
            )
        )
    index.folders = {os.path.dirname(item.file_name) for item in index.items} | {png_root}


def _compare_names(index: Index, data: Panoptic) -> None:
    for category in data.categories:
        class_id = index.contiguous_ids.get(category.id, len(index.classes))
        if class_id < len(index.classes) and category.name != index.classes[class_id]:
            why = (
                f"the category is {category.name!r} here, but registered as "
                f"{index.classes[class_id]!r}"
            )
            index.warn(data.file, category.id, why)


# ---- images and label maps of the same names ----


def _index_semantic(index: Index, metadata: Metadata) -> None:
    source = metadata.get("semantic_source")
    index.folders = {metadata.image_root, metadata.sem_seg_root}
    if source is None:
        pairs = read_semantic_folders(metadata.image_root, metadata.sem_seg_root, index.findings)
    else:
        pairs = source.pairs(index.findings)
        if source.labels.table is not None:  # the label maps are in the cache
            index.folders.discard(metadata.sem_seg_root)
    index.items = [Item(image, sem_seg_file_name=label, is_read=True) for image, label in pairs]


# ---- everything else ----


def _index_loaded(index: Index, metadata: Metadata) -> None:
    try:
        index.findings.extend(builtin_findings(index.name))
        if index.problems:
            return
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
    for record in check_records(records, index.name, index.findings):
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
            if entry.lower().endswith(IMAGE_EXTENSIONS) and path not in listed:
                findings.append(Finding(path, None, "no record of the data set lists this file"))
    return findings
