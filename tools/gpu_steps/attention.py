"""Backends of attention against the math backend in float64, with the masks of masked attention.

    python tools/gpu_steps/attention.py FOLDER [--device cpu] [--lengths 950,1600,4096,16384]

100 queries, batch 2, 8 heads of 32 channels; lengths are the pixels of a scale. Masks are boolean
or additive and shared by the heads. A row gives relative errors of the output and of the worst
gradient, "NaN" if one is not finite, and times of forward and of both passes; attention.md has all.
Fails if what torch chooses by itself, or our layer, is wrong; a backend that only exists is noted.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import step_result  # first: it adds the path of `report`
import torch
import torch.nn.functional as F
from report import markdown_table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mask2former.fast.attention import attend

BATCH, QUERIES, HEADS, CHANNELS = 2, 100, 8, 32
LENGTHS = (950, 1600, 4096, 16384)
MASKS = ("boolean", "additive", "none")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the relative errors of those that the model may run.
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
BACKENDS = {
    "chosen by torch": None,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
LAYER = "our layer"
REPEATS = 7

Attention = Callable[[list[Tensor]], Tensor]


def make_mask(kind: str, length: int, dtype: torch.dtype, device: str) -> Tensor | None:
    """(B, 1, T, S) as for `F.scaled_dot_product_attention`: a stretch of pixels per query.

    Every query attends somewhere, as in masked attention.
    """
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(2)
    start = torch.rand(BATCH, 1, QUERIES, 1, generator=generator) * length
    width = torch.rand(BATCH, 1, QUERIES, 1, generator=generator).square() * length + 1
    allowed = ((torch.arange(length) - start).abs() <= width).to(device)
    if kind == "boolean":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, -torch.inf)


def gradients(attention: Attention, inputs: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of the inputs; the output's gradient is the first input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[0].to(out.dtype))]


def errors(results: list[Tensor], expected: list[Tensor]) -> list[float]:
    """norm(difference) / norm(expected) of each; NaN if a result is not finite."""
    return [
        ((x.double() - y).norm() / y.norm()).item() if x.isfinite().all() else float("nan")
        for x, y in zip(results, expected, strict=True)
    ]


def milliseconds(run: Callable[[], object], device: str) -> float:
    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    samples = []
    for _ in range(REPEATS if device == "cuda" else 1):
        start = now()
        run()
        samples.append(now() - start)
    return statistics.median(samples) * 1e3


def measure(
    attention: Attention, inputs: list[Tensor], expected: list[Tensor], device: str
) -> dict:
    """Entries of a row; "error" alone if the backend refuses."""
    try:
        results = gradients(attention, inputs)
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0][:60]}
    out, *grads = errors(results, expected)
    worst = max(grads, key=lambda x: (x != x, x))

    def forward() -> None:
        with torch.no_grad():
            attention(inputs)

    return {
        "out": out,
        "grad": worst,
        "forward ms": milliseconds(forward, device),
        "both ms": milliseconds(lambda: gradients(attention, inputs), device),
    }


def heads_case(
    length: int, kind: str, dtype: torch.dtype, device: str
) -> dict[str, dict[str, Any]]:
    """The row of each backend, for projected queries, keys and values."""
    generator = torch.Generator().manual_seed(1)
    sizes = (QUERIES, length, length)
    inputs = [
        torch.randn(BATCH, HEADS, n, CHANNELS, generator=generator).to(device, dtype) for n in sizes
    ]
    mask = make_mask(kind, length, dtype, device)

    def exact(x: list[Tensor]) -> Tensor:
        wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*x, attn_mask=wide)

    expected = gradients(exact, [x.double() for x in inputs])
    rows = {}
    for name, backend in BACKENDS.items():

        def run(x: list[Tensor], backend=backend) -> Tensor:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*x, attn_mask=mask)

        rows[name] = measure(run, inputs, expected, device)
    return rows


def layer_case(length: int, kind: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The row of our attention layer with its projections, under autocast as in the model."""
    torch.manual_seed(1)
    layer = nn.MultiheadAttention(HEADS * CHANNELS, HEADS).to(device)
    wide = nn.MultiheadAttention(HEADS * CHANNELS, HEADS).to(device).double()
    wide.load_state_dict(layer.state_dict())
    generator = torch.Generator().manual_seed(1)
    sizes = (QUERIES, length, length)
    inputs = [
        torch.randn(n, BATCH, HEADS * CHANNELS, generator=generator).to(device) for n in sizes
    ]
    mask = make_mask(kind, length, torch.float32, device)
    blocked = ~mask if kind == "boolean" else mask

    def exact(x: list[Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            double = blocked.double() if kind == "additive" else blocked
            return attend(wide, *x, double, None)

    def run(x: list[Tensor]) -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return attend(layer, *x, blocked, None)

    expected = gradients(exact, [x.double() for x in inputs])
    return measure(run, inputs, expected, device)


def cells(row: dict[str, Any]) -> dict[str, str]:
    def cell(key: str, form: str) -> str:
        return "" if "error" in row else "NaN" if row[key] != row[key] else format(row[key], form)

    return {
        "output": cell("out", ".1e"),
        "gradient": cell("grad", ".1e"),
        "forward ms": cell("forward ms", ".3g"),
        "both ms": cell("both ms", ".3g"),
        "refused": row.get("error", ""),
    }


def main() -> int:
    parser = step_result.make_parser(__doc__)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="S [%(default)s]")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="[%(default)s]")
    options = parser.parse_args()
    lengths = [int(x) for x in options.lengths.split(",")]
    options.folder.mkdir(parents=True, exist_ok=True)
    table, notes, failed = [], {}, False
    for length, dtype, kind in itertools.product(lengths, options.dtypes.split(","), MASKS):
        rows = heads_case(length, kind, DTYPES[dtype], options.device)
        if kind != "none":
            rows[LAYER] = layer_case(length, kind, DTYPES[dtype], options.device)
        for name, row in rows.items():
            case = {"S": str(length), "dtype": dtype, "mask": kind, "backend": name}
            table.append(case | cells(row))
            worst = [row.get(key, 0.0) for key in ("out", "grad")]
            # NaN is wrong.
            if not all(x <= TOLERANCES[dtype] for x in worst):
                notes[" ".join(case.values())] = " and ".join(f"{x:.1e}" for x in worst)
            if name in ("chosen by torch", LAYER):
                failed |= "error" in row or " ".join(case.values()) in notes
            if name == LAYER and "error" not in row:
                # The times that matter, for the summary.
                label = f"S {length} {dtype} {kind}, both passes"
                notes[label] = f"{row['both ms']:.3g} ms with {name}"
        # After each case: an error of the device would end all that follow.
        (options.folder / "attention.md").write_text(markdown_table(table) + "\n")
        step_result.write_result(options.folder, notes)
    print(markdown_table(table))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
