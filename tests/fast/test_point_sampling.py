"""Point samplers against grid_sample, and the choice of uncertain points.

Shape letters: C channels, H W pixels, P points, N maps, T target masks.
"""

import pytest
import torch
from torch import Tensor, nn

from mask2former.fast.point_sampling import (
    BilinearSampler,
    TargetMasks,
    max_elements,
    sample_uncertain_points,
)


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed))


def grid_sample(maps: Tensor, points: Tensor) -> Tensor:
    """(N, C, H, W) at (N, P, 2) → (N, C, P)."""
    return nn.functional.grid_sample(maps, points[:, :, None] * 2 - 1, align_corners=False)[..., 0]


# Corners and edges of the image, and points outside, near and far.
SPECIAL = torch.tensor(
    [[0, 0], [1, 1], [0, 1], [0.5, 0], [1, 0.3], [-0.01, 0.5], [1.02, 0.5], [0.5, -3], [9, 9]]
)


def test_sampler_by_hand():
    # Between the two pixels of the first row, three quarters of the way to the second.
    maps = torch.tensor([[[1.0, 5.0], [0.0, 0.0]], [[2.0, 2.0], [7.0, 7.0]]])  # (C, H, W)
    assert BilinearSampler(maps).at(torch.tensor([[0.625, 0.25]])).tolist() == [[4.0, 2.0]]


@pytest.mark.parametrize("size", [(5, 9), (1, 1), (1, 7)])
def test_sampler_equals_grid_sample(size):
    maps, points = random(4, *size), torch.cat((random(60, 2, seed=1), SPECIAL))
    expected = grid_sample(maps[None], points[None])[0].T
    torch.testing.assert_close(BilinearSampler(maps).at(points), expected, atol=1e-5, rtol=1e-5)
    # Any number of leading dimensions.
    several = points[:66].view(2, 3, 11, 2)
    torch.testing.assert_close(
        BilinearSampler(maps).at(several), expected[:66].view(2, 3, 11, 4), atol=1e-5, rtol=1e-5
    )


def test_sampler_without_gradients_and_in_float32():
    maps = random(3, 4, 4).bfloat16().requires_grad_()
    values = BilinearSampler(maps).at(random(5, 2))
    assert values.dtype == torch.float32 and not values.requires_grad


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("size", [(5, 9), (1, 1), (40, 30)])
def test_target_masks_equal_grid_sample(dtype, size):
    masks = (random(3, *size) > 0.5).to(dtype)
    index = torch.tensor([2, 0, 2, 1])
    points = torch.cat((random(4, 50, 2, seed=1), SPECIAL.expand(4, -1, -1)), 1)
    expected = grid_sample(masks[index][:, None].float(), points)[:, 0]
    values = TargetMasks(masks).at(index, points)
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)


def test_soft_target_masks():
    masks, points = random(2, 6, 7), random(2, 30, 2, seed=1)
    torch.testing.assert_close(
        TargetMasks(masks).at(torch.tensor([0, 1]), points),
        grid_sample(masks[:, None], points)[:, 0],
    )


def test_no_targets():
    none = TargetMasks(torch.zeros(0, 4, 5, dtype=torch.bool))
    assert none.at(torch.zeros(0, dtype=torch.int64), torch.rand(0, 6, 2)).shape == (0, 6)


def test_most_uncertain_candidates_are_taken():
    logits = random(3, 1, 6, 8, seed=2) - 0.5
    torch.manual_seed(0)
    points = sample_uncertain_points(logits, 20, 3.0, 0.75)
    torch.manual_seed(0)
    candidates, others = torch.rand(3, 60, 2), torch.rand(3, 5, 2)
    assert points.shape == (3, 20, 2)
    assert torch.equal(points[:, 15:], others)
    chosen = grid_sample(logits, points[:, :15])[:, 0].abs().sort(1).values
    expected = grid_sample(logits, candidates)[:, 0].abs().sort(1).values[:, :15]
    torch.testing.assert_close(chosen, expected)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_all_or_none_by_uncertainty(ratio):
    logits = random(2, 1, 6, 8) - 0.5
    torch.manual_seed(0)
    points = sample_uncertain_points(logits, 10, 1.0, ratio)
    torch.manual_seed(0)
    candidates, others = torch.rand(2, 10, 2), torch.rand(2, 10, 2)
    # One candidate per point: with ratio 1 all of them, in another order.
    target = others if ratio == 0 else candidates
    assert points.sum().item() == pytest.approx(target.sum().item())
    assert sample_uncertain_points(logits[:0], 10, 3.0, 0.75).shape == (0, 10, 2)


@pytest.mark.parametrize(("oversample", "ratio"), [(0.5, 0.75), (3.0, -0.1), (3.0, 1.5)])
def test_bad_ratios(oversample, ratio):
    with pytest.raises(ValueError, match="oversample_ratio=0.5|importance_sample_ratio="):
        sample_uncertain_points(torch.zeros(1, 1, 2, 2), 4, oversample, ratio)


def test_limits_by_device_type():
    limits = {"cpu": 1, "cuda": 2}
    assert max_elements(limits, torch.device("cpu")) == 1
    assert max_elements(limits, torch.device("cuda", 1)) == 2
    assert max_elements(limits, torch.device("xpu")) == 2
