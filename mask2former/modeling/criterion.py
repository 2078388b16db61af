"""Set prediction loss: match, then cross-entropy on classes and BCE + dice on masks.

Mask losses look at K points only (paper, section 3.3): three quarters chosen where the prediction
is least certain among 3·K drawn, the rest uniformly.

Shape letters: B batch, Q queries, K classes, T targets of an image, N matched masks of the batch,
P points, H W pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.projects.point_rend.point_features import (
    get_uncertain_point_coords_with_randomness,
    point_sample,
)
from detectron2.utils.comm import get_world_size
from torch import Tensor, nn

from ..utils.misc import is_dist_avail_and_initialized, nested_tensor_from_tensor_list
from .mask_losses import (
    calculate_uncertainty,
    dice_loss,
    dice_loss_jit,
    sigmoid_ce_loss,
    sigmoid_ce_loss_jit,
)
from .mask_predictions import mask_logits_of

__all__ = [
    "SetCriterion",
    "calculate_uncertainty",
    "dice_loss",
    "dice_loss_jit",
    "sigmoid_ce_loss",
    "sigmoid_ce_loss_jit",
]

Indices = list[tuple[Tensor, Tensor]]
Targets = list[dict[str, Tensor]]


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
        logits = outputs["pred_logits"].float()
        queries = self._get_src_permutation_idx(indices)
        matched = torch.cat([t["labels"][j] for t, (_, j) in zip(targets, indices, strict=True)])
        classes = torch.full(
            logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device
        )
        classes[queries] = matched
        return {"loss_ce": F.cross_entropy(logits.transpose(1, 2), classes, self.empty_weight)}

    def loss_masks(
        self, outputs: dict[str, Any], targets: Targets, indices: Indices, num_masks: float
    ) -> dict[str, Tensor]:
        """Point-sampled mask losses of matched pairs.

        Returns:
            ``loss_mask`` and ``loss_dice``, scalars.
        """
        # Full-size masks exist for matched queries only.
        masks = mask_logits_of(outputs).select([i for i, _ in indices])[:, None]  # (N, 1, H, W)
        target_masks = self._matched_target_masks(targets, indices).to(masks)[:, None]
        with torch.no_grad():
            points = get_uncertain_point_coords_with_randomness(
                masks,
                calculate_uncertainty,
                self.num_points,
                self.oversample_ratio,
                self.importance_sample_ratio,
            )  # (N, P, 2)
            point_labels = point_sample(target_masks, points, align_corners=False).squeeze(1)
        point_logits = point_sample(masks, points, align_corners=False).squeeze(1)  # (N, P)
        return {
            "loss_mask": sigmoid_ce_loss(point_logits, point_labels, num_masks),
            "loss_dice": dice_loss(point_logits, point_labels, num_masks),
        }

    @staticmethod
    def _matched_target_masks(targets: Targets, indices: Indices) -> Tensor:
        """Target masks in the order of the matched queries, (N, H', W')."""
        masks = [t["masks"] for t in targets]
        if len({m.shape[1:] for m in masks}) > 1:
            masks = nested_tensor_from_tensor_list(masks).tensors
        return torch.cat([m[j] for m, (_, j) in zip(masks, indices, strict=True)])

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
        functions = {"labels": self.loss_labels, "masks": self.loss_masks}
        if loss not in functions:
            raise ValueError(f"loss {loss!r} is not one of {sorted(functions)}")
        return functions[loss](outputs, targets, indices, num_masks)

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
        losses = self._layer_losses(outputs, targets, num_masks)
        for i, aux_outputs in enumerate(outputs.get("aux_outputs", [])):
            layer = self._layer_losses(aux_outputs, targets, num_masks)
            losses.update({f"{name}_{i}": value for name, value in layer.items()})
        return losses

    def _layer_losses(
        self, outputs: dict[str, Any], targets: Targets, num_masks: float
    ) -> dict[str, Tensor]:
        indices = self.matcher(outputs, targets)
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
