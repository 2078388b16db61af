"""The pixel decoder FaPN (Huang et al., Feature-aligned Pyramid Network, ICCV 2021).

An FPN with two changes. Feature selection replaces the lateral convolutions: channel attention
emphasises the channels of a backbone feature that matter. Feature alignment replaces the sum:
upsampling misplaces the coarser map at object boundaries, so a deformable convolution samples it
where the finer map says.

Our choices where the paper is open: no norm on the pooled channels, whose single position has no
statistics; 8 groups of offsets; a 1x1 convolution that brings the concatenation of both maps to C
channels before the 3x3 convolutions that predict offsets and modulation.

Shape letters: B batch, C channels of all inner maps, C_i channels and s_i stride in pixels of
backbone feature i, E mask embedding channels, G groups of offsets, H W input height and width in
pixels, or of a map.
"""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from ...utils.registry import register_unless_taken
from .fpn import BasePixelDecoder, Norm, fill_convolutions

__all__ = ["OFFSET_GROUPS", "FaPNPixelDecoder", "FeatureAlignment", "FeatureSelection"]

# Parts of the channels that have offsets and modulation of their own.
OFFSET_GROUPS = 8
_KERNEL_SIZE = 3


class FeatureSelection(nn.Module):
    """1x1 convolution of x + u·x, with the channel attention u = sigmoid(conv(mean of x)).

    Args:
        in_channels: C_i.
        out_channels: C.
        norm: of the result, as Detectron2's `get_norm` takes it. "" means no norm but a bias.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm = None):
        super().__init__()
        self.attention = Conv2d(in_channels, in_channels, kernel_size=1)
        self.selection = Conv2d(
            in_channels,
            out_channels,
            kernel_size=1,
            bias=norm == "",
            norm=get_norm(norm, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_i, H, W) → (B, C, H, W)."""
        attention = torch.sigmoid(self.attention(x.mean((2, 3), keepdim=True)))  # (B, C_i, 1, 1)
        return self.selection(x * (1 + attention))


class FeatureAlignment(nn.Module):
    """Upsample a map, align it with a finer one by a deformable convolution, and add both.

    The convolution is DCNv2: every position of its kernel has an offset in pixels and a modulation
    between 0 and 1, predicted from both maps. They start at 0 and 1/2.

    Args:
        channels: C, a multiple of G = `OFFSET_GROUPS`.
        norm: of the concatenated maps, as Detectron2's `get_norm` takes it. "" means no norm but a
            bias.

    Raises:
        ValueError: `channels` is no multiple of G.
    """

    def __init__(self, channels: int, norm: Norm = None):
        super().__init__()
        if channels % OFFSET_GROUPS:
            raise ValueError(
                f"Feature alignment of {channels} channels; allowed: multiples of {OFFSET_GROUPS} "
                "(groups of offsets)."
            )
        self.difference = Conv2d(
            2 * channels, channels, kernel_size=1, bias=norm == "", norm=get_norm(norm, channels)
        )
        # Two convolutions, because parts of one result would have to be copied for the operator.
        positions = OFFSET_GROUPS * _KERNEL_SIZE**2
        self.offset = Conv2d(channels, 2 * positions, _KERNEL_SIZE, padding=1)
        self.modulation = Conv2d(channels, positions, _KERNEL_SIZE, padding=1)
        self.conv = DeformConv2d(channels, channels, _KERNEL_SIZE, padding=1)

        fill_convolutions(self.difference)
        for conv in (self.offset, self.modulation):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)
        nn.init.kaiming_uniform_(self.conv.weight, a=1)  # as `fill_convolutions`
        nn.init.zeros_(self.conv.bias)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Align and add.

        Args:
            fine: (B, C, H, W).
            coarse: (B, C, H', W').

        Returns:
            (B, C, H, W).
        """
        coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        difference = self.difference(torch.cat((fine, coarse), 1))
        offset = self.offset(difference)  # (B, G·9·2, H, W)
        modulation = torch.sigmoid(self.modulation(difference))  # (B, G·9, H, W)
        # The operator takes one type: under autocast that of the weights, full precision.
        dtype = self.conv.weight.dtype
        aligned = self.conv(coarse.to(dtype), offset.to(dtype), modulation.to(dtype))
        return fine + F.relu(aligned)


@register_unless_taken(SEM_SEG_HEADS_REGISTRY)
class FaPNPixelDecoder(BasePixelDecoder):
    """An FPN with feature selection and feature alignment.

    Args:
        input_shape, mask_dim, norm: see `BasePixelDecoder`.
        conv_dim: C, a multiple of `OFFSET_GROUPS`.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        conv_dim: int,
        mask_dim: int,
        norm: Norm = None,
    ):
        super().__init__(input_shape, conv_dim=conv_dim, mask_dim=mask_dim, norm=norm)
        self.alignments = nn.ModuleList(  # coarsest first
            FeatureAlignment(conv_dim, norm) for _ in self.in_features[1:]
        )

    def _lateral_conv(self, in_channels: int, conv_dim: int, norm: Norm) -> nn.Module:
        return FeatureSelection(in_channels, conv_dim, norm)

    def _merge(self, index: int, lateral: Tensor, coarser: Tensor) -> Tensor:
        return self.alignments[index](lateral, coarser)
