"""Whole models with backbones of timm: losses, gradients, inference, number of channels."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from mask2former.optimizer import parameter_groups

pytest.importorskip("timm")

BACKBONES = {
    "ConvNeXt": ("TimmBackbone", "MODEL.TIMM", "test_convnext"),
    "EfficientNet": ("build_timm_backbone", "MODEL.TIMM", "test_efficientnet"),
    "ResNet": ("TimmBackbone", "MODEL.TIMM", "resnet10t"),
    "ViT": ("TimmViTBackbone", "MODEL.VIT", "test_vit"),
    "ViT with RoPE": ("TimmViTBackbone", "MODEL.VIT", "test_vit3"),
}


def build(cfg, backbone, channels=3, **options):
    name, section, model = BACKBONES[backbone]
    cfg.MODEL.BACKBONE.NAME = name
    for key, value in {"NAME": model, **options}.items():
        setattr(cfg.MODEL[section.rpartition(".")[2]], key, value)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [120.0] * channels, [60.0] * channels
    torch.manual_seed(0)
    return build_model(cfg)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_and_inference(tiny_cfg, make_input, backbone, channels):
    options = {"NORM": "BN"} if BACKBONES[backbone][1] == "MODEL.TIMM" else {}
    model = build(tiny_cfg, backbone, channels, **options).train()
    for name, parameter in model.named_parameters():
        # Initially these are zero, and what they scale has no effect.
        is_offset = "sampling_offsets.weight" in name or "attention_weights.weight" in name
        if is_offset or not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    batch = [make_input(64, 97, [0, 2, 1], seed=1), make_input(50, 70, [2], seed=2)]
    for sample in batch:
        sample["image"] = sample["image"][:1].repeat(channels, 1, 1)
    losses = model(batch)
    assert len(losses) == 15
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    missing = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    with torch.no_grad():
        results = model.eval()(batch)
    for sample, result in zip(batch, results, strict=True):
        size = sample["image"].shape[1:]
        assert result["sem_seg"].shape[1:] == size == result["panoptic_seg"][0].shape
        assert result["instances"].pred_masks.shape[1:] == size


@pytest.mark.parametrize("backbone", ["EfficientNet", "ViT"])
def test_without_padding(tiny_cfg, make_input, backbone):
    """MODEL.MASK_FORMER.SIZE_DIVISIBILITY 0: maps of odd images go to the decoders."""
    tiny_cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = 0
    model = build(tiny_cfg, backbone).train()
    batch = [make_input(67, 97, [0, 2, 1])]
    sum(model(batch).values()).backward()
    with torch.no_grad():
        assert model.eval()(batch)[0]["sem_seg"].shape[1:] == (67, 97)


@pytest.mark.parametrize("freeze_at", [0, 2])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_parameter_groups(tiny_cfg, backbone, freeze_at):
    """Every trainable parameter is in one group; pyramids learn as fast as BACKBONE_MULTIPLIER."""
    tiny_cfg.SOLVER.LAYER_DECAY, tiny_cfg.SOLVER.BACKBONE_MULTIPLIER = 0.5, 0.1
    model = build(tiny_cfg, backbone)
    model.backbone.freeze(freeze_at)
    groups = parameter_groups(tiny_cfg, model)
    names = {p: name for name, p in model.named_parameters()}
    rates = {names[p]: group["lr"] for group in groups for p in group["params"]}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(rates)
    assert sorted(rates) == sorted(trained)
    prefix, base = f"backbone.{model.backbone.timm_prefix}", tiny_cfg.SOLVER.BASE_LR
    for name, rate in rates.items():
        if name.startswith(prefix):
            depth = model.backbone.num_depths - model.backbone.parameter_depth(name[9:])
            assert depth >= 1 and rate == pytest.approx(base * 0.1 * 0.5**depth), name
        else:
            assert rate == pytest.approx(base * (0.1 if name.startswith("backbone.") else 1)), name
    if freeze_at == 0:
        assert len({rate for name, rate in rates.items() if name.startswith(prefix)}) > 2


def test_norms_of_the_pyramid_have_the_decay_of_norms(tiny_cfg):
    tiny_cfg.SOLVER.WEIGHT_DECAY, tiny_cfg.SOLVER.WEIGHT_DECAY_NORM = 0.05, 0.0
    model = build(tiny_cfg, "ViT")
    decays = {
        id(p): group["weight_decay"]
        for group in parameter_groups(tiny_cfg, model)
        for p in group["params"]
    }
    norms = [m for m in model.backbone.modules() if type(m).__name__.startswith("LayerNorm")]
    assert len({type(norm) for norm in norms}) == 2  # timm's and Detectron2's
    assert {decays[id(norm.weight)] for norm in norms} == {0.0}
    assert decays[id(model.backbone.simfp_4[0].weight)] == 0.05


def test_plain_and_fast_give_the_same_losses(tiny_cfg, make_input, same_points):
    losses = []
    for fast in (False, True):
        tiny_cfg.MODEL.FAST = fast
        model = build(tiny_cfg, "ResNet").train()
        torch.manual_seed(1)
        losses.append(model([make_input(64, 96, [0, 2, 1])]))
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-4, atol=1e-5)


def test_training_reduces_the_loss(tiny_cfg, make_input):
    tiny_cfg.MODEL.MASK_FORMER.DEC_LAYERS = 2
    model = build(tiny_cfg, "ResNet", NORM="BN").train()
    batch = [make_input(32, 64, [0, 2]), make_input(32, 64, [1], seed=1)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(12):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.7 * history[0]
