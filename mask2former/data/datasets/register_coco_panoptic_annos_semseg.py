"""Registers COCO panoptic with semantic labels: `coco_2017_{train,val}_panoptic_with_sem_seg`.

The semantic labels are PNGs of all 133 classes in `coco/panoptic_semseg_{train,val}2017`. If that
folder does not exist, records have no `sem_seg_file_name`.

`load_coco_panoptic_json` and `register_coco_panoptic_annos_sem_seg` work for any data set in the
COCO panoptic format.
"""

import os
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.utils.file_io import PathManager

from .loading import (
    check_png,
    datasets_root,
    missing_files,
    read_registered_panoptic,
    with_contiguous_id,
)

# Detectron2's name → panoptic PNGs, panoptic JSON, semantic PNGs, images, instance JSON.
_SPLITS = {
    "coco_2017_train_panoptic": (
        "coco/panoptic_train2017",
        "coco/annotations/panoptic_train2017.json",
        "coco/panoptic_semseg_train2017",
        "coco/train2017",
        "coco/annotations/instances_train2017.json",
    ),
    "coco_2017_val_panoptic": (
        "coco/panoptic_val2017",
        "coco/annotations/panoptic_val2017.json",
        "coco/panoptic_semseg_val2017",
        "coco/val2017",
        "coco/annotations/instances_val2017.json",
    ),
    "coco_2017_val_100_panoptic": (
        "coco/panoptic_val2017_100",
        "coco/annotations/panoptic_val2017_100.json",
        "coco/panoptic_semseg_val2017_100",
        "coco/val2017",
        "coco/annotations/instances_val2017_100.json",
    ),
}


def get_metadata() -> dict[str, Any]:
    """Class names, colours (RGB) and maps from COCO ids to contiguous ids.

    The 80 things have contiguous ids 0 to 79, the stuff 80 to 132. The "stuff" entries list all 133
    classes, because semantic segmentation predicts things too.
    """
    things = [category for category in COCO_CATEGORIES if category["isthing"]]
    assert COCO_CATEGORIES[: len(things)] == things, "things come first"
    return {
        "thing_classes": [category["name"] for category in things],
        "thing_colors": [category["color"] for category in things],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(things)},
        "stuff_classes": [category["name"] for category in COCO_CATEGORIES],
        "stuff_colors": [category["color"] for category in COCO_CATEGORIES],
        "stuff_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(COCO_CATEGORIES)},
    }


def load_coco_panoptic_json(
    json_file: str,
    image_dir: str,
    gt_dir: str,
    semseg_dir: str | None,
    meta: dict[str, Any],
    name: str | None = None,
) -> list[dict]:
    """Load a data set in the COCO panoptic format.

    Args:
        json_file: panoptic JSON.
        image_dir: folder of the images, with the names that `images` of the JSON lists, or without
            `images` those of the PNGs with the extension .jpg.
        gt_dir: folder of the panoptic PNGs.
        semseg_dir: folder of semantic PNGs with the same names; None or absent: no semantic labels.
        meta: with `thing_dataset_id_to_contiguous_id` and `stuff_dataset_id_to_contiguous_id`.
        name: of the data set, for errors.

    Returns:
        Records with `file_name`, `image_id`, `pan_seg_file_name`, `sem_seg_file_name` (if the
        folder exists) and `segments_info` with contiguous category ids and `isthing`.

    Raises:
        FileNotFoundError: the JSON, a folder, an image or a PNG does not exist.
        ValueError: the JSON has a problem (see `formats/coco_panoptic.py`), or does not list the
            segments of the first PNG.
    """
    if not PathManager.isfile(json_file):
        raise FileNotFoundError(f"Panoptic JSON {json_file} does not exist.{_where_to_look()}")
    for folder, what in ((image_dir, "images"), (gt_dir, "panoptic PNGs")):
        if not PathManager.isdir(folder):
            raise FileNotFoundError(
                f"Folder {folder} of the {what} of {json_file} does not exist.{_where_to_look()}"
            )
    # No advice about folders: what is there is wrong.
    data = read_registered_panoptic(json_file, meta, "", name=name)
    with_sem_seg = semseg_dir is not None and PathManager.isdir(semseg_dir)
    records = []
    for annotation in data.annotations:
        png = annotation["file_name"]
        record = {
            "file_name": os.path.join(image_dir, data.image_name(annotation)),
            "image_id": annotation["image_id"],
            "pan_seg_file_name": os.path.join(gt_dir, png),
            "segments_info": [
                with_contiguous_id(segment, meta, f"{json_file}, {png}")
                for segment in annotation["segments_info"]
            ],
        }
        if with_sem_seg:
            record["sem_seg_file_name"] = os.path.join(semseg_dir, png)
        records.append(record)

    for key in ("file_name", "pan_seg_file_name", "sem_seg_file_name"):
        missing = missing_files(record[key] for record in records if key in record)
        if missing:
            raise FileNotFoundError(
                f"{missing[0]}, named by {json_file}, does not exist ({len(missing)} of "
                f"{len(records)} such files are missing)."
            )
    check_png(records[0], json_file)
    return records


def _where_to_look() -> str:
    return " Set DETECTRON2_DATASETS to the folder that holds the data sets (default: datasets)."


def register_coco_panoptic_annos_sem_seg(
    name: str,
    metadata: dict[str, Any],
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    sem_seg_root: str | None,
    instances_json: str | None,
) -> None:
    """Register a data set in the COCO panoptic format with semantic labels.

    Does nothing if the name is already registered.

    Args:
        name: name to register.
        metadata: result of `get_metadata`.
        image_root: folder of the images.
        panoptic_root: folder of the panoptic PNGs.
        panoptic_json: panoptic JSON.
        sem_seg_root: folder of semantic PNGs with contiguous labels, 255 for unlabelled pixels;
            may be None or absent.
        instances_json: COCO instance JSON of the same images, for AP.
    """
    if name in DatasetCatalog:
        return
    DatasetCatalog.register(
        name,
        partial(
            load_coco_panoptic_json,
            panoptic_json,
            image_root,
            panoptic_root,
            sem_seg_root,
            metadata,
            name,
        ),
    )
    MetadataCatalog.get(name).set(
        sem_seg_root=sem_seg_root,
        panoptic_root=panoptic_root,
        image_root=image_root,
        panoptic_json=panoptic_json,
        json_file=instances_json,
        evaluator_type="coco_panoptic_seg",
        ignore_label=255,
        label_divisor=1000,
        **metadata,
    )


def _list_only_things(name: str, metadata: dict[str, Any]) -> None:
    """Set `thing_classes` of Detectron2's own COCO panoptic data sets to the 80 things.

    Detectron2 lists all 133 classes there, which its COCO instance evaluator rejects.
    """
    builtin = MetadataCatalog.get(name)
    for key in ("thing_classes", "thing_colors"):
        if builtin.get(key) != metadata[key]:
            # Metadata can be set only once.
            if key in builtin.as_dict():
                delattr(builtin, key)
            builtin.set(**{key: metadata[key]})


def register_all_coco_panoptic_annos_sem_seg(root: str) -> None:
    """Register the data sets of `root`/coco, unless already registered."""
    metadata = get_metadata()
    for prefix, paths in _SPLITS.items():
        panoptic_root, panoptic_json, sem_seg_root, image_root, instances_json = (
            os.path.join(root, path) for path in paths
        )
        _list_only_things(prefix, metadata)
        register_coco_panoptic_annos_sem_seg(
            f"{prefix}_with_sem_seg",
            metadata,
            image_root,
            panoptic_root,
            panoptic_json,
            sem_seg_root,
            instances_json,
        )


register_all_coco_panoptic_annos_sem_seg(datasets_root())
