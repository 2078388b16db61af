"""Registers Shapes, the small synthetic data set written by `datasets/prepare_shapes.py`.

Each split (train, val) has three names for the same images, one per task:

    shapes_{split}            instances    evaluator "coco"               (things only)
    shapes_{split}_panoptic   panoptic     evaluator "coco_panoptic_seg"  (things and stuff)
    shapes_{split}_sem_seg    semantic     evaluator "sem_seg"            (things and stuff)

The generator reads the same class table, `categories/shapes.json`. Category ids have gaps, as in
COCO; contiguous ids follow the order of the table: things first, then stuff.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from .loading import load_instances, load_own_semantic
from .register_coco_panoptic_annos_semseg import load_coco_panoptic_json
from .register_custom import panoptic_metadata

CATEGORIES_FILE = Path(__file__).parent / "categories" / "shapes.json"
SPLITS = ("train", "val")


def load_categories() -> list[dict]:
    """The class table: dicts with id, name, supercategory, isthing and color (RGB)."""
    return json.loads(CATEGORIES_FILE.read_text())


def _load(root: Path, loader: Callable[[], list[dict]]) -> list[dict]:
    """Check that the data set exists in `root`, then call `loader`.

    Raises:
        FileNotFoundError: the data set was not written yet.
    """
    if not (root / "annotations").is_dir():
        raise FileNotFoundError(
            f"no Shapes data set at {root}: run `python datasets/prepare_shapes.py`, or set "
            "DETECTRON2_DATASETS to the folder that holds shapes/"
        )
    return loader()


def _register(name: str, root: Path, loader: Callable[[], list[dict]], **metadata) -> None:
    # Keep a name that another project or an earlier call has registered.
    if name in DatasetCatalog:
        return
    DatasetCatalog.register(name, partial(_load, root, loader))
    MetadataCatalog.get(name).set(**metadata)


def register_all_shapes(root: str) -> None:
    """Register the data sets of `root`/shapes, unless already registered."""
    base = Path(root) / "shapes"
    metadata = panoptic_metadata(load_categories())
    things = {k: v for k, v in metadata.items() if k.startswith("thing_")}
    stuff = {k: v for k, v in metadata.items() if k.startswith("stuff_")}
    for split in SPLITS:
        name = f"shapes_{split}"
        images = str(base / "images" / split)
        instances_json = str(base / "annotations" / f"instances_{split}.json")
        panoptic_json = str(base / "annotations" / f"panoptic_{split}.json")
        panoptic_root = str(base / f"panoptic_{split}")
        sem_seg_root = str(base / f"panoptic_semseg_{split}")
        _register(
            name,
            base,
            partial(load_instances, instances_json, images, name),
            evaluator_type="coco",
            image_root=images,
            json_file=instances_json,
            **things,
        )
        _register(
            f"{name}_panoptic",
            base,
            partial(
                load_coco_panoptic_json,
                panoptic_json,
                images,
                panoptic_root,
                sem_seg_root,
                metadata,
            ),
            evaluator_type="coco_panoptic_seg",
            image_root=images,
            panoptic_root=panoptic_root,
            panoptic_json=panoptic_json,
            sem_seg_root=sem_seg_root,
            json_file=instances_json,
            ignore_label=255,
            label_divisor=1000,
            **metadata,
        )
        _register(
            f"{name}_sem_seg",
            base,
            partial(load_own_semantic, f"{name}_sem_seg", sem_seg_root, images, "png", "jpg"),
            evaluator_type="sem_seg",
            image_root=images,
            sem_seg_root=sem_seg_root,
            ignore_label=255,
            **stuff,
        )


register_all_shapes(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
