"""How deep parameters of backbones are, and the layer-wise learning rates that follow."""

import pytest
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from torch import nn

from mask2former.modeling.backbone.depths import depths_of, is_token, layer_decay_of
from mask2former.modeling.backbone.swin import SwinTransformer

SMALL = {"embed_dim": 24, "num_heads": (3, 6, 12, 24)}


@pytest.fixture
def resnet(tiny_cfg):
    return build_backbone(tiny_cfg, ShapeSpec(channels=3))


def test_each_residual_block_is_one_depth(resnet):
    num_depths, depth = depths_of(resnet)
    assert num_depths == 9  # ResNet-18: the stem and 4 stages of 2 blocks
    assert depth("stem.conv1.weight") == 0
    assert depth("res2.0.conv1.weight") == 1
    assert depth("res2.1.conv2.weight") == 2
    assert depth("res4.0.shortcut.weight") == 5
    assert depth("res5.1.conv2.norm.weight") == 8
    assert {depth(name) for name, _ in resnet.named_parameters()} == set(range(9))


def test_a_feature_pyramid_is_behind_the_last_block(resnet):
    fpn = FPN(resnet, ["res2", "res3"], 8)
    num_depths, depth = depths_of(fpn)
    assert (num_depths, depth("fpn_lateral2.weight"), depth("bottom_up.res2.0.conv1.weight")) == (
        *(9, 9),
        1,
    )


def test_each_block_of_swin_is_one_depth():
    swin = SwinTransformer(**SMALL, depths=(2, 1, 3, 1), ape=True)
    assert swin.num_depths == 8
    depths = {name: swin.parameter_depth(name) for name, _ in swin.named_parameters()}
    assert depths["patch_embed.proj.weight"] == depths["absolute_pos_embed"] == 0
    assert depths["layers.0.blocks.1.norm1.weight"] == depths["layers.0.downsample.norm.bias"] == 2
    assert depths["layers.2.blocks.0.attn.relative_position_bias_table"] == 4
    assert depths["layers.3.blocks.0.mlp.fc1.weight"] == 7
    assert depths["norm0.weight"] == depths["norm3.weight"] == 8
    assert set(depths.values()) == set(range(9))


def test_decay_has_the_exponents_of_detectron2():
    """Detectron2 numbers the same blocks by names of a ViT."""

    class ViT(nn.Module):
        num_depths = 13

        def parameter_depth(self, name):
            parts = name.split(".")
            return int(parts[1]) + 1 if parts[0] == "blocks" else 0

    factor = layer_decay_of(ViT(), 0.7)
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.norm1.bias", "blocks.11.attn.q"):
        expected = get_vit_lr_decay_rate(f"backbone.net.{name}", 0.7, num_layers=12)
        assert factor(name) == pytest.approx(expected)


def test_what_a_backbone_must_have():
    with pytest.raises(ValueError, match=r"LAYER_DECAY is set, but .* Conv2d .*`num_depths`.*`par"):
        layer_decay_of(nn.Conv2d(1, 1, 1), 0.9)
    wrong = nn.Conv2d(1, 1, 1)
    wrong.num_depths, wrong.parameter_depth = 3, lambda name: 4
    with pytest.raises(ValueError, match=r"parameter_depth\('weight'\) is 4; allowed: 0 to .* 3"):
        layer_decay_of(wrong, 0.9)("weight")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("net.pos_embed", True),
        ("model.cls_token", True),
        ("model.rope.freqs", True),
        ("reg_token", True),
        ("patch_embed.proj.weight", False),
        ("blocks.0.attn.qkv.bias", False),
        ("token_mixer.weight", False),
    ],
)
def test_tokens_and_tables(name, expected):
    assert is_token(name) is expected
