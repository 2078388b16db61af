"""Launch each CUDA kernel of deformable attention once in fp32 and bf16, for a profiler.

    ncu ... python tools/gpu_steps/kernels.py [--device cpu] [--size 1024]

The fast kernels take 8 heads of 32 channels at the levels of an image; the general ones get 30
channels, and the deterministic backward runs in fp32.
"""

import argparse
from dataclasses import replace

import step_result  # noqa: F401, first: it adds the path of `op_backends`
import torch
from op_backends import Case, Inputs, make_inputs, random_gradient


def launch(x: Inputs, deterministic: bool = False) -> None:
    """Forward and backward of the fused operator."""
    ops = torch.ops.mask2former
    flat = [size for shape in x.shapes for size in shape]
    points = x.reference, x.points, x.weights
    ops.ms_deform_attn_fused(x.value, flat, *points)
    grad = random_gradient(x)
    ops.ms_deform_attn_fused_backward(grad, x.value, flat, *points, deterministic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--size", type=int, default=1024, help="of the square image [1024]")
    options = parser.parse_args()
    for dtype in ("fp32", "bf16"):
        case = Case("projections", options.device, dtype, options.size, options.size, 1)
        x = make_inputs(case)
        launch(x)
        launch(replace(x, value=x.value[..., :30].contiguous()))
        if dtype == "fp32":
            launch(x, deterministic=True)


if __name__ == "__main__":
    main()
