"""Mask logits as factors: ⟨embedding, feature⟩, multiplied out only where they are needed.

The decoder predicts an embedding for every query and layer; its mask logits are the inner product
with the per-pixel features (paper, section 3.1). Full-size masks of every layer are by far the
largest tensors of the model, and most are never needed: matching looks at K points, the loss at
matched queries, inference at the last layer.

Shape letters: L prediction layers, B batch, Q queries, C mask channels, H W size of the
1/4-resolution features, N selected masks, P points.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.projects.point_rend.point_features import point_sample
from torch import Tensor

from ..modeling.mask_losses import to_default_dtype
from .point_sampling import BilinearSampler, max_elements

# Logits computed at a time in matching (layers x queries x points). One product for several layers
# is faster, but on a CPU its result should stay in cache for the costs; a GPU takes all layers, up
# to 256 MB.
_MAX_LOGITS = {"cpu": 2**23, "cuda": 2**26}


@dataclass(frozen=True)
class MaskFactors:
    """Mask logits of one prediction layer, as the two factors of their product.

    Attributes:
        embed: (B, Q, C) one embedding per query.
        features: (B, C, H, W) per-pixel features, shared by all layers.
    """

    embed: Tensor
    features: Tensor

    @property
    def shape(self) -> torch.Size:
        """(B, Q, H, W), without computing the masks."""
        return torch.Size((*self.embed.shape[:2], *self.features.shape[-2:]))

    def full(self) -> Tensor:
        """All masks, (B, Q, H, W) logits."""
        return torch.einsum("bqc,bchw->bqhw", self.embed, self.features)


class LayeredMasks:
    """The mask logits of several prediction layers, read together for matching and loss.

    If all layers are factors over the same features, one sampling or one product serves all.

    Args:
        layers: output dicts, whose `pred_masks` are `MaskFactors` or (B, Q, H, W) tensors.
    """

    def __init__(self, layers: Sequence[dict[str, Any]]):
        self._masks = [outputs["pred_masks"] for outputs in layers]
        first = self._masks[0]
        self._are_factors = isinstance(first, MaskFactors)
        self.shape = first.shape
        if self._are_factors:
            assert all(m.features is first.features for m in self._masks)
            # Split once: the gradients of all images are then written into one tensor.
            self._embed = torch.stack([m.embed for m in self._masks], 1).unbind()  # B x (L, Q, C)
            self._features = first.features.flatten(2).unbind()  # B x (C, H·W)

    def at_points(self, image: int, points: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Logits of every query of one image at points, some layers at a time. No gradients.

        Args:
            image: index in the batch.
            points: (P, 2) x and y in [0, 1].

        Yields:
            a slice of layers and their logits (layers of the slice, Q, P), at least float32.
        """
        if not self._are_factors:
            for layer, masks in enumerate(self._masks):
                masks = to_default_dtype(masks[image])[:, None]
                shared = points[None].expand(len(masks), -1, -1)
                logits = point_sample(masks, shared, align_corners=False)[:, 0]
                yield slice(layer, layer + 1), logits[None]
            return
        features = self._features[image].unflatten(1, self.shape[-2:])
        sampled = BilinearSampler(features, points.dtype).at(points).T  # (C, P)
        embed = self._embed[image].detach().to(sampled.dtype)
        layer_size = self.shape[1] * len(points)
        step = max(1, max_elements(_MAX_LOGITS, points.device) // max(1, layer_size))
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
        if self._are_factors:
            product = self._embed[image].flatten(0, 1)[rows] @ self._features[image]
            return product.unflatten(1, self.shape[-2:])
        num_queries = self.shape[1]
        chosen = zip(self._masks, rows.split(num_rows), strict=True)
        return torch.cat([m[image][r - i * num_queries] for i, (m, r) in enumerate(chosen)])
