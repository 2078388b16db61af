"""Resizing by rows, and results streamed together: same numbers, bounded memory, gradients.

Shape letters: Q queries, K classes, N instances, H W pixels.
"""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import sem_seg_postprocess
from torch import Tensor

from mask2former.fast import postprocessing
from mask2former.fast.postprocessing import (
    InstanceResult,
    PanopticResult,
    ResizedMasks,
    SemanticResult,
    stream_rows,
)
from mask2former.modeling.postprocessing import (
    instance_inference,
    panoptic_inference,
    semantic_inference,
)

THINGS = {0, 1}

# Size of the predicted masks, of the padded batch, of the image in it, of the output.
SIZES = [
    ((16, 24), (64, 96), (64, 96), (64, 96)),
    ((16, 24), (64, 96), (50, 91), (33, 61)),  # smaller than the image
    ((16, 24), (64, 96), (50, 91), (120, 217)),  # larger
    ((16, 24), (64, 96), (50, 91), (200, 20)),  # each axis on its own
    ((2, 700), (8, 2800), (8, 2799), (8, 2799)),  # more columns than one product computes
    ((1, 1), (1, 1), (1, 1), (1, 1)),
    ((8, 8), (32, 32), (1, 1), (5, 7)),  # an image of one pixel
    ((16, 24), (62, 95), (62, 95), (62, 95)),  # not a multiple of the masks
]


def resize_in_steps(masks: Tensor, padded: tuple, image: tuple, output: tuple) -> Tensor:
    """To the padded batch, crop the image, to the output."""
    masks = F.interpolate(masks[None], padded, mode="bilinear", align_corners=False)[0]
    return sem_seg_postprocess(masks, image, *output)


@pytest.mark.parametrize("sizes", SIZES)
def test_resized_masks_equal_the_plain_steps(sizes):
    masks = torch.randn(3, *sizes[0], dtype=torch.float64)
    expected = resize_in_steps(masks, *sizes[1:])
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        resized = ResizedMasks(masks.to(dtype), *sizes[1:])
        assert resized.shape == expected.shape and resized.dtype == dtype
        torch.testing.assert_close(resized.full().double(), expected, atol=atol, rtol=0)
        part = resized.full(torch.tensor([0, 2]))
        torch.testing.assert_close(part.double(), expected[[0, 2]], atol=atol, rtol=0)
        height = expected.shape[1]
        middle = height // 3
        for rows in (slice(0, height), slice(0, middle + 1), slice(middle, height)):
            part = resized.rows(rows, None)
            torch.testing.assert_close(part.double(), expected[:, rows], atol=atol, rtol=0)
            part = resized.rows(rows, torch.tensor([0, 2]))
            torch.testing.assert_close(part.double(), expected[[0, 2], rows], atol=atol, rtol=0)


def test_masks_of_half_precision_are_resized_in_float32():
    masks = torch.randn(2, 8, 8).bfloat16()
    resized = ResizedMasks(masks, (32, 32), (32, 32), (40, 40))
    expected = resize_in_steps(masks.float(), (32, 32), (32, 32), (40, 40))
    assert resized.rows(slice(0, 40), None).dtype == torch.float32
    torch.testing.assert_close(resized.rows(slice(0, 40), None), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("limit", [1, 1000, 10**9])
@pytest.mark.parametrize("parts", ["s", "p", "i", "pi", "spi"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_results_streamed_together_equal_the_plain_functions(monkeypatch, limit, parts, device):
    """For any number of rows at a time and any set of results, resized as on each device."""
    monkeypatch.setattr(postprocessing, "_MAX_LOGITS", {"cuda": limit})
    torch.manual_seed(0)
    cls = torch.randn(12, 5) * 3
    sizes = (32, 44), (30, 41), (23, 57)
    masks = F.interpolate(torch.randn(1, 12, 3, 4) * 5, (8, 11), mode="bilinear")[0]
    resized = ResizedMasks(masks, *sizes)
    resized.device = torch.device(device)
    started = {
        "s": lambda: SemanticResult(cls, resized.shape),
        "p": lambda: PanopticResult(cls, resized.shape, THINGS, 0.3, 0.1),
        "i": lambda: InstanceResult(cls, resized.shape, 9, THINGS),
    }
    results = {name: started[name]() for name in parts}
    stream_rows(resized, results.values())
    full = resize_in_steps(masks, *sizes)
    if "s" in parts:
        expected = torch.einsum("qc,qhw->chw", cls.softmax(-1)[:, :-1], full.sigmoid())
        torch.testing.assert_close(results["s"].finish(), expected)
    if "p" in parts:
        ids, segments = panoptic_inference(cls, full, THINGS, 0.3, 0.1)
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
def test_semantic_scores_without_the_padding(monkeypatch, limit):
    monkeypatch.setattr(postprocessing, "_MAX_LOGITS", {"cuda": limit})
    cls, masks = torch.randn(5, 4), torch.randn(5, 8, 11)
    resized = ResizedMasks(masks, (32, 44), (32, 44), (32, 44))
    result = SemanticResult(cls, torch.Size((5, 21, 37)))
    stream_rows(resized, [result])
    expected = semantic_inference(cls, resized.full())[:, :21, :37]
    torch.testing.assert_close(result.finish(), expected)


def test_memory_does_not_grow_with_the_image(monkeypatch):
    """Logits are computed within the limit, at least one row, of needed queries only."""
    monkeypatch.setattr(postprocessing, "_MAX_LOGITS", {"cuda": 40_000})
    cls = torch.full((50, 4), -5.0)
    cls[:, 3] = 5.0
    cls[7, 0] = cls[30, 2] = 12.0
    computed = []
    rows_of = ResizedMasks.rows

    def recorded(self, rows, queries):
        logits = rows_of(self, rows, queries)
        computed.append((None if queries is None else queries.tolist(), logits.shape))
        return logits

    monkeypatch.setattr(ResizedMasks, "rows", recorded)
    resized = ResizedMasks(torch.randn(50, 64, 64), (256, 256), (256, 256), (256, 256))
    stream_rows(resized, [PanopticResult(cls, resized.shape, THINGS, 0.5, 0.5)])
    assert computed == [([7, 30], (2, 78, 256))] * 3 + [([7, 30], (2, 22, 256))]
    computed.clear()
    stream_rows(resized, [SemanticResult(cls, resized.shape)])
    assert computed[0] == (None, (50, 3, 256)) and len(computed) == 86
    computed.clear()
    stream_rows(resized, [PanopticResult(cls, resized.shape, THINGS, 1.0, 0.5)])
    assert not computed  # no query takes part


@pytest.mark.parametrize(("image", "limit"), [((50, 91), 3 * 64 * 96), ((20, 30), 3 * 80 * 90)])
def test_a_gpu_resizes_what_fits_in_the_plain_steps(monkeypatch, image, limit):
    """Neither the padded batch nor the output may be larger than the limit."""
    called = []
    monkeypatch.setattr(ResizedMasks, "full", lambda self, queries: called.append("full"))
    monkeypatch.setattr(ResizedMasks, "rows", lambda self, rows, queries: called.append("rows"))
    monkeypatch.setattr(postprocessing, "_AxisMatrix", None)  # none is made
    output = image if image == (50, 91) else (80, 90)
    for device, allowed, expected in (
        ("cuda", limit, ["full"]),
        ("cuda", limit - 1, ["rows"]),
        ("cpu", limit, ["rows"]),
    ):
        limits = {"cpu": allowed, "cuda": allowed}
        monkeypatch.setattr(postprocessing, "_MAX_LOGITS", limits)
        resized = ResizedMasks(torch.randn(3, 16, 24), (64, 96), image, output)
        resized.device = torch.device(device)
        with pytest.raises(AttributeError):
            stream_rows(resized, [SemanticResult(torch.randn(3, 4), resized.shape)])
        assert called == expected
        called.clear()


def test_gradients_equal_those_of_the_plain_functions():
    cls = torch.randn(3, 4, requires_grad=True)
    masks = torch.randn(3, 4, 4, requires_grad=True)
    resized = ResizedMasks(masks, (16, 16), (16, 16), (11, 13))
    semantic = SemanticResult(cls, resized.shape)
    instance = InstanceResult(cls, resized.shape, 5, None)
    stream_rows(resized, [semantic, instance])
    (semantic.finish().sum() + instance.finish().scores.sum()).backward()
    gradients = cls.grad.clone(), masks.grad.clone()
    cls.grad = masks.grad = None
    full = resize_in_steps(masks, (16, 16), (16, 16), (11, 13))
    scores = semantic_inference(cls, full).sum() + instance_inference(cls, full, 5).scores.sum()
    scores.backward()
    torch.testing.assert_close((cls.grad, masks.grad), gradients)
    assert masks.grad.any() and cls.grad.any()
