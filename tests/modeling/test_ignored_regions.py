"""Pixels without a label in matching and mask losses, with numbers worked by hand.

Shape letters: Q queries, T targets of an image, N matched masks, P points, H W pixels.
"""

import math

import pytest
import torch
from criterion_parts import FixedMatcher, as_outputs, leaves, make_criterion
from small_parts import random_targets

from mask2former.fast.point_sampling import sample_uncertain_points
from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.full_mask_losses import (
    FullMaskCriterion,
    FullMaskMatcher,
    MaskFormerCriterion,
    MaskFormerMatcher,
)
from mask2former.modeling.layers.point_sampling import hide_ignored, labelled_at
from mask2former.modeling.mask_losses import (
    batch_dice_loss,
    batch_sigmoid_ce_loss,
    batch_sigmoid_focal_loss,
    dice_losses,
    sigmoid_ce_losses,
    sigmoid_focal_losses,
)
from mask2former.modeling.matcher import HungarianMatcher
from mask2former.utils.twins import run_plain

# Centres of the four pixels of a 2x2 map, x and y: in row order.
CENTRES = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
# The upper right pixel has no label; the prediction is sure of it and would be wrong.
MASK = [[1, 0], [0, 1]]
LOGITS = [[0.0, 50.0], [0.0, 0.0]]
IGNORED = [[False, True], [False, False]]
MATCHERS = [HungarianMatcher, FullMaskMatcher, MaskFormerMatcher]
CRITERIA = [SetCriterion, FullMaskCriterion, MaskFormerCriterion]


@pytest.fixture
def at_centres(monkeypatch):
    """Points are the centres of the pixels of a 2x2 map."""

    def rand(*size, device=None):
        return CENTRES[: size[-2]].expand(size).contiguous()

    monkeypatch.setattr(torch, "rand", rand)


def target(masks=(MASK,), labels=(0,), ignored=IGNORED) -> dict:
    masks = torch.tensor(masks, dtype=torch.bool).view(len(labels), 2, 2)
    result = {"labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}
    return result if ignored is None else result | {"ignored": torch.tensor(ignored)}


def outputs(*logits) -> dict:
    masks = torch.tensor(logits)[None]
    return {"pred_logits": torch.zeros(1, len(logits), 4), "pred_masks": masks}


def criterion_of(cls, pairs=(([0], [0]),), **changes):
    points = {"num_points": 4, "oversample_ratio": 1.0, "importance_sample_ratio": 0.0}
    return make_criterion(FixedMatcher(*pairs), cls=cls, **points, **changes)


@pytest.mark.parametrize("cls", CRITERIA)
def test_losses_by_hand(cls, mode, at_centres):
    criterion = mode(criterion_of(cls))
    # Three pixels of probability one half: two of the mask, one of the background.
    losses = criterion(outputs(LOGITS), [target()])
    dice = 1 - (2 * (0.5 + 0.5) + 1) / (1.5 + 2 + 1)
    if cls is MaskFormerCriterion:
        mask = math.log(2) * 0.25 * (2 * 0.25 + 0.75) / 3
    else:
        mask = math.log(2)
    assert losses["loss_mask"].item() == pytest.approx(mask, rel=1e-6)
    assert losses["loss_dice"].item() == pytest.approx(dice, rel=1e-6)
    # As background, the upper right pixel is wrong.
    trained = criterion(outputs(LOGITS), [target(ignored=None)])
    assert trained["loss_mask"] > 10 * losses["loss_mask"]
    assert trained["loss_dice"].item() == pytest.approx(1 - 3 / (2.5 + 2 + 1), rel=1e-6)


@pytest.mark.parametrize("cls", CRITERIA)
def test_no_labelled_pixel(cls, mode, at_centres):
    criterion = mode(criterion_of(cls))
    predicted = outputs(LOGITS)
    predicted["pred_masks"].requires_grad_()
    everything = [[True, True], [True, True]]
    losses = criterion(predicted, [target(ignored=everything)])
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    (losses["loss_mask"] + losses["loss_dice"]).backward()
    assert torch.equal(predicted["pred_masks"].grad, torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("cls", CRITERIA)
def test_image_without_targets(cls, mode, at_centres):
    criterion = mode(criterion_of(cls, pairs=(([], []),)))
    losses = criterion(outputs(LOGITS), [target((), ())])
    assert losses["loss_mask"] == losses["loss_dice"] == 0


@pytest.mark.parametrize("cls", MATCHERS)
def test_matching_by_hand(cls, mode, at_centres):
    # Query 0 is right where there are labels, query 1 only where there is none.
    right, wrong = [[9.0, 9.0], [-9.0, 9.0]], [[-9.0, -9.0], [-9.0, 9.0]]
    better_as_background = [[9.0, -9.0], [-9.0, 1.0]]
    matcher = mode(cls(cost_class=0, cost_mask=1, cost_dice=1, num_points=4))
    for ignored, expected in ((IGNORED, 0), (None, 2)):
        predicted = outputs(right, wrong, better_as_background)
        ((queries, targets),) = matcher(predicted, [target(ignored=ignored)])
        assert (queries.tolist(), targets.tolist()) == ([expected], [0])


@pytest.mark.parametrize("cls", MATCHERS)
def test_matching_without_labelled_pixels_is_by_class(cls, mode, at_centres):
    matcher = mode(cls(cost_class=1, cost_mask=1, cost_dice=1, num_points=4))
    predicted = outputs(LOGITS, MASK)
    predicted["pred_logits"][0, 1, 0] = 5
    ((queries, _),) = matcher(predicted, [target(ignored=[[True] * 2] * 2)])
    assert queries.tolist() == [1]


@pytest.mark.parametrize("size", [(32, 48), (8, 12)])
def test_plain_equals_fast(size, same_points):
    """Several layers and images, one of them without targets, one without labelled pixels."""
    targets = random_targets([0, 2, 1], [], [1], [2, 2], size=size)
    generator = torch.Generator().manual_seed(4)
    for item in targets:
        # Rectangles, as regions without labels are connected.
        item["ignored"] = (
            (torch.rand(4, 4, generator=generator) > 0.6)
            .repeat_interleave(size[0] // 4, 0)
            .repeat_interleave(size[1] // 4, 1)
        )
    targets[3]["ignored"][:] = True
    results = []
    for mode in (run_plain, lambda module: module):
        logits, masks = leaves(layers=3, batch=4)
        losses = mode(make_criterion())(as_outputs(logits, masks), targets)
        sum(losses.values()).backward()
        results.append((losses, [x.grad for x in logits + masks]))
    (plain, plain_grads), (fast, fast_grads) = results
    assert plain.keys() == fast.keys()
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name])
    for actual, expected in zip(fast_grads, plain_grads, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("cls", CRITERIA)
def test_masks_at_ignored_pixels_do_not_matter(cls, mode):
    """Neither predictions nor targets; gradients there are zero."""
    ignored = torch.zeros(32, 48, dtype=torch.bool)
    ignored[8:24, 16:40] = True
    inside = torch.zeros(8, 12, dtype=torch.bool)
    inside[2:6, 4:10] = True  # of the predictions' resolution
    losses, grads = [], []
    for change in (False, True):
        targets = random_targets([0, 2, 1])
        targets[0]["ignored"] = ignored
        predicted = as_outputs(*(([x[:1].detach() for x in y]) for y in leaves()))
        if change:
            targets[0]["masks"] ^= ignored
            # Not at the border, which bilinear samples outside take in.
            predicted["pred_masks"][..., 3:5, 5:9] = 7.0
        predicted["pred_masks"].requires_grad_()
        matcher = {SetCriterion: HungarianMatcher}.get(cls, FullMaskMatcher)(1.0, 1.0, 1.0, 20)
        torch.manual_seed(0)
        losses.append(mode(make_criterion(matcher, cls=cls))(predicted, targets))
        sum(losses[-1].values()).backward()
        grads.append(predicted["pred_masks"].grad)
    for name in losses[0]:
        torch.testing.assert_close(losses[1][name], losses[0][name])
    for grad in grads:
        assert grad[..., 3:5, 5:9].count_nonzero() == 0 and grad[..., ~inside].count_nonzero() > 0


def test_uncertain_points_are_where_labels_are(monkeypatch, mode):
    """A prediction that is uncertain only in the ignored half; its points are in the other."""
    weights = []

    def labelled(*args):
        weights.append(labelled_at(*args))
        return weights[-1]

    for module in ("mask2former.modeling.criterion", "mask2former.fast.criterion"):
        monkeypatch.setattr(f"{module}.labelled_at", labelled)
    ignored = torch.zeros(32, 32, dtype=torch.bool)
    ignored[:, 16:] = True
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    item = {"labels": torch.tensor([0]), "masks": masks, "ignored": ignored}
    logits = torch.full((1, 1, 8, 8), 9.0)
    logits[..., 4:] = 0
    criterion = make_criterion(
        FixedMatcher(([0], [0])), num_points=400, importance_sample_ratio=1.0
    )
    mode(criterion)({"pred_logits": torch.zeros(1, 1, 4), "pred_masks": logits}, [item])
    # Some sample the border.
    assert weights[-1].mean() > 0.9


def test_sampled_points_leave_hidden_regions():
    ignored = torch.ones(8, 8, dtype=torch.bool)
    ignored[:4] = False
    seen = hide_ignored(torch.zeros(2, 1, 4, 4), ignored)
    assert (seen[:, :, :2] == 0).all() and (seen[:, :, 2:].abs() > 1e5).all()
    points = sample_uncertain_points(seen, 30, 3.0, 1.0)
    assert points[..., 1].max() < 0.5


def test_labelled_at():
    ignored = torch.tensor([[False, True, False, False]])
    y = torch.full((5,), 0.5)
    # Centres are at 0.125, 0.375, 0.625, 0.875; between two pixels, both count.
    points = torch.stack((torch.tensor([0.125, 0.2, 0.375, 0.5, 0.625]), y), 1)
    assert labelled_at(ignored, points).tolist() == [1, 0, 0, 0, 1]
    assert labelled_at(ignored, points[None, None]).shape == (1, 1, 5)
    assert labelled_at(ignored, points.double()).dtype == torch.float64


def test_targets_of_different_sizes(mode, same_points):
    """Padded to the largest; the padding has no label."""
    small, large = random_targets([0], size=(16, 24)) + random_targets([1], size=(32, 48))
    padded = {
        "labels": small["labels"],
        "masks": torch.nn.functional.pad(small["masks"], (0, 24, 0, 16)),
        "ignored": torch.ones(32, 48, dtype=torch.bool),
    }
    padded["ignored"][:16, :24] = False
    for item in (small, large):
        item["ignored"] = torch.zeros(item["masks"].shape[1:], dtype=torch.bool)
    pairs = FixedMatcher(([0], [0]), ([3], [0]))
    for cls in CRITERIA:
        criterion = mode(make_criterion(pairs, cls=cls))
        losses = [
            criterion(as_outputs(*leaves()), items) for items in ([small, large], [padded, large])
        ]
        for name in losses[0]:
            torch.testing.assert_close(losses[0][name], losses[1][name])


@pytest.mark.parametrize("cls", CRITERIA)
def test_ignored_of_some_targets_only(cls, mode):
    targets = random_targets([0], [1])
    targets[1]["ignored"] = torch.zeros(32, 48, dtype=torch.bool)
    criterion = mode(make_criterion(FixedMatcher(([0], [0]), ([0], [0])), cls=cls))
    with pytest.raises(ValueError, match="1 of 2 targets have 'ignored'"):
        criterion(as_outputs(*leaves()), targets)


@pytest.mark.parametrize(
    ("matched", "pairwise"),
    [
        (dice_losses, batch_dice_loss),
        (sigmoid_ce_losses, batch_sigmoid_ce_loss),
        (sigmoid_focal_losses, batch_sigmoid_focal_loss),
    ],
)
def test_weights_leave_points_out(matched, pairwise):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 40, generator=generator)
    labels = (torch.rand(3, 40, generator=generator) > 0.5).float()
    keep = torch.rand(40, generator=generator) > 0.4
    weights = keep.float()
    torch.testing.assert_close(
        matched(logits, labels, weights.expand(3, -1)), matched(logits[:, keep], labels[:, keep])
    )
    torch.testing.assert_close(
        pairwise(logits, labels, weights), pairwise(logits[:, keep], labels[:, keep])
    )
    torch.testing.assert_close(
        pairwise(logits, labels, weights).diagonal(), matched(logits, labels, weights.expand(3, -1))
    )
