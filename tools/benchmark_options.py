"""Options that several subcommands of `benchmark.py` have."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

# What happens to memory that is freed.
ALLOCATORS = ("kept", "system", "programs")
PROCESSES = ("own", "shared")
DEVICES = ("cpu", "cuda")


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


def size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def add_common_options(parser: argparse.ArgumentParser, quick: str) -> None:
    """Options of every subcommand; `quick` says what --quick changes."""
    parser.add_argument("--quick", action="store_true", help=f"a first impression: {quick}")
    parser.add_argument("--rounds", type=positive, help="rounds in which each is measured once")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=60.0,
        help="no round of a thing starts later than this after its first one [60]",
    )
    default = Path("output/benchmark")
    parser.add_argument("--output", type=Path, default=default, help=f"folder [{default}]")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    here = [device for device in DEVICES if device == "cpu" or torch.cuda.is_available()]
    parser.add_argument(
        "--devices",
        type=list_of(str, "device", DEVICES),
        default=here,
        help=f"devices [all there are]; of {', '.join(DEVICES)}",
    )
    parser.add_argument(
        "--memory", action="store_true", help="peak memory on a CPU too: one process for each row"
    )


def add_threads_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=positive,
        default=torch.get_num_threads(),
        help="on a CPU [torch's default]",
    )


def add_model_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Threads and memory of whole models on a CPU."""
    add_threads_option(parser)
    parser.add_argument(
        "--allocator",
        choices=ALLOCATORS,
        default=ALLOCATORS[0],
        help="what becomes of freed memory on a CPU: kept by all contenders; system: glibc gives "
        "large blocks back at once; programs: ours keeps it, as models on a CPU do, others do not "
        "[kept]",
    )
    parser.add_argument(
        "--processes",
        choices=PROCESSES,
        help="on a CPU every contender in a process of its own, as its users run it, or all in "
        "one [own; shared with --quick]",
    )


def check_model_runtime_options(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> None:
    if options.processes is None:
        options.processes = "shared" if options.quick else "own"
    if options.allocator == "programs" and options.processes == "shared":
        parser.error("--allocator programs needs --processes own")


def runs_alone(options: argparse.Namespace, device: str) -> bool:
    """Whether contenders get processes of their own; those on a GPU share its memory in one."""
    return options.processes == "own" and device == "cpu"


def add_choices(
    parser: argparse.ArgumentParser,
    name: str,
    kind: str,
    known: Sequence[str],
    default: Sequence[str] | None,
    text: str,
) -> None:
    """An option --name that takes some of `known`, separated by commas."""
    parser.add_argument(
        f"--{name}",
        type=list_of(str, kind, known),
        default=default if default is None else list(default),
        help=f"{text}; of {', '.join(known)}",
    )
