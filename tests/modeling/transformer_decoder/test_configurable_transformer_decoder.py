"""The decoder's ablations: attention, scales and optimisation switches, plain and fast.

Shape letters: B batch, Q queries, C channels, M heads, K classes, L locations.
"""

import itertools
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from mask2former.config import load_config
from mask2former.fast.decoder import decode_to_factors
from mask2former.modeling.layers import CROSS_ATTENTION_REGISTRY, MaskPoolingLayer
from mask2former.modeling.transformer_decoder import (
    ConfigurableTransformerDecoder,
    MultiScaleMaskedTransformerDecoder,
    build_transformer_decoder,
)
from mask2former.modeling.transformer_decoder.configurable_transformer_decoder import locations

ABLATIONS = Path(__file__).parents[3] / "configs" / "ablations"
ROWS = sorted(path for table in "abcd" for path in ABLATIONS.glob(f"table4{table}/*.yaml"))
BASE_ROWS = ("mask2former", "masked_attention", "efficient_multi_scale")
B, Q, C, M = 2, 5, 16, 4
ATTENTIONS = ("masked", "full", "smca", "mask_pooling")
# Learnable query features, cross-attention first, dropout.
SWITCHES = list(itertools.product((True, False), (True, False), (0.0, 0.1)))


def build(cls=ConfigurableTransformerDecoder, **changes):
    torch.manual_seed(0)
    arguments = {
        "num_classes": 3,
        "hidden_dim": C,
        "num_queries": Q,
        "nheads": M,
        "dim_feedforward": 24,
        "dec_layers": 4,
        "pre_norm": False,
        "mask_dim": 6,
        "enforce_input_project": True,
    }
    decoder = cls(C, **arguments | changes)
    # Make mask predictions vary more than they do at first, so that attention masks matter.
    nn.init.normal_(decoder.mask_embed.layers[-1].weight, std=0.5)
    return decoder


def switched(attention, learnable, cross_first, dropout, **changes):
    return build(
        cross_attention=attention,
        learnable_query_features=learnable,
        cross_attention_first=cross_first,
        dropout=dropout,
        **changes,
    )


def inputs(sizes=((2, 3), (3, 5), (6, 9)), mask_size=(12, 18)) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    scales = [torch.randn(B, C, *size, generator=generator) for size in sizes]
    return scales, torch.randn(B, 6, *mask_size, generator=generator)


def predictions(outputs) -> list[Tensor]:
    layers = [*outputs["aux_outputs"], outputs]
    return [layer[key] for layer in layers for key in ("pred_logits", "pred_masks")]


def assert_equal(outputs, expected):
    for ours, theirs in zip(predictions(outputs), predictions(expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def total(outputs) -> Tensor:
    return sum(
        (x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in predictions(outputs)
    )


@pytest.mark.parametrize("pre_norm", [False, True])
def test_defaults_are_the_base_decoder(mode, pre_norm):
    """The same weights by seed under the same names in the same order, and equal outputs."""
    decoder = mode(build(pre_norm=pre_norm))
    base = mode(build(MultiScaleMaskedTransformerDecoder, pre_norm=pre_norm))
    state, expected = decoder.state_dict(), base.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    for ours, theirs in zip(
        predictions(decoder(*inputs())), predictions(base(*inputs())), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_combination_trains(attention, switches):
    """Finite outputs of the right shapes, a gradient for every parameter, queries that differ."""
    decoder = switched(attention, *switches).train()
    for bias in (p for name, p in decoder.named_parameters() if name.endswith("bias")):
        nn.init.normal_(bias, std=0.1)  # as after the first step
    outputs = decoder(*inputs())
    assert outputs["pred_logits"].shape == (B, Q, 4)
    assert outputs["pred_masks"].shape == (B, Q, 12, 18)
    assert len(outputs["aux_outputs"]) == 4
    assert all(torch.isfinite(x).all() for x in predictions(outputs))
    total(outputs).backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    # Up to rounding.
    zero = {name for name, gradient in gradients.items() if gradient.abs().max() < 1e-5}
    # The values of zeros are equal: whatever the attention weights, they add up to a constant,
    # unless dropout takes some of them.
    constant = "transformer_self_attention_layers.0.self_attn.in_proj_weight"
    assert zero == ({constant} if switches == (False, False, 0.0) else set())
    assert outputs["pred_logits"].std(1).min() > 1e-4


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scales": [8]},
        {"scales": [8, 32]},
        {"scales": [16, 16, 32, 8]},
        {"concatenate_scales": True},
        {"concatenate_scales": True, "scales": [8, 32]},
        {"learnable_query_features": False, "cross_attention_first": False, "pre_norm": True},
    ],
    ids=str,
)
def test_fast_equals_plain(attention, changes):
    decoder = build(cross_attention=attention, **changes)
    fast = decoder(*inputs())
    fast_gradients = torch.autograd.grad(total(fast), list(decoder.parameters()), allow_unused=True)
    vars(decoder)["_always_plain"] = True
    plain = decoder(*inputs())
    gradients = torch.autograd.grad(total(plain), list(decoder.parameters()), allow_unused=True)
    assert_equal(fast, plain)
    for ours, theirs in zip(fast_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_each_part_changes_the_outputs():
    base = build()
    for changes in (
        *({"cross_attention": name} for name in ATTENTIONS[1:]),
        {"concatenate_scales": True},
        {"scales": [8, 16, 32]},
        {"cross_attention_first": False},
        {"learnable_query_features": False},
    ):
        other = build(**changes)
        other.load_state_dict(base.state_dict(), strict=False)
        ours, theirs = other(*inputs())["pred_logits"], base(*inputs())["pred_logits"]
        assert not torch.allclose(ours, theirs, atol=1e-3), changes


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_concatenating_one_scale_is_attending_to_it(mode, attention):
    one = mode(build(cross_attention=attention, scales=[16]))
    same = mode(build(cross_attention=attention, scales=[16], concatenate_scales=True))
    assert_equal(same(*inputs()), one(*inputs()))


def spy(decoder) -> list[dict]:
    """A list that fills with the arguments of each cross-attention."""
    seen = []
    for layer in decoder.transformer_cross_attention_layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append({"memory": args[1], **kwargs}),
            with_kwargs=True,
        )
    return seen


def test_scales_are_visited_in_the_order_given(mode):
    decoder = mode(build(scales=[16, 32, 16], dec_layers=5))
    seen = spy(decoder)
    decoder(*inputs())
    assert [len(x["memory"]) for x in seen] == [15, 6, 15, 15, 6]
    assert [x["memory_mask"].shape[-1] for x in seen] == [15, 6, 15, 15, 6]
    # Level embeddings of the scales in use, coarse to fine.
    assert decoder.level_embed.weight.shape == (2, C) and len(decoder.input_proj) == 2
    level = decoder.level_embed.weight[0] + decoder.input_proj[0].bias
    zeros = [torch.zeros_like(x) for x in inputs()[0]]
    assert torch.allclose(decoder.project_features(zeros)[1].memory[0, 0], level)


def test_concatenated_scales(mode):
    decoder = mode(build(concatenate_scales=True))
    seen = spy(decoder)
    scales, _ = inputs()
    # The left half is foreground for all queries.
    nn.init.zeros_(decoder.mask_embed.layers[-1].weight)
    nn.init.constant_(decoder.mask_embed.layers[-1].bias, 1.0)
    features = torch.ones(B, 6, 12, 18)
    features[..., 9:] = -1
    decoder(scales, features)
    # On a map of five columns the middle one has mask logits of 0, which is foreground.
    columns = [(2, 3, 2), (3, 5, 3), (6, 9, 5)]
    rows = [torch.arange(width).repeat(height) >= left for height, width, left in columns]
    expected = torch.cat(rows)
    assert len(seen) == 4
    for call in seen:
        assert call["memory"].shape == (6 + 15 + 54, B, C)
        assert call["pos"].shape[0] == 75
        assert torch.equal(call["memory_mask"], expected.expand(B * M, Q, -1))


def test_locations():
    expected = [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]
    assert locations(((1, 2), (2, 1)), torch.device("cpu")).tolist() == expected


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_one_pixel_maps_and_empty_masks(mode, attention):
    """Images of 32x32 pixels, all of them background."""
    decoder = mode(build(cross_attention=attention))
    nn.init.zeros_(decoder.mask_embed.layers[-1].weight)
    nn.init.constant_(decoder.mask_embed.layers[-1].bias, -1.0)
    scales, _ = inputs(((1, 1), (2, 2), (4, 4)))
    outputs = decoder(scales, torch.ones(B, 6, 8, 8))
    assert outputs["pred_masks"].unique().tolist() == [-6.0]
    assert all(torch.isfinite(x).all() for x in predictions(outputs))
    if attention in ("masked", "mask_pooling"):
        open_masks = build(cross_attention=attention)
        open_masks.load_state_dict(decoder.state_dict())
        nn.init.constant_(open_masks.mask_embed.layers[-1].bias, 1.0)
        foreground = open_masks(scales, torch.ones(B, 6, 8, 8))
        torch.testing.assert_close(outputs["pred_logits"], foreground["pred_logits"])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_masks_are_computed_only_for_attention_that_reads_them(attention, monkeypatch):
    calls = []
    name = "mask2former.fast.decoder._attention_mask"
    original = decode_to_factors.__globals__["_attention_mask"]
    monkeypatch.setattr(name, lambda *args: calls.append(1) or original(*args))
    decoder = build(cross_attention=attention)
    decode_to_factors(decoder, *inputs())
    reads = attention in ("masked", "mask_pooling")
    assert decoder.reads_masks == reads
    assert len(calls) == (4 if reads else 0)


@pytest.mark.parametrize("cross_first", [True, False])
def test_order_of_attention(cross_first):
    decoder, order = build(cross_attention_first=cross_first, dec_layers=1), []
    for kind in ("cross_attention", "self_attention", "ffn"):
        layer = getattr(decoder, f"transformer_{kind}_layers")[0]
        layer.register_forward_hook(lambda *_, kind=kind: order.append(kind))
    decoder(*inputs())
    first, second = ("cross", "self") if cross_first else ("self", "cross")
    assert order == [f"{first}_attention", f"{second}_attention", "ffn"]


def test_zero_query_features(mode):
    decoder = mode(build(learnable_query_features=False))
    assert "query_feat.weight" not in decoder.state_dict()
    assert "query_feat.weight" not in dict(decoder.named_parameters())
    assert decoder.query_feat.weight.shape == (Q, C) and not decoder.query_feat.weight.any()
    outputs = decoder(*inputs())
    first = outputs["aux_outputs"][0]
    assert torch.equal(first["pred_masks"], first["pred_masks"][:, :1].expand(-1, Q, -1, -1))
    assert not torch.allclose(outputs["pred_masks"][:, 0], outputs["pred_masks"][:, 1], atol=1e-3)
    assert decoder.double().query_feat.weight.dtype == torch.float64


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_dropout_is_in_every_sublayer_and_in_training_only(mode, attention):
    decoder = mode(build(cross_attention=attention, dropout=0.5))
    assert all(m.p == 0.5 for m in decoder.modules() if isinstance(m, nn.Dropout))
    attentions = [m for m in decoder.modules() if isinstance(m, nn.MultiheadAttention)]
    assert len(attentions) == (4 if attention == "mask_pooling" else 8)
    assert all(m.dropout == 0.5 for m in attentions)
    without = mode(build(cross_attention=attention))
    assert_equal(decoder.eval()(*inputs()), without(*inputs()))
    torch.manual_seed(1)
    first, second = (decoder.train()(*inputs())["pred_logits"] for _ in range(2))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_double_and_autocast(mode, attention):
    decoder = mode(build(cross_attention=attention))
    expected = decoder(*inputs())["pred_logits"]
    scales, mask_features = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(decoder(scales, mask_features)["pred_logits"]).all()
    logits = decoder.double()([x.double() for x in scales], mask_features.double())["pred_logits"]
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), expected, atol=1e-3, rtol=0)


def test_bad_arguments():
    for scales in ([], [64], [32, 4]):
        with pytest.raises(ValueError, match=r"scales are \[.*allowed: one or more of \[32, 16, 8"):
            build(scales=scales)
    with pytest.raises(ValueError, match="repeat one"):
        build(scales=[8, 8], concatenate_scales=True)
    with pytest.raises(ValueError, match="expected 3 feature scales, got 1"):
        build(scales=[8])(inputs()[0][:1], inputs()[1])
    with pytest.raises(ValueError, match="CROSS_ATTENTION is 'nobody'"):
        build(cross_attention="nobody")


def test_without_layers(mode):
    decoder = mode(build(dec_layers=0))
    assert decoder(*inputs())["aux_outputs"] == []


def configure(cfg, **changes):
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = "ConfigurableTransformerDecoder"
    for key, value in changes.items():
        cfg.MODEL.MASK_FORMER.DECODER[key] = value
    return cfg


def test_from_config(tiny_cfg):
    decoder = build_transformer_decoder(configure(tiny_cfg), 64)
    assert type(decoder) is ConfigurableTransformerDecoder
    assert decoder.num_layers == 4 and decoder.scales == [32, 16, 8]
    assert decoder.reads == ("memory_mask",) and decoder.cross_attention_first
    configure(
        tiny_cfg,
        CROSS_ATTENTION="mask_pooling",
        SCALES=[8, 16],
        CONCATENATE_SCALES=True,
        LEARNABLE_QUERY_FEATURES=False,
        CROSS_ATTENTION_FIRST=False,
        DROPOUT=0.25,
    )
    decoder = build_transformer_decoder(tiny_cfg, 64)
    assert isinstance(decoder.transformer_cross_attention_layers[0], MaskPoolingLayer)
    assert decoder.scales == [8, 16] and decoder.strides == [16, 8]
    assert decoder.concatenate_scales and not decoder.cross_attention_first
    assert not isinstance(decoder.query_feat, nn.Embedding)
    assert decoder.transformer_ffn_layers[0].dropout.p == 0.25


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_model_trains_two_steps_and_predicts(tiny_cfg, make_input, same_points, attention):
    """Odd sizes, two images; the fast model's losses are the plain one's."""
    configure(tiny_cfg, CROSS_ATTENTION=attention, SCALES=[16, 8])
    tiny_cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 1
    batch = [make_input(33, 47, [0, 2], seed=1), make_input(25, 35, [1], seed=2)]
    losses = []
    for fast in (True, False):
        tiny_cfg.MODEL.FAST = fast
        torch.manual_seed(0)
        model = build_model(tiny_cfg)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for _ in range(2):
            losses.append(model(batch))
            optimizer.zero_grad()
            sum(losses[-1].values()).backward()
            optimizer.step()
        results = model.eval()(batch)
        assert all(torch.isfinite(x["sem_seg"]).all() for x in results)
    assert losses[0].keys() == losses[2].keys() and len(losses[0]) == 15
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[2][name], atol=1e-3, rtol=1e-3)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("path", ROWS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_rows_of_the_paper_s_tables(path):
    """They change the decoder alone, and say how to run them."""
    lines = path.read_text().splitlines()
    assert lines[0].startswith(f"# Table {path.parent.name[5:]}, ") and "FLOPs" in lines[0]
    assert lines[1].endswith(f"--config-file configs/ablations/{path.parent.name}/{path.name}")
    base = path.parents[2] / "coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml"
    cfg, expected = load_config(str(path)), load_config(str(base))
    is_base = cfg == expected
    assert is_base == (path.stem in BASE_ROWS)
    for config in (cfg, expected):
        del (
            config.MODEL.MASK_FORMER["DECODER"],
            config.MODEL.MASK_FORMER["TRANSFORMER_DECODER_NAME"],
        )
    assert cfg == expected


def test_own_cross_attention(mode, monkeypatch):
    """Called with what it reads, and with nothing else."""
    monkeypatch.setattr(
        CROSS_ATTENTION_REGISTRY, "_obj_map", dict(CROSS_ATTENTION_REGISTRY._obj_map)
    )
    seen = []

    @CROSS_ATTENTION_REGISTRY.register()
    class Own(nn.Module):
        reads = ("locations", "memory_mask")

        def __init__(self, d_model, nhead, dropout, normalize_before):
            super().__init__()
            seen.append((d_model, nhead, dropout, normalize_before))

        def forward(self, tgt, memory, **inputs):
            seen.append({name: tuple(x.shape) for name, x in inputs.items()})
            return tgt

    decoder = mode(build(cross_attention="Own", dec_layers=1, dropout=0.1))
    decoder(*inputs())
    assert seen[0] == (C, M, 0.1, False)
    assert seen[1] == {
        "pos": (6, B, C),
        "query_pos": (Q, B, C),
        "memory_mask": (B * M, Q, 6),
        "locations": (6, 2),
    }
