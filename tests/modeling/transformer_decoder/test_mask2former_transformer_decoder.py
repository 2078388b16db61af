"""Masked-attention decoder, plain and fast, against the loop of the original.

Shape letters: B batch, Q queries, C channels, M heads, K classes, L locations.
"""

import pytest
import torch
from torch import Tensor, nn

from mask2former.modeling.transformer_decoder import build_transformer_decoder
from mask2former.modeling.transformer_decoder.mask2former_transformer_decoder import (
    CrossAttentionLayer,
    FFNLayer,
    MultiScaleMaskedTransformerDecoder,
    SelfAttentionLayer,
)

B, Q, C, M = 2, 5, 16, 4


def rand(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


ARGUMENTS = {
    "num_classes": 3,
    "hidden_dim": C,
    "num_queries": Q,
    "nheads": M,
    "dim_feedforward": 24,
    "dec_layers": 4,
    "pre_norm": False,
    "mask_dim": 6,
    "enforce_input_project": False,
}


def build(cls=MultiScaleMaskedTransformerDecoder, in_channels=C, **changes):
    torch.manual_seed(0)
    decoder = cls(in_channels, **{**ARGUMENTS, **changes})
    # Make mask predictions vary more than they do at first, so that attention masks matter.
    nn.init.normal_(decoder.mask_embed.layers[-1].weight, std=0.5)
    return decoder


def inputs(sizes=((2, 3), (4, 6), (8, 12)), channels=C) -> tuple[list[Tensor], Tensor]:
    scales = [rand(B, channels, *size, seed=i) for i, size in enumerate(sizes)]
    height, width = sizes[-1]
    return scales, rand(B, 6, 2 * height, 2 * width, seed=9)


class OriginalLoop(MultiScaleMaskedTransformerDecoder):
    """Runs the decoder by its parts, as subclasses of the original do."""

    def forward(self, x, mask_features, mask=None):
        src, pos, sizes = [], [], []
        for i in range(self.num_feature_levels):
            sizes.append(x[i].shape[-2:])
            pos.append(self.pe_layer(x[i], None).flatten(2).permute(2, 0, 1))
            level = self.level_embed.weight[i][None, :, None]
            src.append((self.input_proj[i](x[i]).flatten(2) + level).permute(2, 0, 1))
        batch = src[0].shape[1]
        query_embed = self.query_embed.weight.unsqueeze(1).repeat(1, batch, 1)
        output = self.query_feat.weight.unsqueeze(1).repeat(1, batch, 1)
        classes, masks = [], []
        for i in range(self.num_layers + 1):
            logits, mask_logits, attn_mask = self.forward_prediction_heads(
                output, mask_features, attn_mask_target_size=sizes[i % 3]
            )
            classes.append(logits)
            masks.append(mask_logits)
            if i == self.num_layers:
                break
            attn_mask[torch.where(attn_mask.sum(-1) == attn_mask.shape[-1])] = False
            output = self.transformer_cross_attention_layers[i](
                output,
                src[i % 3],
                memory_mask=attn_mask,
                memory_key_padding_mask=None,
                pos=pos[i % 3],
                query_pos=query_embed,
            )
            output = self.transformer_self_attention_layers[i](
                output, tgt_mask=None, tgt_key_padding_mask=None, query_pos=query_embed
            )
            output = self.transformer_ffn_layers[i](output)
        return {
            "pred_logits": classes[-1],
            "pred_masks": masks[-1],
            "aux_outputs": self._set_aux_loss(classes, masks),
        }


class OverriddenHeads(MultiScaleMaskedTransformerDecoder):
    """Overrides the prediction heads and counts how often they run."""

    calls = 0

    def forward_prediction_heads(self, output, mask_features, attn_mask_target_size):
        self.calls += 1
        return super().forward_prediction_heads(output, mask_features, attn_mask_target_size)


def assert_same_outputs(outputs, expected):
    pairs = zip(
        [*outputs["aux_outputs"], outputs], [*expected["aux_outputs"], expected], strict=True
    )
    for layer, target in pairs:
        torch.testing.assert_close(
            layer["pred_logits"], target["pred_logits"], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(layer["pred_masks"], target["pred_masks"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_equals_the_loop_of_the_original(mode, pre_norm):
    decoder, original = mode(build(pre_norm=pre_norm)), mode(build(OriginalLoop, pre_norm=pre_norm))
    assert_same_outputs(decoder(*inputs()), original(*inputs()))
    # Masks matter: attending everywhere gives other classes.
    nn.init.zeros_(decoder.mask_embed.layers[-1].weight)
    other = decoder(*inputs())["pred_logits"]
    assert not torch.allclose(other, original(*inputs())["pred_logits"], atol=1e-2)


def test_overridden_prediction_heads_are_called(mode):
    decoder, overridden = mode(build()), mode(build(OverriddenHeads))
    outputs = overridden(*inputs())
    assert overridden.calls == 5
    assert_same_outputs(outputs, decoder(*inputs()))


def test_outputs(mode):
    outputs = mode(build())(*inputs())
    assert set(outputs) == {"pred_logits", "pred_masks", "aux_outputs"}
    assert len(outputs["aux_outputs"]) == 4
    for layer in (outputs, *outputs["aux_outputs"]):
        assert layer["pred_logits"].shape == (B, Q, 4)
        assert layer["pred_masks"].shape == (B, Q, 16, 24)
    # Each layer has its own prediction; the first is that of the queries alone.
    first = outputs["aux_outputs"][0]["pred_logits"]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(outputs["pred_logits"], outputs["aux_outputs"][-1]["pred_logits"])


def spy_memory_masks(decoder) -> list[Tensor]:
    """A list that fills with the attention masks (B·M, Q, L) of all layers."""
    seen = []
    for layer in decoder.transformer_cross_attention_layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["memory_mask"]), with_kwargs=True
        )
    return seen


def test_empty_mask_attends_everywhere(mode):
    decoder = mode(build())
    scales, mask_features = inputs()
    # All embeddings are -1, features are 1: every mask logit is -6, all of the image background.
    nn.init.zeros_(decoder.mask_embed.layers[-1].weight)
    nn.init.constant_(decoder.mask_embed.layers[-1].bias, -1.0)
    seen = spy_memory_masks(decoder)
    outputs = decoder(scales, torch.ones_like(mask_features))
    assert outputs["pred_masks"].unique().tolist() == [-6.0]
    assert [mask.shape for mask in seen] == [(B * M, Q, n) for n in (6, 24, 96, 6)]
    assert not any(mask.any() for mask in seen)
    assert torch.isfinite(outputs["pred_logits"]).all()


def test_attention_is_blocked_where_the_mask_is_background(mode):
    decoder = mode(build())
    scales, _ = inputs()
    nn.init.zeros_(decoder.mask_embed.layers[-1].weight)
    nn.init.constant_(decoder.mask_embed.layers[-1].bias, 1.0)
    features = torch.ones(B, 6, 16, 24)
    features[1, :, :, 12:] = -1  # in image 1, the right half is background
    seen = spy_memory_masks(decoder)
    decoder(scales, features)
    assert not any(mask[:M].any() for mask in seen)
    columns = seen[1][M:].view(M, Q, 4, 6)
    assert columns[..., 3:].all() and not columns[..., :3].any()
    # A logit of exactly 0 is a probability of one half: not blocked.
    seen.clear()
    decoder(scales, features.clamp(max=0))
    assert not any(mask[:M].any() for mask in seen)
    columns = seen[1][M:].view(M, Q, 4, 6)
    assert columns[..., 3:].all() and not columns[..., :3].any()


def test_attention_mask_is_per_head():
    decoder = build()
    _, mask_features = inputs()
    logits, masks, attn_mask = decoder.forward_prediction_heads(
        rand(Q, B, C), mask_features, attn_mask_target_size=(4, 6)
    )
    assert logits.shape == (B, Q, 4) and masks.shape == (B, Q, 16, 24)
    assert attn_mask.shape == (B * M, Q, 24) and attn_mask.dtype == torch.bool
    resized = nn.functional.interpolate(masks, (4, 6), mode="bilinear", align_corners=False)
    expected = resized.sigmoid().flatten(2) < 0.5
    for image in range(B):
        for head in range(M):
            assert torch.equal(attn_mask[image * M + head], expected[image])
    assert not attn_mask.requires_grad and masks.requires_grad


def test_one_pixel_maps(mode):
    """Images of 32×32 pixels have one location at the coarsest scale."""
    decoder, original = mode(build()), mode(build(OriginalLoop))
    given = inputs(sizes=((1, 1), (2, 2), (4, 4)))
    outputs = decoder(*given)
    assert torch.isfinite(outputs["pred_masks"]).all()
    assert_same_outputs(outputs, original(*given))


def test_scales_whose_sizes_are_no_multiples(mode):
    given = inputs(sizes=((2, 3), (3, 5), (6, 9)))
    assert_same_outputs(mode(build())(*given), mode(build(OriginalLoop))(*given))


@pytest.mark.parametrize(
    ("in_channels", "enforce", "projects"), [(C, False, False), (C, True, True), (10, False, True)]
)
def test_input_projection(mode, in_channels, enforce, projects):
    decoder = mode(build(in_channels=in_channels, enforce_input_project=enforce))
    assert ("input_proj.0.weight" in decoder.state_dict()) == projects
    outputs = decoder(*inputs(channels=in_channels))
    assert outputs["pred_logits"].shape == (B, Q, 4)


def test_gradients(mode):
    """Every parameter is trained."""
    decoder = mode(build())
    scales, mask_features = inputs()
    mask_features.requires_grad_()
    outputs = decoder(scales, mask_features)
    total = 0
    for layer in (outputs, *outputs["aux_outputs"]):
        total = total + layer["pred_logits"].square().sum() + layer["pred_masks"].square().sum()
    total.backward()
    missing = [k for k, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    assert mask_features.grad.any()


def test_class_loss_alone_does_not_reach_mask_features(mode):
    decoder = mode(build())
    scales, mask_features = inputs()
    mask_features.requires_grad_()
    decoder(scales, mask_features)["pred_logits"].sum().backward()
    assert mask_features.grad is None
    assert decoder.mask_embed.layers[0].weight.grad is None


def test_old_checkpoints_with_static_query():
    source, decoder = build(), build(OriginalLoop)
    state = source.state_dict()
    state["query_feat.weight"] = rand(Q, C, seed=42)
    old = {k.replace("query_feat", "static_query"): v for k, v in state.items()}  # no version
    decoder.load_state_dict(old)
    assert torch.equal(decoder.query_feat.weight, state["query_feat.weight"])
    # The same inside a model, beside a key of another module.
    model = nn.ModuleDict({"predictor": build(), "other": nn.Module()})
    model["other"].static_query = nn.Parameter(torch.zeros(1))
    old = {f"predictor.{k}": v for k, v in old.items()}
    model.load_state_dict({**old, "other.static_query": torch.ones(1)})
    assert torch.equal(model["predictor"].query_feat.weight, state["query_feat.weight"])
    assert model["other"].static_query.item() == 1
    # A checkpoint of this version is not touched.
    decoder.load_state_dict(source.state_dict())
    assert torch.equal(decoder.query_feat.weight, source.query_feat.weight)


def test_order_of_parameters_is_that_of_the_original():
    """Optimisers number parameters by this order, and store their state by number."""
    keys = list(build().state_dict())
    layer = [k for k in keys if k.startswith("transformer_self_attention_layers.0.")]
    attention = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    names = [f"self_attn.{k}" for k in attention] + ["norm.weight", "norm.bias"]
    assert [k.partition(".0.")[2] for k in layer] == names
    layer = [k for k in keys if k.startswith("transformer_cross_attention_layers.0.")]
    names = [f"multihead_attn.{k}" for k in attention] + ["norm.weight", "norm.bias"]
    assert [k.partition(".0.")[2] for k in layer] == names
    layer = [k for k in keys if k.startswith("transformer_ffn_layers.0.")]
    names = [f"{k}.{kind}" for k in ("linear1", "linear2", "norm") for kind in ("weight", "bias")]
    assert [k.partition(".0.")[2] for k in layer] == names
    tops = list(dict.fromkeys(k.partition(".")[0] for k in keys))
    assert tops == [
        "transformer_self_attention_layers",
        "transformer_cross_attention_layers",
        "transformer_ffn_layers",
        "decoder_norm",
        "query_feat",
        "query_embed",
        "level_embed",
        "class_embed",
        "mask_embed",
    ]


def test_initial_weights_are_drawn_in_the_order_of_the_original():
    """Self-attention, cross-attention and feed-forward of one layer, then the next layer."""
    torch.manual_seed(0)
    decoder = MultiScaleMaskedTransformerDecoder(C, **ARGUMENTS)
    torch.manual_seed(0)
    for i in range(4):
        for layer, target in (
            (decoder.transformer_self_attention_layers[i], SelfAttentionLayer(C, M)),
            (decoder.transformer_cross_attention_layers[i], CrossAttentionLayer(C, M)),
            (decoder.transformer_ffn_layers[i], FFNLayer(C, 24)),
        ):
            for p, q in zip(layer.parameters(), target.parameters(), strict=True):
                assert torch.equal(p, q)
    assert torch.equal(decoder.query_feat.weight, nn.Embedding(Q, C).weight)
    assert torch.equal(decoder.query_embed.weight, nn.Embedding(Q, C).weight)


def test_double_and_autocast(mode):
    decoder = mode(build())
    expected = decoder(*inputs())
    scales, mask_features = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = decoder(scales, mask_features)
        assert torch.isfinite(outputs["pred_masks"]).all()
    decoder.double()
    outputs = decoder([x.double() for x in scales], mask_features.double())
    assert outputs["pred_logits"].dtype == outputs["pred_masks"].dtype == torch.float64
    torch.testing.assert_close(
        outputs["pred_logits"].float(), expected["pred_logits"], atol=1e-3, rtol=0
    )


def test_from_config(tiny_cfg):
    decoder = build_transformer_decoder(tiny_cfg, 64)
    assert isinstance(decoder, MultiScaleMaskedTransformerDecoder)
    assert decoder.num_layers == 4  # DEC_LAYERS counts the prediction from the queries as well
    assert decoder.query_feat.weight.shape == (7, 64)
    assert decoder.class_embed.out_features == 4
    assert decoder.mask_embed.layers[-1].out_features == 32
    assert decoder.transformer_ffn_layers[0].linear1.out_features == 128
    assert decoder.transformer_self_attention_layers[0].self_attn.num_heads == 4
    assert not decoder.transformer_ffn_layers[0].normalize_before
    assert all(m.p == 0 for m in decoder.modules() if isinstance(m, nn.Dropout))
    tiny_cfg.MODEL.MASK_FORMER.PRE_NORM = True
    decoder = build_transformer_decoder(tiny_cfg, 64)
    assert decoder.transformer_ffn_layers[0].normalize_before


def test_bad_arguments(tiny_cfg):
    with pytest.raises(ValueError, match="only does mask classification"):
        build(mask_classification=False)
    scales, mask_features = inputs()
    with pytest.raises(ValueError, match="expected 3 feature scales, got 2"):
        build()(scales[:2], mask_features)
    tiny_cfg.MODEL.MASK_FORMER.DEC_LAYERS = 0
    with pytest.raises(ValueError, match="MODEL.MASK_FORMER.DEC_LAYERS=0 must be at least 1"):
        build_transformer_decoder(tiny_cfg, 64)


@pytest.mark.parametrize("how", ["class", "instance"])
def test_patched_prediction_heads_are_called(how, monkeypatch):
    decoder, calls = build(), []
    expected = decoder(*inputs())
    original = MultiScaleMaskedTransformerDecoder.forward_prediction_heads

    def patched(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    if how == "class":
        monkeypatch.setattr(MultiScaleMaskedTransformerDecoder, "forward_prediction_heads", patched)
    else:
        decoder.forward_prediction_heads = patched.__get__(decoder)
    assert_same_outputs(decoder(*inputs()), expected)
    assert len(calls) == 5


def test_hooks_on_attention_fire_in_every_layer():
    decoder, seen = build(), []
    expected = decoder(*inputs())
    for cross, own in zip(
        decoder.transformer_cross_attention_layers,
        decoder.transformer_self_attention_layers,
        strict=True,
    ):
        for attention in (cross.multihead_attn, own.self_attn):
            attention.register_forward_hook(lambda module, args, out: seen.append(out[1].shape))
    assert_same_outputs(decoder(*inputs()), expected)
    # Attention maps (B, Q, L), from coarse to fine, and (B, Q, Q).
    assert seen == [(B, Q, n) for level in (6, 24, 96, 6) for n in (level, Q)]
