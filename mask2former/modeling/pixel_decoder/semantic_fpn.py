"""The pixel decoder Semantic FPN (Kirillov et al., Panoptic Feature Pyramid Networks, CVPR 2019).

Every level of an FPN is brought to the finest resolution by stages of convolution, norm, ReLU and
twofold upsampling; the sum of all levels gives the per-pixel embeddings.

Mask2Former's paper compares it in Table 4e without stating its width. Our choice: the branches have
the C channels of the pyramid, not half of them as in Panoptic FPN, because only that has the
paper's 258 GFLOPs (with half: 203). The transformer decoder attends to the maps of the FPN.

Shape letters: B batch, C channels of all inner maps, C_i channels and s_i stride in pixels of
backbone feature i, E mask embedding channels, H W input height and width in pixels.
"""

import math
from typing import Any

import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ...utils.registry import register_unless_taken
from .fpn import BasePixelDecoder, Norm, PixelDecoderOutput

__all__ = ["SemanticFPNPixelDecoder"]


def _halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    """Height and width after a number of halvings that round up, as those of a backbone."""
    height, width = (-(-length // 2**times) for length in size)
    return height, width


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@register_unless_taken(SEM_SEG_HEADS_REGISTRY)
class SemanticFPNPixelDecoder(BasePixelDecoder):
    """An FPN whose levels are all upsampled to the finest one and summed.

    Args:
        input_shape, conv_dim, mask_dim, norm: see `BasePixelDecoder`.
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
        strides = [input_shape[name].stride for name in self.in_features[::-1]]  # coarsest first
        # A level of the finest stride has one convolution and no upsampling.
        self.branches = nn.ModuleList(
            nn.ModuleList(
                self._output_conv(conv_dim, conv_dim, norm)
                for _ in range(max(math.ceil(math.log2(stride / strides[-1])), 1))
            )
            for stride in strides
        )
        self._is_coarse = [stride > strides[-1] for stride in strides]

    def forward_features(self, features: dict[str, Tensor]) -> PixelDecoderOutput:
        """Decode backbone features; see `BasePixelDecoder.forward_features`."""
        pyramid, transformer_features = self._pyramid(features)
        multi_scale_features = pyramid[: self.maskformer_num_feature_levels]
        return self.mask_features(self._sum(pyramid)), transformer_features, multi_scale_features

    def _sum(self, pyramid: list[Tensor]) -> Tensor:
        """(B, C, H/s_i, W/s_i), coarsest first → (B, C, H/s_0, W/s_0).

        The last upsampling of all coarser levels is from half the finest size. It is linear, so
        their sum is upsampled once.
        """
        height, width = pyramid[-1].shape[-2:]
        total, half = None, None
        branches: Any = self.branches
        for y, branch, is_coarse in zip(pyramid, branches, self._is_coarse, strict=True):
            for stages_left, conv in zip(range(len(branch) - 1, -1, -1), branch, strict=True):
                y = conv(y)
                if is_coarse:
                    y = _resize(y, _halved((height, width), max(stages_left, 1)))
            if is_coarse:
                half = y if half is None else half + y
            else:
                total = y if total is None else total + y
        assert total is not None  # the finest level
        return total if half is None else total + _resize(half, (height, width))
