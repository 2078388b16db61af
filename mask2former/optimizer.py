"""The optimiser of the published recipes: AdamW or SGD, a group for all parameters treated alike.

The published code makes one group for each parameter, in the order of `model.named_modules()`, so
hundreds of small updates a step. Here a handful of groups are updated by fused kernels. Training
checkpoints of the published layout are rearranged when they are loaded, so that they can be
resumed.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)
# Options that choose an implementation and change no result.
_IMPLEMENTATION = ("foreach", "fused", "capturable")
# Devices that all parameters must be on for fused kernels.
_FUSED_DEVICES = ("cpu", "cuda")
_POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed")


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict]:
    """The groups of the trainable parameters, each with `params`, `lr` and `weight_decay`.

    Groups stand in the order of their first parameters, parameters in that of the modules. One that
    several modules share belongs to the first of them.

    Args:
        cfg: read are SOLVER.BASE_LR, BACKBONE_MULTIPLIER, WEIGHT_DECAY, WEIGHT_DECAY_NORM and
            WEIGHT_DECAY_EMBED.
        model: the model, not wrapped.
    """
    solver = cfg.SOLVER
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module_name, module, name, parameter in _trainable_parameters(model):
        lr, weight_decay = solver.BASE_LR, solver.WEIGHT_DECAY
        if "backbone" in module_name:
            lr *= solver.BACKBONE_MULTIPLIER
        if any(table in name for table in _POSITION_TABLES):
            weight_decay = 0.0
        if isinstance(module, _NORMS):
            weight_decay = solver.WEIGHT_DECAY_NORM
        if isinstance(module, nn.Embedding):
            weight_decay = solver.WEIGHT_DECAY_EMBED
        groups.setdefault((lr, weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": weight_decay}
        for (lr, weight_decay), parameters in groups.items()
    ]


def _trainable_parameters(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (module name, module, own name, parameter) in the published order, each once."""
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield module_name, module, name, parameter


class _Regroup:
    """Makes saved state of the published layout, a group for each parameter, fit the groups here.

    It is called by `Optimizer.load_state_dict` and gives back state in the layout of `optimizer`.

    Args:
        parameters: all trainable parameters in the published order.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters

    def __call__(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved_groups, state = state_dict["param_groups"], state_dict["state"]
        is_published = len(saved_groups) == len(self._parameters) != len(optimizer.param_groups)
        if is_published and all(len(group["params"]) == 1 for group in saved_groups):
            saved_of = dict(zip(self._parameters, saved_groups, strict=True))
            state, new_groups, index = {}, [], 0
            for group in optimizer.param_groups:
                new_group = dict(saved_of[group["params"][0]], params=[])
                for parameter in group["params"]:
                    (saved_index,) = saved_of[parameter]["params"]
                    if saved_index in state_dict["state"]:
                        state[index] = state_dict["state"][saved_index]
                    new_group["params"].append(index)
                    index += 1
                new_groups.append(new_group)
            saved_groups = new_groups
        # Which kernels run is not a matter of the saved run, nor of its device.
        ours = {k: v for k, v in optimizer.defaults.items() if k in _IMPLEMENTATION}
        return {"state": state, "param_groups": [group | ours for group in saved_groups]}


def _clipping_full_model(
    optimizer_type: type[Optimizer], max_norm: float, norm_type: float
) -> type[Optimizer]:
    """A subclass whose `step` first scales all gradients together to at most `max_norm`."""

    class FullModelGradientClippingOptimizer(optimizer_type):
        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            parameters = itertools.chain(*(group["params"] for group in self.param_groups))
            torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
            return super().step(closure)

    return FullModelGradientClippingOptimizer


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build the optimiser that `cfg.SOLVER` describes.

    CLIP_GRADIENTS.CLIP_TYPE "full_model" limits the norm of all gradients together to CLIP_VALUE
    (not at all where that is 0); "value" and "norm" clip each parameter on its own.

    Args:
        cfg: the config.
        model: the model, not wrapped.

    Raises:
        ValueError: SOLVER.OPTIMIZER is unknown.
    """
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    parameters = [parameter for *_, parameter in _trainable_parameters(model)]
    kwargs: dict[str, Any] = {"lr": solver.BASE_LR}
    kwargs["fused"] = all(
        p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters
    )
    if solver.OPTIMIZER == "ADAMW":
        optimizer_type: type[Optimizer] = AdamW
    elif solver.OPTIMIZER == "SGD":
        optimizer_type = SGD
        kwargs.update(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; allowed: ADAMW, SGD.")

    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        if clip.CLIP_VALUE > 0:
            optimizer_type = _clipping_full_model(optimizer_type, clip.CLIP_VALUE, clip.NORM_TYPE)
    else:
        optimizer_type = maybe_add_gradient_clipping(cfg, optimizer_type)
    optimizer = optimizer_type(parameter_groups(cfg, model), **kwargs)
    # A fused optimiser would take the gradients from the scaler of mixed precision still scaled,
    # and the clipping in `step` before that would see them so.
    optimizer._step_supports_amp_scaling = False
    optimizer.register_load_state_dict_pre_hook(_Regroup(parameters))
    return optimizer
