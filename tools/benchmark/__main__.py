#!/usr/bin/env python
"""Measure what the parts cost, next to other implementations of the same method.

    python tools/benchmark op|model|train|postprocess|data|evaluate [--quick] [...]

Results are compared before anything is timed. Contenders take turns, and each ratio is formed
within a round. Each subcommand prints a table and writes it, with a chart and every sample, to
NAME.md, NAME.png and NAME.json. The files are updated after every case, so an interrupted run keeps
its results. BENCHMARKS.md explains the columns.
"""

import argparse
import json
import os
import shlex
import sys
from unittest import mock

import data
import evaluate
import model
import op
import postprocess
import torch
import train
from processes import serve
from timing import has_peak_resident, set_threads

from mask2former.utils.memory import KEEP_VARIABLE, keep_freed_memory

COMMANDS = {
    "op": (op, "multi-scale deformable attention"),
    "model": (model, "inference, by stages and end to end"),
    "train": (train, "a training step and its parts"),
    "postprocess": (postprocess, "from logits to panoptic, instance and semantic outputs"),
    "data": (data, "dataset mappers"),
    "evaluate": (evaluate, "evaluators"),
}


def run_alone(request: str) -> int:
    """The process that `processes.Alone` starts."""
    # Reserve the pipe for replies: anything else that is printed goes to stderr.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = json.loads(request)
    keep_freed_memory()
    set_threads(request["threads"])
    module, _ = COMMANDS[request["subcommand"]]
    serve(module.tasks_alone(request["arguments"]), sys.stdin, replies)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark",
        description="Measure what the parts cost, next to other implementations.",
    )
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    commands.add_parser("alone").add_argument("request")
    for name, (module, text) in COMMANDS.items():
        module.add_options(commands.add_parser(name, help=text))
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    if options.subcommand == "alone":
        return run_alone(options.request)
    module, _ = COMMANDS[options.subcommand]
    for key, value in (module.QUICK if options.quick else module.FULL).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    if "cuda" in options.devices and not torch.cuda.is_available():
        parser.error("--devices cuda: torch finds no CUDA device")
    if getattr(options, "memory", False) and not has_peak_resident():
        parser.error("--memory needs Linux's /proc")
    module.check_options(parser, options)
    allocator = getattr(options, "allocator", None)
    if allocator == "kept":
        keep_freed_memory()
    options.command = shlex.join(["python", "tools/benchmark", *argv])
    threads = torch.get_num_threads()
    # Only the option decides: code that a contender runs must leave the allocator unchanged.
    environment = {} if allocator in (None, "kept") else {KEEP_VARIABLE: "0"}
    try:
        with mock.patch.dict(os.environ, environment):
            return module.run(options)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
