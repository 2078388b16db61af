"""Masked-attention transformer decoder (paper, section 3.2).

Nine layers visit the three scales of the pixel decoder round robin. A layer is masked
cross-attention, self-attention and feed-forward network, in that order; in cross-attention a query
sees only the foreground of the mask that the previous layer predicted for it. Classes and masks are
predicted from the learnable query features and after every layer.

Shape letters: B batch, Q queries, C hidden channels, M heads, K classes, L = H·W locations of a
scale.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d
from torch import Tensor, nn

from ...utils.twins import has_fast_twin
from ..layers import (
    MLP,
    CrossAttentionLayer,
    FFNLayer,
    PositionEmbeddingSine,
    SelfAttentionLayer,
)
from ..layers.mlp import _get_activation_fn
from .build import TRANSFORMER_DECODER_REGISTRY
from .query_pruning import QueryPruning, take_queries, take_rows

__all__ = [
    "MLP",
    "CrossAttentionLayer",
    "FFNLayer",
    "MultiScaleMaskedTransformerDecoder",
    "Scale",
    "SelfAttentionLayer",
    "_get_activation_fn",
]


class Scale(NamedTuple):
    """What one decoder layer attends to.

    Attributes:
        memory: (L, B, C) projected features plus level embedding.
        pos: (L, B, C) position encoding.
        sizes: (H, W) of each map in `memory`: of one, unless a variant concatenates several.
    """

    memory: Tensor
    pos: Tensor
    sizes: tuple[tuple[int, int], ...]

    @property
    def mask_size(self) -> tuple[Any, ...]:
        """The size of attention masks: (H, W) of the map, or `sizes` of several."""
        return self.sizes[0] if len(self.sizes) == 1 else self.sizes


@TRANSFORMER_DECODER_REGISTRY.register()
class MultiScaleMaskedTransformerDecoder(nn.Module):
    """The decoder of Mask2Former.

    Args:
        in_channels: channels of the pixel decoder's multi-scale features.
        mask_classification: must be True; per-pixel classification is another architecture.
        num_classes: K, without the no-object class.
        hidden_dim: C.
        num_queries: Q.
        nheads: M.
        dim_feedforward: hidden width of the feed-forward layers.
        dec_layers: number of layers (9 in the paper; predictions are one more).
        pre_norm: layer norm before each sub-layer instead of after.
        mask_dim: channels of mask embeddings and of the per-pixel features.
        enforce_input_project: project the features even where in_channels == hidden_dim.
        num_feature_levels: number of scales.
        dropout: probability, on attention weights and residual branches. The paper found dropout
            unnecessary (section 3.2.3).
        cross_attention: builds the cross-attention of a layer, with the arguments of
            `CrossAttentionLayer`.
    """

    _version = 2
    reads_masks = True  # cross-attention is called with masks of the previous prediction
    query_pruning: QueryPruning | None = None  # in inference, see `set_query_pruning`

    @configurable
    def __init__(
        self,
        in_channels: int,
        mask_classification: bool = True,
        *,
        num_classes: int,
        hidden_dim: int,
        num_queries: int,
        nheads: int,
        dim_feedforward: int,
        dec_layers: int,
        pre_norm: bool,
        mask_dim: int,
        enforce_input_project: bool,
        num_feature_levels: int = 3,
        dropout: float = 0.0,
        cross_attention: Callable[..., nn.Module] = CrossAttentionLayer,
    ):
        super().__init__()
        if not mask_classification:
            raise ValueError("MultiScaleMaskedTransformerDecoder only does mask classification")
        self.mask_classification = mask_classification
        self.pe_layer = PositionEmbeddingSine(hidden_dim // 2, normalize=True)
        self.num_heads = nheads
        self.num_layers = dec_layers
        layer: dict[str, Any] = {"dropout": dropout, "normalize_before": pre_norm}
        self.transformer_self_attention_layers = nn.ModuleList()
        self.transformer_cross_attention_layers = nn.ModuleList()
        self.transformer_ffn_layers = nn.ModuleList()
        # Layer by layer, so that a seed gives the original's initial weights.
        for _ in range(dec_layers):
            self.transformer_self_attention_layers.append(
                SelfAttentionLayer(hidden_dim, nheads, **layer)
            )
            self.transformer_cross_attention_layers.append(
                cross_attention(hidden_dim, nheads, **layer)
            )
            self.transformer_ffn_layers.append(FFNLayer(hidden_dim, dim_feedforward, **layer))
        self.decoder_norm = nn.LayerNorm(hidden_dim)

        self.num_queries = num_queries
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)

        self.num_feature_levels = num_feature_levels
        self.level_embed = nn.Embedding(self.num_feature_levels, hidden_dim)
        self.input_proj = nn.ModuleList()
        for _ in range(self.num_feature_levels):
            if in_channels != hidden_dim or enforce_input_project:
                self.input_proj.append(Conv2d(in_channels, hidden_dim, kernel_size=1))
                weight_init.c2_xavier_fill(self.input_proj[-1])
            else:
                self.input_proj.append(nn.Sequential())

        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, mask_classification: bool) -> dict:
        if cfg.MODEL.MASK_FORMER.DEC_LAYERS < 1:
            raise ValueError(
                f"MODEL.MASK_FORMER.DEC_LAYERS={cfg.MODEL.MASK_FORMER.DEC_LAYERS} must be at least "
                "1: it counts the prediction from the queries and one for each layer"
            )
        return {
            "in_channels": in_channels,
            "mask_classification": mask_classification,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "hidden_dim": cfg.MODEL.MASK_FORMER.HIDDEN_DIM,
            "num_queries": cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES,
            "nheads": cfg.MODEL.MASK_FORMER.NHEADS,
            "dim_feedforward": cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD,
            # The key counts predictions: one from the queries, one after each layer.
            "dec_layers": cfg.MODEL.MASK_FORMER.DEC_LAYERS - 1,
            "pre_norm": cfg.MODEL.MASK_FORMER.PRE_NORM,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "enforce_input_project": cfg.MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ,
        }

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        """Checkpoints older than version 2 call the query features ``static_query``."""
        version = local_metadata.get("version", None)
        if version is None or version < 2:
            for key in [k for k in state_dict if k.startswith(prefix) and "static_query" in k]:
                state_dict[key.replace("static_query", "query_feat")] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    @has_fast_twin
    def forward(
        self, x: list[Tensor], mask_features: Tensor, mask: Tensor | None = None
    ) -> dict[str, Any]:
        """Predict from the pixel decoder's features.

        Args:
            x: three (B, in_channels, H, W), from 1/32 to 1/8 resolution.
            mask_features: (B, mask_dim, H/4, W/4) per-pixel embeddings.
            mask: not used (argument of the original): images are padded, not masked.

        Returns:
            dict with `pred_logits` (B, Q, K+1), `pred_masks` (B, Q, H/4, W/4) logits and
            `aux_outputs`, the same two for each earlier prediction in order. With query pruning,
            predictions of layers behind it have fewer queries.
        """
        del mask
        scales = self.project_features(x)
        batch = mask_features.shape[0]
        query_embed = self.query_embed.weight.unsqueeze(1).repeat(1, batch, 1)  # (Q, B, C)
        output = self.query_feat.weight.unsqueeze(1).repeat(1, batch, 1)  # (Q, B, C)

        predictions_class, predictions_mask = [], []
        outputs_class, outputs_mask, attn_mask = self.forward_prediction_heads(
            output, mask_features, attn_mask_target_size=scales[0].mask_size
        )
        predictions_class.append(outputs_class)
        predictions_mask.append(outputs_mask)
        for i in range(self.num_layers):
            # A query with an empty mask attends everywhere.
            attn_mask = attn_mask & ~attn_mask.all(-1, keepdim=True)
            output = self.forward_layer(i, output, query_embed, scales[i % len(scales)], attn_mask)
            outputs_class, outputs_mask, attn_mask = self.forward_prediction_heads(
                output,
                mask_features,
                attn_mask_target_size=scales[(i + 1) % len(scales)].mask_size,
            )
            predictions_class.append(outputs_class)
            predictions_mask.append(outputs_mask)
            remaining = self.remaining_queries(i + 1, outputs_class)
            if remaining is not None:
                output, query_embed = (take_queries(x, remaining) for x in (output, query_embed))
                attn_mask = take_rows(attn_mask, remaining)

        return {
            "pred_logits": predictions_class[-1],
            "pred_masks": predictions_mask[-1],
            "aux_outputs": self._set_aux_loss(predictions_class, predictions_mask),
        }

    def remaining_queries(self, num_layers: int, outputs_class: Tensor) -> Tensor | None:
        """The queries that go on after `num_layers` layers; None: all.

        Args:
            num_layers: that have run.
            outputs_class: (B, Q, K+1) class logits of the last of them.

        Returns:
            (B, N) indices, see `QueryPruning.remaining`.
        """
        pruning = self.query_pruning
        if self.training or pruning is None or num_layers != pruning.after:
            return None
        return pruning.remaining(outputs_class)

    def project_features(self, x: list[Tensor]) -> list[Scale]:
        """Turn feature maps into the sequences to which the layers attend round robin."""
        if len(x) != self.num_feature_levels:
            raise ValueError(f"expected {self.num_feature_levels} feature scales, got {len(x)}")
        scales = []
        for level, features in enumerate(x):
            size = (features.shape[-2], features.shape[-1])
            pos = self.pe_layer(features, None).flatten(2).permute(2, 0, 1)
            features = self.input_proj[level](features).flatten(2)
            features = features + self.level_embed.weight[level][None, :, None]
            # Contiguous, so that the attention of each layer need not copy it.
            scales.append(Scale(features.permute(2, 0, 1).contiguous(), pos, (size,)))
        return scales

    def forward_layer(
        self,
        i: int,
        output: Tensor,
        query_embed: Tensor,
        scale: Scale,
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Run one layer: masked cross-attention, self-attention, feed-forward network.

        Args:
            i: index of the layer.
            output: (Q, B, C) query features.
            query_embed: (Q, B, C) positional embeddings of the queries.
            scale: what the layer attends to.
            attn_mask: (B·M, Q, L) bool, True where attention is blocked, in no row everywhere.

        Returns:
            (Q, B, C) query features.
        """
        output = self.transformer_cross_attention_layers[i](
            output,
            scale.memory,
            memory_mask=attn_mask,
            memory_key_padding_mask=None,
            pos=scale.pos,
            query_pos=query_embed,
        )
        output = self.transformer_self_attention_layers[i](
            output, tgt_mask=None, tgt_key_padding_mask=None, query_pos=query_embed
        )
        return self.transformer_ffn_layers[i](output)

    def forward_prediction_heads(
        self, output: Tensor, mask_features: Tensor, attn_mask_target_size: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict classes and masks, and from the masks the next layer's attention mask.

        Args:
            output: (Q, B, C) query features.
            mask_features: (B, mask_dim, H, W).
            attn_mask_target_size: height and width of the next layer's features.

        Returns:
            class logits (B, Q, K+1); mask logits (B, Q, H, W); attention mask (B·M, Q, L) bool,
            True where attention is blocked.
        """
        decoder_output = self.decoder_norm(output).transpose(0, 1)  # (B, Q, C)
        outputs_class = self.class_embed(decoder_output)
        mask_embed = self.mask_embed(decoder_output)
        outputs_mask = torch.einsum("bqc,bchw->bqhw", mask_embed, mask_features)
        return outputs_class, outputs_mask, self.attention_mask(outputs_mask, attn_mask_target_size)

    def attention_mask(self, mask_logits: Tensor, size: tuple[Any, ...]) -> Tensor:
        """Block the background of mask logits (B, Q, H, W), resized: (B·M, Q, L) bool."""
        attn_mask = F.interpolate(mask_logits, size=size, mode="bilinear", align_corners=False)
        # One copy of the mask for each head.
        attn_mask = attn_mask.sigmoid().flatten(2) < 0.5
        attn_mask = attn_mask.unsqueeze(1).repeat(1, self.num_heads, 1, 1).flatten(0, 1)
        return attn_mask.detach()

    def _set_aux_loss(
        self, outputs_class: list[Tensor], outputs_seg_masks: list[Tensor]
    ) -> list[dict[str, Tensor]]:
        """Every prediction but the last, as the criterion expects them."""
        return [
            {"pred_logits": logits, "pred_masks": masks}
            for logits, masks in zip(outputs_class[:-1], outputs_seg_masks[:-1], strict=True)
        ]
