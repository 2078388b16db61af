"""Parameter groups and gradient clipping, computed by hand."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.projects.deeplab import add_deeplab_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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
        ([names[p] for p in g["params"]], pytest.approx(g["lr"]), g["weight_decay"])
        for g in optimizer.param_groups
    ]
    tables = ["backbone.absolute_pos_embed", "backbone.attention.relative_position_bias_table"]
    assert groups == [
        (tables, 0.001, 0.0),
        (["backbone.norm.weight", "backbone.norm.bias"], 0.001, 0.001),
        (["head.weight", "head.bias"], 0.01, 0.05),
        (["head_norm.weight", "head_norm.bias"], 0.01, 0.001),
        (["query.weight"], 0.01, 0.002),
    ]
    assert optimizer.defaults["lr"] == 0.01


def one_group_per_parameter(cfg, model: nn.Module, **options) -> torch.optim.AdamW:
    """The layout of the original release: one group per parameter, in module order."""
    settings = {
        parameter: {k: group[k] for k in ("lr", "weight_decay")}
        for group in build_optimizer(cfg, model).param_groups
        for parameter in group["params"]
    }
    ordered = [
        parameter
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    ]
    groups = [{"params": [p], **settings[p]} for p in dict.fromkeys(ordered)]
    return torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_same_updates_as_one_group_per_parameter(cfg):
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    optimizer = build_optimizer(cfg, models[0])
    assert all(group["fused"] for group in optimizer.param_groups)
    train(models[0], optimizer, seed=0)
    train(models[1], one_group_per_parameter(cfg, models[1], foreach=False), seed=0)
    for ours, original in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, original, rtol=1e-5, atol=1e-6)


class Tokens(nn.Module):
    """A backbone of two blocks, with what ViTs learn besides weights."""

    num_depths = 3

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 2))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 2))
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.neck = nn.Linear(2, 2)

    def parameter_depth(self, name: str) -> int:
        first, *rest = name.split(".")
        if first == "blocks":
            return 1 + int(rest[0])
        return 3 if first == "neck" else 0


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Tokens()
        self.head = nn.Linear(2, 2)


def test_each_block_learns_slower_than_the_next(cfg, caplog):
    """Rates: 0.01 for heads, a tenth of it for the neck, halved by each block before it."""
    caplog.set_level("INFO")
    cfg.SOLVER.LAYER_DECAY = 0.5
    model = Layered()
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {
        names[p].rpartition(".")[0]: pytest.approx(group["lr"])
        for group in build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }
    assert rates == {
        "backbone": 0.001 * 0.125,  # tokens
        "backbone.blocks.0": 0.001 * 0.25,
        "backbone.blocks.1": 0.001 * 0.5,
        "backbone.neck": 0.001,
        "head": 0.01,
    }
    (line,) = (r.getMessage() for r in caplog.records if "LAYER_DECAY" in r.getMessage())
    assert line.endswith("learning rates from 0.000125 to 0.01 in 5 parameter groups")


def test_tokens_have_no_weight_decay_in_backbones_that_name_them(cfg):
    model, other = Layered(), Model()
    other.backbone.pos_embed = nn.Parameter(torch.zeros(2))  # as the original release decays it
    decays = {
        id(p): group["weight_decay"]
        for built in (model, other)
        for group in build_optimizer(cfg, built).param_groups
        for p in group["params"]
    }
    assert decays[id(model.backbone.pos_embed)] == decays[id(model.backbone.cls_token)] == 0
    assert decays[id(model.backbone.neck.weight)] == decays[id(other.backbone.pos_embed)] == 0.05


def test_layer_decay_needs_a_backbone_with_depths(cfg):
    cfg.SOLVER.LAYER_DECAY = 0.9
    with pytest.raises(ValueError, match=r"backbone Sequential does not say .*`num_depths`"):
        build_optimizer(cfg, Model())
    with pytest.raises(ValueError, match=r"LAYER_DECAY is 0.9, but the model has no .*`backbone`"):
        build_optimizer(cfg, nn.Linear(2, 2))


@pytest.mark.parametrize("ours", [False, True])
def test_layer_decay_in_training_that_continues(cfg, ours):
    """From state without it: in the original layout, or of a run with another decay."""
    model, whole = Layered(), Layered()
    whole.load_state_dict(model.state_dict())
    build = build_optimizer if ours else one_group_per_parameter
    cfg.SOLVER.LAYER_DECAY = 0.5 if not ours else 1.0
    first = build(cfg, model)
    train(model, first, seed=1)
    saved = first.state_dict()
    cfg.SOLVER.LAYER_DECAY = 0.5
    second = build_optimizer(cfg, model)
    rates = [group["lr"] for group in second.param_groups]
    second.load_state_dict(saved)
    assert len(second.param_groups) == len(rates) == 5
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in second.state.items():
        assert state["exp_avg"].shape == parameter.shape
        assert torch.equal(state["exp_avg"], first.state[parameter]["exp_avg"]), names[parameter]
    if not ours:
        assert [group["lr"] for group in second.param_groups] == rates


@pytest.mark.parametrize("ours", [False, True])
def test_training_continues_from_saved_state(cfg, ours):
    """In the original layout and in ours; the kernels are those of this machine."""
    model, whole = Model(), Model()
    whole.load_state_dict(model.state_dict())
    build = build_optimizer if ours else one_group_per_parameter
    first = build(cfg, model)
    train(model, first, seed=1)
    saved = first.state_dict()
    assert len(saved["param_groups"]) == (5 if ours else 9)
    assert not ours or saved["param_groups"][0]["fused"]
    for group in saved["param_groups"]:
        group["fused"], group["foreach"] = None, True
    second = build_optimizer(cfg, model)
    second.load_state_dict(saved)
    assert all(group["fused"] and not group["foreach"] for group in second.param_groups)
    train(model, second, seed=2)

    uninterrupted = build_optimizer(cfg, whole)
    train(whole, uninterrupted, seed=1)
    train(whole, uninterrupted, seed=2)
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_state_of_another_model_is_rejected(cfg):
    saved = one_group_per_parameter(cfg, nn.Sequential(nn.Linear(2, 2))).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        build_optimizer(cfg, Model()).load_state_dict(saved)


def test_gradients_are_unscaled_before_clipping(cfg):
    """In mixed precision the scaler must unscale before the step, not inside it."""
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.MOMENTUM, cfg.SOLVER.BASE_LR = "SGD", 0.0, 1.0
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    model = nn.ParameterList([nn.Parameter(torch.zeros(2))])
    optimizer = build_optimizer(cfg, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(0.3 * model[0][0] + 0.4 * model[0][1]).backward()
    scaler.step(optimizer)
    assert model[0].tolist() == pytest.approx([-0.3, -0.4], abs=1e-5)


class Reads(TorchDispatchMode):
    """How often the host reads a value, as it must wait for a GPU to do."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def train_scaled(cfg, in_kernel):
    """Parameters and state after five steps in mixed precision, the first and third overflow."""
    torch.manual_seed(0)
    model = Model()
    optimizer = build_optimizer(cfg, model)
    if not in_kernel:
        optimizer._step_supports_amp_scaling = False
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    reads = []
    for step in range(5):
        optimizer.zero_grad()
        factor = float("inf") if step in (0, 2) else step + 1.0
        loss = sum((p * torch.randn_like(p)).sum() for p in model.parameters() if p.requires_grad)
        scaler.scale(loss * factor).backward()
        with Reads() as counter:
            scaler.step(optimizer)
            scaler.update()
        reads.append(counter.count)
    return list(model.parameters()), optimizer.state_dict()["state"], reads


@pytest.mark.parametrize("clip", ["full_model", None])
def test_scaled_gradients_are_taken_without_a_host_sync(cfg, clip):
    """The numbers are those of unscaling before the step and skipping it."""
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = clip is not None
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip or "value"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    parameters, state, reads = train_scaled(cfg, in_kernel=True)
    expected, expected_state, expected_reads = train_scaled(cfg, in_kernel=False)
    assert reads == [0] * 5 and min(expected_reads) > 0
    for parameter, other in zip(parameters, expected, strict=True):
        assert torch.isfinite(parameter).all() and torch.equal(parameter, other)
    assert state.keys() == expected_state.keys()
    for index, values in state.items():
        for name, value in values.items():
            assert torch.equal(value, expected_state[index][name]), name


@pytest.mark.parametrize(
    ("optimizer", "clip", "supports"),
    [
        ("ADAMW", "full_model", True),
        ("ADAMW", "value", False),
        ("ADAMW", "norm", False),
        ("SGD", "full_model", False),
    ],
)
def test_who_takes_scaled_gradients(cfg, optimizer, clip, supports):
    """Not the clipping of Detectron2, nor SGD, whose first step would read momentum of nobody."""
    cfg.SOLVER.OPTIMIZER = optimizer
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip
    assert build_optimizer(cfg, Model())._step_supports_amp_scaling == supports


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
