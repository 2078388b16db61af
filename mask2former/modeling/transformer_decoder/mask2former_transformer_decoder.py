"""Masked-attention transformer decoder (paper, section 3.2).

Nine layers visit the three scales of the pixel decoder round robin. A layer is masked
cross-attention, self-attention, feed-forward, in that order; cross-attention of a query sees only
where the mask predicted by the layer before is foreground. Classes and masks are predicted from
the learnable query features and after every layer.

Attention works on sequences first, as nn.MultiheadAttention does by default.

Shape letters: B batch, Q queries, C hidden channels, M heads, K classes, L = H·W locations of a
scale, T length of a target sequence, S length of a memory sequence.
"""

from collections.abc import Callable

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d
from torch import Tensor, nn

from ..mask_predictions import MaskLogits, MaskPredictions
from .build import TRANSFORMER_DECODER_REGISTRY
from .position_encoding import PositionEmbeddingSine

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "glu": F.glu}


def _get_activation_fn(activation: str) -> Callable[[Tensor], Tensor]:
    """The activation function of that name."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {sorted(_ACTIVATIONS)}")
    return _ACTIVATIONS[activation]


def _blocked_to_bias(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, num_heads: int
) -> Tensor | None:
    """Bring masks in nn.MultiheadAttention's conventions to the one SDPA expects.

    Args:
        attn_mask: (T, S), (B·M, T, S) or broadcastable to (B, M, T, S); bool, True where
            attention is blocked, or float, added to the scores.
        key_padding_mask: (B, S), bool or float in the same sense.

    Returns:
        Broadcastable to (B, M, T, S); bool, True where attention is allowed, or float.
    """

    def allowed(mask: Tensor) -> Tensor:
        return ~mask if mask.dtype == torch.bool else mask

    if attn_mask is not None:
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.view(batch, num_heads, *attn_mask.shape[1:])
        attn_mask = allowed(attn_mask)
    if key_padding_mask is None:
        return attn_mask
    key_padding_mask = allowed(key_padding_mask)[:, None, None, :]
    if attn_mask is None:
        return key_padding_mask
    if attn_mask.dtype == torch.bool and key_padding_mask.dtype == torch.bool:
        return attn_mask & key_padding_mask
    as_float = [
        m.new_zeros(m.shape, dtype=torch.float32).masked_fill(~m, float("-inf"))
        if m.dtype == torch.bool
        else m
        for m in (attn_mask, key_padding_mask)
    ]
    return as_float[0] + as_float[1]


def _attend(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """``attention(query, key, value)`` with a mask that may be broadcast over heads.

    nn.MultiheadAttention wants one mask per head; the mask of masked attention is the same for
    all, so the module serves as the holder of the parameters only.

    Args:
        query: (T, B, C).
        key, value: (S, B, C).
        attn_mask, key_padding_mask: see `_blocked_to_bias`.

    Returns:
        (T, B, C).
    """
    num_heads = attention.num_heads
    weights = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3)

    def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = F.linear(x, weight, bias)
        return x.unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3)  # (B, M, T or S, C/M)

    q, k, v = (project(*args) for args in zip((query, key, value), weights, biases, strict=True))
    mask = _blocked_to_bias(attn_mask, key_padding_mask, query.shape[1], num_heads)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    dropout = attention.dropout if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return attention.out_proj(out.permute(2, 0, 1, 3).flatten(2))


class _ResidualLayer(nn.Module):
    """A sub-layer with dropout, residual connection and layer norm, before or after it."""

    def _finish(self, d_model: int, dropout: float, normalize_before: bool) -> None:
        """Add the common parts and initialise.

        Called last: optimiser states of checkpoints number parameters in the published order,
        in which the norm follows the sub-layer.
        """
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.normalize_before = normalize_before
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def with_pos_embed(self, tensor: Tensor, pos: Tensor | None) -> Tensor:
        return tensor if pos is None else tensor + pos

    def forward(self, tgt: Tensor, *args, **kwargs) -> Tensor:
        """Dispatch to ``forward_pre`` or ``forward_post``; same arguments, returns (T, B, C)."""
        forward = self.forward_pre if self.normalize_before else self.forward_post
        return forward(tgt, *args, **kwargs)


class SelfAttentionLayer(_ResidualLayer):
    """Self-attention among the queries.

    Args:
        d_model: channels C.
        nhead: heads M.
        dropout: probability, on attention weights and on the residual branch.
        activation: name of an activation; published argument, checked.
        normalize_before: layer norm before attention instead of after.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dropout: float = 0.0,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.activation = _get_activation_fn(activation)
        self._finish(d_model, dropout, normalize_before)

    def _attention(
        self,
        x: Tensor,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        query_pos: Tensor | None,
    ) -> Tensor:
        q = k = self.with_pos_embed(x, query_pos)
        return self.dropout(_attend(self.self_attn, q, k, x, mask, key_padding_mask))

    def forward_post(
        self,
        tgt: Tensor,
        tgt_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """``tgt`` and ``query_pos`` (T, B, C); masks as in nn.MultiheadAttention → (T, B, C)."""
        return self.norm(tgt + self._attention(tgt, tgt_mask, tgt_key_padding_mask, query_pos))

    def forward_pre(
        self,
        tgt: Tensor,
        tgt_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """As `forward_post`, normalising first."""
        x = self.norm(tgt)
        return tgt + self._attention(x, tgt_mask, tgt_key_padding_mask, query_pos)


class CrossAttentionLayer(_ResidualLayer):
    """Attention of the queries to the pixels; masked attention when given a mask (equation 2).

    Args: as for `SelfAttentionLayer`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dropout: float = 0.0,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.activation = _get_activation_fn(activation)
        self._finish(d_model, dropout, normalize_before)

    def _attention(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        pos: Tensor | None,
        query_pos: Tensor | None,
    ) -> Tensor:
        query = self.with_pos_embed(x, query_pos)
        key = self.with_pos_embed(memory, pos)
        return self.dropout(
            _attend(self.multihead_attn, query, key, memory, mask, key_padding_mask)
        )

    def forward_post(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """Attend from queries to memory.

        Args:
            tgt: (T, B, C); ``query_pos`` likewise.
            memory: (S, B, C); ``pos`` likewise.
            memory_mask: bool, True where attention is blocked: (T, S), (B·M, T, S) or
                (B, 1, T, S), which is one mask for all heads. Rows must not be blocked whole.
            memory_key_padding_mask: (B, S) bool.

        Returns:
            (T, B, C).
        """
        return self.norm(
            tgt + self._attention(tgt, memory, memory_mask, memory_key_padding_mask, pos, query_pos)
        )

    def forward_pre(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """As `forward_post`, normalising first."""
        x = self.norm(tgt)
        return tgt + self._attention(
            x, memory, memory_mask, memory_key_padding_mask, pos, query_pos
        )


class FFNLayer(_ResidualLayer):
    """Two-layer feed-forward network with residual connection.

    Args:
        d_model: channels C.
        dim_feedforward: hidden width.
        dropout: probability, after the activation and on the residual branch.
        activation: "relu", "gelu" or "glu".
        normalize_before: layer norm before the network instead of after.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.0,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.activation = _get_activation_fn(activation)
        self._finish(d_model, dropout, normalize_before)

    def _network(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))

    def forward_post(self, tgt: Tensor) -> Tensor:
        """(T, B, C) → (T, B, C)."""
        return self.norm(tgt + self._network(tgt))

    def forward_pre(self, tgt: Tensor) -> Tensor:
        """As `forward_post`, normalising first."""
        return tgt + self._network(self.norm(tgt))


class MLP(nn.Module):
    """Linear layers with ReLU between them; all but the last are hidden_dim wide."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        self.num_layers = num_layers
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(
            nn.Linear(n, m) for n, m in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_dim) → (..., output_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


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
    """

    _version = 2

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
    ):
        super().__init__()
        if not mask_classification:
            raise ValueError("MultiScaleMaskedTransformerDecoder only does mask classification")
        self.mask_classification = mask_classification
        self.pe_layer = PositionEmbeddingSine(hidden_dim // 2, normalize=True)
        self.num_heads = nheads
        self.num_layers = dec_layers
        # "No dropout": the paper found it unnecessary (section 3.2.2).
        layer = {"dropout": 0.0, "normalize_before": pre_norm}
        self.transformer_self_attention_layers = nn.ModuleList()
        self.transformer_cross_attention_layers = nn.ModuleList()
        self.transformer_ffn_layers = nn.ModuleList()
        # Layer by layer, so that a seed gives the published initial weights.
        for _ in range(dec_layers):
            self.transformer_self_attention_layers.append(
                SelfAttentionLayer(hidden_dim, nheads, **layer)
            )
            self.transformer_cross_attention_layers.append(
                CrossAttentionLayer(hidden_dim, nheads, **layer)
            )
            self.transformer_ffn_layers.append(FFNLayer(hidden_dim, dim_feedforward, **layer))
        self.decoder_norm = nn.LayerNorm(hidden_dim)

        self.num_queries = num_queries
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)

        self.num_feature_levels = 3
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

    def forward(
        self, x: list[Tensor], mask_features: Tensor, mask: Tensor | None = None
    ) -> MaskPredictions:
        """Predict from the pixel decoder's features.

        Args:
            x: three (B, in_channels, H, W), from 1/32 to 1/8 resolution.
            mask_features: (B, mask_dim, H/4, W/4) per-pixel embeddings.
            mask: published argument; images are padded, not masked, so it is not used.

        Returns:
            dict with ``pred_logits`` (B, Q, K+1), ``pred_masks`` (B, Q, H/4, W/4) logits (computed
            when read) and ``aux_outputs``, the same two for each earlier prediction, first first.
        """
        if len(x) != self.num_feature_levels:
            raise ValueError(f"expected {self.num_feature_levels} feature scales, got {len(x)}")
        del mask
        memory, pos, sizes = [], [], []
        for level, features in enumerate(x):
            sizes.append(features.shape[-2:])
            pos.append(self.pe_layer(features).flatten(2).permute(2, 0, 1))  # (L, B, C)
            features = self.input_proj[level](features).flatten(2)
            features = features + self.level_embed.weight[level][None, :, None]
            memory.append(features.permute(2, 0, 1))  # (L, B, C)

        batch = mask_features.shape[0]
        query_embed = self.query_embed.weight.unsqueeze(1).expand(-1, batch, -1)  # (Q, B, C)
        output = self.query_feat.weight.unsqueeze(1).expand(-1, batch, -1)  # (Q, B, C)

        predict = self._predictor(mask_features, sizes)
        predictions_class, predictions_mask = [], []
        logits, masks, attn_mask = predict(output, 0)
        predictions_class.append(logits)
        predictions_mask.append(masks)
        for i in range(self.num_layers):
            level = i % self.num_feature_levels
            # A query whose mask is empty attends everywhere.
            attn_mask = attn_mask & ~attn_mask.all(dim=-1, keepdim=True)
            output = self.transformer_cross_attention_layers[i](
                output, memory[level], memory_mask=attn_mask, pos=pos[level], query_pos=query_embed
            )
            output = self.transformer_self_attention_layers[i](output, query_pos=query_embed)
            output = self.transformer_ffn_layers[i](output)
            logits, masks, attn_mask = predict(output, (i + 1) % self.num_feature_levels)
            predictions_class.append(logits)
            predictions_mask.append(masks)

        return MaskPredictions(
            pred_logits=predictions_class[-1],
            pred_masks=predictions_mask[-1],
            aux_outputs=self._set_aux_loss(predictions_class, predictions_mask),
        )

    def _predictor(
        self, mask_features: Tensor, sizes: list[torch.Size]
    ) -> Callable[[Tensor, int], tuple[Tensor, MaskLogits | Tensor, Tensor]]:
        """The prediction heads over one batch: (output, level of the next layer) → predictions.

        Masks and resizing are both linear, so the attention masks come from features resized once
        per scale and full-size masks are left as factors. A subclass that overrides
        `forward_prediction_heads` is served through that method instead.
        """
        heads = MultiScaleMaskedTransformerDecoder.forward_prediction_heads
        if type(self).forward_prediction_heads is not heads:
            return lambda output, level: self.forward_prediction_heads(
                output, mask_features, attn_mask_target_size=sizes[level]
            )

        resized: dict[int, Tensor] = {}

        def predict(output: Tensor, level: int) -> tuple[Tensor, MaskLogits, Tensor]:
            logits, embed = self._class_and_embed(output)
            with torch.no_grad():
                if level not in resized:
                    resized[level] = _resize(mask_features, sizes[level]).flatten(2)
                # sigmoid(mask) < 0.5, one mask for all heads: (B, 1, Q, L)
                attn_mask = (embed @ resized[level] < 0).unsqueeze(1)
            return logits, MaskLogits(embed, mask_features), attn_mask

        return predict

    def _class_and_embed(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, B, C) → class logits (B, Q, K+1) and mask embeddings (B, Q, mask_dim)."""
        output = self.decoder_norm(output).transpose(0, 1)
        return self.class_embed(output), self.mask_embed(output)

    def forward_prediction_heads(
        self, output: Tensor, mask_features: Tensor, attn_mask_target_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict classes, full-size masks and the next layer's attention mask, as published.

        For subclasses that run their own decoder loop.

        Args:
            output: (Q, B, C) query features.
            mask_features: (B, mask_dim, H, W).
            attn_mask_target_size: height and width of the next layer's features.

        Returns:
            class logits (B, Q, K+1); mask logits (B, Q, H, W); attention mask (B·M, Q, L) bool,
            True where attention is blocked.
        """
        logits, embed = self._class_and_embed(output)
        masks = torch.einsum("bqc,bchw->bqhw", embed, mask_features)
        attn_mask = _resize(masks.detach(), attn_mask_target_size).flatten(2) < 0
        attn_mask = attn_mask.unsqueeze(1).repeat(1, self.num_heads, 1, 1).flatten(0, 1)
        return logits, masks, attn_mask

    def _set_aux_loss(
        self, outputs_class: list[Tensor], outputs_seg_masks: list[MaskLogits | Tensor]
    ) -> list[MaskPredictions]:
        """Every prediction but the last, as the criterion expects them."""
        return [
            MaskPredictions(pred_logits=logits, pred_masks=masks)
            for logits, masks in zip(outputs_class[:-1], outputs_seg_masks[:-1], strict=True)
        ]


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
