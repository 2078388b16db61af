"""The compiled operators ``torch.ops.mask2former.*``: devices, fake tensors and gradients.

Schemas and kernels are in ``csrc/``. Importing this module registers the rest, if the library was
built.
"""

import logging

import torch
from torch import Tensor

from . import _library

logger = logging.getLogger(__name__)

_OPERATORS = ("ms_deform_attn", "ms_deform_attn_fused")
# Device types that have compiled kernels.
COMPILED_DEVICES = frozenset(
    device
    for device, is_built in {
        "cpu": _library.is_loaded(),
        "cuda": _library.is_loaded() and _library.cuda_architectures() != "",
    }.items()
    if is_built
)
_warned: set[str] = set()


def has_kernel(device: torch.device) -> bool:
    """Whether the compiled operators run on this device. If not, warns once per CPU and GPU."""
    if device.type in COMPILED_DEVICES:
        return True
    if device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
        _warn_once(device.type)
    return False


def _warn_once(device_type: str) -> None:
    if device_type in _warned:
        return
    _warned.add(device_type)
    logger.warning(
        "Multi-scale deformable attention runs its PyTorch formulation on %s, which is many "
        "times slower: %s. `python -m mask2former.ops` prints details.",
        device_type,
        "its library was built without CUDA" if COMPILED_DEVICES else "its library was not built",
    )


def _register() -> None:
    """Register fake kernels and gradients for the operators of the loaded library."""
    for name in _OPERATORS:
        torch.library.register_fake(f"mask2former::{name}", _fake_forward)
        torch.library.register_fake(f"mask2former::{name}_backward", _fake_backward)
        torch.library.register_autograd(
            f"mask2former::{name}_backward",
            _refuse_double_backward,
            setup_context=_save_nothing,
        )
    torch.library.register_autograd(
        "mask2former::ms_deform_attn", _backward, setup_context=_save_inputs
    )
    torch.library.register_autograd(
        "mask2former::ms_deform_attn_fused", _backward_fused, setup_context=_save_inputs
    )


def _fake_forward(value: Tensor, spatial_shapes: list[int], *points: Tensor) -> Tensor:
    # `points` is (locations, weights) or (reference points, offsets, logits).
    locations = points[-2]
    _, _, num_heads, dim = value.shape
    return value.new_empty((value.shape[0], locations.shape[1], num_heads * dim))


def _fake_backward(
    grad_output: Tensor, value: Tensor, spatial_shapes: list[int], *rest: Tensor | bool
) -> tuple[Tensor, Tensor, Tensor]:
    locations, weights, _ = rest[-3:]
    assert isinstance(locations, Tensor) and isinstance(weights, Tensor)
    return (
        value.new_empty(value.shape),
        locations.new_empty(locations.shape),
        weights.new_empty(weights.shape),
    )


def _save_inputs(ctx, inputs, output) -> None:
    value, ctx.spatial_shapes, *points = inputs
    ctx.save_for_backward(value, *points)


def _backward(ctx, grad_output: Tensor):
    value, locations, weights = ctx.saved_tensors
    grads = torch.ops.mask2former.ms_deform_attn_backward(
        grad_output,
        value,
        ctx.spatial_shapes,
        locations,
        weights,
        torch.are_deterministic_algorithms_enabled(),
    )
    return grads[0], None, grads[1], grads[2]


def _backward_fused(ctx, grad_output: Tensor):
    value, reference_points, offsets, logits = ctx.saved_tensors
    if ctx.needs_input_grad[2]:
        raise NotImplementedError(
            "torch.ops.mask2former.ms_deform_attn_fused has no gradient for its reference points; "
            "mask2former.ops.ms_deform_attn_fused has"
        )
    grads = torch.ops.mask2former.ms_deform_attn_fused_backward(
        grad_output,
        value,
        ctx.spatial_shapes,
        reference_points,
        offsets,
        logits,
        torch.are_deterministic_algorithms_enabled(),
    )
    return grads[0], None, None, grads[1], grads[2]


def _save_nothing(ctx, inputs, output) -> None:
    pass


def _refuse_double_backward(ctx, *grads):
    raise NotImplementedError(
        "multi-scale deformable attention has no second derivative: do not differentiate its "
        "gradient (create_graph=True)"
    )


if _library.is_loaded():
    _register()
