"""Factored masks equal full-size ones, for all layers read together.

Shape letters: L layers, B batch, Q queries, C channels, H W pixels, P points.
"""

import pytest
import torch
from torch import Tensor

from mask2former.fast import mask_factors
from mask2former.fast.mask_factors import LayeredMasks, MaskFactors

NUM_LAYERS, NUM_QUERIES = 3, 4


@pytest.fixture
def factors() -> list[MaskFactors]:
    """Embeddings (B, Q, C) for each layer, and the features (B, C, H, W) that they share."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 5, 6, generator=generator)
    embeds = [torch.randn(2, NUM_QUERIES, 3, generator=generator) for _ in range(NUM_LAYERS)]
    return [MaskFactors(embed, features) for embed in embeds]


@pytest.fixture
def dense(factors) -> Tensor:
    """(L, B, Q, H, W), value by value."""
    return torch.stack(
        [(m.embed[:, :, :, None, None] * m.features[:, None]).sum(2) for m in factors]
    )


@pytest.fixture(params=["factors", "dense"])
def masks(request, factors, dense) -> LayeredMasks:
    return layered(factors if request.param == "factors" else dense)


def layered(layers) -> LayeredMasks:
    return LayeredMasks([{"pred_masks": masks} for masks in layers])


def all_at_points(masks: LayeredMasks, image: int, points: Tensor) -> Tensor:
    """(L, Q, P), from the chunks in order."""
    chunks = list(masks.at_points(image, points))
    layers = [i for part, _ in chunks for i in range(NUM_LAYERS)[part]]
    assert layers == list(range(NUM_LAYERS))
    return torch.cat([logits for _, logits in chunks])


@pytest.fixture
def no_full_masks(monkeypatch):
    def fail(self):
        raise AssertionError("full-size masks of all queries were computed")

    monkeypatch.setattr(MaskFactors, "full", fail)


def test_product_by_hand():
    embed = torch.tensor([[[1.0, 2.0], [0.0, -1.0]]])
    features = torch.tensor([[[[1.0, 0.0]], [[3.0, 5.0]]]])  # two channels of 1×2 pixels
    masks = MaskFactors(embed, features)
    assert masks.shape == (1, 2, 1, 2)
    assert masks.full().tolist() == [[[[7.0, 10.0]], [[-3.0, -5.0]]]]


def test_full_masks(factors, dense):
    torch.testing.assert_close(torch.stack([m.full() for m in factors]), dense)


@pytest.mark.usefixtures("no_full_masks")
def test_select(masks, dense):
    # Query 3 of layer 0, none of layer 1, queries 0 and 2 of layer 2.
    rows = torch.tensor([3, 2 * NUM_QUERIES, 2 * NUM_QUERIES + 2])
    expected = torch.stack([dense[0, 1, 3], dense[2, 1, 0], dense[2, 1, 2]])
    torch.testing.assert_close(masks.select(1, rows, [1, 0, 2]), expected)


@pytest.mark.usefixtures("no_full_masks")
def test_select_nothing(masks):
    rows = torch.empty(0, dtype=torch.int64)
    assert masks.select(0, rows, [0, 0, 0]).shape == (0, 5, 6)


@pytest.mark.usefixtures("no_full_masks")
def test_at_points_of_pixel_centres(masks, dense):
    # Centres of pixels (row 0, column 0), (4, 5) and (2, 3); the last point is well outside.
    points = torch.tensor([[0.5 / 6, 0.5 / 5], [5.5 / 6, 4.5 / 5], [3.5 / 6, 2.5 / 5], [3.0, 3.0]])
    image = dense[:, 1]  # (L, Q, H, W)
    pixels = torch.stack([image[..., 0, 0], image[..., 4, 5], image[..., 2, 3]], -1)
    expected = torch.cat([pixels, torch.zeros(NUM_LAYERS, NUM_QUERIES, 1)], -1)
    torch.testing.assert_close(all_at_points(masks, 1, points), expected)


@pytest.mark.parametrize("limit", [1, 2 * NUM_QUERIES * 50, 2**23])  # one layer, two, all at once
def test_at_points_between_pixels(limit, factors, dense, monkeypatch):
    monkeypatch.setitem(mask_factors._MAX_LOGITS, "cpu", limit)
    points = torch.rand(50, 2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        all_at_points(layered(factors), 0, points), all_at_points(layered(dense), 0, points)
    )


def test_at_points_of_half_precision_are_float32(factors, dense):
    half = [MaskFactors(m.embed.bfloat16(), m.features.bfloat16()) for m in factors]
    half = [MaskFactors(m.embed, half[0].features) for m in half]  # layers share their features
    for layers in (half, dense.bfloat16()):
        assert all_at_points(layered(layers), 0, torch.rand(7, 2)).dtype == torch.float32


def test_points_have_no_gradients_but_selected_masks_do(factors):
    embed = factors[0].embed.requires_grad_()
    features = factors[0].features.requires_grad_()
    masks = layered([MaskFactors(embed, features)])
    [(_, logits)] = masks.at_points(0, torch.rand(7, 2))
    assert not logits.requires_grad
    masks.select(0, torch.tensor([1]), [1]).sum().backward()
    # d/d embed of the sum of one mask is the sum of the features over pixels.
    torch.testing.assert_close(embed.grad[0, 1], features.detach()[0].sum((1, 2)))
    assert not embed.grad[0, [0, 2, 3]].any() and not embed.grad[1].any()
    assert features.grad[0].any() and not features.grad[1].any()
