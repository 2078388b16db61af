"""Class tables, loaders and checks shared by the registrations of the benchmark data sets.

Loaders read file listings and JSON but (almost) no images, so they take seconds for any data set.
Missing or inconsistent data raises one error, which names a file and says how to fix it.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.utils.file_io import PathManager
from panopticapi.utils import rgb2id

from ...utils.files import list_names
from ..formats.coco_instances import Instances, read_instances
from ..formats.coco_panoptic import Panoptic, read_panoptic
from ..formats.coco_schemas import COCO_JSON, Category, InstanceSchema
from ..formats.findings import Findings
from ..formats.images import read_panoptic_png
from ..formats.semantic_folders import read_semantic_folders, warn_of_one_class
from ..targets import present_values

CATEGORIES = Path(__file__).parent / "categories"


def datasets_root() -> str:
    """The folder that holds the data sets, determined as in Detectron2."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def read_categories(name: str, length: int) -> list[dict[str, Any]]:
    """Read the class table categories/`name`.json.

    Raises:
        ValueError: it does not have `length` classes.
    """
    file = CATEGORIES / f"{name}.json"
    table = json.loads(file.read_text())
    if len(table) != length:
        raise ValueError(
            f"{file} lists {len(table)} classes, but the data set has {length}. Restore the file."
        )
    return table


def register_once(name: str, loader: Callable[[], list[dict]], **metadata: Any) -> None:
    """Register a data set unless its name is already registered."""
    if name in DatasetCatalog:
        return
    DatasetCatalog.register(name, loader)
    MetadataCatalog.get(name).set(**metadata)


def where_to_look(hint: str) -> str:
    """The last sentences of an error about a missing file."""
    return (
        f" {hint} DETECTRON2_DATASETS names the folder that holds the data sets (default: "
        "datasets); datasets/README.md shows the layout."
    )


def list_folder(folder: str, what: str, hint: str) -> set[str]:
    """The names in a folder, see `list_names`.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not PathManager.isdir(folder):
        raise FileNotFoundError(
            f"Folder {folder} of the {what} does not exist.{where_to_look(hint)}"
        )
    return list_names(folder)


def require_package(package: str, name: str) -> None:
    """Check that the package that reads a data set is installed.

    Raises:
        ModuleNotFoundError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"Data set {name!r} is read with the package {package}, which is not installed: run "
            f"`pip install {package}`.",
            name=package,
        )


def require_file(file: str, what: str, hint: str) -> None:
    """Check that a file exists.

    Raises:
        FileNotFoundError: it does not exist.
    """
    if not PathManager.isfile(file):
        raise FileNotFoundError(f"{what} {file} does not exist.{where_to_look(hint)}")


def require_names(
    folder: str, names: Iterable[str], present: set[str], what: str, hint: str
) -> None:
    """Check that a folder contains the expected files.

    Args:
        folder: path, for the error.
        names: expected file names.
        present: file names in the folder.
        what: the kind of files, for the error.
        hint: how to get them, for the error.

    Raises:
        FileNotFoundError: one is missing.
    """
    names = sorted(names)
    missing = [name for name in names if name not in present]
    if missing:
        raise FileNotFoundError(
            f"{os.path.join(folder, missing[0])} does not exist: {len(missing)} of {len(names)} "
            f"{what} are missing.{where_to_look(hint)}"
        )


def load_semantic(
    label_root: str,
    image_root: str,
    hint: str,
    gt_ext: str = "png",
    image_ext: str = "jpg",
) -> list[dict]:
    """Load a folder of images and a folder of label maps of the same names.

    Raises:
        FileNotFoundError: a folder, a label map or an image is missing, or all images are.
    """
    images = _stems(list_folder(image_root, "images", hint), image_ext)
    labels = _stems(list_folder(label_root, "label maps", hint), gt_ext)
    if not images:
        raise FileNotFoundError(
            f"Folder {image_root} holds no .{image_ext} images.{where_to_look(hint)}"
        )
    # Detectron2 would silently use only the images that have a label map.
    for folder, extension, expected, present, what in (
        (label_root, gt_ext, images, labels, "label maps"),
        (image_root, image_ext, labels, images, "images"),
    ):
        files = {f"{stem}.{extension}" for stem in present}
        require_names(folder, (f"{stem}.{extension}" for stem in expected), files, what, hint)
    findings = Findings()
    pairs = read_semantic_folders(image_root, label_root, findings, image_ext, gt_ext)
    findings.raise_first(hint=where_to_look(hint))
    return _semantic_records(pairs)


def load_own_semantic(
    name: str, label_root: str, image_root: str, gt_ext: str, image_ext: str
) -> list[dict]:
    """Load a folder of images and a folder of label maps of your own.

    Raises:
        FileNotFoundError: a folder, an image or a label map is missing.
    """
    findings = Findings()
    pairs = read_semantic_folders(image_root, label_root, findings, image_ext, gt_ext)
    findings.raise_first(name)
    metadata = MetadataCatalog.get(name)
    labels = [label for _, label in pairs]
    warn_of_one_class(labels, metadata.stuff_classes, metadata.ignore_label, findings)
    findings.log(name)
    return _semantic_records(pairs)


def _semantic_records(pairs: Iterable[tuple[str, str]]) -> list[dict]:
    return [{"file_name": image, "sem_seg_file_name": label} for image, label in pairs]


def _stems(names: Iterable[str], extension: str) -> set[str]:
    suffix = f".{extension}"
    return {name.removesuffix(suffix) for name in names if name.endswith(suffix)}


def load_instances(
    json_file: str, image_root: str, name: str, hint: str | None = None
) -> list[dict]:
    """Load COCO instance JSON as Detectron2's `load_coco_json` does, checked.

    Args:
        json_file: the JSON.
        image_root: folder of the images.
        name: of the data set. Classes that its metadata lacks are set.
        hint: how to get the data, for errors; None for your own data.

    Raises:
        FileNotFoundError: the JSON, the folder of images or an image is missing.
        ValueError: the JSON has a problem (see `formats/coco_instances.py`), or its classes differ
            from the metadata.
    """
    if hint is not None:
        require_file(json_file, "Instance JSON", hint)
        list_folder(image_root, "images", hint)
    metadata, findings = MetadataCatalog.get(name), Findings()
    data, contiguous_ids = read_registered_instances(json_file, image_root, metadata, findings)
    where = "" if hint is None else where_to_look(hint)
    findings.raise_first(name if hint is None else None, where)
    files = [data.path(image) for image in data.images]
    missing = missing_files(files)
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} does not exist: {len(missing)} of {len(files)} images are "
            f"missing.{where or f' {json_file} lists them.'}"
        )
    findings.log(name)
    if metadata.get("thing_classes") is None:
        names = {category.id: category.name for category in data.categories}
        metadata.thing_classes = [names[category_id] for category_id in contiguous_ids]
    if metadata.get("thing_dataset_id_to_contiguous_id") is None:
        metadata.thing_dataset_id_to_contiguous_id = contiguous_ids
    return data.records(contiguous_ids)


def read_registered_instances(
    json_file: str,
    image_root: str,
    metadata: Metadata,
    findings: Findings,
    schema: InstanceSchema = COCO_JSON,
) -> tuple[Instances | None, dict[int | str, int]]:
    """Read a COCO instance JSON and compare its categories with the metadata of the data set.

    Args:
        json_file, image_root, findings, schema: see `read_instances`.
        metadata: of the data set, possibly without classes.

    Returns:
        What `read_instances` does, and the contiguous id of each category id: those of the
        metadata, else in the order of the ids.
    """
    ids, classes = metadata.get("thing_dataset_id_to_contiguous_id"), metadata.get("thing_classes")
    registered = ids is not None
    if schema.is_lvis and not registered and classes is not None:
        ids = {i: i - 1 for i in range(1, len(classes) + 1)}
    data = read_instances(json_file, image_root, findings, contiguous_ids=ids, schema=schema)
    if data is None:
        return None, dict(ids or {})
    ids = {key: i for i, key in enumerate(data.category_ids())} if ids is None else dict(ids)
    if classes is not None:
        # Without registered ids, as in LVIS, names may be other synonyms.
        report = findings.problem if registered else findings.warn
        compare_categories(data.categories, json_file, ids, classes, report, findings)
    return data, ids


def compare_categories(
    categories: Sequence[Category],
    json_file: str,
    contiguous_ids: dict[int | str, int],
    classes: Sequence[str],
    report_name: Callable[[str, Any, str], None],
    findings: Findings,
) -> None:
    """Compare the categories of a JSON with the registered classes of the data set.

    Args:
        categories: of the JSON.
        json_file: the JSON.
        contiguous_ids: registered category id → contiguous id.
        classes: registered names by contiguous id.
        report_name: called for a category of another name: `findings.problem` or `.warn`.
        findings: gets a problem if the numbers differ.
    """
    expected = {i: classes[c] for i, c in contiguous_ids.items() if c < len(classes)}
    listed = {category.id: category.name for category in categories}
    if len(listed) != len(expected):
        why = f"lists {len(listed)} categories, but {len(expected)} are registered"
        findings.problem(json_file, None, why)
    for category in categories:
        registered = expected.get(category.id)
        if registered is None and len(listed) == len(expected):
            why = f"the category {category.name!r} is not registered under this id"
            findings.problem(json_file, category.id, why)
        elif registered is not None and category.name != registered:
            why = f"the category is {category.name!r} here, but registered as {registered!r}"
            report_name(json_file, category.id, why)


def missing_files(files: Iterable[str]) -> list[str]:
    """Those of the files that do not exist, or are links to nothing; lists each folder once."""
    present: dict[str, set[str]] = {}
    missing = []
    for file in files:
        folder, name = os.path.split(file)
        if folder not in present:
            present[folder] = list_names(folder) if PathManager.isdir(folder) else set()
        if name not in present[folder]:
            missing.append(file)
    return missing


def load_panoptic(
    json_file: str,
    image_dir: str,
    gt_dir: str,
    semseg_dir: str,
    meta: dict[str, Any],
    hint: str,
    allow_repeated_ids: bool = False,
) -> list[dict]:
    """Load COCO panoptic JSON and PNGs, with images (.jpg) and semantic PNGs of the same names.

    Args:
        json_file: panoptic JSON.
        image_dir: folder of the images.
        gt_dir: folder of the panoptic PNGs.
        semseg_dir: folder of the semantic PNGs.
        meta: with `thing_dataset_id_to_contiguous_id` and `stuff_dataset_id_to_contiguous_id`.
        hint: how to get the data, for errors.
        allow_repeated_ids: whether two segments of an image may share an id, which only evaluation
            tolerates.

    Returns:
        Records with `file_name`, `image_id`, `pan_seg_file_name`, `sem_seg_file_name` and
        `segments_info`, which has contiguous category ids and `isthing`.

    Raises:
        FileNotFoundError: the JSON, a folder, or a file of an annotation is missing.
        ValueError: the JSON is damaged, has other classes or an image without annotation, or does
            not list the segments of the first PNG.
    """
    require_file(json_file, "Panoptic JSON", hint)
    folders = ((image_dir, "images"), (gt_dir, "panoptic PNGs"), (semseg_dir, "semantic PNGs"))
    present = [list_folder(folder, what, hint) for folder, what in folders]
    data = read_registered_panoptic(
        json_file, meta, where_to_look(hint), allow_repeated_ids, allow_unannotated=False
    )
    pngs = [annotation["file_name"] for annotation in data.annotations]
    images = [os.path.splitext(png)[0] + ".jpg" for png in pngs]
    expected = (images, pngs, pngs)
    for (folder, what), names, files in zip(folders, expected, present, strict=True):
        require_names(folder, names, files, what, hint)
    records = [
        {
            "file_name": os.path.join(image_dir, image),
            "image_id": annotation["image_id"],
            "pan_seg_file_name": os.path.join(gt_dir, png),
            "sem_seg_file_name": os.path.join(semseg_dir, png),
            "segments_info": [
                with_contiguous_id(s, meta, f"{json_file}, {png}")
                for s in annotation["segments_info"]
            ],
        }
        for annotation, png, image in zip(data.annotations, pngs, images, strict=True)
    ]
    check_png(records[0], json_file, where_to_look(hint))
    return records


def read_registered_panoptic(
    json_file: str,
    meta: dict[str, Any],
    where_to_look: str,
    allow_repeated_ids: bool = False,
    allow_unannotated: bool = True,
    name: str | None = None,
) -> Panoptic:
    """Read a COCO panoptic JSON of registered classes; see `read_panoptic`.

    Args:
        meta: see `load_panoptic`.
        where_to_look: how to get the data, for errors.
        name: of the data set, for errors, if known.

    Raises:
        FileNotFoundError, ValueError: the JSON has a problem; warnings are logged.
    """
    findings = Findings()
    data = read_panoptic(
        json_file,
        findings,
        category_ids=(
            *meta["thing_dataset_id_to_contiguous_id"],
            *meta["stuff_dataset_id_to_contiguous_id"],
        ),
        allow_repeated_ids=allow_repeated_ids,
        allow_unannotated=allow_unannotated,
    )
    findings.raise_first(name, where_to_look)
    findings.log(name)
    return data


def with_contiguous_id(segment: dict, meta: dict[str, Any], where: str) -> dict:
    """A segment of a panoptic JSON with a contiguous `category_id` and with `isthing`.

    Args:
        segment: segment of the JSON.
        meta: see `load_panoptic`.
        where: JSON and PNG, for the error.

    Raises:
        ValueError: the data set does not have the category.
    """
    category_id = segment["category_id"]
    things = meta["thing_dataset_id_to_contiguous_id"]
    stuff = meta["stuff_dataset_id_to_contiguous_id"]
    is_thing = category_id in things
    if not is_thing and category_id not in stuff:
        raise ValueError(
            f"{where}: segment {segment['id']} has category_id {category_id}, which is not one of "
            f"the data set's {len({*things, *stuff})} classes."
        )
    contiguous_id = things[category_id] if is_thing else stuff[category_id]
    return segment | {"category_id": contiguous_id, "isthing": is_thing}


def check_png(record: dict, json_file: str, where_to_look: str = "") -> None:
    """Check that one PNG matches the JSON; mappers check every PNG they load."""
    png = record["pan_seg_file_name"]
    known = {0} | {segment["id"] for segment in record["segments_info"]}
    unknown = [
        int(i) for i in present_values(rgb2id(read_panoptic_png(png))) if int(i) not in known
    ]
    if unknown:
        raise ValueError(
            f"{png} has the segment id {unknown[0]} ({len(unknown)} unknown ids), which "
            f"{json_file} does not list for it: PNGs and JSON do not match.{where_to_look}"
        )
