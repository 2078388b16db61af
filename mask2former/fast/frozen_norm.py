"""Convolutions with their frozen batch norm folded into the weight."""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from ..utils.twins import why_hooked, why_touched


class ConvWithFrozenNorm(Conv2d):
    """Detectron2's convolution with its frozen norm folded into the weight.

    A frozen batch norm is one factor and one offset per channel. Applying it to the weight saves a
    pass over the feature map, and another one in backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) → (B, C_out, H', W')."""
        # On CUDA one batch norm kernel is faster than several small ones that fold the weight.
        if (x.is_cuda and not torch.is_grad_enabled()) or self._is_touched():
            return super().forward(x)
        weight, offset = self._folded()
        options = (self.stride, self.padding, self.dilation, self.groups)
        saves_all = self.__dict__.get("_saves_all", False)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not saves_all:
            x = self._convolve(x, weight, offset, options)
        else:
            x = F.conv2d(x, weight, offset, *options)
        return x if self.activation is None else self.activation(x)

    def _is_touched(self) -> bool:
        """Whether somebody changed the convolution or its norm, or wants them as written."""
        if "_always_plain" in self.__dict__:
            return True
        if type(self) is not ConvWithFrozenNorm or Conv2d.forward is not _CONV_FORWARD:
            return True
        reason = why_touched(self.norm, FrozenBatchNorm2d, _NORM_METHODS) or why_hooked(self.norm)
        return reason is not None

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Weight and offset of convolution and norm in one."""
        norm = self.norm
        # In half precision a small variance would round to zero.
        dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
        scale = norm.weight * (norm.running_var.to(dtype) + norm.eps).rsqrt()
        offset = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            offset = offset + self.bias * scale
        weight = self.weight * scale.view(-1, 1, 1, 1)
        return weight.to(self.weight.dtype), offset.to(self.weight.dtype)

    def _convolve(self, x: Tensor, weight: Tensor, offset: Tensor, options: tuple) -> Tensor:
        """The convolution; its folded weight is not saved for backward but recomputed."""

        def pack(saved: Tensor) -> Tensor | None:
            return None if saved.data_ptr() == weight_address else saved

        def unpack(packed: Tensor | None) -> Tensor:
            if packed is not None:
                return packed
            with torch.no_grad():
                return self._folded()[0]

        weight_address = weight.data_ptr()
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return F.conv2d(x, weight, offset, *options)


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
