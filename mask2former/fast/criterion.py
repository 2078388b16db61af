"""Matching and losses of all prediction layers together.

All layers of an image share the matching points, so features are sampled once and one product gives
the masks of several layers. All costs are copied to the host at once. Full-size masks exist for
matched queries only.

Shape letters: L prediction layers, B batch, Q queries, K classes, T targets of an image, N matched
masks of an image in all layers, M matched masks of the batch in all layers, P points, H W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.criterion import (
    AVERAGE_NUM_MASKS,
    SetCriterion,
    begin_average_num_masks,
    ignored_regions,
)
from ..modeling.layers.point_sampling import hide_ignored, labelled_at, point_sample
from ..modeling.mask_losses import (
    batch_dice_loss,
    batch_sigmoid_ce_loss,
    dice_losses,
    sigmoid_ce_losses,
    to_default_dtype,
)
from ..modeling.matcher import HungarianMatcher, Indices, Targets, assign
from ..utils.misc import nested_tensor_from_tensor_list
from ..utils.twins import runs_fast, why_hooked, why_touched
from .checkpointing import checkpointed
from .mask_factors import LayeredMasks, MaskFactors
from .point_sampling import BilinearSampler, TargetMasks, max_elements, sample_uncertain_points

# Candidate points per chunk: the largest temporaries, which on a CPU should fit the cache.
_MAX_CANDIDATES = {"cpu": 2**20, "cuda": 2**24}


def match(matcher: HungarianMatcher, outputs: dict[str, Any], targets: Targets) -> Indices:
    """Twin of `HungarianMatcher.forward`."""
    return match_layers(matcher, [outputs], targets)[0]


@torch.no_grad()
def match_layers(matcher: Any, layers: Sequence[dict[str, Any]], targets: Targets) -> list[Indices]:
    """What `HungarianMatcher.forward` returns, for several prediction layers at once."""
    if matcher.num_points <= 0:
        raise ValueError(f"num_points={matcher.num_points}: masks are compared at sampled points")
    costs = _matching_costs(matcher, layers, targets).cpu()  # the only host sync
    return [
        [
            assign(cost[:, : len(target["labels"])], image)
            for image, (cost, target) in enumerate(zip(layer, targets, strict=True))
        ]
        for layer in costs
    ]


def _matching_costs(
    matcher: HungarianMatcher, layers: Sequence[dict[str, Any]], targets: Targets
) -> Tensor:
    """Costs of all pairs (L, B, Q, max T); zero beyond the targets of an image."""
    logits = to_default_dtype(torch.stack([outputs["pred_logits"] for outputs in layers]))
    num_layers, _, num_queries, _ = logits.shape
    max_targets = max((len(target["labels"]) for target in targets), default=0)
    costs = logits.new_zeros(num_layers, len(targets), num_queries, max_targets)
    points = torch.rand(len(targets), matcher.num_points, 2, device=logits.device)
    masks = LayeredMasks(layers)
    class_probs = logits.softmax(-1)  # (L, B, Q, K+1)
    with torch.autocast(device_type=logits.device.type, enabled=False):
        for image, target in enumerate(targets):
            labels = target["labels"]
            if len(labels) == 0:
                continue
            gt_masks = BilinearSampler(target["masks"], costs.dtype).at(points[image]).T  # (T, P)
            weights = labelled_at(target["ignored"], points[image]) if "ignored" in target else None
            for chunk, pred_masks in masks.at_points(image, points[image]):
                costs[chunk, image, :, : len(labels)] = (
                    matcher.cost_mask * batch_sigmoid_ce_loss(pred_masks, gt_masks, weights)
                    - matcher.cost_class * class_probs[chunk, image].index_select(-1, labels)
                    + matcher.cost_dice * batch_dice_loss(pred_masks, gt_masks, weights)
                )
    return costs


class MatchedPairs:
    """The matched pairs of all layers as index tensors (M,) int64, sorted by image, then layer.

    They are assembled on the host and copied to the device at once, without a host sync.

    Args:
        indices: for each layer what a matcher returns.
        targets: the targets that were matched.
        num_queries: Q.
        device: of the index tensors.
    """

    def __init__(
        self, indices: Sequence[Indices], targets: Targets, num_queries: int, device: torch.device
    ):
        # For each image and layer, the number of pairs.
        self.num_rows = [[len(layer[i][0]) for layer in indices] for i in range(len(targets))]
        pieces, first_label = [], 0
        for image, target in enumerate(targets):
            for number, layer in enumerate(indices):
                query, matched = (x.cpu() for x in layer[image])
                constant = torch.tensor([[number], [image]]).expand(-1, len(query))
                row = number * num_queries + query
                pieces.append(
                    torch.cat((constant, torch.stack((row, matched, first_label + matched))))
                )
            first_label += len(target["labels"])
        packed = torch.cat(pieces, 1)
        if device.type == "cuda":
            packed = packed.pin_memory()
        packed = packed.to(device, non_blocking=True)
        self.layer, self.image, self.row, self.target, self.label = packed

    def by_image(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Split an index tensor into the parts of the images."""
        return indices.split([sum(counts) for counts in self.num_rows])


def losses(criterion: SetCriterion, outputs: dict[str, Any], targets: Targets) -> dict[str, Tensor]:
    """Twin of `SetCriterion.forward`; `pred_masks` may be `MaskFactors`."""
    if len(targets) != len(outputs["pred_logits"]):
        raise ValueError(f"{len(targets)} targets for {len(outputs['pred_logits'])} images")
    layers = [outputs, *outputs.get("aux_outputs", [])]
    device = outputs["pred_logits"].device
    whole = criterion._whole_batch
    # Begun before matching, whose host sync then serves both.
    replaced = why_touched(criterion, SetCriterion, {"average_num_masks": AVERAGE_NUM_MASKS})
    if whole is not None:
        whole.add(targets)
        average = whole.num_masks
    else:
        average = None if replaced else begin_average_num_masks(targets, device)
    matcher = criterion.matcher
    if runs_fast(matcher) and why_hooked(matcher) is None:
        indices = match_layers(matcher, layers, targets)
    else:
        layers = [_dense(layer) for layer in layers]
        if "aux_outputs" in outputs:
            layers[0] = {**layers[0], "aux_outputs": layers[1:]}
        indices = [matcher(layer, targets) for layer in layers]

    num_masks = average() if average else criterion.average_num_masks(targets, device)
    num_queries = outputs["pred_logits"].shape[1]
    if whole is not None:
        for layer_indices in indices:
            whole.check_matched(targets, layer_indices, num_queries)
    pairs = MatchedPairs(indices, targets, num_queries, device)
    per_loss = []
    for loss in criterion.losses:
        if loss == "labels":
            per_loss.append(_label_losses(criterion, layers, targets, pairs))
        elif loss == "masks":
            per_loss.append(_mask_losses(criterion, layers, targets, pairs, num_masks))
        else:
            layers = [_dense(layer) for layer in layers]
            per_loss.append(
                [
                    criterion.get_loss(loss, layer, targets, layer_indices, num_masks)
                    for layer, layer_indices in zip(layers, indices, strict=True)
                ]
            )
    result: dict[str, Tensor] = {}
    for i, per_layer in enumerate(zip(*per_loss, strict=True)):
        suffix = f"_{i - 1}" if i else ""
        for values in per_layer:
            result.update({name + suffix: value for name, value in values.items()})
    return result


def _dense(outputs: dict[str, Any]) -> dict[str, Any]:
    """A prediction layer whose masks are a tensor."""
    masks = outputs["pred_masks"]
    return outputs | {"pred_masks": masks.full()} if isinstance(masks, MaskFactors) else outputs


def _label_losses(
    criterion: SetCriterion,
    layers: Sequence[dict[str, Any]],
    targets: Targets,
    pairs: MatchedPairs,
) -> list[dict[str, Tensor]]:
    """What `SetCriterion.loss_labels` returns for each layer."""
    logits = to_default_dtype(torch.stack([outputs["pred_logits"] for outputs in layers], 1))
    logits = logits.flatten(1, 2)  # (B, L·Q, K+1)
    classes = torch.full(
        logits.shape[:2], criterion.num_classes, dtype=torch.int64, device=logits.device
    )
    classes[pairs.image, pairs.row] = torch.cat([t["labels"] for t in targets])[pairs.label]
    class_weight = criterion.empty_weight.to(logits.dtype)
    per_query = F.cross_entropy(logits.transpose(1, 2), classes, class_weight, reduction="none")
    # Mean over the queries of each layer, weighted by class.
    sums, weights = (
        x.unflatten(1, (len(layers), -1)).sum((0, 2)) for x in (per_query, class_weight[classes])
    )
    if criterion._whole_batch is not None:
        num_queries = logits.shape[1] // len(layers)
        weights = criterion._whole_batch.class_weight_sum(class_weight, num_queries)
    return _per_layer({"loss_ce": sums / weights})


def _mask_losses(
    criterion: SetCriterion,
    layers: Sequence[dict[str, Any]],
    targets: Targets,
    pairs: MatchedPairs,
    num_masks: float,
) -> list[dict[str, Tensor]]:
    """What `SetCriterion.loss_masks` returns for each layer."""
    masks = LayeredMasks(layers)
    num_candidates = max(1, int(criterion.num_points * criterion.oversample_ratio))
    chunk = max(1, max_elements(_MAX_CANDIDATES, pairs.row.device) // num_candidates)
    sampling = (
        criterion.num_points,
        criterion.oversample_ratio,
        criterion.importance_sample_ratio,
    )
    regions = ignored_regions(targets) or [None] * len(targets)
    ce_losses, dice = [], []
    for image, (rows, target_masks) in enumerate(
        zip(pairs.by_image(pairs.row), _target_masks(targets), strict=True)
    ):
        # Full-size masks exist for matched queries only.
        logits = to_default_dtype(masks.select(image, rows, pairs.num_rows[image]))[:, None]
        matched = pairs.by_image(pairs.target)[image]
        sampler = TargetMasks(target_masks)
        ignored = regions[image]
        for part, indices in zip(logits.split(chunk), matched.split(chunk), strict=True):
            with torch.no_grad():
                seen = part if ignored is None else hide_ignored(part, ignored)
                points = sample_uncertain_points(seen, *sampling)  # (N, P, 2)
                at_points = [sampler.at(indices, points)]
                if ignored is not None:
                    at_points.append(labelled_at(ignored, points))
            part_ce, part_dice = checkpointed(
                criterion, _losses_at_points, part, points, *at_points
            )
            ce_losses.append(part_ce)
            dice.append(part_dice)
    # index_add would not be deterministic on a GPU, and autocast would run a matrix product in half
    # precision.
    layer_mask = pairs.layer == torch.arange(len(layers), device=pairs.layer.device)[:, None]
    return _per_layer(
        {
            "loss_mask": (layer_mask * torch.cat(ce_losses)).sum(1) / num_masks,
            "loss_dice": (layer_mask * torch.cat(dice)).sum(1) / num_masks,
        }
    )


def _losses_at_points(
    logits: Tensor, points: Tensor, labels: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """BCE and dice of masks (N, 1, H, W) at points (N, P, 2), (N,) each.

    Args:
        labels, weights: (N, P), see `dice_losses`.
    """
    at_points = point_sample(logits, points, align_corners=False)[:, 0]  # (N, P)
    return sigmoid_ce_losses(at_points, labels, weights), dice_losses(at_points, labels, weights)


def _target_masks(targets: Targets) -> Sequence[Tensor]:
    """Target masks of each image, (T, H', W'), padded to one size."""
    masks = [t["masks"] for t in targets]
    if len({m.shape[1:] for m in masks}) > 1:
        padded = nested_tensor_from_tensor_list(masks).tensors
        return [p[: len(m)] for p, m in zip(padded, masks, strict=True)]
    return masks


def _per_layer(losses: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Losses (L,) by name → a dict of scalars for each layer.

    Copies, because callers change losses in place, which the views of `unbind` do not allow.
    """
    split = {name: [value.clone() for value in values] for name, values in losses.items()}
    return [dict(zip(split, values, strict=True)) for values in zip(*split.values(), strict=True)]
