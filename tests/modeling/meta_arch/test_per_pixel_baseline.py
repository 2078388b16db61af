"""The per-pixel heads: losses computed by hand, and training within Detectron2's SemanticSegmentor.

Shape letters: B batch, K classes, H W size in pixels.
"""

import math

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from torch import Tensor, nn

from mask2former.modeling import PerPixelBaselineHead, PerPixelBaselinePlusHead
from mask2former.modeling.meta_arch import per_pixel_baseline

IGNORED = 255


class FixedPixelDecoder(nn.Module):
    """Returns the backbone's res2 as mask features."""

    mask_dim = 1

    def forward_features(self, features: dict[str, Tensor]):
        return features["res2"], None, []


def fixed_head(**arguments) -> PerPixelBaselineHead:
    """Two classes on one channel x of the features; their logits are 0 and x."""
    head = PerPixelBaselineHead(
        {"res2": ShapeSpec(channels=1, stride=4)},
        num_classes=2,
        pixel_decoder=FixedPixelDecoder(),
        ignore_value=IGNORED,
        **arguments,
    )
    with torch.no_grad():
        head.predictor.weight[:] = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
        head.predictor.bias.zero_()
    return head


class FixedPredictor(nn.Module):
    """Returns logits for two classes: 0 and x in the last layer, 0 and 2 x in the one before."""

    def forward(self, x: Tensor, mask_features: Tensor) -> dict:
        self.attended = x
        last, earlier = (torch.cat([0 * x, factor * x], 1) for factor in (1, 2))
        return {"pred_masks": last, "aux_outputs": [{"pred_masks": earlier}]}


def fixed_plus_head(deep_supervision: bool) -> PerPixelBaselinePlusHead:
    return PerPixelBaselinePlusHead(
        {"res2": ShapeSpec(channels=1, stride=4)},
        transformer_predictor=FixedPredictor(),
        transformer_in_feature="res2",
        deep_supervision=deep_supervision,
        num_classes=2,
        pixel_decoder=FixedPixelDecoder(),
        ignore_value=IGNORED,
    )


def one_cell(value: float) -> dict[str, Tensor]:
    """Features of a 4 x 4 image: one cell, which is upsampled to a constant."""
    return {"res2": torch.full((1, 1, 1, 1), value)}


def baseline_config(cfg: CfgNode, head: str) -> CfgNode:
    """The tiny model with a per-pixel head."""
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.SEM_SEG_HEAD.NAME = head
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = IGNORED
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "BasePixelDecoder"
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 1
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "res5"
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 2
    return cfg


def semantic_input(height: int, width: int) -> dict:
    """An image whose colour tells the class: 0 on the left, 1 on the right, one row ignored."""
    labels = (torch.arange(width) >= width // 2).long().repeat(height, 1)
    image = (labels * 200).to(torch.uint8).repeat(3, 1, 1)
    labels[0] = IGNORED
    return {"image": image, "sem_seg": labels, "height": height, "width": width}


# --- numbers by hand


@pytest.mark.parametrize("deterministic", [False, True])
def test_loss_is_the_mean_cross_entropy_of_pixels_not_ignored(deterministic, monkeypatch):
    monkeypatch.setattr(per_pixel_baseline, "is_deterministic", lambda x: deterministic)
    head = fixed_head(loss_weight=2.0)
    targets = torch.full((1, 4, 4), IGNORED)
    targets[0, 0, 0] = 0
    targets[0, 1, :2] = 1
    results, losses = head(one_cell(3.0), targets)
    assert results is None
    zero, one = math.log(1 + math.exp(3)), math.log(1 + math.exp(-3))
    assert list(losses) == ["loss_sem_seg"]
    assert losses["loss_sem_seg"].item() == pytest.approx(2 * (zero + 2 * one) / 3, rel=1e-6)


def test_image_of_any_size_is_like_a_padded_one():
    """Logits reach beyond an image of 5 x 7 pixels, whose features are 2 x 2."""
    head = fixed_head()
    x = torch.randn(1, 1, 2, 2)
    targets = torch.randint(0, 2, (1, 5, 7))
    padded = torch.full((1, 8, 8), IGNORED)
    padded[:, :5, :7] = targets
    losses = [head({"res2": x}, labels)[1]["loss_sem_seg"] for labels in (targets, padded)]
    torch.testing.assert_close(*losses)


def test_image_without_labels_has_zero_loss_and_gradient():
    head = fixed_head()
    _, losses = head(one_cell(3.0), torch.full((1, 4, 4), IGNORED))
    assert losses["loss_sem_seg"].item() == 0
    losses["loss_sem_seg"].backward()
    assert not head.predictor.weight.grad.any()


def test_inference_upsamples_logits_bilinearly():
    head = fixed_head().eval()
    logits, losses = head({"res2": torch.tensor([0.0, 8.0]).view(1, 1, 1, 2)})
    assert losses == {}
    assert logits.shape == (1, 2, 4, 8)
    assert not logits[:, 0].any()
    # Pixel centres at (i + 0.5) / 4 - 0.5 cells: -3/8, -1/8, 1/8, ...
    assert logits[0, 1].tolist() == [[0, 0, 1, 3, 5, 7, 8, 8]] * 4


def test_deep_supervision_adds_the_losses_of_earlier_layers():
    targets = torch.ones(1, 4, 4, dtype=torch.int64)
    head = fixed_plus_head(deep_supervision=True)
    results, losses = head(one_cell(3.0), targets)
    assert results is None
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {
            "loss_sem_seg": math.log(1 + math.exp(-3)),
            "loss_sem_seg_0": math.log(1 + math.exp(-6)),
        },
        rel=1e-4,
    )
    logits, losses = head.eval()(one_cell(3.0))
    assert losses == {}
    assert logits.shape == (1, 2, 4, 4) and (logits[:, 1] == 3).all()
    _, losses = fixed_plus_head(deep_supervision=False)(one_cell(3.0), targets)
    assert list(losses) == ["loss_sem_seg"]


def test_training_without_label_maps_says_so():
    with pytest.raises(ValueError, match='PerPixelBaselineHead needs "sem_seg"'):
        fixed_head()(one_cell(3.0))


# --- whole models


@pytest.mark.parametrize(
    ("head", "losses"),
    [
        ("PerPixelBaselineHead", {"loss_sem_seg"}),
        ("PerPixelBaselinePlusHead", {"loss_sem_seg", "loss_sem_seg_0"}),
    ],
)
def test_trains_and_infers(tiny_cfg, head, losses):
    torch.manual_seed(0)
    model = build_model(baseline_config(tiny_cfg, head)).train()
    # Two sizes: the batch is padded with the ignored label.
    batch = [semantic_input(64, 64), semantic_input(64, 40)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for step in range(12):
        optimizer.zero_grad()
        computed = model(batch)
        assert set(computed) == losses
        total = sum(computed.values())
        total.backward()
        if step == 1:  # in step 0, zero biases still hide gradients
            for name, parameter in model.sem_seg_head.named_parameters():
                assert parameter.grad is not None, name
                # The first self-attention projects the queries' initial content, zeros.
                if not name.endswith("decoder.layers.0.self_attn.in_proj_weight"):
                    assert parameter.grad.any(), name
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.5 * totals[0]

    with torch.no_grad():
        for result, given in zip(model.eval()(batch), batch, strict=True):
            assert result["sem_seg"].shape == (3, given["height"], given["width"])
            assert result["sem_seg"].isfinite().all()


@pytest.mark.parametrize("decoder", ["MSDeformAttnPixelDecoder", "TransformerEncoderPixelDecoder"])
def test_other_pixel_decoders(tiny_cfg, decoder):
    cfg = baseline_config(tiny_cfg, "PerPixelBaselinePlusHead")
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = decoder
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "transformer_encoder"
    model = build_model(cfg)
    sum(model([semantic_input(64, 64)]).values()).backward()
    for name, parameter in model.sem_seg_head.named_parameters():
        assert parameter.grad is not None, name


def test_state_dict_names(tiny_cfg):
    head = build_model(baseline_config(tiny_cfg, "PerPixelBaselineHead")).sem_seg_head
    names = list(head.state_dict())
    assert names[-2:] == ["predictor.weight", "predictor.bias"]
    assert head.predictor.weight.shape == (3, 32, 1, 1)
    assert all(name.startswith("pixel_decoder.") for name in names[:-2])

    head = build_model(baseline_config(tiny_cfg, "PerPixelBaselinePlusHead")).sem_seg_head
    names = [name for name in head.state_dict() if not name.startswith("pixel_decoder.")]
    assert all(name.startswith("predictor.") for name in names)
    for name in ("query_embed.weight", "mask_embed.layers.0.weight", "input_proj.weight"):
        assert f"predictor.{name}" in names
    assert not any("class_embed" in name for name in names)


@pytest.mark.parametrize("head", ["PerPixelBaselineHead", "PerPixelBaselinePlusHead"])
def test_loads_checkpoints_from_before_version_2(tiny_cfg, head):
    model = build_model(baseline_config(tiny_cfg, head))
    state = model.state_dict()
    old = {
        name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head."): state[name] for name in state
    }
    assert len(old) == len(state)
    model.load_state_dict(old)  # strict; plain dicts have no version
    model.load_state_dict(dict(state))
    model.load_state_dict(state)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("NUM_OBJECT_QUERIES", 7, "NUM_OBJECT_QUERIES is 7.*NUM_CLASSES.*3"),
        ("TRANSFORMER_IN_FEATURE", "res9", "TRANSFORMER_IN_FEATURE is 'res9'.*res5"),
        ("TRANSFORMER_IN_FEATURE", "multi_scale_pixel_decoder", "TRANSFORMER_IN_FEATURE is 'multi"),
    ],
)
def test_bad_config_names_its_key(tiny_cfg, key, value, message):
    cfg = baseline_config(tiny_cfg, "PerPixelBaselinePlusHead")
    cfg.MODEL.MASK_FORMER[key] = value
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_encoder_features_need_an_encoder(tiny_cfg):
    cfg = baseline_config(tiny_cfg, "PerPixelBaselinePlusHead")
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "transformer_encoder"
    model = build_model(cfg)
    with pytest.raises(ValueError, match="needs a pixel decoder with a transformer encoder"):
        model([semantic_input(64, 64)])
