"""The pixel decoder BiFPN (Tan et al., EfficientDet, CVPR 2020).

Layers of a top-down and a bottom-up pass over all levels. Where maps meet, learned non-negative
weights that sum to one mix them (fast normalised fusion), then a depthwise-separable convolution,
a norm and SiLU follow.

Mask2Former's paper compares it in Table 4e without stating the number of layers. Our choice:
NUM_LAYERS = 9, with which the model has the paper's 204 GFLOPs (202 on COCO's sizes; with 8: 195,
with 10: 208). As in EfficientDet's code, maps are upsampled by nearest neighbour and downsampled by
max-pooling, and a norm follows the pointwise convolution only; SiLU follows the convolution, as in
its paper, while its code applies it before. There are no levels coarser than the backbone's.

Shape letters: B batch, C channels of all inner maps, C_i channels and s_i stride in pixels of
backbone feature i, E mask embedding channels, H W input height and width in pixels, or of a map.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ...utils.registry import register_unless_taken
from .fpn import NUM_SCALES, BasePixelDecoder, Norm, PixelDecoderOutput, fill_convolutions

__all__ = ["NUM_LAYERS", "BiFPNLayer", "BiFPNPixelDecoder", "FusionNode"]

NUM_LAYERS = 9
_EPSILON = 1e-4  # of the normalisation, as in EfficientDet


class FusionNode(nn.Module):
    """Weighted mean of maps, then a depthwise-separable 3x3 convolution, norm and SiLU.

    Map i has the weight relu(w_i) / (Σ relu(w_j) + ε).

    Args:
        num_inputs: number of maps, at least 2.
        channels: C.
        norm: as Detectron2's `get_norm` takes it. "" means no norm but a bias.
    """

    def __init__(self, num_inputs: int, channels: int, norm: Norm = None):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_inputs))
        self.depthwise = Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = Conv2d(
            channels,
            channels,
            kernel_size=1,
            bias=norm == "",
            norm=get_norm(norm, channels),
            activation=F.silu,
        )
        fill_convolutions(self)

    def forward(self, *maps: Tensor) -> Tensor:
        """Fuse maps (B, C, H, W) of one size to one of the same shape."""
        weights = F.relu(self.weights)
        # In the maps' type: autocast would take the widest, and copy the maps to it.
        first, *others = (weights / (weights.sum() + _EPSILON)).to(maps[0].dtype)
        fused = maps[0] * first
        for x, weight in zip(maps[1:], others, strict=True):
            fused = torch.addcmul(fused, x, weight)
        return self.pointwise(self.depthwise(fused))


class BiFPNLayer(nn.Module):
    """A top-down pass, then a bottom-up pass which also sees the maps before the layer.

    Args:
        strides: of the levels in pixels, finest first.
        channels: C.
        norm: see `FusionNode`.
        bottom_up: False leaves out the second pass, if only the finest map is used.
    """

    def __init__(
        self, strides: list[int], channels: int, norm: Norm = None, *, bottom_up: bool = True
    ):
        super().__init__()
        num_levels = len(strides)
        self.ratios = [coarse / fine for fine, coarse in zip(strides, strides[1:], strict=False)]
        # Of all levels but the coarsest, which has nothing above it; finest first.
        self.top_down = nn.ModuleList(FusionNode(2, channels, norm) for _ in range(num_levels - 1))
        # Of all levels but the finest. The coarsest has no map of the top-down pass.
        self.bottom_up = nn.ModuleList(
            FusionNode(3 if level < num_levels - 1 else 2, channels, norm)
            for level in range(1, num_levels)
            if bottom_up
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Fuse maps (B, C, H/s_i, W/s_i), finest first, to as many of the same shapes."""
        fused = [maps[-1]]  # coarsest first
        for x, node in zip(maps[-2::-1], reversed(self.top_down), strict=True):
            fused.append(node(x, F.interpolate(fused[-1], size=x.shape[-2:], mode="nearest")))
        fused.reverse()
        if not self.bottom_up:
            return fused
        outputs = [fused[0]]
        for level, (ratio, node) in enumerate(zip(self.ratios, self.bottom_up, strict=True), 1):
            finer = _downsample(outputs[-1], maps[level].shape[-2:], ratio)
            is_coarsest = level == len(maps) - 1
            inputs = (maps[level],) if is_coarsest else (maps[level], fused[level])
            outputs.append(node(*inputs, finer))
        return outputs


def _downsample(x: Tensor, size: torch.Size, ratio: float) -> Tensor:
    """Max-pool (B, C, H, W) to a height and width that are about `ratio` times smaller."""
    stride = round(ratio)
    if x.shape[-2:] != size and stride > 1:
        x = F.max_pool2d(x, stride + 1, stride, stride // 2)
    # Pooling rounds sizes up as ResNet and Swin do; other backbones may round them down.
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="nearest")


@register_unless_taken(SEM_SEG_HEADS_REGISTRY)
class BiFPNPixelDecoder(nn.Module):
    """1x1 convolutions of the backbone features, BiFPN layers, a 3x3 convolution of the finest map.

    Args:
        input_shape, conv_dim, mask_dim, norm: see `BasePixelDecoder`.
        num_layers: number of layers, at least 1.
        last_bottom_up: False leaves out the bottom-up pass of the last layer, for heads that use
            the mask features only: its parameters would get no gradient, which distributed training
            does not allow.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        conv_dim: int,
        mask_dim: int,
        norm: Norm = None,
        num_layers: int = NUM_LAYERS,
        last_bottom_up: bool = True,
    ):
        super().__init__()
        by_stride = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in by_stride]  # finest first
        self.lateral_convs = nn.ModuleList(
            Conv2d(
                shape.channels,
                conv_dim,
                kernel_size=1,
                bias=norm == "",
                norm=get_norm(norm, conv_dim),
            )
            for _, shape in by_stride
        )
        fill_convolutions(self.lateral_convs)
        strides = [shape.stride for _, shape in by_stride]
        self.layers = nn.ModuleList(
            BiFPNLayer(strides, conv_dim, norm, bottom_up=last_bottom_up or index < num_layers - 1)
            for index in range(num_layers)
        )
        self.mask_dim = mask_dim
        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=3, padding=1)
        fill_convolutions(self.mask_features)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        scales_are_unused = head.NAME in ("PerPixelBaselineHead", "PerPixelBaselinePlusHead") or (
            head.NAME == "MaskFormerHead"
            and cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE != "multi_scale_pixel_decoder"
        )
        return BasePixelDecoder.from_config(cfg, input_shape) | {
            "num_layers": head.get("BIFPN_LAYERS", NUM_LAYERS),
            "last_bottom_up": not scales_are_unused,
        }

    def forward_features(self, features: dict[str, Tensor]) -> PixelDecoderOutput:
        """Decode backbone features; see `BasePixelDecoder.forward_features`."""
        maps = [
            conv(features[name])
            for name, conv in zip(self.in_features, self.lateral_convs, strict=True)
        ]
        for layer in self.layers:
            maps = layer(maps)
        return self.mask_features(maps[0]), None, maps[: -NUM_SCALES - 1 : -1]

    def forward(self, features: dict[str, Tensor]) -> PixelDecoderOutput:
        """Same as `forward_features`, which is what the head calls."""
        return self.forward_features(features)
