"""Convolutions with their frozen batch norm folded into the weight.

A frozen batch norm is one factor and one offset per channel. They are computed from the norms'
buffers in each forward pass, for all convolutions of the backbone together (`norms_together`).
Nothing is kept between passes: code that writes to `.data` would not be noticed.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from ..utils.twins import why_hooked, why_touched

# Within `norms_together`: scale and offset by the id of the convolution.
_together: ContextVar[dict[int, tuple[Tensor, Tensor]] | None] = ContextVar(
    "_together", default=None
)


class ConvWithFrozenNorm(Conv2d):
    """Detectron2's convolution with its frozen norm folded into the weight.

    This saves a pass over the feature map, and another one in backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) → (B, C_out, H', W')."""
        if self._is_touched():
            return super().forward(x)
        compiling = torch.compiler.is_compiling()
        saves_all = self.__dict__.get("_saves_all", False)
        scale, offset = _terms(self)
        options = (self.stride, self.padding, self.dilation, self.groups)
        if not (x.is_cpu or compiling):
            x = F.conv2d(x, *self._folded_for(x, scale, offset), *options)
        elif torch.is_grad_enabled() and not compiling and not saves_all:
            x = self._convolve(x, scale, offset, options)
        else:
            x = F.conv2d(x, *self._folded(scale, offset), *options)
        return x if self.activation is None else self.activation(x)

    def _is_touched(self) -> bool:
        """Whether somebody changed the convolution or its norm, or wants them as written."""
        if "_always_plain" in self.__dict__:
            return True
        if type(self) is not ConvWithFrozenNorm or Conv2d.forward is not _CONV_FORWARD:
            return True
        reason = why_touched(self.norm, FrozenBatchNorm2d, _NORM_METHODS) or why_hooked(self.norm)
        return reason is not None

    def _folded(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and offset of convolution and norm in one."""
        if self.bias is not None:
            offset = offset + self.bias * scale
        return self._scaled(scale), offset.to(self.weight.dtype)

    def _scaled(self, scale: Tensor) -> Tensor:
        return (self.weight * scale.view(-1, 1, 1, 1)).to(self.weight.dtype)

    def _folded_for(self, x: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """`_folded`, by one kernel in the dtype and layout in which an accelerator reads it.

        The weight is saved for backward: computing it again would be one more kernel to launch, and
        it is small beside the activations.
        """
        dtype = product_dtype(self.weight)
        if scale.requires_grad:  # of a norm that somebody trains
            weight, offset = self._folded(scale, offset)
            return weight.to(dtype, memory_format=_layout(x)), offset.to(dtype)
        if self.bias is not None:
            offset = offset + self.bias * scale
        weight = _ScaleTo.apply(self.weight, scale.view(-1, 1, 1, 1), dtype, _layout(x))
        return weight, offset.to(dtype)

    def _convolve(self, x: Tensor, scale: Tensor, offset: Tensor, options: tuple) -> Tensor:
        """The convolution; its folded weight is not saved for backward but recomputed."""

        def pack(saved: Tensor) -> Tensor | None:
            return None if saved.data_ptr() == weight_address else saved

        def unpack(packed: Tensor | None) -> Tensor:
            if packed is not None:
                return packed
            with torch.no_grad():
                return self._scaled(scale)

        weight, offset = self._folded(scale, offset)
        weight_address = weight.data_ptr()
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return F.conv2d(x, weight, offset, *options)


class _ScaleTo(torch.autograd.Function):
    """x · scale, written directly in a dtype and memory format; differentiable in x."""

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, dtype: torch.dtype, layout: torch.memory_format
    ) -> Tensor:
        return torch.mul(x, scale, out=torch.empty_like(x, dtype=dtype, memory_format=layout))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, scale, _, _ = inputs
        ctx.save_for_backward(scale)
        ctx.dtype, ctx.layout = x.dtype, _layout(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (scale,) = ctx.saved_tensors
        # In the layout of the parameter, which optimizers and DDP expect.
        return _ScaleTo.apply(grads[0], scale, ctx.dtype, ctx.layout), None, None, None


def _layout(x: Tensor) -> torch.memory_format:
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a convolution or matrix product with this weight, also under autocast."""
    device = weight.device.type
    # The meta device has no autocast, and asking for it raises.
    if weight.is_meta or weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def _terms(conv: Conv2d) -> tuple[Tensor, Tensor]:
    """Scale and offset of the convolution's norm, (C_out,) each."""
    if not torch.compiler.is_compiling():
        together = _together.get()
        if together is not None and id(conv) in together:
            scale, offset = together[id(conv)]
            # Not if they were rounded for autocast, which the convolution runs without.
            if offset.dtype in (scale.dtype, product_dtype(conv.weight)):
                return scale, offset
    return _scale_and_offset(*_buffers(conv.norm), conv.norm.eps)


def _buffers(norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def _scale_and_offset(
    weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    # In half precision a small variance would round to zero.
    dtype = torch.promote_types(variance.dtype, torch.float32)
    scale = weight * (variance.to(dtype) + eps).rsqrt()
    return scale, bias - mean * scale


@contextmanager
def norms_together(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Compute scale and offset of all folded norms at once, for convolutions called within.

    One norm after the other would be five small kernels each. The values must be used for one
    forward pass only.
    """
    groups: dict[tuple, list[Conv2d]] = defaultdict(list)
    for conv in modules:
        if type(conv) is ConvWithFrozenNorm and type(conv.norm) is FrozenBatchNorm2d:
            buffers = _buffers(conv.norm)
            if not any(x.requires_grad for x in buffers):
                kinds = tuple((x.device, x.dtype) for x in buffers)
                groups[kinds, conv.norm.eps, product_dtype(conv.weight)].append(conv)
    together = {}
    for (_, eps, dtype), convs in groups.items():
        with torch.no_grad():
            norms = zip(*(_buffers(conv.norm) for conv in convs), strict=True)
            weight, bias, mean, variance = (torch.cat(x) for x in norms)
            scale, offset = _scale_and_offset(weight, bias, mean, variance, eps)
            sizes = [len(conv.norm.running_var) for conv in convs]
            offsets = offset.split(sizes)
            # On a CPU, and with a bias to add, the convolution casts.
            cast = offsets if offset.is_cpu else offset.to(dtype).split(sizes)
        for i, (conv, factor) in enumerate(zip(convs, scale.split(sizes), strict=True)):
            together[id(conv)] = factor, (cast if conv.bias is None else offsets)[i]
    token = _together.set(together)
    try:
        yield
    finally:
        _together.reset(token)


_CONV_FORWARD = Conv2d.forward
_NORM_METHODS = {"forward": FrozenBatchNorm2d.forward}


def fold_frozen_norms(module: nn.Module) -> nn.Module:
    """Make every convolution with a frozen batch norm a `ConvWithFrozenNorm`.

    Detectron2's class cannot be marked with `has_fast_twin`, so the modules change their class.
    Parameters, buffers, their names and hooks stay.

    Returns:
        the module.
    """
    for child in module.modules():
        has_frozen_norm = type(child) is Conv2d and type(child.norm) is FrozenBatchNorm2d
        if has_frozen_norm and "_always_plain" not in child.__dict__:
            child.__class__ = ConvWithFrozenNorm
    return module
