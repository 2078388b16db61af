"""The masked-attention decoder without full-size masks.

Mask logits are ⟨embedding, feature⟩ and resizing is linear, so the attention mask of a layer is
computed from features resized once per scale instead of masks resized once per layer. Full-size
masks stay factors (`mask_factors.py`); the public `forward` multiplies them out.

Off the CPU the mask is added to the attention logits, and its rows are padded in memory, as fused
kernels read it; otherwise scaled_dot_product_attention converts it in each layer.

Shape letters: B batch, Q queries, C hidden channels, M heads, K classes, L = H·W locations of a
scale.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.transformer_decoder.mask2former_transformer_decoder import (
    MultiScaleMaskedTransformerDecoder,
)
from ..modeling.transformer_decoder.query_pruning import take_queries, take_rows
from ..utils.shape_cache import cached_by_shape
from ..utils.twins import runs_fast, why_hooked
from .attention import ROW_ALIGNMENT
from .mask_factors import MaskFactors


def decode(
    decoder: MultiScaleMaskedTransformerDecoder,
    x: list[Tensor],
    mask_features: Tensor,
    mask: Tensor | None = None,
) -> dict[str, Any]:
    """Twin of `forward` of `MultiScaleMaskedTransformerDecoder` and its variants."""
    predictions = decode_to_factors(decoder, x, mask_features)
    classes = [prediction["pred_logits"] for prediction in predictions]
    masks = [prediction["pred_masks"].full() for prediction in predictions]
    return {
        "pred_logits": classes[-1],
        "pred_masks": masks[-1],
        "aux_outputs": decoder._set_aux_loss(classes, masks),
    }


def decode_to_factors(
    decoder: MultiScaleMaskedTransformerDecoder, x: list[Tensor], mask_features: Tensor
) -> list[dict[str, Any]]:
    """The predictions from the queries and after each layer, in order.

    Returns:
        dicts with `pred_logits` (B, Q, K+1) and `pred_masks`, `MaskFactors`. With query pruning,
        predictions of layers behind it have fewer queries.
    """
    scales = decoder.project_features(x)
    batch = mask_features.shape[0]
    query_embed = decoder.query_embed.weight.unsqueeze(1).repeat(1, batch, 1)  # (Q, B, C)
    output = decoder.query_feat.weight.unsqueeze(1).repeat(1, batch, 1)  # (Q, B, C)

    resized: dict[int, Tensor] = {}
    predictions = []
    for i in range(decoder.num_layers + 1):
        decoder_output = decoder.decoder_norm(output).transpose(0, 1)
        decoder_output = decoder_output.contiguous()  # (B, Q, C); both heads would copy it
        logits, embed = decoder.class_embed(decoder_output), decoder.mask_embed(decoder_output)
        predictions.append({"pred_logits": logits, "pred_masks": MaskFactors(embed, mask_features)})
        if i == decoder.num_layers:
            break
        remaining = decoder.remaining_queries(i, logits)
        if remaining is not None:
            output, query_embed = (take_queries(x, remaining) for x in (output, query_embed))
            embed = take_rows(embed, remaining)
        level = i % len(scales)
        scale = scales[level]
        attn_mask = None
        if decoder.reads_masks:
            if level not in resized:
                with torch.no_grad():
                    resized[level] = _resize_all(mask_features, scale.sizes)
            attn_mask = _attention_mask(decoder, i, embed, resized[level], scale.memory.shape[0])
        output = decoder.forward_layer(i, output, query_embed, scale, attn_mask)
    return predictions


@torch.no_grad()
def _attention_mask(
    decoder: MultiScaleMaskedTransformerDecoder,
    i: int,
    embed: Tensor,
    features: Tensor,
    length: int,
) -> Tensor:
    """The attention mask of layer i, in the form that its cross-attention reads fastest.

    Args:
        embed: (B, Q, C) mask embeddings.
        features: (B, C, L and padding), resized.
        length: L.

    Returns:
        (B, 1, Q, L) to the twin of cross-attention, otherwise (B·M, Q, L).
    """
    cross_attention = decoder.transformer_cross_attention_layers[i]
    takes_one_mask = runs_fast(cross_attention) and why_hooked(cross_attention) is None
    mask_logits = embed @ features  # (B, Q, L and padding)
    if takes_one_mask and not mask_logits.is_cpu:
        return _added_mask(mask_logits, length).unsqueeze(1)
    attn_mask = _blocked(mask_logits[..., :length]).unsqueeze(1)
    if takes_one_mask:
        return attn_mask
    return attn_mask.repeat(1, decoder.num_heads, 1, 1).flatten(0, 1)


def _resize_all(x: Tensor, sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """Resize to each size and flatten: (B, C, H, W) → (B, C, L and padding)."""
    maps = [_resize(x, size).flatten(2) for size in sizes]
    return _pad_rows(maps[0] if len(maps) == 1 else torch.cat(maps, 2))


def _blocked(mask_logits: Tensor) -> Tensor:
    """Where sigmoid(mask) < 0.5, unless that would block every location: (B, Q, L) bool."""
    blocked = mask_logits < 0
    return blocked & ~blocked.all(-1, keepdim=True)


@cached_by_shape(maxsize=4)
def _mask_values(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What an added mask has where attention is allowed and where it is blocked."""
    allowed = torch.zeros((), dtype=dtype, device=device)
    return allowed, torch.full_like(allowed, float("-inf"))


def _added_mask(mask_logits: Tensor, length: int) -> Tensor:
    """`_blocked` as a mask that is added: 0, and -inf where attention is blocked.

    Args:
        mask_logits: (B, Q, L and padding).
        length: L.

    Returns:
        (B, Q, L), a part of rows as long as those of the logits.
    """
    allowed, blocked = _mask_values(mask_logits.dtype, mask_logits.device)
    all_blocked = mask_logits[..., :length].amax(-1, keepdim=True) < 0
    # Nothing is below -inf.
    threshold = torch.where(all_blocked, blocked, allowed)
    return torch.where(mask_logits < threshold, blocked, allowed)[..., :length]


def _pad_rows(x: Tensor) -> Tensor:
    """Zeros behind the last dimension, so that rows of a product with it are aligned."""
    padding = -x.shape[-1] % ROW_ALIGNMENT
    return x if x.is_cpu or padding == 0 else F.pad(x, (0, padding))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing, not antialiased: (B, C, H, W) → (B, C, *size)."""
    if torch.compiler.is_exporting():
        # A choice by size would hold for the exported program's other sizes too.
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    step_y, step_x = (old // new for old, new in zip(x.shape[-2:], size, strict=True))
    whole = x.shape[-2:] == (step_y * size[0], step_x * size[1])
    if not whole or step_y % 2 or step_x % 2:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    # By an even factor each sample lies in the middle between two pixels. Reading only these is
    # faster than F.interpolate, which on a CPU first rearranges the whole map.
    upper, lower = x[:, :, step_y // 2 - 1 :: step_y], x[:, :, step_y // 2 :: step_y]
    left, right = slice(step_x // 2 - 1, None, step_x), slice(step_x // 2, None, step_x)
    return (upper[..., left] + upper[..., right] + lower[..., left] + lower[..., right]) * 0.25
