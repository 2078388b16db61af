"""Every family of recipes, from the official download to its metrics.

A miniature download (`dataset_trees`) → preparation script → registration → mapper → a training
step → evaluation, with the recipe files as they are and a small model (`recipe_runs`).
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dataset_trees
import pytest
import recipe_runs
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES
from recipe_runs import AP, CITYSCAPES_AP, CITYSCAPES_IOU, LVIS_AP, MIOU, PQ

from mask2former.data.datasets.register_mapillary_vistas_panoptic import (
    MAPILLARY_VISTAS_SEM_SEG_CATEGORIES,
)

ROOT = Path(__file__).resolve().parents[1]
PREPARATION = (
    "prepare_ade20k_sem_seg",
    "prepare_ade20k_pan_seg",
    "prepare_ade20k_ins_seg",
    "prepare_ade20k_full_sem_seg",
    "prepare_coco_stuff_10k_sem_seg",
    "prepare_coco_semantic_annos_from_panoptic_annos",
)
# Optional packages, by the first part of a family's name.
PACKAGES = {"cityscapes": "cityscapesscripts", "lvis": "lvis"}

# Almost the whole image, so that crops never remove an object.
CROPS = {
    "INPUT.MIN_SIZE_TRAIN": [68],
    "INPUT.MAX_SIZE_TRAIN": 256,
    "INPUT.CROP.SIZE": [64, 96],
    "INPUT.SIZE_DIVISIBILITY": 96,
}
WIDE_CROPS = CROPS | {"INPUT.CROP.SIZE": [64, 128], "INPUT.SIZE_DIVISIBILITY": -1}
# Crops of DETR's augmentation that keep both halves of an image, from whatever size is drawn.
DETR = {"INPUT.MIN_SIZE_TRAIN": [64], "INPUT.CROP.SIZE": [600, 900]}
JITTERING = {"INPUT.IMAGE_SIZE": 64, "INPUT.MIN_SCALE": 0.9, "INPUT.MAX_SCALE": 1.1}

PERFECT = {"PQ": 100, "PQ_th": 100, "PQ_st": 100}
PERFECT_COCO = {"AP": 100, "AP-person": 100, "APs": 100, "APm": None}
PERFECT_ADE20K = {"AP": 100, "AP-bed": 100, "AP-person": 100, "AR1": 50, "AR10": 100}


@dataclass(frozen=True)
class Family:
    """Recipes of one data set and task, and the expected results.

    Attributes:
        recipes: files below configs/; the first has a ResNet, the second, if any, a Swin.
        overrides: of the recipe, besides those that make the model small.
        targets: class ids of the segments of every training image.
        metrics: task → names of its metrics, and the number of classes with metrics of their own.
        gt_metrics: some metrics of the ground truth as the mapper reads it; None if undefined.
    """

    recipes: tuple[str, ...]
    overrides: Mapping[str, Any]
    targets: list[int]
    metrics: Mapping[str, tuple[set[str], int]]
    gt_metrics: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


ADE20K_SEMANTIC = "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml"

FAMILIES = {
    "ade20k semantic": Family(
        (ADE20K_SEMANTIC,),
        CROPS,
        [0, 2, 6, 48],
        {"sem_seg": (MIOU, 150)},
        {"sem_seg": {"mIoU": 100, "IoU-sky": 100, "IoU-bed": None}},
    ),
    "ade20k instance": Family(
        ("ade20k/instance-segmentation/maskformer2_R50_bs16_160k.yaml",),
        CROPS,
        [0, 0, 3, 3],
        {"segm": (AP, 100)},
        {"segm": PERFECT_ADE20K},
    ),
    # The sky is occluded. Half of the wall is, but its annotated area is that of the whole, so it
    # is not matched: four of five classes (three of stuff, two of things) are. Semantic ground
    # truth has no things: the wall has an IoU of 1/2, the sky of 0. In the validation ground truth
    # road and skyscraper are one segment.
    "ade20k panoptic": Family(
        (
            "ade20k/panoptic-segmentation/maskformer2_R50_bs16_160k.yaml",
            "ade20k/panoptic-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_160k.yaml",
        ),
        CROPS | {"GT_DATASET": "ade20k_panoptic_train"},
        [0, 6, 7, 7, 12, 12, 48],
        {"panoptic_seg": (PQ, 0), "segm": (AP, 100), "sem_seg": (MIOU, 150)},
        {
            "panoptic_seg": {"PQ": 80, "PQ_th": 100, "PQ_st": 200 / 3},
            "segm": PERFECT_ADE20K,
            "sem_seg": {"mIoU": 62.5, "IoU-wall": 50, "IoU-sky": 0, "IoU-skyscraper": 100},
        },
    ),
    "ade20k full": Family(
        (ADE20K_SEMANTIC,),
        CROPS
        | {
            "DATASETS.TRAIN": ["ade20k_full_sem_seg_train"],
            "DATASETS.TEST": ["ade20k_full_sem_seg_val"],
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 847,
        },
        [0, 846],
        {"sem_seg": (MIOU, 847)},
        {"sem_seg": {"mIoU": 100, "IoU-wall": 100}},
    ),
    "coco-stuff 10k": Family(
        (ADE20K_SEMANTIC,),
        CROPS
        | {
            "DATASETS.TRAIN": ["coco_2017_train_stuff_10k_sem_seg"],
            "DATASETS.TEST": ["coco_2017_test_stuff_10k_sem_seg"],
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 171,
        },
        [0, 9, 11, 170],
        {"sem_seg": (MIOU, 171)},
        {"sem_seg": {"mIoU": 100, "IoU-stop sign": 100, "IoU-wood": 100}},
    ),
    "cityscapes semantic": Family(
        ("cityscapes/semantic-segmentation/maskformer2_R50_bs16_90k.yaml",),
        WIDE_CROPS,
        [0, 11, 13],
        {"sem_seg": (CITYSCAPES_IOU, 19)},
        {"sem_seg": {"IoU": 100, "IoU-person": 100, "IoU-car": 100, "IoU-sky": None}},
    ),
    "cityscapes instance": Family(
        ("cityscapes/instance-segmentation/maskformer2_R50_bs16_90k.yaml",),
        WIDE_CROPS,
        [2],
        {"segm": (CITYSCAPES_AP, 8)},
        {"segm": {"AP": 100, "AP-car": 100, "AP-person": None}},
    ),
    # The group of persons is no target, and does not count for PQ and AP.
    "cityscapes panoptic": Family(
        (
            "cityscapes/panoptic-segmentation/maskformer2_R50_bs16_90k.yaml",
            "cityscapes/panoptic-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_90k.yaml",
        ),
        WIDE_CROPS,
        [0, 13],
        {
            "panoptic_seg": (PQ, 0),
            "segm": (CITYSCAPES_AP, 8),
            "sem_seg": (CITYSCAPES_IOU, 19),
        },
        {
            "panoptic_seg": PERFECT,
            "segm": {"AP": 100, "AP-car": 100},
            "sem_seg": {"IoU-car": 100, "IoU-person": 0},
        },
    ),
    "mapillary semantic": Family(
        ("mapillary-vistas/semantic-segmentation/maskformer2_R50_bs16_300k.yaml",),
        CROPS,
        [0, 64],
        {"sem_seg": (MIOU, 65)},
        {"sem_seg": {"mIoU": 100, "IoU-Bird": 100, "IoU-Ego Vehicle": 100}},
    ),
    "mapillary panoptic": Family(
        (
            "mapillary-vistas/panoptic-segmentation/maskformer_R50_bs16_300k.yaml",
            "mapillary-vistas/panoptic-segmentation/swin/"
            "maskformer2_swin_large_IN21k_384_bs16_300k.yaml",
        ),
        CROPS,
        [0, 0, 64],
        {"panoptic_seg": (PQ, 0), "sem_seg": (MIOU, 65)},
        {"panoptic_seg": PERFECT, "sem_seg": {"mIoU": 100}},
    ),
    "coco instance": Family(
        ("coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml",),
        JITTERING,
        [0],
        {"segm": (AP, 80)},
        {"segm": PERFECT_COCO},
    ),
    # The crowd is no target, and does not count for PQ and AP.
    "coco panoptic": Family(
        (
            "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
            "coco/panoptic-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_100ep.yaml",
        ),
        JITTERING,
        [0, 132],
        {"panoptic_seg": (PQ, 0), "segm": (AP, 80), "sem_seg": (MIOU, 133)},
        {
            "panoptic_seg": PERFECT,
            "segm": PERFECT_COCO,
            "sem_seg": {"IoU-rug-merged": 100, "IoU-toothbrush": 0},
        },
    ),
    # Targets are classes: the crowd counts.
    "coco semantic": Family(
        ("coco/semantic-segmentation/maskformer2_R50_bs16_50ep.yaml",),
        CROPS | {"INPUT.MIN_SIZE_TRAIN": [68, 68]},
        [0, 79, 132],
        {"sem_seg": (MIOU, 133)},
        {"sem_seg": {"mIoU": 100, "IoU-rug-merged": 100, "IoU-toothbrush": 100}},
    ),
    "maskformer coco panoptic": Family(
        (
            "maskformer/coco-panoptic/maskformer_panoptic_R50_bs64_554k.yaml",
            "maskformer/coco-panoptic/swin/maskformer_panoptic_swin_large_IN21k_384_bs64_554k.yaml",
        ),
        DETR,
        [0, 132],
        {"panoptic_seg": (PQ, 0), "segm": (AP, 80), "sem_seg": (MIOU, 133)},
        {"panoptic_seg": PERFECT, "segm": PERFECT_COCO},
    ),
    "maskformer coco instance": Family(
        ("maskformer/coco-instance/maskformer_instance_R50_bs64_554k.yaml",),
        {"INPUT.MIN_SIZE_TRAIN": [64]},
        [0],
        {"segm": (AP, 80)},
        {"segm": PERFECT_COCO},
    ),
    "maskformer ade20k semantic": Family(
        (
            "maskformer/ade20k-150/maskformer_R50_bs16_160k.yaml",
            "maskformer/ade20k-150/swin/maskformer_swin_large_IN21k_384_bs16_160k_res640.yaml",
        ),
        CROPS,
        [0, 2, 6, 48],
        {"sem_seg": (MIOU, 150)},
        {"sem_seg": {"mIoU": 100}},
    ),
    "lvis instance": Family(
        ("lvis/instance-segmentation/maskformer2_R50_bs16_50ep.yaml",),
        JITTERING,
        [122, 132, 792],
        {"segm": (LVIS_AP, 0)},
        {"segm": {"AP": 100, "APr": 100, "APf": 100, "APc": None, "APm": None}},
    ),
}


# Recipes of per-pixel classification → their losses in two steps on ADE20K, with a decoder of three
# layers. Detectron2 logs a single loss as the total only.
PER_PIXEL = {
    "maskformer/ade20k-150/per_pixel_baseline_R50_bs16_160k.yaml": [],
    "maskformer/ade20k-150/per_pixel_baseline_plus_R50_bs16_160k.yaml": [
        "loss_sem_seg",
        "loss_sem_seg_0",
        "loss_sem_seg_1",
    ],
}
PER_PIXEL_OVERRIDES = CROPS | {
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 150,
    "SOLVER.MAX_ITER": 2,
    "GT_DATASET": None,
}


def is_missing(name: str) -> bool:
    """Whether the optional package of a family is not installed."""
    package = PACKAGES.get(name.split()[0])
    return package is not None and importlib.util.find_spec(package) is None


CASES = [(name, recipe) for name, family in FAMILIES.items() for recipe in family.recipes]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """Results by family and recipe; all run in one process."""
    root = tmp_path_factory.mktemp("datasets")
    dataset_trees.ade20k(root)
    dataset_trees.ade20k_full(root)
    dataset_trees.coco_stuff_10k(root)
    dataset_trees.mapillary_vistas(root, MAPILLARY_VISTAS_SEM_SEG_CATEGORIES)
    dataset_trees.coco_panoptic(root, COCO_CATEGORIES)
    dataset_trees.coco_instances(root, [c for c in COCO_CATEGORIES if c["isthing"]])
    dataset_trees.lvis(root, LVIS_CATEGORIES)
    cityscapes = dataset_trees.cityscapes(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "datasets"))
        for script in PREPARATION:
            importlib.import_module(script).main(["--root", str(root), "--workers", "1"])
        if not is_missing("cityscapes"):
            preparation = "cityscapesscripts.preparation"
            patch.setenv("CITYSCAPES_DATASET", str(cityscapes))
            importlib.import_module(f"{preparation}.createTrainIdLabelImgs").main()
            panoptic = importlib.import_module(f"{preparation}.createPanopticImgs")
            panoptic.convert2panoptic(setNames=["train", "val"])
    jobs = [
        (f"{name} {recipe}", recipe, FAMILIES[name].overrides)
        for name, recipe in CASES
        if not is_missing(name)
    ]
    jobs += [(recipe, recipe, PER_PIXEL_OVERRIDES) for recipe in PER_PIXEL]
    return recipe_runs.run_apart(root, tmp_path_factory.mktemp("output"), jobs)


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_from_download_to_metrics(runs, name, recipe):
    if is_missing(name):
        pytest.skip(f"{PACKAGES[name.split()[0]]} is not installed")
    family, run = FAMILIES[name], runs[f"{name} {recipe}"]
    recipe_runs.check_run(run, family.metrics)
    assert [sorted(per_image) for per_image in run["targets"]] == [family.targets] * 2
    for task, expected in family.gt_metrics.items():
        actual = {name: run["gt_metrics"][task][name] for name in expected}
        assert actual == pytest.approx(expected), task


@pytest.mark.parametrize("recipe", PER_PIXEL)
def test_per_pixel_recipe_from_download_to_metrics(runs, recipe):
    recipe_runs.check_run(runs[recipe], {"sem_seg": (MIOU, 150)}, PER_PIXEL[recipe])


def test_every_family_has_a_case():
    """A new folder of recipes must be added above."""
    tested = {Path(recipe).parts[:2] for _, recipe in CASES}
    existing = {
        p.relative_to(ROOT / "configs").parts[:2]
        for pattern in ("*/*-seg*", "maskformer/*")
        for p in (ROOT / "configs").glob(pattern)
    }
    assert {parts for parts in existing if parts[0] != "shapes"} == tested
