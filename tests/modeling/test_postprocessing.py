"""Post-processing on examples of 2×3 pixels worked by hand, and against a plain loop.

Shape letters: Q queries, K classes, N instances, H W pixels.
"""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import sem_seg_postprocess
from torch import Tensor

from mask2former.modeling import postprocessing
from mask2former.modeling.postprocessing import (
    InstanceResult,
    PanopticResult,
    ResizedMasks,
    SemanticResult,
    instance_inference,
    panoptic_inference,
    pass_rows,
    semantic_inference,
)

THINGS = {0, 1}
STUFF = 2  # the only stuff class of K = 3; 3 is no-object


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


def panoptic(cls: Tensor, masks: Tensor, threshold: float = 0.5, overlap: float = 0.8) -> tuple:
    ids, segments = panoptic_inference(cls, masks, THINGS, threshold, overlap)
    assert ids.dtype == torch.int32
    assert ids.shape == masks.shape[-2:]
    return ids.tolist(), segments


def test_semantic_by_hand():
    cls = class_logits([0.5, 0.25, 0.25], [0.1, 0.6, 0.3])  # two classes and no-object
    masks = mask_logits([[0.5, 0.2, 0.8]] * 2, [[0.1, 1.0, 0.4]] * 2)
    out = semantic_inference(cls, masks)
    assert out.shape == (2, 2, 3)
    # First pixel: class 0 has 0.5·0.5 + 0.1·0.1, class 1 has 0.25·0.5 + 0.6·0.1.
    expected = torch.tensor([[0.26, 0.20, 0.44], [0.185, 0.65, 0.44]])
    torch.testing.assert_close(out, expected[:, None].expand(2, 2, 3))


def test_panoptic_by_hand():
    cls = class_logits(certain(0), certain(STUFF), certain(3))
    masks = mask_logits(
        [[0.9, 0.9, 0.1], [0.9, 0.6, 0.1]],
        [[0.1, 0.1, 0.8], [0.1, 0.1, 0.3]],  # wins the last pixel, but with less than 1/2
        [[0.99] * 3] * 2,  # no-object never wins
    )
    ids, segments = panoptic(cls, masks)
    assert ids == [[1, 1, 2], [1, 1, 0]]
    assert segments == [
        {"id": 1, "isthing": True, "category_id": 0},
        {"id": 2, "isthing": False, "category_id": STUFF},
    ]
    assert all(type(s["id"]) is int and type(s["isthing"]) is bool for s in segments)


def test_panoptic_winner_by_class_times_mask():
    # 0.9 · 0.6 = 0.54 loses against 0.7 · 0.8 = 0.56.
    cls = class_logits(certain(0, 0.9), certain(1, 0.7))
    ids, segments = panoptic(cls, mask_logits([[0.6] * 3] * 2, [[0.8] * 3] * 2))
    assert ids == [[1] * 3] * 2
    assert [s["category_id"] for s in segments] == [1]


def test_panoptic_object_threshold_is_exclusive():
    cls = torch.zeros(1, 4)  # probability 1/4 for every class, exactly; argmax gives class 0
    masks = mask_logits([[0.9] * 3] * 2)
    assert panoptic(cls, masks, threshold=0.25) == ([[0] * 3] * 2, [])
    ids, segments = panoptic(cls, masks, threshold=0.2499)
    assert ids == [[1] * 3] * 2 and len(segments) == 1


@pytest.mark.parametrize(("overlap", "kept"), [(0.5, True), (0.75, True), (0.76, False)])
def test_panoptic_overlap_threshold_is_strict(overlap, kept):
    # Query 0 covers four pixels and wins three of them: 0.75 is not below 0.75.
    cls = class_logits(certain(0), certain(1))
    masks = mask_logits([[0.8, 0.8, 0.1], [0.8, 0.7, 0.1]], [[0.1, 0.1, 0.9], [0.1, 0.9, 0.9]])
    ids, segments = panoptic(cls, masks, overlap=overlap)
    if kept:
        assert ids == [[1, 1, 2], [1, 2, 2]]
    else:  # nobody else gets the pixels of a dropped segment; ids stay consecutive
        assert ids == [[0, 0, 1], [0, 1, 1]]
        assert segments == [{"id": 1, "isthing": True, "category_id": 1}]


def test_panoptic_won_area_counts_pixels_below_one_half():
    # Query 0 wins four pixels, of which only two are its foreground; its foreground is three, and
    # 4 / 3 passes any threshold, although 2 / 3 would not.
    cls = class_logits(certain(0), certain(1))
    masks = mask_logits([[0.8, 0.8, 0.6], [0.4, 0.4, 0.1]], [[0.1, 0.1, 0.9], [0.1, 0.1, 0.9]])
    ids, segments = panoptic(cls, masks, overlap=1.0)
    assert ids == [[1, 1, 2], [0, 0, 2]]
    assert len(segments) == 2


def test_panoptic_one_half_is_foreground():
    cls = class_logits(certain(0))
    ids, _ = panoptic(cls, torch.tensor([[[0.0, -1e-3, 1e-3]] * 2]))
    assert ids == [[1, 0, 1]] * 2


def test_panoptic_stuff_is_merged_things_are_not():
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
        ([certain(0, 0.4)], [[[0.9] * 3] * 2]),  # not sure enough
        ([certain(0)], [[[0.4] * 3] * 2]),  # wins everything, with an empty mask
    ],
)
def test_panoptic_no_segments(cls, masks):
    assert panoptic(class_logits(*cls), mask_logits(*masks)) == ([[0] * 3] * 2, [])


def test_panoptic_all_dropped_by_overlap():
    # Two queries share six pixels equally: each has 1/2 of its mask.
    cls = class_logits(certain(0), certain(1))
    masks = mask_logits([[0.9, 0.9, 0.9], [0.8] * 3], [[0.8] * 3, [0.9, 0.9, 0.9]])
    assert panoptic(cls, masks) == ([[0] * 3] * 2, [])


def test_panoptic_no_pixels_and_no_queries():
    assert panoptic(class_logits(certain(0)), torch.zeros(1, 0, 3)) == ([], [])
    assert panoptic(torch.zeros(0, 4), torch.zeros(0, 2, 3)) == ([[0] * 3] * 2, [])


def published_panoptic_rule(
    cls: Tensor, masks: Tensor, things: set, threshold: float, overlap: float
) -> tuple[Tensor, list]:
    """One query after the other, areas counted pixel by pixel."""
    scores, labels = cls.softmax(-1).max(-1)
    kept = [q for q in range(len(cls)) if labels[q] != cls.shape[1] - 1 and scores[q] > threshold]
    height, width = masks.shape[-2:]
    ids = torch.zeros(height, width, dtype=torch.int32)
    if not kept:
        return ids, []
    probability = masks.sigmoid()
    pixels = [(y, x) for y in range(height) for x in range(width)]
    winner = {}
    for y, x in pixels:
        products = [(scores[q] * probability[q, y, x]).item() for q in kept]
        winner[y, x] = kept[products.index(max(products))]
    segments, merged = [], {}
    for q in kept:
        foreground = {(y, x) for y, x in pixels if probability[q, y, x] >= 0.5}
        won = {pixel for pixel in pixels if winner[pixel] == q}
        if not won or not foreground or not won & foreground:
            continue
        if len(won) / len(foreground) < overlap:
            continue
        label = int(labels[q])
        isthing = label in things
        if not isthing and label in merged:
            segment = merged[label]
        else:
            segment = len(segments) + 1
            merged[label] = segment
            segments.append({"id": segment, "isthing": isthing, "category_id": label})
        for y, x in won & foreground:
            ids[y, x] = segment
    return ids, segments


def test_panoptic_equals_published_rule_on_random_cases():
    generator = torch.Generator().manual_seed(0)
    num_segments, merged, dropped = 0, 0, 0
    for case in range(50):
        queries = case % 12 + 1
        cls = torch.randn(queries, 6, generator=generator) * 2
        # Smooth blobs, so that queries compete for whole areas.
        masks = torch.randn(queries, 3, 3, generator=generator) * 4
        masks = torch.nn.functional.interpolate(masks[None], size=(8, 11), mode="bilinear")[0]
        things, threshold, overlap = {0, 3}, (case % 4) * 0.15, (case % 5) * 0.22
        ids, segments = panoptic_inference(cls, masks, things, threshold, overlap)
        expected_ids, expected = published_panoptic_rule(cls, masks, things, threshold, overlap)
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


def test_instance_by_hand():
    cls = class_logits([0.6, 0.3, 0.1], [0.2, 0.7, 0.1])  # two classes and no-object
    masks = mask_logits(
        [[0.9, 0.7, 0.2], [0.1, 0.1, 0.1]],  # mean foreground probability 0.8
        [[0.1, 0.5, 0.1], [0.6, 0.6, 0.6]],  # one half is background; 0.6
    )
    result = instance_inference(cls, masks, topk=3)
    assert result.image_size == (2, 3)
    first, second = [[1.0, 1.0, 0.0], [0.0] * 3], [[0.0] * 3, [1.0] * 3]
    rows = as_rows(result)
    # The three best of 0.7, 0.6, 0.3, 0.2, then times the mask score.
    assert [(label, mask) for label, _, mask in rows] == [(0, first), (1, second), (1, first)]
    assert [score for _, score, _ in rows] == pytest.approx([0.48, 0.42, 0.24], abs=1e-5)
    assert result.pred_masks.dtype == torch.float32
    assert result.pred_classes.dtype == torch.int64
    assert result.pred_boxes.tensor.tolist() == [[0.0] * 4] * 3


def test_instance_topk_larger_than_pairs():
    cls, masks = torch.randn(2, 4), torch.randn(2, 2, 3)
    result = instance_inference(cls, masks, topk=100)
    assert len(result) == 6
    assert sorted(result.pred_classes.tolist()) == [0, 0, 1, 1, 2, 2]


def test_instance_things_only():
    """Stuff is taken out of the top-k, not replaced by the next best pair."""
    cls = class_logits([0.5, 0.1, 0.3, 0.1], [0.1, 0.2, 0.6, 0.1])
    masks = mask_logits([[0.9] * 3] * 2, [[0.9] * 3] * 2)
    result = instance_inference(cls, masks, topk=3, thing_ids=THINGS)
    assert result.pred_classes.tolist() == [0]
    assert result.scores.tolist() == pytest.approx([0.45], abs=1e-5)
    assert len(instance_inference(cls, masks, topk=3)) == 3
    nothing = instance_inference(cls, masks, topk=3, thing_ids=set())
    assert len(nothing) == 0 and nothing.pred_masks.shape == (0, 2, 3)
    assert nothing.pred_boxes.tensor.shape == (0, 4)
    # As a metadata mapping gives them.
    assert len(instance_inference(cls, masks, 6, {5: 0, 9: 1}.values())) == 4


def test_instance_empty_mask_scores_zero():
    result = instance_inference(class_logits([0.9, 0.1]), mask_logits([[0.4] * 3] * 2), topk=1)
    assert result.scores.tolist() == [0.0]
    assert not result.pred_masks.any()


@pytest.mark.parametrize("of_classes", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_masks", [torch.float16, torch.bfloat16, torch.float64])
def test_instances_of_mixed_precision(of_classes, of_masks):
    generator = torch.Generator().manual_seed(0)
    cls = torch.randn(4, 4, generator=generator).to(of_classes)
    masks = torch.randn(4, 5, 7, generator=generator).to(of_masks)
    result = instance_inference(cls, masks, 100)
    expected = instance_inference(cls.float(), masks.float(), 100)
    assert result.pred_masks.dtype == torch.float32 and result.scores.dtype == of_classes
    powers = 2.0 ** torch.arange(35, dtype=torch.float64)
    order, expected_order = (
        ((r.pred_masks.flatten(1).double() @ powers) * 4 + r.pred_classes).argsort()
        for r in (result, expected)
    )
    assert torch.equal(result.pred_masks[order], expected.pred_masks[expected_order])
    torch.testing.assert_close(
        result.scores[order].float(), expected.scores[expected_order], atol=1e-2, rtol=0
    )


def test_inputs_are_left_alone():
    cls, masks = torch.randn(4, 4), torch.randn(4, 2, 3)
    before = cls.clone(), masks.clone()
    semantic_inference(cls, masks)
    panoptic_inference(cls, masks, THINGS, 0.1, 0.1)
    instance_inference(cls, masks, 5, THINGS)
    assert torch.equal(cls, before[0]) and torch.equal(masks, before[1])


# Size of the predicted masks, of the padded batch, of the image in it, of the output.
SIZES = [
    ((16, 24), (64, 96), (64, 96), (64, 96)),
    ((16, 24), (64, 96), (50, 91), (33, 61)),  # smaller than the image
    ((16, 24), (64, 96), (50, 91), (120, 217)),  # larger
    ((16, 24), (64, 96), (50, 91), (200, 20)),  # each axis on its own
    ((2, 700), (8, 2800), (8, 2799), (8, 2799)),  # more columns than one product makes
    ((1, 1), (1, 1), (1, 1), (1, 1)),
    ((8, 8), (32, 32), (1, 1), (5, 7)),  # an image of one pixel
    ((16, 24), (62, 95), (62, 95), (62, 95)),  # not a multiple of the masks
]


def published_steps(masks: Tensor, padded: tuple, image: tuple, output: tuple) -> Tensor:
    masks = F.interpolate(masks[None], padded, mode="bilinear", align_corners=False)[0]
    return sem_seg_postprocess(masks, image, *output)


@pytest.mark.parametrize("sizes", SIZES)
def test_resized_masks_are_the_published_ones(sizes):
    masks = torch.randn(3, *sizes[0], dtype=torch.float64)
    expected = published_steps(masks, *sizes[1:])
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        resized = ResizedMasks(masks.to(dtype), *sizes[1:])
        assert resized.shape == expected.shape and resized.dtype == dtype
        torch.testing.assert_close(resized.full().double(), expected, atol=atol, rtol=0)
        height = expected.shape[1]
        middle = height // 3
        for rows in (slice(0, height), slice(0, middle + 1), slice(middle, height)):
            part = resized.rows(rows, None)
            torch.testing.assert_close(part.double(), expected[:, rows], atol=atol, rtol=0)
            part = resized.rows(rows, torch.tensor([0, 2]))
            torch.testing.assert_close(part.double(), expected[[0, 2], rows], atol=atol, rtol=0)


def test_resized_masks_of_half_precision_are_resized_in_full():
    masks = torch.randn(2, 8, 8).bfloat16()
    resized = ResizedMasks(masks, (32, 32), (32, 32), (40, 40))
    expected = published_steps(masks.float(), (32, 32), (32, 32), (40, 40))
    assert resized.rows(slice(0, 40), None).dtype == torch.float32
    torch.testing.assert_close(resized.rows(slice(0, 40), None), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("limit", [1, 1000, 10**9])
@pytest.mark.parametrize("parts", ["s", "p", "i", "pi", "spi"])
def test_one_pass_gives_what_each_method_gives(monkeypatch, limit, parts):
    """For any number of rows at a time, and whichever results share the pass."""
    monkeypatch.setattr(postprocessing, "_MAX_LOGITS", {"cuda": limit})
    torch.manual_seed(0)
    cls = torch.randn(12, 5) * 3
    sizes = (32, 44), (30, 41), (23, 57)
    masks = F.interpolate(torch.randn(1, 12, 3, 4) * 5, (8, 11), mode="bilinear")[0]
    resized = ResizedMasks(masks, *sizes)
    started = {
        "s": lambda: SemanticResult(cls, resized.shape),
        "p": lambda: PanopticResult(cls, resized.shape, THINGS, 0.3, 0.1),
        "i": lambda: InstanceResult(cls, resized.shape, 9, THINGS),
    }
    results = {name: started[name]() for name in parts}
    pass_rows(resized, results.values())
    full = published_steps(masks, *sizes)
    if "s" in parts:
        expected = torch.einsum("qc,qhw->chw", cls.softmax(-1)[:, :-1], full.sigmoid())
        torch.testing.assert_close(results["s"].finish(), expected)
    if "p" in parts:
        ids, segments = published_panoptic_rule(cls, full, THINGS, 0.3, 0.1)
        assert len(segments) > 1
        assert torch.equal(results["p"].finish()[0], ids)
        assert results["p"].finish()[1] == segments
    if "i" in parts:
        instances = results["i"].finish()
        scores, pairs = cls.softmax(-1)[:, :-1].flatten().topk(9, sorted=False)
        kept = torch.isin(pairs % 4, torch.tensor(sorted(THINGS)))
        chosen = full[pairs[kept] // 4]
        foreground = chosen > 0
        means = (chosen.sigmoid() * foreground).sum((1, 2)) / (foreground.sum((1, 2)) + 1e-6)
        assert 1 < len(instances) < 9
        assert torch.equal(instances.pred_masks, foreground.float())
        assert torch.equal(instances.pred_classes, (pairs % 4)[kept])
        torch.testing.assert_close(instances.scores, scores[kept] * means)


@pytest.mark.parametrize("limit", [1, 1000, 10**9])
def test_scores_without_the_padding(monkeypatch, limit):
    monkeypatch.setattr(postprocessing, "_MAX_LOGITS", {"cuda": limit})
    cls, masks = torch.randn(5, 4), torch.randn(5, 8, 11)
    resized = ResizedMasks(masks, (32, 44), (32, 44), (32, 44))
    result = SemanticResult(cls, torch.Size((5, 21, 37)))
    pass_rows(resized, [result])
    expected = semantic_inference(cls, resized.full())[:, :21, :37]
    torch.testing.assert_close(result.finish(), expected)


def test_memory_of_a_pass_does_not_grow_with_the_image(monkeypatch):
    """Logits are made within the limit, or a row at a time, and of needed queries only."""
    monkeypatch.setattr(postprocessing, "_MAX_LOGITS", {"cuda": 40_000})
    cls = torch.full((50, 4), -5.0)
    cls[:, 3] = 5.0
    cls[7, 0] = cls[30, 2] = 12.0
    made = []
    rows_of = ResizedMasks.rows

    def recorded(self, rows, queries):
        logits = rows_of(self, rows, queries)
        made.append((None if queries is None else queries.tolist(), logits.shape))
        return logits

    monkeypatch.setattr(ResizedMasks, "rows", recorded)
    resized = ResizedMasks(torch.randn(50, 64, 64), (256, 256), (256, 256), (256, 256))
    pass_rows(resized, [PanopticResult(cls, resized.shape, THINGS, 0.5, 0.5)])
    assert made == [([7, 30], (2, 78, 256))] * 3 + [([7, 30], (2, 22, 256))]
    made.clear()
    pass_rows(resized, [SemanticResult(cls, resized.shape)])
    assert made[0] == (None, (50, 3, 256)) and len(made) == 86
    made.clear()
    pass_rows(resized, [PanopticResult(cls, resized.shape, THINGS, 1.0, 0.5)])
    assert not made  # no query counts


def test_no_queries():
    cls, masks = torch.zeros(0, 4), torch.zeros(0, 2, 3)
    assert semantic_inference(cls, masks).tolist() == [[[0.0] * 3] * 2] * 3
    assert len(instance_inference(cls, masks, topk=5)) == 0


def test_gradients_pass_through():
    cls = torch.randn(3, 4, requires_grad=True)
    masks = torch.randn(3, 4, 4, requires_grad=True)
    resized = ResizedMasks(masks, (16, 16), (16, 16), (11, 13))
    semantic = SemanticResult(cls, resized.shape)
    instance = InstanceResult(cls, resized.shape, 5, None)
    pass_rows(resized, [semantic, instance])
    (semantic.finish().sum() + instance.finish().scores.sum()).backward()
    gradients = cls.grad.clone(), masks.grad.clone()
    cls.grad = masks.grad = None
    full = published_steps(masks, (16, 16), (16, 16), (11, 13))
    scores = semantic_inference(cls, full).sum() + instance_inference(cls, full, 5).scores.sum()
    scores.backward()
    torch.testing.assert_close((cls.grad, masks.grad), gradients)
    assert masks.grad.any() and cls.grad.any()
