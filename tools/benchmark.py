#!/usr/bin/env python
"""Measure what the parts cost, next to other implementations of the same thing.

    python tools/benchmark.py op [--quick] [--devices cpu,cuda] [--dtypes fp32,bf16] ...

`op`: multi-scale deformable attention as the pixel decoder calls it. All positions of the levels
1/32, 1/16 and 1/8 are queries; 8 heads of 32 channels, 4 points per level. Backends take turns, and
each ratio is one of two times of the same round. Outputs and gradients of all backends are compared
before anything is timed. Writes op.json and op.md after every case, so that a run that is cut short
keeps what it has; BENCHMARKS.md explains the columns.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import torch
from op_backends import (
    BACKENDS,
    DEVICES,
    DTYPES,
    INPUTS,
    PASSES,
    TOLERANCES,
    Case,
    Inputs,
    WrongNumbers,
    make_call,
    make_inputs,
    random_gradient,
    usable_backends,
)
from torch import Tensor
from tqdm import tqdm

import mask2former
from mask2former.ops import _library
from mask2former.ops._kernels import COMPILED_DEVICES
from mask2former.utils import benchmark

PEER_PACKAGES = ("deformops", "ms-deform-attn")
FULL = {"sizes": [(512, 512), (1024, 1024), (800, 1216)], "batches": [1, 2, 8], "rounds": 7}
QUICK = {"sizes": [(512, 512)], "batches": [1], "rounds": 3}
# Slow, and no news to someone in a hurry.
NOT_QUICK = ("pytorch-stacked", "deformops-eager")
Contender = tuple[str, int]  # backend, CPU threads


def set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.ones(1 << 17).sum()  # starts the threads, so that no measurement pays for it


def time_pass(
    case: Case,
    passes: str,
    names: Sequence[str],
    inputs: Inputs,
    grad: Tensor,
    options: argparse.Namespace,
    on_round: Callable[[], object],
) -> list[dict[str, Any]]:
    """Times one pass of all backends at all numbers of threads; a row of results for each."""
    all_threads = options.threads if case.device == "cpu" else [0]
    contenders = list(product(names, all_threads))
    repeats = dict.fromkeys(contenders, 1)

    def measure(contender: Contender) -> benchmark.Times:
        name, threads = contender
        if threads:
            set_threads(threads)
        run = make_call(name, inputs, grad, passes)
        return benchmark.time_call(run, case.device, repeats[contender])

    for contender in contenders:  # warm-up
        repeats[contender] = benchmark.repeats_for(measure(contender)["wall"])
    samples = benchmark.interleave(
        contenders, measure, options.rounds, options.max_seconds, on_round=on_round
    )
    clock = "wall" if case.device == "cpu" else "device"
    seconds = {key: [times[clock] for times in value] for key, value in samples.items()}
    rows = []
    for name, threads in contenders:
        own = seconds[name, threads]
        row = head(case, passes, name) | {
            "threads": threads or None,
            "rounds": len(own),
            "repeats": repeats[name, threads],
            "bytes_moved": case.bytes_moved(passes),
            "peak_bytes": peak_bytes(case, passes, name, threads, inputs, grad, options.memory),
        }
        for key in samples[name, threads][0]:
            values = [times[key] for times in samples[name, threads]]
            row[f"{key}_seconds"] = benchmark.summarize(values)
        row["bytes_per_second"] = row["bytes_moved"] / row[f"{clock}_seconds"]["median"]
        if options.baseline in names:
            row["ratio"] = benchmark.ratios(seconds[options.baseline, threads], own)
        if len(all_threads) > 1:
            row["scaling"] = benchmark.ratios(seconds[name, all_threads[0]], own)
        rows.append(row)
    return rows


def head(case: Case, passes: str, name: str) -> dict[str, Any]:
    """What is said of a row of results, measured or not."""
    return asdict(case) | {"pass": passes, "backend": name}


def peak_bytes(
    case: Case, passes: str, name: str, threads: int, inputs: Inputs, grad: Tensor, on_cpu: bool
) -> int | None:
    """Memory a pass needs beyond its inputs; None where it is not measured."""
    if case.device == "cuda":
        return benchmark.peak_cuda_bytes(make_call(name, inputs, grad, passes))
    if not on_cpu:
        return None
    arguments = asdict(case) | {"pass": passes, "backend": name, "threads": threads}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "op-memory", json.dumps(arguments)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(result.stdout)


def op_memory(options: argparse.Namespace) -> int:
    """Prints the bytes by which one pass lets this process grow; `peak_bytes` calls it."""
    arguments = json.loads(options.arguments)
    passes, name = arguments.pop("pass"), arguments.pop("backend")
    torch.set_num_threads(arguments.pop("threads"))
    case = Case(**arguments)
    # What is loaded and set up at the first call is none of the pass's memory.
    for case_or_small in (replace(case, height=32, width=32, batch=1), case):
        inputs = make_inputs(case_or_small)
        run = make_call(name, inputs, random_gradient(inputs), passes)
        peak = benchmark.peak_resident_bytes(run)
    print(peak)
    return 0


def op(options: argparse.Namespace) -> int:
    """Measures all cases, writes the report after each, prints the table.

    Returns:
        exit status: 1 where numbers were wrong, or a backend of this project failed.
    """
    cases = [
        Case(inputs, device, dtype, *size, batch)
        for inputs, device, dtype, batch, size in product(
            options.inputs, options.devices, options.dtypes, options.batches, options.sizes
        )
    ]
    machine = benchmark.describe_machine(options.devices, PEER_PACKAGES) | {
        "mask2former": mask2former.__version__,
        "compiled_for": sorted(COMPILED_DEVICES),
        "library_cpu": _library.cpu_instructions() if _library.is_loaded() else None,
        "library_cuda": _library.cuda_architectures() if _library.is_loaded() else None,
    }
    report: dict[str, Any] = {
        "benchmark": "op",
        "command": options.command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "baseline": options.baseline,
        "tolerances": TOLERANCES,
        "absent": {},
        "results": [],
    }
    per_case = len(options.passes) * options.rounds
    with tqdm(total=len(cases) * per_case, desc="op", unit="round", file=sys.stderr) as progress:
        for index, case in enumerate(cases):
            inputs = make_inputs(case)
            grad = random_gradient(inputs)
            names, absent, failed = usable_backends(case, options.backends, inputs, grad)
            known = report["absent"].setdefault(case.device, {})
            if new := {name: why for name, why in absent.items() if name not in known}:
                progress.write(absent_note(case.device, new), file=sys.stderr)
                known |= new
            for passes in options.passes:
                report["results"] += time_pass(
                    case, passes, names, inputs, grad, options, progress.update
                )
                report["results"] += [
                    head(case, passes, name) | failure(name, error)
                    for name, error in failed.items()
                ]
            progress.update((index + 1) * per_case - progress.n)  # where the time was up
            benchmark.write_report(options.output, "op", report, op_markdown(report))
    print(op_markdown(report))
    return int(any(row.get("wrong", False) for row in report["results"]))


def failure(name: str, error: Exception) -> dict[str, Any]:
    """What a row says instead of times; and whether it makes the whole run a failure."""
    is_ours = BACKENDS[name].module is None
    message = (str(error).splitlines() or [""])[0]
    return {
        "error": f"{type(error).__name__}: {message}",
        "wrong": is_ours or isinstance(error, WrongNumbers),
    }


def absent_note(device: str, absent: dict[str, str]) -> str:
    reasons = ", ".join(f"{name} ({reason})" for name, reason in absent.items())
    return f"Not measured on {device}: {reasons}"


def op_markdown(report: dict[str, Any]) -> str:
    """The report as text, with a table that has a line for each row of results."""
    baseline = report["baseline"]
    notes = [absent_note(device, absent) for device, absent in report["absent"].items() if absent]
    failures = {
        f"Failed: {row['backend']} ({row['device']}, {row['dtype']}, {row['inputs']}, "
        f"{row['height']}x{row['width']}, batch {row['batch']}): {row['error']}": None
        for row in report["results"]
        if "error" in row
    }
    machine = ", ".join(f"{key} {value}" for key, value in report["machine"].items() if value)
    lines = [
        f"`{report['command']}`, {report['date']}",
        f"Machine: {machine}.",
        benchmark.markdown_table([_table_row(row, baseline) for row in report["results"]]),
        "\n".join(f"- {note}" for note in [*notes, *failures]),
    ]
    return "\n\n".join(line for line in lines if line)


def _table_row(row: dict[str, Any], baseline: str) -> dict[str, str]:
    def milliseconds(key: str, statistic: str) -> str:
        if key not in row:
            return ""
        value = row[key][statistic] * 1e3
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    def ratio(key: str) -> str:
        if key not in row:
            return ""
        return "{median:.2f} ({q1:.2f}-{q3:.2f})".format(**row[key])

    peak = row.get("peak_bytes")
    return {
        "inputs": row["inputs"],
        "device": row["device"],
        "dtype": row["dtype"],
        "size": f"{row['height']}x{row['width']}",
        "batch": str(row["batch"]),
        "pass": row["pass"],
        "backend": row["backend"],
        "threads": str(row.get("threads") or ""),
        "wall ms": "n/a" if "error" in row else milliseconds("wall_seconds", "median"),
        "min": milliseconds("wall_seconds", "min"),
        "device ms": milliseconds("device_seconds", "median"),
        "device min": milliseconds("device_seconds", "min"),
        f"times {baseline}": ratio("ratio"),
        "scaling": ratio("scaling"),
        "GB/s": f"{row['bytes_per_second'] / 1e9:.3g}" if "bytes_per_second" in row else "",
        "peak MiB": "" if peak is None else f"{peak / 2**20:.1f}",
    }


def list_of(
    parse: Callable[[str], Any], kind: str, choices: Sequence[Any] = ()
) -> Callable[[str], list[Any]]:
    """A type for argparse: values of a kind, separated by commas, each once."""

    def parse_list(text: str) -> list[Any]:
        values = []
        for part in text.split(","):
            try:
                value = parse(part)
            except ValueError as error:
                raise argparse.ArgumentTypeError(f"{part!r} is no {kind}: {error}") from error
            if choices and value not in choices:
                known = ", ".join(choices)
                raise argparse.ArgumentTypeError(f"unknown {kind} {part!r}, known are {known}")
            values.append(value)
        return list(dict.fromkeys(values))

    return parse_list


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError("must be at least 1")
    return number


def size(text: str) -> tuple[int, int]:
    """HxW in pixels."""
    sides = tuple(int(side) for side in text.split("x"))
    if len(sides) != 2 or any(side < 32 or side % 32 for side in sides):
        raise ValueError("must be HEIGHTxWIDTH, both multiples of 32")
    return sides


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure what the parts cost, next to other implementations.",
    )
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    commands.add_parser("op-memory").add_argument("arguments")
    add = commands.add_parser("op", help="multi-scale deformable attention").add_argument
    here = [device for device in DEVICES if device == "cpu" or torch.cuda.is_available()]
    add(
        "--quick",
        action="store_true",
        help="a first impression: 512x512, batch 1, 3 rounds and no slow backend but the baseline, "
        "where these are not given",
    )
    add("--sizes", type=list_of(size, "size"), help="image sizes HxW [512x512,1024x1024,800x1216]")
    add("--batches", type=list_of(positive, "batch size"), help="batch sizes [1,2,8]")
    add("--rounds", type=positive, help="rounds of a pass [7]")
    add(
        "--max-seconds",
        type=float,
        default=60.0,
        help="no round of a pass starts later than this after its first one [60]",
    )
    choices: dict[str, tuple[str, Sequence[str], list[str] | None, str]] = {
        "devices": ("device", DEVICES, here, "devices [all there are]"),
        "dtypes": ("dtype", list(DTYPES), ["fp32"], "of the values; all else is fp32 [fp32]"),
        "inputs": ("input", INPUTS, ["projections"], "where calls start [projections]"),
        "passes": (
            "pass",
            PASSES,
            ["forward", "forward+backward"],
            "what is timed [forward,forward+backward]",
        ),
        "backends": ("backend", list(BACKENDS), None, "who takes turns [all that are there]"),
    }
    for name, (kind, known, default, text) in choices.items():
        help_text = f"{text}; of {', '.join(known)}"
        add(f"--{name}", type=list_of(str, kind, known), default=default, help=help_text)
    add(
        "--baseline",
        choices=list(BACKENDS),
        default="pytorch",
        metavar="BACKEND",
        help="what ratios are to: how many times faster than it [pytorch]",
    )
    add(
        "--threads",
        type=list_of(positive, "number of threads"),
        default=[torch.get_num_threads()],
        help="on a CPU [torch's default]",
    )
    add("--memory", action="store_true", help="peak memory on a CPU too: one process for each row")
    add("--output", type=Path, default=Path("output/benchmark"), help="folder [output/benchmark]")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    if options.subcommand == "op-memory":
        return op_memory(options)
    if options.backends is None:
        left_out = NOT_QUICK if options.quick else ()
        options.backends = [name for name in BACKENDS if name not in left_out]
    for key, value in (QUICK if options.quick else FULL).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if "cuda" in options.devices and not torch.cuda.is_available():
        parser.error("--devices cuda: torch finds no CUDA device")
    if options.memory and not Path("/proc/self/clear_refs").exists():
        parser.error("--memory needs Linux's /proc")
    if options.baseline not in options.backends:
        parser.error(f"--baseline {options.baseline} is not among --backends")
    options.command = shlex.join(["python", "tools/benchmark.py", *argv])
    threads = torch.get_num_threads()
    try:
        return op(options)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
