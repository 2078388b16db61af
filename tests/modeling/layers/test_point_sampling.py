"""The deterministic backward of point sampling against that of grid_sample.

Shape letters: N maps, C channels, H W pixels, P points.
"""

import pytest
import torch
from detectron2.projects.point_rend import point_features
from torch import Tensor

from mask2former.modeling.layers import point_sampling
from mask2former.modeling.layers.point_sampling import DeterministicPointSample, point_sample

# Corners and edges of the image, and points outside, near and far.
SPECIAL = torch.tensor(
    [[0, 0], [1, 1], [0, 1], [0.5, 0], [1, 0.3], [-0.01, 0.5], [1.02, 0.5], [0.5, -3], [9, 9]]
)


def random(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_points(number: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(number, 100 + 9, 2): inside, up to a fifth outside, and the special ones."""
    inside = random(number, 100, 2, seed=1, dtype=dtype) * 1.4 - 0.2
    return torch.cat((inside, SPECIAL.to(dtype).expand(number, -1, -1)), 1)


def gradient(sample, maps: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Samples, and the gradient of their sum with random weights."""
    maps = maps.clone().requires_grad_()
    samples = sample(maps, points)
    (samples * random(*samples.shape, seed=2).to(samples.dtype)).sum().backward()
    return samples.detach(), maps.grad


def by_grid_sample(maps: Tensor, points: Tensor) -> Tensor:
    return point_features.point_sample(maps, points, align_corners=False)


@pytest.fixture
def deterministic(monkeypatch):
    """Take CPU tensors for those of a GPU in deterministic mode."""
    monkeypatch.setattr(point_sampling, "is_deterministic", lambda x: True)


def test_gradient_by_hand():
    # Between the two pixels of the first row, three quarters of the way to the second.
    maps = torch.zeros(1, 1, 2, 2, requires_grad=True)
    points = torch.tensor([[[0.625, 0.25], [0.625, 0.25]]])
    samples = DeterministicPointSample.apply(maps, points)
    samples.backward(torch.tensor([[[1.0, 3.0]]]))
    assert maps.grad.tolist() == [[[[1.0, 3.0], [0.0, 0.0]]]]


@pytest.mark.parametrize("size", [(5, 9), (1, 1), (1, 7), (40, 30)])
@pytest.mark.parametrize("channels", [1, 3])
def test_gradient_equals_that_of_grid_sample(size, channels):
    maps, points = random(2, channels, *size), random_points(2)
    samples, grad = gradient(DeterministicPointSample.apply, maps, points)
    expected_samples, expected = gradient(by_grid_sample, maps, points)
    assert torch.equal(samples, expected_samples)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    points = random_points(2)
    maps = random(2, 2, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: DeterministicPointSample.apply(x, points), maps)


def test_no_maps():
    maps = torch.zeros(0, 1, 4, 5, requires_grad=True)
    DeterministicPointSample.apply(maps, torch.zeros(0, 6, 2)).sum().backward()
    assert maps.grad.shape == maps.shape


def test_half_precision_under_autocast():
    """As grid_sample: samples in float32, a gradient in the dtype of the maps."""
    maps, points = random(2, 1, 6, 7).bfloat16(), random_points(2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        samples, grad = gradient(DeterministicPointSample.apply, maps, points)
        expected_samples, expected = gradient(by_grid_sample, maps, points)
    assert samples.dtype == torch.float32 and grad.dtype == torch.bfloat16
    assert torch.equal(samples, expected_samples)
    torch.testing.assert_close(grad, expected)


def test_second_derivative_is_refused():
    maps = random(1, 1, 4, 5).requires_grad_()
    samples = DeterministicPointSample.apply(maps, random_points(1))
    (grad,) = torch.autograd.grad(samples.square().sum(), maps, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def graph_of(x: Tensor) -> str:
    """Names of the operators that lead to x, from the last to the first."""
    names, node = [], x.grad_fn
    while node is not None:
        names.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    return " ".join(names)


def test_cpu_keeps_grid_sample():
    """It adds in a fixed order there, and is faster."""
    torch.use_deterministic_algorithms(True)
    try:
        samples = point_sample(
            random(1, 1, 4, 5).requires_grad_(), random_points(1), align_corners=False
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert "DeterministicPointSample" not in graph_of(samples)


def test_chosen_in_deterministic_mode(deterministic):
    maps, points = random(1, 1, 4, 5).requires_grad_(), random_points(1)
    samples = point_sample(maps, points, align_corners=False)
    assert "DeterministicPointSample" in graph_of(samples)
    # Whatever else Detectron2's function does, it does.
    for other_points, options in (
        (points, {"align_corners": True}),
        (points, {"mode": "nearest", "align_corners": False}),
        (points.clone().requires_grad_(), {"align_corners": False}),
        (points[:, None], {"align_corners": False}),
    ):
        samples = point_sample(maps, other_points, **options)
        assert "DeterministicPointSample" not in graph_of(samples)
        expected = point_features.point_sample(maps, other_points, **options)
        assert torch.equal(samples, expected)
