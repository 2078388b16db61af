"""Register your own data: COCO panoptic JSON + PNG, COCO instance JSON, or a folder of label PNGs.

Call one of these once per split before the data set's name is used, then name it in DATASETS.TRAIN
and DATASETS.TEST. A name that is registered already is left alone.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg, register_coco_instances

from .register_coco_panoptic_annos_semseg import register_coco_panoptic_annos_sem_seg


def panoptic_metadata(categories: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Class names, colours and the map from data set ids to contiguous ids.

    Contiguous ids number the things first, then the rest, each in the order given. As for COCO
    panoptic with semantic labels, the "stuff" entries list all classes, because the semantic task
    predicts things too; the "thing" entries list things only.

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
) -> None:
    """Register a data set in the COCO panoptic format.

    Set MODEL.SEM_SEG_HEAD.NUM_CLASSES to the number of categories.

    Args:
        name: under which to register.
        image_root: folder of the images.
        panoptic_root: folder of the panoptic PNGs.
        panoptic_json: their COCO panoptic JSON; classes are read from it.
        instances_json: COCO instance JSON of the same images, for AP.
        sem_seg_root: folder of semantic PNGs with contiguous labels; without it semantic labels
            are derived from the panoptic annotation.

    Raises:
        FileNotFoundError: the JSON does not exist.
    """
    if name in DatasetCatalog:
        return
    metadata = panoptic_metadata(json.loads(Path(panoptic_json).read_text())["categories"])
    register_coco_panoptic_annos_sem_seg(
        name, metadata, image_root, panoptic_root, panoptic_json, sem_seg_root, instances_json
    )


def register_instances(name: str, image_root: str, instances_json: str) -> None:
    """Register a data set in the COCO instance format (polygons or RLE).

    Set MODEL.SEM_SEG_HEAD.NUM_CLASSES to the number of categories.

    Args:
        name: under which to register.
        image_root: folder of the images.
        instances_json: COCO instance JSON; classes are read from it.

    Raises:
        FileNotFoundError: the JSON does not exist.
    """
    if name in DatasetCatalog:
        return
    categories = json.loads(Path(instances_json).read_text())["categories"]
    # As Detectron2's loader numbers them; known before the annotations are read.
    ordered = sorted(categories, key=lambda category: category["id"])
    register_coco_instances(
        name,
        {
            "thing_classes": [c["name"] for c in ordered],
            "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(ordered)},
        },
        instances_json,
        image_root,
    )


def register_semantic(
    name: str,
    image_root: str,
    label_root: str,
    classes: Sequence[str],
    ignore_label: int = 255,
    image_ext: str = "jpg",
    label_ext: str = "png",
) -> None:
    """Register a folder of images and a folder of label PNGs of the same names.

    Set MODEL.SEM_SEG_HEAD.NUM_CLASSES to the number of classes.

    Args:
        name: under which to register.
        image_root: folder of the images.
        label_root: folder of one-channel PNGs whose values index ``classes``.
        classes: names in the order of the labels.
        ignore_label: value of pixels that count neither in training nor in evaluation.
        image_ext: file name extension of the images.
        label_ext: of the labels.

    Raises:
        FileNotFoundError: a folder does not exist.
    """
    if name in DatasetCatalog:
        return
    for folder in (image_root, label_root):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"data set {name!r}: there is no folder {folder}")
    DatasetCatalog.register(
        name,
        partial(load_sem_seg, label_root, image_root, gt_ext=label_ext, image_ext=image_ext),
    )
    MetadataCatalog.get(name).set(
        stuff_classes=list(classes),
        image_root=image_root,
        sem_seg_root=label_root,
        evaluator_type="sem_seg",
        ignore_label=ignore_label,
    )
