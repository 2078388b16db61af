"""Each row of the table: the twin gives the outputs, losses and gradients of the plain method.

In float64, for the same random points: `torch.rand` is replaced by a function of the shape alone.
"""

import copy
import dataclasses

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_model
from torch import Tensor, nn

from mask2former.fast.frozen_norm import ConvWithFrozenNorm, fold_frozen_norms
from mask2former.fast.table import TABLE
from mask2former.maskformer_model import MaskFormer
from mask2former.modeling.backbone.swin_layers import WindowAttention
from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.layers import (
    CrossAttentionLayer,
    PositionEmbeddingSine,
    SelfAttentionLayer,
)
from mask2former.modeling.matcher import HungarianMatcher
from mask2former.modeling.pixel_decoder.msdeformattn import (
    MSDeformAttnPixelDecoder,
    MSDeformAttnTransformerEncoderLayer,
    MSDeformAttnTransformerEncoderOnly,
)
from mask2former.modeling.transformer_decoder import (
    ConfigurableTransformerDecoder,
    MultiScaleMaskedTransformerDecoder,
)
from mask2former.utils.twins import register_twin, run_plain, runs_fast

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
SHAPES = [(2, 3), (4, 6), (8, 12)]


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def leaf(*size: int) -> Tensor:
    return torch.randn(size).requires_grad_()


def attention_case(layer: nn.Module, memory: bool):
    query, pos = leaf(5, 2, 16), leaf(5, 2, 16)
    if not memory:
        return layer, "forward", (query, None, None, pos)
    blocked = torch.rand(2 * 4, 5, 24) > 0.5
    blocked[..., 0] = False
    padding = torch.zeros(2, 24, dtype=torch.bool)
    padding[1, 20:] = True
    return layer, "forward", (query, leaf(24, 2, 16), blocked, padding, leaf(24, 2, 16), pos)


def spread(module: nn.Module) -> nn.Module:
    """Give deformable attention offsets that depend on the query."""
    for name, parameter in module.named_parameters():
        if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
            nn.init.normal_(parameter, std=0.1)
    return module


def encoder_layer():
    layer = spread(MSDeformAttnTransformerEncoderLayer(16, 32, 0.0, n_levels=3, n_heads=4))
    num_values = sum(height * width for height, width in SHAPES)
    points = torch.rand(1, num_values, 3, 2)
    arguments = (leaf(2, num_values, 16), leaf(2, num_values, 16), points, torch.tensor(SHAPES))
    return layer, "forward", arguments


def encoder():
    module = spread(
        MSDeformAttnTransformerEncoderOnly(
            16, 4, 2, 32, dropout=0.0, num_feature_levels=3, enc_n_points=2
        )
    )
    return module, "forward", [[leaf(2, 16, *shape) for shape in SHAPES] for _ in range(2)]


def pixel_decoder():
    names = {f"res{i}": ShapeSpec(channels=8, stride=2**i) for i in (2, 3, 4, 5)}
    module = MSDeformAttnPixelDecoder(
        names,
        transformer_dropout=0.0,
        transformer_nheads=4,
        transformer_dim_feedforward=32,
        transformer_enc_layers=1,
        conv_dim=32,
        mask_dim=16,
        norm="GN",
        transformer_in_features=["res3", "res4", "res5"],
        common_stride=4,
    )
    return module, "add_fpn_levels", (leaf(2, 32, 4, 6), [leaf(2, 8, 8, 12)])


def decoder(kind=MultiScaleMaskedTransformerDecoder):
    module = kind(
        16,
        num_classes=3,
        hidden_dim=16,
        num_queries=6,
        nheads=4,
        dim_feedforward=32,
        dec_layers=4,
        pre_norm=False,
        mask_dim=8,
        enforce_input_project=True,
    )
    return module, "forward", ([leaf(2, 16, *shape) for shape in SHAPES], leaf(2, 8, 16, 24))


def targets(*labels: list[int]) -> list[dict[str, Tensor]]:
    return [
        {"labels": torch.tensor(x, dtype=torch.int64), "masks": torch.rand(len(x), 24, 40) > 0.6}
        for x in labels
    ]


def outputs() -> dict:
    layers = [{"pred_logits": leaf(3, 6, 4), "pred_masks": leaf(3, 6, 12, 20)} for _ in range(3)]
    return layers[0] | {"aux_outputs": layers[1:]}


def criterion():
    matcher = HungarianMatcher(2.0, 5.0, 5.0, num_points=40)
    module = SetCriterion(3, matcher, {}, 0.1, ["labels", "masks"], 40, 3.0, 0.75)
    return module, "forward", (outputs(), targets([0, 2, 1], [], [1]))


def matcher():
    return criterion()[0].matcher, "forward", (outputs(), targets([0, 2, 1], [], [1]))


def window_attention():
    module = WindowAttention(12, (2, 3), 3)
    nn.init.normal_(module.relative_position_bias_table)
    # Frozen, because a table that trains takes the plain path on a CPU.
    module.relative_position_bias_table.requires_grad_(False)
    mask = torch.zeros(4, 6, 6)
    mask[1, :, 4:] = mask[3, 2:] = -100.0
    return module, "forward", (leaf(2 * 4, 6, 12), mask)


CASES = {
    (WindowAttention, "forward"): window_attention,
    (MSDeformAttnTransformerEncoderOnly, "forward"): encoder,
    (MSDeformAttnTransformerEncoderLayer, "forward"): encoder_layer,
    (MSDeformAttnPixelDecoder, "add_fpn_levels"): pixel_decoder,
    (PositionEmbeddingSine, "forward"): lambda: (
        PositionEmbeddingSine(8, normalize=True),
        "forward",
        (torch.zeros(2, 1, 5, 7),),
    ),
    (MultiScaleMaskedTransformerDecoder, "forward"): decoder,
    (ConfigurableTransformerDecoder, "forward"): lambda: decoder(ConfigurableTransformerDecoder),
    (CrossAttentionLayer, "forward"): lambda: attention_case(CrossAttentionLayer(16, 4), True),
    (SelfAttentionLayer, "forward"): lambda: attention_case(SelfAttentionLayer(16, 4), False),
    (HungarianMatcher, "forward"): matcher,
    (SetCriterion, "forward"): criterion,
}
MODEL_ROWS = {(MaskFormer, "forward_network"), (MaskFormer, "forward_inference")}


def tensors_of(value) -> list[Tensor]:
    """All tensors in nested containers, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in tensors_of(value[key])]
    if isinstance(value, list | tuple):
        return [x for item in value for x in tensors_of(item)]
    return []


def run(module: nn.Module, method: str, arguments) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs, and gradients of parameters and arguments for a random sum of the outputs."""
    results = tensors_of(getattr(module, method)(*arguments))
    leaves = [x for x in (*module.parameters(), *tensors_of(arguments)) if x.requires_grad]
    differentiable = [x for x in results if x.requires_grad]
    if not differentiable:
        return results, []
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator) for x in differentiable]
    total = sum((x * w).sum() for x, w in zip(differentiable, weights, strict=True))
    return results, list(torch.autograd.grad(total, leaves, allow_unused=True))


def assert_equal(fast, plain) -> None:
    for ours, expected in zip(fast, plain, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            assert ours.dtype == expected.dtype
            torch.testing.assert_close(ours, expected, **TOLERANCE)


def test_every_row_has_a_case():
    assert {(row.plain, row.method) for row in TABLE} == set(CASES) | MODEL_ROWS


@pytest.mark.parametrize(
    "row",
    [row for row in TABLE if (row.plain, row.method) in CASES],
    ids=lambda row: row.plain.__name__,
)
def test_twin_equals_plain(row, same_points, spied):
    calls = spied(row)
    module, method, arguments = CASES[row.plain, row.method]()
    state = list(module.state_dict())
    fast = run(module, method, arguments)
    assert len(calls) >= 1
    calls.clear()
    plain = run(run_plain(copy.deepcopy(module)), method, arguments)
    assert calls == []
    assert_equal(fast[0], plain[0])
    assert_equal(fast[1], plain[1])
    assert list(module.state_dict()) == state


@pytest.fixture
def spied():
    """Function row → list that gets an entry for each call of the row's twin."""
    rows = []

    def spy(row):
        calls = []

        def fast(*args, **kwargs):
            calls.append(1)
            return row.fast(*args, **kwargs)

        register_twin(dataclasses.replace(row, fast=fast))
        rows.append(row)
        return calls

    yield spy
    for row in rows:
        register_twin(row)


def build_both(cfg) -> list[MaskFormer]:
    """The same model, fast and plain, in float64."""
    models = []
    for fast in (True, False):
        cfg.MODEL.FAST = fast
        torch.manual_seed(0)
        models.append(spread(build_model(cfg)).double())
    models[1].load_state_dict(models[0].state_dict())
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    return models


@pytest.mark.parametrize("checkpointing", ["none", "selective", "blocks"])
def test_training_of_the_whole_model(tiny_cfg, make_input, same_points, spied, checkpointing):
    calls, counts = {f"{row.plain}.{row.method}": spied(row) for row in TABLE}, []
    tiny_cfg.MODEL.CHECKPOINTING = checkpointing
    batch = [make_input(64, 96, [0, 2, 1], seed=1), make_input(50, 70, [2], seed=2)]
    results = []
    for model in build_both(tiny_cfg):
        losses = model(batch)
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(sum(losses.values()), parameters.values(), allow_unused=True)
        results.append((losses, dict(zip(parameters, grads, strict=True))))
        counts.append({row: len(x) for row, x in calls.items()})
    (fast, fast_grads), (plain, plain_grads) = results
    assert list(fast) == list(plain) and list(fast_grads) == list(plain_grads)
    assert_equal(fast.values(), plain.values())
    for name, grad in plain_grads.items():
        # Relative to the gradient of the whole tensor: entries of it cancel.
        difference = (fast_grads[name] - grad).norm()
        assert difference <= 1e-9 * grad.norm() + 1e-12, name
    # Twins ran in the fast model, and none in the plain one.
    assert counts[0] == counts[1] and sum(counts[0].values()) > len(counts[0]) / 2


def test_branches_for_accelerators_change_no_number(tiny_cfg, make_input, same_points, monkeypatch):
    """Training and inference with tensors that claim not to be on the CPU, but compute there."""
    model = build_both(tiny_cfg)[0]
    batch = [make_input(64, 96, [0, 2, 1], seed=1), make_input(50, 70, [2], seed=2)]

    def run_both():
        losses = model.train()(batch)
        grads = torch.autograd.grad(
            sum(losses.values()), list(model.parameters()), allow_unused=True
        )
        with torch.no_grad():
            network = model.eval().forward_network(torch.ones(2, 3, 64, 96))
        return [*losses.values(), *network.values()], grads

    expected, expected_grads = run_both()
    monkeypatch.setattr(Tensor, "is_cpu", False)
    results, grads = run_both()
    assert_equal(results, expected)
    for grad, other in zip(grads, expected_grads, strict=True):
        assert (grad is None) == (other is None)
        assert grad is None or (grad - other).norm() <= 1e-9 * other.norm() + 1e-12


def test_inference_of_the_whole_model(tiny_cfg, make_input, spied):
    calls = [spied(row) for row in TABLE if row.plain is MaskFormer]
    fast, plain = (model.eval() for model in build_both(tiny_cfg))
    inputs = [
        {"image": make_input(64, 96, [])["image"], "height": 90, "width": 150},
        {"image": make_input(50, 70, [], seed=1)["image"]},
    ]
    with torch.no_grad():
        expected = plain(inputs)
        assert calls == [[], []]
        results = fast(inputs)
        assert calls == [[1], [1]]
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result["sem_seg"], other["sem_seg"], **TOLERANCE)
        assert torch.equal(result["panoptic_seg"][0], other["panoptic_seg"][0])
        assert result["panoptic_seg"][1] == other["panoptic_seg"][1]
        ours, others = result["instances"], other["instances"]
        assert torch.equal(ours.pred_classes, others.pred_classes)
        assert torch.equal(ours.pred_masks, others.pred_masks)
        torch.testing.assert_close(ours.scores, others.scores, **TOLERANCE)


def test_convolution_with_frozen_norm():
    norm = FrozenBatchNorm2d(6)
    for buffer in norm.buffers():
        nn.init.uniform_(buffer, 0.5, 2.0)
    plain = Conv2d(4, 6, 3, stride=2, padding=1, norm=norm, activation=nn.functional.relu)
    fast = fold_frozen_norms(copy.deepcopy(plain))
    assert type(fast) is not Conv2d
    x = leaf(2, 4, 9, 7)
    for ours, expected in zip(run(fast, "forward", (x,)), run(plain, "forward", (x,)), strict=True):
        assert_equal(ours, expected)


def test_fast_false_reaches_parts_built_by_hand(tiny_cfg):
    tiny_cfg.MODEL.FAST = False
    parts = MaskFormer.from_config(tiny_cfg)
    parts["criterion"] = criterion()[0]
    assert runs_fast(parts["criterion"])
    model = MaskFormer(**parts)
    assert not runs_fast(model.criterion) and not runs_fast(model.criterion.matcher)
    assert not any(type(module) is ConvWithFrozenNorm for module in model.modules())
