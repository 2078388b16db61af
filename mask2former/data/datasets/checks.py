"""Checks of the data sets that Detectron2 itself registers, made before its loaders run.

Its loaders fail with bare assertions or skip images without annotation. The errors here name the
missing file and the download or command that provides it.

`check_builtin(name)` checks Cityscapes, ADE20K semantic, COCO and LVIS, and ignores other names.
"""

import importlib.util
import json
import os

from detectron2.data import Metadata, MetadataCatalog
from detectron2.utils.file_io import PathManager

from .loading import list_folder, load_semantic, require_file, require_names, where_to_look

_IMAGE_END = "_leftImg8bit.png"
_CITYSCAPES_DOWNLOAD = (
    "Download gtFine_trainvaltest.zip and leftImg8bit_trainvaltest.zip from "
    "https://www.cityscapes-dataset.com/downloads/."
)
_CITYSCAPES_COMMAND = (
    "Run `pip install cityscapesscripts`, then `CITYSCAPES_DATASET={root} python -m "
    "cityscapesscripts.preparation.{module}`."
)
_COCO_DOWNLOAD = "Download it from https://cocodataset.org/#download."
_LVIS_DOWNLOAD = "Download it from https://www.lvisdataset.org/dataset."
_ADE20K_COMMAND = "Run `python datasets/prepare_ade20k_sem_seg.py`."


def check_builtin(name: str) -> None:
    """Check the files of a data set that Detectron2 registers; ignore other names.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get it.
        ModuleNotFoundError: the package that reads the data set is missing.
        ValueError: Detectron2 cannot handle the path.
    """
    if name.startswith("cityscapes_fine_"):
        check_cityscapes(name)
    elif name in ("ade20k_sem_seg_train", "ade20k_sem_seg_val"):
        metadata = MetadataCatalog.get(name)
        load_semantic(metadata.sem_seg_root, metadata.image_root, _ADE20K_COMMAND)
    elif name.startswith("lvis_v1_"):
        _require_package("lvis", name)
        _check_coco_format(MetadataCatalog.get(name), "json_file", _LVIS_DOWNLOAD)
    elif name in ("coco_2017_train_panoptic", "coco_2017_val_panoptic"):
        metadata = MetadataCatalog.get(name)
        _check_coco_format(metadata, "panoptic_json", _COCO_DOWNLOAD)
        list_folder(metadata.panoptic_root, "panoptic PNGs", _COCO_DOWNLOAD)
    elif name in ("coco_2017_train", "coco_2017_val"):
        _check_coco_format(MetadataCatalog.get(name), "json_file", _COCO_DOWNLOAD)


def _check_coco_format(metadata: Metadata, json_key: str, hint: str) -> None:
    require_file(metadata.get(json_key), "Annotation JSON", hint)
    # The images of LVIS are those of COCO.
    list_folder(metadata.image_root, "images", _COCO_DOWNLOAD)


def _require_package(package: str, name: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"Data set {name!r} is read with the package {package}, which is not installed: run "
            f"`pip install {package}`.",
            name=package,
        )


# ---- Cityscapes ----


def check_cityscapes(name: str) -> None:
    """Check that a Cityscapes data set is complete and prepared.

    Args:
        name: `cityscapes_fine_{instance_seg,sem_seg,panoptic}_{train,val}`.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get it.
        ModuleNotFoundError: `cityscapesscripts`, which reads instances, is missing.
        ValueError: Detectron2 cannot handle the path of panoptic data.
    """
    metadata = MetadataCatalog.get(name)
    evaluator_type = metadata.get("evaluator_type")
    if evaluator_type == "cityscapes_panoptic_seg":
        image_dir = metadata.image_root
    else:
        image_dir = metadata.image_dir
    root = os.path.dirname(os.path.dirname(os.path.normpath(image_dir)))
    cities = _images_by_city(image_dir)

    ends = ["labelIds.png", "instanceIds.png", "polygons.json"]
    if evaluator_type == "cityscapes_panoptic_seg":
        _check_panoptic_path(image_dir)
        ends = []  # its loader reads only the images of the download
    _check_annotations(metadata.gt_dir, cities, ends, _CITYSCAPES_DOWNLOAD)
    if evaluator_type == "cityscapes_instance":
        _require_package("cityscapesscripts", name)
        return
    labels_command = _CITYSCAPES_COMMAND.format(root=root, module="createTrainIdLabelImgs")
    _check_annotations(metadata.gt_dir, cities, ["labelTrainIds.png"], labels_command)
    if evaluator_type == "cityscapes_panoptic_seg":
        _check_panoptic(metadata, cities, root)


def _images_by_city(image_dir: str) -> dict[str, list[str]]:
    """The images of each city, as file names without `_leftImg8bit.png`."""
    cities = {}
    for city in sorted(list_folder(image_dir, "images", _CITYSCAPES_DOWNLOAD)):
        folder = os.path.join(image_dir, city)
        names = sorted(list_folder(folder, "images of a city", _CITYSCAPES_DOWNLOAD))
        foreign = [name for name in names if not name.endswith(_IMAGE_END)]
        if foreign:
            raise ValueError(
                f"{os.path.join(folder, foreign[0])} is not a Cityscapes image ({len(foreign)} "
                "such files); Detectron2 reads all files there, so move it elsewhere."
            )
        cities[city] = [name.removesuffix(_IMAGE_END) for name in names]
    if not any(cities.values()):
        raise FileNotFoundError(
            f"Folder {image_dir} holds no images.{where_to_look(_CITYSCAPES_DOWNLOAD)}"
        )
    return cities


def _check_annotations(
    gt_dir: str, cities: dict[str, list[str]], ends: list[str], hint: str
) -> None:
    for city, images in cities.items():
        folder = os.path.join(gt_dir, city)
        present = list_folder(folder, "annotations of a city", _CITYSCAPES_DOWNLOAD)
        for end in ends:
            names = (f"{image}_gtFine_{end}" for image in images)
            require_names(folder, names, present, f"{end} of {city}", hint)


def _check_panoptic_path(image_dir: str) -> None:
    # Detectron2 derives the path of a label map from the image path: it takes the part before the
    # first dot and replaces every "leftImg8bit" by "gtFine".
    parent = os.path.dirname(os.path.dirname(os.path.normpath(image_dir)))
    if "." in image_dir or "leftImg8bit" in parent:
        raise ValueError(
            f"Detectron2 cannot find the label maps of Cityscapes panoptic below {image_dir}: the "
            "path must have no dot and 'leftImg8bit' only once. Set DETECTRON2_DATASETS to another "
            "path, for example a symbolic link to the folder."
        )


def _check_panoptic(metadata: Metadata, cities: dict[str, list[str]], root: str) -> None:
    command = _CITYSCAPES_COMMAND.format(root=root, module="createPanopticImgs")
    require_file(metadata.panoptic_json, "Panoptic JSON", command)
    pngs = list_folder(metadata.panoptic_root, "panoptic PNGs", command)
    with PathManager.open(metadata.panoptic_json) as file:
        try:
            annotations = json.load(file)["annotations"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{metadata.panoptic_json} is damaged ({type(error).__name__}: {error}). {command}"
            ) from error
    names = [annotation["file_name"] for annotation in annotations]
    require_names(metadata.panoptic_root, names, pngs, "panoptic PNGs", command)
    images = {image for city in cities.values() for image in city}
    annotated = {annotation["image_id"] for annotation in annotations}
    if images != annotated:
        odd = min(images ^ annotated)
        what = "has no annotation in" if odd in images else "has no image, but is annotated in"
        raise ValueError(
            f"Image {odd} {what} {metadata.panoptic_json} ({len(images ^ annotated)} such images). "
            f"{command} {_CITYSCAPES_DOWNLOAD}"
        )
