"""SetCriterion: losses by hand, empty ground truth, factored masks, deep supervision.

Shape letters: B batch, Q queries, K classes, T targets of an image, C mask channels, P points.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mask2former.modeling import criterion as criterion_module
from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.mask_losses import dice_loss, sigmoid_ce_loss
from mask2former.modeling.mask_predictions import MaskLogits, MaskPredictions
from mask2former.modeling.matcher import HungarianMatcher

LN2, LN3 = math.log(2), math.log(3)
NAMES = ["loss_ce", "loss_mask", "loss_dice"]


class FixedMatcher(nn.Module):
    """Returns what it was given."""

    def __init__(self, *pairs: tuple[list[int], list[int]]):
        super().__init__()
        self.pairs = [tuple(torch.tensor(x, dtype=torch.int64) for x in pair) for pair in pairs]

    def forward(self, outputs, targets):
        return self.pairs


def build(matcher: nn.Module | None = None, num_classes: int = 3, **changes) -> SetCriterion:
    arguments = {
        "weight_dict": dict.fromkeys(NAMES, 1.0),
        "eos_coef": 0.1,
        "losses": ["labels", "masks"],
        "num_points": 20,
        "oversample_ratio": 3.0,
        "importance_sample_ratio": 0.75,
        **changes,
    }
    matcher = HungarianMatcher(2.0, 5.0, 5.0, num_points=20) if matcher is None else matcher
    return SetCriterion(num_classes, matcher=matcher, **arguments)


@pytest.fixture
def pixel_centres(monkeypatch):
    """Sample the four centres of 2×2 masks, so that losses see every pixel once, exactly."""
    points = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
    monkeypatch.setattr(
        criterion_module,
        "sample_uncertain_points",
        lambda logits, *args: points.expand(len(logits), -1, -1),
    )


def target(labels: list[int], *masks: list) -> dict[str, Tensor]:
    return {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": torch.tensor(masks, dtype=torch.bool).view(len(labels), 2, 2),
    }


def factors(layers: int = 1, batch: int = 2, queries: int = 6) -> tuple[list, list, Tensor]:
    """Class logits and embeddings of every layer, and the features all of them share."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).requires_grad_()

    logits = [leaf(batch, queries, 4) for _ in range(layers)]
    embeds = [leaf(batch, queries, 5) for _ in range(layers)]
    return logits, embeds, leaf(batch, 5, 8, 12)


def lazy_outputs(logits: list, embeds: list, features: Tensor) -> MaskPredictions:
    layers = [
        MaskPredictions(pred_logits=x, pred_masks=MaskLogits(e, features))
        for x, e in zip(logits, embeds, strict=True)
    ]
    layers[-1]["aux_outputs"] = layers[:-1]
    return layers[-1]


def dense_outputs(logits: list, embeds: list, features: Tensor) -> dict:
    layers = [
        {"pred_logits": x, "pred_masks": torch.einsum("bqc,bchw->bqhw", e, features)}
        for x, e in zip(logits, embeds, strict=True)
    ]
    return {**layers[-1], "aux_outputs": layers[:-1]}


def random_targets(*labels: list[int], size=(32, 48)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "labels": torch.tensor(x, dtype=torch.int64),
            "masks": torch.rand(len(x), *size, generator=generator) > 0.6,
        }
        for x in labels
    ]


def test_class_loss_by_hand():
    # Query 0 is matched with class 0, of which it is 80% sure; query 1 is to say no-object, of
    # which it is half sure, and counts one tenth.
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


def test_class_loss_takes_labels_by_matched_target():
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
@pytest.mark.parametrize("lazy", [False, True])
def test_mask_losses_by_hand(lazy):
    # Image 0: query 2 predicts 1/2 everywhere, its target 1 has one pixel. Image 1: query 0
    # predicts 3/4 everywhere, its target is full. Three targets in all.
    embed = torch.tensor([[[9.0], [9.0], [0.0]], [[LN3], [9.0], [9.0]]])
    features = torch.ones(2, 1, 2, 2)
    masks = MaskLogits(embed, features)
    outputs = MaskPredictions(
        pred_logits=torch.zeros(2, 3, 4), pred_masks=masks if lazy else masks.full()
    )
    one, full = [[0, 1], [0, 0]], [[1, 1], [1, 1]]
    targets = [target([0, 1], full, one), target([2], full)]
    criterion = build(FixedMatcher(([2], [1]), ([0], [0])), losses=["masks"])
    losses = criterion(outputs, targets)
    assert list(losses) == ["loss_mask", "loss_dice"]
    assert losses["loss_mask"].item() == pytest.approx((LN2 + 2 * LN2 - LN3) / 3)
    # 1 - (2·0.5 + 1) / (2 + 1 + 1) = 1/2 and 1 - (2·3 + 1) / (3 + 4 + 1) = 1/8.
    assert losses["loss_dice"].item() == pytest.approx((1 / 2 + 1 / 8) / 3)


@pytest.mark.parametrize("lazy", [False, True])
def test_empty_ground_truth_in_all_images(lazy):
    logits, embeds, features = factors(layers=2)
    outputs = (lazy_outputs if lazy else dense_outputs)(logits, embeds, features)
    losses = build()(outputs, random_targets([], []))
    assert all(torch.isfinite(loss) for loss in losses.values())
    for name in ("loss_mask", "loss_dice", "loss_mask_0", "loss_dice_0"):
        assert losses[name].item() == 0
    assert losses["loss_ce"] > 0
    sum(losses.values()).backward()
    for layer in range(2):
        assert logits[layer].grad.any()
        # Zeros, not None: distributed training waits for the gradient of every parameter.
        assert embeds[layer].grad is not None and not embeds[layer].grad.any()
    assert features.grad is not None and not features.grad.any()


def test_empty_ground_truth_in_one_image():
    logits, embeds, features = factors()
    losses = build()(lazy_outputs(logits, embeds, features), random_targets([], [1, 2]))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    assert not embeds[0].grad[0].any() and embeds[0].grad[1].any()


@pytest.mark.parametrize("sizes", [[(32, 48), (32, 48)], [(32, 48), (40, 24)]])
def test_factored_masks_give_the_same_losses_and_gradients(sizes):
    targets = [
        random_targets(x, size=size)[0] for x, size in zip([[0, 2, 1], [1]], sizes, strict=True)
    ]
    results = []
    for form in (dense_outputs, lazy_outputs):
        logits, embeds, features = factors(layers=3)
        torch.manual_seed(3)
        losses = build()(form(logits, embeds, features), targets)
        sum(losses.values()).backward()
        grads = [x.grad for x in (*logits, *embeds, features)]
        results.append((losses, grads, torch.get_rng_state()))
    (dense, dense_grads, dense_state), (lazy, lazy_grads, lazy_state) = results
    assert list(dense) == list(lazy)
    for name in dense:
        torch.testing.assert_close(lazy[name], dense[name])
    for lazy_grad, dense_grad in zip(lazy_grads, dense_grads, strict=True):
        torch.testing.assert_close(lazy_grad, dense_grad, atol=1e-5, rtol=1e-4)
    assert torch.equal(dense_state, lazy_state)


def test_no_full_masks_in_training():
    outputs = lazy_outputs(*factors(layers=3))
    losses = build()(outputs, random_targets([0, 2], [1]))
    sum(losses.values()).backward()
    assert all(x.mask_logits._full is None for x in (outputs, *outputs["aux_outputs"]))


def test_losses_are_those_at_the_sampled_points():
    """Against the definition, with the points the criterion draws."""
    logits, embeds, features = factors()
    outputs = dense_outputs(logits, embeds, features)
    targets = random_targets([0, 2], [1])
    # Every point uniform, so that the draw can be repeated: (N, P, 2) for each image.
    criterion = build(
        FixedMatcher(([3, 1], [1, 0]), ([2], [0])), importance_sample_ratio=0.0, num_points=50
    )
    torch.manual_seed(4)
    losses = criterion(outputs, targets)
    torch.manual_seed(4)
    grid = []
    for count in (2, 1):
        torch.rand(count, 150, 2)  # the candidates for uncertain points, all of them rejected
        grid.append(torch.rand(count, 50, 2)[:, :, None] * 2 - 1)
    grid = torch.cat(grid)
    masks = outputs["pred_masks"].detach()
    masks = torch.stack([masks[0, 3], masks[0, 1], masks[1, 2]])[:, None]
    labels = torch.stack([targets[0]["masks"][1], targets[0]["masks"][0], targets[1]["masks"][0]])
    sample = [
        nn.functional.grid_sample(x, grid, align_corners=False)[:, 0, :, 0]
        for x in (masks, labels[:, None].float())
    ]
    torch.testing.assert_close(losses["loss_mask"].detach(), sigmoid_ce_loss(*sample, 3.0))
    torch.testing.assert_close(losses["loss_dice"].detach(), dice_loss(*sample, 3.0))


def published_losses(outputs: dict, targets: list, indices: list, points: Tensor) -> dict:
    """Losses of one layer from full-size masks and given points, as the paper's code has them."""
    masks = torch.cat([m[i] for m, (i, _) in zip(outputs["pred_masks"], indices, strict=True)])
    labels = torch.cat([t["masks"][j] for t, (_, j) in zip(targets, indices, strict=True)])
    predicted, wanted = (
        nn.functional.grid_sample(x, points[:, :, None] * 2 - 1, align_corners=False)[:, 0, :, 0]
        for x in (masks[:, None], labels[:, None].float())
    )
    num_masks = sum(len(t["labels"]) for t in targets)
    classes = torch.full(outputs["pred_logits"].shape[:2], 3)
    for image, (target, (i, j)) in enumerate(zip(targets, indices, strict=True)):
        classes[image, i] = target["labels"][j]
    return {
        "loss_ce": nn.functional.cross_entropy(
            outputs["pred_logits"].transpose(1, 2), classes, torch.tensor([1.0, 1.0, 1.0, 0.1])
        ),
        "loss_mask": sigmoid_ce_loss(predicted, wanted, num_masks),
        "loss_dice": dice_loss(predicted, wanted, num_masks),
    }


@pytest.mark.parametrize("candidates", [1, 200, 2**20])
@pytest.mark.parametrize("lazy", [False, True])
def test_all_layers_together_equal_the_published_losses(candidates, lazy, monkeypatch):
    """For the points that were drawn; however many masks are worked on at a time."""
    monkeypatch.setitem(criterion_module._MAX_CANDIDATES, "cpu", candidates)
    logits, embeds, features = factors(layers=4)
    targets = random_targets([0, 2, 1], [1])
    drawn, sample = [], criterion_module.sample_uncertain_points
    monkeypatch.setattr(
        criterion_module,
        "sample_uncertain_points",
        lambda *args: drawn.append(sample(*args)) or drawn[-1],
    )
    criterion = build()
    matched, match = [], criterion.matcher.match_layers
    criterion.matcher.match_layers = lambda *args: matched.extend(match(*args)) or matched
    outputs = (lazy_outputs if lazy else dense_outputs)(logits, embeds, features)
    losses = criterion(outputs, targets)
    sum(losses.values()).backward()
    grads = [x.grad for x in (*logits, *embeds, features)]

    # Points come image by image, layer by layer: three masks of the first image, one of the second.
    first, second = torch.cat(drawn).split([12, 4])
    given = [torch.cat((a, b)) for a, b in zip(first.split(3), second.split(1), strict=True)]
    for x in (*logits, *embeds, features):
        x.grad = None
    outputs = dense_outputs(logits, embeds, features)
    expected = {}
    for number, layer in enumerate((outputs, *outputs["aux_outputs"])):
        values = published_losses(layer, targets, matched[number], given[number])
        suffix = f"_{number - 1}" if number else ""
        expected.update({name + suffix: value for name, value in values.items()})
    sum(expected.values()).backward()
    assert list(losses) == list(expected)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], atol=1e-5, rtol=1e-5)
    for grad, x in zip(grads, (*logits, *embeds, features), strict=True):
        torch.testing.assert_close(grad, x.grad, atol=1e-5, rtol=1e-4)


class DoubledMaskLoss(SetCriterion):
    """Changes the losses of one layer, as projects that build on this one do."""

    def loss_masks(self, outputs, targets, indices, num_masks):
        losses = super().loss_masks(outputs, targets, indices, num_masks)
        return {name: 2 * value for name, value in losses.items()}


def test_an_overridden_loss_is_honoured():
    matcher = FixedMatcher(([3, 1], [1, 0]), ([2], [0]))
    arguments = {"losses": ["labels", "masks"], "num_points": 400, "eos_coef": 0.1}
    ours, changed = (
        cls(
            3,
            matcher,
            {},
            oversample_ratio=1.0,
            importance_sample_ratio=1.0,
            **arguments,
        )
        for cls in (SetCriterion, DoubledMaskLoss)
    )
    outputs = lazy_outputs(*factors(layers=3))
    targets = random_targets([0, 2], [1])
    losses, others = ours(outputs, targets), changed(outputs, targets)
    assert list(losses) == list(others)
    for name in losses:
        factor = 1 if "loss_ce" in name else 2
        # The points differ, so that the losses agree within their noise only.
        tolerance = 1e-6 if "loss_ce" in name else 0.2
        assert others[name].item() == pytest.approx(factor * losses[name].item(), rel=tolerance)


class CountWaits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: reading values, and copies to the host."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        boolean_index = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in self.NAMES or boolean_index:
            self.waits.append(name)
        return function(*args, **kwargs)


def test_forward_reads_no_value_but_the_costs(monkeypatch):
    """On a GPU the host waits once: for the costs. Everything else is queued."""
    outputs, targets = lazy_outputs(*factors(layers=10)), random_targets([0, 2, 1], [1])
    copies = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda x: copies.append(x.dtype) or cpu(x))
    with CountWaits() as counter:
        build()(outputs, targets)
    assert counter.waits == []
    # Matched indices are on the host already.
    assert copies.count(torch.float32) == 1


def test_targets_of_different_sizes_are_padded_to_the_largest():
    logits, embeds, features = factors()
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
        results.append(criterion(lazy_outputs(logits, embeds, features), given))
    for name in NAMES:
        assert torch.equal(results[0][name], results[1][name])


def test_deep_supervision_names_and_order():
    outputs = lazy_outputs(*factors(layers=10))
    losses = build()(outputs, random_targets([0], [1, 2]))
    expected = [*NAMES, *(f"{name}_{layer}" for layer in range(9) for name in NAMES)]
    assert list(losses) == expected
    # Suffix 0 is the earliest prediction.
    alone = build(losses=["labels"])
    torch.manual_seed(0)
    fixed = FixedMatcher(([0], [0]), ([0, 1], [0, 1]))
    alone.matcher = fixed
    many = alone(outputs, random_targets([0], [1, 2]))
    first = alone(outputs["aux_outputs"][0], random_targets([0], [1, 2]))
    torch.testing.assert_close(many["loss_ce_0"], first["loss_ce"])
    assert many["loss_ce_1"] != many["loss_ce_0"]


def test_without_auxiliary_outputs():
    outputs = lazy_outputs(*factors(layers=1))
    assert list(build()(outputs, random_targets([0], [1]))) == NAMES
    outputs.pop("aux_outputs")
    assert list(build()(outputs, random_targets([0], [1]))) == NAMES


def test_no_targets_divides_by_one_not_zero():
    assert build()._average_num_masks(random_targets([], []), torch.device("cpu")) == 1.0
    assert build()._average_num_masks(random_targets([0], [1, 2]), torch.device("cpu")) == 3.0


def test_permutation_indices():
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


def test_state_dict():
    criterion = build()
    assert list(criterion.state_dict()) == ["empty_weight"]
    torch.testing.assert_close(criterion.empty_weight, torch.tensor([1.0, 1.0, 1.0, 0.1]))


def test_bad_arguments():
    outputs = lazy_outputs(*factors())
    with pytest.raises(ValueError, match="1 targets for 2 images"):
        build()(outputs, random_targets([0]))
    with pytest.raises(ValueError, match=r"loss 'boxes' is not one of \['labels', 'masks'\]"):
        build(losses=["boxes"])(outputs, random_targets([0], [1]))
