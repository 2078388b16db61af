"""Registers COCO-Stuff 10k: `coco_2017_{train,test}_stuff_10k_sem_seg`, 171 classes.

`datasets/prepare_coco_stuff_10k_sem_seg.py` writes the labels to coco/coco_stuff_10k.
"""

import os
from functools import partial
from typing import Any

from .loading import datasets_root, load_semantic, read_categories, register_once

COCO_CATEGORIES = read_categories("coco_stuff_10k", 171)

_HINT = "Run `python datasets/prepare_coco_stuff_10k_sem_seg.py`."


def get_metadata() -> dict[str, Any]:
    """Class names and the map from COCO ids to labels."""
    return {
        "stuff_classes": [category["name"] for category in COCO_CATEGORIES],
        "stuff_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(COCO_CATEGORIES)},
    }


def register_all_coco_stuff_10k(root: str) -> None:
    """Register the data sets below `root`, unless already registered."""
    base = os.path.join(root, "coco", "coco_stuff_10k")
    for split in ("train", "test"):
        image_root = os.path.join(base, "images_detectron2", split)
        sem_seg_root = os.path.join(base, "annotations_detectron2", split)
        register_once(
            f"coco_2017_{split}_stuff_10k_sem_seg",
            partial(load_semantic, sem_seg_root, image_root, _HINT),
            image_root=image_root,
            sem_seg_root=sem_seg_root,
            evaluator_type="sem_seg",
            ignore_label=255,
            **get_metadata(),
        )


register_all_coco_stuff_10k(datasets_root())
