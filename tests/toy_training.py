"""A training job with steps of milliseconds, for tests; also a program.

    python toy_training.py [--resume] [--kill-at ITERATION] [--delayed | --at-once] [--planned]
        OUTPUT_DIR [KEY VALUE ...]

Its model and its mapper use random numbers in each step, from all three generators. Every step's
losses are appended to OUTPUT_DIR/losses.txt in full precision, except with --delayed and --at-once,
which say when they are written to metrics.json. With --planned its evaluations have the values of
tests/test_best_checkpoint.py.
"""

import argparse
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine.train_loop import HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.utils import comm
from torch import nn

from mask2former import add_maskformer2_config
from mask2former.data.loader import build_train_loader
from mask2former.launch import join_torchrun, started_by_torchrun
from mask2former.trainer import Trainer

DATASET = "toy_train"
NUM_IMAGES = 11


@META_ARCH_REGISTRY.register()
class ToyArchitecture(nn.Module):
    """Two losses, which depend on random numbers if the config's DROPOUT is above 0."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self._batch_size: int | None = None
        self.noise = cfg.MODEL.MASK_FORMER.DROPOUT
        self.backbone = nn.Linear(4, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, batch):
        device = self.head.weight.device
        images = torch.stack([sample["image"] for sample in batch]).to(device)  # (B, 4)
        prediction = self.head(self.backbone(images).relu())[:, 0]  # (B,)
        if not self.training:
            return [{"sem_seg": torch.zeros(1, 2, 2)} for _ in batch]
        target = images.sum(1) + self.noise * torch.rand(len(batch), device=device)
        size = self._batch_size or len(batch)
        return {
            "loss_mean": (prediction - target).square().sum() / size,
            "loss_size": prediction.abs().sum() / size * (1 + self.noise * random.random()),
        }

    @contextmanager
    def accumulating(self, batch: list[dict]) -> Iterator[None]:
        self._batch_size = len(batch)
        try:
            yield
        finally:
            self._batch_size = None


def load_toy_dataset() -> list[dict]:
    return [{"image_id": i, "width": 3 + i % 2, "height": 3} for i in range(NUM_IMAGES)]


def augment(record: dict) -> dict:
    """The mapper: an image of four numbers, three of them random."""
    noise = [random.random(), np.random.rand(), torch.rand(()).item()]
    return {**record, "image": torch.tensor([record["image_id"] / NUM_IMAGES, *noise])}


DatasetCatalog.register(DATASET, load_toy_dataset)


def toy_config(output_dir: str | Path, *options: str) -> CfgNode:
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.OUTPUT_DIR = str(output_dir)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "ToyArchitecture"
    cfg.MODEL.WEIGHTS = ""
    cfg.DATASETS.TRAIN = (DATASET,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.WARMUP_ITERS = 5
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupPolyLR"
    cfg.SOLVER.MAX_ITER = 45
    cfg.SOLVER.CHECKPOINT_PERIOD = 15
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    cfg.merge_from_list(list(options))
    return cfg


class WriteLosses(HookBase):
    def after_step(self) -> None:
        if not comm.is_main_process():
            return
        values = {
            name: value
            for name, (value, _) in self.trainer.storage.latest().items()
            if "loss" in name or name == "lr"
        }
        with open(f"{self.trainer.cfg.OUTPUT_DIR}/losses.txt", "a") as file:
            file.write(f"{self.trainer.iter} {sorted(values.items())}\n")


class KillWhileSaving(HookBase):
    """Kills the process like `kill -9`, after it has written half of a checkpoint."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            torch.save = self._half_save

    @staticmethod
    def _half_save(data, file) -> None:
        file.write(b"half of a file")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


class ToyTrainer(Trainer):
    def build_hooks(self):
        hooks = super().build_hooks()
        # After the scheduler's hook and before the checkpointer's.
        return [*hooks[:2], WriteLosses(), *hooks[2:]]

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg, augment)


def read_losses(output_dir: str | Path) -> dict[int, str]:
    """Iteration → its line. If an iteration ran twice, both lines must agree."""
    losses: dict[int, str] = {}
    for line in (Path(output_dir) / "losses.txt").read_text().splitlines():
        iteration, values = line.split(" ", 1)
        assert losses.setdefault(int(iteration), values) == values, f"iteration {iteration} differs"
    return losses


def main(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    kind = ToyTrainer
    if args.planned:
        sys.modules["toy_training"] = sys.modules["__main__"]
        from test_best_checkpoint import Evaluating as kind
    trainer = kind(toy_config(args.output_dir, *args.opts), delay_metrics=args.delayed)
    if args.delayed is not None:
        trainer._hooks = [hook for hook in trainer._hooks if type(hook) is not WriteLosses]
    trainer.resume_or_load(resume=args.resume)
    if args.kill_at is not None:
        trainer.register_hooks([KillWhileSaving(args.kill_at)])
    trainer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--delayed", action="store_true", default=None)
    parser.add_argument("--at-once", action="store_false", dest="delayed")
    parser.add_argument("--planned", action="store_true")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    if started_by_torchrun():
        join_torchrun(on_gpu=False)
    main(arguments)
