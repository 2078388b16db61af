#!/usr/bin/env python
"""Check that a training survives being killed, and that it holds no more and more.

    python tools/endurance kill [--kills 30] [--config-file CONFIG] [...] [KEY VALUE ...]
    python tools/endurance soak [--iterations 2000] [--config-file CONFIG] [...] [KEY VALUE ...]

Both run tools/train_net.py with any config, or with a small model on a few Shapes images. The exit
status is 1 if the check failed. On a GPU `kill` needs DETERMINISTIC True.

kill: train once undisturbed, then once more with SIGKILLs at random moments, resuming after each,
and compare everything both have written.
soak: watch memory, descriptors, threads, processes and shared memory of one long training.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import kill_test
import soak
from process_tree import has_proc

COMMANDS = {
    "kill": (kill_test, "compare a killed and resumed training with an undisturbed one"),
    "soak": (soak, "watch what a long training holds"),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="endurance",
        description="Check that a training survives kills and holds no more and more.",
    )
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        module.add_options(command)
        command.add_argument("--config-file", type=Path, help="config [a toy on Shapes]")
        command.add_argument("--num-gpus", type=int, default=1, help="as of train_net.py [1]")
        default = Path(f"output/endurance/{name}")
        command.add_argument(
            "--output", type=Path, default=default, help=f"empty or new folder [{default}]"
        )
        command.add_argument(
            "--preload",
            action="store_true",
            help="import packages once and fork each run: starts in a fraction of the time, but "
            "imports are then not disturbed",
        )
        command.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    if not has_proc():
        parser.error("processes are watched through Linux's /proc, which is not here")
    module, _ = COMMANDS[options.subcommand]
    module.check_options(parser, options)
    try:
        return module.run(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd)}: {error.stderr.decode()}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
