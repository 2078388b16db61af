"""Post-processing on examples of 2×3 pixels computed by hand, and against a loop over pixels.

Each test runs with the plain functions and with the streamed results.

Shape letters: Q queries, K classes, N instances, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mask2former.fast.postprocessing import (
    InstanceResult,
    PanopticResult,
    ResizedMasks,
    SemanticResult,
    stream_rows,
)
from mask2former.modeling import postprocessing as plain

THINGS = {0, 1}
STUFF = 2  # the only stuff class of K = 3; 3 is no-object


@dataclass
class Inference:
    """The three functions with the arguments of the plain ones."""

    semantic: Callable
    panoptic: Callable
    instance: Callable
    is_fast: bool


class MasksAtOutputSize(ResizedMasks):
    """Masks that need no resizing."""

    def __init__(self, masks: Tensor):
        self._masks, self.shape, self.device = masks, masks.shape, masks.device

    def rows(self, rows: slice, queries: Tensor | None) -> Tensor:
        return (self._masks if queries is None else self._masks[queries])[:, rows]


def streamed(result: type) -> Callable:
    """A streamed result as a function of class logits, mask logits and settings."""

    def infer(mask_cls: Tensor, mask_pred: Tensor, *args, **options):
        started = result(mask_cls, mask_pred.shape, *args, **options)
        stream_rows(MasksAtOutputSize(mask_pred), [started])
        return started.finish()

    return infer


@pytest.fixture(params=["plain", "fast"])
def inference(request) -> Inference:
    if request.param == "plain":
        functions = plain.semantic_inference, plain.panoptic_inference, plain.instance_inference
        return Inference(*functions, is_fast=False)

    def instance(mask_cls, mask_pred, topk, thing_ids=None, **options):
        return streamed(InstanceResult)(mask_cls, mask_pred, topk, thing_ids, **options)

    return Inference(streamed(SemanticResult), streamed(PanopticResult), instance, is_fast=True)


@pytest.fixture
def panoptic(inference):
    """Function (cls, masks, threshold, overlap) → ids as lists, and segments."""

    def infer(cls: Tensor, masks: Tensor, threshold: float = 0.5, overlap: float = 0.8) -> tuple:
        ids, segments = inference.panoptic(cls, masks, THINGS, threshold, overlap)
        assert ids.dtype == torch.int32
        assert ids.shape == masks.shape[-2:]
        return ids.tolist(), segments

    return infer


def class_logits(*rows: list[float]) -> Tensor:
    """Logits with the given probabilities, no-object last."""
    return torch.tensor(rows).log()


def mask_logits(*masks: list) -> Tensor:
    """Logits with the given mask probabilities."""
    return torch.tensor(masks).logit()


def certain(label: int, probability: float = 0.94, num_classes: int = 3) -> list[float]:
    """Class probabilities with this one for ``label`` and the rest shared equally."""
    row = [(1 - probability) / num_classes] * (num_classes + 1)
    row[label] = probability
    return row


def test_semantic_by_hand(inference):
    cls = class_logits([0.5, 0.25, 0.25], [0.1, 0.6, 0.3])  # two classes and no-object
    masks = mask_logits([[0.5, 0.2, 0.8]] * 2, [[0.1, 1.0, 0.4]] * 2)
    out = inference.semantic(cls, masks)
    assert out.shape == (2, 2, 3)
    # First pixel: class 0 has 0.5·0.5 + 0.1·0.1, class 1 has 0.25·0.5 + 0.6·0.1.
    expected = torch.tensor([[0.26, 0.20, 0.44], [0.185, 0.65, 0.44]])
    torch.testing.assert_close(out, expected[:, None].expand(2, 2, 3))


def test_panoptic_by_hand(panoptic):
    cls = class_logits(certain(0), certain(STUFF), certain(3))
    masks = mask_logits(
        [[0.9, 0.9, 0.1], [0.9, 0.6, 0.1]],
        [[0.1, 0.1, 0.8], [0.1, 0.1, 0.3]],  # owns the last pixel, with less than 1/2
        [[0.99] * 3] * 2,  # no-object never owns a pixel
    )
    ids, segments = panoptic(cls, masks)
    assert ids == [[1, 1, 2], [1, 1, 0]]
    assert segments == [
        {"id": 1, "isthing": True, "category_id": 0},
        {"id": 2, "isthing": False, "category_id": STUFF},
    ]
    assert all(type(s["id"]) is int and type(s["isthing"]) is bool for s in segments)


def test_panoptic_scores(inference):
    """Class probabilities; of merged stuff the highest, wherever it comes."""
    cls = class_logits(
        certain(0, 0.8), certain(STUFF, 0.7), certain(STUFF, 0.9), certain(STUFF, 0.6)
    )
    owned = [[[0.1, 0.1, 0.1], [0.1, 0.1, 0.1]] for _ in range(4)]
    for mask, (row, column) in zip(owned, ((0, 0), (0, 1), (1, 1), (1, 2)), strict=True):
        mask[row][column] = 0.99
    arguments = cls, mask_logits(*owned), THINGS, 0.5, 0.0
    ids, segments = inference.panoptic(*arguments, with_scores=True)
    assert ids.tolist() == [[1, 2, 0], [0, 2, 2]]
    assert [s["score"] for s in segments] == pytest.approx([0.8, 0.9])
    assert all(type(s["score"]) is float for s in segments)
    _, plain_segments = inference.panoptic(*arguments)
    assert [s.keys() for s in plain_segments] == [{"id", "isthing", "category_id"}] * 2


def test_boxes_of_instances(inference, monkeypatch):
    """Of the masks: a corner, one pixel, nothing; the same in rows at a time."""
    masks = mask_logits(
        [[0.9, 0.6, 0.1], [0.9, 0.1, 0.1]],
        [[0.1, 0.1, 0.1], [0.1, 0.1, 0.9]],
        [[0.1, 0.1, 0.1], [0.1, 0.1, 0.1]],
    )
    cls = class_logits(certain(0, 0.9), certain(0, 0.8), certain(0, 0.7))
    monkeypatch.setattr("mask2former.fast.postprocessing._MAX_LOGITS", {"cpu": 1, "cuda": 1})
    instances = inference.instance(cls, masks, 3, with_boxes=True)
    boxes = instances.pred_boxes.tensor[instances.scores.argsort(descending=True)]
    assert boxes.tolist() == [[0, 0, 2, 2], [2, 1, 3, 2], [0, 0, 0, 0]]
    assert boxes.dtype == torch.float32
    assert not inference.instance(cls, masks, 3).pred_boxes.tensor.any()
    none = inference.instance(cls, masks, 3, {1}, with_boxes=True)
    assert none.pred_boxes.tensor.shape == (len(none), 4)


def test_panoptic_owner_has_the_highest_class_times_mask(panoptic):
    # 0.9 · 0.6 = 0.54 loses against 0.7 · 0.8 = 0.56.
    cls = class_logits(certain(0, 0.9), certain(1, 0.7))
    ids, segments = panoptic(cls, mask_logits([[0.6] * 3] * 2, [[0.8] * 3] * 2))
    assert ids == [[1] * 3] * 2
    assert [s["category_id"] for s in segments] == [1]


def test_panoptic_object_threshold_is_exclusive(panoptic):
    cls = torch.zeros(1, 4)  # probability 1/4 for every class, exactly; argmax gives class 0
    masks = mask_logits([[0.9] * 3] * 2)
    assert panoptic(cls, masks, threshold=0.25) == ([[0] * 3] * 2, [])
    ids, segments = panoptic(cls, masks, threshold=0.2499)
    assert ids == [[1] * 3] * 2 and len(segments) == 1


@pytest.mark.parametrize(("overlap", "kept"), [(0.5, True), (0.75, True), (0.76, False)])
def test_panoptic_overlap_threshold_is_strict(panoptic, overlap, kept):
    # Query 0 covers four pixels and owns three of them: 0.75 is not below 0.75.
    cls = class_logits(certain(0), certain(1))
    masks = mask_logits([[0.8, 0.8, 0.1], [0.8, 0.7, 0.1]], [[0.1, 0.1, 0.9], [0.1, 0.9, 0.9]])
    ids, segments = panoptic(cls, masks, overlap=overlap)
    if kept:
        assert ids == [[1, 1, 2], [1, 2, 2]]
    else:  # pixels of a dropped segment stay empty; ids stay consecutive
        assert ids == [[0, 0, 1], [0, 1, 1]]
        assert segments == [{"id": 1, "isthing": True, "category_id": 1}]


def test_panoptic_owned_area_includes_pixels_below_one_half(panoptic):
    # Query 0 owns four pixels, of which two are its foreground, which has three pixels in all:
    # 4 / 3 passes any threshold, 2 / 3 would not.
    cls = class_logits(certain(0), certain(1))
    masks = mask_logits([[0.8, 0.8, 0.6], [0.4, 0.4, 0.1]], [[0.1, 0.1, 0.9], [0.1, 0.1, 0.9]])
    ids, segments = panoptic(cls, masks, overlap=1.0)
    assert ids == [[1, 1, 2], [0, 0, 2]]
    assert len(segments) == 2


def test_panoptic_one_half_is_foreground(panoptic):
    cls = class_logits(certain(0))
    ids, _ = panoptic(cls, torch.tensor([[[0.0, -1e-3, 1e-3]] * 2]))
    assert ids == [[1, 0, 1]] * 2


def test_panoptic_stuff_is_merged_things_are_not(panoptic):
    columns = [[[0.9 if c == column else 0.1 for c in range(3)]] * 2 for column in range(3)]
    ids, segments = panoptic(class_logits(*[certain(STUFF)] * 3), mask_logits(*columns))
    assert ids == [[1, 1, 1]] * 2
    assert segments == [{"id": 1, "isthing": False, "category_id": STUFF}]
    ids, segments = panoptic(class_logits(*[certain(1)] * 3), mask_logits(*columns))
    assert ids == [[1, 2, 3]] * 2
    assert [s["id"] for s in segments] == [1, 2, 3]
    # A thing between two pieces of the same stuff.
    cls = class_logits(certain(STUFF), certain(0), certain(STUFF))
    ids, segments = panoptic(cls, mask_logits(*columns))
    assert ids == [[1, 2, 1]] * 2
    assert [s["category_id"] for s in segments] == [STUFF, 0]


@pytest.mark.parametrize(
    ("cls", "masks"),
    [
        ([certain(3)], [[[0.9] * 3] * 2]),  # no-object
        ([certain(0, 0.4)], [[[0.9] * 3] * 2]),  # score below the threshold
        ([certain(0)], [[[0.4] * 3] * 2]),  # owns everything, with an empty mask
    ],
)
def test_panoptic_no_segments(panoptic, cls, masks):
    assert panoptic(class_logits(*cls), mask_logits(*masks)) == ([[0] * 3] * 2, [])


def test_panoptic_all_dropped_by_overlap(panoptic):
    # Two queries share six pixels equally: each has 1/2 of its mask.
    cls = class_logits(certain(0), certain(1))
    masks = mask_logits([[0.9, 0.9, 0.9], [0.8] * 3], [[0.8] * 3, [0.9, 0.9, 0.9]])
    assert panoptic(cls, masks) == ([[0] * 3] * 2, [])


def test_panoptic_no_pixels_and_no_queries(panoptic):
    assert panoptic(class_logits(certain(0)), torch.zeros(1, 0, 3)) == ([], [])
    assert panoptic(torch.zeros(0, 4), torch.zeros(0, 2, 3)) == ([[0] * 3] * 2, [])


def panoptic_by_pixel(
    cls: Tensor, masks: Tensor, things: set, threshold: float, overlap: float
) -> tuple[Tensor, list]:
    """Query by query, areas counted pixel by pixel."""
    scores, labels = cls.softmax(-1).max(-1)
    kept = [q for q in range(len(cls)) if labels[q] != cls.shape[1] - 1 and scores[q] > threshold]
    height, width = masks.shape[-2:]
    ids = torch.zeros(height, width, dtype=torch.int32)
    if not kept:
        return ids, []
    probability = masks.sigmoid()
    pixels = [(y, x) for y in range(height) for x in range(width)]
    owner = {}
    for y, x in pixels:
        products = [(scores[q] * probability[q, y, x]).item() for q in kept]
        owner[y, x] = kept[products.index(max(products))]
    segments, merged = [], {}
    for q in kept:
        foreground = {(y, x) for y, x in pixels if probability[q, y, x] >= 0.5}
        owned = {pixel for pixel in pixels if owner[pixel] == q}
        if not owned or not foreground or not owned & foreground:
            continue
        if len(owned) / len(foreground) < overlap:
            continue
        label = int(labels[q])
        isthing = label in things
        if not isthing and label in merged:
            segment = merged[label]
        else:
            segment = len(segments) + 1
            merged[label] = segment
            segments.append({"id": segment, "isthing": isthing, "category_id": label})
        for y, x in owned & foreground:
            ids[y, x] = segment
    return ids, segments


def test_panoptic_equals_the_rule_pixel_by_pixel_on_random_cases(inference):
    generator = torch.Generator().manual_seed(0)
    num_segments, merged, dropped = 0, 0, 0
    for case in range(50):
        queries = case % 12 + 1
        cls = torch.randn(queries, 6, generator=generator) * 2
        # Smooth blobs, so that queries compete for whole areas.
        masks = torch.randn(queries, 3, 3, generator=generator) * 4
        masks = torch.nn.functional.interpolate(masks[None], size=(8, 11), mode="bilinear")[0]
        things, threshold, overlap = {0, 3}, (case % 4) * 0.15, (case % 5) * 0.22
        ids, segments = inference.panoptic(cls, masks, things, threshold, overlap)
        expected_ids, expected = panoptic_by_pixel(cls, masks, things, threshold, overlap)
        assert torch.equal(ids, expected_ids), case
        assert segments == expected, case
        # Every id of the map is described; a described segment has pixels.
        assert set(ids.unique().tolist()) - {0} == {s["id"] for s in segments}
        scores, labels = cls.softmax(-1).max(-1)
        candidates = int(((labels != 5) & (scores > threshold)).sum())
        num_segments += len(segments)
        dropped += candidates - len(segments)
        merged += len({s["category_id"] for s in segments}) < len(segments)
    assert num_segments > 50 and dropped > 50 and merged > 5  # the cases are not trivial


def as_rows(result) -> list[tuple]:
    rows = zip(
        result.pred_classes.tolist(),
        result.scores.tolist(),
        result.pred_masks.tolist(),
        strict=True,
    )
    return sorted(rows, key=lambda row: -row[1])


def test_instance_by_hand(inference):
    cls = class_logits([0.6, 0.3, 0.1], [0.2, 0.7, 0.1])  # two classes and no-object
    masks = mask_logits(
        [[0.9, 0.7, 0.2], [0.1, 0.1, 0.1]],  # mean foreground probability 0.8
        [[0.1, 0.5, 0.1], [0.6, 0.6, 0.6]],  # one half is background; 0.6
    )
    result = inference.instance(cls, masks, 3)
    assert result.image_size == (2, 3)
    first, second = [[1.0, 1.0, 0.0], [0.0] * 3], [[0.0] * 3, [1.0] * 3]
    rows = as_rows(result)
    # The three best of 0.7, 0.6, 0.3, 0.2, times their mask scores.
    assert [(label, mask) for label, _, mask in rows] == [(0, first), (1, second), (1, first)]
    assert [score for _, score, _ in rows] == pytest.approx([0.48, 0.42, 0.24], abs=1e-5)
    assert result.pred_masks.dtype == torch.float32
    assert result.pred_classes.dtype == torch.int64
    assert result.pred_boxes.tensor.tolist() == [[0.0] * 4] * 3


def test_instance_topk_larger_than_pairs(inference):
    cls, masks = torch.randn(2, 4), torch.randn(2, 2, 3)
    result = inference.instance(cls, masks, 100)
    assert len(result) == 6
    assert sorted(result.pred_classes.tolist()) == [0, 0, 1, 1, 2, 2]


def test_instance_things_only(inference):
    """Stuff pairs are dropped from the top k, not replaced by the next best pairs."""
    cls = class_logits([0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.6, 0.1])
    masks = mask_logits([[0.9] * 3] * 2, [[0.9] * 3] * 2)
    result = inference.instance(cls, masks, 3, thing_ids=THINGS)
    assert result.pred_classes.tolist() == [0]
    assert result.scores.tolist() == pytest.approx([0.45], abs=1e-5)
    assert len(inference.instance(cls, masks, 3)) == 3
    nothing = inference.instance(cls, masks, 3, thing_ids=set())
    assert len(nothing) == 0 and nothing.pred_masks.shape == (0, 2, 3)
    assert nothing.pred_boxes.tensor.shape == (0, 4)
    # As a metadata mapping gives them.
    assert len(inference.instance(cls, masks, 6, {5: 0, 9: 1}.values())) == 4


def test_instance_empty_mask_scores_zero(inference):
    result = inference.instance(class_logits([0.9, 0.1]), mask_logits([[0.4] * 3] * 2), 1)
    assert result.scores.tolist() == [0.0]
    assert not result.pred_masks.any()


@pytest.mark.parametrize("class_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_instances_of_mixed_precision(inference, class_dtype, mask_dtype):
    generator = torch.Generator().manual_seed(0)
    cls = torch.randn(4, 4, generator=generator).to(class_dtype)
    masks = torch.randn(4, 5, 7, generator=generator).to(mask_dtype)
    result = inference.instance(cls, masks, 100)
    expected = inference.instance(cls.float(), masks.float(), 100)
    assert result.pred_masks.dtype == torch.float32
    # Plain scores are products of class and mask scores, with the dtype of these.
    promoted = torch.promote_types(torch.promote_types(class_dtype, mask_dtype), torch.float32)
    assert result.scores.dtype == (class_dtype if inference.is_fast else promoted)
    powers = 2.0 ** torch.arange(35, dtype=torch.float64)
    order, expected_order = (
        ((r.pred_masks.flatten(1).double() @ powers) * 4 + r.pred_classes).argsort()
        for r in (result, expected)
    )
    assert torch.equal(result.pred_masks[order], expected.pred_masks[expected_order])
    torch.testing.assert_close(
        result.scores[order].float(), expected.scores[expected_order], atol=1e-2, rtol=0
    )


def test_inputs_are_not_modified(inference):
    cls, masks = torch.randn(4, 4), torch.randn(4, 2, 3)
    before = cls.clone(), masks.clone()
    inference.semantic(cls, masks)
    inference.panoptic(cls, masks, THINGS, 0.1, 0.1)
    inference.instance(cls, masks, 5, THINGS)
    assert torch.equal(cls, before[0]) and torch.equal(masks, before[1])


def test_no_queries(inference):
    cls, masks = torch.zeros(0, 4), torch.zeros(0, 2, 3)
    assert inference.semantic(cls, masks).tolist() == [[[0.0] * 3] * 2] * 3
    assert len(inference.instance(cls, masks, 5)) == 0
