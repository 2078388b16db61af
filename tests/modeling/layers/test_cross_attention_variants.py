"""Cross-attention variants, by numbers worked out by hand.

Shape letters: B batch, Q queries, C channels, M heads, L locations.
"""

import math

import pytest
import torch
from torch import nn

from mask2former.modeling.layers import (
    CROSS_ATTENTION_REGISTRY,
    CrossAttentionLayer,
    MaskPoolingLayer,
    SMCALayer,
)
from mask2former.modeling.layers.cross_attention_variants import build_cross_attention

B, Q, C, M = 2, 3, 4, 2


@pytest.fixture
def own(monkeypatch):
    """The registry, which forgets what a test adds."""
    monkeypatch.setattr(
        CROSS_ATTENTION_REGISTRY, "_obj_map", dict(CROSS_ATTENTION_REGISTRY._obj_map)
    )
    return CROSS_ATTENTION_REGISTRY


@pytest.mark.parametrize(
    ("name", "kind", "reads"),
    [
        ("masked", CrossAttentionLayer, ("memory_mask",)),
        ("full", CrossAttentionLayer, ()),
        ("smca", SMCALayer, ("locations",)),
        ("mask_pooling", MaskPoolingLayer, ("memory_mask",)),
    ],
)
def test_registry(name, kind, reads):
    layer = build_cross_attention(name, C, M, dropout=0.25, normalize_before=True)
    assert type(layer) is kind
    assert layer.reads == reads
    assert layer.normalize_before and layer.dropout.p == 0.25
    if hasattr(layer, "multihead_attn"):
        assert layer.multihead_attn.dropout == 0.25
    assert CrossAttentionLayer.reads == ("memory_mask",)


def test_unknown_and_incomplete_layers(own):
    with pytest.raises(ValueError, match="CROSS_ATTENTION is 'nobody', which is not registered"):
        build_cross_attention("nobody", C, M)

    @own.register()
    class Silent(nn.Module):
        def __init__(self, d_model, nhead, **options):
            super().__init__()

    with pytest.raises(ValueError, match=r"'Silent'.*`reads` None; allowed: a tuple of 'memory_m"):
        build_cross_attention("Silent", C, M)
    Silent.reads = ("memory_masks",)
    with pytest.raises(ValueError, match=r"`reads` \('memory_masks',\); allowed"):
        build_cross_attention("Silent", C, M)


def pooling(**options) -> MaskPoolingLayer:
    """Its projection and norm are identities."""
    layer = MaskPoolingLayer(C, M, **options)
    nn.init.eye_(layer.out_proj.weight)
    nn.init.zeros_(layer.out_proj.bias)
    layer.norm = nn.Identity()
    return layer


def blocked(*rows: list[int]) -> torch.Tensor:
    """(M, len(rows), L) for one image."""
    return torch.tensor(rows, dtype=torch.bool).expand(M, -1, -1)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_mask_pooling_is_the_mean_within_the_mask(pre_norm):
    memory = torch.tensor([1.0, 2.0, 3.0, 6.0])[:, None, None].expand(4, 1, C)
    mask = blocked([1, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0])  # one pixel, two, all (empty mask)
    layer = pooling(normalize_before=pre_norm)
    queries = layer(torch.full((3, 1, C), 10.0), memory, mask)
    assert queries[:, 0, 0].tolist() == [13.0, 11.5, 13.0]
    queries = layer(torch.zeros(3, 1, C), memory, mask, query_pos=torch.full((3, 1, C), 0.5))
    assert queries[:, 0, 0].tolist() == [3.5, 2.0, 3.5]


def test_mask_pooling_of_a_constant_map():
    """Whatever the masks, and each image with its own."""
    memory = torch.stack([torch.full((5, C), 2.0), torch.full((5, C), -4.0)], 1)
    mask = torch.rand(B * M, Q, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 0] = False
    queries = pooling()(torch.zeros(Q, B, C), memory, mask)
    torch.testing.assert_close(queries[:, 0], torch.full((Q, C), 2.0))
    torch.testing.assert_close(queries[:, 1], torch.full((Q, C), -4.0))


def test_mask_pooling_is_of_the_image_s_own_mask():
    memory = torch.tensor([[1.0, 2.0], [3.0, 4.0]])[..., None].expand(2, B, C)
    first, second = blocked([0, 1]), blocked([1, 0])
    queries = pooling()(torch.zeros(1, B, C), memory, torch.cat([first, second]))
    assert queries[0, :, 0].tolist() == [1.0, 4.0]


def smca(center=(0.5, 0.5), offsets=((0.0, 0.0), (0.0, 0.0)), scales=((1.0, 1.0), (1.0, 1.0))):
    """A layer that predicts these, as x and y, for every query; offsets and scales by head."""
    layer = SMCALayer(C, M)
    for linear in (layer.center.layers[-1], layer.offset, layer.log_scale):
        nn.init.zeros_(linear.weight)
    with torch.no_grad():
        layer.center.layers[-1].bias.copy_(torch.tensor(center).logit())
        layer.offset.bias.copy_(torch.tensor(offsets).flatten())
        layer.log_scale.bias.copy_(torch.tensor(scales).log().flatten())
    return layer


def test_smca_gaussian():
    """Distances count cells of a 32x32 grid; 1/32 of the image is one of them."""
    layer = smca((0.25, 0.5), ((0.0, 0.0), (1.0, -2.0)), ((1.0, 1.0), (2.0, 4.0)))
    points = torch.tensor([[0.25, 0.5], [0.25 + 2 / 32, 0.5], [0.25, 0.5 + 4 / 32]])
    log_weights = layer.log_gaussian(torch.randn(Q, B, C), points)
    assert log_weights.shape == (B, M, Q, 3)
    # Head 0: distances (0, 0), (2, 0), (0, 4), β = 8.
    head0 = torch.tensor([0.0, -4 / 8, -16 / 8])
    # Head 1: centre one cell to the right and two up; widths 2, heights 4.
    head1 = torch.tensor([-(1 / 4 + 4 / 16) / 8, -(1 / 4 + 4 / 16) / 8, -(1 / 4 + 36 / 16) / 8])
    expected = torch.stack([head0, head1])[None, :, None].expand(B, M, Q, 3)
    torch.testing.assert_close(log_weights, expected)


def test_smca_weights_the_values():
    """With equal attention logits, the weights are the Gaussian's, normalised."""
    layer = smca()
    attention = layer.multihead_attn
    nn.init.zeros_(attention.in_proj_weight)
    with torch.no_grad():
        attention.in_proj_weight[2 * C :].copy_(torch.eye(C))
    nn.init.eye_(attention.out_proj.weight)
    layer.norm = nn.Identity()
    points = torch.tensor([[0.5, 0.5], [0.5, 0.5 + 4 / 32]])
    memory = torch.tensor([0.0, 1.0])[:, None, None].expand(2, B, C)
    queries = layer(torch.zeros(Q, B, C), memory, points)
    weight = math.exp(-2) / (1 + math.exp(-2))
    torch.testing.assert_close(queries, torch.full((Q, B, C), weight))


def test_smca_without_distances_is_full_attention():
    layer, full = SMCALayer(C, M), build_cross_attention("full", C, M)
    full.load_state_dict(layer.state_dict(), strict=False)
    memory, pos, tgt = torch.randn(5, B, C), torch.randn(5, B, C), torch.randn(Q, B, C)
    same = layer(tgt, memory, torch.full((5, 2), 0.3), pos=pos, query_pos=tgt)
    torch.testing.assert_close(same, full(tgt, memory, pos=pos, query_pos=tgt))


def test_smca_centre_far_outside_of_the_image():
    """All weights would be 0 in half precision, but a query attends to what is nearest."""
    layer = smca(offsets=((1e3, 0.0), (0.0, -1e3)))
    points = torch.tensor([[0.25, 0.5], [0.75, 0.5]])
    assert layer.log_gaussian(torch.zeros(Q, B, C), points).half().isinf().all()
    with torch.autocast("cpu", dtype=torch.float16):
        queries = layer(torch.randn(Q, B, C), torch.randn(2, B, C), points)
    assert torch.isfinite(queries).all()
