"""Plain vision transformers of timm with a simple feature pyramid.

Shape letters: B batch, C channels, H W pixels.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mask2former.config import load_config
from mask2former.modeling.backbone import TimmViTBackbone

timm = pytest.importorskip("timm")

RECIPES = Path(__file__).parents[3] / "configs/coco/panoptic-segmentation/timm"
# Small models: class token; registers; RoPE (DINOv3's class); patches of 14 and of 8 pixels.
MODELS = ("test_vit", "test_vit2", "test_vit3", "eva02_tiny_patch14_224", "vit_small_patch8_224")
ODD = (97, 131)
STRIDES = (4, 8, 16, 32)


def build(name, seed=0, **options):
    """A backbone whose parameters are random, also those that are initialised to 0."""
    torch.manual_seed(seed)
    backbone = TimmViTBackbone(name=name, **{"out_channels": 16, **options})
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone


def odd_shapes():
    return [(16, -(-ODD[0] // stride), -(-ODD[1] // stride)) for stride in STRIDES]


def weighted_sum(features):
    generator = torch.Generator().manual_seed(1)
    return sum((x * torch.randn(x.shape, generator=generator)).mean() for x in features.values())


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_gradients(name):
    backbone = build(name).train()
    shapes = backbone.output_shape()
    assert {n: (s.channels, s.stride) for n, s in shapes.items()} == {
        f"res{i}": (16, 2**i) for i in range(2, 6)
    }
    features = backbone(torch.randn(2, 3, *ODD))
    assert list(features) == list(shapes)
    assert [tuple(x.shape[1:]) for x in features.values()] == odd_shapes()
    weighted_sum(features).backward()
    without = [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    depths = {backbone.parameter_depth(n) for n, _ in backbone.named_parameters()}
    # The embeddings, the blocks, the pyramid.
    assert depths == set(range(backbone.num_depths + 1))
    assert backbone.num_depths == len(backbone.timm_model.blocks) + 1
    assert backbone.parameter_depth("simfp_2.0.weight") == backbone.num_depths


@pytest.mark.parametrize("in_channels", [1, 4])
def test_number_of_channels(in_channels):
    features = build("test_vit", in_channels=in_channels)(torch.randn(1, in_channels, *ODD))
    assert [tuple(x.shape[1:]) for x in features.values()] == odd_shapes()


@pytest.mark.parametrize(("name", "patch"), [("test_vit", 16), ("eva02_tiny_patch14_224", 14)])
def test_tokens_are_those_of_timm(name, patch):
    """Of the image scaled so that a patch covers 16 × 16 pixels; normalised, without prefixes."""
    backbone = build(name).eval()
    peer = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    peer.load_state_dict(backbone.timm_model.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 96)
    scaled = F.interpolate(images, (4 * patch, 6 * patch), mode="bilinear", antialias=True)
    with torch.no_grad():
        tokens = backbone.net(images)["tokens"]
        expected = peer.forward_features(scaled)[:, peer.num_prefix_tokens :]
    assert tokens.shape[2:] == (4, 6)
    torch.testing.assert_close(tokens.flatten(2).mT, expected, rtol=1e-4, atol=1e-5)


def test_maps_lie_where_the_image_does():
    """A bright square moves the response of each level by as many pixels as it moves."""
    backbone = build("eva02_tiny_patch14_224").eval()
    for block in backbone.timm_model.blocks:  # so that only the patch embedding sees the image
        for parameter in block.parameters():
            parameter.data.zero_()
    images = torch.zeros(2, 3, 128, 128)
    images[0, :, 32:64, 64:96] = 5
    with torch.no_grad():
        features = backbone(images)
    for map_, stride in zip(features.values(), STRIDES, strict=True):
        change = (map_[0] - map_[1]).abs().mean(0)
        y, x = divmod(int(change.argmax()), change.shape[1])
        # One patch, and the 3 × 3 convolution, around the square.
        assert 32 - 32 - stride <= y * stride < 64 + 32 + stride
        assert 64 - 32 - stride <= x * stride < 96 + 32 + stride


def test_models_that_pass_options_on():
    """The constructor of DeiT has the option of any image size in that of the class it extends."""
    backbone = TimmViTBackbone(
        name="deit_tiny_distilled_patch16_224", out_channels=16, drop_path_rate=0.1
    )
    assert backbone(torch.zeros(1, 3, 64, 96))["res4"].shape == (1, 16, 4, 6)


def test_one_pixel():
    features = build("test_vit").eval()(torch.randn(1, 3, 1, 1))
    assert {tuple(x.shape[2:]) for x in features.values()} == {(1, 1)}


def test_freezing():
    """The embeddings, then blocks; the pyramid is always trained."""
    for freeze_at, num_frozen in ((0, 0), (1, 0), (3, 2)):
        backbone = build("test_vit", freeze_at=freeze_at, drop_path_rate=0.5).train()
        model = backbone.timm_model
        assert model.pos_embed.requires_grad == (freeze_at == 0)
        assert model.cls_token.requires_grad == (freeze_at == 0)
        trained = [block.attn.qkv.weight.requires_grad for block in model.blocks]
        assert trained == [i >= num_frozen for i in range(len(model.blocks))]
        # Without stochastic depth in what is frozen.
        assert [block.training for block in model.blocks] == trained
        assert backbone.simfp_2[0].weight.requires_grad
    whole = len(model.blocks) + 1
    backbone = build("test_vit", freeze_at=whole)
    assert not any(p.requires_grad for p in backbone.timm_model.parameters())
    with pytest.raises(ValueError, match=f"FREEZE_AT is {whole + 1}; allowed.*0 to {whole}"):
        backbone.freeze(whole + 1)


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for enabled in (False, True):
        backbone = build("test_vit3").train()
        backbone.set_checkpointing(enabled)
        weighted_sum(backbone(torch.ones(2, 3, 64, 64))).backward()
        grads.append([p.grad for p in backbone.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


WRONG = {
    "unknown": ("vit_bse_patch16_224", r"MODEL\.VIT\.NAME is 'vit_bse.*Did you mean vit_base_pat"),
    "hierarchical": ("resnet10t", r"strides \[2, 4, .*MODEL\.BACKBONE\.NAME to TimmBackbone"),
    "one size": ("beit_base_patch16_224", "does not take images of any size"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_names(case):
    name, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        TimmViTBackbone(name=name)


def test_deterministic_training_on_a_gpu():
    """torch cannot train interpolated position embeddings so; DINOv3's are computed."""
    on_gpu = ["MODEL.DEVICE", "cuda", "DETERMINISTIC", "True"]
    recipe = str(RECIPES / "maskformer2_dinov2_base_bs16_50ep.yaml")
    with pytest.raises(ValueError, match=r"DETERMINISTIC is True and MODEL\.VIT\.NAME is 'vit_b"):
        load_config(recipe, on_gpu)
    load_config(recipe, [*on_gpu, "MODEL.BACKBONE.FREEZE_AT", "1"])
    load_config(str(RECIPES / "maskformer2_dinov3_large_bs16_50ep.yaml"), on_gpu)
