"""Set prediction loss: match, then cross-entropy on classes and BCE + dice on masks.

Mask losses are computed at P points (paper, section 3.3): three quarters of them where the
prediction is least certain among 3·P candidates, the others uniform.

Shape letters: B batch, Q queries, K classes, T targets of an image, N matched masks of the batch,
P points, H W pixels.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.projects.point_rend.point_features import (
    get_uncertain_point_coords_with_randomness,
)
from detectron2.utils.comm import get_world_size
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..utils.determinism import is_deterministic
from ..utils.host_copy import HostCopy
from ..utils.misc import is_dist_avail_and_initialized, nested_tensor_from_tensor_list
from ..utils.twins import has_fast_twin
from .accumulation import WholeBatch
from .layers.point_sampling import hide_ignored, labelled_at, point_sample
from .mask_losses import (
    calculate_uncertainty,
    dice_loss,
    dice_loss_jit,
    sigmoid_ce_loss,
    sigmoid_ce_loss_jit,
    to_default_dtype,
)
from .matcher import Indices, Targets

__all__ = [
    "CRITERION_REGISTRY",
    "LOSS_REGISTRY",
    "MatchedMasks",
    "SetCriterion",
    "calculate_uncertainty",
    "dice_loss",
    "dice_loss_jit",
    "sigmoid_ce_loss",
    "sigmoid_ce_loss_jit",
]

CRITERION_REGISTRY = Registry("CRITERION")
CRITERION_REGISTRY.__doc__ = """
Registry of criteria, named by `MODEL.MASK_FORMER.CRITERION_NAME`.

A registered class is called with the keywords of `SetCriterion`. The module it returns maps
(outputs, targets) to unweighted losses, see `SetCriterion.forward`, and has the attribute
`weight_dict`.
"""

LOSS_REGISTRY = Registry("LOSS")
LOSS_REGISTRY.__doc__ = """
Registry of additional losses, listed with their weights in `MODEL.MASK_FORMER.EXTRA_LOSSES`.

A registered function maps `MatchedMasks` to one value per matched mask, (N,). Their sum, divided by
the number of target masks, is the loss "loss_" + name of a prediction layer.
"""


@dataclass
class MatchedMasks:
    """The matched pairs of one prediction layer.

    Attributes:
        mask_logits: (N, H, W) predicted mask logits.
        target_masks: (N, H', W') float target masks.
        class_logits: (N, K+1) predicted class logits.
        labels: (N,) int64 target classes.
        points: (N, P, 2) x and y in [0, 1].
        point_logits: (N, P) `mask_logits` at the points.
        point_labels: (N, P) `target_masks` at the points.
        point_weights: (N, P), 0 at points in regions without a label and 1 elsewhere; None: all 1.
    """

    mask_logits: Tensor
    target_masks: Tensor
    class_logits: Tensor
    labels: Tensor
    points: Tensor
    point_logits: Tensor
    point_labels: Tensor
    point_weights: Tensor | None = None


def begin_average_num_masks(targets: Targets, device: torch.device) -> Callable[[], float]:
    """Begin what `SetCriterion.average_num_masks` returns.

    Returns:
        A function that waits for the result. Until it is called, the host can go on.
    """
    num_masks = float(sum(len(target["labels"]) for target in targets))
    if not is_dist_avail_and_initialized():
        return lambda: max(num_masks, 1.0)
    total = torch.full((1,), num_masks, dtype=torch.float32, device=device)  # not an upload
    torch.distributed.all_reduce(total)
    copied = HostCopy(total)
    return lambda: max(copied.read().item() / get_world_size(), 1.0)


def ignored_regions(targets: Targets) -> list[Tensor] | None:
    """The pixels of each image that losses leave out.

    Returns:
        (H', W') bool for each image, padded with True to the largest, as `gather_masks` pads masks;
        None if targets have no `ignored`.

    Raises:
        ValueError: only some targets have it.
    """
    regions = [target["ignored"] for target in targets if "ignored" in target]
    if not regions:
        return None
    if len(regions) < len(targets):
        raise ValueError(
            f"{len(regions)} of {len(targets)} targets have 'ignored'; all or none must"
        )
    height, width = (max(sizes) for sizes in zip(*(r.shape for r in regions), strict=True))
    return [F.pad(r, (0, width - r.shape[1], 0, height - r.shape[0]), value=True) for r in regions]


@CRITERION_REGISTRY.register()
class SetCriterion(nn.Module):
    """The losses of every prediction layer, unweighted.

    Args:
        num_classes: K, without the no-object class.
        matcher: maps (outputs, targets) to matched indices, see `HungarianMatcher`.
        weight_dict: weight of each loss by name; the model applies it.
        eos_coef: weight of the no-object class in the cross-entropy.
        losses: which losses to compute: "labels", "masks", names in `LOSS_REGISTRY`.
        num_points: P, points per matched mask.
        oversample_ratio: candidates per point chosen by uncertainty, at least 1.
        importance_sample_ratio: share of the points chosen by uncertainty, in [0, 1].
    """

    empty_weight: Tensor
    # Of which the targets are a part, within `accumulating`.
    _whole_batch: WholeBatch | None = None

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

    @has_fast_twin
    def forward(self, outputs: dict[str, Any], targets: Targets) -> dict[str, Tensor]:
        """Compute all losses.

        Args:
            outputs: `pred_logits` (B, Q, K+1), `pred_masks` (B, Q, H, W) logits and, with deep
                supervision, `aux_outputs`: a list of the same two for each earlier prediction.
            targets: for each image `labels` (T,) int64 and `masks` (T, H', W'); optionally, for
                all of them, `ignored` (H', W') bool: pixels without a label, which mask losses and
                matching leave out.

        Returns:
            Scalars `loss_ce`, `loss_mask`, `loss_dice` of the last prediction, and with a suffix
            `_0`, `_1`, … of the earlier ones.
        """
        if len(targets) != len(outputs["pred_logits"]):
            raise ValueError(f"{len(targets)} targets for {len(outputs['pred_logits'])} images")
        whole = self._whole_batch
        if whole is None:
            num_masks = self.average_num_masks(targets, outputs["pred_logits"].device)
        else:
            whole.add(targets)
            num_masks = whole.num_masks()
        losses = {}
        for i, layer in enumerate([outputs, *outputs.get("aux_outputs", [])]):
            indices = self.matcher(layer, targets)
            if whole is not None:
                whole.check_matched(targets, indices, layer["pred_logits"].shape[1])
            suffix = f"_{i - 1}" if i else ""
            for loss in self.losses:
                values = self.get_loss(loss, layer, targets, indices, num_masks)
                losses.update({name + suffix: value for name, value in values.items()})
        return losses

    def get_loss(
        self,
        loss: str,
        outputs: dict[str, Any],
        targets: Targets,
        indices: Indices,
        num_masks: float,
    ) -> dict[str, Tensor]:
        """One loss of `losses`, by name."""
        loss_map = {"labels": self.loss_labels, "masks": self.loss_masks}
        if loss in loss_map:
            return loss_map[loss](outputs, targets, indices, num_masks)
        if loss not in LOSS_REGISTRY:
            known = [*loss_map, *(name for name, _ in LOSS_REGISTRY)]
            raise ValueError(f"loss {loss!r} is not one of {known}")
        per_mask = LOSS_REGISTRY.get(loss)(self.matched_masks(outputs, targets, indices))
        return {f"loss_{loss}": per_mask.sum() / num_masks}

    def loss_labels(
        self, outputs: dict[str, Any], targets: Targets, indices: Indices, num_masks: float
    ) -> dict[str, Tensor]:
        """Weighted cross-entropy over all queries; the target of unmatched queries is no-object.

        Returns:
            `loss_ce`, a scalar.
        """
        logits = to_default_dtype(outputs["pred_logits"])
        classes = torch.full(
            logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device
        )
        classes[self._get_src_permutation_idx(indices)] = torch.cat(
            [t["labels"][j] for t, (_, j) in zip(targets, indices, strict=True)]
        )
        weight = self.empty_weight.to(logits.dtype)
        if is_deterministic(logits):
            # The mean over a map (B, K+1, Q) would add in any order on a GPU.
            logits, classes = logits.flatten(0, 1), classes.flatten()
        logits = logits.movedim(-1, 1)
        if self._whole_batch is None:
            return {"loss_ce": F.cross_entropy(logits, classes, weight)}
        num_queries = outputs["pred_logits"].shape[1]
        loss = F.cross_entropy(logits, classes, weight, reduction="sum")
        return {"loss_ce": loss / self._whole_batch.class_weight_sum(weight, num_queries)}

    def loss_masks(
        self, outputs: dict[str, Any], targets: Targets, indices: Indices, num_masks: float
    ) -> dict[str, Tensor]:
        """Binary cross-entropy and dice loss of matched masks, at points.

        Returns:
            `loss_mask` and `loss_dice`, scalars.
        """
        matched = self.matched_masks(outputs, targets, indices)
        points = (matched.point_logits, matched.point_labels)
        # Other projects replace these functions by ones without weights.
        weights = () if matched.point_weights is None else (matched.point_weights,)
        return {
            "loss_mask": sigmoid_ce_loss_jit(*points, num_masks, *weights),
            "loss_dice": dice_loss_jit(*points, num_masks, *weights),
        }

    def matched_masks(
        self, outputs: dict[str, Any], targets: Targets, indices: Indices
    ) -> MatchedMasks:
        """Gather the matched pairs of a layer and draw the points of their losses."""
        src_idx = self._get_src_permutation_idx(indices)
        logits, target_masks = self.gather_masks(outputs, targets, indices)
        target_masks = target_masks.to(logits)
        ignored = ignored_regions(targets)
        counts = [len(queries) for queries, _ in indices]
        with torch.no_grad():
            seen = logits[:, None]
            if ignored is not None:
                pieces = zip(seen.split(counts), ignored, strict=True)
                seen = torch.cat([hide_ignored(piece, region) for piece, region in pieces])
            points = get_uncertain_point_coords_with_randomness(
                seen,
                calculate_uncertainty,
                self.num_points,
                self.oversample_ratio,
                self.importance_sample_ratio,
            )
            point_labels = point_sample(target_masks[:, None], points, align_corners=False)[:, 0]
            point_weights = None
            if ignored is not None:
                pieces = zip(ignored, points.split(counts), strict=True)
                point_weights = torch.cat([labelled_at(region, piece) for region, piece in pieces])
        return MatchedMasks(
            mask_logits=logits,
            target_masks=target_masks,
            class_logits=outputs["pred_logits"][src_idx],
            labels=torch.cat([t["labels"][j] for t, (_, j) in zip(targets, indices, strict=True)]),
            points=points,
            point_logits=point_sample(logits[:, None], points, align_corners=False)[:, 0],
            point_labels=point_labels,
            point_weights=point_weights,
        )

    def gather_masks(
        self, outputs: dict[str, Any], targets: Targets, indices: Indices
    ) -> tuple[Tensor, Tensor]:
        """Gather the masks of the matched pairs of a layer.

        Returns:
            Mask logits (N, H, W) in the default dtype, and target masks (N, H', W') of their own
            dtype. Targets of different sizes are padded to the largest.
        """
        logits = to_default_dtype(outputs["pred_masks"][self._get_src_permutation_idx(indices)])
        masks = [target["masks"] for target in targets]
        if len({mask.shape[1:] for mask in masks}) > 1:
            masks = list(nested_tensor_from_tensor_list(masks).tensors)
        return logits, torch.cat([m[j] for m, (_, j) in zip(masks, indices, strict=True)])

    def _get_src_permutation_idx(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """(image, query) of every matched pair, two (N,) tensors."""
        batch = torch.cat([torch.full_like(i, image) for image, (i, _) in enumerate(indices)])
        return batch, torch.cat([i for i, _ in indices])

    def _get_tgt_permutation_idx(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """(image, target) of every matched pair, two (N,) tensors."""
        batch = torch.cat([torch.full_like(j, image) for image, (_, j) in enumerate(indices)])
        return batch, torch.cat([j for _, j in indices])

    def average_num_masks(self, targets: Targets, device: torch.device) -> float:
        """Number of target masks per worker, averaged over workers, at least 1."""
        return begin_average_num_masks(targets, device)()

    @contextmanager
    def accumulating(self, targets: Targets) -> Iterator[None]:
        """In this context targets are parts of a batch, and their losses add up to those of it.

        Args:
            targets: of the whole batch; only `labels` are read.

        Raises:
            ValueError: the parts do not have these targets.
        """
        device, labels = self.empty_weight.device, [target["labels"] for target in targets]
        method = "average_num_masks"
        if method in self.__dict__ or getattr(type(self), method) is not AVERAGE_NUM_MASKS:
            num_masks = functools.partial(self.average_num_masks, targets, device)
            whole = WholeBatch(labels, functools.cache(num_masks))
        else:
            whole = WholeBatch(labels, begin_average_num_masks(targets, device))
        self._whole_batch = whole
        try:
            yield
        finally:
            self._whole_batch = None
        whole.check_complete()

    def __repr__(self, _repr_indent: int = 4) -> str:
        names = (
            "losses",
            "weight_dict",
            "num_classes",
            "eos_coef",
            "num_points",
            "oversample_ratio",
            "importance_sample_ratio",
        )
        indent = " " * _repr_indent
        # A matcher of another project may have the signature of nn.Module.
        matcher = repr(self.matcher).replace("\n", "\n" + indent)
        body = [f"matcher: {matcher}", *(f"{name}: {getattr(self, name)}" for name in names)]
        return "\n".join([f"Criterion {type(self).__name__}", *(indent + line for line in body)])


# The original method, which patches of the class replace.
AVERAGE_NUM_MASKS = SetCriterion.average_num_masks
