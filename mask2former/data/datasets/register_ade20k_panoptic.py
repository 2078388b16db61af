"""Registers ADE20K panoptic: `ade20k_panoptic_{train,val}`, 150 classes, 100 of them things.

`datasets/prepare_ade20k_pan_seg.py` writes the annotations to ADEChallengeData2016. Semantic labels
are those of `ade20k_sem_seg_{train,val}`, instances those of `ade20k_instance_{train,val}`.
"""

import os
from functools import partial
from typing import Any

from detectron2.data import MetadataCatalog

from .loading import datasets_root, load_panoptic, read_categories, register_once

ADE20K_150_CATEGORIES = read_categories("ade20k_150", 150)
ADE20k_COLORS = [category["color"] for category in ADE20K_150_CATEGORIES]

# Name → images, panoptic PNGs, semantic PNGs, panoptic JSON, instance JSON.
_SPLITS = {
    f"ade20k_panoptic_{split}": (
        f"ADEChallengeData2016/images/{folder}",
        f"ADEChallengeData2016/ade20k_panoptic_{split}",
        f"ADEChallengeData2016/annotations_detectron2/{folder}",
        f"ADEChallengeData2016/ade20k_panoptic_{split}.json",
        f"ADEChallengeData2016/ade20k_instance_{split}.json",
    )
    for split, folder in (("train", "training"), ("val", "validation"))
}

_HINT = (
    "Run `python datasets/prepare_ade20k_sem_seg.py` and `python "
    "datasets/prepare_ade20k_pan_seg.py` (with --force to replace files)."
)


def get_metadata() -> dict[str, Any]:
    """Class names, colours (RGB) and maps from the data set's ids to contiguous ids.

    Both ids are the index among the 150 classes. The "stuff" entries list all classes, because
    semantic segmentation predicts things too.
    """
    things = [category for category in ADE20K_150_CATEGORIES if category["isthing"]]
    contiguous = {category["id"]: i for i, category in enumerate(ADE20K_150_CATEGORIES)}
    return {
        "thing_classes": [category["name"] for category in things],
        "thing_colors": [category["color"] for category in things],
        "thing_dataset_id_to_contiguous_id": {c["id"]: contiguous[c["id"]] for c in things},
        "stuff_classes": [category["name"] for category in ADE20K_150_CATEGORIES],
        "stuff_colors": ADE20k_COLORS[:],
        "stuff_dataset_id_to_contiguous_id": contiguous,
    }


def load_ade20k_panoptic_json(
    json_file: str,
    image_dir: str,
    gt_dir: str,
    semseg_dir: str,
    meta: dict[str, Any],
    allow_repeated_ids: bool = False,
) -> list[dict]:
    """Load ADE20K panoptic; see `loading.load_panoptic`."""
    return load_panoptic(json_file, image_dir, gt_dir, semseg_dir, meta, _HINT, allow_repeated_ids)


def register_ade20k_panoptic(
    name: str,
    metadata: dict[str, Any],
    image_root: str,
    panoptic_root: str,
    semantic_root: str,
    panoptic_json: str,
    instances_json: str | None = None,
    allow_repeated_ids: bool = False,
) -> None:
    """Register a data set of this layout, unless the name is already registered.

    Args:
        name: name to register.
        metadata: result of `get_metadata`.
        image_root: folder of the images.
        panoptic_root: folder of the panoptic PNGs.
        semantic_root: folder of semantic PNGs, 255 for unlabelled pixels.
        panoptic_json: panoptic JSON.
        instances_json: COCO instance JSON of the same images, for AP.
        allow_repeated_ids: whether two segments of an image may share an id.
    """
    register_once(
        name,
        partial(
            load_ade20k_panoptic_json,
            panoptic_json,
            image_root,
            panoptic_root,
            semantic_root,
            metadata,
            allow_repeated_ids,
        ),
        panoptic_root=panoptic_root,
        image_root=image_root,
        panoptic_json=panoptic_json,
        sem_seg_root=semantic_root,
        json_file=instances_json,
        evaluator_type="ade20k_panoptic_seg",
        ignore_label=255,
        label_divisor=1000,
        **metadata,
    )


def allows_repeated_ids(name: str) -> bool:
    """Whether segments of an image may share an id: road and skyscraper do in the release."""
    return name == "ade20k_panoptic_val"


def register_all_ade20k_panoptic(root: str) -> None:
    """Register the data sets below `root`, unless already registered."""
    metadata = get_metadata()
    for name, paths in _SPLITS.items():
        images, panoptic, semantic, panoptic_json, instances_json = (
            os.path.join(root, path) for path in paths
        )
        register_ade20k_panoptic(
            name,
            metadata,
            images,
            panoptic,
            semantic,
            panoptic_json,
            instances_json,
            allow_repeated_ids=allows_repeated_ids(name),
        )


def _add_colors() -> None:
    """Add colours to Detectron2's semantic data sets of the same classes, as in the original."""
    for split in ("train", "val"):
        metadata = MetadataCatalog.get(f"ade20k_sem_seg_{split}")
        # Metadata can be set only once.
        if "stuff_colors" not in metadata.as_dict():
            metadata.set(stuff_colors=ADE20k_COLORS[:])


_add_colors()
register_all_ade20k_panoptic(datasets_root())
