"""Pixel decoders based on feature pyramid networks.

A pixel decoder turns backbone features into per-pixel embeddings at the finest resolution and into
the coarser feature maps that the transformer decoder attends to. `BasePixelDecoder` is an FPN;
`TransformerEncoderPixelDecoder` (the default of MaskFormer, the predecessor) adds a transformer
encoder on its coarsest map. Mask2Former's own is in `msdeformattn.py`; `semantic_fpn.py`, `fapn.py`
and `bifpn.py` have the others that the paper compares.

Shape letters: B batch, C channels of all inner maps, C_i channels and s_i stride in pixels of
backbone feature i, E mask embedding channels, H W input height and width in pixels.
"""

from collections.abc import Callable

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ...utils.registry import register_unless_taken
from ..layers import PositionEmbeddingSine
from ..transformer_decoder.transformer import TransformerEncoder, TransformerEncoderLayer
from .build import build_pixel_decoder

__all__ = [
    "BasePixelDecoder",
    "TransformerEncoderOnly",
    "TransformerEncoderPixelDecoder",
    "build_pixel_decoder",
]

Norm = str | Callable[[int], nn.Module] | None
PixelDecoderOutput = tuple[Tensor, Tensor | None, list[Tensor]]
NUM_SCALES = 3  # coarsest maps that the transformer decoder takes


def fill_convolutions(module: nn.Module) -> None:
    """Initialise all convolutions of a module: Xavier-uniform weights, zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            weight_init.c2_xavier_fill(part)


@register_unless_taken(SEM_SEG_HEADS_REGISTRY)
class BasePixelDecoder(nn.Module):
    """A feature pyramid: 1x1 lateral and 3x3 output convolutions, nearest-neighbour upsampling.

    Args:
        input_shape: channels C_i and stride s_i of each backbone feature, of distinct strides.
        conv_dim: C.
        mask_dim: E.
        norm: norm of every convolution but the last, as Detectron2's `get_norm` takes it. "" means
            no norm but a bias.
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
        super().__init__()
        by_stride = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in by_stride]  # finest first
        self._use_bias = norm == ""

        lateral_convs: list[nn.Module | None] = []
        output_convs: list[nn.Module] = []
        for index, (_, shape) in enumerate(by_stride, start=1):
            if index == len(by_stride):
                lateral_convs.append(None)  # nothing coarser to add
                output_conv = self._output_conv(shape.channels, conv_dim, norm)
            else:
                lateral_conv = self._lateral_conv(shape.channels, conv_dim, norm)
                # Initialised once both exist, so that a seed gives the original's initial weights.
                output_conv = self._output_conv(conv_dim, conv_dim, norm, init=False)
                fill_convolutions(lateral_conv)
                fill_convolutions(output_conv)
                self.add_module(f"adapter_{index}", lateral_conv)
                lateral_convs.append(lateral_conv)
            self.add_module(f"layer_{index}", output_conv)
            output_convs.append(output_conv)
        # Plain lists, coarsest first: the modules are registered above under the original's names.
        self.lateral_convs = lateral_convs[::-1]
        self.output_convs = output_convs[::-1]

        self.mask_dim = mask_dim
        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=3, stride=1, padding=1)
        weight_init.c2_xavier_fill(self.mask_features)

        self.maskformer_num_feature_levels = NUM_SCALES

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        head = cfg.MODEL.SEM_SEG_HEAD
        missing = [name for name in head.IN_FEATURES if name not in input_shape]
        if missing:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES names {missing}, which the backbone does not "
                f"return; it returns {sorted(input_shape)}."
            )
        return {
            "input_shape": {name: input_shape[name] for name in head.IN_FEATURES},
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "norm": head.NORM,
        }

    def _lateral_conv(self, in_channels: int, conv_dim: int, norm: Norm) -> nn.Module:
        """What brings a backbone feature to C channels; its convolutions are initialised later."""
        return Conv2d(
            in_channels,
            conv_dim,
            kernel_size=1,
            bias=self._use_bias,
            norm=get_norm(norm, conv_dim),
        )

    def _output_conv(
        self, in_channels: int, conv_dim: int, norm: Norm, init: bool = True
    ) -> nn.Module:
        conv = Conv2d(
            in_channels,
            conv_dim,
            kernel_size=3,
            stride=1,
            padding=1,
            bias=self._use_bias,
            norm=get_norm(norm, conv_dim),
            activation=F.relu,
        )
        if init:
            weight_init.c2_xavier_fill(conv)
        return conv

    def _coarsest(self, feature: Tensor) -> tuple[Tensor, Tensor | None]:
        """The top of the pyramid from the coarsest backbone feature.

        Returns:
            The pyramid's (B, C, H/s_i, W/s_i), and what `forward_features` returns second.
        """
        return self.output_convs[0](feature), None

    def _merge(self, index: int, lateral: Tensor, coarser: Tensor) -> Tensor:
        """Add the pyramid's coarser map to a lateral one.

        Args:
            index: of the level, 0 the coarsest but one.
            lateral: (B, C, H/s_i, W/s_i).
            coarser: map of the level before.

        Returns:
            (B, C, H/s_i, W/s_i).
        """
        return lateral + F.interpolate(coarser, size=lateral.shape[-2:], mode="nearest")

    def _pyramid(self, features: dict[str, Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """The top-down pass.

        Args:
            features: see `forward_features`.

        Returns:
            The map (B, C, H/s_i, W/s_i) of every level, coarsest first, and what `forward_features`
            returns second.
        """
        y, transformer_features = self._coarsest(features[self.in_features[-1]])
        pyramid = [y]
        finer = zip(
            self.in_features[-2::-1], self.lateral_convs[1:], self.output_convs[1:], strict=True
        )
        for index, (name, lateral_conv, output_conv) in enumerate(finer):
            y = output_conv(self._merge(index, lateral_conv(features[name]), y))
            pyramid.append(y)
        return pyramid, transformer_features

    def forward_features(self, features: dict[str, Tensor]) -> PixelDecoderOutput:
        """Decode backbone features.

        Args:
            features: backbone features by name, each (B, C_i, H/s_i, W/s_i).

        Returns:
            Per-pixel mask embeddings (B, E, H/s_0, W/s_0) at the finest stride; the map of the
            transformer encoder, None without encoder; and the (up to) three coarsest maps
            (B, C, H/s_i, W/s_i), coarsest first.
        """
        pyramid, transformer_features = self._pyramid(features)
        multi_scale_features = pyramid[: self.maskformer_num_feature_levels]
        return self.mask_features(pyramid[-1]), transformer_features, multi_scale_features

    def forward(self, features: dict[str, Tensor]) -> PixelDecoderOutput:
        """Same as `forward_features`, which is what the head calls."""
        return self.forward_features(features)


class TransformerEncoderOnly(nn.Module):
    """A transformer encoder over the locations of a feature map.

    Args:
        d_model: C.
        nhead: number of attention heads; divides C.
        num_encoder_layers: number of layers.
        dim_feedforward: hidden width of the feed-forward blocks.
        dropout: probability, 0 to 1.
        activation: "relu", "gelu" or "glu".
        normalize_before: normalise before each block (and once at the end), not after.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        layer = TransformerEncoderLayer(
            d_model, nhead, dim_feedforward, dropout, activation, normalize_before
        )
        norm = nn.LayerNorm(d_model) if normalize_before else None
        self.encoder = TransformerEncoder(layer, num_encoder_layers, norm)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.d_model = d_model
        self.nhead = nhead

    def forward(self, src: Tensor, mask: Tensor | None, pos_embed: Tensor) -> Tensor:
        """Encode.

        Args:
            src: (B, C, H, W).
            mask: (B, H, W) bool, True at padding; or None.
            pos_embed: (B, C, H, W) positional encoding.

        Returns:
            (B, C, H, W).
        """
        sequence = src.flatten(2).permute(2, 0, 1)  # (H*W, B, C)
        pos_embed = pos_embed.flatten(2).permute(2, 0, 1)  # (H*W, B, C)
        if mask is not None:
            mask = mask.flatten(1)  # (B, H*W)
        memory = self.encoder(sequence, src_key_padding_mask=mask, pos=pos_embed)
        return memory.permute(1, 2, 0).reshape(src.shape)


@register_unless_taken(SEM_SEG_HEADS_REGISTRY)
class TransformerEncoderPixelDecoder(BasePixelDecoder):
    """`BasePixelDecoder` with a transformer encoder on the coarsest backbone feature.

    Args:
        input_shape, conv_dim, mask_dim, norm: see `BasePixelDecoder`.
        transformer_dropout: dropout probability of the encoder, 0 to 1.
        transformer_nheads: attention heads of the encoder; divides conv_dim.
        transformer_dim_feedforward: hidden width of the encoder's feed-forward blocks.
        transformer_enc_layers: number of encoder layers.
        transformer_pre_norm: normalise before each block of the encoder, not after.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        transformer_dropout: float,
        transformer_nheads: int,
        transformer_dim_feedforward: int,
        transformer_enc_layers: int,
        transformer_pre_norm: bool,
        conv_dim: int,
        mask_dim: int,
        norm: Norm = None,
    ):
        super().__init__(input_shape, conv_dim=conv_dim, mask_dim=mask_dim, norm=norm)
        in_channels = input_shape[self.in_features[-1]].channels
        self.input_proj = Conv2d(in_channels, conv_dim, kernel_size=1)
        weight_init.c2_xavier_fill(self.input_proj)
        self.transformer = TransformerEncoderOnly(
            d_model=conv_dim,
            dropout=transformer_dropout,
            nhead=transformer_nheads,
            dim_feedforward=transformer_dim_feedforward,
            num_encoder_layers=transformer_enc_layers,
            normalize_before=transformer_pre_norm,
        )
        self.pe_layer = PositionEmbeddingSine(conv_dim // 2, normalize=True)

        # The coarsest output convolution now follows the encoder, which is conv_dim wide. It is
        # removed first, so that it comes last in the state dict, as in the original's checkpoints.
        name = f"layer_{len(self.in_features)}"
        output_conv = self._output_conv(conv_dim, conv_dim, norm)
        delattr(self, name)
        self.add_module(name, output_conv)
        self.output_convs[0] = output_conv

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        mask_former = cfg.MODEL.MASK_FORMER
        return super().from_config(cfg, input_shape) | {
            "transformer_dropout": mask_former.DROPOUT,
            "transformer_nheads": mask_former.NHEADS,
            "transformer_dim_feedforward": mask_former.DIM_FEEDFORWARD,
            "transformer_enc_layers": cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS,
            "transformer_pre_norm": mask_former.PRE_NORM,
        }

    def _coarsest(self, feature: Tensor) -> tuple[Tensor, Tensor | None]:
        encoded = self.transformer(self.input_proj(feature), None, self.pe_layer(feature))
        return self.output_convs[0](encoded), encoded
