"""What the pixel decoders of Table 4e share: shapes, sizes, gradients, config, training."""

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_model
from small_parts import CHANNELS, STRIDES, features
from torch import Tensor, nn

from mask2former.config import check_config
from mask2former.modeling import (
    BiFPNPixelDecoder,
    FaPNPixelDecoder,
    SemanticFPNPixelDecoder,
)
from mask2former.modeling.pixel_decoder import build_pixel_decoder

DECODERS = [SemanticFPNPixelDecoder, FaPNPixelDecoder, BiFPNPixelDecoder]
SHAPES = {name: ShapeSpec(channels=CHANNELS[name], stride=STRIDES[name]) for name in CHANNELS}
all_decoders = pytest.mark.parametrize("kind", DECODERS)


def build(kind: type[nn.Module], shapes=SHAPES, norm="GN", **keywords) -> nn.Module:
    torch.manual_seed(0)
    if kind is BiFPNPixelDecoder:
        keywords = {"num_layers": 2} | keywords
    return kind(shapes, conv_dim=32, mask_dim=5, norm=norm, **keywords)


def randomise_offsets(module: nn.Module) -> None:
    """They start at 0, with which what they are predicted from has no effect."""
    for name, parameter in module.named_parameters():
        if "offset.weight" in name or "modulation.weight" in name:
            nn.init.normal_(parameter, std=0.1)


def features_of_sizes(sizes: dict[str, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(1, CHANNELS[name], size, size + 1, generator=generator)
        for name, size in sizes.items()
    }


def without_gradient(module: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]


@all_decoders
@pytest.mark.parametrize("norm", ["GN", ""])
def test_shapes_from_low_to_high_resolution(kind, norm):
    mask_features, encoded, scales = build(kind, norm=norm)(features(64, 96))
    assert mask_features.shape == (2, 5, 16, 24)
    assert encoded is None
    assert [tuple(x.shape) for x in scales] == [(2, 32, 2, 3), (2, 32, 4, 6), (2, 32, 8, 12)]


@all_decoders
@pytest.mark.parametrize(
    "sizes",
    [(7, 4, 2, 1), (7, 3, 1, 1), (9, 5, 3, 2), (1, 1, 1, 1)],
    ids=["up", "down", "odd", "one"],
)
def test_odd_sizes(kind, sizes):
    """Backbones round sizes up or down."""
    x = features_of_sizes(dict(zip(CHANNELS, sizes, strict=True)))
    mask_features, _, scales = build(kind, norm="")(x)  # one value has no statistics
    assert mask_features.shape == (1, 5, sizes[0], sizes[0] + 1)
    assert [x.shape[-1] - 1 for x in scales] == [sizes[3], sizes[2], sizes[1]]


@all_decoders
@pytest.mark.parametrize(
    "strides",
    [(4,), (8, 32), (4, 8, 16, 16), (2, 4, 8, 16, 32), (4, 12, 36)],
    ids=str,
)
def test_any_strides(kind, strides):
    """One level, missing levels, a dilated last stage, five levels, no powers of two."""
    shapes = {f"f{i}": ShapeSpec(channels=6, stride=s) for i, s in enumerate(strides)}
    x = {name: torch.randn(2, 6, -(-100 // s.stride), 72 // s.stride) for name, s in shapes.items()}
    mask_features, _, scales = build(kind, shapes)(x)
    assert mask_features.shape[-2:] == x["f0"].shape[-2:]
    coarsest_first = list(reversed(x.values()))[:3]
    assert [y.shape[-2:] for y in scales] == [y.shape[-2:] for y in coarsest_first]


@all_decoders
@pytest.mark.parametrize("norm", ["GN", ""])
def test_every_parameter_gets_a_gradient(kind, norm):
    decoder = build(kind, norm=norm)
    randomise_offsets(decoder)
    mask_features, _, scales = decoder(features())
    sum(x.square().sum() for x in (mask_features, *scales)).backward()
    assert without_gradient(decoder) == []


@all_decoders
def test_images_of_a_batch_are_independent(kind):
    decoder, x = build(kind).eval(), features()
    mask_features, _, scales = decoder(x)
    first, _, first_scales = decoder({name: y[:1] for name, y in x.items()})
    for expected, actual in zip((mask_features, *scales), (first, *first_scales), strict=True):
        torch.testing.assert_close(actual, expected[:1], rtol=1e-4, atol=1e-5)


@all_decoders
def test_autocast(kind):
    decoder, x = build(kind), features()
    randomise_offsets(decoder)
    expected, _, _ = decoder(x)
    with torch.autocast("cpu", torch.bfloat16):
        mask_features, _, _ = decoder(x)
    mask_features.float().sum().backward()
    error = (mask_features.float() - expected).abs().mean()
    assert error < 0.03 * expected.abs().mean()


@all_decoders
def test_build_from_config(kind, tiny_cfg):
    assert SEM_SEG_HEADS_REGISTRY.get(kind.__name__) is kind
    head = tiny_cfg.MODEL.SEM_SEG_HEAD
    head.PIXEL_DECODER_NAME, head.NORM = kind.__name__, "LN"
    head.IN_FEATURES = ["res5", "res3", "res4"]
    decoder = build_pixel_decoder(tiny_cfg, SHAPES)
    assert type(decoder) is kind
    assert decoder.in_features == ["res3", "res4", "res5"]
    assert decoder.mask_features.weight.shape == (32, 64, 3, 3)
    assert any(type(module).__name__ == "LayerNorm" for module in decoder.modules())
    head.IN_FEATURES = ["res2", "res6"]
    with pytest.raises(ValueError, match=r"\['res6'\].*res2.*res5"):
        build_pixel_decoder(tiny_cfg, SHAPES)


@all_decoders
def test_training_and_inference(kind, tiny_cfg, make_input):
    """Two steps with the masked decoder on images of two sizes, then predictions."""
    tiny_cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = kind.__name__
    tiny_cfg.MODEL.SEM_SEG_HEAD.BIFPN_LAYERS = 2
    check_config(tiny_cfg)
    torch.manual_seed(0)
    model = build_model(tiny_cfg)
    batch = [make_input(33, 65, [0, 2]), make_input(40, 50, [1])]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    # The first step moved the offsets away from 0.
    assert without_gradient(model.sem_seg_head.pixel_decoder) == []
    with torch.no_grad():
        results = model.eval()(batch)
    assert [tuple(r["sem_seg"].shape) for r in results] == [(3, 33, 65), (3, 40, 50)]
    assert all(r["sem_seg"].isfinite().all() for r in results)


def standard_decoder(cfg: CfgNode) -> None:
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = "StandardTransformerDecoder"
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "res5"


def per_pixel(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PerPixelBaselineHead"


def per_pixel_plus(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.SEM_SEG_HEAD.NAME = "PerPixelBaselinePlusHead"
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "res5"


@all_decoders
@pytest.mark.parametrize("change", [standard_decoder, per_pixel, per_pixel_plus])
def test_heads_that_use_the_mask_features_only(kind, change, tiny_cfg, make_input):
    """Distributed training requires that they too give every parameter a gradient."""
    tiny_cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = kind.__name__
    tiny_cfg.MODEL.SEM_SEG_HEAD.BIFPN_LAYERS = 2
    change(tiny_cfg)
    check_config(tiny_cfg)
    torch.manual_seed(0)
    model = build_model(tiny_cfg)
    randomise_offsets(model)
    batch = [make_input(64, 64, [0, 1, 2], sem_seg=torch.zeros(64, 64, dtype=torch.int64))]
    sum(model(batch).values()).backward()
    assert without_gradient(model.sem_seg_head.pixel_decoder) == []
