"""The optimiser of the recipes: AdamW or SGD, one parameter group per set of hyperparameters.

The original release makes one group per parameter, in the order of `model.named_modules()`:
hundreds of small updates per step. Here fused kernels update a handful of groups. Training
checkpoints with the original layout are converted on load, so that they can be resumed.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers.batch_norm import LayerNorm
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from .modeling.backbone.depths import describes_depths, is_token, layer_decay_of
from .optimizer_state import fitting_state, require_structure

_logger = logging.getLogger(__name__)

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
# Options that select an implementation without changing results.
IMPLEMENTATION = ("foreach", "fused", "capturable")
# The entry of a group in which torch saves them.
_PARAMETER_NAMES = "param_names"
# Devices with fused kernels.
_FUSED_DEVICES = ("cpu", "cuda")
_BACKBONE = "backbone."  # before the names of its parameters
# Names in the original release's Swin; `is_token` knows those of other transformers.
_POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed")


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict]:
    """The groups of the trainable parameters, each with `params`, `lr` and `weight_decay`.

    Parameters are in module order, groups in the order of their first parameters. A parameter
    shared by several modules belongs to the first of them.

    Args:
        cfg: reads SOLVER.BASE_LR, BACKBONE_MULTIPLIER, LAYER_DECAY, WEIGHT_DECAY, WEIGHT_DECAY_NORM
            and WEIGHT_DECAY_EMBED.
        model: the model, not wrapped.

    Raises:
        ValueError: SOLVER.LAYER_DECAY is set, and the model's backbone does not say how deep its
            parameters are.
    """
    solver = cfg.SOLVER
    backbone = getattr(model, "backbone", None)
    has_depths = isinstance(backbone, nn.Module) and describes_depths(backbone)
    layer_decay = _layer_decay(cfg, backbone)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for module_name, module, name, parameter in _trainable_parameters(model):
        lr, weight_decay = solver.BASE_LR, solver.WEIGHT_DECAY
        full_name = f"{module_name}.{name}"
        in_backbone = full_name.removeprefix(_BACKBONE) if full_name.startswith(_BACKBONE) else ""
        if "backbone" in module_name:
            lr *= solver.BACKBONE_MULTIPLIER
        if in_backbone and layer_decay is not None:
            lr *= layer_decay(in_backbone)
        # Other projects' backbones are trained as the original release trains them.
        is_ours = bool(in_backbone) and has_depths
        is_table = any(table in name for table in _POSITION_TABLES)
        if is_table or (is_ours and is_token(in_backbone)):
            weight_decay = 0.0
        if isinstance(module, _NORMS) or (is_ours and isinstance(module, LayerNorm)):
            weight_decay = solver.WEIGHT_DECAY_NORM
        if isinstance(module, nn.Embedding):
            weight_decay = solver.WEIGHT_DECAY_EMBED
        groups.setdefault((lr, weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "weight_decay": weight_decay}
        for (lr, weight_decay), parameters in groups.items()
    ]


def _layer_decay(cfg: CfgNode, backbone: Any) -> Callable[[str], float] | None:
    """The factor on a parameter's rate by its name in the backbone; None if there is none."""
    # A project with its own copy of `add_maskformer2_config` lacks this key.
    decay = cfg.SOLVER.get("LAYER_DECAY", 1.0)
    if decay == 1:
        return None
    if not isinstance(backbone, nn.Module):
        raise ValueError(
            f"SOLVER.LAYER_DECAY is {decay}, but the model has no attribute `backbone`; allowed: "
            "1.0."
        )
    return layer_decay_of(backbone, decay)


def _trainable_parameters(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield (module name, module, own name, parameter) in the original order, each once."""
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield module_name, module, name, parameter


class _Regroup:
    """Converts saved state to the groups of this optimiser.

    A pre-hook of `Optimizer.load_state_dict`. State with names of parameters may have any groups:
    they change with SOLVER.BACKBONE_MULTIPLIER or a WEIGHT_DECAY_*. State without them has the
    groups of the optimiser, or one per parameter. All of it must fit the parameters: kernels do
    not check it.

    Args:
        names: of all trainable parameters, in the original order.
    """

    def __init__(self, names: dict[nn.Parameter, str]) -> None:
        self._names = names

    def __call__(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        require_structure(state_dict)
        saved_groups, state = state_dict["param_groups"], state_dict["state"]
        saved_by_parameter = self._by_parameter(optimizer, saved_groups)
        if saved_by_parameter:
            state, new_groups, index = {}, [], 0
            for group in optimizer.param_groups:
                new_group = dict(saved_by_parameter[group["params"][0]][0], params=[])
                for parameter in group["params"]:
                    _, saved_index = saved_by_parameter[parameter]
                    if saved_index in state_dict["state"]:
                        state[index] = state_dict["state"][saved_index]
                    new_group["params"].append(index)
                    index += 1
                new_groups.append(new_group)
            saved_groups = new_groups
        state = fitting_state(optimizer, saved_groups, state, self._names)
        # The kernels depend on this run and its device, not on the saved one.
        ours = {k: v for k, v in optimizer.defaults.items() if k in IMPLEMENTATION}
        groups = [{k: v for k, v in g.items() if k != _PARAMETER_NAMES} for g in saved_groups]
        return {"state": state, "param_groups": [group | ours for group in groups]}

    def _by_parameter(
        self, optimizer: Optimizer, groups: list[dict[str, Any]]
    ) -> dict[nn.Parameter, tuple[dict[str, Any], int]]:
        """Each parameter's saved group and number in it; empty if the file does not say."""
        if {p for group in optimizer.param_groups for p in group["params"]} != set(self._names):
            return {}
        entries = [(group, index) for group in groups for index in group["params"]]
        lists = [group.get(_PARAMETER_NAMES) for group in groups]
        pairs = zip(lists, groups, strict=True)
        if all(isinstance(x, list) and len(x) == len(g["params"]) for x, g in pairs):
            by_name = dict(zip((str(name) for x in lists for name in x), entries, strict=True))
            if by_name.keys() == set(self._names.values()):
                return {parameter: by_name[name] for parameter, name in self._names.items()}
        is_original = len(groups) == len(self._names) != len(optimizer.param_groups)
        if is_original and all(len(group["params"]) == 1 for group in groups):
            return dict(zip(self._names, entries, strict=True))
        return {}


def _save_names(names: dict[nn.Parameter, str]) -> Callable[[Optimizer, dict[str, Any]], None]:
    """A post-hook of `Optimizer.state_dict`: adds the names of the parameters to their groups.

    Not in the optimiser's own groups: torch then wants names in groups that are added later.
    """

    def add(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
            if all(parameter in names for parameter in group["params"]):
                saved[_PARAMETER_NAMES] = [names[parameter] for parameter in group["params"]]

    return add


def _clipping_full_model(
    optimizer_type: type[Optimizer], max_norm: float, norm_type: float
) -> type[Optimizer]:
    """A subclass whose `step` first clips the norm of all gradients together to `max_norm`.

    Its attribute `total_norm` is that norm in the last step, before clipping; None before the
    first. A step with `found_inf` also leaves out its update if the norm is not finite.
    """

    class FullModelGradientClippingOptimizer(optimizer_type):  # type: ignore[valid-type, misc]
        grad_scale: Tensor | None
        total_norm: Tensor | None = None

        def step(self, closure: Callable[[], float] | None = None) -> float | None:
            parameters = list(itertools.chain(*(group["params"] for group in self.param_groups)))
            is_scaled = getattr(self, "grad_scale", None) is not None
            if is_scaled:
                _unscale(parameters, self.grad_scale)
                self.grad_scale = None
            self.total_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
            found_inf = getattr(self, "found_inf", None)
            # Scaled gradients have been checked by their scaler.
            if found_inf is not None and not is_scaled:
                found_inf.copy_(found_inf.maximum((~self.total_norm.isfinite()).float()))
            return super().step(closure)

    return FullModelGradientClippingOptimizer


def _unscale(parameters: list[nn.Parameter], scale: Tensor) -> None:
    """Divide gradients by a scale, as `GradScaler.unscale_` does."""
    inverse = scale.double().reciprocal().float()
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(grads, inverse)


def scale_learning_rate(cfg: CfgNode) -> CfgNode:
    """Scale the learning rate linearly with the batch, from SOLVER.REFERENCE_BATCH_SIZE.

    Args:
        cfg: the config.

    Returns:
        The config itself if there is nothing to scale. Otherwise a copy with scaled BASE_LR and
        BASE_LR_END, whose reference is its own IMS_PER_BATCH, so that it is not scaled again.
    """
    # Configs made by another project's copy of `add_maskformer2_config` lack the key.
    reference, batch_size = cfg.SOLVER.get("REFERENCE_BATCH_SIZE", 0), cfg.SOLVER.IMS_PER_BATCH
    if reference in (0, batch_size):
        return cfg
    scaled = cfg.clone()
    scaled.defrost()
    scaled.SOLVER.REFERENCE_BATCH_SIZE = batch_size
    for key in ("BASE_LR", "BASE_LR_END"):
        scaled.SOLVER[key] = cfg.SOLVER[key] * batch_size / reference
    _logger.info(
        f"SOLVER.BASE_LR {cfg.SOLVER.BASE_LR:g} is for a batch of SOLVER.REFERENCE_BATCH_SIZE "
        f"{reference} images: scaled to {scaled.SOLVER.BASE_LR:g} for SOLVER.IMS_PER_BATCH "
        f"{batch_size}"
    )
    if cfg.is_frozen():
        scaled.freeze()
    return scaled


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build the optimiser that `cfg.SOLVER` describes.

    CLIP_GRADIENTS.CLIP_TYPE "full_model" clips the norm of all gradients together to CLIP_VALUE (0:
    no clipping); "value" and "norm" clip each parameter on its own.

    Args:
        cfg: the config.
        model: the model, not wrapped.

    Raises:
        ValueError: SOLVER.OPTIMIZER is unknown.
    """
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    names = {
        parameter: f"{module_name}.{name}".lstrip(".")
        for module_name, _, name, parameter in _trainable_parameters(model)
    }
    kwargs: dict[str, Any] = {"lr": solver.BASE_LR}
    kwargs["fused"] = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in names)
    if solver.OPTIMIZER == "ADAMW":
        optimizer_type: type[Optimizer] = AdamW
    elif solver.OPTIMIZER == "SGD":
        optimizer_type = SGD
        kwargs.update(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    else:
        raise ValueError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; allowed: ADAMW, SGD.")

    takes_scaled = not clip.ENABLED or clip.CLIP_TYPE == "full_model"
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        if clip.CLIP_VALUE > 0:
            optimizer_type = _clipping_full_model(optimizer_type, clip.CLIP_VALUE, clip.NORM_TYPE)
    else:
        optimizer_type = maybe_add_gradient_clipping(cfg, optimizer_type)
    groups = parameter_groups(cfg, model)
    if cfg.SOLVER.get("LAYER_DECAY", 1.0) != 1:
        rates = [group["lr"] for group in groups]
        _logger.info(
            f"SOLVER.LAYER_DECAY {cfg.SOLVER.LAYER_DECAY:g}: learning rates from {min(rates):.3g} "
            f"to {max(rates):.3g} in {len(groups)} parameter groups"
        )
    optimizer = optimizer_type(groups, **kwargs)
    # Whether `step` takes scaled gradients of mixed precision, so that the gradient scaler need not
    # wait for the device to learn whether they are finite: the fused kernel skips the update if
    # not. The clipping of Detectron2 does not know of scales, and after a first step that is
    # skipped fused SGD would read momentum that is not initialised.
    optimizer._step_supports_amp_scaling = (  # type: ignore[attr-defined]
        kwargs["fused"] and solver.OPTIMIZER == "ADAMW" and takes_scaled
    )
    optimizer.register_load_state_dict_pre_hook(_Regroup(names))
    optimizer.register_state_dict_post_hook(_save_names(names))
    return optimizer
