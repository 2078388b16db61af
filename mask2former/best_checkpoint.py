"""The best checkpoint by a metric, and the end of a training that no longer improves.

    evaluation → BestModel: model_best.pth, TEST.EARLY_STOPPING_PATIENCE → EarlyStop ends the run

A metric has the name under which Detectron2 stores it: `task/metric`, or `data set/task/metric` if
DATASETS.TEST names several; the average of SOLVER.EMA has `ema/` before the task.
"""

import itertools
import json
import logging
import math
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase, TrainerBase
from detectron2.utils import comm
from torch import nn

from .data.evaluator_types import builders_of
from .earlier_files import earlier_files_of, is_of_this_run
from .ema import EMA, uses_ema
from .evaluation.expected_results import RESULT_NAMES
from .model_folder_checkpoint import ModelFolderCheckpointer
from .utils.files import atomic_write, explained_read_errors, load_torch
from .utils.plain_values import describe

_logger = logging.getLogger(__name__)


class Stopped(BaseException):
    """Ends the loop of a training that is complete; no error, so that nobody logs one."""


class StopsEarly(TrainerBase):
    """A trainer whose hooks may raise `Stopped`; the base after `DefaultTrainer`."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            super().train(*args, **kwargs)
        except Stopped:
            pass


class WeightsWriter(ModelFolderCheckpointer):
    """Writes weights only, to a folder for inference and to a file that `--resume` leaves alone."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


class BestModel(hooks.BestCheckpointer):
    """Detectron2's hook, whose best value survives a restart, on all ranks.

    It writes OUTPUT_DIR/model_best.pth with the weights of the best evaluation so far and with its
    `iteration`, `metric` and `value`; beside it the folder model_best for `Predictor`, and
    model_best.json with the metric of every evaluation. Of equal values the first is the best one;
    a value that is not finite is never the best. Only the main process has results; all ranks learn
    what it finds.

    Attributes:
        num_without_improvement: evaluations since the last one that was better by more than
            `min_delta` than the best before it.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        *,
        metric: str,
        mode: str = "max",
        min_delta: float = 0.0,
    ) -> None:
        """
        Args:
            cfg: reads OUTPUT_DIR and TEST.EVAL_PERIOD.
            model: to save: that which has the metric.
            metric: its name.
            mode: "max" or "min": which values are better.
            min_delta: improvements that are not larger do not count for `num_without_improvement`.
        """
        writer = WeightsWriter(model, cfg.OUTPUT_DIR, cfg)
        super().__init__(cfg.TEST.EVAL_PERIOD, writer, metric, mode)
        self.best_metric: float | None = None
        self.best_iter: int | None = None
        self._sign = 1 if mode == "max" else -1
        self._min_delta = min_delta
        # Iteration of each evaluation → its value, as in the record.
        self._values: dict[str, float] = {}
        # What an evaluation must exceed to count as improvement; iteration of the last evaluation.
        self._reference: float | None = None
        self._last_iter = -1
        self.num_without_improvement = 0

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and comm.is_main_process():
            self._read_record()
            self._take_up_file()

    def _take_up_file(self) -> None:
        """Keep a model_best.pth that is better than any evaluation before the checkpoint.

        The run was killed after writing it, and the iterations since the checkpoint run again.
        """
        path = os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        if not is_of_this_run(path, earlier_files_of(self.trainer)):
            return
        with explained_read_errors(path):
            file = load_torch(path)
        metric, value, iteration = (file.get(key) for key in ("metric", "value", "iteration"))
        if metric != self._val_metric or not isinstance(value, float) or type(iteration) is not int:
            return
        if self.best_metric is None or self._compare(value, self.best_metric):
            self.best_metric, self.best_iter = value, iteration

    def _best_checking(self) -> None:
        # The last evaluation is after the last iteration.
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        if iteration <= self._last_iter or self.trainer.evaluated_iter != self.trainer.iter:
            return
        value, problem = math.nan, None
        if comm.is_main_process():
            try:
                value = self._value()
            except ValueError as error:
                problem = error
        # All ranks fail or go on together.
        value, problem = comm.all_gather((value, problem))[0]
        if problem is not None:
            raise problem
        self.add(iteration, value)
        if comm.is_main_process():
            self._record(iteration, value)

    def _value(self) -> float:
        """The metric of the evaluation in this iteration."""
        found = {
            name: value
            for name, (value, iteration) in self.trainer.storage.latest().items()
            if iteration == self.trainer.iter
        }
        if self._val_metric not in found:
            raise unknown_metric(self._val_metric, sorted(name for name in found if "/" in name))
        return float(found[self._val_metric])

    def add(self, iteration: int, value: float, *, saves: bool = True) -> None:
        """Take up an evaluation.

        Args:
            iteration: in which it was.
            value: of the metric; NaN is worse than any.
            saves: whether to write the model if it is the best.
        """
        self._last_iter = iteration
        is_finite = math.isfinite(value)
        if is_finite and (
            self._reference is None or self._sign * (value - self._reference) > self._min_delta
        ):
            self._reference, self.num_without_improvement = value, 0
        else:
            self.num_without_improvement += 1
        best, best_iter = self.best_metric, self.best_iter
        if is_finite and (best is None or self._compare(value, best)):
            if saves:
                extra = {"iteration": iteration, "metric": self._val_metric, "value": value}
                self._checkpointer.save(self._file_prefix, **extra)
            self.best_metric, self.best_iter = value, iteration
            before = "" if best is None else f", before {best:.4f} in iteration {best_iter}"
            _logger.info(f"{self._val_metric} is {value:.4f}, the best so far{before}")
        else:
            known = "none so far" if best is None else f"{best:.4f} in iteration {best_iter}"
            _logger.info(f"{self._val_metric} is {value:.4f}, not better than the best: {known}")

    def add_recorded(self, iteration: int) -> None:
        """Take up an evaluation of a run that was killed after it, if it was recorded.

        Args:
            iteration: that of the checkpoint, which is saved before the evaluation.
        """
        value = None
        if comm.is_main_process() and iteration > self._last_iter:
            value = self._values.get(str(iteration))
        value = comm.all_gather(value)[0]
        if value is not None:
            # The weights were written before the record.
            self.add(iteration, value, saves=False)

    @property
    def _record_path(self) -> str:
        return os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.json")

    def _record(self, iteration: int, value: float) -> None:
        self._values[str(iteration)] = value
        with atomic_write(self._record_path) as file:
            json.dump({"metric": self._val_metric, "values": self._values}, file, indent=1)

    def _read_record(self) -> None:
        if not is_of_this_run(self._record_path, earlier_files_of(self.trainer)):
            return
        with open(self._record_path) as file:
            try:
                record = json.load(file)
                if record["metric"] == self._val_metric:
                    self._values = {name: float(value) for name, value in record["values"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self._record_path} is damaged ({error}): delete it, then the best of the "
                    "evaluations until the last checkpoint is known."
                ) from error

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self._val_metric,
            "best_metric": self.best_metric,
            "best_iter": self.best_iter,
            "reference": self._reference,
            "num_without_improvement": self.num_without_improvement,
            "last_iter": self._last_iter,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: an entry is missing or wrong.
        """
        metric = state_dict.get("metric")
        if metric != self._val_metric:
            _logger.warning(
                f"The run to resume had TEST.BEST_METRIC {describe(metric)}, now it is "
                f"{self._val_metric!r}: its best value is forgotten, and the next evaluation "
                "replaces model_best.pth."
            )
            return
        where = "trainer.hooks.BestModel"
        for name in ("best_metric", "reference"):
            value = state_dict.get(name)
            if value is not None and not (isinstance(value, float) and math.isfinite(value)):
                raise ValueError(f"{where}.{name} is {describe(value)}, no finite number.")
        for name in ("best_iter", "num_without_improvement", "last_iter"):
            value = state_dict.get(name)
            if type(value) is not int and not (name == "best_iter" and value is None):
                raise ValueError(
                    f"trainer.hooks.BestModel.{name} is {describe(value)}, no integer."
                )
        self.best_metric, self.best_iter = state_dict["best_metric"], state_dict["best_iter"]
        self._reference, self._last_iter = state_dict["reference"], state_dict["last_iter"]
        self.num_without_improvement = state_dict["num_without_improvement"]


class EarlyStop(HookBase):
    """Ends training when evaluations stop to improve; the last of the trainer's own hooks.

    The run then ends as if this iteration were its last: model_final.pth, and the results of this
    evaluation as the final ones. All ranks stop together, because `BestModel` has the same state on
    all.
    """

    def __init__(self, best: BestModel, patience: int) -> None:
        """
        Args:
            best: counts evaluations without improvement.
            patience: how many end the training.
        """
        self._best, self._patience = best, patience

    def is_over(self) -> bool:
        return self._best.num_without_improvement >= self._patience

    def after_step(self) -> None:
        trainer = self.trainer
        if not self.is_over() or trainer.iter + 1 == trainer.max_iter:
            return
        _logger.info(
            f"Early stopping after iteration {trainer.iter} of {trainer.max_iter}: "
            f"{self._best._val_metric} has not improved in {self._patience} evaluations "
            f"(TEST.EARLY_STOPPING_PATIENCE). The best is in model_best.pth."
        )
        for hook in trainer._hooks:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.checkpointer.save(f"{hook.file_prefix}_final", iteration=trainer.iter)
        # As after a complete training, except that what was evaluated or drawn in this iteration is
        # the final one. Nothing was in this process if the run was killed after writing its row of
        # metrics.
        if trainer.evaluated_iter == trainer.iter:
            before = itertools.takewhile(lambda hook: hook is not self, trainer._hooks)
            for hook in before:
                is_evaluation = isinstance(hook, hooks.EvalHook) and hook._period > 0
                if is_evaluation and (trainer.iter + 1) % hook._period == 0:
                    hook._eval_after_train = False
        trainer.iter += 1
        trainer.max_iter = trainer.iter
        raise Stopped


def unknown_metric(metric: str, known: list[str]) -> ValueError:
    return ValueError(
        f"TEST.BEST_METRIC is {metric!r}, which the evaluation does not give; allowed: "
        f"{', '.join(map(repr, known)) or 'nothing'}."
    )


def is_of_average(metric: str) -> bool:
    """Whether a metric is of the average of SOLVER.EMA."""
    return f"/{EMA}/" in f"/{metric}"


def check_best_metric(cfg: CfgNode) -> None:
    """Check before a run that the task of TEST.BEST_METRIC will be evaluated.

    Which metrics a task has is known after its first evaluation.

    Args:
        cfg: the config; its evaluator types are known.

    Raises:
        ValueError: no test set has such a task.
    """
    metric = cfg.TEST.get("BEST_METRIC", "")
    if not metric:
        return
    names, known = cfg.DATASETS.TEST, []
    for name in names:
        builders = builders_of(cfg, name)
        if not all(build.__module__.startswith("mask2former.") for build in builders.values()):
            return
        prefix = f"{name}/" if len(names) > 1 else ""
        for task in builders:
            known.append(f"{prefix}{RESULT_NAMES[task]}/")
            if uses_ema(cfg):
                known.append(f"{prefix}{EMA}/{RESULT_NAMES[task]}/")
    if not any(metric.startswith(start) and metric != start for start in known):
        tasks = ", ".join(repr(f"{start}...") for start in known) or "nothing, no test set"
        hint = ""
        if is_of_average(metric) and not uses_ema(cfg):
            hint = f" {EMA}/ needs SOLVER.EMA.ENABLED True."
        raise ValueError(
            f"TEST.BEST_METRIC is {metric!r}, which is not evaluated on DATASETS.TEST; allowed: "
            f"{tasks}.{hint}"
        )
