"""Bipartite matching of predictions and targets (paper, section 3.3; costs on K sampled points).

Shape letters: B batch, Q queries, K classes, T targets of an image, P points, H W pixels.
"""

from typing import Any

import torch
from detectron2.projects.point_rend.point_features import point_sample
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .mask_losses import (
    batch_dice_loss,
    batch_dice_loss_jit,
    batch_sigmoid_ce_loss,
    batch_sigmoid_ce_loss_jit,
)
from .mask_predictions import mask_logits_of

__all__ = [
    "HungarianMatcher",
    "batch_dice_loss",
    "batch_dice_loss_jit",
    "batch_sigmoid_ce_loss",
    "batch_sigmoid_ce_loss_jit",
]


class HungarianMatcher(nn.Module):
    """Assign to every target the one prediction that makes the total cost least.

    Args:
        cost_class: weight of the negative class probability.
        cost_mask: weight of the binary cross-entropy of the masks.
        cost_dice: weight of the dice loss of the masks.
        num_points: points P at which masks are compared, drawn once per image and call.
    """

    def __init__(
        self,
        cost_class: float = 1,
        cost_mask: float = 1,
        cost_dice: float = 1,
        num_points: int = 0,
    ):
        super().__init__()
        if cost_class == 0 and cost_mask == 0 and cost_dice == 0:
            raise ValueError("all matching costs are 0: at least one must not be")
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.num_points = num_points

    @torch.no_grad()
    def forward(
        self, outputs: dict[str, Any], targets: list[dict[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Match one prediction layer.

        Args:
            outputs: ``pred_logits`` (B, Q, K+1) and ``pred_masks`` (B, Q, H, W) logits.
            targets: for each image ``labels`` (T,) int64 and ``masks`` (T, H', W') bool or float.

        Returns:
            For each image two int64 CPU tensors of length min(Q, T): queries, ascending, and the
            targets they are matched with.
        """
        return self.memory_efficient_forward(outputs, targets)

    @torch.no_grad()
    def memory_efficient_forward(
        self, outputs: dict[str, Any], targets: list[dict[str, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """As `forward`, the published name: masks are compared at points, not at every pixel."""
        if self.num_points <= 0:
            raise ValueError(f"num_points={self.num_points}: masks are compared at sampled points")
        indices = []
        for image, target in enumerate(targets):
            cost = self._cost(outputs, image, target).cpu()
            if not torch.isfinite(cost).all():
                raise ValueError(
                    f"matching costs of image {image} of the batch are not finite: the model's "
                    "outputs hold inf or NaN. Training has diverged: lower SOLVER.BASE_LR, or "
                    "check the images and the initial weights"
                )
            rows, columns = linear_sum_assignment(cost)
            indices.append(
                (
                    torch.as_tensor(rows, dtype=torch.int64),
                    torch.as_tensor(columns, dtype=torch.int64),
                )
            )
        return indices

    def _cost(self, outputs: dict[str, Any], image: int, target: dict[str, Tensor]) -> Tensor:
        """Cost of every pair of one image, (Q, T) float32."""
        logits = outputs["pred_logits"][image]
        # The probability of the target's class stands for its negative logarithm, after DETR.
        cost_class = -logits.softmax(-1)[:, target["labels"]]

        points = torch.rand(1, self.num_points, 2, device=logits.device)
        masks = target["masks"][:, None]
        with torch.autocast(device_type=logits.device.type, enabled=False):
            target_points = point_sample(
                masks.float(), points.expand(len(masks), -1, -1), align_corners=False
            ).squeeze(1)  # (T, P)
            predicted_points = mask_logits_of(outputs).at_points(image, points[0])  # (Q, P)
            cost_mask = batch_sigmoid_ce_loss(predicted_points, target_points)
            cost_dice = batch_dice_loss(predicted_points, target_points)
        return (
            self.cost_mask * cost_mask + self.cost_class * cost_class + self.cost_dice * cost_dice
        ).float()

    def extra_repr(self) -> str:
        return (
            f"cost_class={self.cost_class}, cost_mask={self.cost_mask}, "
            f"cost_dice={self.cost_dice}, num_points={self.num_points}"
        )
