"""Registers Mapillary Vistas v1.2, panoptic: `mapillary_vistas_panoptic_{train,val}`.

The download in mapillary_vistas needs no preparation: 65 classes, 37 of them things. Void pixels
have no segment in the panoptic PNGs and the label 65 in the semantic PNGs.
"""

import os
from functools import partial
from typing import Any

from .loading import datasets_root, load_panoptic, read_categories, register_once
from .register_mapillary_vistas import HINT, IGNORE_LABEL, SPLITS

MAPILLARY_VISTAS_SEM_SEG_CATEGORIES = read_categories("mapillary_vistas_panoptic", 65)


def get_metadata() -> dict[str, Any]:
    """Class names, colours (RGB) and maps from the data set's ids (1 to 65) to contiguous ids.

    As in the original, the "thing" names list all classes, like the "stuff" names;
    `thing_dataset_id_to_contiguous_id` lists only the things.
    """
    names = [category["name"] for category in MAPILLARY_VISTAS_SEM_SEG_CATEGORIES]
    colors = [category["color"] for category in MAPILLARY_VISTAS_SEM_SEG_CATEGORIES]
    contiguous = {c["id"]: i for i, c in enumerate(MAPILLARY_VISTAS_SEM_SEG_CATEGORIES)}
    things = [c["id"] for c in MAPILLARY_VISTAS_SEM_SEG_CATEGORIES if c["isthing"]]
    return {
        "thing_classes": names,
        "thing_colors": colors,
        "thing_dataset_id_to_contiguous_id": {i: contiguous[i] for i in things},
        "stuff_classes": names,
        "stuff_colors": colors,
        "stuff_dataset_id_to_contiguous_id": contiguous,
    }


def load_mapillary_vistas_panoptic_json(
    json_file: str, image_dir: str, gt_dir: str, semseg_dir: str, meta: dict[str, Any]
) -> list[dict]:
    """Load Vistas panoptic; see `loading.load_panoptic`."""
    return load_panoptic(json_file, image_dir, gt_dir, semseg_dir, meta, HINT)


def register_mapillary_vistas_panoptic(
    name: str,
    metadata: dict[str, Any],
    image_root: str,
    panoptic_root: str,
    semantic_root: str,
    panoptic_json: str,
    instances_json: str | None = None,
) -> None:
    """Register a data set of this layout, unless the name is already registered.

    Args:
        name: name to register.
        metadata: result of `get_metadata`.
        image_root: folder of the images.
        panoptic_root: folder of the panoptic PNGs.
        semantic_root: folder of semantic PNGs, 65 for unlabelled pixels.
        panoptic_json: panoptic JSON.
        instances_json: COCO instance JSON of the same images, for AP.
    """
    register_once(
        name,
        partial(
            load_mapillary_vistas_panoptic_json,
            panoptic_json,
            image_root,
            panoptic_root,
            semantic_root,
            metadata,
        ),
        panoptic_root=panoptic_root,
        image_root=image_root,
        panoptic_json=panoptic_json,
        sem_seg_root=semantic_root,
        json_file=instances_json,
        evaluator_type="mapillary_vistas_panoptic_seg",
        ignore_label=IGNORE_LABEL,
        label_divisor=1000,
        **metadata,
    )


def register_all_mapillary_vistas_panoptic(root: str) -> None:
    """Register the data sets below `root`, unless already registered."""
    metadata = get_metadata()
    for split, folder in SPLITS:
        base = os.path.join(root, "mapillary_vistas", folder)
        register_mapillary_vistas_panoptic(
            f"mapillary_vistas_panoptic_{split}",
            metadata,
            os.path.join(base, "images"),
            os.path.join(base, "panoptic"),
            os.path.join(base, "labels"),
            os.path.join(base, "panoptic", "panoptic_2018.json"),
        )


register_all_mapillary_vistas_panoptic(datasets_root())
