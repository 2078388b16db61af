"""`op`: multi-scale deformable attention as the pixel decoder calls it.

All positions of the levels 1/32, 1/16 and 1/8 are queries; 8 heads of 32 channels, 4 points per
level. Outputs and gradients of all backends are compared before anything is timed.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch
from op_backends import (
    BACKENDS,
    DTYPES,
    INPUTS,
    PASSES,
    TOLERANCES,
    Case,
    Inputs,
    make_call,
    make_inputs,
    random_gradient,
    usable_backends,
)
from options import (
    add_choices,
    add_common_options,
    add_device_options,
    list_of,
    positive,
    size,
)
from processes import Task, cpu_task, peak_in_process
from report import Report, failure, peak_cell, ratio_cell, time_cells
from timing import (
    Call,
    Row,
    main_clock,
    peak_cuda_bytes,
    ratios,
    set_threads,
    statistics,
    take_turns,
)
from torch import Tensor

PEER_PACKAGES = ("deformops", "ms-deform-attn")
FULL = {"sizes": [(512, 512), (1024, 1024), (800, 1216)], "batches": [1, 2, 8], "rounds": 7}
QUICK = {"sizes": [(512, 512)], "batches": [1], "rounds": 3}
# Slow.
NOT_QUICK = ("pytorch-stacked", "deformops-eager")


def time_pass(
    case: Case,
    passes: str,
    names: Sequence[str],
    inputs: Inputs,
    grad: Tensor,
    options: argparse.Namespace,
    on_round: Call,
) -> list[Row]:
    """Time one pass of all backends at all thread counts; a row of results for each."""
    all_threads = options.threads if case.device == "cpu" else [0]

    def prepare(name: str, threads: int) -> Call:
        if threads:
            set_threads(threads)
        return make_call(name, inputs, grad, passes)

    contenders = {
        (name, threads): lambda name=name, threads=threads: prepare(name, threads)
        for name, threads in product(names, all_threads)
    }
    samples, repeats = take_turns(contenders, case.device, options, on_round)
    clock = main_clock(case.device)
    seconds = {key: [times[clock] for times in value] for key, value in samples.items()}
    rows = []
    for name, threads in contenders:
        own = seconds[name, threads]
        row = head(case, passes, name) | {
            "threads": threads or None,
            "repeats": repeats[name, threads],
            "bytes_moved": case.bytes_moved(passes),
            "peak_bytes": peak_bytes(case, passes, name, threads, inputs, grad, options.memory),
            **statistics(samples[name, threads]),
        }
        row["bytes_per_second"] = row["bytes_moved"] / row[f"{clock}_seconds"]["median"]
        if options.baseline in names:
            row["ratio"] = ratios(seconds[options.baseline, threads], own)
            row["ratios"] = {options.baseline: row["ratio"]}
        if len(all_threads) > 1:
            row["scaling"] = ratios(seconds[name, all_threads[0]], own)
        rows.append(row)
    return rows


def head(case: Case, passes: str, name: str) -> Row:
    """The label entries of a row, measured or not."""
    return asdict(case) | {"pass": passes, "backend": name}


def peak_bytes(
    case: Case, passes: str, name: str, threads: int, inputs: Inputs, grad: Tensor, on_cpu: bool
) -> int | None:
    """Memory a pass needs beyond its inputs; None if it is not measured."""
    if case.device == "cuda":
        return peak_cuda_bytes(make_call(name, inputs, grad, passes))
    return peak_in_process("op", head(case, passes, name), threads) if on_cpu else None


def tasks_alone(arguments: dict[str, Any]) -> Iterator[Task]:
    """The tasks of a process: a warm-up, then the pass itself."""
    passes, name = arguments.pop("pass"), arguments.pop("backend")
    case = Case(**arguments)
    # The warm-up keeps one-time set-up out of the memory of the pass.
    for case_or_small in (replace(case, height=32, width=32, batch=1), case):
        inputs = make_inputs(case_or_small)
        yield cpu_task(make_call(name, inputs, random_gradient(inputs), passes))


def run(options: argparse.Namespace) -> int:
    """Measure all cases; returns the exit status, see `Report.finish`."""
    cases = [
        Case(inputs, device, dtype, *size, batch)
        for inputs, device, dtype, batch, size in product(
            options.inputs, options.devices, options.dtypes, options.batches, options.sizes
        )
    ]
    per_case = len(options.passes) * options.rounds
    report = Report(
        "op",
        options,
        lambda row: _table_row(row, options.baseline),
        len(cases) * per_case,
        PEER_PACKAGES,
        who="backend",
        head={"baseline": options.baseline, "tolerances": TOLERANCES},
    )
    for case in cases:
        inputs = make_inputs(case)
        grad = random_gradient(inputs)
        names, absent, failed = usable_backends(case, options.backends, inputs, grad)
        report.absent(case.device, absent)
        for passes in options.passes:
            report.add(time_pass(case, passes, names, inputs, grad, options, report.round))
            report.add(
                head(case, passes, name) | failure(error, BACKENDS[name].module is None)
                for name, error in failed.items()
            )
        report.save()
    return report.finish()


def _table_row(row: Row, baseline: str) -> dict[str, str]:
    times = time_cells(row)
    del times["CPU ms"]
    return {
        "inputs": row["inputs"],
        "device": row["device"],
        "dtype": row["dtype"],
        "size": f"{row['height']}x{row['width']}",
        "batch": str(row["batch"]),
        "pass": row["pass"],
        "backend": row["backend"],
        "threads": str(row.get("threads") or ""),
        **times,
        f"times {baseline}": ratio_cell(row.get("ratio")),
        "scaling": ratio_cell(row.get("scaling")),
        "GB/s": f"{row['bytes_per_second'] / 1e9:.3g}" if "bytes_per_second" in row else "",
        "peak MiB": peak_cell(row),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    add_common_options(
        parser,
        "512x512, batch 1, 3 rounds and no slow backend but the baseline, unless given",
    )
    add_device_options(parser)
    parser.add_argument(
        "--sizes", type=list_of(size, "size"), help="image sizes HxW [512x512,1024x1024,800x1216]"
    )
    parser.add_argument(
        "--batches", type=list_of(positive, "batch size"), help="batch sizes [1,2,8]"
    )
    dtypes = list(DTYPES)
    add_choices(
        parser, "dtypes", "dtype", dtypes, ["fp32"], "of the values; the rest is fp32 [fp32]"
    )
    text = "what calls start from [projections]"
    add_choices(parser, "inputs", "input", INPUTS, ["projections"], text)
    timed = ["forward", "forward+backward"]
    add_choices(parser, "passes", "pass", PASSES, timed, f"what is timed [{','.join(timed)}]")
    text = "who takes turns [all available]"
    add_choices(parser, "backends", "backend", list(BACKENDS), None, text)
    parser.add_argument(
        "--baseline",
        choices=list(BACKENDS),
        default="pytorch",
        metavar="BACKEND",
        help="the backend that ratios refer to [pytorch]",
    )
    parser.add_argument(
        "--threads",
        type=list_of(positive, "thread count"),
        default=[torch.get_num_threads()],
        help="on a CPU [torch's default]",
    )


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.backends is None:
        excluded = NOT_QUICK if options.quick else ()
        options.backends = [name for name in BACKENDS if name not in excluded]
    if options.baseline not in options.backends:
        parser.error(f"--baseline {options.baseline} is not among --backends")
