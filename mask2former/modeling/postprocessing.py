"""From class and mask logits to semantic, panoptic and instance segmentation.

Pure functions over one image (paper, appendix on inference; the panoptic rule is MaskFormer's).

Shape letters: Q queries, K classes, S kept queries, N instances, H W pixels.
"""

from collections.abc import Collection
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor


def semantic_inference(mask_cls: Tensor, mask_pred: Tensor) -> Tensor:
    """Marginalise over queries: class probability times mask probability, summed.

    Args:
        mask_cls: (Q, K+1) class logits, no-object last.
        mask_pred: (Q, H, W) mask logits.

    Returns:
        (K, H, W) scores, not normalised.
    """
    probabilities = mask_cls.softmax(dim=-1)[..., :-1]
    return torch.einsum("qc,qhw->chw", probabilities, mask_pred.sigmoid())


def panoptic_inference(
    mask_cls: Tensor,
    mask_pred: Tensor,
    thing_ids: Collection[int],
    object_mask_threshold: float,
    overlap_threshold: float,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Give every pixel to the query with the highest class × mask probability, then filter.

    Queries count when their class is not no-object and its probability is above
    ``object_mask_threshold``. A query's segment is dropped when the part of its mask (probability
    at least one half) that it won is below ``overlap_threshold``. Segments of the same stuff class
    are merged.

    Args:
        mask_cls: (Q, K+1) class logits, no-object last.
        mask_pred: (Q, H, W) mask logits.
        thing_ids: contiguous ids of the thing classes.
        object_mask_threshold: in [0, 1].
        overlap_threshold: in [0, 1].

    Returns:
        (H, W) int32 segment ids, 0 where there is none, and for each segment a dict with ``id``
        (from 1), ``isthing`` and ``category_id`` (contiguous).
    """
    num_classes = mask_cls.shape[-1] - 1
    scores, labels = mask_cls.softmax(dim=-1).max(-1)
    keep = labels.ne(num_classes) & (scores > object_mask_threshold)
    classes = labels[keep].tolist()
    masks = mask_pred[keep].sigmoid()  # (S, H, W)
    panoptic_seg = torch.zeros(mask_pred.shape[-2:], dtype=torch.int32, device=mask_pred.device)
    segments_info: list[dict[str, Any]] = []
    if not classes or panoptic_seg.numel() == 0:
        return panoptic_seg, segments_info

    winner = (scores[keep].view(-1, 1, 1) * masks).argmax(0)  # (H, W)
    foreground = masks >= 0.5
    inside = foreground.gather(0, winner[None])[0]  # (H, W): the winner's own mask covers the pixel
    num_kept = len(classes)
    # One copy to the host for the areas of all segments.
    won, original, visible = torch.stack(
        (
            torch.bincount(winner.flatten(), minlength=num_kept),
            foreground.flatten(1).sum(1),
            torch.bincount(winner[inside], minlength=num_kept),
        )
    ).tolist()

    segment_of_query = [0] * num_kept
    segment_of_stuff: dict[int, int] = {}
    for query, category in enumerate(classes):
        if visible[query] == 0 or won[query] / original[query] < overlap_threshold:
            continue
        is_thing = category in thing_ids
        if not is_thing and category in segment_of_stuff:
            segment_of_query[query] = segment_of_stuff[category]
            continue
        segment = len(segments_info) + 1
        segment_of_query[query] = segment
        if not is_thing:
            segment_of_stuff[category] = segment
        segments_info.append({"id": segment, "isthing": is_thing, "category_id": category})
    lookup = torch.tensor(segment_of_query, dtype=torch.int32, device=winner.device)
    panoptic_seg[inside] = lookup[winner[inside]]
    return panoptic_seg, segments_info


def instance_inference(
    mask_cls: Tensor,
    mask_pred: Tensor,
    topk: int,
    thing_ids: Collection[int] | None = None,
) -> Instances:
    """The ``topk`` most probable (query, class) pairs as instances.

    The score is class probability × mean mask probability over the mask's foreground.

    Args:
        mask_cls: (Q, K+1) class logits, no-object last.
        mask_pred: (Q, H, W) mask logits.
        topk: how many pairs to take, before classes are filtered.
        thing_ids: contiguous ids of the classes to keep; all when None.

    Returns:
        Instances with ``pred_masks`` (N, H, W) float 0 or 1, ``pred_boxes`` (zeros: masks are the
        prediction), ``scores`` (N,) and ``pred_classes`` (N,), in no particular order.
    """
    scores = mask_cls.softmax(dim=-1)[:, :-1]
    num_queries, num_classes = scores.shape
    scores, pairs = scores.flatten().topk(min(topk, num_queries * num_classes), sorted=False)
    classes = pairs % num_classes
    queries = torch.div(pairs, num_classes, rounding_mode="floor")
    if thing_ids is not None:
        things = torch.tensor(sorted(thing_ids), dtype=classes.dtype, device=classes.device)
        keep = torch.isin(classes, things)
        scores, classes, queries = scores[keep], classes[keep], queries[keep]

    masks = mask_pred[queries]  # (N, H, W)
    result = Instances(tuple(mask_pred.shape[-2:]))
    result.pred_masks = (masks > 0).float()
    result.pred_boxes = Boxes(torch.zeros(len(masks), 4))
    foreground = result.pred_masks.flatten(1)
    mask_scores = (masks.sigmoid().flatten(1) * foreground).sum(1) / (foreground.sum(1) + 1e-6)
    result.scores = scores * mask_scores
    result.pred_classes = classes
    return result
