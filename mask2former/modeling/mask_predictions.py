"""Mask predictions as factors: logits = ⟨embedding, feature⟩, multiplied out only when asked for.

The decoder predicts, for every query and layer, an embedding; its mask logits are the inner
product with the per-pixel features (paper, section 3.1). Full-size masks of every layer are by far
the largest tensors of the model and most are never needed: matching looks at K points, the loss at
matched queries, inference at the last layer. The decoder therefore hands on the factors.

Shape letters: L prediction layers, B batch, Q queries, C mask channels, H W size of the
1/4-resolution features, N selected masks, P points.
"""

from collections.abc import ItemsView, Iterator, Sequence, ValuesView
from typing import Any

import torch
from detectron2.projects.point_rend.point_features import point_sample
from torch import Tensor

from .point_sampling import PointTable, max_elements

# Logits multiplied out in one go when matching (layers x queries x points). Products of several
# layers are faster, but on a CPU what follows should find some of them in its caches; a GPU wants
# all layers, within 256 MB.
_MAX_LOGITS = {"cpu": 2**23, "cuda": 2**26}


class MaskLogits:
    """Mask logits of one prediction layer, as the two factors of their product.

    Args:
        embed: (B, Q, C) one embedding per query.
        features: (B, C, H, W) per-pixel features, shared by all layers.
    """

    def __init__(self, embed: Tensor, features: Tensor):
        self.embed = embed
        self.features = features
        self._full: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(B, Q, H, W), without computing the masks."""
        return torch.Size((*self.embed.shape[:2], *self.features.shape[-2:]))

    def full(self) -> Tensor:
        """All masks, (B, Q, H, W) logits; computed at the first call and kept."""
        trainable = torch.is_grad_enabled() and (
            self.embed.requires_grad or self.features.requires_grad
        )
        # What a matcher read under no_grad must not serve the loss: it has no gradient.
        if self._full is None or (trainable and not self._full.requires_grad):
            self._full = torch.einsum("bqc,bchw->bqhw", self.embed, self.features)
        return self._full

    def select(self, queries: list[Tensor]) -> Tensor:
        """Masks of chosen queries.

        Args:
            queries: for each image the int64 indices of its queries.

        Returns:
            (N, H, W) logits, image by image in the given order.
        """
        if self._full is not None:
            return _select_dense(self.full(), queries)
        height, width = self.features.shape[-2:]
        masks = [
            embed[index] @ features.flatten(1)
            for embed, features, index in zip(self.embed, self.features, queries, strict=True)
        ]
        return torch.cat(masks).view(-1, height, width)

    def at_points(self, image: int, points: Tensor) -> Tensor:
        """Logits of every query of one image at points; sampling commutes with the product.

        Args:
            image: index in the batch.
            points: (P, 2) x and y in [0, 1].

        Returns:
            (Q, P) float32 logits.
        """
        if self._full is not None:
            # Read and perhaps edited by a subclass: matching and loss must see the same masks.
            return DenseMaskLogits(self.full()).at_points(image, points)
        return self.embed[image].float() @ PointTable(self.features[image]).at(points).T


class DenseMaskLogits:
    """The interface of `MaskLogits` over masks that exist already, (B, Q, H, W) logits."""

    def __init__(self, masks: Tensor):
        self._masks = masks
        self.shape = masks.shape

    def full(self) -> Tensor:
        return self._masks

    def select(self, queries: list[Tensor]) -> Tensor:
        return _select_dense(self._masks, queries)

    def at_points(self, image: int, points: Tensor) -> Tensor:
        masks = self._masks[image][:, None].float()
        points = points[None].expand(len(masks), -1, -1)
        return point_sample(masks, points, align_corners=False)[:, 0]


def _select_dense(masks: Tensor, queries: list[Tensor]) -> Tensor:
    return torch.cat([m[index] for m, index in zip(masks, queries, strict=True)])


class MaskPredictions(dict):
    """The decoder's output dict. ``["pred_masks"]`` is a (B, Q, H, W) tensor as published.

    It is stored as `MaskLogits` and multiplied out when read by key or by iteration; code that can
    work on the factors takes them from `mask_logits`.
    """

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        return value.full() if isinstance(value, MaskLogits) else value

    def __iter__(self) -> Iterator[str]:
        # Overridden, though it changes nothing, so that dict(x) and {**x} read through __getitem__.
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default

    def items(self) -> ItemsView[str, Any]:
        return ItemsView(self)

    def values(self) -> ValuesView[Any]:
        return ValuesView(self)

    def pop(self, key: str, *default: Any) -> Any:
        value = super().pop(key, *default)
        return value.full() if isinstance(value, MaskLogits) else value

    def popitem(self) -> tuple[str, Any]:
        key = next(reversed(self))
        return key, self.pop(key)

    def setdefault(self, key: str, default: Any = None) -> Any:
        super().setdefault(key, default)
        return self[key]

    def copy(self) -> "MaskPredictions":
        duplicate = MaskPredictions()
        for key in self:
            duplicate[key] = super().__getitem__(key)
        return duplicate

    @property
    def mask_logits(self) -> MaskLogits | Tensor:
        """``pred_masks`` as stored: factors, or a tensor where a subclass put one."""
        return super().__getitem__("pred_masks")


def mask_logits_of(outputs: dict[str, Any]) -> MaskLogits | DenseMaskLogits:
    """The mask logits of one prediction layer, whichever way ``outputs`` stores them."""
    if isinstance(outputs, MaskPredictions):
        masks = outputs.mask_logits
    else:
        masks = outputs["pred_masks"]
    return masks if isinstance(masks, MaskLogits) else DenseMaskLogits(masks)


class LayeredMasks:
    """The mask logits of several prediction layers, read together for matching and loss.

    Where all layers are factors over the same features, one sampling or one product serves all.

    Args:
        layers: output dicts, see `mask_logits_of`.
    """

    def __init__(self, layers: Sequence[dict[str, Any]]):
        self._masks = [mask_logits_of(outputs) for outputs in layers]
        first = self._masks[0]
        # Masks that were multiplied out may have been edited since: they are then what counts.
        self._shared = all(
            isinstance(m, MaskLogits) and m.features is first.features and m._full is None
            for m in self._masks
        )
        self.shape = first.shape
        if self._shared:
            # Split once: the gradients of all images are then written into one tensor.
            self._embed = torch.stack([m.embed for m in self._masks], 1).unbind()  # B x (L, Q, C)
            self._features = first.features.flatten(2).unbind()  # B x (C, H·W)

    def at_points(self, image: int, points: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Logits of every query of one image at points, some layers at a time. No gradients.

        Args:
            image: index in the batch.
            points: (P, 2) x and y in [0, 1].

        Yields:
            a slice of layers and their logits (that many, Q, P), float32.
        """
        if not self._shared:
            for layer, masks in enumerate(self._masks):
                yield slice(layer, layer + 1), masks.at_points(image, points)[None]
            return
        features = self._features[image].unflatten(1, self.shape[-2:])
        sampled, embed = PointTable(features).at(points).T, self._embed[image].detach().float()
        logits_of_layer = self.shape[1] * len(points)
        step = max(1, max_elements(_MAX_LOGITS, points.device) // max(1, logits_of_layer))
        for start in range(0, len(embed), step):
            chunk = slice(start, start + step)
            yield chunk, embed[chunk] @ sampled

    def select(self, image: int, rows: Tensor, num_rows: list[int]) -> Tensor:
        """Masks of chosen queries of one image.

        Args:
            image: index in the batch.
            rows: (N,) int64, layer · Q + query, layers ascending.
            num_rows: how many of them belong to each layer.

        Returns:
            (N, H, W) logits.
        """
        if self._shared:
            product = self._embed[image].flatten(0, 1)[rows] @ self._features[image]
            return product.unflatten(1, self.shape[-2:])
        num_queries = self.shape[1]
        chosen = zip(self._masks, rows.split(num_rows), strict=True)
        return torch.cat([m.full()[image][r - i * num_queries] for i, (m, r) in enumerate(chosen)])
