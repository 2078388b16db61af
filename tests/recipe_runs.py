"""Trains and evaluates recipes for one step on small data sets, for tests; run as a program.

    DETECTRON2_DATASETS=FOLDER python recipe_runs.py OUTPUT < JOBS

JOBS is JSON: a list of [name, recipe, overrides], with the recipe relative to configs/. Each runs
as in tools/train_net.py, with a model of few parameters. It is a process of its own because names
are registered below DETECTRON2_DATASETS on import. OUTPUT/runs.json then holds for each name
{"error": traceback} or

    losses      name → value
    targets     for each image of the batch its class ids, of segments that have a pixel; absent
                for per-pixel heads
    metrics     the content of evaluation.json
    gt_metrics  the same with the ground truth as predictions, on DATASETS.TEST; an override
                GT_DATASET names another data set, or is None to skip this
"""

import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import ImageList
from torch import nn

from mask2former.config import load_config
from mask2former.data.class_counts import check_class_counts
from mask2former.data.dataset_mappers import build_mapper
from mask2former.maskformer_model import MaskFormer
from mask2former.trainer import Trainer

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.SWIN.EMBED_DIM": 16,
    "MODEL.SWIN.DEPTHS": [1, 1, 1, 1],
    "MODEL.SWIN.NUM_HEADS": [1, 2, 4, 8],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 16,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 10,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
    # Otherwise an untrained model would predict no segments.
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": 0.0,
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": 0.0,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 128,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 1,
    "DATALOADER.NUM_WORKERS": 0,
    # Slow; an error in them would not end a run.
    "LOGGING.PICTURES": 0,
    "LOGGING.HARD_EXAMPLES": 0,
    "SEED": 0,
}

# Names of losses of MaskFormer and its subclasses, two of whose layers precede the last.
MASK_LOSSES = {
    f"loss_{kind}{layer}" for kind in ("ce", "mask", "dice") for layer in ("", "_0", "_1")
}
# Names of metrics, without per-class metrics.
PQ = {name + group for name in ("PQ", "SQ", "RQ") for group in ("", "_th", "_st")}
MIOU = {"mIoU", "fwIoU", "mACC", "pACC"}
AP = {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"}
LVIS_AP = {"AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"}
CITYSCAPES_IOU = {"IoU", "iIoU", "IoU_sup", "iIoU_sup"}
CITYSCAPES_AP = {"AP", "AP50"}


# ---- for tests ----


def run_apart(root: Path, output: Path, jobs: Sequence[tuple]) -> dict[str, dict[str, Any]]:
    """Run jobs in a process that has its data sets below `root`; returns the results by name."""
    environment = {
        "DETECTRON2_DATASETS": str(root),
        "PYTHONPATH": str(CONFIGS.parent),
        "OMP_NUM_THREADS": "1",
    }
    program = subprocess.run(
        [sys.executable, __file__, str(output)],
        input=json.dumps(jobs),
        env=os.environ | environment,
        cwd=output,
        capture_output=True,
        text=True,
    )
    assert program.returncode == 0, program.stderr[-5000:]
    return json.loads((output / "runs.json").read_text())


def check_run(
    run: Mapping[str, Any],
    metrics: Mapping[str, tuple[set[str], int]],
    losses: Collection[str] = MASK_LOSSES,
) -> None:
    """Assert that a run succeeded and computed these metrics.

    Args:
        run: of `run_apart`.
        metrics: task → names of its metrics, and the number of classes with metrics of their own.
        losses: names of the losses besides their total.
    """
    assert "error" not in run, run["error"]
    assert set(run["losses"]) == {"total_loss", *losses}
    assert all(math.isfinite(loss) for loss in run["losses"].values())
    assert all(run.get("targets", [1])), "every image has a segment"
    for results in (run["metrics"], run.get("gt_metrics", run["metrics"])):
        assert set(results) == set(metrics)
        for task, (names, num_classes) in metrics.items():
            assert {name for name in results[task] if "-" not in name} == names
            per_class = [n for n in results[task] if n.startswith(("AP-", "IoU-"))]
            assert len(per_class) == num_classes
            known = [value for value in results[task].values() if value is not None]
            assert known, f"{task}: nothing was evaluated"
            assert all(0 <= value <= 100 for value in known), task


# ---- the program ----


class GroundTruthModel(nn.Module):
    """Returns what a model would if it predicted the targets of the mapper."""

    def __init__(self, cfg: CfgNode, model: MaskFormer) -> None:
        super().__init__()
        self.model = model
        cfg = cfg.clone()
        cfg.defrost()
        cfg.INPUT.SIZE_DIVISIBILITY = -1
        self.mapper = build_mapper(cfg)
        self.mapper.tfm_gens = []
        self.mapper.crop_gen = None  # of detr_panoptic
        self.records = {r["file_name"]: r for r in DatasetCatalog.get(cfg.DATASETS.TEST[0])}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self.predict(**inputs) for inputs in batched_inputs]

    def predict(self, file_name: str, height: int, width: int, **_: Any) -> dict[str, Any]:
        sample, model = self.mapper(self.records[file_name]), self.model
        images = ImageList.from_tensors([sample["image"]])
        (target,) = model.prepare_targets([sample["instances"]], images)
        classes = 20.0 * F.one_hot(target["labels"], model.sem_seg_head.num_classes + 1)  # (T, K+1)
        masks = 40.0 * target["masks"][:, :height, :width].float() - 20  # (T, H, W)
        results = {}
        if model.semantic_on:
            results["sem_seg"] = model.semantic_inference(classes, masks)
        if model.panoptic_on:
            results["panoptic_seg"] = model.panoptic_inference(classes, masks)
        if model.instance_on:
            results["instances"] = model.instance_inference(classes, masks)
        return results


def run(recipe: str, overrides: dict[str, Any], output: Path) -> dict[str, Any]:
    """Train for a step or two, evaluate, and evaluate the ground truth."""
    options = SMALL | overrides
    output.mkdir()
    options["OUTPUT_DIR"] = str(output)
    opts = [
        str(part) for key, value in options.items() if key != "GT_DATASET" for part in (key, value)
    ]
    cfg = load_config(str(CONFIGS / recipe), opts)
    check_class_counts(cfg)
    cfg.freeze()
    trainer = Trainer(cfg)
    batch = next(iter(trainer.data_loader))
    trainer.resume_or_load(resume=False)
    trainer.train()
    line, _ = (output / "metrics.json").read_text().splitlines()
    results = {
        "losses": {k: v for k, v in json.loads(line).items() if "loss" in k},
        "metrics": read_evaluation(output),
    }
    if isinstance(trainer.model, MaskFormer):
        results["targets"] = [targets(sample["instances"], trainer.model) for sample in batch]
    gt_dataset = options.get("GT_DATASET", cfg.DATASETS.TEST[0])
    if gt_dataset is None:
        return results
    cfg.defrost()
    cfg.DATASETS.TEST = (gt_dataset,)
    Trainer.test(cfg, GroundTruthModel(cfg, trainer.model))
    return results | {"gt_metrics": read_evaluation(output)}


def targets(instances: Any, model: MaskFormer) -> list[int]:
    height, width = instances.image_size
    images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    (target,) = model.prepare_targets([instances], images)
    return target["labels"][target["masks"].flatten(1).any(1)].tolist()


def read_evaluation(output: Path) -> dict[str, dict[str, float | None]]:
    (metrics,) = json.loads((output / "evaluation.json").read_text()).values()
    return metrics


def main() -> None:
    torch.set_num_threads(1)
    output, runs = Path(sys.argv[1]), {}
    for number, (name, recipe, overrides) in enumerate(json.load(sys.stdin)):
        try:
            runs[name] = run(recipe, overrides, output / str(number))
        except Exception:  # the other jobs continue; the test of this one fails
            runs[name] = {"error": traceback.format_exc()}
    (output / "runs.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main()
