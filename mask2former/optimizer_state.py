"""Saved state of an optimiser, checked against the parameters before it is loaded.

Fused kernels trust it: a moment of another shape than its parameter makes them write to foreign
memory.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from .utils.plain_values import describe

# Entries of a parameter's state that are not shaped like it.
_STEP = "step"

_logger = logging.getLogger(__name__)


def require_structure(state_dict: Any) -> None:
    """Check that a saved state has groups and an entry per parameter.

    Raises:
        ValueError: naming what is wrong.
    """
    if not isinstance(state_dict, dict):
        raise ValueError(f"the optimiser's state is a {type(state_dict).__name__}, not a dict.")
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict):
        raise ValueError("the optimiser's state lacks 'param_groups' or 'state'.")
    for i, group in enumerate(groups):
        ids = group.get("params") if isinstance(group, dict) else None
        if not isinstance(ids, list) or not all(type(index) is int for index in ids):
            raise ValueError(f"group {i} of the optimiser's parameters has no list 'params'.")
    ids = [index for group in groups for index in group["params"]]
    if len(set(ids)) != len(ids):
        raise ValueError("the optimiser's groups name a parameter twice.")


def fitting_state(
    optimizer: Optimizer,
    groups: list[dict[str, Any]],
    state: dict[int, Any],
    names: Mapping[nn.Parameter, str],
) -> dict[int, Any]:
    """Check saved groups and state, and give each tensor the memory layout of its parameter.

    Args:
        optimizer: to load into.
        groups: saved, as `require_structure` accepts them.
        state: saved entries by the numbers in the groups.
        names: of the parameters, for messages.

    Returns:
        The entries of the optimiser's parameters.

    Raises:
        ValueError: naming the group or the parameter that does not fit.
    """
    sizes = [len(group["params"]) for group in groups]
    own_sizes = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own_sizes:
        raise ValueError(
            f"the file has a different number of parameter groups, or of parameters in them: "
            f"{sizes} instead of {own_sizes}. The model, its frozen parts or SOLVER has changed."
        )
    for i, group in enumerate(groups):
        _require_options(optimizer, i, group)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ids = [index for group in groups for index in group["params"]]
    result, without, non_finite = {}, [], []
    for index, parameter in zip(ids, parameters, strict=True):
        # Parameters of another model than the optimiser was built for have no name.
        name = names.get(parameter, f"number {index}")
        if not state.get(index, {}):
            without.append(name)
            continue
        result[index] = entry = _fitting_entry(parameter, state[index], name)
        moments = [v for k, v in entry.items() if k != _STEP and isinstance(v, torch.Tensor)]
        # Extremes are much faster than `isfinite` of all elements; NaN is both.
        if not all(math.isfinite(x) for v in moments if v.numel() for x in v.aminmax()):
            non_finite.append(name)
    if non_finite:
        raise ValueError(
            f"the optimiser's state of {len(non_finite)} parameters ({non_finite[0]}, ...) holds "
            "NaN or infinite values: that training diverged, or the file is damaged. Use an "
            "earlier checkpoint."
        )
    _require_same_entries(result, dict(zip(ids, (names.get(p) for p in parameters), strict=True)))
    if result and without:
        _logger.warning(
            f"The optimiser's state of {len(without)} parameters ({without[0]}, ...) is not in the "
            "checkpoint: they had no gradient before, or start anew."
        )
    return result


def _require_options(optimizer: Optimizer, index: int, group: dict[str, Any]) -> None:
    """Numbers of a group must be there, finite and of the kind that the optimiser has."""
    for key, default in optimizer.defaults.items():
        value = group.get(key, default)
        what = f"group {index} of the optimiser's parameters has {key} {describe(value)}"
        if isinstance(default, bool) or default is None:
            if not (value is None or isinstance(value, bool)):
                raise ValueError(f"{what}; allowed: True, False.")
            continue
        if key not in group:
            raise ValueError(
                f"group {index} of the optimiser's parameters has no {key}: another optimiser than "
                f"{type(optimizer).__name__} wrote it. Keep the SOLVER.OPTIMIZER of that run."
            )
        is_tuple = isinstance(default, tuple)
        values = value if is_tuple and isinstance(value, tuple | list) else [value]
        length = len(default) if isinstance(default, tuple) else 1
        # The tuples of these optimisers are decay rates.
        is_valid = len(values) == length and all(map(_is_finite, values))
        if not is_valid or (is_tuple and max(values) >= 1):
            allowed = f"{length} numbers below 1" if is_tuple else "a finite number"
            raise ValueError(f"{what}; allowed: {allowed}.")


def _is_finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        value = value.item() if value.numel() == 1 and not value.is_complex() else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0


def _fitting_entry(parameter: nn.Parameter, entry: Any, name: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
        raise ValueError(f"the optimiser's state of {name} is no dict of tensors.")
    result = {}
    for key, value in entry.items():
        what = f"the optimiser's state {key} of {name}"
        if key == _STEP:
            if not _is_finite(value) or (isinstance(value, torch.Tensor) and value.dim()):
                raise ValueError(f"{what} is {describe(value)}; allowed: a number of steps.")
        elif isinstance(value, torch.Tensor):
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{what} has shape {tuple(value.shape)}, but the parameter has "
                    f"{tuple(parameter.shape)}."
                )
            if value.is_floating_point() != parameter.is_floating_point():
                raise ValueError(f"{what} is {value.dtype}, but the parameter {parameter.dtype}.")
            if value.stride() != parameter.stride():
                value = torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)
        elif not (value is None or isinstance(value, bool | int | float)):
            raise ValueError(f"{what} is a {type(value).__name__}, not a tensor.")
        result[key] = value
    return result


def _require_same_entries(state: dict[int, dict[str, Any]], names: dict[int, str]) -> None:
    """One optimiser keeps the same entries for all parameters."""
    if not state:
        return
    expected = set().union(*state.values())
    for index, entry in state.items():
        if missing := expected - entry.keys():
            raise ValueError(
                f"the optimiser's state of {names[index]} lacks {', '.join(sorted(missing))}."
            )
