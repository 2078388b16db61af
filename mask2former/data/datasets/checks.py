"""Checks of the data sets that Detectron2 itself loads, made before its loaders run.

Its loaders fail with bare assertions and errors of Python, or skip what they do not understand. The
errors here name the file, the record and what to do. A data set is recognised by the module of its
loader, so those that a program registers with Detectron2's functions are checked, too.

    check_builtin(name)     raises the first problem, logs warnings
    builtin_findings(name)  all of them
"""

import json
import os
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..formats.coco_instances import Instances
from ..formats.coco_panoptic import Panoptic, read_panoptic
from ..formats.coco_schemas import DETECTRON2_COCO_JSON, LVIS_EVALUATION_JSON, LVIS_JSON
from ..formats.findings import Findings
from .checks_cityscapes import check_cityscapes, cityscapes_hint
from .loading import (
    list_folder,
    load_semantic,
    missing_files,
    read_registered_instances,
    require_file,
    require_names,
    require_package,
    where_to_look,
)

_DETECTRON2 = "detectron2.data.datasets."
_COCO_DOWNLOAD = "Download it from https://cocodataset.org/#download."
_LVIS_DOWNLOAD = "Download it from https://www.lvisdataset.org/dataset."
_ADE20K_COMMAND = "Run `python datasets/prepare_ade20k_sem_seg.py`."
_LABELS_COMMAND = "Run Detectron2's datasets/prepare_panoptic_fpn.py."
_COCO_NAMES = ("coco_2014_", "coco_2017_", "keypoints_coco_")


def check_builtin(name: str) -> None:
    """Check the files of a data set that Detectron2 loads; ignore others. Repeated calls are free.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get it.
        ModuleNotFoundError: the package that reads the data set is missing.
        ValueError: a file cannot be used, or Detectron2 cannot handle the path.
    """
    if loader_module(name) is None:
        return
    _check_once(name, _versions(MetadataCatalog.get(name)))


@cache
def _check_once(name: str, versions: tuple) -> None:
    findings = builtin_findings(name)
    findings.raise_first(name, _where(name))
    findings.log(name)


def _versions(metadata: Metadata) -> tuple:
    """What changes with the files of a data set: their paths, times and sizes."""
    paths = [value for value in metadata.as_dict().values() if isinstance(value, str)]
    stats = [os.stat(path) if os.path.exists(path) else None for path in sorted(paths)]
    return tuple(sorted(paths)), tuple(s and (s.st_mtime_ns, s.st_size, s.st_ino) for s in stats)


def builtin_findings(name: str) -> Findings:
    """All that is wrong in the files of a data set that Detectron2 loads; nothing for others.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: see `check_builtin`.
    """
    module, findings = loader_module(name), Findings()
    if module is None:
        return findings
    metadata = MetadataCatalog.get(name)
    if name.startswith("cityscapes_fine_"):
        return check_cityscapes(name)
    if name in ("ade20k_sem_seg_train", "ade20k_sem_seg_val"):
        load_semantic(metadata.sem_seg_root, metadata.image_root, _ADE20K_COMMAND)
    elif module in ("coco", "lvis") and metadata.get("json_file"):
        data, _ = read_loaded_instances(name, metadata, findings)
        if data is not None and not findings.problems:
            _require_files([data.path(image) for image in data.images], metadata.json_file, name)
    elif module == "coco_panoptic":
        _check_panoptic(name, metadata, findings)
    return findings


def loader_module(name: str) -> str | None:
    """The module of `detectron2.data.datasets` that loads a data set; None for other loaders."""
    if name not in DatasetCatalog:
        return None
    module = getattr(DatasetCatalog[name], "__module__", None) or ""
    return module.removeprefix(_DETECTRON2) if module.startswith(_DETECTRON2) else None


def _hint(name: str) -> str | None:
    """How to get a data set; None if it is not one of those that Detectron2 knows."""
    if name.startswith("lvis_v"):
        return _LVIS_DOWNLOAD
    return _COCO_DOWNLOAD if name.startswith(_COCO_NAMES) else None


def _where(name: str) -> str:
    if name.startswith("cityscapes_fine_"):
        return cityscapes_hint()
    hint = _hint(name)
    return "" if hint is None else where_to_look(hint)


def _require(name: str, file: str, what: str, image_root: str) -> None:
    """Check that the JSON and the folder of the images of a data set exist."""
    hint = _hint(name)
    require_file(file, what, hint or "")
    # The images of LVIS are those of COCO.
    list_folder(image_root, "images", hint and _COCO_DOWNLOAD or "")


# ---- instances ----


def is_loaded_instances(name: str) -> bool:
    """Whether a loader of Detectron2 reads the instance JSON of a data set."""
    return loader_module(name) in ("coco", "lvis")


def is_loaded_coco(name: str) -> bool:
    """Whether Detectron2's `load_coco_json` reads the instance JSON of a data set.

    It drops objects whose polygons are all too short, and hands on those without segmentation.
    """
    module, metadata = loader_module(name), MetadataCatalog.get(name)
    # Of panoptic data sets it reads the separated versions.
    is_separated = bool(metadata.get("sem_seg_root") and metadata.get("json_file"))
    return module == "coco" or (module == "coco_panoptic" and is_separated)


def drop_unusable_objects(names: Sequence[str], records: Iterable[dict[str, Any]]) -> None:
    """Drop objects without segmentation from the records of Detectron2's `load_coco_json`.

    The check of these data sets has warned of each.

    Args:
        names: the data sets.
        records: of all of them, changed in place.
    """
    loaded = [name for name in names if is_loaded_coco(name)]
    roots = tuple(os.path.join(MetadataCatalog.get(name).image_root, "") for name in loaded)
    for record in records if loaded else ():
        annotations = record.get("annotations")
        # A loader of another project is not to lose objects.
        is_theirs = len(loaded) == len(names) or record.get("file_name", "").startswith(roots)
        if annotations and is_theirs:
            record["annotations"] = [one for one in annotations if "segmentation" in one]


def read_loaded_instances(
    name: str, metadata: Metadata, findings: Findings, *, for_evaluation: bool = False
) -> tuple[Instances | None, dict[int | str, int]]:
    """Read the COCO or LVIS JSON that a loader of Detectron2 will read.

    Args:
        name: of the data set.
        metadata: of the data set.
        findings: gets all mistakes in the JSON.
        for_evaluation: whether it must have what the official LVIS evaluation reads, too.

    Returns:
        See `read_registered_instances`.

    Raises:
        FileNotFoundError: the JSON or the folder of images is missing.
        ModuleNotFoundError: the package lvis is missing.
    """
    schema = DETECTRON2_COCO_JSON
    if loader_module(name) == "lvis":
        schema = LVIS_EVALUATION_JSON if for_evaluation else LVIS_JSON
        require_package("lvis", name)
    json_file, image_root = metadata.json_file, str(metadata.image_root)
    _require(name, json_file, "Annotation JSON", image_root)
    if schema.is_lvis and not image_root.endswith(os.sep):
        why = "is the image_root of LVIS; Detectron2 appends folders to it, so end it with '/'"
        findings.problem(image_root, None, why)
    data, ids = read_registered_instances(json_file, image_root, metadata, findings, schema)
    _check_encoding(json_file, findings)
    return data, ids


def _require_files(files: list[str], json_file: str, name: str) -> None:
    missing = missing_files(files)
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} does not exist: {len(missing)} of {len(files)} files that {json_file} "
            f"lists are missing.{_where(name)}"
        )


def _check_encoding(json_file: str, findings: Findings) -> None:
    if not PathManager.isfile(json_file):
        return
    with PathManager.open(json_file, "rb") as stream:
        encoding = json.detect_encoding(stream.read(4))
    if encoding != "utf-8":
        why = (
            f"is JSON in {encoding}, but Detectron2's loader reads only UTF-8 without byte order "
            "mark; save it so, or register it in DATASETS.CUSTOM"
        )
        findings.problem(json_file, None, why)


# ---- panoptic ----


def _check_panoptic(name: str, metadata: Metadata, findings: Findings) -> None:
    """Check a data set of `register_coco_panoptic`, or one of its separated versions.

    Raises:
        FileNotFoundError: a file or a folder is missing.
    """
    label_root = metadata.get("sem_seg_root")
    if label_root is None:
        _read_panoptic(name, metadata, findings)
        return
    labels = list_folder(label_root, "semantic PNGs", _LABELS_COMMAND)
    if metadata.get("panoptic_json") is None:
        images = list_folder(metadata.image_root, "images", _hint(name) or "")
        _check_pairs(metadata.image_root, label_root, images, labels, findings)
        return
    # Trained with polygons, evaluated with the panoptic JSON.
    data, _ = read_loaded_instances(name, metadata, findings)
    if data is not None and not findings.problems:
        stems = (os.path.splitext(image.file_name or "")[0] for image in data.images)
        names = (f"{stem}.png" for stem in stems)
        require_names(label_root, names, labels, "semantic PNGs", _LABELS_COMMAND)
    _read_panoptic(name, metadata, findings)


def _check_pairs(
    image_root: str, label_root: str, images: set[str], labels: set[str], findings: Findings
) -> None:
    """Check label maps of the names of images, of which there may be more."""
    stems = {name.removesuffix(".jpg") for name in images if name.endswith(".jpg")}
    labelled = {name.removesuffix(".png") for name in labels if name.endswith(".png")}
    for stem in sorted(labelled - stems):
        why = f"the label map has no image in {image_root}"
        findings.problem(os.path.join(label_root, f"{stem}.png"), None, why, is_missing=True)
    if not labelled:
        findings.problem(label_root, None, "holds no label maps (.png)", is_missing=True)
    bare = sorted(stems - labelled)
    if bare and labelled:
        why = f"has no label map in {label_root} and is not used ({len(bare)} such images)"
        findings.warn(os.path.join(image_root, f"{bare[0]}.jpg"), None, why)


def _read_panoptic(name: str, metadata: Metadata, findings: Findings) -> None:
    json_file = metadata.panoptic_json
    _require(name, json_file, "Panoptic JSON", metadata.image_root)
    pngs = list_folder(metadata.panoptic_root, "panoptic PNGs", _hint(name) or "")
    separated = metadata.get("sem_seg_root") is not None
    # The separated version has other classes than the JSON.
    ids = None if separated else _panoptic_ids(metadata)
    data = read_panoptic(json_file, findings, category_ids=ids)
    if not separated:
        check_loaded_panoptic(data, json_file, findings)
    if data is None or findings.problems:
        return
    names = [annotation["file_name"] for annotation in data.annotations]
    require_names(metadata.panoptic_root, names, pngs, "panoptic PNGs", _hint(name) or "")
    if not separated:
        images = [f"{os.path.splitext(png)[0]}.jpg" for png in names]
        files = [os.path.join(metadata.image_root, image) for image in images]
        _require_files(files, json_file, name)


def _panoptic_ids(metadata: Metadata) -> tuple[int, ...]:
    return (
        *metadata.thing_dataset_id_to_contiguous_id,
        *metadata.stuff_dataset_id_to_contiguous_id,
    )


def check_loaded_panoptic(data: Panoptic | None, json_file: str, findings: Findings) -> None:
    """Check what Detectron2's loader makes of a panoptic JSON: it names images after their PNGs."""
    _check_encoding(json_file, findings)
    if data is None:
        return
    for annotation in data.annotations:
        image_id, png = annotation["image_id"], annotation["file_name"]
        if not isinstance(image_id, int):
            why = (
                f"the image_id is the text {image_id!r}, of which Detectron2's loader makes a "
                "number; write numbers, or register the data set in DATASETS.CUSTOM"
            )
            findings.problem(data.file, png, why)
        image = data.image_name(annotation)
        if image != f"{os.path.splitext(png)[0]}.jpg":
            why = (
                f"the image is {image}, but Detectron2's loader takes the name of the PNG with the "
                "extension .jpg; rename it, or register the data set in DATASETS.CUSTOM"
            )
            findings.problem(data.file, png, why)


def is_loaded_panoptic(name: str) -> bool:
    """Whether Detectron2's loader reads the panoptic JSON of a data set."""
    is_coco = loader_module(name) == "coco_panoptic"
    return is_coco and MetadataCatalog.get(name).get("sem_seg_root") is None
