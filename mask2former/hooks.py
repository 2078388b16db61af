"""Hooks of the trainer, and which hooks read the losses in which iterations."""

import datetime
import json
import logging
import os
from collections.abc import Iterable

import torch
from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase, TrainerBase
from detectron2.utils import comm

from .best_checkpoint import BestModel, EarlyStop
from .earlier_files import METRICS, earlier_files_of, first_byte_of_this_run
from .ema import WeightAverage
from .fast.checkpointing import has_room, set_checkpointing
from .non_finite import NonFiniteWatch
from .pictures import HardExamples, Pictures
from .training_log import PeakMemory
from .utils.memory import peak_resident_bytes
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
    _SMOOTHED = True

    def __init__(self) -> None:
        self._restored: dict[str, list[tuple[float, int]]] = {}

    def state_dict(self) -> dict:
        storage = self.trainer.storage
        hints = storage.smoothing_hints()
        return {
            name: history.values()[-storage.count_samples(name, self._NUM_ITERATIONS) :]
            for name, history in storage.histories().items()
            if hints.get(name, True) == self._SMOOTHED
        }

    def load_state_dict(self, state_dict: dict) -> None:
        self._restored = state_dict

    def before_train(self) -> None:
        _restore(self.trainer, self._restored, smoothing_hint=self._SMOOTHED)


class UnwrittenMetrics(MetricWindow):
    """Saves values of other metrics, such as an evaluation's, that are waiting for their writer."""

    _NUM_ITERATIONS = 1
    _SMOOTHED = False

    def state_dict(self) -> dict:
        iteration = self.trainer.iter
        periods = [h._period for h in self.trainer._hooks if isinstance(h, hooks.PeriodicWriter)]
        # Without what the undisturbed run has written: a resumed one need not know it.
        first_unwritten = min((iteration - iteration % period for period in periods), default=0)
        return {
            name: values
            for name, values in super().state_dict().items()
            if values[-1][1] >= first_unwritten
        }


def finish_iteration(trainer: TrainerBase) -> None:
    """Do what a killed run had not done in the iteration of the checkpoint it resumes from.

    Checkpoints are saved before the evaluation of the same iteration, and before its row of metrics
    is written. All ranks together, after all hooks' `before_train`.

    Args:
        trainer: with `start_iter` from 1 to `max_iter`.
    """
    done = trainer.start_iter - 1
    is_written = comm.is_main_process() and _last_written(trainer) >= done
    is_written = any(comm.all_gather(is_written))
    trainer.iter = trainer.storage.iter = done
    for hook in trainer._hooks:
        if isinstance(hook, EarlyStop):
            hook.after_step()
        elif is_written and isinstance(hook, BestModel):
            hook.add_recorded(done)
        elif not is_written and isinstance(
            hook, hooks.EvalHook | hooks.BestCheckpointer | hooks.PeriodicWriter
        ):
            hook.after_step()
    trainer.iter = trainer.storage.iter = trainer.start_iter


def _restore(
    trainer: TrainerBase,
    metrics: dict[str, list[tuple[float, int]]],
    *,
    smoothing_hint: bool,
) -> None:
    """Put metrics of an earlier run into the storage; those not written yet will be.

    Args:
        trainer: whose OUTPUT_DIR says what is written.
        metrics: {name: pairs of value and iteration}.
        smoothing_hint: whether writers smooth them.
    """
    storage = trainer.storage
    last_written = _last_written(trainer) if metrics else -1
    for name, values in metrics.items():
        for value, iteration in values:
            storage.put_scalar(name, value, smoothing_hint, cur_iter=iteration)
        if values and iteration <= last_written:
            # Writers write the latest values, and know nothing of an earlier run.
            del storage.latest()[name]


def _last_written(trainer: TrainerBase) -> int:
    """This run's last iteration in metrics.json, or -1. A writer has written all until then."""
    path = os.path.join(trainer.cfg.OUTPUT_DIR, METRICS)
    if not trainer.cfg.OUTPUT_DIR or not os.path.exists(path):
        return -1
    with open(path) as file:
        file.seek(first_byte_of_this_run(path, earlier_files_of(trainer)))
        return max(_iterations(file), default=-1)


def _iterations(lines: Iterable[str]) -> Iterable[int]:
    for line in lines:
        try:
            yield json.loads(line)["iteration"]
        except ValueError:
            # Cut off by a kill.
            continue


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


class StartReport(HookBase):
    """Logs time and memory after the first iterations, and what would make training faster.

    Times are medians over the last iterations, as everywhere in the log; memory is that of the main
    process.
    """

    _NUM_ITERATIONS = 20
    # Share of an iteration in which training waits for data, and of memory in use, for a hint.
    _SLOW_DATA = 0.3
    _AMPLE_MEMORY = 0.6

    def after_step(self) -> None:
        trainer = self.trainer
        last = min(trainer.start_iter + self._NUM_ITERATIONS, trainer.max_iter) - 1
        if trainer.iter == last and comm.is_main_process():
            _logger.info(self._report())

    def _report(self) -> str:
        trainer, cfg = self.trainer, self.trainer.cfg
        number = trainer.iter - trainer.start_iter + 1
        histories = trainer.storage.histories()
        if not {"time", "data_time"} <= histories.keys():  # not in the first iterations
            return f"After {number} iterations: no times yet; {self._memory()[0]}"
        seconds = histories["time"].median(number)
        data = histories["data_time"].median(number) / seconds
        batch = cfg.SOLVER.IMS_PER_BATCH
        remaining = seconds * (trainer.max_iter - trainer.iter - 1)
        memory, used = self._memory()
        lines = [
            f"After {number} iterations: {seconds:.3f} s/it, {batch / seconds:.1f} images/s, "
            f"{min(data, 1):.0%} of the time waiting for data, "
            f"ETA {datetime.timedelta(seconds=round(remaining))}",
            f"batch {batch} = {comm.get_world_size()} process(es) x "
            f"{batch // comm.get_world_size()} images; {memory}",
        ]
        if data > self._SLOW_DATA:
            lines.append(
                f"Training waits for data: raise DATALOADER.NUM_WORKERS "
                f"({cfg.DATALOADER.NUM_WORKERS} for each process; this machine has "
                f"{os.cpu_count()} CPU cores), or keep the images on a faster disk."
            )
        if used is not None and used < self._AMPLE_MEMORY:
            lines.append(
                f"{1 - used:.0%} of the GPU's memory is free: a larger batch may fit, see "
                "tools/find_batch_size.py."
            )
        return "\n  ".join(lines)

    def _memory(self) -> tuple[str, float | None]:
        """Peak memory in words, and the share of the GPU's that is in use."""
        device = next(self.trainer.model.parameters()).device
        resident = f"{peak_resident_bytes() / 2**30:.1f} GiB in the main process"
        if device.type != "cuda":
            return f"peak memory {resident}", None
        # None of these waits for the GPU.
        allocated = torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.max_memory_reserved(device)
        total = torch.cuda.get_device_properties(device).total_memory
        text = (
            f"peak memory of the GPU {allocated / 2**30:.1f} GiB allocated, "
            f"{reserved / 2**30:.1f} reserved, of {total / 2**30:.1f}; {resident}"
        )
        return text, reserved / total


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
    UnwrittenMetrics: None,
    AmpleMemory: None,
    NonFiniteWatch: None,
    WeightAverage: None,
    BestModel: "_period",
    EarlyStop: None,
    StartReport: None,
    PeakMemory: None,
    HardExamples: None,
    Pictures: "_period",
}
