"""Losses and matching costs that are not finite: capture the iteration, then stop or skip it.

    not finite → OUTPUT_DIR/non_finite_ITERATION_rankR.pth → error, or skipped (SOLVER.NON_FINITE)

Until that happens, nothing is copied and the device is not waited for, unless iterations may be
skipped: then each iteration reads its losses before the update, and all ranks exchange one flag.
"""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from .capture import Capture, file_name, plain_metadata, versions, write_capture
from .checkpoint_weights import non_finite
from .train_step import DelayedMetrics, MixedPrecisionStep, SkippedIteration
from .utils.misc import unwrapped
from .utils.plain_values import describe

_logger = logging.getLogger(__name__)

NUM_SKIPPED = "num_skipped"


def max_skipped(cfg: CfgNode) -> int:
    """Iterations that may be skipped; configs made elsewhere may lack the key."""
    return cfg.SOLVER.NON_FINITE.MAX_SKIPPED if "NON_FINITE" in cfg.SOLVER else 0


class _Failure(NamedTuple):
    """What one rank tells the others of an iteration that is not finite."""

    images: list[str]
    losses: dict[str, float]
    costs: list[int]
    note: str


class NonFiniteWatch(HookBase):
    """Captures iterations whose losses or matching costs are not finite, and may skip some.

    A skipped iteration leaves weights, buffers and optimiser on all ranks as they were; the
    learning rate goes on. The number of skipped iterations is part of training checkpoints, and the
    metric `num_skipped`.

    Attributes:
        num_skipped: iterations skipped so far.
    """

    def __init__(self, max_skipped: int = 0) -> None:
        """
        Args:
            max_skipped: iterations that may be skipped; 0: the first one ends the run.
        """
        self.num_skipped = 0
        self._max_skipped = max_skipped
        self._has_captured = False

    @property
    def skips(self) -> bool:
        """Whether iterations may be skipped, so that losses are read before each update."""
        return self._max_skipped > 0

    def before_train(self) -> None:
        step = self.trainer._trainer
        if isinstance(step, DelayedMetrics):
            step.watch = self
        elif self.skips:
            raise ValueError(
                f"SOLVER.NON_FINITE.MAX_SKIPPED is {self._max_skipped}, but the trainer makes its "
                f"own steps ({type(step).__qualname__}), which skip nothing: set it to 0."
            )

    def state_dict(self) -> dict[str, int]:
        return {NUM_SKIPPED: self.num_skipped} if self.skips else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the state is not a number of iterations.
        """
        number = state_dict.get(NUM_SKIPPED)
        if type(number) is not int or number < 0:
            raise ValueError(
                f"trainer.hooks.NonFiniteWatch.{NUM_SKIPPED} is {describe(number)}; allowed: "
                "integers from 0 on."
            )
        self.num_skipped = number

    def check(
        self,
        iteration: int,
        batch: Any,
        losses: Mapping[str, float],
        costs: Sequence[int],
        gradient_norm: float = 0.0,
    ) -> None:
        """Let an iteration pass, or end it before the update; all ranks together.

        Args:
            iteration: its number.
            batch: what the model was called with.
            losses: of this rank.
            costs: images of the batch with matching costs that were not finite.
            gradient_norm: of all ranks. If it alone is not finite, all ranks are captured.

        Raises:
            SkippedIteration: the iteration of some rank is not finite.
            FloatingPointError: likewise, and no further one may be skipped.
        """
        is_bad = bool(costs) or not math.isfinite(sum(losses.values()))
        what, is_any_bad = "Loss", self._on_any_rank(is_bad)
        if not is_any_bad and not math.isfinite(gradient_norm):
            what, is_bad, is_any_bad = "Norm of gradients", True, True
        if not is_any_bad:
            get_event_storage().put_scalar(
                NUM_SKIPPED, self.num_skipped, smoothing_hint=False, cur_iter=iteration
            )
            return
        self.trainer._trainer.restore_buffers()
        stops = self.num_skipped >= self._max_skipped
        failure = None
        if is_bad:
            # Weights are large: of the skipped iterations only the first is captured.
            note = ""
            if stops or not self._has_captured:
                reason = "more iterations than may be skipped" if stops else "skipped"
                note = self.capture(iteration, batch, losses, reason)
                self._has_captured = True
            failure = _Failure(_names(batch), dict(losses), sorted(set(costs)), note)
        failures = enumerate(comm.all_gather(failure))
        what = "\n".join(_describe(rank, failure) for rank, failure in failures if failure)
        if stops:
            raise FloatingPointError(
                f"{what} became infinite or NaN at iteration={iteration}, and "
                f"{self.num_skipped} iterations were skipped before, as many as "
                f"SOLVER.NON_FINITE.MAX_SKIPPED allows.\n{what}"
            )
        self.num_skipped += 1
        get_event_storage().put_scalar(
            NUM_SKIPPED, self.num_skipped, smoothing_hint=False, cur_iter=iteration
        )
        if comm.is_main_process():
            _logger.warning(
                f"Skipped iteration {iteration}, whose {what.lower()} is infinite or NaN "
                f"({self.num_skipped} of at most {self._max_skipped}).\n{what}"
            )
        raise SkippedIteration

    def _on_any_rank(self, flag: bool) -> bool:
        if comm.get_world_size() == 1:
            return flag
        device = next(self.trainer._trainer.model.parameters()).device
        value = torch.full((1,), float(flag), device=device)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return value.item() > 0

    def capture(
        self,
        iteration: int,
        batch: Any,
        losses: Mapping[str, float],
        reason: str,
        weights_are: str = "those before the update",
    ) -> str:
        """Write the capture file of an iteration of this rank.

        Never fails, because the error to come is the one that matters.

        Returns:
            A sentence that names the file and the command to run, or says why there is none.
        """
        folder = self.trainer.cfg.OUTPUT_DIR
        if not folder or batch is None:
            return "It was not captured, because there is no OUTPUT_DIR or no batch."
        path = os.path.join(folder, file_name(iteration, comm.get_rank()))
        try:
            capture = self._captured(iteration, batch, losses, reason, weights_are)
            model = unwrapped(self.trainer._trainer.model)
            parameters = {name: value.detach() for name, value in model.named_parameters()}
            found = non_finite(parameters)
            bad = [name for name in parameters if name in found]
            write_capture(path, capture)
        # The device may be out of order, or a batch hold what cannot be written.
        except Exception as error:
            return f"It was not captured: {type(error).__name__}: {error}"
        lines = [f"Captured in {path}. To find the image, layer and tensor, run"]
        lines.append(f"  python tools/replay.py {path}")
        if bad:
            lines.append(
                f"The weights hold NaN or infinite values already, in {len(bad)} parameters "
                f"({bad[0]}, ...): an update by gradients that were not finite made them so."
            )
        return "\n".join(lines)

    def _captured(
        self,
        iteration: int,
        batch: Any,
        losses: Mapping[str, float],
        reason: str,
        weights_are: str,
    ) -> Capture:
        trainer, step = self.trainer, self.trainer._trainer
        dtype, scale = "float32", 1.0
        if isinstance(step, MixedPrecisionStep):
            dtype = str(step.precision).removeprefix("torch.")
            scale = float(step.grad_scaler.get_scale())
        train = trainer.cfg.DATASETS.TRAIN
        return Capture(
            iteration=iteration,
            rank=comm.get_rank(),
            world_size=comm.get_world_size(),
            seed=int(trainer.seed),
            reason=reason,
            losses=dict(losses),
            config=trainer.cfg.dump(),
            dtype=dtype,
            loss_scale=scale,
            weights=unwrapped(step.model).state_dict(),
            weights_are=weights_are,
            batch=batch if isinstance(batch, list) else [batch],
            metadata=plain_metadata(MetadataCatalog.get(train[0])) if train else {},
            versions=versions(),
        )


def _names(batch: Any) -> list[str]:
    """File names of a batch, or else image ids or positions."""
    samples: Iterable = batch if isinstance(batch, list | tuple) else [batch]
    return [sample_name(sample, i) for i, sample in enumerate(samples)]


def sample_name(sample: Any, index: int) -> str:
    """The file name of a sample, or else its image id or position in the batch."""
    if isinstance(sample, dict):
        if sample.get("file_name"):
            return str(sample["file_name"])
        if sample.get("image_id") is not None:
            return f"image {sample['image_id']}"
    return f"image {index} of the batch"


def _describe(rank: int, failure: _Failure) -> str:
    lines = [f"Rank {rank}: loss_dict = {failure.losses}"]
    if failure.costs:
        lines.append(f"Matching costs are not finite of images {failure.costs} of the batch.")
    lines.append(f"Images: {', '.join(failure.images)}")
    return "\n".join([*lines, failure.note] if failure.note else lines)
