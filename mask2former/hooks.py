"""Hooks of the trainer, and which hooks read the losses in which iterations."""

import logging

import torch
from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm

from .fast.checkpointing import has_room, set_checkpointing
from .utils.seeding import MODEL, seed_all

_logger = logging.getLogger(__name__)


class IterationSeed(HookBase):
    """Seeds the model's random numbers from the run's seed, the iteration and the rank."""

    def before_step(self) -> None:
        seed_all(self.trainer.seed, MODEL, self.trainer.iter, comm.get_rank())


class MetricWindow(HookBase):
    """Saves the last values of smoothed metrics in checkpoints.

    Detectron2 writes medians over the last 20 iterations, so the first rows after a resume need
    values from before it.
    """

    _NUM_ITERATIONS = 20

    def __init__(self) -> None:
        self._restored: dict[str, list[tuple[float, int]]] = {}

    def state_dict(self) -> dict:
        storage = self.trainer.storage
        hints = storage.smoothing_hints()
        return {
            name: history.values()[-storage.count_samples(name, self._NUM_ITERATIONS) :]
            for name, history in storage.histories().items()
            # A restored metric has no hint until it is written again.
            if hints.get(name, True)
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self._restored = state_dict

    def before_train(self) -> None:
        for name, values in self._restored.items():
            for value, iteration in values:
                self.trainer.storage.histories()[name].update(value, iteration)


class AmpleMemory(HookBase):
    """Turns activation checkpointing off if a GPU has the memory (MODEL.CHECKPOINTING "auto")."""

    _NUM_ITERATIONS = 20

    def __init__(self) -> None:
        self._peak = 0

    def after_step(self) -> None:
        num_done = self.trainer.iter - self.trainer.start_iter + 1
        if num_done > self._NUM_ITERATIONS:
            return
        peak, available = self._memory()
        # Other hooks may reset torch's maximum.
        self._peak = max(self._peak, peak)
        # All ranks decide alike, because the slowest sets the pace.
        if num_done == self._NUM_ITERATIONS and all(
            comm.all_gather(has_room(self._peak, available))
        ):
            set_checkpointing(self.trainer.model, "none")
            _logger.info(
                f"Activation checkpointing is off from here on: training took at most "
                f"{self._peak / 2**30:.1f} of {available / 2**30:.1f} GiB. "
                "MODEL.CHECKPOINTING selective keeps it on."
            )

    def _memory(self) -> tuple[int, int]:
        """Bytes allocated at most so far, and bytes that this process could allocate in all."""
        # MODEL.DEVICE may be another one than the current one.
        device = next(self.trainer.model.parameters()).device
        free, _ = torch.cuda.mem_get_info(device)
        return torch.cuda.max_memory_allocated(device), free + torch.cuda.memory_reserved(device)


# Hooks that do not read the losses, or only after every so many iterations: the attribute says how
# many. All others may read them any time.
READING_PERIODS: dict[type[HookBase], str | None] = {
    hooks.IterationTimer: None,
    hooks.LRScheduler: None,
    hooks.TorchMemoryStats: None,
    hooks.TorchProfiler: None,
    hooks.PreciseBN: None,
    hooks.PeriodicCheckpointer: "period",
    hooks.BestCheckpointer: "_period",
    hooks.EvalHook: "_period",
    hooks.PeriodicWriter: "_period",
    IterationSeed: None,
    MetricWindow: None,
    AmpleMemory: None,
}
