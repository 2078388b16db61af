"""The sub-layers of a decoder layer against nn.MultiheadAttention, plain and fast.

Shape letters: B batch, Q queries, C channels, M heads, S length of the memory.
"""

import copy

import pytest
import torch
from small_parts import rand, random_block
from torch import nn

from mask2former.modeling.layers import CrossAttentionLayer, FFNLayer, SelfAttentionLayer

B, Q, C, M, S = 2, 5, 16, 4, 12


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("mask_form", ["none", "per head", "two-dimensional", "float"])
@pytest.mark.parametrize("padding", [False, True])
def test_cross_attention_equals_multihead_attention(mode, pre_norm, mask_form, padding):
    torch.manual_seed(0)
    layer = mode(CrossAttentionLayer(C, M, normalize_before=pre_norm))
    nn.init.normal_(layer.multihead_attn.in_proj_bias)
    tgt, query_pos = rand(Q, B, C, seed=1), rand(Q, B, C, seed=2)
    memory, pos = rand(S, B, C, seed=3), rand(S, B, C, seed=4)
    heads = random_block(B * M, Q, S, seed=6)  # image 0 head 0, image 0 head 1, …
    mask = {
        "none": None,
        "per head": heads,
        "two-dimensional": random_block(Q, S, seed=5),
        "float": heads * -3.0,
    }[mask_form]
    key_padding = torch.zeros(B, S, dtype=torch.bool)
    key_padding[1, 7:] = True
    if mask_form == "float":  # nn.MultiheadAttention expects both masks of one kind
        key_padding = torch.zeros(B, S).masked_fill(key_padding, float("-inf"))
    key_padding = key_padding if padding else None
    out = layer(tgt, memory, mask, key_padding, pos, query_pos)

    x = layer.norm(tgt) if pre_norm else tgt
    attended, _ = layer.multihead_attn(
        x + query_pos, memory + pos, memory, attn_mask=mask, key_padding_mask=key_padding
    )
    expected = tgt + attended if pre_norm else layer.norm(tgt + attended)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_self_attention_equals_multihead_attention(mode, pre_norm):
    torch.manual_seed(0)
    layer = mode(SelfAttentionLayer(C, M, normalize_before=pre_norm))
    tgt, query_pos, mask = rand(Q, B, C, seed=1), rand(Q, B, C, seed=2), random_block(Q, Q)
    out = layer(tgt, tgt_mask=mask, query_pos=query_pos)
    x = layer.norm(tgt) if pre_norm else tgt
    attended, _ = layer.self_attn(x + query_pos, x + query_pos, x, attn_mask=mask)
    expected = tgt + attended if pre_norm else layer.norm(tgt + attended)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    # Positional encodings are optional.
    attended, _ = layer.self_attn(x, x, x)
    expected = tgt + attended if pre_norm else layer.norm(tgt + attended)
    torch.testing.assert_close(layer(tgt), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_feed_forward(pre_norm):
    layer = FFNLayer(C, 24, normalize_before=pre_norm, activation="gelu")
    tgt = rand(Q, B, C)
    x = layer.norm(tgt) if pre_norm else tgt
    hidden = layer.linear2(nn.functional.gelu(layer.linear1(x)))
    expected = tgt + hidden if pre_norm else layer.norm(tgt + hidden)
    torch.testing.assert_close(layer(tgt), expected)


def test_gradients_equal_multihead_attention(mode):
    torch.manual_seed(0)
    layer = mode(CrossAttentionLayer(C, M))
    reference = copy.deepcopy(layer)
    tgt, memory, mask = rand(Q, B, C), rand(S, B, C, seed=1), random_block(B * M, Q, S)
    layer(tgt, memory, mask).square().sum().backward()
    attended, _ = reference.multihead_attn(tgt, memory, memory, attn_mask=mask)
    reference.norm(tgt + attended).square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-5, msg=name)


def test_dropout_only_in_training(mode):
    torch.manual_seed(0)
    tgt, memory = rand(Q, B, C), rand(S, B, C)
    for layer, inputs in (
        (SelfAttentionLayer(C, M, dropout=0.5), (tgt,)),
        (CrossAttentionLayer(C, M, dropout=0.5), (tgt, memory)),
        (FFNLayer(C, 8, dropout=0.5), (tgt,)),
    ):
        mode(layer)
        assert not torch.equal(layer(*inputs), layer(*inputs))
        layer.eval()
        assert torch.equal(layer(*inputs), layer(*inputs))


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"activation='swish' is not one of \['gelu', 'glu', 're"):
        SelfAttentionLayer(C, M, activation="swish")


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "patch", "replacement"])
def test_hooked_or_patched_attention_is_called_as_a_module(how, pre_norm):
    """Projects read attention maps with hooks, or replace the attention."""
    torch.manual_seed(0)
    seen = []
    for layer, name, inputs in (
        (SelfAttentionLayer(C, M, normalize_before=pre_norm), "self_attn", 1),
        (CrossAttentionLayer(C, M, normalize_before=pre_norm), "multihead_attn", 2),
    ):
        inputs = [rand(Q, B, C, seed=i) for i in range(inputs)]
        expected = layer(*inputs)
        attention = getattr(layer, name)
        if how == "hook":
            attention.register_forward_hook(lambda module, args, out: seen.append(out))
        elif how == "pre-hook":
            attention.register_forward_pre_hook(lambda module, args: seen.append(args))
        elif how == "patch":
            forward = attention.forward
            attention.forward = lambda *a, f=forward, **k: seen.append(a) or f(*a, **k)
        else:

            class Replacement(nn.Module):
                def __init__(self, attention):
                    super().__init__()
                    self.inner = attention

                def forward(self, *args, **kwargs):
                    seen.append(args)
                    return self.inner(*args, **kwargs)

            setattr(layer, name, Replacement(attention))
        torch.testing.assert_close(layer(*inputs), expected)
    assert len(seen) == 2
