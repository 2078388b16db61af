"""Calls the operators of one library with sizes and locations that could cause bad indices.

    python exercise_kernels.py /path/to/library.so

test_kernels.py runs this on a build with the address sanitizer. Prints "clean" at the end. Results
are only checked to be finite; tests of the package's own library compare values.
"""

import itertools
import sys

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


def exercise(shapes, channels, points, kind, dtype, batch=2, queries=5, heads=2) -> None:
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
    results = [
        ops.ms_deform_attn(value, flat, locations, weights),
        *ops.ms_deform_attn_backward(grad, value, flat, locations, weights, False),
        ops.ms_deform_attn_fused(value, flat, reference, locations * 9, weights.flatten(3)),
        *ops.ms_deform_attn_fused_backward(
            grad, value, flat, reference, locations * 9, weights.flatten(3), False
        ),
    ]
    assert all(result.isfinite().all() for result in results), (shapes, channels, points, kind)


def main() -> None:
    torch.ops.load_library(sys.argv[1])
    torch.manual_seed(0)
    for shapes, channels, points, kind in itertools.product(
        SHAPES, CHANNELS, POINTS, ("around", "borders", "wild")
    ):
        exercise(shapes, channels, points, kind, torch.float32)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        exercise(SHAPES[0], 32, 4, "around", dtype)
    for batch, queries, heads, points in ((0, 5, 2, 4), (2, 0, 2, 4), (2, 5, 0, 4), (2, 5, 2, 0)):
        exercise(SHAPES[0], 32, points, "around", torch.float32, batch, queries, heads)
    # More queries than one block takes, and more work items than threads.
    exercise([(20, 30), (10, 15)], 32, 4, "around", torch.float32, queries=333, heads=8)
    print("clean")


if __name__ == "__main__":
    main()
