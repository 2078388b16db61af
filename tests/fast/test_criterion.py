"""Matching and losses of all layers together: memory, host syncs, chunks, factored masks.

Shape letters: L layers, B batch, Q queries, K classes, N masks, C mask channels, P points.
"""

import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from small_parts import random_targets
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from mask2former.fast import criterion as fast_criterion
from mask2former.fast import mask_factors
from mask2former.fast.criterion import match_layers
from mask2former.fast.mask_factors import MaskFactors
from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.mask_losses import dice_loss, sigmoid_ce_loss
from mask2former.modeling.matcher import HungarianMatcher
from mask2former.utils.twins import run_plain, runs_fast


def build() -> SetCriterion:
    criterion = SetCriterion(
        3,
        matcher=HungarianMatcher(2.0, 5.0, 5.0, num_points=20),
        weight_dict={},
        eos_coef=0.1,
        losses=["labels", "masks"],
        num_points=20,
        oversample_ratio=3.0,
        importance_sample_ratio=0.75,
    )
    assert runs_fast(criterion) and runs_fast(criterion.matcher)
    return criterion


def factors(layers: int = 1, batch: int = 2, queries: int = 6) -> tuple[list, list, Tensor]:
    """Class logits and embeddings of every layer, and the features that they share."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).requires_grad_()

    logits = [leaf(batch, queries, 4) for _ in range(layers)]
    embeds = [leaf(batch, queries, 5) for _ in range(layers)]
    return logits, embeds, leaf(batch, 5, 8, 12)


def as_factors(logits: list, embeds: list, features: Tensor) -> dict:
    layers = [
        {"pred_logits": x, "pred_masks": MaskFactors(e, features)}
        for x, e in zip(logits, embeds, strict=True)
    ]
    return {**layers[-1], "aux_outputs": layers[:-1]}


def as_dense(logits: list, embeds: list, features: Tensor) -> dict:
    layers = [
        {"pred_logits": x, "pred_masks": torch.einsum("bqc,bchw->bqhw", e, features)}
        for x, e in zip(logits, embeds, strict=True)
    ]
    return {**layers[-1], "aux_outputs": layers[:-1]}


def by_layer(outputs: dict) -> list[dict]:
    return [outputs, *outputs["aux_outputs"]]


def assert_same_pairs(indices, expected):
    for (i, j), (expected_i, expected_j) in zip(indices, expected, strict=True):
        assert torch.equal(i, expected_i) and torch.equal(j, expected_j)


@pytest.mark.parametrize("limit", [1, 360, 2**26])  # one layer, three, all at once
def test_layers_together_match_as_one_by_one(limit, monkeypatch):
    monkeypatch.setitem(mask_factors._MAX_LOGITS, "cpu", limit)
    layers = by_layer(as_factors(*factors(layers=4, batch=3)))
    # Fewer targets than queries, none, and more.
    targets = random_targets([0, 1], [], [2, 0, 1, 1, 0, 2, 0])
    matcher = build().matcher
    torch.manual_seed(3)
    together = match_layers(matcher, layers, targets)
    plain = run_plain(HungarianMatcher(2.0, 5.0, 5.0, num_points=20))
    for layer, indices in zip(layers, together, strict=True):
        torch.manual_seed(3)
        assert_same_pairs(indices, matcher(layer, targets))
        torch.manual_seed(3)
        dense = {**layer, "pred_masks": layer["pred_masks"].full()}
        assert_same_pairs(indices, plain(dense, targets))


def test_matching_points_are_drawn_once(monkeypatch):
    layers, targets = by_layer(as_factors(*factors(layers=3))), random_targets([0, 1], [])
    drawn, rand = [], torch.rand
    monkeypatch.setattr(
        torch, "rand", lambda *size, **kwargs: drawn.append(size) or rand(*size, **kwargs)
    )
    match_layers(build().matcher, layers, targets)
    assert drawn == [(2, 20, 2)]


def test_costs_of_factored_masks_equal_those_of_full_masks():
    leaves, targets = factors(layers=2, batch=3), random_targets([0, 1], [], [2])
    costs = []
    for form in (as_dense, as_factors):
        torch.manual_seed(0)
        layers = by_layer(form(*leaves))
        costs.append(fast_criterion._matching_costs(build().matcher, layers, targets).detach())
    assert costs[0].shape == (2, 3, 6, 2) and costs[0].std() > 0.1
    torch.testing.assert_close(costs[1], costs[0])


@pytest.mark.parametrize("sizes", [[(32, 48), (32, 48)], [(32, 48), (40, 24)]])
def test_factored_masks_have_the_same_losses_and_gradients(sizes):
    targets = [
        random_targets(x, size=size)[0] for x, size in zip([[0, 2, 1], [1]], sizes, strict=True)
    ]
    results = []
    for form in (as_dense, as_factors):
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


def test_no_full_masks_in_training(monkeypatch):
    def fail(self):
        raise AssertionError("full-size masks of all queries were computed")

    monkeypatch.setattr(MaskFactors, "full", fail)
    outputs = as_factors(*factors(layers=3))
    sum(build()(outputs, random_targets([0, 2], [1])).values()).backward()


def test_empty_ground_truth_of_factored_masks():
    logits, embeds, features = factors(layers=2)
    losses = build()(as_factors(logits, embeds, features), random_targets([], []))
    assert all((loss > 0) == name.startswith("loss_ce") for name, loss in losses.items())
    sum(losses.values()).backward()
    # Zeros, not None: distributed training waits for the gradient of every parameter.
    for x in (*embeds, features):
        assert x.grad is not None and not x.grad.any()


def reference_losses(outputs: dict, targets: list, indices: list, points: Tensor) -> dict:
    """Losses of one layer from full-size masks and given points, by definition."""
    masks = torch.cat([m[i] for m, (i, _) in zip(outputs["pred_masks"], indices, strict=True)])
    labels = torch.cat([t["masks"][j] for t, (_, j) in zip(targets, indices, strict=True)])
    pred, gt = (
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
        "loss_mask": sigmoid_ce_loss(pred, gt, num_masks),
        "loss_dice": dice_loss(pred, gt, num_masks),
    }


@pytest.mark.parametrize("candidates", [1, 200, 2**20])
@pytest.mark.parametrize("form", [as_dense, as_factors])
def x(candidates, form, monkeypatch):
    """At the drawn points, for any number of masks at a time."""
    monkeypatch.setitem(fast_criterion._MAX_CANDIDATES, "cpu", candidates)
    logits, embeds, features = factors(layers=4)
    targets = random_targets([0, 2, 1], [1])
    drawn, sample = [], fast_criterion.sample_uncertain_points
    monkeypatch.setattr(
        fast_criterion,
        "sample_uncertain_points",
        lambda *args: drawn.append(sample(*args)) or drawn[-1],
    )
    criterion = build()
    matched, match = [], fast_criterion.match_layers
    monkeypatch.setattr(
        fast_criterion, "match_layers", lambda *args: matched.extend(match(*args)) or matched
    )
    outputs = form(logits, embeds, features)
    losses = criterion(outputs, targets)
    sum(losses.values()).backward()
    grads = [x.grad for x in (*logits, *embeds, features)]

    # Points come image by image, layer by layer: three masks of the first image, one of the second.
    first, second = torch.cat(drawn).split([12, 4])
    given = [torch.cat((a, b)) for a, b in zip(first.split(3), second.split(1), strict=True)]
    for x in (*logits, *embeds, features):
        x.grad = None
    outputs = as_dense(logits, embeds, features)
    expected = {}
    for number, layer in enumerate((outputs, *outputs["aux_outputs"])):
        values = reference_losses(layer, targets, matched[number], given[number])
        suffix = f"_{number - 1}" if number else ""
        expected.update({name + suffix: value for name, value in values.items()})
    sum(expected.values()).backward()
    assert list(losses) == list(expected)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], atol=1e-5, rtol=1e-5)
    for grad, x in zip(grads, (*logits, *embeds, features), strict=True):
        torch.testing.assert_close(grad, x.grad, atol=1e-5, rtol=1e-4)


class HostSyncs(TorchDispatchMode):
    """Lists operators that synchronise host and GPU: those whose results are values or sizes."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "_unique2")

    def __init__(self):
        super().__init__()
        self.syncs = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        boolean_index = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in self.NAMES or boolean_index:
            self.syncs.append(name)
        return function(*args, **kwargs)


def test_costs_are_the_only_host_sync(monkeypatch):
    outputs, targets = as_factors(*factors(layers=10)), random_targets([0, 2, 1], [1])
    copies = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda x: copies.append(x.dtype) or cpu(x))
    assign = fast_criterion.assign

    def assign_on_host(*args):  # costs were copied to the host
        with _disable_current_modes():
            return assign(*args)

    monkeypatch.setattr(fast_criterion, "assign", assign_on_host)
    with HostSyncs() as counter:
        build()(outputs, targets)
    assert counter.syncs == []
    # Matched indices are on the host already.
    assert copies.count(torch.float32) == 1


IN_A_GROUP = """
import sys
import torch
import torch.distributed as dist
sys.path[:0] = sys.argv[3:]
import test_criterion as tests

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
targets = [tests.random_targets([0, 1], []), tests.random_targets([2], [0, 1, 1])][rank]
outputs = tests.as_dense(*tests.factors(layers=2))
criterion = tests.build()
assert criterion.average_num_masks(targets, torch.device("cpu")) == 3.0  # of 2 and 4
divisors = []
mask_losses = tests.fast_criterion._mask_losses
def record(*args):
    divisors.append(args[-1])
    return mask_losses(*args)
tests.fast_criterion._mask_losses = record
criterion(outputs, targets)
criterion.average_num_masks = lambda targets, device: 7.0 + rank
criterion(outputs, targets)
assert divisors == [3.0, 7.0 + rank], divisors
dist.destroy_process_group()
"""


def test_number_of_masks_in_a_group(tmp_path):
    """Averaged over two processes; a method of another project is still called."""
    arguments = [str(tmp_path / "group"), str(Path(__file__).parent), *sys.path]
    workers = [
        forked.Popen(
            [sys.executable, "-W", "ignore", "-c", IN_A_GROUP, str(rank), *arguments],
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors


def test_masks_are_counted_before_matching(monkeypatch):
    """So that the host sync of matching serves the count as well."""
    order = []
    begin, match = fast_criterion.begin_average_num_masks, fast_criterion.match_layers
    monkeypatch.setattr(
        fast_criterion,
        "begin_average_num_masks",
        lambda *args: order.append("count") or begin(*args),
    )
    monkeypatch.setattr(
        fast_criterion, "match_layers", lambda *args: order.append("match") or match(*args)
    )
    build()(as_factors(*factors(layers=2)), random_targets([0], [1]))
    assert order == ["count", "match"]
