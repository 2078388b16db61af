"""Trainings that should give the same bits; also a program.

    python repeated_training.py CONFIG.yaml OUTPUT_DIR

A program, because cuBLAS reads its settings once in a process. Prints the digests as JSON.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine.train_loop import HookBase
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.structures import Instances
from torch import Tensor
from torch.utils._pytree import tree_iter

from mask2former import add_maskformer2_config
from mask2former.data.loader import build_train_loader
from mask2former.trainer import Trainer

DATASET = "repeated_train"
NUM_ITERATIONS, CHECKPOINT_PERIOD, STOP_BEFORE = 3, 2, 2


def load_dataset() -> list[dict[str, Any]]:
    return [{"image_id": i, "width": 96, "height": 64} for i in range(5)]


def make_sample(record: dict[str, Any]) -> dict[str, Any]:
    """The mapper: a random image with two masks of random squares, which are quick to draw."""
    instances = Instances((record["height"], record["width"]))
    instances.gt_classes = torch.tensor([0, 1])
    squares = torch.rand(2, record["height"] // 16, record["width"] // 16) > 0.5
    instances.gt_masks = squares.repeat_interleave(16, 1).repeat_interleave(16, 2)
    image = torch.randint(0, 256, (3, *instances.image_size), dtype=torch.uint8)
    return {**record, "image": image, "instances": instances}


class RepeatedTrainer(Trainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg, make_sample)


class Stop(HookBase):
    """Interrupts a run."""

    def before_step(self) -> None:
        if self.trainer.iter == STOP_BEFORE:
            raise KeyboardInterrupt


def train(cfg: CfgNode, folder: Path, *, stop: bool = False, resume: bool = False) -> str:
    """Digest of weights and optimiser after a training in a folder."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(100 if resume else 0)
    trainer = RepeatedTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    assert (trainer.start_iter > 0) == resume
    if stop:
        trainer.register_hooks([Stop()])
    try:
        trainer.train()
    except KeyboardInterrupt:
        assert stop
    state = trainer._trainer.model.state_dict(), trainer._trainer.optimizer.state_dict()
    digest = hashlib.sha256()
    for x in tree_iter(state):
        if isinstance(x, Tensor):
            digest.update(x.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def digests(cfg: CfgNode, folder: Path) -> dict[str, str]:
    """Digests after the same training: once, again, and interrupted and resumed.

    "interrupted" is the digest before resuming.
    """
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.SEED = (DATASET,), (), 3
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD = NUM_ITERATIONS, CHECKPOINT_PERIOD
    if DATASET not in DatasetCatalog:
        DatasetCatalog.register(DATASET, load_dataset)
    return {
        "once": train(cfg, folder / "once"),
        "again": train(cfg, folder / "again"),
        "interrupted": train(cfg, folder / "resumed", stop=True),
        "resumed": train(cfg, folder / "resumed", resume=True),
    }


def main() -> None:
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.merge_from_file(sys.argv[1])
    print(json.dumps(digests(cfg, Path(sys.argv[2]))))


if __name__ == "__main__":
    main()
