"""Saved state of a trainer, checked before its parts take it over as their attributes.

What follows from the config is in that state as well: rates, decays, the schedule. Where the config
has changed since, it decides.
"""

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.projects.deeplab.lr_scheduler import WarmupPolyLR
from detectron2.solver.lr_scheduler import LRMultiplier
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .earlier_files import check_earlier_files
from .optimizer import IMPLEMENTATION
from .utils.plain_values import describe

_logger = logging.getLogger(__name__)

# Their rates follow from the iteration and what the config says.
_CLOSED_FORM = (LRMultiplier, WarmupPolyLR)
# Where a schedule is. All else follows from the config.
_POSITION = ("last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step")
# Every version of PyTorch writes these.
_SCHEDULER_ENTRIES = ("base_lrs", "last_epoch")
# What runs trained with that saved no such setting, because their version did not have it.
_BEFORE = {"SOLVER.LAYER_DECAY": 1.0}
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
    solver = state.get("solver", {})
    _require_dict(solver, "trainer.solver")
    for name, value in solver.items():
        if not isinstance(name, str) or not all(map(_is_plain, _as_list(value))):
            raise ValueError(f"trainer.solver.{name!s:.80} is {describe(value)}, not a setting.")
    check_earlier_files(state.get("earlier_files", {}))
    hooks = state.get("hooks", {})
    _require_dict(hooks, "trainer.hooks")
    for name, value in hooks.items():
        _require_dict(value, f"trainer.hooks.{name}")
    # Other schedulers keep no state.
    if "LRScheduler" in hooks and isinstance(trainer.scheduler, LRScheduler):
        _check_scheduler(trainer.scheduler, hooks["LRScheduler"])
    for name in ("MetricWindow", "UnwrittenMetrics"):
        if name in hooks:
            _check_metrics(name, hooks[name])
    if "grad_scaler" in inner:
        _check_scaler(inner["grad_scaler"])


def solver_settings(cfg: CfgNode) -> dict[str, Any]:
    """All values of SOLVER by their full keys, to save them."""
    return {
        key: list(value) if isinstance(value, tuple | list) else value
        for key, value in _leaves("SOLVER", cfg.SOLVER)
        if all(map(_is_plain, _as_list(value)))
    }


def _leaves(prefix: str, node: CfgNode) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value


class Configured:
    """What the config says of an optimiser and its schedule.

    Made before saved state is loaded into them; `use` then puts back what has changed in the config
    since that state was saved.
    """

    def __init__(self, cfg: CfgNode, optimizer: Optimizer, scheduler: Any) -> None:
        """
        Args:
            cfg: the config.
            optimizer: built from it.
            scheduler: of the optimiser, built from it; without state if not of torch.
        """
        self._settings = solver_settings(cfg)
        self._end = cfg.SOLVER.MAX_ITER
        self._optimizer, self._scheduler = optimizer, scheduler
        self._options = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        self._base_lrs = list(getattr(scheduler, "base_lrs", []))
        self._schedule: dict[str, Any] = {}
        if isinstance(scheduler, _CLOSED_FORM):
            state = scheduler.state_dict()
            self._schedule = {k: v for k, v in state.items() if k not in _POSITION}

    def use(self, saved_settings: dict[str, Any] | None) -> None:
        """Put back what the config has changed, with a line in the log for each change.

        Args:
            saved_settings: `solver_settings` of the run that saved the state; None if it saved
                none: then its groups and its schedule are compared.
        """
        if saved_settings is None:
            changes = list(self._changed_values())
        else:
            saved_settings = _BEFORE | saved_settings
            changes = [
                (key, saved_settings[key], value)
                for key, value in self._settings.items()
                if key in saved_settings and saved_settings[key] != value
            ]
        for key, saved, value in changes:
            _logger.info(
                f"{key}: checkpoint {describe(saved)}, config {describe(value)}: the config's "
                "value is used"
            )
        if changes:
            self._put_back()
        elif len(getattr(self._scheduler, "base_lrs", [])) != len(self._base_lrs):
            # One per parameter group. Other trainers make more groups.
            self._set_base_lrs()

    def _changed_values(self) -> Iterator[tuple[str, Any, Any]]:
        """Name, values in the loaded state, and values of the config."""
        groups = self._optimizer.param_groups
        keys = {"initial_lr", *self._optimizer.defaults} - {"lr", *IMPLEMENTATION}
        for key in sorted(keys):
            pairs = [
                (group[key], options[key])
                for group, options in zip(groups, self._options, strict=True)
                if key in group and key in options
            ]
            if any(_as_list(saved) != _as_list(value) for saved, value in pairs):
                saved_values, values = zip(*pairs, strict=True)
                yield f"{key} of the optimiser", _distinct(saved_values), _distinct(values)
        for key, value in self._schedule.items():
            saved = getattr(self._scheduler, key)
            if key != "base_lrs" and saved != value:
                yield f"{key} of the learning rate schedule", saved, value

    def _put_back(self) -> None:
        for group, options in zip(self._optimizer.param_groups, self._options, strict=True):
            before, rate = group.get("initial_lr"), options.get("initial_lr")
            group.update(options)
            # Schedules are factors of it. Those of this project are computed anew below.
            if before != rate and rate is not None:
                group["lr"] = group["lr"] * rate / before if before else rate
        scheduler = self._scheduler
        if isinstance(scheduler, _CLOSED_FORM):
            for key, value in self._schedule.items():
                setattr(scheduler, key, value)
            # Not defined beyond its end, where nothing is left to train.
            if scheduler.last_epoch <= self._end:
                scheduler.base_lrs = self._base_lrs
                rates = scheduler.get_lr()
                for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
        self._set_base_lrs()

    def _set_base_lrs(self) -> None:
        if isinstance(self._scheduler, LRScheduler):
            self._scheduler.base_lrs = self._base_lrs
            self._scheduler._last_lr = [group["lr"] for group in self._optimizer.param_groups]


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


def _check_metrics(hook: str, state: dict) -> None:
    for name, values in state.items():
        is_history = isinstance(name, str) and isinstance(values, list | tuple)
        pairs = values if is_history else [None]
        for pair in pairs:
            is_pair = isinstance(pair, list | tuple) and len(pair) == 2
            # A metric may be NaN or infinite.
            if not is_pair or not isinstance(pair[0], int | float) or not _is_count(pair[1]):
                raise ValueError(
                    f"trainer.hooks.{hook}.{name!s:.80} holds {describe(pair)}; "
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


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, tuple | list) else [value]


def _distinct(values: tuple) -> list:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


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
