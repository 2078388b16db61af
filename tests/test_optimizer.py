"""Parameter groups and gradient clipping, by hand."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.projects.deeplab import add_deeplab_config
from torch import nn

from mask2former import add_maskformer2_config
from mask2former.optimizer import build_optimizer


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.WEIGHT_DECAY = 0.05
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.001
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.002
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    return cfg


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(3))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.absolute_pos_embed = nn.Parameter(torch.zeros(2))
        self.backbone.attention = Attention()
        self.backbone.norm = nn.LayerNorm(4)
        self.backbone.frozen = nn.Linear(1, 1).requires_grad_(False)
        self.head = nn.Linear(4, 2)
        self.head_norm = nn.GroupNorm(1, 2)
        self.query = nn.Embedding(5, 4)
        self.tied = self.head


def test_groups(cfg):
    model = Model()
    optimizer = build_optimizer(cfg, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [
        (names[g["params"][0]], pytest.approx(g["lr"]), g["weight_decay"])
        for g in optimizer.param_groups
    ]
    assert [len(g["params"]) for g in optimizer.param_groups] == [1] * len(groups)
    assert groups == [
        ("backbone.absolute_pos_embed", 0.001, 0.0),
        ("backbone.attention.relative_position_bias_table", 0.001, 0.0),
        ("backbone.norm.weight", 0.001, 0.001),
        ("backbone.norm.bias", 0.001, 0.001),
        ("head.weight", 0.01, 0.05),
        ("head.bias", 0.01, 0.05),
        ("head_norm.weight", 0.01, 0.001),
        ("head_norm.bias", 0.01, 0.001),
        ("query.weight", 0.01, 0.002),
    ]
    assert optimizer.defaults["lr"] == 0.01


def test_types(cfg):
    model = Model()
    assert isinstance(build_optimizer(cfg, model), torch.optim.AdamW)
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.SOLVER.MOMENTUM = 0.7
    cfg.SOLVER.NESTEROV = True
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {g["momentum"] for g in optimizer.param_groups} == {0.7}
    assert {g["nesterov"] for g in optimizer.param_groups} == {True}
    cfg.SOLVER.OPTIMIZER = "LION"
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER is 'LION'; allowed: ADAMW, SGD"):
        build_optimizer(cfg, model)


@pytest.mark.parametrize(
    ("clip_type", "value", "first", "second"),
    [
        # The gradients are (3, 0) and (0, 4), whose norms are 3 and 4, together 5.
        ("full_model", 1.0, 3 / 5, 4 / 5),
        ("full_model", 10.0, 3, 4),
        ("full_model", 0.0, 3, 4),
        ("norm", 1.0, 1, 1),
        ("value", 2.0, 2, 2),
    ],
)
def test_clipping(cfg, clip_type, value, first, second):
    cfg.SOLVER.OPTIMIZER = "SGD"
    cfg.SOLVER.MOMENTUM = 0.0
    cfg.SOLVER.BASE_LR = 1.0
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip_type
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = value
    model = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(2)])
    optimizer = build_optimizer(cfg, model)
    (3 * model[0][0] + 4 * model[1][1]).backward()
    optimizer.step()
    assert model[0].tolist() == pytest.approx([-first, 0], abs=1e-5)
    assert model[1].tolist() == pytest.approx([0, -second], abs=1e-5)


def test_no_clipping_by_default(cfg):
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    assert type(build_optimizer(cfg, Model())) is torch.optim.AdamW
