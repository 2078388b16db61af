"""BiFPN: fusion weights, a layer by hand, and what the last layer leaves out."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn

from mask2former.modeling import BiFPNPixelDecoder
from mask2former.modeling.pixel_decoder.bifpn import BiFPNLayer, FusionNode


def make_linear(module: nn.Module) -> None:
    """Let every node of one channel return the mean of its inputs."""
    for node in module.modules():
        if isinstance(node, FusionNode):
            nn.init.zeros_(node.depthwise.weight)
            node.depthwise.weight.data[:, :, 1, 1] = 1.0
            nn.init.ones_(node.pointwise.weight)
            node.pointwise.activation = None


def numbers(maps: list[torch.Tensor]) -> list[list[float]]:
    return [x.flatten().tolist() for x in maps]


def test_fusion_by_hand():
    """Weights 2, -3 and 1: two thirds, nothing, one third."""
    node = FusionNode(3, 1, norm="")
    make_linear(node)
    node.weights.data = torch.tensor([2.0, -3.0, 1.0])
    maps = [torch.full((1, 1, 2, 2), value) for value in (3.0, 100.0, 9.0)]
    torch.testing.assert_close(node(*maps), torch.full((1, 1, 2, 2), 5.0), rtol=1e-4, atol=0)
    node.weights.data.fill_(-1.0)  # ε avoids 0 / 0
    assert not node(*maps).any()


def test_node_is_a_separable_convolution_norm_and_silu():
    torch.manual_seed(0)
    node = FusionNode(2, 32, norm="GN")
    assert sum(p.numel() for p in node.parameters()) == 2 + 32 * 9 + 32 * 32 + 2 * 32
    x, y = torch.randn(2, 2, 32, 5, 6)
    mean = (x + y) / (2 + 1e-4)
    kernel = node.pointwise.weight * node.depthwise.weight[:, 0]  # (C, C, 3, 3)
    dense = nn.functional.conv2d(mean, kernel, padding=1)
    expected = nn.functional.silu(nn.functional.group_norm(dense, 32))
    torch.testing.assert_close(node(x, y), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def maps() -> list[torch.Tensor]:
    rows = [[8.0, 0, 4, 2], [4.0, 10], [6.0]]
    return [torch.tensor(row).view(1, 1, 1, -1) for row in rows]


def test_layer_by_hand(maps):
    layer = BiFPNLayer([4, 8, 16], 1, norm="")
    make_linear(layer)
    fine, mid, coarse = numbers(layer(maps))
    # Top-down: mid (4 10 + 6 6) / 2 = 5 8; fine (8 0 4 2 + 5 5 8 8) / 2.
    assert fine == pytest.approx([6.5, 2.5, 6, 5], rel=1e-3)
    # Bottom-up: largest of 3 neighbours 6.5 6, with 4 10 and 5 8; then 8, with 6.
    assert mid == pytest.approx([15.5 / 3, 8], rel=1e-3)
    assert coarse == pytest.approx([7], rel=1e-3)


def test_layer_without_bottom_up_by_hand(maps):
    layer = BiFPNLayer([4, 8, 16], 1, norm="", bottom_up=False)
    make_linear(layer)
    fine, mid, coarse = numbers(layer(maps))
    assert fine == pytest.approx([6.5, 2.5, 6, 5], rel=1e-3)
    assert mid == pytest.approx([5, 8], rel=1e-3)
    assert coarse == [6]


def test_only_the_last_layer_leaves_out_the_bottom_up_pass():
    shapes = {name: ShapeSpec(channels=4, stride=stride) for name, stride in (("a", 4), ("b", 8))}
    for last_bottom_up, expected in ((True, [1, 1, 1]), (False, [1, 1, 0])):
        decoder = BiFPNPixelDecoder(
            shapes,
            conv_dim=8,
            mask_dim=5,
            norm="",
            num_layers=3,
            last_bottom_up=last_bottom_up,
        )
        assert [len(layer.bottom_up) for layer in decoder.layers] == expected


@pytest.mark.parametrize(
    ("head", "in_feature", "expected"),
    [
        ("MaskFormerHead", "multi_scale_pixel_decoder", True),
        ("MaskFormerHead", "res5", False),
        ("PerPixelBaselineHead", "multi_scale_pixel_decoder", False),  # which it does not read
        ("HeadOfAnotherProject", "res5", True),
    ],
)
def test_last_bottom_up_follows_the_head(tiny_cfg, head, in_feature, expected):
    tiny_cfg.MODEL.SEM_SEG_HEAD.NAME = head
    tiny_cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = in_feature
    shapes = {f"res{i}": ShapeSpec(channels=4, stride=2**i) for i in range(2, 6)}
    keywords = BiFPNPixelDecoder.from_config(tiny_cfg, shapes)
    assert keywords["last_bottom_up"] is expected
    assert keywords["num_layers"] == 9
    del tiny_cfg.MODEL.SEM_SEG_HEAD["BIFPN_LAYERS"]  # as projects with their own list of keys
    assert BiFPNPixelDecoder.from_config(tiny_cfg, shapes)["num_layers"] == 9
