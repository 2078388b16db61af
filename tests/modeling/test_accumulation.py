"""Losses and gradients of micro-batches add up to those of the whole batch.

Shape letters: B batch, Q queries, T targets of an image, H W pixels.
"""

import logging

import pytest
import torch
from criterion_parts import FixedMatcher, as_outputs, leaves, make_criterion
from detectron2.modeling import build_model
from small_parts import random_targets
from torch import nn

from mask2former.maskformer_model import MaskFormer
from mask2former.modeling.accumulation import check_accumulation, warn_of_batch_statistics
from mask2former.modeling.criterion import CRITERION_REGISTRY, LOSS_REGISTRY, SetCriterion
from mask2former.modeling.full_mask_losses import FullMaskCriterion

# Size and labels of eight images: none, one, and more targets than the seven queries.
IMAGES = [
    ((32, 64), [0, 2, 1]),
    ((25, 35), []),
    ((17, 32), [1]),
    ((32, 32), [2, 2]),
    ((40, 20), [0, 1, 2, 0, 1, 2, 0, 1, 2]),
    ((16, 16), []),
    ((30, 50), [1, 1]),
    ((32, 64), [2]),
]


@pytest.fixture
def tiny_cfg(tiny_cfg):
    """With a backbone that is fast in double precision."""
    tiny_cfg.MODEL.BACKBONE.NAME = "D2SwinTransformer"
    swin = tiny_cfg.MODEL.SWIN
    swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS, swin.WINDOW_SIZE = 16, [1] * 4, [1, 2, 4, 8], 4
    swin.DROP_PATH_RATE = 0.0
    tiny_cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = tiny_cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 32
    tiny_cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 1
    tiny_cfg.MODEL.MASK_FORMER.DEC_LAYERS = 3
    return tiny_cfg


@pytest.fixture
def double():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def backward(model, inputs, num_steps):
    """Losses and gradients of a batch in micro-batches; one: without `accumulating`."""
    model.zero_grad()
    totals = {}
    if num_steps == 1:
        totals = model(inputs)
        sum(totals.values()).backward()
    else:
        size = len(inputs) // num_steps
        with model.accumulating(inputs):
            for first in range(0, len(inputs), size):
                losses = model(inputs[first : first + size])
                sum(losses.values()).backward()
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0) + loss.detach()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {name: loss.detach() for name, loss in totals.items()}, gradients


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-6, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}"
        )


PARTS = {
    "points": (),
    "points, as written": ("MODEL.FAST", False),
    "extra loss, no deep supervision": (
        *("MODEL.MASK_FORMER.EXTRA_LOSSES", [["area", 2.0]]),
        *("MODEL.MASK_FORMER.DEEP_SUPERVISION", False),
    ),
    "unmatched queries without loss": ("MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", 0.0),
    "the same, as written": ("MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", 0.0, "MODEL.FAST", False),
    "whole masks": (
        *("MODEL.MASK_FORMER.MATCHER_NAME", "FullMaskMatcher"),
        *("MODEL.MASK_FORMER.CRITERION_NAME", "FullMaskCriterion"),
    ),
    "MaskFormer": (
        *("MODEL.MASK_FORMER.MATCHER_NAME", "MaskFormerMatcher"),
        *("MODEL.MASK_FORMER.CRITERION_NAME", "MaskFormerCriterion"),
    ),
}


@pytest.fixture
def area():
    """An additional loss, registered for a test."""

    def area(matched):
        return (matched.point_logits.sigmoid().mean(1) - matched.point_labels.mean(1)).abs()

    LOSS_REGISTRY.register(area)
    yield
    del LOSS_REGISTRY._obj_map["area"]


@pytest.mark.parametrize("part", PARTS)
def test_equals_the_whole_batch(tiny_cfg, make_input, double, same_points, area, part):
    """1 x 8 = 2 x 4 = 8 x 1; images of different sizes are padded alike."""
    tiny_cfg.merge_from_list(list(PARTS[part]))
    torch.manual_seed(0)
    model = build_model(tiny_cfg).double()
    inputs = [make_input(*size, labels, seed=i) for i, (size, labels) in enumerate(IMAGES)]
    losses, gradients = backward(model, inputs, 1)
    assert all(loss.isfinite() for loss in losses.values())
    for num_steps in (2, 8):
        actual_losses, actual_gradients = backward(model, inputs, num_steps)
        assert_same(actual_losses, losses)
        assert_same(actual_gradients, gradients)
    # Later batches are whole again.
    again, _ = backward(model, inputs, 1)
    assert again == losses


@pytest.mark.parametrize("part", ["points", "points, as written", "whole masks", "MaskFormer"])
def test_pixels_without_a_label(tiny_cfg, make_input, double, same_points, part):
    """1 x 4 = 2 x 2 = 4 x 1 with INPUT.IGNORE_UNLABELLED; some, no and all pixels are left out."""
    tiny_cfg.merge_from_list(list(PARTS[part]))
    torch.manual_seed(0)
    model = build_model(tiny_cfg).double()
    inputs = [make_input(*size, labels, seed=i) for i, (size, labels) in enumerate(IMAGES[:4])]
    plain, _ = backward(model, inputs, 1)
    for sample, share in zip(inputs, (0.5, 0.2, 0.0, 1.0), strict=True):
        height, width = sample["image"].shape[-2:]
        sample["ignored"] = torch.zeros(height, width, dtype=torch.bool)
        sample["ignored"][: round(share * height)] = True
    losses, gradients = backward(model, inputs, 1)
    assert all(loss.isfinite() for loss in losses.values())
    assert (losses["loss_mask"] - plain["loss_mask"]).abs() > 1e-3 * plain["loss_mask"]
    for num_steps in (2, 4):
        actual_losses, actual_gradients = backward(model, inputs, num_steps)
        assert_same(actual_losses, losses)
        assert_same(actual_gradients, gradients)


def test_naive_accumulation_differs(tiny_cfg, make_input, double, same_points):
    """Otherwise the test above could pass with losses that depend on nothing."""
    torch.manual_seed(0)
    model = build_model(tiny_cfg).double()
    inputs = [make_input(*size, labels, seed=i) for i, (size, labels) in enumerate(IMAGES)]
    expected, _ = backward(model, inputs, 1)
    losses = [backward(model, half, 1)[0] for half in (inputs[:4], inputs[4:])]
    for name in ("loss_ce", "loss_mask", "loss_dice"):
        naive = sum(x[name] for x in losses) / 2
        assert (naive - expected[name]).abs() > 1e-3 * expected[name]


def test_batch_without_targets(tiny_cfg, make_input, double, same_points, mode):
    torch.manual_seed(0)
    model = mode(build_model(tiny_cfg)).double()
    inputs = [make_input(*size, [], seed=i) for i, (size, _) in enumerate(IMAGES[:2])]
    losses, _ = backward(model, inputs, 1)
    actual, _ = backward(model, inputs, 2)
    assert_same(actual, losses)
    assert losses["loss_mask"] == 0 < losses["loss_ce"]


def test_class_loss_by_hand(mode):
    """Two images, two queries, logits 0: every query has ln 4, the mean is ln 4 as well.

    The first image has one target, weights 1 + 0.1 of 1 + 0.1 + 0.1 + 0.1; the second has none.
    """
    criterion = mode(make_criterion(FixedMatcher(([0], [0]))))
    logits, masks = leaves(queries=2, batch=1)
    with torch.no_grad():
        logits[0].zero_()
    targets = random_targets([1], [])
    with criterion.accumulating(targets):
        first = criterion(as_outputs(logits, masks), targets[:1])["loss_ce"]
        criterion.matcher = FixedMatcher(([], []))
        second = criterion(as_outputs(logits, masks), targets[1:])["loss_ce"]
    assert first.item() == pytest.approx(torch.tensor(4.0).log().item() * 1.1 / 1.3)
    assert second.item() == pytest.approx(torch.tensor(4.0).log().item() * 0.2 / 1.3)


def test_own_number_of_masks(mode):
    """A subclass may count masks in its own way, once per batch."""
    calls = []

    class Doubled(SetCriterion):
        def average_num_masks(self, targets, device):
            calls.append(len(targets))
            return 2 * super().average_num_masks(targets, device)

    check_accumulation(2, MaskFormer, Doubled)
    targets = random_targets([1, 0], [2])
    logits, masks = leaves()
    criteria = [
        mode(make_criterion(cls=cls, importance_sample_ratio=0.0))
        for cls in (Doubled, SetCriterion)
    ]
    losses = []
    for criterion in criteria:
        with criterion.accumulating(targets):
            parts = []
            for i in range(2):
                torch.manual_seed(i)
                outputs = as_outputs([x[i : i + 1] for x in logits], [x[i : i + 1] for x in masks])
                parts.append(criterion(outputs, targets[i : i + 1])["loss_dice"])
            losses.append(sum(parts).item())
    assert calls == [2]
    assert losses[0] == pytest.approx(losses[1] / 2, rel=1e-5)


def test_matcher_with_other_numbers(mode):
    """Such as one that matches a target to several queries."""
    criterion = mode(make_criterion(FixedMatcher(([0, 1], [0, 0]), ([], []))))
    logits, masks = leaves()
    targets = random_targets([1], [])
    criterion(as_outputs(logits, masks), targets)
    with (
        pytest.raises(ValueError, match="1 targets and 6 queries it assigned 2, not 1: set it to"),
        criterion.accumulating(targets),
    ):
        criterion(as_outputs(logits, masks), targets)
    assert criterion._whole_batch is None


def test_model_that_changes_targets(tiny_cfg, make_input):
    """`prepare_targets` of a subclass may not add targets unnoticed."""

    class Copying(MaskFormer):
        def prepare_targets(self, targets, images):
            prepared = super().prepare_targets(targets, images)
            return [{k: torch.cat((v, v)) for k, v in x.items()} for x in prepared]

    model = Copying(**MaskFormer.from_config(tiny_cfg))
    inputs = [make_input(32, 64, [0]), make_input(32, 64, [1, 2])]
    check_accumulation(2, Copying, SetCriterion)
    with pytest.raises(ValueError, match=r"\[2, 4\] targets, but the batch has \[1, 2\]"):
        backward(model, inputs, 2)
    assert model._padded_size is None


def test_input_without_targets(tiny_cfg, make_input):
    model = build_model(tiny_cfg)
    inputs = [make_input(32, 64, [0]), {"image": torch.zeros(3, 32, 64), "file_name": "a.png"}]
    with pytest.raises(ValueError, match="'a.png' has no 'instances'"):
        backward(model, inputs, 2)


class _OwnLabels(SetCriterion):
    def loss_labels(self, outputs, targets, indices, num_masks):
        return {"loss_ce": outputs["pred_logits"].mean()}


class _OwnForward(MaskFormer):
    def forward(self, batched_inputs):
        return super().forward(batched_inputs)


class _Declared(_OwnForward):
    accumulating = MaskFormer.accumulating


class _OnWholeMasks(FullMaskCriterion):
    def loss_masks(self, outputs, targets, indices, num_masks):
        return {}


@pytest.mark.parametrize(
    ("model", "criterion", "reason"),
    [
        (nn.Linear, None, "Linear has no method `accumulating`"),
        (_OwnForward, SetCriterion, "_OwnForward.forward replaces what `MaskFormer.accumulating`"),
        (MaskFormer, nn.CrossEntropyLoss, "CrossEntropyLoss has no method `accumulating`"),
        (
            MaskFormer,
            _OwnLabels,
            "_OwnLabels.loss_labels replaces what `SetCriterion.accumulating`",
        ),
        (MaskFormer, _OnWholeMasks, "_OnWholeMasks.loss_masks replaces what `FullMaskCriterion.a"),
    ],
)
def test_parts_whose_losses_may_not_add_up(model, criterion, reason):
    check_accumulation(1, model, criterion)
    with pytest.raises(ValueError, match=f"NUM_ACCUMULATION_STEPS is 4, but {reason}"):
        check_accumulation(4, model, criterion)


def test_parts_whose_losses_add_up():
    for _, criterion in CRITERION_REGISTRY:
        check_accumulation(4, MaskFormer, criterion)
        check_accumulation(4, _Declared, criterion)


def test_batch_statistics(caplog):
    norms = nn.ModuleList([nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.SyncBatchNorm(2)])
    norms += [nn.BatchNorm2d(2).eval()]
    with caplog.at_level(logging.WARNING):
        warn_of_batch_statistics(norms, 2)
        assert "statistics of 2 image(s) at a time" in caplog.text and ": 0, 2. Fro" in caplog.text
        caplog.clear()
        warn_of_batch_statistics(nn.Sequential(*[nn.BatchNorm1d(1) for _ in range(7)]), 1)
        assert "0, 1, 2, 3, 4 and 2 more." in caplog.text
        caplog.clear()
        warn_of_batch_statistics(norms[1], 2)
    assert not caplog.text
