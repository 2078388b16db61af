"""Compiled operators on each device against the PyTorch formulation in float64.

The cases are those of test_cuda_emulation.py, which runs the CUDA kernels' code without a GPU. Here
the operators themselves run: on the CPU and, with the marker `gpu`, on every CUDA device.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from load_script import load_script
from torch import Tensor

from mask2former.ops import backend, ms_deform_attn, ms_deform_attn_fused

emulation = load_script("tests/ops/test_cuda_emulation.py")
Case, CASES, DTYPES = emulation.Case, emulation.CASES, emulation.DTYPES

GPU = pytest.mark.gpu
ops = torch.ops.mask2former


@pytest.fixture(
    params=["cpu", pytest.param("cuda:0", marks=GPU), pytest.param("cuda:1", marks=GPU)]
)
def device(request) -> str:
    """A device that has compiled kernels; the current CUDA device is another one for cuda:1."""
    kind, _, index = request.param.partition(":")
    if kind == "cuda" and int(index) >= torch.cuda.device_count():
        pytest.skip(f"has {torch.cuda.device_count()} CUDA devices")
    if backend(kind) != "compiled":
        pytest.skip(f"the library was built without kernels for {kind}")
    return request.param


def make_inputs(case, dtype: torch.dtype, fused: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Inputs of the operator on the CPU, the gradient of the output, and expected results.

    Positions that must not be read hold NaN.
    """
    value, reference, points, weights, grad = emulation.make_inputs(case, dtype)
    if not fused:
        size = torch.tensor([(w, h) for h, w in case.shapes], dtype=points.dtype).clamp(min=1)
        points = (reference[:, :, None, :, None] + points / size[:, None]).contiguous()
        weights = (weights - 0.5).view(points.shape[:-1])
        reference = None
    expected = emulation.expected(case, value, reference, points, weights, grad)
    positive = torch.rand_like(grad) + 1
    touched = emulation.expected(case, value, reference, points, weights, positive)[1]
    value = torch.where(touched != 0, value, float("nan"))
    references = [reference] if fused else []
    return [value, *references, points, weights], grad, expected


def run_operators(
    case, inputs: list[Tensor], grad: Tensor, device: str, deterministic: bool
) -> list[Tensor]:
    """Output and gradients, from the operators themselves."""
    flat = list(itertools.chain(*case.shapes))
    value, *rest = (x.to(device) for x in inputs)
    name = "ms_deform_attn_fused" if len(rest) == 3 else "ms_deform_attn"
    out = getattr(ops, name)(value, flat, *rest)
    backward = getattr(ops, f"{name}_backward")
    return [out, *backward(grad.to(device), value, flat, *rest, deterministic)]


def check(results: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    exact = 1e-11 if dtype == torch.float64 else 2e-5
    ulp = {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(dtype, 0)
    names = ("output", "grad_value", "grad_points", "grad_weights")
    for name, one, other in zip(names, results, expected, strict=True):
        assert one.isfinite().all(), name
        is_rounded = name in ("output", "grad_value")
        atol = (exact + ulp * is_rounded) * max(1.0, other.abs().max().item())
        torch.testing.assert_close(
            one.cpu().double(), other, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def check_case(case, dtype: torch.dtype, fused: bool, device: str) -> None:
    inputs, grad, expected = make_inputs(case, dtype, fused)
    check(run_operators(case, inputs, grad, device, False), expected, dtype)
    runs = [run_operators(case, inputs, grad, device, True) for _ in range(2)]
    check(runs[0], expected, dtype)
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


MORE_CASES = {
    "mask2former": Case(),
    "pixel decoder": Case(shapes=((8, 10), (16, 20)), heads=8, queries=None, one_reference=True),
    "30 channels": Case(channels=30),
    "24 samples": Case(shapes=((6, 7), (4, 3), (2, 2)), points=8),
}


@pytest.mark.parametrize("fused", [False, True], ids=["classic", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES.values(), *MORE_CASES.values()], ids=[*CASES, *MORE_CASES])
def test_cases(case, dtype, fused, device):
    check_case(case, dtype, fused, device)


# The y axis of a grid ends at 65,535.
@pytest.mark.parametrize("channels", [32, 30])
@pytest.mark.parametrize("batch", [65535, 65537])
def test_large_batch(batch, channels, device):
    case = Case(((1, 2),), points=1, heads=1, channels=channels, queries=1, batch=batch)
    check_case(case, torch.float32, True, device)


def misalign(x: Tensor) -> Tensor:
    """A copy that starts one element after an aligned address."""
    room = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    return room.copy_(x)


def with_strides(x: Tensor) -> Tensor:
    """A copy whose dimensions are stored in reverse order, with gaps."""
    reverse = list(range(x.dim()))[::-1]
    return x.permute(reverse).contiguous().repeat_interleave(2, -1)[..., ::2].permute(reverse)


@pytest.mark.parametrize("fused", [False, True], ids=["classic", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [misalign, with_strides])
def test_memory_layout(change, dtype, fused, device):
    case = Case(one_reference=True)
    inputs, grad, expected = make_inputs(case, dtype, fused)
    inputs, grad = [x.to(device) for x in inputs], grad.to(device)
    for index in range(len(inputs) + 1):
        changed = [change(x) if i == index else x for i, x in enumerate((*inputs, grad))]
        for deterministic in (False, True):
            results = run_operators(case, changed[:-1], changed[-1], device, deterministic)
            check(results, expected, dtype)


@pytest.mark.parametrize("fused", [False, True], ids=["classic", "fused"])
def test_expanded_gradient(fused, device):
    """`sum().backward()` passes a gradient with strides of zero."""
    case = replace(CASES["16 samples"], channels=16)
    inputs, grad, _ = make_inputs(case, torch.float32, fused)
    ones = torch.ones_like(grad)
    reference = inputs[1] if fused else None
    clean = [x.nan_to_num() if i == 0 else x for i, x in enumerate(inputs)]
    expected = emulation.expected(case, clean[0], reference, *clean[-2:], ones)
    leaves = [x.to(device) for x in inputs]
    for i in (0, -2, -1):
        leaves[i].requires_grad_()
    function = ms_deform_attn_fused if fused else ms_deform_attn
    out = function(leaves[0], case.shapes, *leaves[1:])
    grads = torch.autograd.grad(out.sum(), [leaves[0], *leaves[-2:]])
    check([out.detach(), *grads], expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wild_locations(dtype, device):
    """Locations that are all NaN, infinite or huge sample nothing, and get no gradient."""
    case = Case(one_reference=True)
    inputs, grad, _ = make_inputs(case, dtype, True)
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 2.0**31])
    picked = torch.randint(len(values), inputs[2].shape, generator=torch.Generator().manual_seed(0))
    inputs[2] = values[picked]
    for deterministic in (False, True):
        results = run_operators(case, inputs, grad, device, deterministic)
        assert not any(x.any() for x in results)
