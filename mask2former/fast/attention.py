"""Attention with one mask for all heads.

nn.MultiheadAttention needs one mask per head, although masked attention has the same mask for all
heads. The twins broadcast it in `F.scaled_dot_product_attention`, with the module's parameters.

Shape letters: B batch, C channels, M heads, T length of a target sequence (queries), S length of a
memory sequence (pixels of a scale).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..modeling.layers import CrossAttentionLayer, SelfAttentionLayer
from .frozen_norm import product_dtype

# The memory-efficient backend copies masks whose rows do not start at a multiple of some elements:
# 8 on CUDA, up to 16 elsewhere.
ROW_ALIGNMENT = 16


def self_attention(
    layer: SelfAttentionLayer,
    tgt: Tensor,
    tgt_mask: Tensor | None = None,
    tgt_key_padding_mask: Tensor | None = None,
    query_pos: Tensor | None = None,
) -> Tensor:
    """Twin of `SelfAttentionLayer.forward`."""
    x = layer.norm(tgt) if layer.normalize_before else tgt
    query = x if query_pos is None else x + query_pos
    attended = attend(layer.self_attn, query, query, x, tgt_mask, tgt_key_padding_mask)
    out = tgt + layer.dropout(attended)
    return out if layer.normalize_before else layer.norm(out)


def cross_attention(
    layer: CrossAttentionLayer,
    tgt: Tensor,
    memory: Tensor,
    memory_mask: Tensor | None = None,
    memory_key_padding_mask: Tensor | None = None,
    pos: Tensor | None = None,
    query_pos: Tensor | None = None,
) -> Tensor:
    """Twin of `CrossAttentionLayer.forward`; `memory_mask` may be (B, 1, T, S) too."""
    x = layer.norm(tgt) if layer.normalize_before else tgt
    query = x if query_pos is None else x + query_pos
    key = memory if pos is None else memory + pos
    attended = attend(
        layer.multihead_attn, query, key, memory, memory_mask, memory_key_padding_mask
    )
    out = tgt + layer.dropout(attended)
    return out if layer.normalize_before else layer.norm(out)


def why_not_attend(attention: nn.MultiheadAttention) -> str | None:
    """Why `attend` cannot replace this module, or None if it can."""
    if attention.in_proj_weight is None or attention.in_proj_bias is None:
        return "attention has separate or no projection weights or biases"
    if attention.bias_k is not None or attention.add_zero_attn or attention.batch_first:
        return "attention has bias_k, add_zero_attn or batch_first"
    return None


def attend(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """`attention(query, key, value)` with a mask that may be broadcast over heads.

    Args:
        query: (T, B, C).
        key, value: (S, B, C).
        attn_mask, key_padding_mask: see `_blocked_to_allowed`.

    Returns:
        (T, B, C).
    """
    num_heads, channels = attention.num_heads, query.shape[2]
    inputs, num_projections = [query, key, value], [1, 1, 1]
    if query is key and not query.is_cpu:
        # One product instead of two: fewer kernels to launch.
        inputs, num_projections = [query, value], [2, 1]
    lengths = [n * channels for n in num_projections]
    # Autocast would cast each part on its own.
    dtype = product_dtype(attention.in_proj_weight)
    weights = attention.in_proj_weight.to(dtype).split(lengths)
    biases = attention.in_proj_bias.to(dtype).split(lengths)

    def project(x: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
        x = F.linear(x, weight, bias).unflatten(2, (-1, channels // num_heads))
        x = x.permute(1, 2, 0, 3)  # (B, n·M, T or S, C/M)
        return (x,) if x.shape[1] == num_heads else x.split(num_heads, 1)

    projected = (project(*args) for args in zip(inputs, weights, biases, strict=True))
    q, k, v = (x for parts in projected for x in parts)
    mask = _blocked_to_allowed(attn_mask, key_padding_mask, query.shape[1], num_heads)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    dropout = attention.dropout if attention.training else 0.0
    with nullcontext() if mask is None else masked_backend(q):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    out_proj = attention.out_proj
    return F.linear(out.permute(2, 0, 1, 3).flatten(2), out_proj.weight, out_proj.bias)


def masked_backend(query: Tensor) -> AbstractContextManager:
    """Where scaled_dot_product_attention with a mask takes the memory-efficient backend.

    Flash attention takes no mask, and the gradients of cuDNN's may be NaN for a sequence length
    that is an odd multiple of 64 (pytorch/pytorch#196678). Whoever disabled the memory-efficient
    backend keeps his choice.
    """
    if query.is_cpu:
        return nullcontext()
    if not torch.compiler.is_compiling() and not torch.backends.cuda.mem_efficient_sdp_enabled():
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _blocked_to_allowed(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, num_heads: int
) -> Tensor | None:
    """Convert masks of nn.MultiheadAttention to the one that SDPA expects.

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
