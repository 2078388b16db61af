"""The optimiser of the published recipes: AdamW or SGD with one group for each parameter.

One group for each parameter, in the order of `model.named_modules()`, is how the optimiser state of
published training checkpoints is laid out; so they can be resumed.
"""

import itertools
from collections.abc import Callable, Iterator

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
_POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed")


def parameter_groups(cfg: CfgNode, model: nn.Module) -> Iterator[dict]:
    """Yield the group of each trainable parameter: `params`, `lr`, `weight_decay`.

    A parameter that several modules share belongs to the first of them.

    Args:
        cfg: read are SOLVER.BASE_LR, BACKBONE_MULTIPLIER, WEIGHT_DECAY, WEIGHT_DECAY_NORM and
            WEIGHT_DECAY_EMBED.
        model: the model, not wrapped.
    """
    solver = cfg.SOLVER
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr, weight_decay = solver.BASE_LR, solver.WEIGHT_DECAY
            if "backbone" in module_name:
                lr *= solver.BACKBONE_MULTIPLIER
            if any(table in name for table in _POSITION_TABLES):
                weight_decay = 0.0
            if isinstance(module, _NORMS):
                weight_decay = solver.WEIGHT_DECAY_NORM
            if isinstance(module, nn.Embedding):
                weight_decay = solver.WEIGHT_DECAY_EMBED
            yield {"params": [parameter], "lr": lr, "weight_decay": weight_decay}


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
    kwargs: dict = {"lr": solver.BASE_LR}
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
    return optimizer_type(list(parameter_groups(cfg, model)), **kwargs)
