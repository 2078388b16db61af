"""Attention with one mask for all heads, in the forms that nn.MultiheadAttention lacks.

Shape letters: B batch, Q queries, C channels, M heads, S length of the memory.
"""

import copy

import pytest
import torch
from small_parts import rand, random_block
from torch import nn

from mask2former.modeling.layers import CrossAttentionLayer, SelfAttentionLayer
from mask2former.utils.twins import runs_fast

B, Q, C, M, S = 2, 5, 16, 4, 12


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
@pytest.mark.parametrize("mask_form", ["bool", "float"])
def test_mask_is_broadcast_over_heads(pre_norm, padding, mask_form):
    torch.manual_seed(0)
    layer = CrossAttentionLayer(C, M, normalize_before=pre_norm)
    assert runs_fast(layer)
    nn.init.normal_(layer.multihead_attn.in_proj_bias)
    tgt, memory = rand(Q, B, C, seed=1), rand(S, B, C, seed=3)
    mask = random_block(B, 1, Q, S, seed=5)
    mask = mask if mask_form == "bool" else mask * -3.0
    blocked = torch.zeros(B, S, dtype=torch.bool)
    blocked[1, 7:] = True
    as_float = torch.zeros(B, S).masked_fill(blocked, float("-inf"))
    key_padding = {None: None, "bool": blocked, "float": as_float}[padding]
    out = layer(tgt, memory, mask, key_padding)

    # nn.MultiheadAttention expects a mask for each head, and both masks of one kind.
    repeated = mask.repeat(1, M, 1, 1).flatten(0, 1)  # (B·M, Q, S)
    if repeated.dtype == torch.bool:
        repeated = torch.zeros(repeated.shape).masked_fill(repeated, float("-inf"))
    x = layer.norm(tgt) if pre_norm else tgt
    attended, _ = layer.multihead_attn(
        x, memory, memory, attn_mask=repeated, key_padding_mask=as_float if padding else None
    )
    expected = tgt + attended if pre_norm else layer.norm(tgt + attended)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


def test_gradients_of_a_broadcast_mask():
    torch.manual_seed(0)
    layer = CrossAttentionLayer(C, M)
    reference = copy.deepcopy(layer)
    tgt, memory, mask = rand(Q, B, C), rand(S, B, C, seed=1), random_block(B, 1, Q, S)
    layer(tgt, memory, mask).square().sum().backward()
    attended, _ = reference.multihead_attn(
        tgt, memory, memory, attn_mask=mask.repeat(1, M, 1, 1).flatten(0, 1)
    )
    reference.norm(tgt + attended).square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    "options",
    [{"kdim": 8, "vdim": 8}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}],
)
def test_other_kinds_of_attention_run_plain(options):
    layer = SelfAttentionLayer(C, M)
    layer.self_attn = nn.MultiheadAttention(C, M, **options)
    assert not runs_fast(layer)
