"""Bipartite matching of predictions and targets (paper, section 3.3; costs on K sampled points).

Shape letters: B batch, Q queries, K classes, T targets of an image, P points, H W pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from detectron2.projects.point_rend.point_features import point_sample
from detectron2.utils.registry import Registry
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ..utils.twins import has_fast_twin
from .layers.point_sampling import labelled_at
from .mask_losses import (
    batch_dice_loss,
    batch_dice_loss_jit,
    batch_sigmoid_ce_loss,
    batch_sigmoid_ce_loss_jit,
    to_default_dtype,
)

__all__ = [
    "MATCHER_REGISTRY",
    "HungarianMatcher",
    "NonFiniteCosts",
    "batch_dice_loss",
    "batch_dice_loss_jit",
    "batch_sigmoid_ce_loss",
    "batch_sigmoid_ce_loss_jit",
]

Indices = list[tuple[Tensor, Tensor]]
Targets = list[dict[str, Tensor]]
# Images whose costs were not finite; None: these are errors.
_tolerated: ContextVar[list[int] | None] = ContextVar("tolerated", default=None)
# Of a micro-batch, in its batch.
_first_image: ContextVar[int] = ContextVar("first_image", default=0)

MATCHER_REGISTRY = Registry("MATCHER")
MATCHER_REGISTRY.__doc__ = """
Registry of matchers, named by `MODEL.MASK_FORMER.MATCHER_NAME`.

A registered class is called with the keywords cost_class, cost_mask, cost_dice and num_points. The
module it returns maps (outputs, targets) to indices, see `HungarianMatcher.forward`.
"""


@MATCHER_REGISTRY.register()
class HungarianMatcher(nn.Module):
    """Assign each target to one prediction such that the total cost is minimal.

    Args:
        cost_class: weight of the negative class probability.
        cost_mask: weight of the binary cross-entropy of the masks.
        cost_dice: weight of the dice loss of the masks.
        num_points: number of points P at which masks are compared, drawn anew for every image.
    """

    _shown: tuple[str, ...] = ("cost_class", "cost_mask", "cost_dice", "num_points")  # in the repr

    def __init__(
        self,
        cost_class: float = 1,
        cost_mask: float = 1,
        cost_dice: float = 1,
        num_points: int = 0,
    ):
        super().__init__()
        if cost_class == 0 and cost_mask == 0 and cost_dice == 0:
            raise ValueError("all matching costs are 0: set at least one of them")
        self.cost_class = cost_class
        self.cost_mask = cost_mask
        self.cost_dice = cost_dice
        self.num_points = num_points

    @torch.no_grad()
    @has_fast_twin
    def forward(self, outputs: dict[str, Any], targets: Targets) -> Indices:
        """Match one prediction layer.

        Args:
            outputs: `pred_logits` (B, Q, K+1) and `pred_masks` (B, Q, H, W) logits.
            targets: for each image `labels` (T,) int64 and `masks` (T, H', W') bool or float;
                optionally `ignored` (H', W') bool, pixels at which masks are not compared.

        Returns:
            For each image two int64 CPU tensors of length min(Q, T): queries in ascending order,
            and the target of each.
        """
        return self.memory_efficient_forward(outputs, targets)

    @torch.no_grad()
    def memory_efficient_forward(self, outputs: dict[str, Any], targets: Targets) -> Indices:
        """Same as `forward`: masks are compared at P points, not at every pixel."""
        indices = []
        for image, target in enumerate(targets):
            # -p(class) approximates the negative log-likelihood, as in DETR.
            class_probs = to_default_dtype(outputs["pred_logits"][image]).softmax(-1)  # (Q, K+1)
            cost_class = -class_probs[:, target["labels"]]

            masks = [outputs["pred_masks"][image], target["masks"]]
            if "ignored" in target:
                masks.append(target["ignored"])
            with torch.autocast(class_probs.device.type, enabled=False):
                cost_mask, cost_dice = self.mask_costs(*masks)
            cost = (
                self.cost_mask * cost_mask
                + self.cost_class * cost_class
                + self.cost_dice * cost_dice
            )  # (Q, T)
            indices.append(assign(cost.cpu(), image))
        return indices

    def mask_costs(
        self, mask_logits: Tensor, target_masks: Tensor, ignored: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compare all predictions of an image with all its targets, at P points.

        Args:
            mask_logits: (Q, H, W).
            target_masks: (T, H', W').
            ignored: (H', W') bool; points there do not count.

        Returns:
            Binary cross-entropy and dice loss of all pairs, (Q, T) each.
        """
        if self.num_points <= 0:
            raise ValueError(f"num_points={self.num_points}: masks are compared at sampled points")
        points = torch.rand(1, self.num_points, 2, device=mask_logits.device)
        pred_masks = _sample(mask_logits, points)  # (Q, P)
        gt_masks = _sample(target_masks.to(pred_masks), points)  # (T, P)
        if ignored is None:
            return (
                batch_sigmoid_ce_loss_jit(pred_masks, gt_masks),
                batch_dice_loss_jit(pred_masks, gt_masks),
            )
        weights = labelled_at(ignored, points[0])  # (P,)
        return (
            batch_sigmoid_ce_loss_jit(pred_masks, gt_masks, weights),
            batch_dice_loss_jit(pred_masks, gt_masks, weights),
        )

    def __repr__(self, _repr_indent: int = 4) -> str:
        body = [f"{name}: {getattr(self, name)}" for name in self._shown]
        indent = " " * _repr_indent
        return "\n".join([f"Matcher {type(self).__name__}", *(indent + line for line in body)])


def _sample(masks: Tensor, points: Tensor) -> Tensor:
    """Sample masks (N, H, W) at the same points (1, P, 2) → (N, P)."""
    masks = to_default_dtype(masks)[:, None]
    return point_sample(masks, points.expand(len(masks), -1, -1), align_corners=False)[:, 0]


class NonFiniteCosts(ValueError):
    """Costs of an assignment problem that are NaN or infinite."""


@contextmanager
def tolerate_non_finite_costs() -> Iterator[list[int]]:
    """Let `assign` take costs that are not finite as 0, so that the forward pass ends.

    Losses are still those of the model's outputs. Training that skips such iterations needs it: all
    ranks of a job must take part in all of its communication.

    Yields:
        A list that gets the image of each such problem.
    """
    images: list[int] = []
    token = _tolerated.set(images)
    try:
        yield images
    finally:
        _tolerated.reset(token)


@contextmanager
def images_from(first: int) -> Iterator[None]:
    """Let `assign` number the images of a micro-batch as in the batch.

    Args:
        first: index in the batch of the micro-batch's first image.
    """
    token = _first_image.set(first)
    try:
        yield
    finally:
        _first_image.reset(token)


def assign(cost: Tensor, image: int) -> tuple[Tensor, Tensor]:
    """Solve the assignment problem of one image.

    Args:
        cost: (Q, T) on the CPU.
        image: index in the batch, or in the micro-batch within `images_from`, for the error.

    Returns:
        Queries, ascending, and the target of each, int64.

    Raises:
        NonFiniteCosts: a cost is NaN or infinite, outside of `tolerate_non_finite_costs`.
    """
    image += _first_image.get()
    is_finite = torch.isfinite(cost)
    tolerated = _tolerated.get()
    if tolerated is not None and not is_finite.all():
        tolerated.append(image)
        cost = cost.where(is_finite, 0)
    elif not is_finite.all():
        raise NonFiniteCosts(
            f"matching costs of image {image} of the batch are not finite: the model's outputs "
            "hold inf or NaN. Training has diverged: lower SOLVER.BASE_LR, or check the images and "
            "the initial weights"
        )
    queries, targets = linear_sum_assignment(cost)
    return torch.as_tensor(queries, dtype=torch.int64), torch.as_tensor(targets, dtype=torch.int64)
