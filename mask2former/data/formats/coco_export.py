"""Reads COCO instance JSON in the folders that tools export (Roboflow, CVAT, Label Studio).

    train/_annotations.coco.json and its images           Roboflow; valid, test likewise
    annotations/instances_default.json, images/default/   CVAT, Datumaro
    result.json, images/                                  Label Studio

- Roboflow's category 0, the supercategory of all others, which no object has, is left out.
- CVAT and Datumaro write every mask of the brush as a crowd (`iscrowd` 1 with an RLE), though it is
  one object. In their files, all of these are objects. Data with crowds from there is read right as
  plain COCO JSON (TYPE: instance) after removing `iscrowd` from the objects.
- An object with a box and without a mask, as in mixed projects of Roboflow, is refused, unless it
  is read with `ReadOptions.boxes_as_masks`.
- Images are looked for in the folders above, and below them if only one has the name.

`ReadOptions.split` is the name of the folder or that in `instances_NAME.json`; `image_root` is one
more folder of images. JSON that is checked and registered without conversion is TYPE: instance.
"""

import logging
from pathlib import Path
from typing import Any

import pycocotools.mask as mask_utils

from .annotated_images import (
    AnnotatedImages,
    AnnotatedObject,
    AnnotationFormat,
    ReadOptions,
    Segmentation,
)
from .coco_instances import read_instances
from .coco_schemas import Rle
from .coco_tools import (
    count_boxes,
    drop_root_category,
    make_masks_of_boxes,
    marks_masks_as_crowds,
)
from .drawings import Drawings
from .json_files import json_object
from .splits import ImageFinder, choose_split

_ROBOFLOW = "_annotations.coco.json"
_INSTANCES = "instances_"
_ANNOTATIONS = "annotations"


def read_coco(root: Path, options: ReadOptions) -> AnnotatedImages:
    """Read one JSON and find its images; see the module.

    Args:
        root: the JSON, or the folder of the export.
        options: `split`, `image_root` and `boxes_as_masks`.

    Raises:
        FileNotFoundError, ValueError: naming file and record.
    """
    file, split = _find_json(root, options.split)
    drawings = Drawings("COCO")
    tool = _Tool(file, options.boxes_as_masks)
    data = read_instances(str(file), str(file.parent), drawings.findings, adapt=tool.adapt)
    if data is None:
        drawings.findings.raise_first(is_data=False)
        raise ValueError(f"{file} has no annotations that can be read.")
    if tool.num_boxes and not options.boxes_as_masks:
        why = f" {tool.num_boxes} objects have a box and no mask; to read each box as the mask of "
        drawings.findings.raise_first(
            hint=f"{why}its object, set BOXES_AS_MASKS: True.", is_data=False
        )
    names = {category.id: str(category.name) for category in data.categories}
    finder = _finder(file, split, options.image_root)
    num_masks = 0
    found = []
    for image in data.images:
        try:
            path = finder.find(image.file_name or "")
        except (FileNotFoundError, ValueError) as error:
            is_missing = isinstance(error, FileNotFoundError)
            where = f"image {image.id}"
            drawings.findings.problem(str(file), where, str(error), is_missing=is_missing)
            continue
        size = image.height, image.width
        annotated = drawings.add_image(path, str(file), f"image {image.id}", size)
        if annotated is not None:
            found.append((image, annotated))
    for image, annotated in found:
        for annotation in data.annotations[image.id]:
            is_crowd = annotation.iscrowd in (1, True)
            if is_crowd and tool.masks_are_crowds and isinstance(annotation.segmentation, Rle):
                is_crowd = False
                num_masks += 1
            shape = _segmentation(annotation.segmentation)
            item = AnnotatedObject(names[annotation.category_id], shape, is_crowd)
            annotated.objects.append(item)
    if num_masks:
        why = (
            f"{num_masks} masks are marked as crowds (iscrowd 1), as CVAT and Datumaro mark every "
            "mask: each is read as one object"
        )
        drawings.findings.warn(str(file), None, why)
    return drawings.finish([names[key] for key in data.category_ids()])


class _Tool:
    """What is particular to the tool that wrote a JSON.

    Attributes:
        masks_are_crowds: whether it marks every mask as a crowd.
        num_boxes: objects that have a box and no mask.
    """

    def __init__(self, file: Path, boxes_as_masks: bool) -> None:
        self.masks_are_crowds = False
        self.num_boxes = 0
        self._boxes_as_masks = boxes_as_masks
        self._file = file

    def adapt(self, sections: dict[str, Any]) -> None:
        """Look at the sections of the JSON; drops the category that is none."""
        self.masks_are_crowds = marks_masks_as_crowds(sections)
        self.num_boxes = count_boxes(sections)
        if self.num_boxes and self._boxes_as_masks:
            make_masks_of_boxes(sections)
        dropped = drop_root_category(sections)
        if dropped is not None:
            logging.getLogger(__name__).info(
                f"{self._file}: the category {dropped!r} is left out: it is the supercategory of "
                "all others, and no object has it."
            )


def _segmentation(shape: Any) -> Segmentation:
    if not isinstance(shape, Rle):
        return [list(map(float, polygon)) for polygon in shape]
    plain = shape.as_dict()
    if isinstance(shape.counts, list):
        plain = mask_utils.frPyObjects(plain, *shape.size)
        plain = {"size": list(shape.size), "counts": plain["counts"].decode("ascii")}
    return plain


# ---- files ----


def _find_json(root: Path, split: str | None) -> tuple[Path, str]:
    """The JSON of a split, and the name of the split."""
    if root.is_file():
        return root, split or _split_of(root, root.parent)
    splits: dict[str, Path] = {}
    for file in _jsons(root):
        name = _split_of(file, root)
        if name in splits:
            raise ValueError(f"{root} has two JSONs of {name}: {splits[name]}, {file}. Name one.")
        splits[name] = file
    if not splits:
        raise FileNotFoundError(f"{root} holds no COCO JSON with images and categories.")
    file = choose_split(splits, split, root)
    return file, _split_of(file, root)


def _jsons(root: Path) -> list[Path]:
    files = sorted((*root.glob("*.json"), *root.glob("*/*.json")))
    files = [file for file in files if _is_coco(file)]
    instances = [f for f in files if f.name == _ROBOFLOW or f.name.startswith(_INSTANCES)]
    # Beside them are those of other tasks, such as keypoints.
    return instances or files


def _split_of(file: Path, root: Path) -> str:
    if file.name == _ROBOFLOW:
        return file.parent.name
    if file.parent not in (root, root / _ANNOTATIONS) and file.parent.name != _ANNOTATIONS:
        return file.parent.name
    return file.stem.removeprefix(_INSTANCES)


def _is_coco(file: Path) -> bool:
    keys = json_object(file, b'"categories"')
    return keys is not None and {"images", "categories"} <= keys.keys()


def _finder(file: Path, split: str, image_root: Path | None) -> ImageFinder:
    folder = file.parent
    outer = folder.parent if folder.name == _ANNOTATIONS else folder
    folders = [image_root, outer / "images" / split, outer / split, folder, outer / "images", outer]
    return ImageFinder(folders, outer)


def _recognise(root: Path) -> str | None:
    if root.is_file():
        return "a COCO JSON" if root.suffix == ".json" and _is_coco(root) else None
    found = _jsons(root)
    return f"the COCO JSON {found[0].relative_to(root)}" if found else None


COCO = AnnotationFormat("coco", "COCO JSON as tools export it", read_coco, _recognise)
