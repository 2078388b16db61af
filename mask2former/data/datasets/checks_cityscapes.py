"""Checks of Cityscapes, which Detectron2 registers and loads from many small files.

Its loaders read file names and sizes, and fail with bare assertions. All files of an image are
checked here: that they exist, the polygons, and the sizes in the headers of PNGs, but no pixels.
"""

import importlib
import os
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor

from detectron2.data import Metadata, MetadataCatalog

from ..formats.cityscapes import check_label_map, read_polygons
from ..formats.coco_panoptic import read_panoptic
from ..formats.findings import Findings
from ..formats.images import read_header
from .loading import list_folder, require_file, require_names, require_package, where_to_look

_IMAGE_END = "_leftImg8bit.png"
_DOWNLOAD = (
    "Download gtFine_trainvaltest.zip and leftImg8bit_trainvaltest.zip from "
    "https://www.cityscapes-dataset.com/downloads/."
)
_COMMAND = (
    "Run `pip install cityscapesscripts`, then `CITYSCAPES_DATASET={root} python -m "
    "cityscapesscripts.preparation.{module}`."
)
# Threads that read small files.
_NUM_THREADS = 8


def check_cityscapes(name: str) -> Findings:
    """Check that a Cityscapes data set is complete and prepared.

    Args:
        name: `cityscapes_fine_{instance_seg,sem_seg,panoptic}_{train,val}`.

    Returns:
        What is wrong in its files.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get it.
        ModuleNotFoundError: `cityscapesscripts`, which reads instances, is missing.
        ValueError: Detectron2 cannot handle the path of panoptic data.
    """
    metadata = MetadataCatalog.get(name)
    evaluator_type = metadata.get("evaluator_type")
    is_panoptic = evaluator_type == "cityscapes_panoptic_seg"
    image_dir = metadata.image_root if is_panoptic else metadata.image_dir
    root = os.path.dirname(os.path.dirname(os.path.normpath(image_dir)))
    cities = _images_by_city(image_dir)

    ends = ["labelIds.png", "instanceIds.png", "polygons.json"]
    if is_panoptic:
        _check_panoptic_path(image_dir)
        ends = []  # its loader reads only the images of the download
    _check_annotations(metadata.gt_dir, cities, ends, _DOWNLOAD)
    if evaluator_type == "cityscapes_instance":
        require_package("cityscapesscripts", name)
        labels: Collection[str] | None = importlib.import_module(
            "cityscapesscripts.helpers.labels"
        ).name2label
    else:
        labels = None
        labels_command = _COMMAND.format(root=root, module="createTrainIdLabelImgs")
        _check_annotations(metadata.gt_dir, cities, ["labelTrainIds.png"], labels_command)
        ends.append("labelTrainIds.png")
    findings = Findings()
    if is_panoptic:
        _check_panoptic(metadata, cities, root, findings)
    images = [(city, image) for city, names in cities.items() for image in names]

    def check(city_and_image: tuple[str, str]) -> Findings:
        city, image = city_and_image
        file = os.path.join(image_dir, city, f"{image}{_IMAGE_END}")
        return _check_image(file, os.path.join(metadata.gt_dir, city, image), ends, labels)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for found in pool.map(check, images):
            findings.extend(found)
    return findings


def _check_image(
    file: str, prefix: str, ends: Iterable[str], labels: Collection[str] | None
) -> Findings:
    """Check the files of an image.

    Args:
        file: the image.
        prefix: path of its annotations up to `_gtFine_`.
        ends: their ends after that.
        labels: see `read_polygons`.
    """
    findings = Findings()
    try:
        size = read_header(file).size
    except (OSError, ValueError) as error:
        findings.problem(file, None, str(error).removeprefix(f"{file} "))
        return findings
    for end in ends:
        annotation = f"{prefix}_gtFine_{end}"
        if end.endswith(".png"):
            check_label_map(annotation, size, f"its image {file}", findings)
            continue
        stated = read_polygons(annotation, labels, findings)
        if stated is not None and stated != size:
            why = (
                f"states {stated[1]} x {stated[0]} pixels, but its image {file} has "
                f"{size[1]} x {size[0]}"
            )
            findings.problem(annotation, None, why)
    return findings


def _images_by_city(image_dir: str) -> dict[str, list[str]]:
    """The images of each city, as file names without `_leftImg8bit.png`."""
    cities = {}
    for city in sorted(list_folder(image_dir, "images", _DOWNLOAD)):
        folder = os.path.join(image_dir, city)
        names = sorted(list_folder(folder, "images of a city", _DOWNLOAD))
        foreign = [name for name in names if not name.endswith(_IMAGE_END)]
        if foreign:
            raise ValueError(
                f"{os.path.join(folder, foreign[0])} is not a Cityscapes image ({len(foreign)} "
                "such files); Detectron2 reads all files there, so move it elsewhere."
            )
        cities[city] = [name.removesuffix(_IMAGE_END) for name in names]
    if not any(cities.values()):
        raise FileNotFoundError(f"Folder {image_dir} holds no images.{where_to_look(_DOWNLOAD)}")
    return cities


def _check_annotations(
    gt_dir: str, cities: dict[str, list[str]], ends: list[str], hint: str
) -> None:
    for city, images in cities.items():
        folder = os.path.join(gt_dir, city)
        present = list_folder(folder, "annotations of a city", _DOWNLOAD)
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


def _check_panoptic(
    metadata: Metadata, cities: dict[str, list[str]], root: str, findings: Findings
) -> None:
    command = _COMMAND.format(root=root, module="createPanopticImgs")
    require_file(metadata.panoptic_json, "Panoptic JSON", command)
    pngs = list_folder(metadata.panoptic_root, "panoptic PNGs", command)
    ids = (
        *metadata.thing_dataset_id_to_contiguous_id,
        *metadata.stuff_dataset_id_to_contiguous_id,
    )
    data = read_panoptic(metadata.panoptic_json, findings, category_ids=ids)
    if data is None or findings.problems:
        return
    names = [annotation["file_name"] for annotation in data.annotations]
    require_names(metadata.panoptic_root, names, pngs, "panoptic PNGs", command)
    images = {image for city in cities.values() for image in city}
    annotated = {annotation["image_id"] for annotation in data.annotations}
    if images != annotated:
        odd = min(images ^ annotated, key=str)
        what = "has no annotation in" if odd in images else "has no image, but is annotated in"
        raise ValueError(
            f"Image {odd} {what} {metadata.panoptic_json} ({len(images ^ annotated)} such images). "
            f"{command} {_DOWNLOAD}"
        )


def cityscapes_hint() -> str:
    """How to get the data, for errors about a file."""
    return where_to_look(_DOWNLOAD)
