"""The deformable pixel decoder: shapes, its parts against plain formulations, precision.

Shape letters: B batch, C channels, S values of all levels, L levels, H W pixels.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from mask2former.modeling.pixel_decoder import msdeformattn
from mask2former.modeling.pixel_decoder.msdeformattn import (
    MSDeformAttnPixelDecoder,
    MSDeformAttnTransformerEncoderLayer,
    MSDeformAttnTransformerEncoderOnly,
    _reference_points,
)

CHANNELS = {"res2": 8, "res3": 16, "res4": 24, "res5": 40}
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def build(names=tuple(CHANNELS), **changes) -> MSDeformAttnPixelDecoder:
    torch.manual_seed(0)
    arguments = {
        "transformer_dropout": 0.0,
        "transformer_nheads": 4,
        "transformer_dim_feedforward": 48,
        "transformer_enc_layers": 2,
        "conv_dim": 32,
        "mask_dim": 12,
        "norm": "GN",
        "transformer_in_features": ["res3", "res4", "res5"],
        "common_stride": 4,
        **changes,
    }
    shapes = {k: ShapeSpec(channels=CHANNELS[k], stride=STRIDES[k]) for k in names}
    return MSDeformAttnPixelDecoder(shapes, **arguments)


def features(height=64, width=96, batch=2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(
            batch, channels, -(-height // stride), -(-width // stride), generator=generator
        )
        for (name, channels), stride in zip(CHANNELS.items(), STRIDES.values(), strict=True)
    }


def randomise(module: nn.Module) -> None:
    """Make sampling depend on the query, which it does not at first."""
    for name, parameter in module.named_parameters():
        if "sampling_offsets" in name or "attention_weights" in name:
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (32, 32), (65, 33)])
def test_shapes(height, width):
    """Also one-pixel maps, and sizes that are no multiples of each other."""
    given = features(height, width)
    mask_features, coarsest, levels = build().forward_features(given)
    assert mask_features.shape == (2, 12, *given["res2"].shape[-2:])
    expected = [(2, 32, *given[name].shape[-2:]) for name in ("res5", "res4", "res3")]
    assert [x.shape for x in levels] == expected
    assert coarsest is levels[0]
    assert all(torch.isfinite(x).all() for x in (mask_features, *levels))


def test_order_of_features_does_not_matter():
    given = features()
    expected = build().forward_features(given)
    decoder = build(names=("res5", "res3", "res2", "res4"))
    out = decoder.forward_features(dict(reversed(given.items())))
    torch.testing.assert_close(out[0], expected[0])
    assert decoder.in_features == ["res2", "res3", "res4", "res5"]
    assert decoder.transformer_in_features == ["res3", "res4", "res5"]
    assert decoder.transformer_feature_strides == [8, 16, 32]


def test_images_of_a_batch_do_not_mix():
    decoder, given = build(), features()
    both = decoder.forward_features(given)
    for image in range(2):
        alone = decoder.forward_features({k: v[image : image + 1] for k, v in given.items()})
        torch.testing.assert_close(alone[0][0], both[0][image], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_levels_are_resized_without_a_copy(batch):
    """F.interpolate on a CPU copies its result where strides do not say channels last."""
    given = {name: x[:batch] for name, x in features().items()}
    for level in build().forward_features(given)[2]:
        resized = F.interpolate(level, scale_factor=2.0, mode="bilinear", align_corners=False)
        assert resized.is_contiguous(memory_format=torch.channels_last)


def test_embedding_is_lateral_plus_upsampled_level():
    """The FPN level above the encoder, from the published modules."""
    decoder, given = build(), features()
    mask_features, _, levels = decoder.forward_features(given)
    lateral = decoder.adapter_1(given["res2"])
    upsampled = F.interpolate(levels[2], size=(16, 24), mode="bilinear", align_corners=False)
    expected = decoder.mask_features(decoder.layer_1(lateral + upsampled))
    torch.testing.assert_close(mask_features, expected)


def test_more_fpn_levels_when_the_encoder_starts_coarser():
    decoder = build(transformer_in_features=["res4", "res5"])
    assert decoder.num_fpn_levels == 2
    keys = decoder.state_dict()
    assert keys["adapter_1.weight"].shape[1] == 8 and keys["adapter_2.weight"].shape[1] == 16
    mask_features, _, levels = decoder.forward_features(features())
    assert mask_features.shape == (2, 12, 16, 24)
    assert [x.shape[-2:] for x in levels] == [(2, 3), (4, 6), (8, 12)]  # the last from the FPN


def test_one_level():
    decoder = build(names=("res2", "res3", "res4", "res5"), transformer_in_features=["res5"])
    mask_features, _, levels = decoder.forward_features(features())
    assert mask_features.shape == (2, 12, 16, 24)
    assert len(levels) == 3


def test_reference_points_by_hand():
    points = _reference_points(((1, 2), (2, 1)), torch.device("cpu"))
    assert points.shape == (1, 4, 2, 2)
    expected = torch.tensor([[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]])
    for level in range(2):  # the same point on every level
        torch.testing.assert_close(points[0, :, level], expected)


def test_used_in_inference_mode_first():
    decoder, given = build(), features(96, 160)
    with torch.inference_mode():
        decoder.forward_features(given)
        points = _reference_points(((7, 9),), torch.device("cpu"))
    assert not points.is_inference()
    sum(x.sum() for x in decoder.forward_features(given)[2]).backward()
    assert decoder.input_proj[0][0].weight.grad.any()


def test_encoder_layer_is_residual_attention_then_feed_forward():
    torch.manual_seed(0)
    layer = MSDeformAttnTransformerEncoderLayer(16, 32, 0.0, "relu", 1, 2, 2)
    randomise(layer)
    src, pos = torch.randn(1, 6, 16), torch.randn(1, 6, 16)
    reference = _reference_points(((2, 3),), torch.device("cpu"))
    out = layer(src, pos, reference, ((2, 3),))
    # Positions enter the queries only.
    x = layer.norm1(src + layer.self_attn(src + pos, reference, src, ((2, 3),)))
    expected = layer.norm2(x + layer.linear2(layer.linear1(x).relu()))
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(layer(src, None, reference, ((2, 3),)), out)


def test_encoder_adds_level_embeddings_to_positions():
    torch.manual_seed(0)
    encoder = MSDeformAttnTransformerEncoderOnly(16, 2, 1, 32, 0.0, "relu", 2, 2)
    randomise(encoder)
    srcs = [torch.randn(1, 16, 1, 2), torch.randn(1, 16, 2, 2)]
    pos = [torch.zeros_like(x) for x in srcs]
    memory, shapes, starts = encoder(srcs, pos)
    assert memory.shape == (1, 6, 16)
    assert shapes.tolist() == [[1, 2], [2, 2]] and starts.tolist() == [0, 2]
    with torch.no_grad():  # the same through positions
        pos = [x + e[None, :, None, None] for x, e in zip(pos, encoder.level_embed, strict=True)]
        encoder.level_embed.zero_()
    torch.testing.assert_close(encoder(srcs, pos)[0], memory)


def test_initial_weights_follow_the_published_order_of_draws():
    """One layer is drawn and copied; then matrices are drawn anew, layer by layer."""
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
def test_autocast(dtype):
    """Half precision where it is safe: the residual stream and what is sampled where stay exact."""
    decoder, given = build(), features()
    randomise(decoder)
    expected = decoder.forward_features(given)
    layer = decoder.transformer.encoder.layers[0]
    seen = {}
    layer.self_attn.register_forward_hook(lambda module, _, out: seen.update(attended=out.dtype))
    layer.register_forward_hook(lambda module, args, out: seen.update(stream=(args[0], out)))
    with torch.autocast("cpu", dtype=dtype):
        out = decoder.forward_features({k: v.to(dtype) for k, v in given.items()})
    assert seen["attended"] == dtype
    assert [x.dtype for x in seen["stream"]] == [torch.float32, torch.float32]
    for ours, theirs in zip((out[0], *out[2]), (expected[0], *expected[2]), strict=True):
        error = (ours - theirs).abs().mean() / theirs.std()
        # One rounding of a bfloat16 is off by up to 2^-9 = 0.2 %.
        assert error < {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[dtype]


def test_features_in_half_precision_without_autocast_are_taken_as_they_are():
    decoder, given = build(), features()
    out = decoder.forward_features({k: v.bfloat16() for k, v in given.items()})
    rounded = decoder.forward_features({k: v.bfloat16().float() for k, v in given.items()})
    assert out[0].dtype == torch.float32
    assert torch.equal(out[0], rounded[0])


def test_double():
    decoder, given = build(), features()
    expected = decoder.forward_features(given)
    out = decoder.double().forward_features({k: v.double() for k, v in given.items()})
    assert out[0].dtype == torch.float64
    torch.testing.assert_close(out[0].float(), expected[0], atol=1e-4, rtol=1e-4)


def test_export_leaves_no_fake_tensors_behind():
    """Neither in the cache of reference points nor in that of position encodings."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = build().eval()

        def forward(self, given: dict[str, Tensor]):
            return self.decoder.forward_features(given)[0]

    # Sizes no other test uses, so that nothing is cached before.
    model, given = Wrapper(), features(160, 32, batch=1)
    exported = torch.export.export(model, (given,)).module()
    out = model(given)
    assert type(out) is Tensor
    torch.testing.assert_close(out, build().forward_features(given)[0])
    torch.testing.assert_close(exported(given), out)


def test_every_parameter_gets_a_gradient():
    decoder = build()
    randomise(decoder)
    mask_features, _, levels = decoder.forward_features(features())
    sum(x.square().sum() for x in (mask_features, *levels)).backward()
    missing = [k for k, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def test_deepcopy_uses_its_own_parameters():
    """The plain lists of FPN convolutions must follow the copy."""
    decoder, given = build(), features()
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
    # The published width; DIM_FEEDFORWARD belongs to the transformer decoder.
    assert layer.linear1.out_features == 1024
    assert decoder.mask_features.out_channels == 32
    assert decoder.adapter_1.norm is not None and decoder.adapter_1.bias is None


def test_unknown_feature():
    with pytest.raises(ValueError, match=r"ENCODER_IN_FEATURES names \['res9'\].*'res2'"):
        build(transformer_in_features=["res3", "res9"])


def outputs_and_gradients(decoder, given, dtype=None) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in given.values()]
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        mask_features, _, levels = decoder.forward_features(dict(zip(given, inputs, strict=True)))
    outputs = [mask_features, *levels]
    # One that is not symmetric, so that no gradient vanishes.
    loss = sum((x.float() * torch.linspace(-1, 2, x.numel()).view_as(x)).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(loss, [*inputs, *decoder.parameters()])]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("backend", ["compiled", "pytorch"])
def test_recomputation_changes_no_number(monkeypatch, dropout, dtype, backend):
    if backend == "pytorch":
        monkeypatch.setattr(msdeformattn, "backend", lambda device: "pytorch")
    decoder, given = build(transformer_dropout=dropout), features()
    randomise(decoder)
    ours = outputs_and_gradients(decoder, given, dtype)
    monkeypatch.setattr(msdeformattn, "recomputed", lambda f, *args, **options: f(*args))
    for a, b in zip(ours, outputs_and_gradients(decoder, given, dtype), strict=True):
        assert torch.equal(a, b)


def test_some_positions_at_a_time_change_nothing(monkeypatch):
    decoder, given = build(), features()
    expected = outputs_and_gradients(decoder, given)
    monkeypatch.setattr(msdeformattn, "_POSITIONS", 7)
    for a, b in zip(outputs_and_gradients(decoder, given), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:A saved_tensors_hooks context:FutureWarning")
def test_large_results_are_not_kept_for_backward():
    """Neither the hidden layer, nor queries, nor what the FPN level normalises and adds."""
    decoder, given = build(), features(256, 256)
    parameters = {p.untyped_storage().data_ptr() for p in decoder.parameters()}
    backbone = {x.untyped_storage().data_ptr() for x in given.values()}
    sizes = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        decoder.forward_features(given)
    stream = 4 * 2 * (8**2 + 16**2 + 32**2) * 32  # of a (B, S, C) tensor
    kept = sorted(size for k, size in sizes.items() if k not in parameters | backbone)
    # For each of two layers input, sum after attention, sum after the network, and the sampled
    # values where selective recomputation shows them; for the projections as much twice.
    assert sum(kept) <= (2 * 4 + 3) * stream
    assert max(kept) <= stream
