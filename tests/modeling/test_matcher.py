"""Mask losses against their closed formulas, and the matcher on costs computed by hand.

Shape letters: B batch, Q queries, K classes, T targets, P points, N masks.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from mask2former.modeling import criterion, matcher
from mask2former.modeling.mask_losses import (
    batch_dice_loss,
    batch_sigmoid_ce_loss,
    calculate_uncertainty,
    dice_loss,
    sigmoid_ce_loss,
)
from mask2former.modeling.matcher import HungarianMatcher

LN2, LN3 = math.log(2), math.log(3)
# Probabilities 1/2, 3/4 and 1/4 have the logits 0, ln 3 and -ln 3.
LOGITS = torch.tensor([[0.0, 0.0], [LN3, -LN3]])
LABELS = torch.tensor([[1.0, 0.0], [1.0, 1.0]])


def test_dice_by_hand():
    # First mask: 1 - (2·0.5 + 1) / (1 + 1 + 1) = 1/3. Second: 1 - (2·1 + 1) / (1 + 2 + 1) = 1/4.
    assert dice_loss(LOGITS, LABELS, 1).item() == pytest.approx(7 / 12)
    assert dice_loss(LOGITS, LABELS, 4.0).item() == pytest.approx(7 / 48)


def test_dice_of_empty_masks_is_zero():
    assert dice_loss(torch.full((1, 9), -100.0), torch.zeros(1, 9), 1).item() == 0


def test_binary_cross_entropy_by_hand():
    # First mask: ln 2. Second: mean of -ln(3/4) and -ln(1/4), (ln 4 - ln 3 + ln 4) / 2.
    expected = LN2 + (4 * LN2 - LN3) / 2
    assert sigmoid_ce_loss(LOGITS, LABELS, 1).item() == pytest.approx(expected)
    assert sigmoid_ce_loss(LOGITS, LABELS, 3).item() == pytest.approx(expected / 3)


def test_pairwise_by_hand():
    # Prediction 0 (all 1/2) with label (1, 1): 1 - (2·1 + 1) / (1 + 2 + 1) = 1/4; prediction 1
    # (3/4, 1/4) with (1, 0): 1 - (2·3/4 + 1) / (1 + 1 + 1) = 1/6.
    expected = torch.tensor([[1 / 3, 1 / 4], [1 / 6, 1 / 4]])
    torch.testing.assert_close(batch_dice_loss(LOGITS, LABELS), expected)
    # Prediction 1 with (1, 0): -ln(3/4) twice.
    expected = torch.tensor([[LN2, LN2], [2 * LN2 - LN3, (4 * LN2 - LN3) / 2]])
    torch.testing.assert_close(batch_sigmoid_ce_loss(LOGITS, LABELS), expected)


def test_pairwise_diagonal_is_matched():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 30, generator=generator) * 20  # also far from zero
    labels = torch.rand(5, 30, generator=generator)  # sampled labels lie between 0 and 1
    for pairwise, matched in (
        (batch_dice_loss, dice_loss),
        (batch_sigmoid_ce_loss, sigmoid_ce_loss),
    ):
        total = pairwise(logits, labels).diagonal().sum()
        torch.testing.assert_close(total, matched(logits, labels, 1.0))


def test_losses_of_no_masks():
    empty = torch.zeros(0, 4, requires_grad=True)
    for loss in (dice_loss, sigmoid_ce_loss):
        value = loss(empty, torch.zeros(0, 4), 1.0)
        assert value.item() == 0 and value.requires_grad
    for pairwise in (batch_dice_loss, batch_sigmoid_ce_loss):
        assert pairwise(torch.zeros(3, 4), torch.zeros(0, 4)).shape == (3, 0)


def test_uncertainty():
    logits = torch.tensor([[[-3.0, 0.0, 2.0]]])
    assert calculate_uncertainty(logits).tolist() == [[[-3.0, 0.0, -2.0]]]
    with pytest.raises(ValueError, match=r"class-agnostic logits \(N, 1, P\), got \(2, 3, 4\)"):
        calculate_uncertainty(torch.zeros(2, 3, 4))


def test_original_names():
    assert matcher.batch_dice_loss_jit(LOGITS, LABELS).shape == (2, 2)
    assert matcher.batch_sigmoid_ce_loss_jit(LOGITS, LABELS).shape == (2, 2)
    assert criterion.dice_loss_jit(LOGITS, LABELS, 1.0).dim() == 0
    assert criterion.sigmoid_ce_loss_jit(LOGITS, LABELS, 1.0).dim() == 0
    assert criterion.calculate_uncertainty is calculate_uncertainty


def random_outputs(batch=2, queries=5, classes=3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pred_logits": torch.randn(batch, queries, classes + 1, generator=generator),
        "pred_masks": torch.randn(batch, queries, 8, 10, generator=generator) * 3,
    }


@pytest.fixture
def build_matcher(mode):
    """Constructor of a matcher that runs plain or fast."""
    return lambda *args, **kwargs: mode(HungarianMatcher(*args, **kwargs))


@pytest.fixture
def costs(monkeypatch) -> list[Tensor]:
    """A list that fills with the cost (Q, T) of every image that is matched."""
    seen = []
    solve = matcher.linear_sum_assignment
    monkeypatch.setattr(
        matcher, "linear_sum_assignment", lambda cost: seen.append(cost.clone()) or solve(cost)
    )
    return seen


def random_target(labels: list[int], height: int, width: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(len(labels), height, width, generator=generator) > 0.5
    return {"labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}


def test_class_cost_by_hand(build_matcher):
    # Query 0 suits target 0 best (0.6), but then target 1 gets at most 0.2, in sum 0.8; the best
    # sum is 0.5 + 0.35.
    probabilities = torch.tensor([[0.6, 0.35, 0.05], [0.5, 0.1, 0.4], [0.2, 0.2, 0.6]])
    outputs = {"pred_logits": probabilities.log()[None], "pred_masks": torch.zeros(1, 3, 4, 4)}
    target = {"labels": torch.tensor([0, 1]), "masks": torch.ones(2, 4, 4, dtype=torch.bool)}
    [(queries, targets)] = build_matcher(1, 0, 0, num_points=3)(outputs, [target])
    assert queries.tolist() == [0, 1]
    assert targets.tolist() == [1, 0]
    assert queries.dtype == targets.dtype == torch.int64
    # Swapped labels swap the targets.
    target["labels"] = torch.tensor([1, 0])
    [(queries, targets)] = build_matcher(1, 0, 0, num_points=3)(outputs, [target])
    assert (queries.tolist(), targets.tolist()) == ([0, 1], [0, 1])


def test_costs_are_weighted_and_summed(build_matcher, costs, monkeypatch):
    # All points in the middle of the map. Query 0 has probability 1/2 there, query 1 has 3/4.
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, 0.5))
    probabilities = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    masks = torch.tensor([0.0, LN3]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    outputs = {"pred_logits": probabilities.log()[None], "pred_masks": masks}
    target = {"labels": torch.tensor([0, 0]), "masks": torch.zeros(2, 4, 4)}
    target["masks"][1] = 1
    build_matcher(2.0, 3.0, 5.0, num_points=4)(outputs, [target])
    # Binary cross-entropy with background: ln 2 and -ln(1/4); with foreground: ln 2, -ln(3/4).
    mask = torch.tensor([[LN2, LN2], [2 * LN2, 2 * LN2 - LN3]])
    # Dice over 4 points: background 1 - 1 / (2 + 1), 1 - 1 / (3 + 1);
    # foreground 1 - (4 + 1) / (2 + 4 + 1), 1 - (6 + 1) / (3 + 4 + 1).
    dice = torch.tensor([[2 / 3, 2 / 7], [3 / 4, 1 / 8]])
    expected = 2 * torch.tensor([[-0.25, -0.25], [-0.5, -0.5]]) + 3 * mask + 5 * dice
    torch.testing.assert_close(costs[0], expected)


def test_masks_decide_between_equal_classes(build_matcher):
    masks = torch.full((1, 3, 8, 8), -5.0)
    masks[0, 2, :, :4] = 5  # the left half
    masks[0, 0, :, 4:] = 5  # the right half
    outputs = {"pred_logits": torch.zeros(1, 3, 2), "pred_masks": masks}
    left = torch.arange(8).expand(8, 8) < 4
    target = {"labels": torch.tensor([0, 0]), "masks": torch.stack([left, ~left])}
    for weights in ((0, 1, 0), (0, 0, 1), (2, 5, 5)):
        [(queries, targets)] = build_matcher(*weights, num_points=100)(outputs, [target])
        assert (queries.tolist(), targets.tolist()) == ([0, 2], [1, 0])


def test_every_image_has_its_own_points(build_matcher):
    """On a CPU the numbers are those of one draw per image, also for images without targets."""
    targets = [random_target([0, 1], 8, 10), random_target([], 8, 10), random_target([2], 16, 20)]
    torch.manual_seed(7)
    build_matcher(num_points=6)(random_outputs(batch=3), targets)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    for _ in range(3):
        torch.rand(1, 6, 2)
    assert torch.equal(state, torch.get_rng_state())


def test_costs_equal_the_definition(build_matcher, costs):
    """Masks sampled at the drawn points, and compared point by point."""
    outputs, target = random_outputs(batch=1), random_target([2, 0, 1], 32, 40)
    torch.manual_seed(0)
    build_matcher(2.0, 3.0, 5.0, num_points=50)(outputs, [target])
    torch.manual_seed(0)
    grid = torch.rand(1, 50, 2)[:, None] * 2 - 1
    pred, gt = (
        nn.functional.grid_sample(x, grid, align_corners=False)[0, :, 0]
        for x in (outputs["pred_masks"], target["masks"][None].float())
    )
    pairs = pred[:, None].expand(-1, 3, -1), gt[None].expand(5, -1, -1)
    mask = nn.functional.binary_cross_entropy_with_logits(*pairs, reduction="none").mean(-1)
    p, t = pairs[0].sigmoid(), pairs[1]
    dice = 1 - (2 * (p * t).sum(-1) + 1) / (p.sum(-1) + t.sum(-1) + 1)
    class_probs = outputs["pred_logits"][0].softmax(-1)[:, target["labels"]]
    expected = 3 * mask - 2 * class_probs + 5 * dice
    torch.testing.assert_close(costs[0], expected, atol=1e-5, rtol=1e-5)


def test_image_without_targets(build_matcher):
    targets = [random_target([], 8, 10), random_target([1, 0], 8, 10)]
    indices = build_matcher(num_points=9)(random_outputs(), targets)
    assert [len(i) for i, _ in indices] == [0, 2]
    assert [len(j) for _, j in indices] == [0, 2]
    assert indices[0][0].dtype == indices[0][1].dtype == torch.int64


def test_more_targets_than_queries(build_matcher):
    [(queries, targets)] = build_matcher(num_points=9)(
        random_outputs(1, queries=2), [random_target([0, 1, 2, 0], 8, 10)]
    )
    assert queries.tolist() == [0, 1]
    assert len(set(targets.tolist())) == 2


def test_targets_may_have_other_sizes_than_predictions(build_matcher):
    masks = torch.full((2, 2, 4, 4), -5.0)
    masks[:, 1, :2] = 5  # query 1 sees the upper half
    masks[:, 0, 2:] = 5
    outputs = {"pred_logits": torch.zeros(2, 2, 2), "pred_masks": masks}
    targets = []
    for height, width in ((16, 12), (6, 30)):
        upper = torch.arange(height)[:, None].expand(height, width) < height // 2
        target_masks = torch.stack([upper, ~upper])
        targets.append({"labels": torch.tensor([0, 0]), "masks": target_masks})
    for queries, matched in build_matcher(num_points=50)(outputs, targets):
        assert (queries.tolist(), matched.tolist()) == ([0, 1], [1, 0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_dtype_of_target_masks_does_not_matter(build_matcher, dtype):
    target = random_target([0, 1, 2], 8, 10)
    torch.manual_seed(0)
    [(queries, expected)] = build_matcher(num_points=30)(random_outputs(1), [target])
    target["masks"] = target["masks"].to(dtype)
    torch.manual_seed(0)
    [(other_queries, targets)] = build_matcher(num_points=30)(random_outputs(1), [target])
    assert torch.equal(queries, other_queries) and torch.equal(targets, expected)


def test_result_carries_no_gradient(build_matcher):
    outputs = {k: v.requires_grad_() for k, v in random_outputs().items()}
    targets = [random_target([0], 8, 10), random_target([1], 8, 10)]
    for queries, matched in build_matcher(num_points=5)(outputs, targets):
        assert not queries.requires_grad and not matched.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["pred_logits", "pred_masks"])
def test_non_finite_outputs_raise(build_matcher, key, bad):
    outputs = random_outputs()
    outputs[key][1, 2] = bad
    targets = [random_target([0], 8, 10), random_target([1, 2], 8, 10)]
    with pytest.raises(ValueError, match="image 1 of the batch are not finite.*SOLVER.BASE_LR"):
        build_matcher(num_points=5)(outputs, targets)


def test_bad_arguments(build_matcher):
    with pytest.raises(ValueError, match="all matching costs are 0"):
        build_matcher(0, 0, 0, num_points=5)
    with pytest.raises(ValueError, match="num_points=0"):
        build_matcher()(random_outputs(), [random_target([0], 8, 10)] * 2)


def test_overridden_memory_efficient_forward_is_called():
    class Last(HungarianMatcher):
        """Gives the targets to the last queries."""

        def memory_efficient_forward(self, outputs, targets):
            last = outputs["pred_logits"].shape[1] - 1
            return [(last - torch.arange(len(t["labels"])), t["labels"]) for t in targets]

    [(queries, _)] = Last(num_points=3)(random_outputs(1), [random_target([0, 1], 8, 10)])
    assert queries.tolist() == [4, 3]


def test_repr_lists_settings_with_the_given_indent():
    expected = """Matcher HungarianMatcher
  cost_class: 2
  cost_mask: 5
  cost_dice: 4
  num_points: 7"""
    assert HungarianMatcher(2, 5, 4, num_points=7).__repr__(_repr_indent=2) == expected
