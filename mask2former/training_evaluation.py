"""Evaluation within training: of the weights and of their average, and what follows from it.

PeriodicCheckpointer → EvalHook → BestModel → PeriodicWriter → EarlyStop
"""

import logging
import os
from collections import OrderedDict
from functools import partial
from typing import Any

from detectron2.engine import hooks
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm

from .best_checkpoint import BestModel, EarlyStop, is_of_average
from .ema import EMA, WeightAverage, uses_ema
from .evaluation import write_results
from .utils.misc import unwrapped

_logger = logging.getLogger(__name__)


def with_evaluation_hooks(trainer: Any, built: list[HookBase | None]) -> list[HookBase | None]:
    """Put the hooks of SOLVER.EMA and TEST.BEST_METRIC in their places, if they are on.

    Args:
        trainer: a `Trainer` with its model.
        built: the hooks of Detectron2's trainer; its `EvalHook` is replaced.
    """
    cfg, test = trainer.cfg, trainer.cfg.TEST
    # Configs made by another project's copy of `add_maskformer2_config` lack these keys.
    metric = test.get("BEST_METRIC", "")
    if not uses_ema(cfg) and not metric:
        return built
    average: WeightAverage | None = None
    if uses_ema(cfg):
        average = WeightAverage(trainer.model, cfg.SOLVER.EMA.DECAY, warmup=cfg.SOLVER.EMA.WARMUP)
    evaluation = hooks.EvalHook(test.EVAL_PERIOD, partial(_evaluate, trainer, average))
    best: BestModel | None = None
    early: EarlyStop | None = None
    if metric:
        model = average.model if average and is_of_average(metric) else unwrapped(trainer.model)
        best = BestModel(
            cfg,
            model,
            metric=metric,
            mode=test.BEST_MODE,
            min_delta=test.EARLY_STOPPING_MIN_DELTA,
        )
        if test.EARLY_STOPPING_PATIENCE > 0:
            early = EarlyStop(best, test.EARLY_STOPPING_PATIENCE)
    # The average is updated before the checkpointer saves it, which is on the main process only.
    kinds = hooks.PeriodicCheckpointer, hooks.EvalHook
    place = next(i for i, hook in enumerate(built) if isinstance(hook, kinds))
    result = [*built[:place], average]
    for hook in built[place:]:
        result += [evaluation, best] if isinstance(hook, hooks.EvalHook) else [hook]
    return [*result, early]


def _evaluate(trainer: Any, average: WeightAverage | None) -> dict:
    """Evaluate the weights, then their average; tasks of the latter get the prefix `ema/`."""
    results = trainer.test(trainer.cfg, trainer.model)
    if average is not None:
        results = _with_average(trainer, results, average)
    trainer._last_eval_results, trainer.evaluated_iter = results, trainer.iter
    return results


def _with_average(trainer: Any, results: dict, average: WeightAverage) -> dict:
    """Evaluate the average in the folder OUTPUT_DIR/ema, and join its results with the others."""
    cfg, names = trainer.cfg.clone(), trainer.cfg.DATASETS.TEST
    cfg.defrost()
    cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, EMA)
    cfg.freeze()
    _logger.info(f"Evaluating the average of the weights (SOLVER.EMA) in {cfg.OUTPUT_DIR}")
    averaged = trainer.test(cfg, average.model)
    if not comm.is_main_process() or not names:
        return results
    if len(names) == 1:
        results, averaged = {names[0]: results}, {names[0]: averaged}
    joined = OrderedDict(
        (name, {**tasks, **{f"{EMA}/{task}": value for task, value in averaged[name].items()}})
        for name, tasks in results.items()
    )
    write_results(trainer.cfg.OUTPUT_DIR, joined)
    return joined[names[0]] if len(names) == 1 else joined
