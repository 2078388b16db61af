"""Pixel decoder: multi-scale deformable attention encoder with an FPN level above it.

Six layers of deformable self-attention over the 1/32, 1/16 and 1/8 features (paper, sections 3.2.2
and 4.1); the 1/8 result, upsampled and added to the 1/4 backbone feature, gives the per-pixel
embedding.

Shape letters: B batch, C channels, H W size of a level, S = ΣH·W values of all levels, L levels.
"""

import copy
import math
from collections.abc import Sequence

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ...ops import MSDeformAttn
from ...utils.registry import register_unless_taken
from ...utils.shape_cache import sizes_tensor
from ...utils.twins import has_fast_twin
from ..layers import PositionEmbeddingSine
from ..layers.mlp import _get_activation_fn


class MSDeformAttnTransformerEncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward, each with residual connection and layer norm.

    Args:
        d_model: channels C.
        d_ffn: hidden width of the feed-forward network.
        dropout: probability.
        activation: "relu", "gelu" or "glu".
        n_levels: levels L.
        n_heads: heads.
        n_points: points per level and head.
    """

    def __init__(
        self,
        d_model: int = 256,
        d_ffn: int = 1024,
        dropout: float = 0.1,
        activation: str = "relu",
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
    ):
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.activation = _get_activation_fn(activation)
        self.dropout2 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.dropout3 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)

    @staticmethod
    def with_pos_embed(tensor: Tensor, pos: Tensor | None) -> Tensor:
        return tensor if pos is None else tensor + pos

    def forward_ffn(self, src: Tensor) -> Tensor:
        """The feed-forward network with residual connection and norm: (B, S, C) → (B, S, C)."""
        hidden = self.dropout2(self.activation(self.linear1(src)))
        return self.norm2(src + self.dropout3(self.linear2(hidden)))

    @has_fast_twin
    def forward(
        self,
        src: Tensor,
        pos: Tensor | None,
        reference_points: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Apply the layer.

        Args:
            src: (B, S, C).
            pos: (B, S, C) position encoding, added to the queries.
            reference_points: (1 or B, S, L, 2) x and y in [0, 1].
            spatial_shapes: (L, 2) int64, height and width of each level.
            level_start_index: (L,) int64, index of each level's first value.
            padding_mask: (B, S) bool, True at padding.

        Returns:
            (B, S, C).
        """
        attended = self.self_attn(
            self.with_pos_embed(src, pos),
            reference_points,
            src,
            spatial_shapes,
            level_start_index,
            padding_mask,
        )
        src = self.norm1(src + self.dropout1(attended))
        return self.forward_ffn(src)


class MSDeformAttnTransformerEncoder(nn.Module):
    """A stack of independent copies of a layer.

    Args:
        encoder_layer: the layer to copy.
        num_layers: number of copies.
    """

    def __init__(self, encoder_layer: nn.Module, num_layers: int):
        super().__init__()
        # Copies, so that a seed gives the original's initial weights.
        self.layers = nn.ModuleList(copy.deepcopy(encoder_layer) for _ in range(num_layers))
        self.num_layers = num_layers

    @staticmethod
    def get_reference_points(
        spatial_shapes: Tensor | Sequence[tuple[int, int]],
        valid_ratios: Tensor | None,
        device: torch.device | str,
    ) -> Tensor:
        """Reference points: the centre of every value of every level.

        Args:
            spatial_shapes: height and width of each level.
            valid_ratios: (B, L, 2) share of each level's width and height that is not padding; None
                without padding.
            device: of the result.

        Returns:
            (1 or B, S, L, 2) x and y in (0, 1), over the part that is not padding.
        """
        if isinstance(spatial_shapes, Tensor):
            spatial_shapes = spatial_shapes.tolist()
        centers = []
        for height, width in spatial_shapes:
            y, x = torch.meshgrid(
                (torch.arange(height, device=device) + 0.5) / height,
                (torch.arange(width, device=device) + 0.5) / width,
                indexing="ij",
            )
            centers.append(torch.stack((x, y), -1).flatten(0, 1))
        num_levels = len(centers)
        if valid_ratios is None:
            return torch.cat(centers)[None, :, None].expand(-1, -1, num_levels, -1)
        # Normalise by the valid part of the value's own level, then scale to each level.
        relative = torch.cat(
            [center / valid_ratios[:, None, level] for level, center in enumerate(centers)], 1
        )  # (B, S, 2)
        return relative[:, :, None] * valid_ratios[:, None]

    def forward(
        self,
        src: Tensor,
        spatial_shapes: Tensor | Sequence[tuple[int, int]],
        level_start_index: Tensor,
        valid_ratios: Tensor | None = None,
        pos: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Encode; arguments as in `MSDeformAttnTransformerEncoderLayer.forward`."""
        reference_points = self.get_reference_points(spatial_shapes, valid_ratios, src.device)
        output = src
        for layer in self.layers:
            output = layer(
                output, pos, reference_points, spatial_shapes, level_start_index, padding_mask
            )
        return output


class MSDeformAttnTransformerEncoderOnly(nn.Module):
    """Flatten the levels, add level embeddings, encode.

    Args:
        d_model: channels C.
        nhead: heads.
        num_encoder_layers: number of layers.
        dim_feedforward: hidden width of the feed-forward networks.
        dropout: probability.
        activation: "relu", "gelu" or "glu".
        num_feature_levels: levels L.
        enc_n_points: points per level and head.
    """

    def __init__(
        self,
        d_model: int = 256,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        dim_feedforward: int = 1024,
        dropout: float = 0.1,
        activation: str = "relu",
        num_feature_levels: int = 4,
        enc_n_points: int = 4,
    ):
        super().__init__()
        self.d_model = d_model
        self.nhead = nhead
        encoder_layer = MSDeformAttnTransformerEncoderLayer(
            d_model, dim_feedforward, dropout, activation, num_feature_levels, nhead, enc_n_points
        )
        self.encoder = MSDeformAttnTransformerEncoder(encoder_layer, num_encoder_layers)
        self.level_embed = nn.Parameter(torch.empty(num_feature_levels, d_model))
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module._reset_parameters()
        nn.init.normal_(self.level_embed)

    @has_fast_twin
    def forward(
        self, srcs: list[Tensor], pos_embeds: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode L levels.

        Args:
            srcs: for each level (B, C, H, W).
            pos_embeds: position encodings of the same shapes.

        Returns:
            memory (B, S, C); height and width of each level (L, 2), and the index of each level's
            first value (L,), int64.
        """
        src, pos = self.flatten_levels(srcs, pos_embeds)
        shapes = [tuple(x.shape[-2:]) for x in srcs]
        spatial_shapes = sizes_tensor(shapes, torch.int64, src.device)
        sizes = spatial_shapes.prod(1)
        level_start_index = sizes.cumsum(0) - sizes
        # An exporter cannot read the values of a tensor, but takes symbolic sizes.
        given = shapes if torch.compiler.is_exporting() else spatial_shapes
        memory = self.encoder(src, given, level_start_index, pos=pos)
        return memory, spatial_shapes, level_start_index

    def flatten_levels(self, srcs: list[Tensor], pos_embeds: list[Tensor]) -> tuple[Tensor, Tensor]:
        """All levels as one sequence (B, S, C), and its position plus level embedding."""
        src = torch.cat([x.flatten(2).transpose(1, 2) for x in srcs], 1)
        pos = torch.cat(
            [
                pos_embed.flatten(2).transpose(1, 2) + self.level_embed[level]
                for level, pos_embed in enumerate(pos_embeds)
            ],
            1,
        )
        # The residual stream is in full precision, also under autocast.
        return src.to(self.level_embed.dtype), pos


@register_unless_taken(SEM_SEG_HEADS_REGISTRY)
class MSDeformAttnPixelDecoder(nn.Module):
    """The pixel decoder of Mask2Former.

    Args:
        input_shape: channels and stride of the backbone features.
        transformer_dropout: probability in the encoder.
        transformer_nheads: heads of the encoder.
        transformer_dim_feedforward: hidden width of its feed-forward networks.
        transformer_enc_layers: number of encoder layers.
        conv_dim: channels C of the encoder and of the FPN levels.
        mask_dim: channels of the per-pixel embedding.
        norm: normalisation of the FPN convolutions, a name of `detectron2.layers.get_norm`.
        transformer_in_features: backbone features that the encoder works on.
        common_stride: stride of the per-pixel embedding.
        transformer_num_points: points per level and head.
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
        conv_dim: int,
        mask_dim: int,
        norm: str | None = None,
        transformer_in_features: list[str],
        common_stride: int,
        transformer_num_points: int = 4,
    ):
        super().__init__()
        by_stride = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in by_stride]  # from fine to coarse
        self.feature_strides = [shape.stride for _, shape in by_stride]
        self.feature_channels = [shape.channels for _, shape in by_stride]
        missing = sorted(set(transformer_in_features) - set(self.in_features))
        if missing:
            raise ValueError(
                "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES names "
                f"{missing}, which are not among the head's input features {self.in_features}"
            )
        encoded = [(k, v) for k, v in by_stride if k in transformer_in_features]
        self.transformer_in_features = [name for name, _ in encoded]
        self.transformer_feature_strides = [shape.stride for _, shape in encoded]
        self.transformer_num_feature_levels = len(encoded)

        # From coarse to fine, 1/32 first.
        convs = [nn.Conv2d(shape.channels, conv_dim, kernel_size=1) for _, shape in encoded[::-1]]
        self.input_proj = nn.ModuleList(
            nn.Sequential(conv, nn.GroupNorm(32, conv_dim)) for conv in convs
        )
        for conv in convs:
            nn.init.xavier_uniform_(conv.weight, gain=1)
            nn.init.zeros_(conv.bias)

        self.transformer = MSDeformAttnTransformerEncoderOnly(
            d_model=conv_dim,
            dropout=transformer_dropout,
            nhead=transformer_nheads,
            dim_feedforward=transformer_dim_feedforward,
            num_encoder_layers=transformer_enc_layers,
            num_feature_levels=self.transformer_num_feature_levels,
            enc_n_points=transformer_num_points,
        )
        self.pe_layer = PositionEmbeddingSine(conv_dim // 2, normalize=True)

        self.mask_dim = mask_dim
        self.mask_features = Conv2d(conv_dim, mask_dim, kernel_size=1)
        weight_init.c2_xavier_fill(self.mask_features)

        self.maskformer_num_feature_levels = 3
        self.common_stride = common_stride
        finest = min(self.transformer_feature_strides)
        self.num_fpn_levels = int(math.log2(finest) - math.log2(common_stride))
        lateral_convs, output_convs = [], []
        for index, channels in enumerate(self.feature_channels[: self.num_fpn_levels]):
            lateral = Conv2d(
                channels, conv_dim, kernel_size=1, bias=norm == "", norm=get_norm(norm, conv_dim)
            )
            output = Conv2d(
                conv_dim,
                conv_dim,
                kernel_size=3,
                padding=1,
                bias=norm == "",
                norm=get_norm(norm, conv_dim),
                activation=F.relu,
            )
            weight_init.c2_xavier_fill(lateral)
            weight_init.c2_xavier_fill(output)
            self.add_module(f"adapter_{index + 1}", lateral)
            self.add_module(f"layer_{index + 1}", output)
            lateral_convs.append(lateral)
            output_convs.append(output)
        # From coarse to fine, the order in which they run.
        self.lateral_convs = lateral_convs[::-1]
        self.output_convs = output_convs[::-1]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        head = cfg.MODEL.SEM_SEG_HEAD
        arguments = {
            "input_shape": {k: v for k, v in input_shape.items() if k in head.IN_FEATURES},
            "conv_dim": head.CONVS_DIM,
            "mask_dim": head.MASK_DIM,
            "norm": head.NORM,
            "transformer_dropout": cfg.MODEL.MASK_FORMER.DROPOUT,
            "transformer_nheads": cfg.MODEL.MASK_FORMER.NHEADS,
            # Fixed in the original; MASK_FORMER.DIM_FEEDFORWARD is the transformer decoder's.
            "transformer_dim_feedforward": 1024,
            "transformer_enc_layers": head.TRANSFORMER_ENC_LAYERS,
            "transformer_in_features": head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES,
            "common_stride": head.COMMON_STRIDE,
        }
        # Subclasses with the original constructor do not take it.
        num_points = head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS
        if num_points != 4:
            arguments["transformer_num_points"] = num_points
        return arguments

    def forward_features(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Encode backbone features.

        Under autocast, matrix products, convolutions and the sampled values are in half precision;
        normalisation, residuals, sampling locations, attention weights and sums stay in fp32.

        Args:
            features: ``{name: (B, C_in, H, W)}``.

        Returns:
            per-pixel embedding (B, mask_dim, H/4, W/4); the coarsest encoded level; the three
            levels for the transformer decoder from 1/32 to 1/8, each (B, C, H, W).
        """
        srcs, pos = [], []
        for projection, name in zip(
            self.input_proj, reversed(self.transformer_in_features), strict=True
        ):
            feature = _as_parameter(features[name], next(projection.parameters()))
            srcs.append(projection(feature))
            pos.append(self.pe_layer(feature))
        memory, _, _ = self.transformer(srcs, pos)

        shapes = [src.shape[-2:] for src in srcs]
        levels = memory.split([height * width for height, width in shapes], dim=1)
        out = [
            level.unflatten(1, shape).permute(0, 3, 1, 2)
            for level, shape in zip(levels, shapes, strict=True)
        ]
        finer_features = [features[k] for k in reversed(self.in_features[: self.num_fpn_levels])]
        mask_features, finer_levels = self.add_fpn_levels(out[-1], finer_features)
        out += finer_levels
        return mask_features, out[0], out[: self.maskformer_num_feature_levels]

    @has_fast_twin
    def add_fpn_levels(self, finest: Tensor, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Add the FPN levels above the encoded ones.

        Args:
            finest: the finest encoded level (B, C, H, W).
            features: backbone features of the levels to add, from coarse to fine.

        Returns:
            the per-pixel embedding; the levels added.
        """
        levels = [finest]
        for feature, lateral, output in zip(
            features, self.lateral_convs, self.output_convs, strict=True
        ):
            current = lateral(_as_parameter(feature, lateral.weight))
            upsampled = F.interpolate(
                levels[-1], size=current.shape[-2:], mode="bilinear", align_corners=False
            )
            levels.append(output(current + upsampled))
        return self.mask_features(levels[-1]), levels[1:]


def _as_parameter(x: Tensor, parameter: Tensor) -> Tensor:
    """Convert backbone features to the precision of this decoder, unless autocast does."""
    if torch.is_autocast_enabled(x.device.type) or not parameter.is_floating_point():
        return x
    return x.to(parameter.dtype)
