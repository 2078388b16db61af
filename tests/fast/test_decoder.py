"""Resizing of mask features, and what the decoder computes for the criterion.

Shape letters: B batch, Q queries, C channels, H W pixels.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mask2former.fast import decoder as fast_decoder
from mask2former.fast.decoder import _added_mask, _blocked, _resize, decode_to_factors
from mask2former.fast.mask_factors import MaskFactors
from mask2former.modeling.transformer_decoder import MultiScaleMaskedTransformerDecoder


@pytest.mark.parametrize(
    "size", [(8, 12), (4, 6), (2, 3), (2, 6), (1, 1), (16, 24), (5, 7), (20, 24)]
)
def test_resize_equals_interpolate(size):
    """By even factors, which average four pixels, and by others."""
    x = torch.randn(2, 3, 16, 24)
    expected = nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(_resize(x, size), expected, atol=1e-6, rtol=0)


def build_decoder() -> MultiScaleMaskedTransformerDecoder:
    torch.manual_seed(0)
    return MultiScaleMaskedTransformerDecoder(
        16,
        num_classes=3,
        hidden_dim=16,
        num_queries=5,
        nheads=4,
        dim_feedforward=24,
        dec_layers=4,
        pre_norm=False,
        mask_dim=6,
        enforce_input_project=False,
    )


def test_factors_multiply_to_the_masks_of_the_public_forward(monkeypatch):
    decoder = build_decoder()
    scales = [torch.randn(2, 16, *size) for size in ((2, 3), (4, 6), (8, 12))]
    mask_features = torch.randn(2, 6, 16, 24)
    outputs = decoder(scales, mask_features)
    full = MaskFactors.full

    def fail(self):
        raise AssertionError("full-size masks of all queries were computed")

    monkeypatch.setattr(MaskFactors, "full", fail)
    predictions = decode_to_factors(decoder, scales, mask_features)
    layers = [*outputs["aux_outputs"], outputs]
    for prediction, expected in zip(predictions, layers, strict=True):
        assert prediction["pred_masks"].features is mask_features
        assert torch.equal(prediction["pred_logits"], expected["pred_logits"])
        assert torch.equal(full(prediction["pred_masks"]), expected["pred_masks"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_added_mask(dtype):
    """Blocks what the boolean mask blocks; every query sees something."""
    logits = torch.tensor(
        [
            [-1.0, 2.0, -3.0, 0.0, -0.5],
            [-1.0, -2.0, -3.0, -1e-30, -0.5],  # would see nothing
            [1.0, 2.0, 3.0, 4.0, 5.0],
        ]
    ).to(dtype)[None]
    added = _added_mask(F.pad(logits, (0, 11)), 5)
    blocked = -float("inf")
    expected = torch.zeros(3, 5)
    expected[0, [0, 2, 4]] = blocked
    assert added.dtype == dtype and torch.equal(added[0].float(), expected)
    assert torch.equal(added == blocked, _blocked(logits))
    assert added.stride() == (48, 16, 1)


def test_added_masks_change_no_prediction(monkeypatch):
    """Nor gradients."""
    decoder = build_decoder()
    scales = [torch.randn(2, 16, *size) for size in ((3, 5), (4, 6), (9, 11))]
    mask_features = torch.randn(2, 6, 16, 24)

    def run():
        predictions = decode_to_factors(decoder, scales, mask_features)
        out = [p["pred_logits"] for p in predictions] + [
            p["pred_masks"].full() for p in predictions
        ]
        total = sum((x * torch.linspace(-1, 2, x.numel()).view_as(x)).sum() for x in out)
        return [*out, *torch.autograd.grad(total, list(decoder.parameters()), allow_unused=True)]

    expected, masks = run(), []

    def added(logits):
        length = logits.shape[-1]
        mask = _added_mask(F.pad(logits, (0, -length % 16)), length)
        masks.append(mask)
        return mask

    # What runs off the CPU.
    monkeypatch.setattr(fast_decoder, "_blocked", added)
    for result, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(result, other, atol=1e-5, rtol=1e-5)
    assert len(masks) == 4 and any(mask.isinf().any() for mask in masks)
