"""Calls the operators of one library with sizes and locations that could cause bad indices.

    python exercise_kernels.py /path/to/library.so [DEVICE [SHARE]]

test_kernels.py runs this on a build with the address sanitizer, tools/gpu_check.py on a GPU under
compute-sanitizer. SHARE n runs each n-th of the first cases only, for slow tools. Prints "clean" at
the end. Results are only checked to be finite; tests of the package's own library compare values.
"""

import itertools
import sys
from functools import partial

import torch

SHAPES = [[(5, 7), (3, 4), (1, 1)], [(1, 1)], [(0, 3), (2, 1)], [(9, 1), (1, 9)]]
CHANNELS = [1, 7, 8, 16, 30, 32, 64, 71]
POINTS = [1, 3, 4, 13]


def make_locations(size: tuple[int, ...], kind: str, dtype: torch.dtype) -> torch.Tensor:
    if kind == "around":  # well inside, on the border, outside
        return torch.rand(*size, 2, dtype=dtype) * 2 - 0.5
    if kind == "borders":
        return torch.randint(-1, 3, (*size, 2)).to(dtype) / 1
    values = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 2.0**31, -(2.0**63), 1e-30]
    return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (*size, 2))]


def exercise(
    shapes, channels, points, kind, dtype, batch=2, queries=5, heads=2, device="cpu"
) -> None:
    ops = torch.ops.mask2former
    flat = [size for shape in shapes for size in shape]
    positions = sum(height * width for height, width in shapes)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    value = torch.randn(batch, positions, heads, channels).to(dtype)
    size = (batch, queries, heads, len(shapes), points)
    locations = make_locations(size, kind, exact)
    weights = torch.rand(size, dtype=exact)
    grad = torch.randn(batch, queries, heads * channels).to(dtype)
    reference = torch.rand(1, queries, len(shapes), 2, dtype=exact)
    # Everything else is computed on the CPU: a sanitizer sees the kernels of the library only.
    value, grad = value.to(device), grad.to(device)
    classic = [x.to(device) for x in (locations, weights)]
    fused = [x.to(device) for x in (reference, locations * 9, weights.flatten(3))]
    results = [
        ops.ms_deform_attn(value, flat, *classic),
        ops.ms_deform_attn_fused(value, flat, *fused),
    ]
    # The CPU kernels have one backward.
    for deterministic in (False,) if device == "cpu" else (False, True):
        results += ops.ms_deform_attn_backward(grad, value, flat, *classic, deterministic)
        results += ops.ms_deform_attn_fused_backward(grad, value, flat, *fused, deterministic)
    finite = [result.cpu().isfinite().all() for result in results]
    assert all(finite), (shapes, channels, points, kind)


def main() -> None:
    torch.ops.load_library(sys.argv[1])
    device = sys.argv[2] if len(sys.argv) > 2 else "cpu"
    share = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    torch.manual_seed(0)
    run = partial(exercise, device=device)
    cases = list(itertools.product(SHAPES, CHANNELS, POINTS, ("around", "borders", "wild")))
    for shapes, channels, points, kind in cases[::share]:
        run(shapes, channels, points, kind, torch.float32)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        run(SHAPES[0], 32, 4, "around", dtype)
    for batch, queries, heads, points in ((0, 5, 2, 4), (2, 0, 2, 4), (2, 5, 0, 4), (2, 5, 2, 0)):
        run(SHAPES[0], 32, points, "around", torch.float32, batch, queries, heads)
    # One query on each position, as in the pixel decoder.
    for dtype in (torch.float32, torch.bfloat16):
        run(SHAPES[0], 32, 4, "around", dtype, queries=sum(h * w for h, w in SHAPES[0]))
    # More queries than one block takes, and more work items than threads.
    run([(20, 30), (10, 15)], 32, 4, "around", torch.float32, queries=333, heads=8)
    print("clean")


if __name__ == "__main__":
    main()
