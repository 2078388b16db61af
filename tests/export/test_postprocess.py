"""Exportable post-processing gives what the model's post-processing gives."""

import pytest
import torch

from mask2former.export.postprocess import instance_masks, panoptic_segments, semantic_labels
from mask2former.modeling import postprocessing

THINGS = torch.tensor([True, True, False, False])


def predictions(seed, num_queries=12, num_classes=4):
    """Class logits (B, Q, K+1) and mask logits (B, Q, H, W) of two images."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, num_queries, num_classes + 1, generator=generator) * 3
    masks = torch.randn(2, num_queries, 5, 7, generator=generator) * 2
    return logits, masks + torch.randn(2, num_queries, 1, 1, generator=generator) * 3


@pytest.mark.parametrize("seed", range(8))
def test_panoptic_is_that_of_the_model(seed):
    logits, masks = predictions(seed)
    pixels, ids, labels, scores = panoptic_segments(logits, masks, THINGS, 0.3, 0.6)
    for image in range(2):
        expected, segments = postprocessing.panoptic_inference(
            logits[image], masks[image], {0, 1}, 0.3, 0.6
        )
        assert torch.equal(pixels[image], expected)
        for segment in segments:
            queries = (ids[image] == segment["id"]).nonzero()[:, 0]
            assert set(labels[image, queries].tolist()) == {segment["category_id"]}
        assert ids[image].max() == len(segments)
    assert scores.shape == (2, 12)


def test_panoptic_without_objects_is_empty():
    logits = torch.zeros(1, 3, 5)
    logits[..., -1] = 9
    pixels, ids, labels, _ = panoptic_segments(logits, torch.ones(1, 3, 2, 2), THINGS, 0.3, 0.8)
    assert not pixels.any() and not ids.any()
    assert labels.tolist() == [[4, 4, 4]]


def test_stuff_of_one_class_is_one_segment():
    logits = torch.full((1, 2, 5), -9.0)
    logits[:, :, 2] = 9
    masks = torch.tensor([[[[5.0, -5.0]], [[-5.0, 5.0]]]])  # (1, 2, 1, 2)
    pixels, ids, _, _ = panoptic_segments(logits, masks, THINGS, 0.3, 0.8)
    assert pixels.tolist() == [[[1, 1]]] and ids.tolist() == [[1, 1]]


@pytest.mark.parametrize("things", [None, THINGS])
def test_instances_are_those_of_the_model(things):
    logits, masks = predictions(3)
    scores, labels, found = instance_masks(logits, masks, 6, things)
    for image in range(2):
        expected = postprocessing.instance_inference(
            logits[image], masks[image], 6, None if things is None else {0, 1}
        )
        keep = torch.ones(6, dtype=torch.bool) if things is None else things[labels[image]]
        assert not scores[image][~keep].any()
        order = scores[image][keep].argsort(descending=True)
        wanted = expected.scores.argsort(descending=True)
        torch.testing.assert_close(scores[image][keep][order], expected.scores[wanted])
        assert torch.equal(labels[image][keep][order], expected.pred_classes[wanted])
        assert torch.equal(found[image][keep][order].float(), expected.pred_masks[wanted])


def test_semantic_is_that_of_the_model():
    logits, masks = predictions(5)
    (labels,) = semantic_labels(logits, masks)
    for image in range(2):
        expected = postprocessing.semantic_inference(logits[image], masks[image]).argmax(0)
        assert torch.equal(labels[image].long(), expected)
