#!/usr/bin/env python
"""Measure what the parts cost, next to other implementations of the same thing.

    python tools/benchmark.py op|model|train|postprocess|data|evaluate [--quick] [...]

Contenders take turns, and each ratio is one of two times of the same round. Answers are compared
before anything is timed. Each subcommand prints a table and writes it with a chart and every sample
to NAME.md, NAME.png and NAME.json after every case, so that a run that is cut short keeps what it
has; BENCHMARKS.md explains the columns.
"""

import argparse
import json
import shlex
import sys

import benchmark_data
import benchmark_evaluate
import benchmark_model
import benchmark_op
import benchmark_postprocess
import benchmark_train
import torch
from benchmark_runner import has_peak_memory

from mask2former.utils.benchmark import peak_resident_bytes
from mask2former.utils.memory import keep_freed_memory

COMMANDS = {
    "op": (benchmark_op, "multi-scale deformable attention"),
    "model": (benchmark_model, "inference, by stages and end to end"),
    "train": (benchmark_train, "a training step and its parts"),
    "postprocess": (benchmark_postprocess, "from logits to panoptic, instances and semantic"),
    "data": (benchmark_data, "dataset mappers"),
    "evaluate": (benchmark_evaluate, "evaluators"),
}


def measure_peak(request: str) -> int:
    """Prints the bytes by which a call lets this process grow; `peak_in_process` asks for it."""
    request = json.loads(request)
    torch.set_num_threads(request["threads"])
    module, _ = COMMANDS[request["subcommand"]]
    for call in module.peak_calls(request["arguments"]):
        peak = peak_resident_bytes(call)
    print(peak)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure what the parts cost, next to other implementations.",
    )
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    commands.add_parser("peak").add_argument("request")
    for name, (module, text) in COMMANDS.items():
        module.add_options(commands.add_parser(name, help=text))
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    if options.subcommand == "peak":
        return measure_peak(options.request)
    module, _ = COMMANDS[options.subcommand]
    for key, value in (module.QUICK if options.quick else module.FULL).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if "cuda" in options.devices and not torch.cuda.is_available():
        parser.error("--devices cuda: torch finds no CUDA device")
    if getattr(options, "memory", False) and not has_peak_memory():
        parser.error("--memory needs Linux's /proc")
    module.check_options(parser, options)
    if getattr(options, "allocator", None) == "kept":
        keep_freed_memory()
    options.command = shlex.join(["python", "tools/benchmark.py", *argv])
    threads = torch.get_num_threads()
    try:
        return module.run(options)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
