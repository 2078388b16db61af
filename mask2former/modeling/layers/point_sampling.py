"""Bilinear samples of maps at points, with a deterministic backward where torch has none.

Shape letters: N maps, C channels, H W pixels, P points.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.projects.point_rend import point_features
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...utils.determinism import is_deterministic

# A logit beyond all that models predict, also when interpolated with others.
_CERTAIN = 1e6


def point_sample(maps: Tensor, points: Tensor, **kwargs: Any) -> Tensor:
    """Detectron2's `point_sample`, which calls `grid_sample`.

    In deterministic mode torch refuses the backward of `grid_sample` on a GPU; maps at fixed points
    then have another one.

    Args:
        maps: (N, C, H, W).
        points: (N, P, 2) x and y in [0, 1].

    Returns:
        (N, C, P).
    """
    is_plain = kwargs == {"align_corners": False} and points.dim() == 3
    if is_plain and is_deterministic(maps) and not points.requires_grad:
        return DeterministicPointSample.apply(maps, points)
    return point_features.point_sample(maps, points, **kwargs)


def labelled_at(ignored: Tensor, points: Tensor) -> Tensor:
    """The points at which no pixel is ignored, as weights.

    Args:
        ignored: (H, W) bool.
        points: (..., 2) x and y in [0, 1].

    Returns:
        (...) in the dtype of the points: 0 where any of the pixels that a bilinear sample takes is
        ignored, else 1.
    """
    maps, flat = ignored[None, None].to(points.dtype), points.reshape(1, -1, 2)
    sampled = point_features.point_sample(maps, flat, align_corners=False)
    return (sampled == 0).to(points.dtype).view(points.shape[:-1])


def hide_ignored(logits: Tensor, ignored: Tensor) -> Tensor:
    """Mask logits that are far from 0 where pixels are ignored: uncertain points are elsewhere.

    Args:
        logits: (N, 1, H, W).
        ignored: (H', W') bool, of any resolution.
    """
    hidden = F.adaptive_max_pool2d(ignored[None].to(logits.dtype), logits.shape[-2:]) > 0
    return logits.masked_fill(hidden, _CERTAIN)


class DeterministicPointSample(torch.autograd.Function):
    """`point_sample` whose backward is `index_add_`, which sorts its indices in that mode."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, points: Tensor) -> Tensor:
        ctx.save_for_backward(points)
        ctx.size, ctx.dtype = maps.shape[-2:], maps.dtype
        return point_features.point_sample(maps, points, align_corners=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (points,) = ctx.saved_tensors
        return _add_at_points(grad, points, *ctx.size).to(ctx.dtype), None


def _add_at_points(values: Tensor, points: Tensor, height: int, width: int) -> Tensor:
    """Transpose of sampling: add values (N, C, P) to the four pixels around each point.

    Returns:
        (N, C, H, W), at least float32.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    # In the steps of grid_sample, so that weights round alike. Points further outside than the
    # limits have no pixels, like those at the limits.
    grid = 2.0 * points.to(dtype) - 1.0
    x = (((grid[..., 0] + 1) * width - 1) / 2).clamp(-1, width)  # (N, P)
    y = (((grid[..., 1] + 1) * height - 1) / 2).clamp(-1, height)
    left, top = x.floor(), y.floor()
    # One pixel before the first and two after the last, so that all four exist.
    rows, columns = height + 3, width + 3
    first_pixel = torch.arange(values.shape[0] * values.shape[1], device=values.device)
    first_pixel = first_pixel.view(*values.shape[:2], 1) * (rows * columns)
    corner = ((top.long() + 1) * columns + left.long() + 1)[:, None] + first_pixel  # (N, C, P)
    sums = values.new_zeros(first_pixel.numel() * rows * columns, dtype=dtype)
    # One corner at a time: sorting takes several times the memory of the indices.
    for down, weight_y in enumerate((top + 1 - y, y - top)):
        for right, weight_x in enumerate((left + 1 - x, x - left)):
            index = corner + (down * columns + right)
            share = values * (weight_x * weight_y)[:, None]
            sums.index_add_(0, index.flatten(), share.flatten())
    return sums.view(*values.shape[:2], rows, columns)[..., 1 : height + 1, 1 : width + 1]
