"""Matching and losses on all pixels of masks instead of sampled points.

`FullMaskMatcher` and `FullMaskCriterion` are the rows "mask" of Table 5, with the terms and weights
of Mask2Former; either may be combined with the other's version on points. `MaskFormerMatcher` and
`MaskFormerCriterion` are those of MaskFormer, with focal loss instead of binary cross-entropy.

The paper does not say at which resolution masks are compared. As in MaskFormer, matching compares
at the resolution of the predictions, a quarter of the image, to which targets are resized (nearest
pixel); the loss compares at the resolution of the targets, to which predictions are resized
(bilinear).

Shape letters: Q queries, T targets of an image, N matched masks of the batch, H W pixels of
predictions, H' W' of targets.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .criterion import CRITERION_REGISTRY, SetCriterion, ignored_regions
from .mask_losses import (
    batch_dice_loss,
    batch_sigmoid_ce_loss,
    batch_sigmoid_focal_loss,
    dice_losses,
    sigmoid_ce_losses,
    sigmoid_focal_losses,
    to_default_dtype,
)
from .matcher import MATCHER_REGISTRY, HungarianMatcher, Indices, Targets

# Pixels whose losses are computed at once, to bound temporaries when there are many targets.
_MAX_PIXELS = 2**24


@MATCHER_REGISTRY.register()
class FullMaskMatcher(HungarianMatcher):
    """`HungarianMatcher` whose mask costs are means over all pixels of the predicted masks.

    Target masks are resized to the resolution of the predictions (nearest pixel).

    Args:
        cost_class: weight of the negative class probability.
        cost_mask: weight of the binary cross-entropy of the masks.
        cost_dice: weight of the dice loss of the masks.
        num_points: not read; a config builds every matcher with it.
    """

    _shown = ("cost_class", "cost_mask", "cost_dice")
    _pairwise_mask_loss: Callable[..., Tensor] = staticmethod(batch_sigmoid_ce_loss)

    def mask_costs(
        self, mask_logits: Tensor, target_masks: Tensor, ignored: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compare all predictions of an image with all its targets, at every pixel.

        Args:
            mask_logits: (Q, H, W).
            target_masks: (T, H', W').
            ignored: (H', W') bool; pixels there do not count.

        Returns:
            Mask loss and dice loss of all pairs, (Q, T) each.
        """
        if not target_masks.is_floating_point():
            target_masks = target_masks.to(torch.uint8)  # resizing takes no booleans
        gt_masks = F.interpolate(target_masks[:, None], mask_logits.shape[-2:], mode="nearest")
        pred_masks = to_default_dtype(mask_logits).flatten(1)  # (Q, H·W)
        gt_masks = gt_masks.flatten(1).to(pred_masks)  # (T, H·W)
        weights = None
        if ignored is not None:
            labelled = (~ignored[None, None]).to(pred_masks)
            weights = F.interpolate(labelled, mask_logits.shape[-2:], mode="nearest").flatten()
        return (
            self._pairwise_mask_loss(pred_masks, gt_masks, weights),
            batch_dice_loss(pred_masks, gt_masks, weights),
        )


@MATCHER_REGISTRY.register()
class MaskFormerMatcher(FullMaskMatcher):
    """The matcher of MaskFormer: `FullMaskMatcher` with focal loss (alpha 0.25, gamma 2).

    The paper's weights are 1 (class), 20 (mask) and 1 (dice).
    """

    _pairwise_mask_loss = staticmethod(batch_sigmoid_focal_loss)


@CRITERION_REGISTRY.register()
class FullMaskCriterion(SetCriterion):
    """`SetCriterion` whose mask losses take in all pixels of the matched masks.

    Predictions are resized to the resolution of the targets (bilinear). Binary cross-entropy is the
    mean over pixels and dice is computed per mask; both are summed over masks and divided by the
    number of targets. All of it is saved for backward with every MODEL.CHECKPOINTING, so that its
    memory is that of Table 5. Arguments as of `SetCriterion`; those on points are only read for the
    losses of `LOSS_REGISTRY`.
    """

    _mask_losses: Callable[..., Tensor] = staticmethod(sigmoid_ce_losses)
    accumulating = SetCriterion.accumulating  # `loss_masks` divides by the number of masks as well

    def loss_masks(
        self, outputs: dict[str, Any], targets: Targets, indices: Indices, num_masks: float
    ) -> dict[str, Tensor]:
        """Mask loss and dice loss of matched masks, at every pixel.

        Returns:
            `loss_mask` and `loss_dice`, scalars.
        """
        logits, target_masks = self.gather_masks(outputs, targets, indices)
        size = target_masks.shape[-2:]
        chunk = max(1, _MAX_PIXELS // max(1, size.numel()))
        ignored, weights = ignored_regions(targets), None
        if ignored is not None:
            pairs = zip(ignored, indices, strict=True)
            weights = torch.cat([~x.flatten().expand(len(i), -1) for x, (i, _) in pairs])
        mask_losses, dice = [], []
        for i, target in enumerate(target_masks.split(chunk)):
            rows = slice(i * chunk, i * chunk + len(target))
            part = logits[rows]
            part = F.interpolate(part[:, None], size, mode="bilinear", align_corners=False)
            part = part.flatten(1)  # (n, H'·W')
            target = target.flatten(1).to(part)
            labelled = None if weights is None else weights[rows].to(part)
            mask_losses.append(self._mask_losses(part, target, labelled))
            dice.append(dice_losses(part, target, labelled))
        return {
            "loss_mask": torch.cat(mask_losses).sum() / num_masks,
            "loss_dice": torch.cat(dice).sum() / num_masks,
        }


@CRITERION_REGISTRY.register()
class MaskFormerCriterion(FullMaskCriterion):
    """The criterion of MaskFormer: `FullMaskCriterion` with focal loss (alpha 0.25, gamma 2).

    The paper's weights are 1 (class), 20 (mask) and 1 (dice); "no object" has 0.1.
    """

    _mask_losses = staticmethod(sigmoid_focal_losses)
