"""Matchers and criteria on whole masks: numbers by hand, the definition, edges, the whole model.

Shape letters: Q queries, T targets, N masks, H W pixels.
"""

import itertools
import logging
import math
from pathlib import Path

import pytest
import torch
from criterion_parts import NAMES, FixedMatcher, as_outputs, leaves, make_criterion, target
from detectron2.modeling import build_model
from small_parts import random_targets
from torch import nn

from mask2former.config import check_config, load_config
from mask2former.config_checks import check_set_keys
from mask2former.config_parts import FULL_MASK_CRITERIA, FULL_MASK_MATCHERS
from mask2former.config_schema import unread_keys
from mask2former.modeling import full_mask_losses, matcher
from mask2former.modeling.criterion import CRITERION_REGISTRY, LOSS_REGISTRY
from mask2former.modeling.full_mask_losses import (
    FullMaskCriterion,
    FullMaskMatcher,
    MaskFormerCriterion,
    MaskFormerMatcher,
)
from mask2former.modeling.mask_losses import (
    batch_sigmoid_focal_loss,
    dice_loss,
    sigmoid_ce_loss,
    sigmoid_focal_losses,
)
from mask2former.modeling.matcher import MATCHER_REGISTRY, HungarianMatcher

LN2, LN3 = math.log(2), math.log(3)
# Focal loss of a pixel: probability 1/2 of foreground and of background, 3/4 and 1/4 of foreground.
FG_HALF, BG_HALF = 0.25 * 0.25 * LN2, 0.75 * 0.25 * LN2
FG_HIGH, FG_LOW = 0.25 * (1 / 16) * (2 * LN2 - LN3), 0.25 * (9 / 16) * 2 * LN2
POINT_KEYS = {
    f"MODEL.MASK_FORMER.{name}"
    for name in ("TRAIN_NUM_POINTS", "OVERSAMPLE_RATIO", "IMPORTANCE_SAMPLE_RATIO")
}
# Rows of Table 5: file → matcher and criterion.
TABLE_5 = {
    "match_masks_loss_masks": ("FullMaskMatcher", "FullMaskCriterion"),
    "match_masks_loss_points": ("FullMaskMatcher", "SetCriterion"),
    "match_points_loss_masks": ("HungarianMatcher", "FullMaskCriterion"),
    "match_points_loss_points": ("HungarianMatcher", "SetCriterion"),
}
CONFIGS = Path(__file__).parents[2] / "configs"
ONE, FULL, EMPTY = [[0, 1], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]


@pytest.fixture(params=[FullMaskCriterion, MaskFormerCriterion])
def criterion_class(request):
    return request.param


@pytest.fixture(params=[FullMaskMatcher, MaskFormerMatcher])
def matcher_class(request):
    return request.param


@pytest.fixture
def no_random_numbers(monkeypatch):
    for name in ("rand", "randn", "randint"):
        monkeypatch.delattr(torch, name)


@pytest.fixture
def costs(monkeypatch):
    """A list that fills with the cost matrices (Q, T) that are solved."""
    seen, solve = [], matcher.linear_sum_assignment
    monkeypatch.setattr(
        matcher, "linear_sum_assignment", lambda cost: seen.append(cost.clone()) or solve(cost)
    )
    return seen


def focal_by_definition(logits, targets):
    """Focal loss of every pixel, in the words of its paper: -alpha_t (1 - p_t)^gamma ln p_t."""
    p = logits.sigmoid()
    p_t = torch.where(targets > 0, p, 1 - p)
    alpha_t = torch.where(targets > 0, 0.25, 0.75)
    return -alpha_t * (1 - p_t) ** 2 * p_t.log()


# ---- focal loss ----


def test_focal_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [LN3, -LN3]])
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([(FG_HALF + BG_HALF) / 2, (FG_HIGH + FG_LOW) / 2])
    torch.testing.assert_close(sigmoid_focal_losses(logits, labels), expected)


def test_pairwise_focal_loss_equals_that_of_each_pair():
    generator = torch.Generator().manual_seed(0)
    pred = torch.randn(2, 4, 30, generator=generator)
    gt = (torch.rand(2, 3, 30, generator=generator) > 0.5).float()
    pairs = batch_sigmoid_focal_loss(pred, gt)
    assert pairs.shape == (2, 4, 3)
    for b, q, t in itertools.product(range(2), range(4), range(3)):
        expected = focal_by_definition(pred[b, q], gt[b, t]).mean()
        torch.testing.assert_close(pairs[b, q, t], expected)
        alone = sigmoid_focal_losses(pred[b, q : q + 1], gt[b, t : t + 1])
        torch.testing.assert_close(alone[0], expected)
    assert batch_sigmoid_focal_loss(pred, gt[:, :0]).shape == (2, 4, 0)


def test_focal_loss_of_extreme_logits_is_finite():
    logits = torch.tensor([[-500.0, 500.0, -500.0, 500.0]], requires_grad=True)
    labels = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    losses = sigmoid_focal_losses(logits, labels)
    assert losses.item() == pytest.approx((0.25 + 0.75) * 500 / 4)
    losses.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0, 0, -0.25, 0.75]]) / 4)
    pairs = batch_sigmoid_focal_loss(logits.detach(), labels)
    assert pairs.item() == pytest.approx(losses.item())


# ---- criteria ----


@pytest.mark.usefixtures("no_random_numbers")
def test_mask_losses_by_hand(criterion_class):
    # Image 0: query 2 predicts 1/2 everywhere, its target 1 has one pixel. Image 1: query 0
    # predicts 3/4 everywhere, its target is full. Three targets in all.
    masks = torch.tensor([[9.0, 9.0, 0.0], [LN3, 9.0, 9.0]])[..., None, None].expand(2, 3, 2, 2)
    outputs = {"pred_logits": torch.zeros(2, 3, 4), "pred_masks": masks}
    targets = [target([0, 1], FULL, ONE), target([2], FULL)]
    matched = FixedMatcher(([2], [1]), ([0], [0]))
    losses = make_criterion(matched, cls=criterion_class, losses=["masks"])(outputs, targets)
    assert list(losses) == ["loss_mask", "loss_dice"]
    mask = {
        FullMaskCriterion: LN2 + 2 * LN2 - LN3,
        MaskFormerCriterion: (FG_HALF + 3 * BG_HALF) / 4 + FG_HIGH,
    }
    assert losses["loss_mask"].item() == pytest.approx(mask[criterion_class] / 3)
    # 1 - (2·0.5 + 1) / (2 + 1 + 1) = 1/2 and 1 - (2·3 + 1) / (3 + 4 + 1) = 1/8.
    assert losses["loss_dice"].item() == pytest.approx((1 / 2 + 1 / 8) / 3)


def test_predictions_are_resized_to_the_targets():
    # Bilinear: the row 0, 4 becomes 0, 1, 3, 4.
    outputs = {
        "pred_logits": torch.zeros(1, 1, 4),
        "pred_masks": torch.tensor([[0.0, 4.0], [0.0, 4.0]])[None, None],
    }
    masks = torch.tensor([[0, 0, 1, 1]]).expand(1, 3, 4).bool()
    matched = FixedMatcher(([0], [0]))
    criterion = make_criterion(matched, cls=FullMaskCriterion, losses=["masks"])
    losses = criterion(outputs, [{"labels": torch.tensor([0]), "masks": masks}])
    softplus = [math.log1p(math.exp(x)) for x in (0, 1, -3, -4)]
    assert losses["loss_mask"].item() == pytest.approx(sum(softplus) / 4)


def test_losses_equal_the_definition(criterion_class):
    logits, masks = leaves()
    targets = random_targets([0, 2], [1])
    matched = FixedMatcher(([3, 1], [1, 0]), ([2], [0]))
    losses = make_criterion(matched, cls=criterion_class)(as_outputs(logits, masks), targets)
    pred = torch.stack([masks[0][0, 3], masks[0][0, 1], masks[0][1, 2]])[:, None]
    pred = nn.functional.interpolate(pred, (32, 48), mode="bilinear").flatten(1)
    gt = torch.stack([targets[0]["masks"][1], targets[0]["masks"][0], targets[1]["masks"][0]])
    gt = gt.flatten(1).float()
    is_focal = criterion_class is MaskFormerCriterion
    mask = (
        focal_by_definition(pred, gt).mean(1).sum() / 3
        if is_focal
        else sigmoid_ce_loss(pred, gt, 3)
    )
    torch.testing.assert_close(losses["loss_mask"], mask)
    torch.testing.assert_close(losses["loss_dice"], dice_loss(pred, gt, 3))
    # Gradients flow to the matched queries only, and are those of the definition.
    ours = torch.autograd.grad(losses["loss_mask"] + losses["loss_dice"], masks[0])[0]
    expected = torch.autograd.grad(mask + dice_loss(pred, gt, 3), masks[0])[0]
    torch.testing.assert_close(ours, expected)
    assert ours.flatten(2).any(-1).nonzero().tolist() == [[0, 1], [0, 3], [1, 2]]


@pytest.mark.parametrize("pixels", [1, 2 * 32 * 48])
def test_chunks_do_not_change_the_losses(criterion_class, monkeypatch, pixels):
    outputs, targets = as_outputs(*leaves()), random_targets([0, 2, 1], [1, 0])
    criterion = make_criterion(
        FixedMatcher(([3, 1, 5], [1, 0, 2]), ([2, 4], [0, 1])), cls=criterion_class
    )
    expected = criterion(outputs, targets)
    monkeypatch.setattr(full_mask_losses, "_MAX_PIXELS", pixels)
    torch.testing.assert_close(criterion(outputs, targets), expected)


@pytest.mark.parametrize("labels", [([], []), ([], [1, 2])])
def test_images_without_targets(criterion_class, matcher_class, labels):
    logits, masks = leaves(layers=2)
    criterion = make_criterion(matcher_class(2.0, 5.0, 5.0), cls=criterion_class)
    losses = criterion(as_outputs(logits, masks), random_targets(*labels))
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    for layer in range(2):
        assert logits[layer].grad.any()
        # Zeros, not None: distributed training waits for the gradient of every parameter.
        assert masks[layer].grad is not None and not masks[layer].grad[0].any()
        assert masks[layer].grad[1].any() == bool(labels[1])
    if not labels[1]:
        assert losses["loss_mask"].item() == losses["loss_dice_0"].item() == 0


def test_masks_without_pixels(criterion_class, matcher_class):
    outputs = as_outputs(*leaves(batch=1))
    outputs["pred_masks"] = outputs["pred_masks"][..., :2, :2]
    criterion = make_criterion(matcher_class(2.0, 5.0, 5.0), cls=criterion_class)
    losses = criterion(outputs, [target([0, 1], EMPTY, EMPTY)])
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64]
)
def test_dtype_of_target_masks_does_not_matter(criterion_class, matcher_class, dtype):
    outputs, targets = as_outputs(*leaves()), random_targets([0, 2], [1])
    criterion = make_criterion(matcher_class(2.0, 5.0, 5.0), cls=criterion_class)
    expected = criterion(outputs, targets)
    losses = criterion(outputs, [t | {"masks": t["masks"].to(dtype)} for t in targets])
    for name in NAMES:
        assert losses[name].dtype == torch.float32 and torch.equal(losses[name], expected[name])


def test_targets_of_different_sizes_are_padded_to_the_largest(criterion_class):
    outputs = as_outputs(*leaves())
    targets = [random_targets([0, 2], size=(32, 24))[0], random_targets([1], size=(16, 48))[0]]
    padded = [
        t
        | {
            "masks": nn.functional.pad(
                t["masks"], (0, 48 - t["masks"].shape[2], 0, 32 - t["masks"].shape[1])
            )
        }
        for t in targets
    ]
    matched = FixedMatcher(([3, 1], [1, 0]), ([2], [0]))
    criterion = make_criterion(matched, cls=criterion_class)
    torch.testing.assert_close(criterion(outputs, targets), criterion(outputs, padded))


def test_losses_are_divided_by_the_average_over_workers(criterion_class, monkeypatch):
    outputs, targets = as_outputs(*leaves()), random_targets([0, 2], [1])
    criterion = make_criterion(FixedMatcher(([3, 1], [1, 0]), ([2], [0])), cls=criterion_class)
    alone = criterion(outputs, targets)
    monkeypatch.setattr(criterion, "average_num_masks", lambda targets, device: 6.0)
    both = criterion(outputs, targets)
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(both[name], alone[name] / 2)
    assert torch.equal(both["loss_ce"], alone["loss_ce"])


def test_additional_losses_get_points(criterion_class, monkeypatch):
    monkeypatch.setattr(LOSS_REGISTRY, "_obj_map", {})

    @LOSS_REGISTRY.register()
    def area(matched):
        assert matched.mask_logits.shape == (3, 8, 12)
        assert (
            matched.target_masks.shape == (3, 32, 48) and matched.target_masks.dtype == torch.float
        )
        assert matched.points.shape == (3, 20, 2)
        return (matched.point_logits.sigmoid() - matched.point_labels).abs().mean(1)

    criterion = make_criterion(
        FixedMatcher(([3, 1], [1, 0]), ([2], [0])),
        cls=criterion_class,
        losses=["labels", "masks", "area"],
    )
    losses = criterion(as_outputs(*leaves()), random_targets([0, 2], [1]))
    assert list(losses) == [*NAMES, "loss_area"]
    assert 0 < losses["loss_area"].item() < 1


# ---- matchers ----


@pytest.mark.usefixtures("no_random_numbers")
def test_costs_by_hand(matcher_class, costs):
    # Query 0 predicts 1/2 everywhere and query 1 predicts 3/4; one target has no pixel, one all.
    probabilities = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    masks = torch.tensor([0.0, LN3]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    outputs = {"pred_logits": probabilities.log()[None], "pred_masks": masks}
    matcher_class(2.0, 3.0, 5.0)(outputs, [target([0, 0], EMPTY, FULL)])
    mask = {
        FullMaskMatcher: [[LN2, LN2], [2 * LN2, 2 * LN2 - LN3]],
        # Background with probability 3/4 of foreground: 0.75 (3/4)² ln 4.
        MaskFormerMatcher: [[BG_HALF, FG_HALF], [0.75 * (9 / 16) * 2 * LN2, FG_HIGH]],
    }
    # Dice over 4 pixels: empty 1 - 1 / (2 + 1), 1 - 1 / (3 + 1);
    # full 1 - (4 + 1) / (2 + 4 + 1), 1 - (6 + 1) / (3 + 4 + 1).
    dice = torch.tensor([[2 / 3, 2 / 7], [3 / 4, 1 / 8]])
    expected = 2 * torch.tensor([[-0.25, -0.25], [-0.5, -0.5]]) + 5 * dice
    torch.testing.assert_close(costs[0], expected + 3 * torch.tensor(mask[matcher_class]))


def test_targets_are_resized_to_the_predictions(costs):
    # Nearest pixel: columns 0 and 2 of four, rows 0 and 1 of three.
    outputs = {"pred_logits": torch.zeros(1, 1, 4), "pred_masks": torch.full((1, 1, 2, 2), LN3)}
    masks = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]])[None].bool()
    FullMaskMatcher(0, 1, 0)(outputs, [{"labels": torch.tensor([0]), "masks": masks}])
    # One pixel of foreground with ln 4 - ln 3, three of background with ln 4.
    assert costs[0].item() == pytest.approx(2 * LN2 - LN3 / 4)


def test_perfect_predictions_match_their_targets(matcher_class):
    targets = random_targets([0, 2, 1], [1, 0], size=(8, 12))
    order = [[4, 0, 2], [1, 3]]
    masks = torch.full((2, 5, 8, 12), -9.0)
    for image, queries in enumerate(order):
        masks[image, queries] = targets[image]["masks"] * 18.0 - 9
    outputs = {"pred_logits": torch.zeros(2, 5, 4), "pred_masks": masks}
    for weights in ((0, 1, 0), (0, 0, 1), (1, 20, 1)):
        indices = matcher_class(*weights)(outputs, targets)
        for queries, (i, j) in zip(order, indices, strict=True):
            assert i.dtype == j.dtype == torch.int64 and i.tolist() == sorted(queries)
            assert [queries[k] for k in j] == i.tolist()


def test_costs_are_float32_under_autocast(matcher_class, costs):
    outputs, targets = as_outputs(*leaves(batch=1)), random_targets([0, 2])
    matcher_class(1, 20, 1)(outputs, targets)
    with torch.autocast("cpu", torch.bfloat16):
        matcher_class(1, 20, 1)(outputs, targets)
    assert costs[1].dtype == torch.float32 and torch.equal(*costs)


def test_non_finite_masks_raise(matcher_class):
    outputs = as_outputs(*leaves())
    outputs["pred_masks"] = torch.full_like(outputs["pred_masks"], math.nan)
    with pytest.raises(ValueError, match="image 0 of the batch are not finite"):
        matcher_class()(outputs, random_targets([0], [1]))


def test_repr_leaves_points_out():
    expected = "Matcher FullMaskMatcher\n  cost_class: 2\n  cost_mask: 5\n  cost_dice: 4"
    assert FullMaskMatcher(2, 5, 4, num_points=7).__repr__(_repr_indent=2) == expected


# ---- whole model ----


def train(cfg, inputs, steps=1):
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    results = []
    for _ in range(steps):
        losses = model(inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        results.append(losses)
    return model, results


@pytest.fixture
def inputs(make_input):
    return [make_input(64, 96, [0, 2]), make_input(50, 70, [1], seed=1)]


def choose(cfg, matcher_name, criterion_name):
    cfg.MODEL.MASK_FORMER.MATCHER_NAME = matcher_name
    cfg.MODEL.MASK_FORMER.CRITERION_NAME = criterion_name


@pytest.mark.parametrize(
    ("matcher_name", "criterion_name"),
    [*TABLE_5.values(), ("MaskFormerMatcher", "MaskFormerCriterion")],
)
def test_combination_trains(tiny_cfg, inputs, matcher_name, criterion_name):
    choose(tiny_cfg, matcher_name, criterion_name)
    tiny_cfg.MODEL.MASK_FORMER.DEC_LAYERS = 3
    check_config(tiny_cfg)
    model, (first, second) = train(tiny_cfg, inputs, steps=2)
    assert type(model.criterion) is CRITERION_REGISTRY.get(criterion_name)
    assert type(model.criterion.matcher) is MATCHER_REGISTRY.get(matcher_name)
    assert list(first) == [n + suffix for suffix in ("", "_0", "_1") for n in NAMES]
    assert all(torch.isfinite(loss) and loss > 0 for loss in second.values())
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("prefix", ["FullMask", "MaskFormer"])
def test_losses_do_not_depend_on_the_fast_parts(tiny_cfg, inputs, prefix):
    choose(tiny_cfg, f"{prefix}Matcher", f"{prefix}Criterion")
    results = []
    for fast in (False, True):
        tiny_cfg.MODEL.FAST = fast
        results.append(train(tiny_cfg, inputs)[1][0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_replaced_mask_costs_run(monkeypatch):
    """Of `HungarianMatcher`, whose fast twin does not call the method."""
    built = HungarianMatcher(num_points=9)
    zeros = torch.zeros(6, 2)
    monkeypatch.setattr(built, "mask_costs", lambda masks, gt: (zeros, zeros - torch.eye(6)[:, :2]))
    outputs = {"pred_logits": torch.zeros(1, 6, 4), "pred_masks": torch.zeros(1, 6, 8, 12)}
    [(queries, targets)] = built(outputs, random_targets([0, 0]))
    assert (queries.tolist(), targets.tolist()) == ([0, 1], [0, 1])


# ---- config ----


@pytest.mark.parametrize("matcher_name", ["HungarianMatcher", *FULL_MASK_MATCHERS])
@pytest.mark.parametrize("criterion_name", ["SetCriterion", *FULL_MASK_CRITERIA])
def test_unread_keys(tiny_cfg, matcher_name, criterion_name):
    choose(tiny_cfg, matcher_name, criterion_name)
    unread = set() if criterion_name == "SetCriterion" else set(POINT_KEYS)
    if matcher_name == "HungarianMatcher":
        unread -= {"MODEL.MASK_FORMER.TRAIN_NUM_POINTS"}
    assert unread_keys(tiny_cfg) & POINT_KEYS == unread
    tiny_cfg.MODEL.MASK_FORMER.EXTRA_LOSSES = [["area", 1.0]]
    assert unread_keys(tiny_cfg) & POINT_KEYS == set()


def test_set_key_that_is_not_read_is_reported(tiny_cfg, caplog):
    choose(tiny_cfg, "FullMaskMatcher", "FullMaskCriterion")
    with caplog.at_level(logging.WARNING):
        check_set_keys(tiny_cfg, POINT_KEYS)
    assert "MODEL.MASK_FORMER.TRAIN_NUM_POINTS 64" in caplog.text


@pytest.mark.parametrize("row", TABLE_5)
def test_rows_of_table_5_differ_in_the_parts_only(row):
    cfg = load_config(str(CONFIGS / f"ablations/table5/{row}.yaml"))
    model = cfg.MODEL.MASK_FORMER
    assert (model.MATCHER_NAME, model.CRITERION_NAME) == TABLE_5[row]
    choose(cfg, "HungarianMatcher", "SetCriterion")
    base = CONFIGS / "coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml"
    assert cfg == load_config(str(base))
