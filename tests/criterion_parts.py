"""Inputs and parts that tests of the criteria share.

Shape letters: B batch, Q queries, K classes, H W pixels.
"""

import torch
from torch import Tensor, nn

from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.matcher import HungarianMatcher

NAMES = ["loss_ce", "loss_mask", "loss_dice"]


class FixedMatcher(nn.Module):
    """Returns the pairs it was given."""

    def __init__(self, *pairs: tuple[list[int], list[int]]):
        super().__init__()
        self.pairs = [tuple(torch.tensor(x, dtype=torch.int64) for x in pair) for pair in pairs]

    def forward(self, outputs, targets):
        return self.pairs


def make_criterion(
    matcher: nn.Module | None = None, num_classes: int = 3, cls=SetCriterion, **changes
) -> SetCriterion:
    arguments = {
        "weight_dict": dict.fromkeys(NAMES, 1.0),
        "eos_coef": 0.1,
        "losses": ["labels", "masks"],
        "num_points": 20,
        "oversample_ratio": 3.0,
        "importance_sample_ratio": 0.75,
        **changes,
    }
    matcher = HungarianMatcher(2.0, 5.0, 5.0, num_points=20) if matcher is None else matcher
    return cls(num_classes, matcher=matcher, **arguments)


def target(labels: list[int], *masks: list) -> dict[str, Tensor]:
    return {
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": torch.tensor(masks, dtype=torch.bool).view(len(labels), 2, 2),
    }


def leaves(layers: int = 1, batch: int = 2, queries: int = 6) -> tuple[list, list]:
    """Class logits and mask logits of every layer, which collect gradients."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).requires_grad_()

    logits = [leaf(batch, queries, 4) for _ in range(layers)]
    return logits, [leaf(batch, queries, 8, 12) for _ in range(layers)]


def as_outputs(logits: list, masks: list) -> dict:
    layers = [{"pred_logits": x, "pred_masks": m} for x, m in zip(logits, masks, strict=True)]
    return {**layers[-1], "aux_outputs": layers[:-1]}
