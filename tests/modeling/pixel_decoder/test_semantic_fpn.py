"""Semantic FPN: the branches by hand, and the order of summing and upsampling."""

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import nn

from mask2former.modeling import SemanticFPNPixelDecoder


def build(strides: list[int], conv_dim: int = 1) -> SemanticFPNPixelDecoder:
    torch.manual_seed(0)
    shapes = {f"s{stride}": ShapeSpec(channels=conv_dim, stride=stride) for stride in strides}
    return SemanticFPNPixelDecoder(shapes, conv_dim=conv_dim, mask_dim=1, norm="")


def test_numbers_by_hand():
    """Three levels, one channel, convolutions that multiply."""
    decoder = build([4, 8, 16])
    coarse, mid, fine = decoder.branches
    assert [len(branch) for branch in decoder.branches] == [2, 1, 1]
    factors = [(coarse[0], 2.0), (coarse[1], 3.0), (mid[0], 1.0), (fine[0], 1.0)]
    factors += [(conv, 1.0) for conv in decoder.output_convs]
    factors += [(conv, 1.0) for conv in decoder.lateral_convs[1:]]
    factors += [(decoder.mask_features, 100.0)]
    for conv, factor in factors:
        nn.init.zeros_(conv.weight)
        centre = conv.kernel_size[0] // 2
        conv.weight.data[0, 0, centre, centre] = factor
    x = {
        "s16": torch.tensor([[[[1.0]]]]),
        "s8": torch.tensor([[[[-1.0, 3.0]]]]),
        "s4": torch.tensor([[[[10.0, 20.0, 26.0, 36.0]]]]),
    }
    mask_features, encoded, scales = decoder(x)
    # Pyramid: 1; -1 + 1, 3 + 1; and with 0 0 4 4 added to the finest.
    assert encoded is None
    assert [scale.flatten().tolist() for scale in scales] == [[1], [0, 4], [10, 20, 30, 40]]
    # Branches: 2 · 3 · 1 everywhere; 0 4 upsampled to 0 1 3 4; the finest.
    assert mask_features.flatten().tolist() == [1600, 2700, 3900, 5000]


def test_upsampling_the_sum_equals_summing_the_upsampled():
    decoder = build([4, 8, 16, 32], conv_dim=3).double()
    sizes = [(2, 3), (3, 5), (5, 9), (9, 17)]
    pyramid = [torch.rand(2, 3, *size, dtype=torch.float64) for size in sizes]
    expected = decoder.branches[3][0](pyramid[3])
    for level, (y, branch) in enumerate(zip(pyramid[:3], decoder.branches, strict=False)):
        assert len(branch) == 3 - level
        for conv, size in zip(branch, sizes[level + 1 :], strict=True):
            y = F.interpolate(conv(y), size=size, mode="bilinear", align_corners=False)
        expected = expected + y
    torch.testing.assert_close(decoder._sum(pyramid), expected)
