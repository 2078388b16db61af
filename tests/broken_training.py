"""Trainings in which one image makes the loss NaN; also a program, for several processes.

python broken_training.py [--resume] [--delayed] OUTPUT_DIR [KEY VALUE ...]
"""

import argparse
import math

import torch
import toy_training as toy
from detectron2.engine.train_loop import HookBase
from detectron2.modeling import META_ARCH_REGISTRY

from mask2former.hooks import READING_PERIODS
from mask2former.launch import join_torchrun, started_by_torchrun
from mask2former.modeling.matcher import assign
from mask2former.trainer import Trainer

BAD_IMAGE = 3


@META_ARCH_REGISTRY.register()
class BrokenToy(toy.ToyArchitecture):
    """The loss of a batch with the bad image is NaN, and so are statistics of its BatchNorm."""

    breaks = True

    def __init__(self, cfg):
        super().__init__(cfg)
        self.norm = torch.nn.BatchNorm1d(4, affine=False)

    def forward(self, batch):
        self.has_bad_image = any(sample["image_id"] == BAD_IMAGE for sample in batch)
        factor = math.nan if self.has_bad_image and self.breaks else 1.0
        if not self.has_bad_image or self.breaks:
            self.norm(torch.stack([sample["image"] for sample in batch]) * factor)
        return {name: loss * factor for name, loss in super().forward(batch).items()}


@META_ARCH_REGISTRY.register()
class MatchingToy(BrokenToy):
    """Matches as well, which fails once weights are NaN."""

    def forward(self, batch):
        for image, _ in enumerate(batch):
            assign(self.head.weight.detach()[:, :1], image)
        return super().forward(batch)


@META_ARCH_REGISTRY.register()
class BrokenGradients(toy.ToyArchitecture):
    """Of the bad image, gradients are NaN and losses are finite: the root of the square of 0."""

    def forward(self, batch):
        is_bad = any(sample["image_id"] == BAD_IMAGE for sample in batch)
        root = (self.head.bias.sum() * (0 if is_bad else 1)).square().sqrt()
        return super().forward(batch) | {"loss_root": root}


@META_ARCH_REGISTRY.register()
class BrokenCosts(toy.ToyArchitecture):
    """Matching costs of the bad image are NaN."""

    accumulating = toy.ToyArchitecture.accumulating

    def forward(self, batch):
        for image, sample in enumerate(batch):
            is_bad = sample["image_id"] == BAD_IMAGE
            assign(torch.full((1, 1), math.nan if is_bad else 0.0), image)
        return super().forward(batch)


class NoUpdateOfBadImage(HookBase):
    """What skipping should do: without gradients the optimiser does nothing."""

    def before_train(self):
        model = self.trainer._trainer.model

        def drop_gradients(*_):
            if model.has_bad_image:
                model.zero_grad()

        self.trainer._trainer.optimizer.register_step_pre_hook(drop_gradients)


class KeepWeights(HookBase):
    """Copies the weights before an iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            weights = self.trainer._trainer.model.state_dict()
            self.weights = {name: value.clone() for name, value in weights.items()}


READING_PERIODS[KeepWeights] = None


class BrokenTrainer(Trainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return toy.build_train_loader(cfg, toy.augment)


def train(output_dir, *options, delay=False, resume=False, hooks=()):
    torch.manual_seed(0)
    options = ("MODEL.META_ARCHITECTURE", "BrokenToy", "SEED", "3", *options)
    trainer = BrokenTrainer(toy.toy_config(output_dir, *options), delay_metrics=delay)
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks(list(hooks))
    trainer.train()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("output_dir")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--delayed", action="store_true")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if started_by_torchrun():
        join_torchrun(on_gpu=False)
    train(args.output_dir, *args.opts, delay=args.delayed, resume=args.resume)
