"""Registers ADE20K instances: `ade20k_instance_{train,val}`, the 100 things among the 150 classes.

`datasets/prepare_ade20k_ins_seg.py` writes the annotations to ADEChallengeData2016.
"""

import os
from functools import partial
from typing import Any

from .loading import datasets_root, load_instances, read_categories, register_once
from .register_ade20k_panoptic import ADE20k_COLORS

ADE_CATEGORIES = read_categories("ade20k_instance_100", 100)

_HINT = "Run `python datasets/prepare_ade20k_ins_seg.py` (with --force to replace files)."


def get_metadata() -> dict[str, Any]:
    """Class names, colours (RGB) and the map from ids of the 150 classes to contiguous ids."""
    return {
        "thing_classes": [category["name"] for category in ADE_CATEGORIES],
        "thing_colors": [ADE20k_COLORS[category["id"]] for category in ADE_CATEGORIES],
        "thing_dataset_id_to_contiguous_id": {c["id"]: i for i, c in enumerate(ADE_CATEGORIES)},
    }


def register_all_ade20k_instance(root: str) -> None:
    """Register the data sets below `root`, unless already registered."""
    base = os.path.join(root, "ADEChallengeData2016")
    for split, folder in (("train", "training"), ("val", "validation")):
        name = f"ade20k_instance_{split}"
        image_root = os.path.join(base, "images", folder)
        json_file = os.path.join(base, f"{name}.json")
        register_once(
            name,
            partial(load_instances, json_file, image_root, name, _HINT),
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
            **get_metadata(),
        )


register_all_ade20k_instance(datasets_root())
