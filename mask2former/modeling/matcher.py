"""Bipartite matching of predictions and targets (paper, section 3.3; costs on K sampled points).

All prediction layers and images are matched in one go: their costs are computed on the device and
copied to the host once, where scipy solves them.

Shape letters: L prediction layers, B batch, Q queries, K classes, T targets of an image, P points,
H W pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from .mask_losses import (
    batch_dice_loss,
    batch_dice_loss_jit,
    batch_sigmoid_ce_loss,
    batch_sigmoid_ce_loss_jit,
)
from .mask_predictions import LayeredMasks
from .point_sampling import PointTable

__all__ = [
    "HungarianMatcher",
    "batch_dice_loss",
    "batch_dice_loss_jit",
    "batch_sigmoid_ce_loss",
    "batch_sigmoid_ce_loss_jit",
]

Indices = list[tuple[Tensor, Tensor]]
Targets = list[dict[str, Tensor]]


class HungarianMatcher(nn.Module):
    """Assign to every target the one prediction that makes the total cost least.

    Args:
        cost_class: weight of the negative class probability.
        cost_mask: weight of the binary cross-entropy of the masks.
        cost_dice: weight of the dice loss of the masks.
        num_points: points P at which masks are compared, drawn for every image.
            Layers matched together are compared at the same points.
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
    def forward(self, outputs: dict[str, Any], targets: Targets) -> Indices:
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
    def memory_efficient_forward(self, outputs: dict[str, Any], targets: Targets) -> Indices:
        """As `forward`, the published name: masks are compared at points, not at every pixel."""
        return self._match([outputs], targets)[0]

    @torch.no_grad()
    def match_layers(self, layers: Sequence[dict[str, Any]], targets: Targets) -> list[Indices]:
        """Match several prediction layers at once.

        Args:
            layers: for each layer a dict as `forward` takes it.
            targets: as `forward` takes them.

        Returns:
            For each layer what `forward` returns. Subclasses that change the matching of one layer
            are asked layer by layer.
        """
        one_layer = ("forward", "memory_efficient_forward")
        if all(getattr(type(self), f) is getattr(HungarianMatcher, f) for f in one_layer):
            return self._match(layers, targets)
        return [self(outputs, targets) for outputs in layers]

    def _match(self, layers: Sequence[dict[str, Any]], targets: Targets) -> list[Indices]:
        if self.num_points <= 0:
            raise ValueError(f"num_points={self.num_points}: masks are compared at sampled points")
        costs = self._costs(layers, targets).cpu().numpy()  # the only wait for the device
        finite = np.isfinite(costs).all((0, 2, 3))
        if not finite.all():
            raise ValueError(
                f"matching costs of image {finite.argmin()} of the batch are not finite: the "
                "model's outputs hold inf or NaN. Training has diverged: lower SOLVER.BASE_LR, or "
                "check the images and the initial weights"
            )
        return [
            [
                tuple(
                    torch.as_tensor(index, dtype=torch.int64)
                    for index in linear_sum_assignment(cost[:, : len(target["labels"])])
                )
                for cost, target in zip(layer, targets, strict=True)
            ]
            for layer in costs
        ]

    def _costs(self, layers: Sequence[dict[str, Any]], targets: Targets) -> Tensor:
        """Costs of all pairs (L, B, Q, max T) float32; zero beyond the targets of an image."""
        logits = torch.stack([outputs["pred_logits"] for outputs in layers])  # (L, B, Q, K+1)
        num_layers, _, num_queries, _ = logits.shape
        most = max((len(target["labels"]) for target in targets), default=0)
        costs = logits.new_zeros(num_layers, len(targets), num_queries, most, dtype=torch.float32)
        points = torch.rand(len(targets), self.num_points, 2, device=logits.device)
        masks = LayeredMasks(layers)
        # The probability of the target's class stands for its negative logarithm, after DETR.
        probabilities = logits.float().softmax(-1)
        with torch.autocast(device_type=logits.device.type, enabled=False):
            for image, target in enumerate(targets):
                labels = target["labels"]
                if len(labels) == 0:
                    continue
                wanted = PointTable(target["masks"]).at(points[image]).T  # (T, P)
                for chunk, predicted in masks.at_points(image, points[image]):
                    costs[chunk, image, :, : len(labels)] = (
                        self.cost_mask * batch_sigmoid_ce_loss(predicted, wanted)
                        - self.cost_class * probabilities[chunk, image].index_select(-1, labels)
                        + self.cost_dice * batch_dice_loss(predicted, wanted)
                    )
        return costs

    def extra_repr(self) -> str:
        return (
            f"cost_class={self.cost_class}, cost_mask={self.cost_mask}, "
            f"cost_dice={self.cost_dice}, num_points={self.num_points}"
        )
