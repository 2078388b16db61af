"""Inputs of `op`, and the implementations of multi-scale deformable attention that it compares.

Shape letters: B batch, S values of all levels together, Q queries (here Q = S), M heads, D channels
of a head, L levels, P points per level and head.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from checks import relative_error, require_equal, try_each
from options import DEVICES
from torch import Tensor

from mask2former.ops import backend, ms_deform_attn, ms_deform_attn_fused
from mask2former.ops.ms_deform_attn import _pytorch_formulation

NUM_HEADS, HEAD_DIM, NUM_POINTS = 8, 32, 4
STRIDES = (32, 16, 8)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# On norm(difference) / norm(reference). Wide in half precision: some peers accumulate in it.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
INPUTS = ("projections", "locations")
PASSES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One case; `inputs` and `dtype` are names in INPUTS and DTYPES."""

    inputs: str
    device: str
    dtype: str
    height: int
    width: int
    batch: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(self.height // stride, self.width // stride) for stride in STRIDES]

    def bytes_moved(self, passes: str) -> int:
        """Bytes that a pass must read or write, each tensor once (see BENCHMARKS.md)."""
        queries = sum(height * width for height, width in self.shapes)
        samples = self.batch * queries * NUM_HEADS * len(STRIDES) * NUM_POINTS
        value = self.batch * queries * NUM_HEADS * HEAD_DIM * DTYPES[self.dtype].itemsize
        points, weights = samples * 8, samples * 4
        reference = queries * len(STRIDES) * 8 if self.inputs == "projections" else 0
        read = value + points + weights + reference
        forward = read + value  # the output is as large as the value
        backward = read + value + value + points + weights  # output's gradient; gradients
        return {"forward": forward, "backward": backward}.get(passes, forward + backward)


@dataclass(frozen=True)
class Inputs:
    """Arguments of all backends: projections, or the locations and weights made from them.

    Args:
        value: (B, S, M, D).
        points: offsets in pixels, or with `reference` None locations; (B, Q, M, L, P, 2).
        weights: logits (B, Q, M, L·P), or with `reference` None weights (B, Q, M, L, P).
        reference: (1, Q, L, 2) or None.
        shapes: size of each level.
        device_shapes: (L, 2), the same as a tensor on the device.
        starts: (L,), index of the first value of each level, on the device.
    """

    value: Tensor
    points: Tensor
    weights: Tensor
    reference: Tensor | None
    shapes: list[tuple[int, int]]
    device_shapes: Tensor
    starts: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.points, self.weights

    def locations(self) -> Tensor:
        """(B, Q, M, L, P, 2) in [0, 1]."""
        if self.reference is None:
            return self.points
        size = self.device_shapes.flip(-1)[:, None, :]  # (L, 1, 2): width, height
        return self.reference[:, :, None, :, None, :] + self.points / size

    def normalized_weights(self) -> Tensor:
        """(B, Q, M, L, P), summing to 1 over L and P."""
        if self.reference is None:
            return self.weights
        return self.weights.softmax(-1).unflatten(-1, (len(self.shapes), NUM_POINTS))


def make_inputs(case: Case) -> Inputs:
    """Random inputs, the same for the same case.

    Offsets spread over some pixels of every level, as after training: head m looks in direction
    2πm/M, point p is p pixels away (the module's initial state), plus independent noise with a
    standard deviation of 2 pixels. Samples stay at least 1/64 pixel away from where the gradient
    jumps, so that rounding does not decide the side.
    """
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor(case.shapes)  # (L, 2)
    centres = []
    for height, width in case.shapes:
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        centres.append(torch.stack(((x + 0.5) / width, (y + 0.5) / height), -1).flatten(0, 1))
    reference = torch.cat(centres)[None, :, None].repeat(1, 1, len(STRIDES), 1)
    num_queries = reference.shape[1]
    angle = torch.arange(NUM_HEADS) * (2 * torch.pi / NUM_HEADS)
    direction = torch.stack((angle.cos(), angle.sin()), -1)[:, None, None]  # (M, 1, 1, 2)
    steps = torch.arange(1, NUM_POINTS + 1)[:, None]  # (P, 1)
    points_shape = (case.batch, num_queries, NUM_HEADS, len(STRIDES), NUM_POINTS, 2)
    offsets = torch.randn(points_shape, generator=generator).mul_(2).add_(direction * steps)
    extent = size.flip(-1)[:, None, :]
    pixels = reference[:, :, None, :, None, :] * extent - 0.5  # of the reference points
    cell = (pixels + offsets).floor_()
    offsets = torch.minimum(torch.maximum(offsets, cell + 1 / 64 - pixels), cell + 63 / 64 - pixels)
    logits = torch.randn(*points_shape[:3], len(STRIDES) * NUM_POINTS, generator=generator)
    value = torch.randn(case.batch, num_queries, NUM_HEADS, HEAD_DIM, generator=generator)
    area = size.prod(1)
    inputs = Inputs(
        value.to(case.device, DTYPES[case.dtype]),
        offsets.to(case.device),
        logits.to(case.device),
        reference.to(case.device),
        case.shapes,
        size.to(case.device),
        (area.cumsum(0) - area).to(case.device),
    )
    if case.inputs == "projections":
        return inputs
    points, weights = inputs.locations(), inputs.normalized_weights()
    return replace(inputs, points=points, weights=weights, reference=None)


def _fused(x: Inputs) -> Tensor:
    return ms_deform_attn_fused(x.value, x.shapes, x.reference, x.points, x.weights)


def _classic(x: Inputs) -> Tensor:
    return ms_deform_attn(x.value, x.shapes, x.locations(), x.normalized_weights())


def _pytorch(x: Inputs) -> Tensor:
    return _pytorch_formulation(x.value, x.shapes, x.locations(), x.normalized_weights())


def _pytorch_stacked(x: Inputs) -> Tensor:
    """The common formulation: keep the samples of all levels, then weight and sum them at once."""
    batch, _, num_heads, dim = x.value.shape
    grids = (2 * x.locations() - 1).transpose(1, 2).flatten(0, 1)  # (B·M, Q, L, P, 2)
    areas = [height * width for height, width in x.shapes]
    images = x.value.permute(0, 2, 3, 1).flatten(0, 1).split(areas, -1)  # L of (B·M, D, H·W)
    samples = [
        F.grid_sample(image.unflatten(-1, shape), grids[:, :, level], align_corners=False)
        for level, (image, shape) in enumerate(zip(images, x.shapes, strict=True))
    ]  # L of (B·M, D, Q, P)
    weights = x.normalized_weights().transpose(1, 2).flatten(0, 1).flatten(2)[:, None]
    out = (torch.stack(samples, -2).flatten(-2) * weights).sum(-1)  # (B·M, D, Q)
    return out.view(batch, num_heads * dim, -1).transpose(1, 2).contiguous()


class _OriginalFunction(torch.autograd.Function):
    """Autograd for the extension of the original release, which has separate passes only."""

    @staticmethod
    def forward(ctx, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        # The last argument, im2col_step: all images at once, as its users set it.
        extension = importlib.import_module("MultiScaleDeformableAttention")
        return extension.ms_deform_attn_forward(*inputs, inputs[0].shape[0])

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        inputs = ctx.saved_tensors
        extension = importlib.import_module("MultiScaleDeformableAttention")
        value, locations, weights = extension.ms_deform_attn_backward(
            *inputs, grad_output.contiguous(), inputs[0].shape[0]
        )
        return value, None, None, locations, weights


def _original(x: Inputs) -> Tensor:
    locations, weights = x.locations(), x.normalized_weights()
    return _OriginalFunction.apply(x.value, x.device_shapes, x.starts, locations, weights)


def _deformops(x: Inputs, name: str, **options: Any) -> Tensor:
    registry = importlib.import_module("deformops.registry")
    method = "linear" if x.reference is None else "softmax"  # the op includes the softmax
    arguments = (x.value, x.device_shapes, x.starts, x.locations(), x.weights)
    return registry.msda(*arguments, method=method, backend=registry.Backend(name), **options)


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Args:
        call: computes (B, Q, M·D).
        module: the module it needs.
        package: the distribution of that module.
        devices: the devices it runs on.
        inputs: the inputs it takes.
        compiled: whether it needs this project's compiled kernels.
        is_float32: takes float32 values only; they are cast before the clock starts.
        weights_as_value: takes weights or logits in the dtype of the value only.
    """

    call: Callable[[Inputs], Tensor]
    module: str | None = None
    package: str = ""
    devices: tuple[str, ...] = DEVICES
    inputs: tuple[str, ...] = INPUTS
    compiled: bool = False
    is_float32: bool = False
    weights_as_value: bool = False

    def why_not(self, case: Case) -> str:
        """Why it cannot take the case; empty if it can."""
        if case.inputs not in self.inputs:
            return f"does not take {case.inputs}"
        if case.device not in self.devices:
            return f"does not run on {case.device}"
        if self.compiled and backend(case.device) != "compiled":
            return f"was not compiled for {case.device}"
        try:
            importlib.import_module(self.module or "torch")
        except ImportError as error:
            return f"no {self.package}: {error}"
        return ""

    def leaves(self, x: Inputs) -> Inputs:
        """Inputs as leaves that require gradients, in the dtypes of this backend."""
        value = x.value.float() if self.is_float32 else x.value
        weights = x.weights.to(value.dtype) if self.weights_as_value else x.weights
        value, points, weights = (y.detach().requires_grad_() for y in (value, x.points, weights))
        return replace(x, value=value, points=points, weights=weights)


_peer = partial(Backend, module="deformops.registry", package="deformops", weights_as_value=True)
BACKENDS = {
    "fused": Backend(_fused, inputs=("projections",), compiled=True),
    "classic": Backend(_classic, compiled=True),
    "pytorch": Backend(_pytorch),
    "pytorch-stacked": Backend(_pytorch_stacked, is_float32=True),
    "original": Backend(
        _original,
        module="MultiScaleDeformableAttention",
        package="ms-deform-attn",
        devices=("cuda",),
        is_float32=True,
    ),
    "deformops-eager": _peer(partial(_deformops, name="eager")),
    "deformops-triton": _peer(partial(_deformops, name="triton", fp32acc=False), devices=("cuda",)),
    "deformops-triton-fp32acc": _peer(
        partial(_deformops, name="triton", fp32acc=True), devices=("cuda",)
    ),
    "deformops-cuda": _peer(partial(_deformops, name="cuda"), devices=("cuda",)),
}


def make_call(name: str, inputs: Inputs, grad: Tensor, passes: str) -> Callable[[], object]:
    """The call that a measurement of a pass times."""
    backend = BACKENDS[name]
    x = backend.leaves(inputs)

    def forward() -> Tensor:
        with torch.no_grad():
            return backend.call(x)

    def both() -> tuple[Tensor, ...]:
        out = backend.call(x)
        return torch.autograd.grad(out, x.leaves, grad.to(out.dtype))

    if passes != "backward":
        return {"forward": forward, "forward+backward": both}[passes]
    out = backend.call(x)
    grad = grad.to(out.dtype)
    return lambda: torch.autograd.grad(out, x.leaves, grad, retain_graph=True)


def random_gradient(inputs: Inputs) -> Tensor:
    """A gradient of the output, (B, Q, M·D)."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(inputs.value.flatten(2).shape, generator=generator)
    return grad.to(inputs.value.device, inputs.value.dtype)


def results_of(name: str, inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients, by name."""
    x = BACKENDS[name].leaves(inputs)
    out = BACKENDS[name].call(x)
    grads = torch.autograd.grad(out, x.leaves, grad.to(out.dtype))
    return {"output": out.detach()} | dict(zip(("value", "points", "weights"), grads, strict=True))


def check_numbers(results: dict[str, Tensor], reference: dict[str, Tensor], dtype: str) -> None:
    """Raise WrongNumbers unless norm(difference) / norm(reference) is within the tolerance."""
    errors = {key: relative_error(results[key], expected) for key, expected in reference.items()}
    require_equal(errors, TOLERANCES[dtype], "the PyTorch formulation")


def usable_backends(
    case: Case, names: Sequence[str], inputs: Inputs, grad: Tensor
) -> tuple[list[str], dict[str, str], dict[str, Exception]]:
    """Try every backend once and compare it with the PyTorch formulation in float32.

    Returns:
        names of the backends that pass; {name: reason} of those that do not take the case;
        {name: error} of those that failed.
    """
    in_float32 = replace(inputs, value=inputs.value.float())
    reference = results_of("pytorch", in_float32, grad.float())
    reasons = {name: BACKENDS[name].why_not(case) for name in names}
    absent = {name: reason for name, reason in reasons.items() if reason}

    def check(name: str) -> None:
        check_numbers(results_of(name, inputs, grad), reference, case.dtype)

    usable, failed = try_each([name for name in names if name not in absent], check)
    return usable, absent, failed
