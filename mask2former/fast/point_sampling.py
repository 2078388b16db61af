"""Bilinear samples of maps at points, in the forms that matching and loss need.

All agree with `grid_sample(align_corners=False, padding_mode="zeros")` at points x, y in [0, 1];
each is the fastest for its case. Maps are padded with zeros, so that all four neighbours of a point
exist.

Shape letters: C channels, H W pixels, P points, N maps sampled at separate points, T target masks.
"""

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.projects.point_rend.point_features import point_sample
from torch import Tensor

from ..modeling.mask_losses import calculate_uncertainty

# One zero before the first pixel and two after the last: a corner may lie one pixel outside, and
# has a neighbour to its right.
_BEFORE, _AFTER = 1, 2
_BORDER = _BEFORE + _AFTER


def max_elements(limits: dict[str, int], device: torch.device) -> int:
    """The limit for a device type; unknown accelerators are treated like CUDA."""
    return limits.get(device.type, limits["cuda"])


def _with_border(maps: Tensor) -> Tensor:
    return F.pad(maps, (_BEFORE, _AFTER, _BEFORE, _AFTER))


def _corners(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Upper left corner of every point in a bordered map, and the point's offset from it.

    Args:
        points: (..., 2) x and y.

    Returns:
        index into the flattened bordered map, int64; fraction in x and in y. All (...).
    """
    x = (points[..., 0] * width + (_BEFORE - 0.5)).clamp(0, width + 1)
    y = (points[..., 1] * height + (_BEFORE - 0.5)).clamp(0, height + 1)
    left, top = x.floor(), y.floor()
    return top.long() * (width + _BORDER) + left.long(), x - left, y - top


class BilinearSampler:
    """Samples all maps at the same points. No gradients.

    Maps are stored channels last, so that a point reads four contiguous rows instead of 4·C
    scattered values.

    Args:
        maps: (C, H, W), any dtype.
        dtype: of the samples; by default that of the maps, at least float32.
    """

    def __init__(self, maps: Tensor, dtype: torch.dtype | None = None):
        self.height, self.width = maps.shape[1:]
        dtype = dtype or torch.promote_types(maps.dtype, torch.float32)
        rows = _with_border(maps.detach()).flatten(1).T
        # Convert and transpose in one pass; the second line copies only if nothing was converted.
        rows = rows.to(dtype, memory_format=torch.contiguous_format)
        self._rows = rows.contiguous()

    def at(self, points: Tensor) -> Tensor:
        """Sample all maps at `points` (..., P, 2) → (..., P, C)."""
        index, dx, dy = _corners(points.flatten(0, -2), self.height, self.width)
        below = index + (self.width + _BORDER)
        weights = ((1 - dx) * (1 - dy), dx * (1 - dy), (1 - dx) * dy, dx * dy)
        return F.embedding_bag(
            torch.stack((index, index + 1, below, below + 1), 1),
            self._rows,
            per_sample_weights=torch.stack(weights, 1).to(self._rows.dtype),
            mode="sum",
        ).unflatten(0, points.shape[:-1])


class TargetMasks:
    """Samples each target mask of an image at its own points. No gradients.

    Args:
        masks: (T, H, W) bool, integer or float; kept in that dtype.
    """

    def __init__(self, masks: Tensor):
        self.height, self.width = masks.shape[1:]
        padded = _with_border(masks)
        self._map_size = padded[0].numel() if len(padded) else 0
        self._are_corners = masks.dtype == torch.bool
        self._flat = (_corner_bits(padded) if self._are_corners else padded).flatten()

    def at(self, index: Tensor, points: Tensor) -> Tensor:
        """Sample mask `index[n]` at `points[n]`.

        Args:
            index: (N,) int64.
            points: (N, P, 2).

        Returns:
            (N, P), dtype of the points.
        """
        corner, dx, dy = _corners(points, self.height, self.width)
        corner += (index * self._map_size)[:, None]
        if self._are_corners:
            bits = self._read(corner)
            values = [(bits >> place & 1).to(points.dtype) for place in range(4)]
        else:
            below = corner + (self.width + _BORDER)
            places = (corner, corner + 1, below, below + 1)
            values = [self._read(place).to(points.dtype) for place in places]
        upper = torch.lerp(values[0], values[1], dx)
        return torch.lerp(upper, torch.lerp(values[2], values[3], dx), dy)

    def _read(self, places: Tensor) -> Tensor:
        return self._flat.index_select(0, places.flatten()).view(places.shape)


def _corner_bits(masks: Tensor) -> Tensor:
    """Each pixel, its right neighbour and the two below as bits 0 to 3 of one uint8.

    A point of a bool mask is then one random read instead of four.
    """
    bits = masks.byte()
    bits[:, :, :-1] |= bits[:, :, 1:] << 1
    bits[:, :-1] |= bits[:, 1:] << 2
    return bits


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values of each row of (N, n) → (N, count), in no particular order."""
    if values.device.type != "cpu":
        return values.topk(count, sorted=False).indices  # sorting takes longer than choosing
    # NumPy's selection is vectorised and takes a third of the time of topk.
    first = values.shape[1] - count
    order = np.argpartition(values.numpy(), min(first, values.shape[1] - 1), axis=1)
    return torch.from_numpy(order[:, first:])


def sample_uncertain_points(
    logits: Tensor, num_points: int, oversample_ratio: float, importance_sample_ratio: float
) -> Tensor:
    """Points for the mask losses, as PointRend's `get_uncertain_point_coords_with_randomness`.

    Of `oversample_ratio` · P candidates, drawn uniformly for every map, take the
    `importance_sample_ratio` · P whose logits are nearest to 0. The others are drawn uniformly.

    Args:
        logits: (N, 1, H, W).

    Returns:
        (N, P, 2) x and y in [0, 1], in no particular order.
    """
    if oversample_ratio < 1:
        raise ValueError(f"oversample_ratio={oversample_ratio} is below 1")
    if not 0 <= importance_sample_ratio <= 1:
        raise ValueError(f"importance_sample_ratio={importance_sample_ratio} is not in [0, 1]")
    num_candidates = int(num_points * oversample_ratio)
    num_uncertain = int(num_points * importance_sample_ratio)
    candidates = torch.rand(len(logits), num_candidates, 2, device=logits.device)
    uncertainty = calculate_uncertainty(point_sample(logits, candidates, align_corners=False))
    nearest = _largest(uncertainty[:, 0], num_uncertain)
    # Fetch a pair of coordinates as one number.
    uncertain = torch.view_as_real(torch.view_as_complex(candidates).gather(1, nearest))
    others = torch.rand(len(logits), num_points - num_uncertain, 2, device=logits.device)
    return torch.cat((uncertain, others), 1)
