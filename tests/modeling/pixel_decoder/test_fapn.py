"""FaPN: feature selection and feature alignment by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import nn

from mask2former.modeling import FaPNPixelDecoder
from mask2former.modeling.pixel_decoder.fapn import FeatureAlignment, FeatureSelection


@pytest.fixture
def alignment() -> FeatureAlignment:
    torch.manual_seed(0)
    module = FeatureAlignment(16, norm="")
    nn.init.normal_(module.conv.bias)
    return module


def aligned_map(module: FeatureAlignment, fine: torch.Tensor, coarse: torch.Tensor):
    """What is added to the finer map."""
    return module(fine, coarse) - fine


def test_feature_selection_by_hand():
    """Two channels whose means are 2 and 4, added by a convolution."""
    selection = FeatureSelection(2, 1, norm="")
    x = torch.tensor([[[[0.0, 4.0]], [[3.0, 5.0]]]])
    nn.init.ones_(selection.selection.weight)
    nn.init.zeros_(selection.selection.bias)
    # Attention logits: log 3 · mean / 2 of the first channel, 0.
    selection.attention.weight.data = torch.tensor([math.log(3) / 2, 0, 0, 0]).view(2, 2, 1, 1)
    nn.init.zeros_(selection.attention.bias)
    # Attention 3/4 and 1/2: 1.75 · 0 4 + 1.5 · 3 5.
    torch.testing.assert_close(selection(x), torch.tensor([[[[4.5, 14.5]]]]))


def test_initial_alignment_is_a_plain_convolution(alignment):
    """Offsets 0, modulation 1/2."""
    fine, coarse = torch.randn(2, 16, 7, 10), torch.randn(2, 16, 4, 5)
    upsampled = F.interpolate(coarse, size=(7, 10), mode="bilinear", align_corners=False)
    expected = F.relu(
        F.conv2d(upsampled / 2, alignment.conv.weight, alignment.conv.bias, padding=1)
    )
    actual = aligned_map(alignment, fine, coarse)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_offsets_move_the_samples(alignment):
    """One pixel to the right, with modulation 1: the convolution of the shifted map."""
    nn.init.constant_(alignment.modulation.bias, 50.0)
    alignment.offset.bias.data[1::2] = 1.0  # pairs (y, x)
    fine, coarse = torch.randn(2, 16, 6, 9), torch.randn(2, 16, 6, 9)
    shifted = F.pad(coarse, (0, 2))[..., 1:]  # one column wider, for the kernel at the last one
    expected = F.relu(F.conv2d(shifted, alignment.conv.weight, alignment.conv.bias, padding=1))
    actual = aligned_map(alignment, fine, coarse)
    # The first column of the shifted map has a left neighbour, not padding.
    torch.testing.assert_close(actual[..., 1:], expected[..., 1:9], rtol=1e-4, atol=1e-5)


def test_offsets_depend_on_both_maps(alignment):
    nn.init.normal_(alignment.offset.weight)
    fine, coarse = torch.randn(1, 16, 6, 9), torch.randn(1, 16, 3, 5)
    before = aligned_map(alignment, fine, coarse)
    assert not torch.allclose(before, aligned_map(alignment, fine + 1, coarse), atol=1e-3)


def test_channels_without_whole_groups():
    shapes = {name: ShapeSpec(channels=4, stride=stride) for name, stride in (("a", 4), ("b", 8))}
    with pytest.raises(ValueError, match="12 channels; allowed: multiples of 8"):
        FaPNPixelDecoder(shapes, conv_dim=12, mask_dim=5, norm="")
