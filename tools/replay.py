#!/usr/bin/env python
"""Replay a training iteration whose loss was not finite, in one process, and find the cause.

    python tools/replay.py output/non_finite_1234_rank0.pth [MODEL.DEVICE cpu ...]

Training writes the file when a loss or a matching cost is NaN or infinite. The iteration runs again
with its batch, weights and random numbers, and is narrowed to the image, the layer and the tensor.
Writes FILE_replay.md and FILE_replay.json beside the file. The data sets are not needed.

Exit status: 0 if a loss or cost is not finite again, 3 if all are finite here, 2 if the file, the
config or the device does not fit.
"""

import argparse
import importlib
import json
import os
import sys

from mask2former.capture import read_capture
from mask2former.replay import replayed_config
from mask2former.replay_report import narrow, to_markdown
from mask2former.utils.files import atomic_write
from mask2former.utils.interrupts import run_program

FINITE_HERE = 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Replay an iteration that was not finite.")
    parser.add_argument("file", metavar="FILE", help="non_finite_ITERATION_rankR.pth of a training")
    parser.add_argument(
        "--import",
        dest="modules",
        metavar="MODULE",
        action="append",
        default=[],
        help="a Python module that registers parts of your own; may be repeated",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="compute in this type instead of that of the run",
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.modules:
            # As for a script of one's own, beside which its modules lie.
            sys.path.insert(0, os.getcwd())
        for module in args.modules:
            importlib.import_module(module)
        capture = read_capture(args.file)
        cfg = replayed_config(capture, args.opts)
        print(
            f"Replaying iteration {capture.iteration} of rank {capture.rank} on the "
            f"{cfg.MODEL.DEVICE} ...",
            flush=True,
        )
        report = narrow(capture, cfg, args.dtype or capture.dtype)
        stem = os.path.splitext(args.file)[0]
        with atomic_write(f"{stem}_replay.json") as file:
            json.dump(report, file, indent=1)
        with atomic_write(f"{stem}_replay.md") as file:
            file.write(to_markdown(report, args.file))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("Not finite again." if report["reproduced"] else "Finite here.")
    for finding in report["findings"]:
        print(f"- {finding}")
    print(f"Report: {stem}_replay.md, {stem}_replay.json")
    return 0 if report["reproduced"] else FINITE_HERE


if __name__ == "__main__":
    run_program(main)
