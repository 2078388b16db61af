"""Resizing of mask features, and what the decoder computes for the criterion.

Shape letters: B batch, Q queries, C channels, H W pixels.
"""

import pytest
import torch
from torch import nn

from mask2former.fast.decoder import _resize, decode_to_factors
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


def test_factors_multiply_to_the_masks_of_the_public_forward(monkeypatch):
    torch.manual_seed(0)
    decoder = MultiScaleMaskedTransformerDecoder(
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
