"""The deformable pixel decoder, plain and fast: shapes, its parts by formula, precision.

Shape letters: B batch, C channels, S values of all levels, L levels, H W pixels.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from small_parts import CHANNELS, STRIDES, build_pixel_decoder, features, randomise
from torch import Tensor, nn

from mask2former.modeling.pixel_decoder.msdeformattn import (
    MSDeformAttnPixelDecoder,
    MSDeformAttnTransformerEncoder,
    MSDeformAttnTransformerEncoderLayer,
    MSDeformAttnTransformerEncoderOnly,
)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 32), (65, 33)])
def test_shapes(mode, height, width):
    """Also one-pixel maps, and sizes that are no multiples of each other."""
    given = features(height, width)
    mask_features, coarsest, levels = mode(build_pixel_decoder()).forward_features(given)
    assert mask_features.shape == (2, 12, *given["res2"].shape[-2:])
    expected = [(2, 32, *given[name].shape[-2:]) for name in ("res5", "res4", "res3")]
    assert [x.shape for x in levels] == expected
    assert coarsest is levels[0]
    assert all(torch.isfinite(x).all() for x in (mask_features, *levels))


def test_order_of_features_does_not_matter(mode):
    given = features()
    expected = mode(build_pixel_decoder()).forward_features(given)
    decoder = mode(build_pixel_decoder(names=("res5", "res3", "res2", "res4")))
    out = decoder.forward_features(dict(reversed(given.items())))
    torch.testing.assert_close(out[0], expected[0])
    assert decoder.in_features == ["res2", "res3", "res4", "res5"]
    assert decoder.transformer_in_features == ["res3", "res4", "res5"]
    assert decoder.transformer_feature_strides == [8, 16, 32]


def test_images_of_a_batch_do_not_mix(mode):
    decoder, given = mode(build_pixel_decoder()), features()
    both = decoder.forward_features(given)
    for image in range(2):
        alone = decoder.forward_features({k: v[image : image + 1] for k, v in given.items()})
        torch.testing.assert_close(alone[0][0], both[0][image], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_levels_are_resized_without_a_copy(mode, batch):
    """F.interpolate on a CPU copies its result where strides do not say channels last."""
    given = {name: x[:batch] for name, x in features().items()}
    for level in mode(build_pixel_decoder()).forward_features(given)[2]:
        resized = F.interpolate(level, scale_factor=2.0, mode="bilinear", align_corners=False)
        assert resized.is_contiguous(memory_format=torch.channels_last)


def test_embedding_is_lateral_plus_upsampled_level(mode):
    """The FPN level above the encoder, from its modules."""
    decoder, given = mode(build_pixel_decoder()), features()
    mask_features, _, levels = decoder.forward_features(given)
    lateral = decoder.adapter_1(given["res2"])
    upsampled = F.interpolate(levels[2], size=(16, 24), mode="bilinear", align_corners=False)
    expected = decoder.mask_features(decoder.layer_1(lateral + upsampled))
    torch.testing.assert_close(mask_features, expected)


def test_more_fpn_levels_when_the_encoder_starts_coarser(mode):
    decoder = mode(build_pixel_decoder(transformer_in_features=["res4", "res5"]))
    assert decoder.num_fpn_levels == 2
    keys = decoder.state_dict()
    assert keys["adapter_1.weight"].shape[1] == 8 and keys["adapter_2.weight"].shape[1] == 16
    mask_features, _, levels = decoder.forward_features(features())
    assert mask_features.shape == (2, 12, 16, 24)
    assert [x.shape[-2:] for x in levels] == [(2, 3), (4, 6), (8, 12)]  # the last from the FPN


def test_one_level(mode):
    decoder = mode(
        build_pixel_decoder(
            names=("res2", "res3", "res4", "res5"), transformer_in_features=["res5"]
        )
    )
    mask_features, _, levels = decoder.forward_features(features())
    assert mask_features.shape == (2, 12, 16, 24)
    assert len(levels) == 3


def test_reference_points_by_hand():
    points = MSDeformAttnTransformerEncoder.get_reference_points([(1, 2), (2, 1)], None, "cpu")
    assert points.shape == (1, 4, 2, 2)
    expected = torch.tensor([[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]])
    for level in range(2):  # the same point on every level
        torch.testing.assert_close(points[0, :, level], expected)
    shapes = torch.tensor([[1, 2], [2, 1]])
    other = MSDeformAttnTransformerEncoder.get_reference_points(shapes, None, "cpu")
    assert torch.equal(other, points)


def test_reference_points_of_padded_images_by_hand():
    """Half of the first level's width is valid, and the whole second level."""
    ratios = torch.tensor([[[0.5, 1.0], [1.0, 1.0]]])
    points = MSDeformAttnTransformerEncoder.get_reference_points([(1, 2), (1, 1)], ratios, "cpu")
    # Centres 1/4 and 3/4 are at 1/2 and 3/2 of the valid part, then in units of each level.
    expected = [[[0.25, 0.5], [0.5, 0.5]], [[0.75, 0.5], [1.5, 0.5]], [[0.25, 0.5], [0.5, 0.5]]]
    torch.testing.assert_close(points[0], torch.tensor(expected))


def test_used_in_inference_mode_first(mode):
    decoder, given = mode(build_pixel_decoder()), features(96, 160)
    with torch.inference_mode():
        decoder.forward_features(given)
    sum(x.sum() for x in decoder.forward_features(given)[2]).backward()
    assert decoder.input_proj[0][0].weight.grad.any()


def test_encoder_layer_is_residual_attention_then_feed_forward(mode):
    torch.manual_seed(0)
    layer = mode(MSDeformAttnTransformerEncoderLayer(16, 32, 0.0, "relu", 1, 2, 2))
    randomise(layer)
    src, pos = torch.randn(1, 6, 16), torch.randn(1, 6, 16)
    shapes, start = torch.tensor([[2, 3]]), torch.tensor([0])
    reference = MSDeformAttnTransformerEncoder.get_reference_points(shapes, None, "cpu")
    out = layer(src, pos, reference, shapes, start)
    # Positions enter the queries only.
    x = layer.norm1(src + layer.self_attn(src + pos, reference, src, shapes, start))
    expected = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(layer(src, None, reference, shapes, start), out)


def test_encoder_adds_level_embeddings_to_positions(mode):
    torch.manual_seed(0)
    encoder = mode(MSDeformAttnTransformerEncoderOnly(16, 2, 1, 32, 0.0, "relu", 2, 2))
    randomise(encoder)
    srcs = [torch.randn(1, 16, 1, 2), torch.randn(1, 16, 2, 2)]
    pos = [torch.zeros_like(x) for x in srcs]
    memory, shapes, starts = encoder(srcs, pos)
    assert memory.shape == (1, 6, 16)
    assert shapes.tolist() == [[1, 2], [2, 2]] and starts.tolist() == [0, 2]
    with torch.no_grad():  # the same, added to the positions
        pos = [x + e[None, :, None, None] for x, e in zip(pos, encoder.level_embed, strict=True)]
        encoder.level_embed.zero_()
    torch.testing.assert_close(encoder(srcs, pos)[0], memory)


def test_initial_weights_are_drawn_in_the_order_of_the_original():
    """One layer is drawn and copied, then all matrices are drawn again, layer by layer."""
    torch.manual_seed(0)
    encoder = MSDeformAttnTransformerEncoderOnly(16, 2, 3, 32, 0.1, "relu", 2, 2)
    torch.manual_seed(0)
    layer = MSDeformAttnTransformerEncoderLayer(16, 32, 0.1, "relu", 2, 2, 2)
    layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))
    for parameter in [torch.empty(2, 16), *layers.parameters()]:
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for layer in layers:
        layer.self_attn._reset_parameters()
    for name, parameter in layers.named_parameters():
        assert torch.equal(encoder.encoder.layers.get_parameter(name), parameter), name
    assert torch.equal(encoder.level_embed, nn.init.normal_(torch.empty(2, 16)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(mode, dtype):
    """The residual stream and sampling locations stay in float32."""
    decoder, given = mode(build_pixel_decoder()), features()
    randomise(decoder)
    expected = decoder.forward_features(given)
    given = {k: v.to(dtype) for k, v in given.items()}
    with torch.autocast("cpu", dtype=dtype):
        out = decoder.forward_features(given)
    layer = decoder.transformer.encoder.layers[0]
    seen = {}
    layer.self_attn.register_forward_hook(lambda module, _, out: seen.update(attended=out.dtype))
    layer.register_forward_hook(lambda module, args, out: seen.update(stream=(args[0], out)))
    with torch.autocast("cpu", dtype=dtype):
        decoder.forward_features(given)
    assert seen["attended"] == dtype
    assert [x.dtype for x in seen["stream"]] == [torch.float32, torch.float32]
    for result, target in zip((out[0], *out[2]), (expected[0], *expected[2]), strict=True):
        error = (result - target).abs().mean() / target.std()
        # One rounding of a bfloat16 is off by up to 2^-9 = 0.2 %.
        assert error < {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[dtype]


def test_features_in_half_precision_without_autocast(mode):
    decoder, given = mode(build_pixel_decoder()), features()
    out = decoder.forward_features({k: v.bfloat16() for k, v in given.items()})
    rounded = decoder.forward_features({k: v.bfloat16().float() for k, v in given.items()})
    assert out[0].dtype == torch.float32
    assert torch.equal(out[0], rounded[0])


def test_double(mode):
    decoder, given = mode(build_pixel_decoder()), features()
    expected = decoder.forward_features(given)
    out = decoder.double().forward_features({k: v.double() for k, v in given.items()})
    assert out[0].dtype == torch.float64
    torch.testing.assert_close(out[0].float(), expected[0], atol=1e-4, rtol=1e-4)


def test_export_leaves_no_fake_tensors_behind():
    """No cache keeps tensors of a trace."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = build_pixel_decoder().eval()

        def forward(self, given: dict[str, Tensor]):
            return self.decoder.forward_features(given)[0]

    # Sizes that no other test uses, so that caches are empty.
    model, given = Wrapper(), features(160, 32, batch=1)
    exported = torch.export.export(model, (given,)).module()
    out = model(given)
    assert type(out) is Tensor
    torch.testing.assert_close(out, build_pixel_decoder().forward_features(given)[0])
    torch.testing.assert_close(exported(given), out)


def test_every_parameter_gets_a_gradient(mode):
    decoder = mode(build_pixel_decoder())
    randomise(decoder)
    mask_features, _, levels = decoder.forward_features(features())
    sum(x.square().sum() for x in (mask_features, *levels)).backward()
    missing = [k for k, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def test_deepcopy_uses_its_own_parameters(mode):
    """The FPN convolutions are in plain lists, which must follow the copy."""
    decoder, given = mode(build_pixel_decoder()), features()
    expected = decoder.forward_features(given)[0]
    duplicate = copy.deepcopy(decoder)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    assert torch.equal(duplicate.forward_features(given)[0], expected)


def test_from_config(tiny_cfg):
    shapes = {k: ShapeSpec(channels=CHANNELS[k], stride=STRIDES[k]) for k in CHANNELS}
    tiny_cfg.MODEL.MASK_FORMER.DROPOUT = 0.2
    tiny_cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 3
    decoder = MSDeformAttnPixelDecoder(tiny_cfg, shapes)
    layer = decoder.transformer.encoder.layers[0]
    assert len(decoder.transformer.encoder.layers) == 2
    assert layer.dropout1.p == 0.2 and layer.self_attn.n_points == 3
    assert layer.self_attn.n_heads == 4
    # The width of the original; DIM_FEEDFORWARD belongs to the transformer decoder.
    assert layer.linear1.out_features == 1024
    assert decoder.mask_features.out_channels == 32
    assert decoder.adapter_1.norm is not None and decoder.adapter_1.bias is None


def test_unknown_feature():
    with pytest.raises(ValueError, match=r"ENCODER_IN_FEATURES names \['res9'\].*'res2'"):
        build_pixel_decoder(transformer_in_features=["res3", "res9"])


class Doubled(MSDeformAttnTransformerEncoderLayer):
    def forward_ffn(self, src):
        return 2 * super().forward_ffn(src)


@pytest.mark.parametrize("how", ["subclass", "instance", "class"])
def test_overridden_feed_forward_is_called(how, monkeypatch):
    decoder, given = build_pixel_decoder(), features()
    reference = decoder.forward_features(given)[1]
    layer = decoder.transformer.encoder.layers[-1]
    if how == "subclass":
        layer.__class__ = Doubled
    elif how == "instance":
        original = layer.forward_ffn
        layer.forward_ffn = lambda src: 2 * original(src)
    else:
        original = MSDeformAttnTransformerEncoderLayer.forward_ffn
        monkeypatch.setattr(
            MSDeformAttnTransformerEncoderLayer,
            "forward_ffn",
            lambda self, src: (1 + (self is layer)) * original(self, src),
        )
    torch.testing.assert_close(decoder.forward_features(given)[1], 2 * reference)


def test_replaced_sampling_attention_gets_tensors():
    """Sizes and starts of the levels are (L, 2) and (L,) int64, as `MSDeformAttn` documents."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, query, reference, value, shapes, starts, padding_mask=None):
            self.seen.append((shapes.tolist(), starts.tolist(), shapes.dtype, starts.dtype))
            return query

    decoder = build_pixel_decoder()
    attention = decoder.transformer.encoder.layers[0].self_attn = Attention()
    decoder.forward_features(features())
    sizes = [[2, 3], [4, 6], [8, 12]]
    assert attention.seen == [(sizes, [0, 6, 30], torch.int64, torch.int64)]


def test_hooks_fire_once_in_a_training_step():
    decoder, seen = build_pixel_decoder(), []
    layer = decoder.transformer.encoder.layers[0]
    hooked = [layer.self_attn, layer.linear1, layer.norm1, decoder.adapter_1, decoder.mask_features]
    for module in hooked:
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    mask_features, _, levels = decoder.forward_features(features())
    sum(x.sum() for x in (mask_features, *levels)).backward()
    assert len(seen) == len(hooked) and set(seen) == set(hooked)
