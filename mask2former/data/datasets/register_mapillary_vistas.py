"""Registers Mapillary Vistas v1.2, semantic: `mapillary_vistas_sem_seg_{train,val}`.

The download in mapillary_vistas needs no preparation. The label maps have 66 values; the last one,
"Unlabeled" (65), is the ignore label, which leaves 65 classes.
"""

import os
from functools import partial
from typing import Any

from .loading import datasets_root, load_semantic, read_categories, register_once

MAPILLARY_VISTAS_SEM_SEG_CATEGORIES = read_categories("mapillary_vistas_semantic", 66)

HINT = "Download Mapillary Vistas v1.2 (not v2.0) from https://www.mapillary.com/dataset/vistas."
SPLITS = (("train", "training"), ("val", "validation"))  # name → folder
IGNORE_LABEL = 65


def get_metadata() -> dict[str, Any]:
    """Names and colours (RGB) of the 65 classes, in the order of the labels."""
    evaluated = [c for c in MAPILLARY_VISTAS_SEM_SEG_CATEGORIES if c["evaluate"]]
    assert evaluated == MAPILLARY_VISTAS_SEM_SEG_CATEGORIES[:IGNORE_LABEL]
    return {
        "stuff_classes": [category["readable"] for category in evaluated],
        "stuff_colors": [category["color"] for category in evaluated],
    }


def register_all_mapillary_vistas(root: str) -> None:
    """Register the data sets below `root`, unless already registered."""
    for split, folder in SPLITS:
        image_root = os.path.join(root, "mapillary_vistas", folder, "images")
        sem_seg_root = os.path.join(root, "mapillary_vistas", folder, "labels")
        register_once(
            f"mapillary_vistas_sem_seg_{split}",
            partial(load_semantic, sem_seg_root, image_root, HINT),
            image_root=image_root,
            sem_seg_root=sem_seg_root,
            evaluator_type="sem_seg",
            ignore_label=IGNORE_LABEL,
            **get_metadata(),
        )


register_all_mapillary_vistas(datasets_root())
