"""The FPN pixel decoders: names of the original, numbers by hand, gradients, bad input."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.projects.deeplab import add_deeplab_config
from torch import nn

from mask2former.config import add_maskformer2_config
from mask2former.modeling.pixel_decoder.fpn import (
    BasePixelDecoder,
    TransformerEncoderOnly,
    TransformerEncoderPixelDecoder,
    build_pixel_decoder,
)

CHANNELS = {"res2": 4, "res3": 6, "res4": 8, "res5": 10}
SHAPES = {
    name: ShapeSpec(channels=channels, stride=4 * 2**i)
    for i, (name, channels) in enumerate(CHANNELS.items())
}
ENCODER = {
    "transformer_dropout": 0.0,
    "transformer_nheads": 4,
    "transformer_dim_feedforward": 16,
    "transformer_enc_layers": 2,
    "transformer_pre_norm": False,
}


def features(height=64, width=96, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(
            batch, s.channels, height // s.stride, width // s.stride, generator=generator
        )
        for name, s in SHAPES.items()
    }


def small_cfg(name, **keys):
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    head = cfg.MODEL.SEM_SEG_HEAD
    head.PIXEL_DECODER_NAME = name
    head.IN_FEATURES = list(SHAPES)
    head.CONVS_DIM, head.MASK_DIM, head.NORM = 8, 5, "LN"
    head.TRANSFORMER_ENC_LAYERS = 1
    cfg.MODEL.MASK_FORMER.NHEADS = 2
    cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD = 12
    cfg.MODEL.MASK_FORMER.DROPOUT = 0.25
    return cfg


def build(kind, **keywords):
    torch.manual_seed(0)
    if kind is TransformerEncoderPixelDecoder:
        keywords = ENCODER | keywords
    return kind(SHAPES, conv_dim=32, mask_dim=5, **keywords)


@pytest.mark.parametrize("kind", [BasePixelDecoder, TransformerEncoderPixelDecoder])
def test_shapes_from_low_to_high_resolution(kind):
    mask_features, encoded, scales = build(kind, norm="GN").forward_features(features())
    assert mask_features.shape == (2, 5, 16, 24)
    assert [tuple(s.shape) for s in scales] == [(2, 32, 2, 3), (2, 32, 4, 6), (2, 32, 8, 12)]
    if kind is BasePixelDecoder:
        assert encoded is None
    else:
        assert encoded.shape == (2, 32, 2, 3)


def test_odd_sizes():
    """A backbone rounds up: 7 → 4 → 2 → 1."""
    x = {
        n: torch.ones(1, c, s, s) for (n, c), s in zip(CHANNELS.items(), (7, 4, 2, 1), strict=True)
    }
    mask_features, _, scales = build(BasePixelDecoder, norm="").forward_features(x)
    assert mask_features.shape[-2:] == (7, 7)
    assert [s.shape[-1] for s in scales] == [1, 2, 4]


def test_numbers_by_hand():
    """Two levels, one channel, convolutions that multiply: 2x coarse + 3x fine, then 10 and 100."""
    shapes = {"fine": ShapeSpec(channels=1, stride=4), "coarse": ShapeSpec(channels=1, stride=8)}
    decoder = BasePixelDecoder(shapes, conv_dim=1, mask_dim=1, norm="")
    for conv, centre in [
        (decoder.layer_2, 2.0),
        (decoder.adapter_1, 3.0),
        (decoder.layer_1, 10.0),
        (decoder.mask_features, 100.0),
    ]:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
        middle = conv.kernel_size[0] // 2
        conv.weight.data[0, 0, middle, middle] = centre
    decoder.adapter_1.bias.data.fill_(-4.0)
    x = {
        "fine": torch.tensor([[[[1.0, 0, 0, 0], [0, 0, 0, 0]]]]),
        "coarse": torch.tensor([[[[5.0, -7.0]]]]),
    }
    mask_features, _, scales = decoder.forward_features(x)
    # Coarse: relu(2 x) = 10 0, repeated to 10 10 0 0. Fine: 3 x - 4 = -1 -4 -4 -4 | -4 -4 -4 -4.
    # Sum 9 6 -4 -4 | 6 6 -4 -4, times 10 and relu, times 100.
    assert scales[0].tolist() == [[[[10, 0]]]]
    assert scales[1].tolist() == [[[[90, 60, 0, 0], [60, 60, 0, 0]]]]
    assert mask_features.tolist() == [[[[9000, 6000, 0, 0], [6000, 6000, 0, 0]]]]


def test_state_dict_names():
    convs = [f"adapter_{i}" for i in (1, 2, 3)] + [f"layer_{i}" for i in (1, 2, 3, 4)]
    base = build(BasePixelDecoder, norm="GN").state_dict()
    expected = {f"{c}.{p}" for c in convs for p in ("weight", "norm.weight", "norm.bias")}
    assert base.keys() == expected | {"mask_features.weight", "mask_features.bias"}
    assert base["layer_4.weight"].shape == (32, 10, 3, 3)

    without_norm = build(BasePixelDecoder, norm="").state_dict().keys()
    assert {k for k in without_norm if k.startswith("layer_4")} == {
        "layer_4.weight",
        "layer_4.bias",
    }

    encoder = build(TransformerEncoderPixelDecoder, norm="GN").state_dict()
    added = encoder.keys() - base.keys()
    assert {k for k in added if not k.startswith("transformer.")} == {
        "input_proj.weight",
        "input_proj.bias",
    }
    layer = {
        f"{module}.{kind}"
        for module in ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")
        for kind in ("weight", "bias")
    } | {"self_attn.in_proj_weight", "self_attn.in_proj_bias"}
    assert {k for k in added if k.startswith("transformer.")} == {
        f"transformer.encoder.layers.{i}.{name}" for i in (0, 1) for name in layer
    }
    assert encoder["layer_4.weight"].shape == (32, 32, 3, 3)
    assert list(encoder)[-1] == "layer_4.norm.bias"  # it replaces the one of the base, at the end


def test_pre_norm_adds_a_last_norm():
    names = build(TransformerEncoderPixelDecoder, transformer_pre_norm=True, norm="").state_dict()
    assert "transformer.encoder.norm.weight" in names


@pytest.mark.parametrize("kind", [BasePixelDecoder, TransformerEncoderPixelDecoder])
@pytest.mark.parametrize("norm", ["GN", ""])
def test_every_parameter_gets_a_gradient(kind, norm):
    decoder = build(kind, norm=norm)
    mask_features, _, _ = decoder.forward_features(features())
    mask_features.square().sum().backward()
    without = [
        name
        for name, p in decoder.named_parameters()
        if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert without == []


def test_positions_matter_to_the_encoder():
    """Without a positional encoding, an encoder would commute with any shift of its input."""
    decoder = build(TransformerEncoderPixelDecoder, norm="").eval()
    _, encoded, _ = decoder.forward_features(features())
    shifted = {name: x.roll(1, dims=-1) for name, x in features().items()}
    _, encoded_shifted, _ = decoder.forward_features(shifted)
    assert (encoded.roll(1, dims=-1) - encoded_shifted).abs().max() > 1e-3


@pytest.mark.parametrize("pre_norm", [False, True])
def test_encoder_equals_pytorchs_without_positions(pre_norm):
    torch.manual_seed(1)
    encoder = TransformerEncoderOnly(8, 2, 2, 16, 0.0, normalize_before=pre_norm).eval()
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, norm_first=pre_norm)
    norm = nn.LayerNorm(8) if pre_norm else None
    reference = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False).eval()
    reference.load_state_dict(encoder.encoder.state_dict())
    x = torch.randn(2, 8, 3, 4)
    padding = torch.zeros(2, 3, 4, dtype=torch.bool)
    padding[1, :, 3] = True
    result = encoder(x, padding, torch.zeros_like(x))
    sequence = x.flatten(2).permute(2, 0, 1)
    expected = reference(sequence, src_key_padding_mask=padding.flatten(1))
    expected = expected.permute(1, 2, 0).view_as(x)
    keep = ~padding[:, None].expand_as(x)
    torch.testing.assert_close(result[keep], expected[keep])


def test_initial_weights_are_drawn_in_the_order_of_the_original():
    """Both convolutions of a level are created before either is initialised."""
    torch.manual_seed(3)
    decoder = BasePixelDecoder(
        {"a": ShapeSpec(channels=2, stride=4), "b": ShapeSpec(channels=3, stride=8)},
        conv_dim=2,
        mask_dim=1,
        norm="",
    )
    torch.manual_seed(3)
    for kernel_size in (1, 3):
        nn.Conv2d(2, 2, kernel_size)  # draws its default initial weights
    expected = torch.empty(2, 2, 1, 1)
    nn.init.kaiming_uniform_(expected, a=1)
    assert torch.equal(decoder.adapter_1.weight, expected)


@pytest.mark.parametrize("kind", [BasePixelDecoder, TransformerEncoderPixelDecoder])
def test_build_from_config(kind):
    assert SEM_SEG_HEADS_REGISTRY.get(kind.__name__) is kind
    decoder = build_pixel_decoder(small_cfg(kind.__name__), SHAPES)
    assert type(decoder) is kind
    assert decoder.in_features == ["res2", "res3", "res4", "res5"]
    assert decoder.mask_features.weight.shape == (5, 8, 3, 3)
    assert type(decoder.layer_1.norm).__name__ == "LayerNorm"
    if kind is TransformerEncoderPixelDecoder:
        layer = decoder.transformer.encoder.layers[0]
        assert len(decoder.transformer.encoder.layers) == 1
        assert (layer.self_attn.num_heads, layer.linear1.out_features) == (2, 12)
        assert layer.dropout.p == layer.dropout1.p == layer.self_attn.dropout == 0.25


def test_only_named_features_are_used():
    cfg = small_cfg("BasePixelDecoder")
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res5", "res3"]
    decoder = build_pixel_decoder(cfg, SHAPES)
    assert decoder.in_features == ["res3", "res5"]
    _, _, scales = decoder.forward_features(features())
    assert len(scales) == 2


def test_bad_names():
    with pytest.raises(ValueError, match="'NoDecoder'.*BasePixelDecoder.*TransformerEncoderPixel"):
        build_pixel_decoder(small_cfg("NoDecoder"), SHAPES)
    cfg = small_cfg("SemSegFPNHead")  # Detectron2's own head, which is none
    cfg.MODEL.SEM_SEG_HEAD.NORM = "GN"
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 32
    with pytest.raises(ValueError, match="'SemSegFPNHead', which has no method forward_features"):
        build_pixel_decoder(cfg, SHAPES)
    cfg = small_cfg("BasePixelDecoder")
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res6"]
    with pytest.raises(ValueError, match=r"\['res6'\].*res2.*res5"):
        build_pixel_decoder(cfg, SHAPES)
