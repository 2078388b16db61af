"""Post-processing as functions of fixed output shapes, which exporters can trace.

They compute what `modeling/postprocessing.py` does, for a batch, at the size of the input images.
Padding counts as image: cut it off afterwards. Loops over segments are sums over queries, and the
results have an entry for each query or each of the N best pairs, with a flag or score.

Shape letters: B batch, Q queries, K classes, N instances, h w size of mask logits, H W image size.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..maskformer_model import MaskFormer
from .network import ExportNetwork


def semantic_labels(logits: Tensor, masks: Tensor) -> tuple[Tensor]:
    """Class logits (B, Q, K+1) and mask logits (B, Q, H, W) → labels (B, H, W) int32."""
    class_probs = logits.softmax(-1)[..., :-1]
    scores = torch.einsum("bqk,bqhw->bkhw", class_probs, masks.sigmoid())
    return (scores.argmax(1).to(torch.int32),)


def instance_masks(
    logits: Tensor, masks: Tensor, topk: int, things: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The N most probable (query, class) pairs, N = min(topk, Q·K).

    Args:
        logits: (B, Q, K+1) class logits.
        masks: (B, Q, H, W) mask logits.
        topk: number of pairs, before classes are filtered.
        things: (K,) bool, the classes to keep; None keeps all.

    Returns:
        scores (B, N), 0 for pairs of other classes; labels (B, N) int64; masks (B, N, H, W) bool.
    """
    scores = logits.softmax(-1)[..., :-1]
    num_queries, num_classes = scores.shape[1:]
    scores, pairs = scores.flatten(1).topk(min(topk, num_queries * num_classes), dim=1)
    labels = pairs % num_classes
    queries = torch.div(pairs, num_classes, rounding_mode="floor")
    probs = masks.sigmoid()
    foreground = masks > 0
    area = foreground.to(probs.dtype).sum((2, 3))
    quality = (probs * foreground).sum((2, 3)) / (area + 1e-6)  # (B, Q)
    scores = scores * quality.gather(1, queries)
    if things is not None:
        scores = scores * things[labels]
    index = queries[:, :, None, None].expand(-1, -1, masks.shape[2], masks.shape[3])
    return scores, labels, foreground.gather(1, index)


def panoptic_segments(
    logits: Tensor,
    masks: Tensor,
    things: Tensor,
    object_mask_threshold: float,
    overlap_threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assign each pixel to a query, drop hidden segments, merge stuff.

    Args:
        logits: (B, Q, K+1) class logits.
        masks: (B, Q, H, W) mask logits.
        things: (K,) bool.
        object_mask_threshold, overlap_threshold: see `postprocessing.panoptic_inference`.

    Returns:
        segment ids (B, H, W) int32, 0 where no segment is; for each query the id of its segment
        (B, Q) int32, 0 for none; its label (B, Q) int64; its class probability (B, Q).
    """
    num_queries, num_classes = logits.shape[1], logits.shape[2] - 1
    scores, labels = logits.softmax(-1).max(-1)  # (B, Q)
    keep = (labels != num_classes) & (scores > object_mask_threshold)
    probs = masks.sigmoid()
    weighted = torch.where(keep, scores, torch.full_like(scores, -1.0))[..., None, None] * probs
    owner = weighted.argmax(1, keepdim=True)  # (B, 1, H, W)
    queries = torch.arange(num_queries, device=logits.device)
    owned = (owner == queries[:, None, None]) & keep[..., None, None]  # (B, Q, H, W)
    inside = probs >= 0.5
    shown = owned & inside
    areas = [x.to(torch.float32).sum((2, 3)) for x in (owned, inside, shown)]
    owned_area, own_area, shown_area = areas
    valid = (shown_area > 0) & (owned_area >= overlap_threshold * own_area)
    # The first valid query of a stuff class stands for all of them.
    same_stuff = (labels[:, :, None] == labels[:, None, :]) & ~things[
        labels.clamp(max=num_classes - 1)
    ][:, :, None]
    earlier = queries[None, :] < queries[:, None]  # (Q, Q)
    joins = same_stuff & earlier & valid[:, None, :] & valid[:, :, None]
    is_new = valid & ~joins.any(2)
    numbers = is_new.to(torch.int64).cumsum(1)  # (B, Q)
    first = torch.where(joins.any(2), joins.to(torch.int64).argmax(2), queries)
    ids = torch.where(valid, numbers.gather(1, first), torch.zeros_like(numbers))
    pixels = (shown * ids[..., None, None]).sum(1)
    return pixels.to(torch.int32), ids.to(torch.int32), labels, scores


OUTPUTS = {
    "semantic": ("semantic_labels",),
    "instance": ("scores", "labels", "masks"),
    "panoptic": ("segment_ids", "query_segments", "query_labels", "query_scores"),
}


class PostprocessedNetwork(ExportNetwork):
    """Backbone, head and the post-processing of one task, with the model's thresholds."""

    things: Tensor | None

    def __init__(self, model: nn.Module, task: str, dtype: torch.dtype = torch.float32):
        super().__init__(model, dtype)
        assert isinstance(model, MaskFormer)
        self.task = task
        self.outputs = OUTPUTS[task]
        self.topk = model.test_topk_per_image
        self.thresholds = model.object_mask_threshold, model.overlap_threshold
        things = None
        if task == "panoptic" or (task == "instance" and model.panoptic_on):
            things = _thing_mask(model._thing_ids(), model.sem_seg_head.num_classes)
        self.register_buffer("things", things, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs of `OUTPUTS` for normalised images (B, C, H, W)."""
        logits, masks = super().forward(images)
        size = (images.shape[2], images.shape[3])
        masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        if self.task == "semantic":
            return semantic_labels(logits, masks)
        if self.task == "instance":
            return instance_masks(logits, masks, self.topk, self.things)
        assert self.things is not None
        return panoptic_segments(logits, masks, self.things, *self.thresholds)


def _thing_mask(thing_ids: Collection[int], num_classes: int) -> Tensor:
    return torch.tensor([label in thing_ids for label in range(num_classes)])
