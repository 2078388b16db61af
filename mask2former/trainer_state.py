"""Saved state of a trainer, checked before its parts take it over as their attributes."""

import math
from collections.abc import Callable
from typing import Any

from detectron2.engine import DefaultTrainer
from torch.optim.lr_scheduler import LRScheduler

from .utils.plain_values import describe

# Every version of PyTorch writes these.
_SCHEDULER_ENTRIES = ("base_lrs", "last_epoch")
_SCALER_RANGES: dict[str, Callable[[float], bool]] = {
    "scale": lambda value: value > 0,
    "growth_factor": lambda value: value > 1,
    "backoff_factor": lambda value: 0 < value < 1,
    "growth_interval": lambda value: value >= 1,
    "_growth_tracker": lambda value: value >= 0,
}


def check_trainer_state(trainer: DefaultTrainer, state: Any) -> None:
    """Check types and ranges; the optimiser checks its own part.

    Args:
        trainer: to load into.
        state: what the trainer's `state_dict` returned when it was saved.

    Raises:
        ValueError: naming the entry that is missing or wrong.
    """
    _require_dict(state, "trainer")
    _require_iteration(state, "trainer")
    inner = state.get("_trainer")
    _require_dict(inner, "trainer._trainer")
    _require_iteration(inner, "trainer._trainer")
    _require_dict(inner.get("optimizer"), "trainer._trainer.optimizer")
    if "seed" in state and not _is_count(state["seed"]):
        raise ValueError(
            f"trainer.seed is {describe(state['seed'])}; allowed: integers of at least 0."
        )
    hooks = state.get("hooks", {})
    _require_dict(hooks, "trainer.hooks")
    for name, value in hooks.items():
        _require_dict(value, f"trainer.hooks.{name}")
    # Other schedulers keep no state.
    if "LRScheduler" in hooks and isinstance(trainer.scheduler, LRScheduler):
        _check_scheduler(trainer.scheduler, hooks["LRScheduler"])
    if "MetricWindow" in hooks:
        _check_metrics(hooks["MetricWindow"])
    if "grad_scaler" in inner:
        _check_scaler(inner["grad_scaler"])


def _check_scheduler(scheduler: LRScheduler, state: dict) -> None:
    where = "trainer.hooks.LRScheduler"
    if missing := [key for key in _SCHEDULER_ENTRIES if key not in state]:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    own = scheduler.state_dict()
    for key, value in state.items():
        # They become attributes; a method must not.
        is_method = isinstance(key, str) and callable(getattr(type(scheduler), key, None))
        if not isinstance(key, str) or is_method or key == "optimizer":
            raise ValueError(f"{where} has an entry {describe(key)}, which is not a state.")
        if own.get(key) is not None and _kind(value) != _kind(own[key]):
            raise ValueError(f"{where}.{key} is {describe(value)}, not like {describe(own[key])}.")
    if not _is_count(state["last_epoch"]):
        raise ValueError(
            f"{where}.last_epoch is {describe(state['last_epoch'])}; allowed: integers from 0 on."
        )
    if not all(rate >= 0 for rate in state["base_lrs"]):
        raise ValueError(f"{where}.base_lrs is {describe(state['base_lrs'])}; allowed: at least 0.")


def _check_metrics(state: dict) -> None:
    for name, values in state.items():
        is_history = isinstance(name, str) and isinstance(values, list | tuple)
        pairs = values if is_history else [None]
        for pair in pairs:
            is_pair = isinstance(pair, list | tuple) and len(pair) == 2
            # A metric may be NaN or infinite.
            if not is_pair or not isinstance(pair[0], int | float) or not _is_count(pair[1]):
                raise ValueError(
                    f"trainer.hooks.MetricWindow.{name!s:.80} holds {describe(pair)}; "
                    "allowed: pairs of value and iteration."
                )


def _check_scaler(state: Any) -> None:
    where = "trainer._trainer.grad_scaler"
    _require_dict(state, where)
    for key, is_valid in _SCALER_RANGES.items():
        value = state.get(key)
        # A scaler that is off has no state.
        if state and not (_is_number(value) and is_valid(value)):
            raise ValueError(f"{where}.{key} is {describe(value)}, which makes no sense.")


def _kind(value: Any) -> Any:
    """What two states of one attribute have in common."""
    if isinstance(value, list | tuple):
        return frozenset("number" if _is_number(item) else type(item) for item in value)
    return "number" if _is_number(value) else type(value)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _require_dict(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}, not a dict.")


def _require_iteration(state: dict, where: str) -> None:
    if not _is_count(state.get("iteration")):
        raise ValueError(
            f"{where}.iteration is {describe(state.get('iteration'))}; allowed: integers from 0 on."
        )
