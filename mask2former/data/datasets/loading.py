"""Class tables, loaders and checks shared by the registrations of the benchmark data sets.

Loaders read file listings and JSON but (almost) no images, so they take seconds for any data set.
Missing or inconsistent data raises one error, which names a file and says how to fix it.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, load_sem_seg
from detectron2.utils.file_io import PathManager
from panopticapi.utils import rgb2id
from PIL import Image

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
    """The file names in a folder.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not PathManager.isdir(folder):
        raise FileNotFoundError(
            f"Folder {folder} of the {what} does not exist.{where_to_look(hint)}"
        )
    return set(PathManager.ls(folder))


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
    return load_sem_seg(label_root, image_root, gt_ext=gt_ext, image_ext=image_ext)


def _stems(names: Iterable[str], extension: str) -> set[str]:
    suffix = f".{extension}"
    return {name.removesuffix(suffix) for name in names if name.endswith(suffix)}


def load_instances(json_file: str, image_root: str, name: str, hint: str) -> list[dict]:
    """Load COCO instance JSON.

    Raises:
        FileNotFoundError: the JSON, the folder of images or an image is missing.
        ValueError: the JSON is damaged, or its classes differ from the metadata.
    """
    require_file(json_file, "Instance JSON", hint)
    present = list_folder(image_root, "images", hint)
    try:
        records = load_coco_json(json_file, image_root, name)
    # Detectron2 asserts that classes match the metadata; damaged JSON can lack any key.
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, AssertionError):
            reason = _class_difference(json_file, name) or reason
        raise ValueError(f"{json_file} cannot be used ({reason}).{where_to_look(hint)}") from error
    names = (os.path.relpath(record["file_name"], image_root) for record in records)
    require_names(image_root, names, present, "images", hint)
    return records


def _class_difference(json_file: str, name: str) -> str | None:
    """How the classes of an instance JSON differ from the metadata; None if they are the same."""
    with PathManager.open(json_file) as file:
        listed = {category["id"]: category["name"] for category in json.load(file)["categories"]}
    metadata = MetadataCatalog.get(name)
    ids = metadata.thing_dataset_id_to_contiguous_id
    expected = dict(zip(ids, metadata.thing_classes, strict=True))
    if len(listed) != len(expected):
        return f"it lists {len(listed)} classes, but the data set has {len(expected)}"
    differing = [i for i in expected if listed.get(i) != expected[i]]
    if differing:
        first = differing[0]
        return f"its class {first} is {listed.get(first)!r}, but should be {expected[first]!r}"
    return None


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
    content = _read_panoptic_json(json_file, meta, hint)

    pngs = [annotation["file_name"] for annotation in content["annotations"]]
    images = [os.path.splitext(png)[0] + ".jpg" for png in pngs]
    expected = (images, pngs, pngs)
    for (folder, what), names, files in zip(folders, expected, present, strict=True):
        require_names(folder, names, files, what, hint)
    records = []
    for annotation, png, image in zip(content["annotations"], pngs, images, strict=True):
        segments = annotation["segments_info"]
        where = f"{json_file}, {png}"
        if not allow_repeated_ids:
            _check_distinct(segments, where, hint)
        records.append(
            {
                "file_name": os.path.join(image_dir, image),
                "image_id": annotation["image_id"],
                "pan_seg_file_name": os.path.join(gt_dir, png),
                "sem_seg_file_name": os.path.join(semseg_dir, png),
                "segments_info": [with_contiguous_id(s, meta, where) for s in segments],
            }
        )
    _check_png(records[0], json_file, hint)
    return records


def _read_panoptic_json(json_file: str, meta: dict[str, Any], hint: str) -> dict[str, Any]:
    with PathManager.open(json_file) as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(
                f"{json_file} is not valid JSON: {error}.{where_to_look(hint)}"
            ) from error
    if not content.get("annotations"):
        raise ValueError(f"{json_file} has no annotations.{where_to_look(hint)}")
    expected = {*meta["thing_dataset_id_to_contiguous_id"]}
    expected |= {*meta["stuff_dataset_id_to_contiguous_id"]}
    # Some files list no categories; others list additional ones, such as for unlabelled pixels.
    listed = {category["id"] for category in content.get("categories", [])} or expected
    if not expected <= listed:
        raise ValueError(
            f"{json_file} lists {len(listed)} classes; {len(expected - listed)} of the data set's "
            f"{len(expected)} are missing, such as id {min(expected - listed)}."
            f"{where_to_look(hint)}"
        )
    annotated = {annotation["image_id"] for annotation in content["annotations"]}
    bare = [image for image in content.get("images", []) if image["id"] not in annotated]
    if bare:
        raise ValueError(
            f"{json_file} has no annotation of the image "
            f"{bare[0].get('file_name', bare[0]['id'])} ({len(bare)} images without annotation)."
            f"{where_to_look(hint)}"
        )
    return content


def _check_distinct(segments: Sequence[dict], where: str, hint: str) -> None:
    ids = [segment["id"] for segment in segments]
    if len(set(ids)) < len(ids):
        repeated = min(i for i in ids if ids.count(i) > 1)
        raise ValueError(
            f"{where}: two segments have the same id {repeated}, so their pixels cannot be told "
            f"apart.{where_to_look(hint)}"
        )


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


def _check_png(record: dict, json_file: str, hint: str) -> None:
    """Check that one PNG matches the JSON; mappers check every PNG they load."""
    png = record["pan_seg_file_name"]
    try:
        with PathManager.open(png, "rb") as file, Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{png} cannot be read as an image: {error}") from error
    known = {0} | {segment["id"] for segment in record["segments_info"]}
    unknown = [int(i) for i in present_values(rgb2id(pixels)) if int(i) not in known]
    if unknown:
        raise ValueError(
            f"{png} has the segment id {unknown[0]} ({len(unknown)} unknown ids), which "
            f"{json_file} does not list for it: PNGs and JSON do not match.{where_to_look(hint)}"
        )
