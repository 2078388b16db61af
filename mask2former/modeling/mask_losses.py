"""Mask losses on points or pixels: binary cross-entropy, focal and dice, matched and pairwise.

The matched forms are training losses (paper, section 4.1; focal: MaskFormer, section 4.2); the
pairwise forms are matching costs.

Weights of points, 1 or 0, leave points out: pixels without a label. Without points a loss is 0.

Shape letters: N matched masks, Q predicted masks, T target masks, P points; … is any batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

# Of the focal loss: weight of the foreground and exponent, as in RetinaNet.
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


def to_default_dtype(x: Tensor) -> Tensor:
    """Compute costs and losses in the default dtype (float32), whatever the model's precision.

    Random points have the default dtype, and sampling needs logits of the same.
    """
    return x.to(torch.get_default_dtype())


def dice_losses(inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Dice loss of each matched mask, smoothed by 1 in numerator and denominator.

    Args:
        inputs: (N, P) logits.
        targets: (N, P) in [0, 1].
        weights: (N, P) of 0 and 1; None: all 1.

    Returns:
        (N,).
    """
    inputs = inputs.sigmoid().flatten(1)
    if weights is not None:
        inputs, targets = inputs * weights, targets * weights
    numerator = 2 * (inputs * targets).sum(-1)
    denominator = inputs.sum(-1) + targets.sum(-1)
    return 1 - (numerator + 1) / (denominator + 1)


def sigmoid_ce_losses(inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of each matched mask, averaged over points; as `dice_losses`."""
    losses = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    return _mean_over_points(losses, weights)


def sigmoid_focal_losses(inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Focal loss of each matched mask, averaged over points; as `dice_losses`.

    A point of foreground has the loss -alpha (1 - p)^gamma ln p, one of background
    -(1 - alpha) p^gamma ln(1 - p).
    """
    return _mean_over_points(sigmoid_focal_loss(inputs, targets, FOCAL_ALPHA, FOCAL_GAMMA), weights)


def _mean_over_points(losses: Tensor, weights: Tensor | None) -> Tensor:
    """(N, P) → (N,); weights as in `dice_losses`."""
    if weights is None:
        return losses.mean(1)
    return (losses * weights).sum(1) / weights.sum(1).clamp(min=1)


def dice_loss(
    inputs: Tensor, targets: Tensor, num_masks: float, weights: Tensor | None = None
) -> Tensor:
    """Sum of `dice_losses` divided by `num_masks`, a scalar."""
    return dice_losses(inputs, targets, weights).sum() / num_masks


def sigmoid_ce_loss(
    inputs: Tensor, targets: Tensor, num_masks: float, weights: Tensor | None = None
) -> Tensor:
    """Sum of `sigmoid_ce_losses` divided by `num_masks`, a scalar."""
    return sigmoid_ce_losses(inputs, targets, weights).sum() / num_masks


def batch_dice_loss(inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Dice loss of each pair of prediction and target.

    Args:
        inputs: (..., Q, P) logits.
        targets: (..., T, P) in [0, 1].
        weights: (P,) of 0 and 1; None: all 1.

    Returns:
        (..., Q, T).
    """
    inputs = inputs.sigmoid()
    if weights is not None:
        inputs, targets = inputs * weights, targets * weights
    numerator = 2 * (inputs @ targets.mT)
    denominator = inputs.sum(-1)[..., :, None] + targets.sum(-1)[..., None, :]
    return 1 - (numerator + 1) / (denominator + 1)


def batch_sigmoid_ce_loss(inputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of each pair of prediction and target, averaged over points.

    At one point it is softplus(x) - x·t, so one matrix product covers all pairs. Arguments and
    result as in `batch_dice_loss`.
    """
    background = F.softplus(inputs)
    num_points: int | Tensor = inputs.shape[-1]
    if weights is not None:
        background, targets = background * weights, targets * weights
        num_points = weights.sum().clamp(min=1)
    return (background.sum(-1)[..., :, None] - inputs @ targets.mT) / num_points


def batch_sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Focal loss of each pair of prediction and target, averaged over points.

    One matrix product covers all pairs, as in `batch_sigmoid_ce_loss`. Arguments and result as in
    `batch_dice_loss`.
    """
    probabilities = inputs.sigmoid()
    foreground = FOCAL_ALPHA * (1 - probabilities) ** FOCAL_GAMMA * F.softplus(-inputs)
    background = (1 - FOCAL_ALPHA) * probabilities**FOCAL_GAMMA * F.softplus(inputs)
    num_points: int | Tensor = inputs.shape[-1]
    if weights is not None:
        foreground, background = foreground * weights, background * weights
        num_points = weights.sum().clamp(min=1)
    pairs = (foreground - background) @ targets.mT
    return (pairs + background.sum(-1)[..., :, None]) / num_points


# The original compiles these with TorchScript; other projects import the names.
dice_loss_jit = dice_loss
sigmoid_ce_loss_jit = sigmoid_ce_loss
batch_dice_loss_jit = batch_dice_loss
batch_sigmoid_ce_loss_jit = batch_sigmoid_ce_loss


def calculate_uncertainty(logits: Tensor) -> Tensor:
    """Uncertainty of mask logits: highest, 0, where the probability is one half.

    Args:
        logits: (N, 1, P).

    Returns:
        (N, 1, P), at most 0.
    """
    if logits.shape[1] != 1:
        raise ValueError(f"expected class-agnostic logits (N, 1, P), got {tuple(logits.shape)}")
    return -logits.abs()
