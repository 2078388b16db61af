"""``python -m mask2former.ops``: the available backends, what they were built for, and a self-test.

Exits with status 1 if a compiled kernel disagrees with the PyTorch formulation.
"""

import sys

import torch

from . import _library
from ._kernels import COMPILED_DEVICES
from .ms_deform_attn import _pytorch_formulation, ms_deform_attn

_SHAPES = [(5, 7), (3, 4), (1, 1)]
# For half precision values, the output and the gradient of the values are rounded once.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def self_test(device: str, dtype: torch.dtype) -> float:
    """The largest difference between the compiled op and the PyTorch formulation in float64.

    Compares outputs and gradients, scaled to about unit size, for random locations inside and
    outside the levels.
    """
    generator = torch.Generator().manual_seed(0)
    size = (2, 9, 8, len(_SHAPES), 4)
    positions = sum(height * width for height, width in _SHAPES)
    value = torch.randn(2, positions, 8, 32, generator=generator).to(device, dtype)
    locations = (torch.rand(*size, 2, generator=generator) * 1.6 - 0.3).to(device)
    weights = torch.rand(size, generator=generator).flatten(3).softmax(-1).view(size).to(device)
    grad = torch.randn(2, 9, 256, generator=generator).to(device, dtype)
    results = []
    for function, as_dtype in ((ms_deform_attn, None), (_pytorch_formulation, torch.float64)):
        inputs = [
            x.to(as_dtype or x.dtype).detach().requires_grad_() for x in (value, locations, weights)
        ]
        out = function(inputs[0], _SHAPES, inputs[1], inputs[2])
        gradients = torch.autograd.grad(out, inputs, grad.to(out.dtype))
        # Gradients of locations grow with the size of the level.
        results.append([out, gradients[0], gradients[1] / 7, gradients[2] / 32**0.5])
    return max((a.double() - b).abs().max().item() for a, b in zip(*results, strict=True))


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
        for dtype, tolerance in _TOLERANCES.items():
            error = self_test(device, dtype)
            # Not "error > tolerance": NaN fails.
            passed = error <= tolerance
            failed |= not passed
            print(
                f"self-test on {device} in {str(dtype).removeprefix('torch.')}: "
                f"{'passed' if passed else 'FAILED'}, largest difference {error:.1e}"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
