"""Convolutions with their frozen batch norm multiplied into the weight."""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn


class ConvWithFrozenNorm(Conv2d):
    """Detectron2's convolution, whose norm costs nothing.

    A frozen batch norm is one factor and one offset per channel; applied to the weight instead of
    the result, it saves reading and writing the whole feature map, and once more in backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) → (B, C_out, H', W')."""
        if x.is_cuda and not torch.is_grad_enabled():
            # One batch norm kernel against several small ones for the factors.
            return super().forward(x)
        weight, offset = self._folded()
        options = (self.stride, self.padding, self.dilation, self.groups)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            x = self._convolve(x, weight, offset, options)
        else:
            x = F.conv2d(x, weight, offset, *options)
        return x if self.activation is None else self.activation(x)

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Weight and offset of convolution and norm in one."""
        norm = self.norm
        # Half precision could not tell a small variance from zero.
        dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
        scale = norm.weight * (norm.running_var.to(dtype) + norm.eps).rsqrt()
        offset = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            offset = offset + self.bias * scale
        weight = self.weight * scale.view(-1, 1, 1, 1)
        return weight.to(self.weight.dtype), offset.to(self.weight.dtype)

    def _convolve(self, x: Tensor, weight: Tensor, offset: Tensor, options: tuple) -> Tensor:
        """The convolution; its folded weight is not kept for backward but computed once more."""

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


def fold_frozen_norms(module: nn.Module) -> nn.Module:
    """Make every convolution of a module that has a frozen batch norm a `ConvWithFrozenNorm`.

    Parameters, buffers, their names and hooks stay what they are.

    Returns:
        the module.
    """
    for child in module.modules():
        if type(child) is Conv2d and isinstance(child.norm, FrozenBatchNorm2d):
            child.__class__ = ConvWithFrozenNorm
    return module
