r"""The CUDA kernels, compiled for the CPU, against the PyTorch formulation in float64.

For machines without a GPU; cuda_emulation.h says what this verifies and what it does not. Positions
that must not be read hold NaN. To find accesses out of bounds as well:

    CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined" \
        LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
        ASAN_OPTIONS=detect_leaks=0 python -m pytest tests/ops/test_cuda_emulation.py
"""

import ctypes
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mask2former.ops.ms_deform_attn import _pytorch_formulation

FOLDER = Path(__file__).resolve().parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++, clang++)")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("emulation") / "kernels.so"
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command += [*shlex.split(os.environ.get("CXXFLAGS", "")), "-o", str(library)]
    subprocess.run([*command, str(FOLDER / "cuda_emulation.cpp")], check=True)
    return ctypes.CDLL(str(library))


@dataclass
class Case:
    """Sizes and sample distribution; ``queries`` None puts one query on every position."""

    shapes: tuple[tuple[int, int], ...] = ((4, 7), (3, 2), (1, 1))
    points: int = 4
    heads: int = 3
    channels: int = 32
    queries: int | None = 21
    batch: int = 2
    smooth: bool = False  # queries on the first positions, all with the same offsets
    one_reference: bool = False  # shared by all images


def make_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Value, reference points, offsets, logits, grad_output; some samples are far, NaN or inf."""
    generator = torch.Generator().manual_seed(3)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    positions = sum(height * width for height, width in case.shapes)
    queries = positions if case.queries is None else case.queries
    levels = len(case.shapes)
    value = torch.randn(case.batch, positions, case.heads, case.channels, generator=generator)
    size = (case.batch, queries, case.heads, levels, case.points)
    offsets = torch.randn(*size, 2, generator=generator, dtype=exact) * 2
    if case.smooth:
        offsets = offsets[:1, :1].expand(*size, 2).clone()
    offsets[0, 1::7, 0, -1] = float("nan")
    offsets[0, 2::7, 1 % case.heads, 0, 0] = float("inf")
    offsets[-1, 3::7, 0, 0] = 1e30
    offsets[-1, 4::7, :, -1, :, 1] = -float("inf")
    references = 1 if case.one_reference else case.batch
    if case.queries is None or case.smooth:
        grid = [
            torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w)
            for h, w in case.shapes
        ]
        centres = torch.cat(grid)[:queries].flip(-1)
        reference = centres[None, :, None].repeat(references, 1, levels, 1)
    else:
        reference = torch.rand(references, queries, levels, 2, generator=generator)
    logits = torch.randn(*size[:3], levels * case.points, generator=generator, dtype=exact)
    grad_output = torch.randn(*size[:2], case.heads * case.channels, generator=generator)
    return value.to(dtype), reference.to(exact), offsets, logits, grad_output.to(dtype)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(numbers: list[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def pack_sizes(value: Tensor, case: Case, points: Tensor, reference: Tensor | None) -> ctypes.Array:
    per_image = int(reference is not None and reference.shape[0] != 1)
    return integers([*value.shape, points.shape[1], len(case.shapes), case.points, per_image])


def expected(
    case: Case, value: Tensor, reference: Tensor | None, points: Tensor, weights: Tensor, grad
) -> list[Tensor]:
    """The output and the gradients of value, points and weights, in float64."""
    value, points, weights, grad = (x.double() for x in (value, points, weights, grad))
    for leaf in (value, points, weights):
        leaf.requires_grad_()
    is_finite = points.isfinite().all(-1, keepdim=True)
    finite = torch.where(is_finite, points, -1e6)
    locations, shares = finite, weights
    if reference is not None:
        size = torch.tensor([(w, h) for h, w in case.shapes], dtype=torch.float64).clamp(min=1)
        locations = reference.double()[:, :, None, :, None] + finite / size[:, None]
        shares = weights.softmax(-1).view(points.shape[:-1])
    locations = locations.clamp(-1e3, 1e3)  # grid_sample is inexact farther out
    output = _pytorch_formulation(value, list(case.shapes), locations, shares)
    return [output.detach(), *torch.autograd.grad(output, (value, points, weights), grad)]


def run_kernels(
    kernels, case: Case, value, reference, points, weights, grad_output, mode: str
) -> list[Tensor]:
    """The output and the gradients; ``mode`` is how grad_value is summed."""
    dtype = DTYPES.index(value.dtype)
    sizes = pack_sizes(value, case, points, reference)
    shapes = integers([size for shape in case.shapes for size in shape])
    inputs = [pointer(x) for x in (value, reference, points, weights)]
    output = torch.full_like(grad_output, float("nan"))
    kernels.emulated_forward(dtype, sizes, shapes, *inputs, pointer(output))
    grad_value = torch.zeros(value.shape, dtype=points.dtype)
    grad_points, grad_weights = torch.full_like(points, 7.0), torch.full_like(weights, 7.0)
    room = (
        points.new_full((weights.numel() * 3,), float("nan")) if mode == "deterministic" else None
    )
    gradients = [pointer(x) for x in (grad_value, grad_points, grad_weights, room)]
    shared = int(mode == "shared memory")
    kernels.emulated_backward(
        dtype, shared, sizes, shapes, pointer(grad_output), *inputs, *gradients
    )
    return [output, grad_value, grad_points, grad_weights]


def check(kernels, case: Case, dtype: torch.dtype, fused: bool) -> None:
    value, reference, points, weights, grad_output = make_inputs(case, dtype)
    if not fused:
        size = torch.tensor([(w, h) for h, w in case.shapes], dtype=points.dtype).clamp(min=1)
        points = (reference[:, :, None, :, None] + points / size[:, None]).contiguous()
        weights = (weights - 0.5).view(points.shape[:-1])  # also negative weights
        reference = None
    target = expected(case, value, reference, points, weights, grad_output)
    # Positions that no sample touches must not be read.
    touched = expected(case, value, reference, points, weights, torch.rand_like(grad_output) + 1)[1]
    value = torch.where(touched != 0, value, float("nan")).contiguous()

    exact = 1e-11 if dtype == torch.float64 else 2e-5
    ulp = {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(dtype, 0)
    results = []
    for mode in ("registers", "shared memory", "deterministic"):
        got = run_kernels(kernels, case, value, reference, points, weights, grad_output, mode)
        results.append(got)
        names = ("output", "grad_value", "grad_points", "grad_weights")
        for name, one, other in zip(names, got, target, strict=True):
            largest = max(1.0, other.abs().max().item())
            atol = (exact + (ulp if name == "output" else 0)) * largest
            torch.testing.assert_close(
                one.double(),
                other,
                rtol=0,
                atol=atol,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    for other in results[1:]:
        assert torch.equal(results[0][2], other[2])
        assert torch.equal(results[0][3], other[3])


@pytest.mark.parametrize("fused", [False, True], ids=["classic", "fused"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_of_mask2former(kernels, dtype, fused):
    check(kernels, Case(), dtype, fused)


FOUR_LEVELS = ((6, 7), (4, 3), (2, 2), (1, 2))
CASES = {
    "positions": Case(queries=None, smooth=True, one_reference=True, heads=2),
    "positions, noisy": Case(queries=None, shapes=((9, 10), (5, 3)), batch=1, heads=2),
    "16 channels": Case(channels=16),
    "64 channels": Case(channels=64, queries=9),
    "1 channel": Case(channels=1, heads=1),
    "6 channels": Case(channels=6, batch=1),
    "30 channels": Case(channels=30, queries=9),
    "71 channels": Case(channels=71, queries=5),
    "16 samples": Case(shapes=FOUR_LEVELS, queries=13, one_reference=True),
    "5 samples": Case(shapes=((7, 6),), points=5, batch=1),
    "40 samples": Case(shapes=(*FOUR_LEVELS, (3, 3)), points=8, queries=11, heads=2),
    "6 samples, 1 query": Case(shapes=((3, 3), (0, 4), (2, 2)), points=2, queries=1, heads=1),
    # Cells that are consecutive in memory, but not neighbours.
    "run down a column": Case(shapes=((13, 1),), queries=11, points=8, smooth=True, batch=1),
    # Shared memory holds a part of the level only; then a few samples of a block, far apart.
    "larger than a window": Case(shapes=((23, 18), (5, 4)), queries=None, heads=1, batch=1),
    "far apart": Case(shapes=((60, 50),), points=6, queries=40, heads=1),
    "one column": Case(shapes=((13, 1), (1, 13)), queries=None, smooth=True, heads=1),
}


@pytest.mark.parametrize("fused", [False, True], ids=["classic", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_other_shapes(kernels, case, dtype, fused):
    check(kernels, case, dtype, fused)


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"channels": 30}, False),
        ({"batch": 65536}, False),
        ({"values": 2**24 - 3}, True),
        ({"values": 2**24}, False),  # rows of value no longer fit the 28 bits they have
        ({"queries": 2**30}, False),
        ({"points": 2**24}, False),
    ],
)
def test_limits_of_the_fast_kernels(kernels, change, fits):
    names = ("batch", "values", "heads", "channels", "queries", "levels", "points", "per_image")
    sizes = {**dict(zip(names, (2, 21504, 8, 32, 21504, 3, 4, 0), strict=True)), **change}
    assert bool(kernels.fits_fast_kernels(integers(list(sizes.values())))) == fits


@pytest.mark.parametrize(
    ("text", "selected"),
    [(None, 0), (b"", 0), (b"registers", 0), (b"shared", 1), (b"Shared", -1), (b"1", -1)],
)
def test_environment_variable_of_backward(kernels, text, selected):
    assert kernels.parsed_collect(text) == selected


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 8, 160, 641, 2**16 + 1, 2**30, 2**31 - 1])
def test_division_by_a_launch_constant(kernels, divisor):
    multiples = [divisor * n for n in (1, 2, 3, 1000, (2**31 - 1) // divisor)]
    for number in {0, 1, 12345, 2**31 - 1, *multiples, *(n - 1 for n in multiples)}:
        if number < 2**31:
            assert kernels.divided(number, divisor) == number // divisor
