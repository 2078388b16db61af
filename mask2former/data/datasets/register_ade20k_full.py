"""Registers ADE20K full: `ade20k_full_sem_seg_{train,val}`, 847 classes.

`datasets/prepare_ade20k_full_sem_seg.py` writes the labels to ADE20K_2021_17_01 as 16-bit TIFFs,
so the ignore label is 65535.
"""

import os
from functools import partial
from typing import Any

from .loading import datasets_root, load_semantic, read_categories, register_once

ADE20K_SEM_SEG_FULL_CATEGORIES = read_categories("ade20k_full_847", 847)

_HINT = "Run `python datasets/prepare_ade20k_full_sem_seg.py`."


def get_metadata() -> dict[str, Any]:
    """Class names in the order of the labels."""
    return {"stuff_classes": [category["name"] for category in ADE20K_SEM_SEG_FULL_CATEGORIES]}


def register_all_ade20k_full(root: str) -> None:
    """Register the data sets below `root`, unless already registered."""
    base = os.path.join(root, "ADE20K_2021_17_01")
    for split, folder in (("train", "training"), ("val", "validation")):
        image_root = os.path.join(base, "images_detectron2", folder)
        sem_seg_root = os.path.join(base, "annotations_detectron2", folder)
        register_once(
            f"ade20k_full_sem_seg_{split}",
            partial(load_semantic, sem_seg_root, image_root, _HINT, gt_ext="tif"),
            image_root=image_root,
            sem_seg_root=sem_seg_root,
            evaluator_type="sem_seg",
            ignore_label=65535,
            **get_metadata(),
        )


register_all_ade20k_full(datasets_root())
