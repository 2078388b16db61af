"""Recipes on real images, if the samples exist; otherwise like `test_recipe_families.py`.

The samples are linked into the layout of the downloads. Two images each are for validation.
"""

import importlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import recipe_runs
from recipe_runs import AP, CITYSCAPES_AP, CITYSCAPES_IOU, MIOU, PQ

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

JITTERING = {"INPUT.IMAGE_SIZE": 128}
CROPS = {
    "INPUT.MIN_SIZE_TRAIN": [128],
    "INPUT.MAX_SIZE_TRAIN": 256,
    "INPUT.CROP.SIZE": [96, 96],
    "INPUT.SIZE_DIVISIBILITY": 96,
}


@dataclass(frozen=True)
class Sample:
    """A recipe on real images, and the expected results.

    Attributes:
        folder: of the sample.
        recipe: below configs/.
        overrides: of the recipe, besides those that make the model small.
        metrics: task → names of its metrics, and the number of classes with metrics of their own.
        gt_metrics: some metrics of the ground truth as the mapper reads it.
    """

    folder: str
    recipe: str
    overrides: Mapping[str, Any]
    metrics: Mapping[str, tuple[set[str], int]]
    gt_metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


SAMPLES = {
    "ade20k semantic": Sample(
        "ade20k_sample",
        "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml",
        CROPS,
        {"sem_seg": (MIOU, 150)},
        {"sem_seg": {"mIoU": 100, "pACC": 100}},
    ),
    "cityscapes panoptic": Sample(
        "cityscapes",
        "cityscapes/panoptic-segmentation/maskformer2_R50_bs16_90k.yaml",
        CROPS
        | {
            "INPUT.SIZE_DIVISIBILITY": -1,
            # Outputs are 2048 x 1024.
            "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 5,
            "TEST.DETECTIONS_PER_IMAGE": 10,
            "GT_DATASET": None,
        },
        {
            "panoptic_seg": (PQ, 0),
            "segm": (CITYSCAPES_AP, 8),
            "sem_seg": (CITYSCAPES_IOU, 19),
        },
    ),
    "coco instance": Sample(
        "coco",
        "coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml",
        JITTERING,
        {"segm": (AP, 80)},
        {"segm": {"AP": 100}},
    ),
    "coco panoptic": Sample(
        "coco",
        "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
        JITTERING,
        {"panoptic_seg": (PQ, 0), "segm": (AP, 80), "sem_seg": (MIOU, 133)},
        {"panoptic_seg": {"PQ": 100}, "segm": {"AP": 100}, "sem_seg": {"mIoU": 100}},
    ),
}


def link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source)


def link_ade20k(sample: Path, root: Path) -> None:
    """All three images in both splits."""
    for split in ("training", "validation"):
        for folder in ("images", "annotations"):
            link(sample / folder, root / "ADEChallengeData2016" / folder / split)


def link_cityscapes(sample: Path, root: Path) -> None:
    """Training unchanged; two of its images, without panoptic annotation, for validation."""
    base = root / "cityscapes"
    link(sample / "leftImg8bit/train", base / "leftImg8bit/train")
    for name in ("train", "cityscapes_panoptic_train", "cityscapes_panoptic_train.json"):
        link(sample / "gtFine" / name, base / "gtFine" / name)
    images = sorted(sample.glob("leftImg8bit/train/*/*.png"))[:2]
    for image in images:
        stem = image.name.removesuffix("_leftImg8bit.png")
        for file in sample.glob(f"*/train/*/{stem}_*"):
            parts = file.relative_to(sample).parts
            link(file, base / parts[0] / "val" / parts[2] / file.name)


def link_coco(sample: Path, root: Path) -> None:
    """Training unchanged; for validation the first two images."""
    base = root / "coco"
    for name in ("train2017", "val2017", "panoptic_train2017", "panoptic_val2017"):
        link(sample / name, base / name)
    for kind in ("instances", "panoptic"):
        name = f"{kind}_train2017.json"
        link(sample / "annotations" / name, base / "annotations" / name)
        name = f"{kind}_val2017.json"
        content = json.loads((sample / "annotations" / name).read_text())
        content["images"] = content["images"][:2]
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        (base / "annotations" / name).write_text(json.dumps(content))


LINKS = {"ade20k_sample": link_ade20k, "cityscapes": link_cityscapes, "coco": link_coco}


def why_not(sample: Sample) -> str | None:
    """Why a sample cannot be used."""
    if not (SHARED_DATA / sample.folder).is_dir():
        return f"no sample {SHARED_DATA / sample.folder}"
    if sample.folder == "cityscapes" and importlib.util.find_spec("cityscapesscripts") is None:
        return "cityscapesscripts is not installed"
    return None


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """Results by sample; all run in one process."""
    root = tmp_path_factory.mktemp("datasets")
    usable = {name: sample for name, sample in SAMPLES.items() if why_not(sample) is None}
    folders = {sample.folder for sample in usable.values()}
    for folder in folders:
        LINKS[folder](SHARED_DATA / folder, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "datasets"))
        if "ade20k_sample" in folders:
            script = importlib.import_module("prepare_ade20k_sem_seg")
            script.main(["--root", str(root), "--workers", "1"])
        if "cityscapes" in folders:
            patch.setenv("CITYSCAPES_DATASET", str(root / "cityscapes"))
            script = importlib.import_module("cityscapesscripts.preparation.createPanopticImgs")
            script.convert2panoptic(setNames=["val"])
    jobs = [(name, sample.recipe, sample.overrides) for name, sample in usable.items()]
    return recipe_runs.run_apart(root, tmp_path_factory.mktemp("output"), jobs)


@pytest.mark.parametrize("name", SAMPLES)
def test_from_real_images_to_metrics(request, name):
    sample = SAMPLES[name]
    if reason := why_not(sample):
        pytest.skip(reason)
    run = request.getfixturevalue("runs")[name]
    recipe_runs.check_run(run, sample.metrics)
    for task, expected in sample.gt_metrics.items():
        actual = {metric: run["gt_metrics"][task][metric] for metric in expected}
        assert actual == pytest.approx(expected), task
