"""SetCriterion: losses by hand, empty ground truth, deep supervision, own losses; plain and fast.

Shape letters: B batch, Q queries, K classes, N masks, C mask channels, P points, H W pixels.
"""

import math

import pytest
import torch
from criterion_parts import NAMES, FixedMatcher, as_outputs, leaves, make_criterion, target
from small_parts import random_targets
from torch import Tensor, nn

from mask2former.fast import criterion as fast_criterion
from mask2former.modeling import criterion as plain_criterion
from mask2former.modeling.criterion import LOSS_REGISTRY, SetCriterion
from mask2former.modeling.mask_losses import dice_loss, sigmoid_ce_loss
from mask2former.modeling.matcher import HungarianMatcher
from mask2former.utils.twins import run_plain

LN2, LN3 = math.log(2), math.log(3)


@pytest.fixture
def build(mode):
    """Function (matcher, num_classes, **changes) → a criterion that runs plain or fast."""

    def make(matcher: nn.Module | None = None, num_classes: int = 3, **changes) -> SetCriterion:
        return mode(make_criterion(matcher, num_classes, **changes))

    return make


def patch_sampling(monkeypatch, mode, change) -> None:
    """Replace the choice of points by `change(original)`.

    Only that of the mode under test: with the plain one replaced, the criterion would run plain.
    """
    if mode is run_plain:
        module, name = plain_criterion, "get_uncertain_point_coords_with_randomness"
    else:
        module, name = fast_criterion, "sample_uncertain_points"
    monkeypatch.setattr(module, name, change(getattr(module, name)))


@pytest.fixture
def pixel_centres(monkeypatch, mode):
    """Sample the four centres of 2×2 masks, so that losses see every pixel once, exactly."""
    points = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    patch_sampling(
        monkeypatch, mode, lambda _: lambda logits, *args: points.expand(len(logits), -1, -1)
    )


@pytest.fixture
def drawn_points(monkeypatch, mode) -> list[Tensor]:
    """A list that fills with the points (N, P, 2) of the mask losses."""
    drawn = []
    patch_sampling(
        monkeypatch, mode, lambda sample: lambda *args: drawn.append(sample(*args)) or drawn[-1]
    )
    return drawn


@pytest.mark.parametrize("deterministic", [False, True])
def test_class_loss_by_hand(build, deterministic, monkeypatch):
    monkeypatch.setattr(plain_criterion, "is_deterministic", lambda x: deterministic)
    # Query 0 is matched with class 0 and predicts it with 0.8; query 1 is unmatched, predicts
    # no-object with 0.5, and has weight 0.1.
    logits = torch.tensor([[[0.8, 0.2], [0.5, 0.5]]]).log()
    outputs = {"pred_logits": logits, "pred_masks": torch.zeros(1, 2, 2, 2)}
    criterion = build(FixedMatcher(([0], [0])), num_classes=1, losses=["labels"])
    losses = criterion(outputs, [target([0], [[1, 0], [0, 0]])])
    assert list(losses) == ["loss_ce"]
    expected = (-math.log(0.8) + 0.1 * LN2) / 1.1
    assert losses["loss_ce"].item() == pytest.approx(expected)
    # eos_coef 1: a plain mean.
    criterion = build(FixedMatcher(([0], [0])), num_classes=1, losses=["labels"], eos_coef=1.0)
    losses = criterion(outputs, [target([0], [[1, 0], [0, 0]])])
    assert losses["loss_ce"].item() == pytest.approx((-math.log(0.8) + LN2) / 2)


def test_class_loss_takes_the_label_of_the_matched_target(build):
    # Two images; query 1 of the first has target 1, class 2; query 0 of the second target 0.
    logits = torch.zeros(2, 2, 4)
    logits[0, 1, 2] = logits[1, 0, 1] = logits[0, 0, 3] = logits[1, 1, 3] = 50.0
    outputs = {"pred_logits": logits, "pred_masks": torch.zeros(2, 2, 2, 2)}
    full = [[1, 1], [1, 1]]
    targets = [target([0, 2], full, full), target([1], full)]
    matched = FixedMatcher(([1], [1]), ([0], [0]))
    assert build(matched, losses=["labels"])(outputs, targets)["loss_ce"].item() < 1e-6
    wrong = FixedMatcher(([1], [0]), ([0], [0]))
    assert build(wrong, losses=["labels"])(outputs, targets)["loss_ce"].item() > 10


@pytest.mark.usefixtures("pixel_centres")
def test_mask_losses_by_hand(build):
    # Image 0: query 2 predicts 1/2 everywhere, its target 1 has one pixel. Image 1: query 0
    # predicts 3/4 everywhere, its target is full. Three targets in all.
    masks = torch.tensor([[9.0, 9.0, 0.0], [LN3, 9.0, 9.0]])[..., None, None].expand(2, 3, 2, 2)
    outputs = {"pred_logits": torch.zeros(2, 3, 4), "pred_masks": masks}
    one, full = [[0, 1], [0, 0]], [[1, 1], [1, 1]]
    targets = [target([0, 1], full, one), target([2], full)]
    criterion = build(FixedMatcher(([2], [1]), ([0], [0])), losses=["masks"])
    losses = criterion(outputs, targets)
    assert list(losses) == ["loss_mask", "loss_dice"]
    assert losses["loss_mask"].item() == pytest.approx((LN2 + 2 * LN2 - LN3) / 3)
    # 1 - (2·0.5 + 1) / (2 + 1 + 1) = 1/2 and 1 - (2·3 + 1) / (3 + 4 + 1) = 1/8.
    assert losses["loss_dice"].item() == pytest.approx((1 / 2 + 1 / 8) / 3)


def test_empty_ground_truth_in_all_images(build):
    logits, masks = leaves(layers=2)
    losses = build()(as_outputs(logits, masks), random_targets([], []))
    assert all(torch.isfinite(loss) for loss in losses.values())
    for name in ("loss_mask", "loss_dice", "loss_mask_0", "loss_dice_0"):
        assert losses[name].item() == 0
    assert losses["loss_ce"] > 0
    sum(losses.values()).backward()
    for layer in range(2):
        assert logits[layer].grad.any()
        # Zeros, not None: distributed training waits for the gradient of every parameter.
        assert masks[layer].grad is not None and not masks[layer].grad.any()


def test_empty_ground_truth_in_one_image(build):
    logits, masks = leaves()
    losses = build()(as_outputs(logits, masks), random_targets([], [1, 2]))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    assert not masks[0].grad[0].any() and masks[0].grad[1].any()


def test_losses_equal_the_definition_at_the_drawn_points(build, drawn_points):
    outputs = as_outputs(*leaves())
    targets = random_targets([0, 2], [1])
    matcher = FixedMatcher(([3, 1], [1, 0]), ([2], [0]))
    losses = build(matcher, num_points=50)(outputs, targets)
    points = torch.cat(drawn_points)
    assert points.shape == (3, 50, 2)
    masks = outputs["pred_masks"].detach()
    masks = torch.stack([masks[0, 3], masks[0, 1], masks[1, 2]])[:, None]
    labels = torch.stack([targets[0]["masks"][1], targets[0]["masks"][0], targets[1]["masks"][0]])
    sample = [
        nn.functional.grid_sample(x, points[:, :, None] * 2 - 1, align_corners=False)[:, 0, :, 0]
        for x in (masks, labels[:, None].float())
    ]
    torch.testing.assert_close(losses["loss_mask"].detach(), sigmoid_ce_loss(*sample, 3.0))
    torch.testing.assert_close(losses["loss_dice"].detach(), dice_loss(*sample, 3.0))


def test_plain_draws_are_in_the_order_of_the_original(monkeypatch):
    """For each layer: matching points of every image, candidates and other points of all masks."""
    outputs, targets = as_outputs(*leaves(layers=2)), random_targets([0, 2], [], size=(8, 12))
    drawn, rand = [], torch.rand
    monkeypatch.setattr(
        torch, "rand", lambda *size, **kwargs: drawn.append(size) or rand(*size, **kwargs)
    )
    run_plain(make_criterion())(outputs, targets)
    assert drawn == 2 * [(1, 20, 2), (1, 20, 2), (2, 60, 2), (2, 5, 2)]


class DoubledMaskLoss(SetCriterion):
    """Changes the losses of one layer, as projects that build on this one do."""

    def loss_masks(self, outputs, targets, indices, num_masks):
        losses = super().loss_masks(outputs, targets, indices, num_masks)
        return {name: 2 * value for name, value in losses.items()}


def patched_on_the_instance(criterion):
    loss_masks = criterion.loss_masks
    criterion.loss_masks = lambda *args: {k: 2 * v for k, v in loss_masks(*args).items()}
    return criterion


@pytest.mark.parametrize("how", ["subclass", "instance"])
def test_overridden_loss_is_called(how):
    matcher = FixedMatcher(([3, 1], [1, 0]), ([2], [0]))
    ours = run_plain(make_criterion(matcher))  # both draw the same points
    changed = (
        make_criterion(matcher, cls=DoubledMaskLoss)
        if how == "subclass"
        else patched_on_the_instance(make_criterion(matcher))
    )
    outputs, targets = as_outputs(*leaves(layers=3)), random_targets([0, 2], [1])
    results = []
    for criterion in (ours, changed):
        torch.manual_seed(0)
        results.append(criterion(outputs, targets))
    losses, others = results
    assert list(losses) == list(others)
    for name in losses:
        factor = 1 if "loss_ce" in name else 2
        assert others[name].item() == pytest.approx(factor * losses[name].item())


def test_matcher_of_another_project_is_called_for_each_layer(build):
    class Last(HungarianMatcher):
        """Gives the targets to the last queries."""

        calls = 0

        def forward(self, outputs, targets):
            self.calls += 1
            last = outputs["pred_logits"].shape[1] - 1
            return [
                (last - torch.arange(len(t["labels"])), torch.arange(len(t["labels"])))
                for t in targets
            ]

    logits, masks = leaves(layers=3)
    criterion = build(Last(num_points=20))
    sum(criterion(as_outputs(logits, masks), random_targets([0, 2], [1])).values()).backward()
    assert criterion.matcher.calls == 3
    for layer in masks:
        used = layer.grad.flatten(2).any(-1)
        assert used.tolist() == [[False] * 4 + [True] * 2, [False] * 5 + [True]]


def test_registered_loss_by_hand(build, monkeypatch):
    monkeypatch.setattr(LOSS_REGISTRY, "_obj_map", {})

    @LOSS_REGISTRY.register()
    def area(matched):
        assert matched.mask_logits.shape == (3, 2, 2) and matched.target_masks.shape == (3, 2, 2)
        assert matched.class_logits.shape == (3, 4) and matched.labels.tolist() == [2, 0, 2]
        assert matched.points.shape == (3, 20, 2)
        assert matched.point_logits.shape == matched.point_labels.shape == (3, 20)
        areas = [x.mean((1, 2)) for x in (matched.mask_logits.sigmoid(), matched.target_masks)]
        return (areas[0] - areas[1]).abs()

    masks = torch.tensor([[9.0, LN3, 0.0], [LN3, 9.0, 9.0]])[..., None, None].expand(2, 3, 2, 2)
    layer = {"pred_logits": torch.zeros(2, 3, 4), "pred_masks": masks}
    outputs = {**layer, "aux_outputs": [layer]}
    one, full = [[0, 1], [0, 0]], [[1, 1], [1, 1]]
    targets = [target([0, 2], full, one), target([2], full)]
    matcher = FixedMatcher(([2, 1], [1, 0]), ([0], [0]))
    losses = build(matcher, losses=["labels", "masks", "area"])(outputs, targets)
    names = [*NAMES, "loss_area"]
    assert list(losses) == [*names, *(f"{name}_0" for name in names)]
    # Areas 1/2 and 1/4, 3/4 and 1, 3/4 and 1; three target masks.
    assert losses["loss_area"].item() == pytest.approx((1 / 4 + 1 / 4 + 1 / 4) / 3)
    assert losses["loss_area_0"].item() == losses["loss_area"].item()


def test_losses_may_be_changed_in_place(build):
    """As the `forward` of other projects applies weights."""
    logits, masks = leaves(layers=3)
    losses = build()(as_outputs(logits, masks), random_targets([0, 2], [1]))
    for name in losses:
        losses[name] *= 2.0
    sum(losses.values()).backward()
    assert all(x.grad.any() for x in (*logits, *masks))


def test_targets_of_different_sizes_are_padded_to_the_largest(build):
    outputs = as_outputs(*leaves())
    targets = [random_targets([0, 2], size=(32, 24))[0], random_targets([1], size=(16, 48))[0]]
    padded = [
        {
            "labels": t["labels"],
            "masks": nn.functional.pad(
                t["masks"], (0, 48 - t["masks"].shape[2], 0, 32 - t["masks"].shape[1])
            ),
        }
        for t in targets
    ]
    criterion = build(FixedMatcher(([3, 1], [1, 0]), ([2], [0])))
    results = []
    for given in (targets, padded):
        torch.manual_seed(0)
        results.append(criterion(outputs, given))
    for name in NAMES:
        assert torch.equal(results[0][name], results[1][name])


def test_deep_supervision_names_and_order(build):
    outputs = as_outputs(*leaves(layers=10))
    losses = build()(outputs, random_targets([0], [1, 2]))
    expected = [*NAMES, *(f"{name}_{layer}" for layer in range(9) for name in NAMES)]
    assert list(losses) == expected
    # Suffix 0 is the earliest prediction.
    alone = build(FixedMatcher(([0], [0]), ([0, 1], [0, 1])), losses=["labels"])
    many = alone(outputs, random_targets([0], [1, 2]))
    first = alone(outputs["aux_outputs"][0], random_targets([0], [1, 2]))
    torch.testing.assert_close(many["loss_ce_0"], first["loss_ce"])
    assert many["loss_ce_1"] != many["loss_ce_0"]


def test_without_auxiliary_outputs(build):
    outputs = as_outputs(*leaves(layers=1))
    assert list(build()(outputs, random_targets([0], [1]))) == NAMES
    outputs.pop("aux_outputs")
    assert list(build()(outputs, random_targets([0], [1]))) == NAMES


def test_no_targets_divides_by_one_not_zero(build):
    assert build().average_num_masks(random_targets([], []), torch.device("cpu")) == 1.0
    assert build().average_num_masks(random_targets([0], [1, 2]), torch.device("cpu")) == 3.0


def test_permutation_indices(build):
    criterion = build(FixedMatcher())
    indices = FixedMatcher(([3, 1], [1, 0]), ([], []), ([2], [4])).pairs
    assert [x.tolist() for x in criterion._get_src_permutation_idx(indices)] == [
        [0, 0, 2],
        [3, 1, 2],
    ]
    assert [x.tolist() for x in criterion._get_tgt_permutation_idx(indices)] == [
        [0, 0, 2],
        [1, 0, 4],
    ]


def test_state_dict(build):
    criterion = build()
    assert list(criterion.state_dict()) == ["empty_weight"]
    torch.testing.assert_close(criterion.empty_weight, torch.tensor([1.0, 1.0, 1.0, 0.1]))


def test_bad_arguments(build):
    outputs = as_outputs(*leaves())
    with pytest.raises(ValueError, match="1 targets for 2 images"):
        build()(outputs, random_targets([0]))
    with pytest.raises(ValueError, match=r"loss 'boxes' is not one of \['labels', 'masks'\]"):
        build(losses=["boxes"])(outputs, random_targets([0], [1]))


def test_losses_of_a_float64_model_are_float32(build):
    outputs, targets = as_outputs(*leaves(layers=2)), random_targets([0, 2], [1])
    results = []
    for dtype in (torch.float32, torch.float64):
        layers = [
            {key: layer[key].detach().to(dtype) for key in ("pred_logits", "pred_masks")}
            for layer in (*outputs["aux_outputs"], outputs)
        ]
        torch.manual_seed(0)
        results.append(build()({**layers[-1], "aux_outputs": layers[:-1]}, targets))
    for name, loss in results[0].items():
        assert results[1][name].dtype == torch.float32
        torch.testing.assert_close(results[1][name], loss)
