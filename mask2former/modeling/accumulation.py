"""Losses of a batch whose gradients are accumulated over micro-batches.

Gradients add up to those of the whole batch only if each loss is divided by the number of masks,
or the sum of class weights, of the whole batch. The targets say both before the first forward pass:
a matcher assigns min(Q, T) queries of an image, and the others have no object.

Shape letters: B images of the whole batch, Q queries, K classes, T targets of an image.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .matcher import Indices, Targets

_logger = logging.getLogger(__name__)

# Methods of a criterion that divide losses, and of a model that pad images.
_CRITERION_METHODS = ("forward", "get_loss", "loss_labels", "loss_masks")
_MODEL_METHODS = ("forward",)
_MAX_NAMES = 5


class WholeBatch:
    """What the losses of micro-batches are divided by.

    Args:
        labels: (T,) int64 target classes of each of B images, on the device of the losses.
        num_masks: returns the number of target masks per worker, averaged over workers.
    """

    def __init__(self, labels: list[Tensor], num_masks: Callable[[], float]) -> None:
        self.num_masks = num_masks
        self._num_targets = [len(x) for x in labels]
        self._labels = torch.cat(labels)
        self._num_seen: list[int] = []

    def class_weight_sum(self, class_weight: Tensor, num_queries: int) -> Tensor:
        """Sum of the class weights of all B·Q queries of a prediction layer, a scalar.

        Args:
            class_weight: (K+1,), that of "no object" last. If an image has more targets than
                queries, classes count with the mean of its targets: which of them are matched is
                not known. In `SetCriterion` all have the same weight.
            num_queries: Q.
        """
        weights = class_weight[self._labels]
        num_matched = [min(num_queries, number) for number in self._num_targets]
        if num_matched == self._num_targets:
            total = weights.sum()
        else:
            per_image = zip(weights.split(self._num_targets), num_matched, strict=True)
            total = sum(
                (w.mean() * number for w, number in per_image if number), weights.new_zeros(())
            )
        num_unmatched = num_queries * len(num_matched) - sum(num_matched)
        return total + class_weight[-1] * num_unmatched

    def add(self, targets: Targets) -> None:
        """Note the targets of a micro-batch."""
        self._num_seen += [len(target["labels"]) for target in targets]

    def check_matched(self, targets: Targets, indices: Indices, num_queries: int) -> None:
        """Check that a matcher assigned as many queries as `class_weight_sum` assumes.

        Raises:
            ValueError: naming the numbers.
        """
        for target, (queries, _) in zip(targets, indices, strict=True):
            expected = min(num_queries, len(target["labels"]))
            if len(queries) != expected:
                raise ValueError(
                    f"SOLVER.NUM_ACCUMULATION_STEPS above 1 needs a matcher that assigns one query "
                    f"to each target, but of an image with {len(target['labels'])} targets and "
                    f"{num_queries} queries it assigned {len(queries)}, not {expected}: set it to 1"
                )

    def check_complete(self) -> None:
        """Check that the micro-batches had the targets of the batch.

        Raises:
            ValueError: they had others, so that losses were divided by wrong numbers.
        """
        if self._num_seen != self._num_targets:
            raise ValueError(
                f"the micro-batches had images with {self._num_seen} targets, but the batch has "
                f"{self._num_targets}: a model whose `prepare_targets` adds or drops targets "
                "cannot be trained with SOLVER.NUM_ACCUMULATION_STEPS above 1"
            )


def check_accumulation(num_steps: int, model: type, criterion: type | None = None) -> None:
    """Check that losses of micro-batches add up to those of a batch.

    They do if a model, and its criterion if it has one, has a context manager `accumulating`, as
    `MaskFormer` and `SetCriterion` do. A subclass that overrides what this relies on says that it
    still holds by defining it as well: `accumulating = SetCriterion.accumulating` if its losses
    are divided by the `num_masks` that they are given, and not by a mean over the micro-batch.

    Args:
        num_steps: SOLVER.NUM_ACCUMULATION_STEPS.
        model: the class of the model.
        criterion: the class of its criterion.

    Raises:
        ValueError: naming the class and what to do.
    """
    if num_steps == 1:
        return
    reason = _why_not(model, _MODEL_METHODS)
    if reason is None and criterion is not None:
        reason = _why_not(criterion, _CRITERION_METHODS)
    if reason is not None:
        raise ValueError(
            f"SOLVER.NUM_ACCUMULATION_STEPS is {num_steps}, but {reason}. Set it to 1, or define "
            "`accumulating` in the class as well, see mask2former/modeling/accumulation.py."
        )


def _why_not(part: type, methods: tuple[str, ...]) -> str | None:
    owners = {
        name: next((cls for cls in part.__mro__ if name in cls.__dict__), None)
        for name in ("accumulating", *methods)
    }
    supports = owners.pop("accumulating")
    if supports is None:
        return f"{part.__name__} has no method `accumulating`, which makes losses add up"
    for name, owner in owners.items():
        if owner is not None and not issubclass(supports, owner):
            return (
                f"{owner.__name__}.{name} replaces what `{supports.__name__}.accumulating` relies "
                "on"
            )
    return None


def warn_of_batch_statistics(model: nn.Module, micro_batch_size: int) -> None:
    """Name the layers whose statistics are of a micro-batch instead of the batch, in one line.

    Args:
        model: in training mode.
        micro_batch_size: images per micro-batch.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    if names:
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        _logger.warning(
            "With SOLVER.NUM_ACCUMULATION_STEPS batch normalisation takes the statistics of "
            f"{micro_batch_size} image(s) at a time, so that training differs from that of the "
            f"whole batch: {', '.join(names[:_MAX_NAMES])}{more}. FrozenBN, GN and LN have none."
        )
