"""Exponential moving average (EMA) of a model's weights, kept during training (SOLVER.EMA).

    after each iteration:  average ← d · average + (1 - d) · weights

The average often evaluates better than the last weights, above all before the learning rate has
decayed. It is a second model of the same class in evaluation mode: parameters are averaged, buffers
(such as the statistics of BatchNorm) are copied. It takes as much memory as the parameters and
buffers, on the model's device in every process, without communication: all processes have the same
weights and make the same average.
"""

import copy
import logging
import os
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .inference.model_file import save_model_folder
from .model_folder_checkpoint import training_metadata
from .utils.files import atomic_write
from .utils.misc import unwrapped
from .utils.plain_values import describe

# Before the task in results, `ema/panoptic_seg/PQ`, and in file names, `model_final_ema.pth`.
EMA = "ema"

_logger = logging.getLogger(__name__)


def uses_ema(cfg: CfgNode) -> bool:
    """Whether training keeps an average; configs made elsewhere may lack the key."""
    return "EMA" in cfg.SOLVER and cfg.SOLVER.EMA.ENABLED


class WeightAverage(HookBase):
    """Averages the trainer's weights after every iteration.

    Its state, part of training checkpoints, is the average and the number of updates. At the end of
    training it writes the average to OUTPUT_DIR/model_final_ema.pth, which MODEL.WEIGHTS loads like
    any other file, and to the folder model_final_ema beside it.

    An iteration that mixed precision skips counts like any other, since only the GPU knows of it;
    it leaves the weights as they were.

    Attributes:
        model: the average.
        num_updates: iterations averaged so far.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool = True) -> None:
        """
        Args:
            model: what is trained; may be wrapped for distributed training.
            decay: d above, from 0 to below 1; 0.9998 averages over about the last 5000 iterations.
            warmup: after n updates use min(decay, (1 + n) / (10 + n)), so that the average covers
                at most about the last tenth of the iterations, and forgets the first weights in
                short trainings too.
        """
        self.model = copy.deepcopy(unwrapped(model)).eval().requires_grad_(False)
        self.num_updates = 0
        self._decay, self._warmup = decay, warmup
        self._is_restored = False

    def decay(self) -> float:
        """The decay of the next update."""
        ramp = (1 + self.num_updates) / (10 + self.num_updates)
        return min(self._decay, ramp) if self._warmup else self._decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights of a model to the average, without a host sync."""
        model = unwrapped(model)
        # `AveragedModel.update_parameters` would copy its counter to the GPU, which syncs.
        average = get_ema_multi_avg_fn(self.decay())
        average(list(self.model.parameters()), list(model.parameters()), self.num_updates)
        self._copy_buffers(model)
        self.num_updates += 1

    @torch.no_grad()
    def _copy_buffers(self, model: nn.Module) -> None:
        pairs = list(zip(self.model.buffers(), model.buffers(), strict=True))
        if pairs:
            averaged, trained = zip(*pairs, strict=True)
            torch._foreach_copy_(averaged, trained)

    def before_train(self) -> None:
        if self._is_restored:
            return
        self.model.load_state_dict(unwrapped(self.trainer.model).state_dict())
        start = self.trainer.start_iter
        origin = f"the weights of iteration {start - 1}" if start else "the initial weights"
        missing = ", because the checkpoint has no average" if start else ""
        _logger.info(f"SOLVER.EMA: the average of the weights starts from {origin}{missing}")

    def after_step(self) -> None:
        # An iteration left out because its loss is not finite (SOLVER.NON_FINITE).
        if not getattr(getattr(self.trainer, "_trainer", None), "skipped", False):
            self.update(self.trainer.model)

    def after_train(self) -> None:
        # Not after an error. Also when a finished training is resumed, which may have been killed
        # before the file was written.
        if self.trainer.iter >= self.trainer.max_iter and comm.is_main_process():
            path = os.path.join(self.trainer.cfg.OUTPUT_DIR, f"model_final_{EMA}.pth")
            _logger.info(f"Saving the average of the weights to {path}")
            cfg = self.trainer.cfg
            folder = os.path.splitext(path)[0]
            save_model_folder(self.model, cfg, training_metadata(cfg), folder)
            with atomic_write(path, "wb") as file:
                torch.save({"model": self.model.state_dict()}, file)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is not an average of this model.
        """
        weights, num_updates = state_dict.get("model"), state_dict.get("num_updates")
        where = "trainer.hooks.WeightAverage"
        if type(num_updates) is not int or num_updates < 0:
            raise ValueError(
                f"{where}.num_updates is {describe(num_updates)}; allowed: integers from 0 on."
            )
        if not isinstance(weights, dict):
            raise ValueError(f"{where}.model is a {type(weights).__name__}, not a dict.")
        own = self.model.state_dict()
        if different := sorted(map(str, weights.keys() ^ own.keys())):
            raise ValueError(
                f"{where}.model is of another model: {different[0]:.80} is in one only."
            )
        for name, value in weights.items():
            if not isinstance(value, Tensor) or value.shape != own[name].shape:
                raise ValueError(
                    f"{where}.model.{name} does not have shape {tuple(own[name].shape)}."
                )
            if value.dtype != own[name].dtype:
                raise ValueError(f"{where}.model.{name} is {value.dtype}, not {own[name].dtype}.")
        self.model.load_state_dict(weights)
        self.num_updates, self._is_restored = num_updates, True
