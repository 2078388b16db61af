"""From class and mask logits to semantic, panoptic and instance segmentation.

Each function works on one image with masks at output size (paper, appendix on inference; the
panoptic rule is MaskFormer's).

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
    class_probs = mask_cls.softmax(-1)[:, :-1]
    return torch.einsum("qk,qhw->khw", class_probs, mask_pred.sigmoid())


def panoptic_inference(
    mask_cls: Tensor,
    mask_pred: Tensor,
    thing_ids: Collection[int],
    object_mask_threshold: float,
    overlap_threshold: float,
    *,
    with_scores: bool = False,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Assign each pixel to the query with the highest class × mask probability, then filter.

    Args:
        mask_cls: (Q, K+1) class logits, no-object last.
        mask_pred: (Q, H, W) mask logits.
        thing_ids: contiguous ids of the thing classes.
        object_mask_threshold: class probability in [0, 1] above which a query takes part, unless
            its class is no-object.
        overlap_threshold: a segment is dropped if it keeps less than this share, in [0, 1], of its
            own mask (probability at least one half).
        with_scores: give segments a `score`.

    Returns:
        (H, W) int32 segment ids, 0 where no segment is, and for each segment a dict with `id` (from
        1), `isthing` and `category_id` (contiguous). Segments of one stuff class are merged. The
        optional `score` is the class probability in [0, 1], the highest of merged segments.
    """
    scores, labels = mask_cls.softmax(-1).max(-1)
    keep = labels.ne(mask_cls.shape[-1] - 1) & (scores > object_mask_threshold)
    scores, classes = scores[keep], labels[keep].tolist()  # (S,)
    mask_probs = mask_pred[keep].sigmoid()  # (S, H, W)

    panoptic_seg = torch.zeros(mask_pred.shape[-2:], dtype=torch.int32, device=mask_pred.device)
    segments_info: list[dict[str, Any]] = []
    if len(classes) == 0:
        return panoptic_seg, segments_info

    owner = (scores.view(-1, 1, 1) * mask_probs).argmax(0)  # (H, W)
    stuff_segments: dict[int, int] = {}
    for k, (category_id, score) in enumerate(zip(classes, scores.tolist(), strict=True)):
        owned, mask = owner == k, mask_probs[k] >= 0.5
        segment = owned & mask
        if not segment.any() or owned.sum() / mask.sum() < overlap_threshold:
            continue
        is_thing = category_id in thing_ids
        if not is_thing and category_id in stuff_segments:
            panoptic_seg[segment] = stuff_segments[category_id]
            if with_scores:
                merged = segments_info[stuff_segments[category_id] - 1]
                merged["score"] = max(merged["score"], score)
            continue
        segment_id = len(segments_info) + 1
        panoptic_seg[segment] = segment_id
        if not is_thing:
            stuff_segments[category_id] = segment_id
        segments_info.append({"id": segment_id, "isthing": is_thing, "category_id": category_id})
        if with_scores:
            segments_info[-1]["score"] = score
    return panoptic_seg, segments_info


def instance_inference(
    mask_cls: Tensor,
    mask_pred: Tensor,
    topk: int,
    thing_ids: Collection[int] | None = None,
    *,
    with_boxes: bool = False,
) -> Instances:
    """The `topk` most probable (query, class) pairs as instances.

    The score is the class probability times the mean mask probability over the mask's foreground.

    Args:
        mask_cls: (Q, K+1) class logits, no-object last.
        mask_pred: (Q, H, W) mask logits.
        topk: number of pairs, before classes are filtered.
        thing_ids: contiguous ids of the classes to keep; None keeps all.
        with_boxes: make boxes from the masks.

    Returns:
        Instances with `pred_masks` (N, H, W) float 0 or 1, `pred_boxes` (zeros without
        `with_boxes`: the mask is the prediction), `scores` (N,) and `pred_classes` (N,), in no
        particular order.
    """
    scores = mask_cls.softmax(-1)[:, :-1]
    num_classes = scores.shape[1]
    scores, pairs = scores.flatten().topk(min(topk, scores.numel()), sorted=False)
    labels = pairs % num_classes
    queries = torch.div(pairs, num_classes, rounding_mode="floor")
    if thing_ids is not None:
        things = torch.tensor(sorted(thing_ids), dtype=labels.dtype, device=labels.device)
        keep = torch.isin(labels, things)
        scores, labels, queries = scores[keep], labels[keep], queries[keep]
    mask_pred = mask_pred[queries]  # (N, H, W)

    result = Instances(tuple(mask_pred.shape[-2:]))
    result.pred_masks = (mask_pred > 0).float()
    result.pred_boxes = Boxes(torch.zeros(len(mask_pred), 4))
    if with_boxes:
        result.pred_boxes = boxes_of(mask_pred.gt(0).any(2), mask_pred.gt(0).any(1))
    foreground = result.pred_masks.flatten(1)
    mask_probs = mask_pred.sigmoid().flatten(1)
    mask_scores = (mask_probs * foreground).sum(1) / (foreground.sum(1) + 1e-6)
    result.scores = scores * mask_scores
    result.pred_classes = labels
    return result


def boxes_of(rows: Tensor, columns: Tensor) -> Boxes:
    """The tight boxes of masks, in pixels: x0 y0 x1 y1 = 3 5 4 6 for column 3 and row 5 alone.

    Args:
        rows: (N, H) bool, whether a row of the mask has foreground.
        columns: (N, W) bool, the same of columns.

    Returns:
        N boxes, float32; all 0 for a mask without foreground.
    """
    if not rows.shape[1] or not columns.shape[1]:
        return Boxes(rows.new_zeros(len(rows), 4, dtype=torch.float32))
    # The first of several largest values counts.
    x0, y0 = columns.int().argmax(1), rows.int().argmax(1)
    x1 = columns.shape[1] - columns.flip(1).int().argmax(1)
    y1 = rows.shape[1] - rows.flip(1).int().argmax(1)
    boxes = torch.stack((x0, y0, x1, y1), dim=1).float()
    return Boxes(boxes * rows.any(1, keepdim=True))
