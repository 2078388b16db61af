"""Set prediction loss: match, then cross-entropy on classes and BCE + dice on masks.

Mask losses look at P points only (paper, section 3.3): three quarters chosen where the prediction
is least certain among 3·P drawn, the rest uniformly.

The losses of all prediction layers are computed together. A subclass that changes the losses of one
layer is asked layer by layer.

Shape letters: L prediction layers, B batch, Q queries, K classes, T targets of an image, N matched
masks of an image over all layers, M those of the batch, P points, H W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.projects.point_rend.point_features import point_sample
from detectron2.utils.comm import get_world_size
from torch import Tensor, nn

from ..utils.misc import is_dist_avail_and_initialized, nested_tensor_from_tensor_list
from .mask_losses import (
    calculate_uncertainty,
    dice_loss,
    dice_loss_jit,
    dice_loss_of_each,
    sigmoid_ce_loss,
    sigmoid_ce_loss_jit,
    sigmoid_ce_loss_of_each,
)
from .mask_predictions import LayeredMasks
from .matcher import HungarianMatcher, Indices, Targets
from .point_sampling import TargetMasks, max_elements, sample_uncertain_points
from .recompute import recomputed

__all__ = [
    "SetCriterion",
    "calculate_uncertainty",
    "dice_loss",
    "dice_loss_jit",
    "sigmoid_ce_loss",
    "sigmoid_ce_loss_jit",
]

# Candidate points looked at in one go: they are the largest temporaries, and on a CPU fewer stay
# in its caches.
_MAX_CANDIDATES = {"cpu": 2**20, "cuda": 2**24}


class MatchedPairs:
    """The matched pairs of all layers as index tensors, by image, then layer: (M,) int64 each.

    They are put together on the host and travel to the device in one copy, without a wait.

    Args:
        indices: for each layer what a matcher returns.
        targets: what was matched.
        num_queries: Q.
        device: where the index tensors are wanted.
    """

    def __init__(
        self, indices: Sequence[Indices], targets: Targets, num_queries: int, device: torch.device
    ):
        # For each image and layer, how many pairs.
        self.num_rows = [[len(layer[i][0]) for layer in indices] for i in range(len(targets))]
        pieces, first_label = [], 0
        for image, target in enumerate(targets):
            for number, layer in enumerate(indices):
                query, wanted = (x.cpu() for x in layer[image])
                constant = torch.tensor([[number], [image]]).expand(-1, len(query))
                row = number * num_queries + query
                pieces.append(
                    torch.cat((constant, torch.stack((row, wanted, first_label + wanted))))
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


def _losses_at_points(logits: Tensor, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """BCE and dice of masks (N, 1, H, W) at points (N, P, 2) with labels (N, P), (N,) each."""
    at_points = point_sample(logits, points, align_corners=False)[:, 0]  # (N, P)
    return sigmoid_ce_loss_of_each(at_points, labels), dice_loss_of_each(at_points, labels)


class SetCriterion(nn.Module):
    """The losses of every prediction layer, unweighted.

    Args:
        num_classes: K, without the no-object class.
        matcher: maps (outputs, targets) to matched indices, see `HungarianMatcher`.
        weight_dict: weight of each named loss; kept for the model, which applies it.
        eos_coef: weight of the no-object class in the cross-entropy.
        losses: which of "labels" and "masks" to compute.
        num_points: P, points per matched mask.
        oversample_ratio: candidates drawn per point chosen by uncertainty, at least 1.
        importance_sample_ratio: part of the points chosen by uncertainty, in [0, 1].
    """

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        eos_coef: float,
        losses: list[str],
        num_points: int,
        oversample_ratio: float,
        importance_sample_ratio: float,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.eos_coef = eos_coef
        self.losses = losses
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio

    def loss_labels(
        self, outputs: dict[str, Any], targets: Targets, indices: Indices, num_masks: float
    ) -> dict[str, Tensor]:
        """Weighted cross-entropy over all queries; unmatched ones are to say no-object.

        Returns:
            ``loss_ce``, a scalar.
        """
        pairs = self._pairs([outputs], targets, [indices])
        return {k: v[0] for k, v in self._label_losses([outputs], targets, pairs).items()}

    def loss_masks(
        self, outputs: dict[str, Any], targets: Targets, indices: Indices, num_masks: float
    ) -> dict[str, Tensor]:
        """Point-sampled mask losses of matched pairs.

        Returns:
            ``loss_mask`` and ``loss_dice``, scalars.
        """
        pairs = self._pairs([outputs], targets, [indices])
        losses = self._mask_losses([outputs], targets, pairs)
        return {k: v[0] / num_masks for k, v in losses.items()}

    @staticmethod
    def _pairs(
        layers: Sequence[dict[str, Any]], targets: Targets, indices: Sequence[Indices]
    ) -> MatchedPairs:
        logits = layers[0]["pred_logits"]
        return MatchedPairs(indices, targets, logits.shape[1], logits.device)

    def _label_losses(
        self, layers: Sequence[dict[str, Any]], targets: Targets, pairs: MatchedPairs
    ) -> dict[str, Tensor]:
        """``loss_ce`` of every layer, (L,)."""
        logits = torch.stack([outputs["pred_logits"] for outputs in layers], 1).float()
        logits = logits.flatten(1, 2)  # (B, L·Q, K+1)
        classes = torch.full(
            logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device
        )
        classes[pairs.image, pairs.row] = torch.cat([t["labels"] for t in targets])[pairs.label]
        losses = F.cross_entropy(
            logits.transpose(1, 2), classes, self.empty_weight, reduction="none"
        )
        # A mean over the queries of a layer, each with the weight of its class.
        losses, weights = (
            x.unflatten(1, (len(layers), -1)).sum((0, 2))
            for x in (losses, self.empty_weight[classes])
        )
        return {"loss_ce": losses / weights}

    def _mask_losses(
        self, layers: Sequence[dict[str, Any]], targets: Targets, pairs: MatchedPairs
    ) -> dict[str, Tensor]:
        """``loss_mask`` and ``loss_dice`` of every layer, summed over its masks, (L,)."""
        masks = LayeredMasks(layers)
        target_masks = self._target_masks(targets)
        num_candidates = max(1, int(self.num_points * self.oversample_ratio))
        chunk = max(1, max_elements(_MAX_CANDIDATES, pairs.row.device) // num_candidates)
        losses_mask, losses_dice = [], []
        for image, rows in enumerate(pairs.by_image(pairs.row)):
            # Full-size masks exist for matched queries only.
            logits = masks.select(image, rows, pairs.num_rows[image])[:, None].float()
            wanted = pairs.by_image(pairs.target)[image]
            sampler = TargetMasks(target_masks[image])
            for part, indices in zip(logits.split(chunk), wanted.split(chunk), strict=True):
                with torch.no_grad():
                    points = sample_uncertain_points(
                        part, self.num_points, self.oversample_ratio, self.importance_sample_ratio
                    )  # (N, P, 2)
                    labels = sampler.at(indices, points)
                loss_mask, loss_dice = recomputed(_losses_at_points, part, points, labels)
                losses_mask.append(loss_mask)
                losses_dice.append(loss_dice)
        # Adding up with index_add would differ from run to run on a GPU, and a matrix product would
        # be in half precision under autocast.
        member = pairs.layer == torch.arange(len(layers), device=pairs.layer.device)[:, None]
        return {
            "loss_mask": (member * torch.cat(losses_mask)).sum(1),
            "loss_dice": (member * torch.cat(losses_dice)).sum(1),
        }

    @staticmethod
    def _target_masks(targets: Targets) -> Sequence[Tensor]:
        """Target masks of each image, (T, H', W'), padded to one size."""
        masks = [t["masks"] for t in targets]
        if len({m.shape[1:] for m in masks}) > 1:
            padded = nested_tensor_from_tensor_list(masks).tensors
            return [p[: len(m)] for p, m in zip(padded, masks, strict=True)]
        return masks

    def _get_src_permutation_idx(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """(image, query) of every matched pair, two (N,) tensors."""
        batch = torch.cat([torch.full_like(i, image) for image, (i, _) in enumerate(indices)])
        return batch, torch.cat([i for i, _ in indices])

    def _get_tgt_permutation_idx(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """(image, target) of every matched pair, two (N,) tensors."""
        batch = torch.cat([torch.full_like(j, image) for image, (_, j) in enumerate(indices)])
        return batch, torch.cat([j for _, j in indices])

    def get_loss(
        self,
        loss: str,
        outputs: dict[str, Any],
        targets: Targets,
        indices: Indices,
        num_masks: float,
    ) -> dict[str, Tensor]:
        """The named loss, "labels" or "masks"."""
        self._check_loss(loss)
        function = self.loss_labels if loss == "labels" else self.loss_masks
        return function(outputs, targets, indices, num_masks)

    @staticmethod
    def _check_loss(loss: str) -> None:
        if loss not in ("labels", "masks"):
            raise ValueError(f"loss {loss!r} is not one of ['labels', 'masks']")

    def forward(self, outputs: dict[str, Any], targets: Targets) -> dict[str, Tensor]:
        """Compute all losses.

        Args:
            outputs: ``pred_logits`` (B, Q, K+1), ``pred_masks`` (B, Q, H, W) logits and, with deep
                supervision, ``aux_outputs``: a list of the same two for each earlier prediction.
            targets: for each image ``labels`` (T,) int64 and ``masks`` (T, H', W').

        Returns:
            Scalars ``loss_ce``, ``loss_mask``, ``loss_dice`` of the last prediction, and with a
            suffix ``_0``, ``_1``, … of the earlier ones.
        """
        if len(targets) != len(outputs["pred_logits"]):
            raise ValueError(f"{len(targets)} targets for {len(outputs['pred_logits'])} images")
        num_masks = self._average_num_masks(targets, outputs["pred_logits"].device)
        layers = [outputs, *outputs.get("aux_outputs", [])]
        if isinstance(self.matcher, HungarianMatcher):
            indices = self.matcher.match_layers(layers, targets)
        else:
            indices = [self.matcher(layer, targets) for layer in layers]
        one_layer = ("get_loss", "loss_labels", "loss_masks")
        if all(getattr(type(self), f) is getattr(SetCriterion, f) for f in one_layer):
            losses = self._all_losses(layers, targets, indices, num_masks)
        else:
            losses = [
                self._layer_losses(*of_layer, targets, num_masks)
                for of_layer in zip(layers, indices, strict=True)
            ]
        result = dict(losses[0])
        for i, layer in enumerate(losses[1:]):
            result.update({f"{name}_{i}": value for name, value in layer.items()})
        return result

    def _all_losses(
        self,
        layers: Sequence[dict[str, Any]],
        targets: Targets,
        indices: Sequence[Indices],
        num_masks: float,
    ) -> list[dict[str, Tensor]]:
        """What `_layer_losses` gives for each layer, computed together."""
        pairs = self._pairs(layers, targets, indices)
        losses: dict[str, Tensor] = {}
        for loss in self.losses:
            self._check_loss(loss)
            if loss == "labels":
                losses.update(self._label_losses(layers, targets, pairs))
            else:
                sums = self._mask_losses(layers, targets, pairs)
                losses.update({name: values / num_masks for name, values in sums.items()})
        split = {name: values.unbind() for name, values in losses.items()}
        return [{name: split[name][i] for name in losses} for i in range(len(layers))]

    def _layer_losses(
        self, outputs: dict[str, Any], indices: Indices, targets: Targets, num_masks: float
    ) -> dict[str, Tensor]:
        losses = {}
        for loss in self.losses:
            losses.update(self.get_loss(loss, outputs, targets, indices, num_masks))
        return losses

    @staticmethod
    def _average_num_masks(targets: Targets, device: torch.device) -> float:
        """Target masks per worker, averaged over workers, at least 1."""
        num_masks = sum(len(t["labels"]) for t in targets)
        if is_dist_avail_and_initialized():
            total = torch.as_tensor([num_masks], dtype=torch.float, device=device)
            torch.distributed.all_reduce(total)
            num_masks = total.item() / get_world_size()
        return max(float(num_masks), 1.0)

    def extra_repr(self) -> str:
        return (
            f"losses={self.losses}, weight_dict={self.weight_dict}, "
            f"num_classes={self.num_classes}, eos_coef={self.eos_coef}, "
            f"num_points={self.num_points}, oversample_ratio={self.oversample_ratio}, "
            f"importance_sample_ratio={self.importance_sample_ratio}"
        )
