"""``python -m mask2former.ops``: the available backends, what they were built for, and a self-test.

The self-test compares `ms_deform_attn` for arbitrary queries, and `ms_deform_attn_fused` as the
pixel decoder calls it, with one query on every position. Exits with status 1 if a compiled kernel
disagrees with the PyTorch formulation.
"""

import sys

import torch
from torch import Tensor

from . import _library
from ._kernels import COMPILED_DEVICES
from .ms_deform_attn import _pytorch_formulation, ms_deform_attn, ms_deform_attn_fused

_SHAPES = [(5, 7), (9, 14), (18, 27)]
_BATCH, _HEADS, _CHANNELS, _POINTS = 2, 8, 32, 4
_FUNCTIONS = ("classic", "fused")
# Of the largest entry. In half precision, the output and the gradient of the values are rounded
# once.
_TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 1e-3,
}


def make_inputs(function: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Inputs of a function on the CPU.

    Samples stay at least 1/64 pixel away from where the gradient of the locations jumps.

    Returns:
        Values and points and weights of the function, and reference points (1, Q, L, 2).
    """
    generator = torch.Generator().manual_seed(0)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    size = torch.tensor(_SHAPES, dtype=exact).flip(-1)[:, None]  # (L, 1, 2) width, height
    grids = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
        for h, w in _SHAPES
    ]
    grid = torch.cat(grids)
    reference = grid if function == "fused" else torch.rand(33, 2, generator=generator)
    reference = reference.to(exact)[None, :, None].repeat(1, 1, len(_SHAPES), 1)
    shape = (_BATCH, reference.shape[1], _HEADS, len(_SHAPES), _POINTS)
    start = reference[:, :, None, :, None] * size - 0.5  # (1, Q, 1, L, 1, 2) pixels
    pixels = start + 4 * torch.randn(*shape, 2, generator=generator, dtype=exact)
    cell = pixels.floor()
    pixels = cell + (pixels - cell).clamp(1 / 64, 63 / 64)
    logits = torch.randn(*shape[:3], len(_SHAPES) * _POINTS, generator=generator, dtype=exact)
    value = torch.randn(_BATCH, len(grid), _HEADS, _CHANNELS, generator=generator).to(dtype)
    if function == "fused":
        return [value, pixels - start, logits], reference
    return [value, (pixels + 0.5) / size, logits.softmax(-1).view(shape)], reference


def run(
    function: str, inputs: list[Tensor], reference: Tensor, deterministic: bool
) -> list[Tensor]:
    """Output and gradients of the compiled op."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    if function == "fused":
        out = ms_deform_attn_fused(leaves[0], _SHAPES, reference, *leaves[1:])
    else:
        out = ms_deform_attn(leaves[0], _SHAPES, *leaves[1:])
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        return [out.detach(), *torch.autograd.grad(out, leaves, _gradient(out))]
    finally:
        torch.use_deterministic_algorithms(before)


def run_formulation(function: str, inputs: list[Tensor], reference: Tensor) -> list[Tensor]:
    """Output and gradients of the PyTorch formulation in float64."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    value, points, weights = leaves
    if function == "fused":
        size = torch.tensor(_SHAPES, device=value.device).flip(-1)[:, None]
        points = reference.double()[:, :, None, :, None] + points / size
        weights = weights.softmax(-1).view(points.shape[:-1])
    out = _pytorch_formulation(value, _SHAPES, points, weights)
    return [out.detach(), *torch.autograd.grad(out, leaves, _gradient(out))]


def _gradient(out: Tensor) -> Tensor:
    """A gradient of the output whose numbers every dtype represents exactly."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-4, 5, out.shape, generator=generator).div(2).to(out.device, out.dtype)


def self_test(device: str, function: str, dtype: torch.dtype) -> tuple[float, bool]:
    """Compare outputs and all gradients of the compiled op with the PyTorch formulation.

    Returns:
        The largest difference relative to the largest entry of its tensor, of the default and of
        the deterministic backward, and whether the latter gives the same bits twice.
    """
    inputs, reference = make_inputs(function, dtype)
    inputs, reference = [x.to(device) for x in inputs], reference.to(device)
    expected = run_formulation(function, inputs, reference)
    runs = [
        run(function, inputs, reference, deterministic) for deterministic in (False, True, True)
    ]
    errors = [
        ((x.double() - y).abs().max() / y.abs().max()).item()
        for results in runs
        for x, y in zip(results, expected, strict=True)
    ]
    # max() may drop NaN.
    error = max(errors) if all(e == e for e in errors) else float("nan")
    return error, all(torch.equal(x, y) for x, y in zip(runs[1], runs[2], strict=True))


def main() -> int:
    if not _library.is_loaded():
        print(f"library: not built; the PyTorch formulation runs everywhere ({_library.REMEDY})")
        return 0
    print(f"library: {_library.LIBRARY_PATH}")
    print(f"built on the LibTorch stable ABI for torch 2.11 and later; here: {torch.__version__}")
    architectures = _library.cuda_architectures()
    print(f"cpu: compiled, runs {_library.cpu_instructions()} here")
    print(f"cuda: compiled for {architectures}" if architectures else "cuda: not compiled")
    failed = False
    for device in sorted(COMPILED_DEVICES):
        if device == "cuda" and not torch.cuda.is_available():
            print("self-test on cuda: not run, no GPU is available")
            continue
        for function in _FUNCTIONS:
            for dtype, tolerance in _TOLERANCES.items():
                error, repeats = self_test(device, function, dtype)
                # Not "error > tolerance": NaN fails.
                passed = error <= tolerance and repeats
                failed |= not passed
                print(
                    f"self-test on {device}, {function}, {str(dtype).removeprefix('torch.')}: "
                    f"{'passed' if passed else 'FAILED'}, largest difference {error:.1e}"
                    + ("" if repeats else ", deterministic backward differs between two runs")
                )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
