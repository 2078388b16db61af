"""MaskFormer's decoder, its transformer, and the registry both decoders share."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.projects.deeplab import add_deeplab_config
from torch import nn

from mask2former.config import add_maskformer2_config
from mask2former.modeling.transformer_decoder import maskformer_transformer_decoder as original
from mask2former.modeling.transformer_decoder.build import (
    TRANSFORMER_DECODER_REGISTRY,
    build_transformer_decoder,
)
from mask2former.modeling.transformer_decoder.maskformer_transformer_decoder import (
    StandardTransformerDecoder,
)
from mask2former.modeling.transformer_decoder.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
)

KEYWORDS = {
    "num_classes": 4,
    "hidden_dim": 16,
    "num_queries": 6,
    "nheads": 2,
    "dropout": 0.0,
    "dim_feedforward": 24,
    "enc_layers": 1,
    "dec_layers": 3,
    "pre_norm": False,
    "deep_supervision": True,
    "mask_dim": 5,
    "enforce_input_project": False,
}


def build(in_channels=8, mask_classification=True, **keywords):
    torch.manual_seed(0)
    return StandardTransformerDecoder(in_channels, mask_classification, **(KEYWORDS | keywords))


def inputs(in_channels=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, in_channels, 3, 4, generator=generator)
    return x, torch.randn(2, 5, 12, 16, generator=generator)


def test_outputs():
    out = build()(*inputs())
    assert out["pred_logits"].shape == (2, 6, 5)
    assert out["pred_masks"].shape == (2, 6, 12, 16)
    assert len(out["aux_outputs"]) == 2
    for aux in out["aux_outputs"]:
        assert aux["pred_logits"].shape == (2, 6, 5)
        assert aux["pred_masks"].shape == (2, 6, 12, 16)
    assert not torch.equal(
        out["aux_outputs"][0]["pred_logits"], out["aux_outputs"][1]["pred_logits"]
    )


def test_masks_are_products_of_embeddings_and_features():
    decoder = build()
    # All query embeddings e become the bias of the last layer of the MLP.
    nn.init.zeros_(decoder.mask_embed.layers[-1].weight)
    decoder.mask_embed.layers[-1].bias.data = torch.tensor([1.0, 2, 0, 0, -1])
    x, mask_features = inputs()
    expected = mask_features[:, 0] + 2 * mask_features[:, 1] - mask_features[:, 4]
    out = decoder(x, mask_features)
    for query in (0, 5):
        torch.testing.assert_close(out["pred_masks"][:, query], expected)
        torch.testing.assert_close(out["aux_outputs"][0]["pred_masks"][:, query], expected)


def test_without_deep_supervision_the_last_prediction_is_the_same():
    with_aux, without = build(), build(deep_supervision=False)
    without.load_state_dict(with_aux.state_dict())
    expected, out = with_aux(*inputs()), without(*inputs())
    assert set(out) == {"pred_logits", "pred_masks"}
    torch.testing.assert_close(out["pred_logits"], expected["pred_logits"])
    torch.testing.assert_close(out["pred_masks"], expected["pred_masks"])


def test_without_mask_classification():
    out = build(mask_classification=False)(*inputs())
    assert set(out) == {"pred_masks", "aux_outputs"}
    assert set(out["aux_outputs"][0]) == {"pred_masks"}


def test_padding_has_no_effect():
    """Values under the padding mask change nothing; the mask has another size."""
    decoder = build().eval()
    x, mask_features = inputs()
    padding = torch.zeros(2, 6, 8, dtype=torch.bool)
    padding[1, :, 6:] = True  # the last column of the second image's 3 x 4 features
    changed = x.clone()
    changed[1, :, :, 3] += 10.0
    expected = decoder(x, mask_features, padding)["pred_logits"]
    torch.testing.assert_close(decoder(changed, mask_features, padding)["pred_logits"], expected)
    assert (decoder(changed, mask_features)["pred_logits"] - expected).abs().max() > 1e-3


def test_state_dict_names():
    attention = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")

    def layer(attentions, norms):
        names = {f"{a}.{p}" for a in attentions for p in attention}
        modules = ("linear1", "linear2", *(f"norm{i + 1}" for i in range(norms)))
        return names | {f"{m}.{p}" for m in modules for p in ("weight", "bias")}

    expected = {"query_embed.weight"}
    expected |= {f"transformer.encoder.layers.0.{n}" for n in layer(["self_attn"], 2)}
    for i in range(3):
        names = layer(["self_attn", "multihead_attn"], 3)
        expected |= {f"transformer.decoder.layers.{i}.{n}" for n in names}
        expected |= {f"mask_embed.layers.{i}.{p}" for p in ("weight", "bias")}
    for module in ("transformer.decoder.norm", "input_proj", "class_embed"):
        expected |= {f"{module}.{p}" for p in ("weight", "bias")}
    assert build().state_dict().keys() == expected

    # No projection where the width fits, unless it is enforced.
    assert "input_proj.weight" not in build(in_channels=16).state_dict()
    assert "input_proj.weight" in build(in_channels=16, enforce_input_project=True).state_dict()
    assert "transformer.encoder.norm.weight" in build(pre_norm=True).state_dict()


@pytest.mark.parametrize("pre_norm", [False, True])
def test_every_parameter_gets_a_gradient(pre_norm):
    decoder = build(pre_norm=pre_norm)
    out = decoder(*inputs())
    loss = out["pred_logits"].square().sum() + out["pred_masks"].square().sum()
    for aux in out["aux_outputs"]:
        loss = loss + aux["pred_logits"].square().sum() + aux["pred_masks"].square().sum()
    loss.backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("pre_norm", [False, True])
def test_decoder_equals_pytorchs_without_positions(pre_norm):
    torch.manual_seed(1)
    decoder = TransformerDecoder(
        TransformerDecoderLayer(8, 2, 16, 0.0, normalize_before=pre_norm),
        2,
        nn.LayerNorm(8),
        return_intermediate=True,
    )
    reference = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(8, 2, 16, 0.0, norm_first=pre_norm), 2, nn.LayerNorm(8)
    )
    reference.load_state_dict(decoder.state_dict())
    queries, memory = torch.randn(3, 2, 8), torch.randn(5, 2, 8)
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)
    result = decoder(queries, memory, tgt_mask=causal)
    expected = reference(queries, memory, tgt_mask=causal)
    torch.testing.assert_close(result[-1], expected)
    first_layer = reference.norm(reference.layers[0](queries, memory, tgt_mask=causal))
    torch.testing.assert_close(result[0], first_layer)


def test_positions_enter_queries_and_keys_only():
    """With one memory location, attention returns its value for any positions."""
    torch.manual_seed(2)
    layer = TransformerDecoderLayer(8, 2, 16, 0.0).eval()
    queries, memory = torch.randn(1, 2, 8), torch.randn(1, 2, 8)
    expected = layer(queries, memory)
    result = layer(queries, memory, pos=torch.randn(1, 2, 8), query_pos=torch.randn(1, 2, 8))
    torch.testing.assert_close(result, expected)
    # With several, positions decide which one is looked at.
    memory = torch.randn(5, 2, 8)
    moved = layer(queries, memory, pos=3 * torch.randn(5, 2, 8))
    assert (moved - layer(queries, memory)).abs().max() > 1e-3


def test_transformer_without_encoder_layers_returns_its_input_as_memory():
    transformer = Transformer(8, 2, 0, 2, 16, 0.0)
    x = torch.randn(2, 8, 3, 4)
    queries, memory = transformer(x, None, torch.randn(5, 8), torch.randn(2, 8, 3, 4))
    assert queries.shape == (1, 2, 5, 8)
    assert torch.equal(memory, x)


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one layer, got 0"):
        build(dec_layers=0)
    with pytest.raises(ValueError, match="'tanh'"):
        TransformerDecoderLayer(8, 2, activation="tanh")


def small_cfg():
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    mask_former = cfg.MODEL.MASK_FORMER
    mask_former.TRANSFORMER_DECODER_NAME = "StandardTransformerDecoder"
    mask_former.HIDDEN_DIM, mask_former.NHEADS, mask_former.DIM_FEEDFORWARD = 16, 4, 24
    mask_former.ENC_LAYERS, mask_former.DEC_LAYERS = 2, 3
    mask_former.NUM_OBJECT_QUERIES, mask_former.DROPOUT = 7, 0.25
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.MASK_DIM = 3, 5
    return cfg


def test_build_from_config():
    decoder = build_transformer_decoder(small_cfg(), 16, mask_classification=True)
    assert isinstance(decoder, StandardTransformerDecoder)
    assert decoder.query_embed.weight.shape == (7, 16)
    assert decoder.class_embed.out_features == 4  # 3 classes and "no object"
    assert decoder.mask_embed.layers[-1].out_features == 5
    assert len(decoder.transformer.encoder.layers) == 2
    assert len(decoder.transformer.decoder.layers) == 3
    assert decoder.transformer.decoder.layers[0].self_attn.num_heads == 4
    assert decoder.transformer.decoder.layers[0].dropout3.p == 0.25
    assert decoder.aux_loss
    assert not hasattr(build_transformer_decoder(small_cfg(), 16, False), "class_embed")


def test_original_path_has_the_registry():
    assert original.TRANSFORMER_DECODER_REGISTRY is TRANSFORMER_DECODER_REGISTRY
    assert original.build_transformer_decoder is build_transformer_decoder
    names = {name for name, _ in TRANSFORMER_DECODER_REGISTRY}
    assert {"StandardTransformerDecoder", "MultiScaleMaskedTransformerDecoder"} <= names


def test_unknown_decoder():
    cfg = small_cfg()
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = "NoDecoder"
    with pytest.raises(ValueError, match="'NoDecoder'.*MultiScaleMasked.*StandardTransformer"):
        build_transformer_decoder(cfg, 16)
