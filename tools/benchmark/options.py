"""Names of contenders, and options that several subcommands share."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

OURS, UPSTREAM, PEER = "mask2former", "upstream steps", "transformers"
# Ours with other values of MODEL.CHECKPOINTING.
CHECKPOINTING = MappingProxyType({"no checkpointing": "none", "checkpointed blocks": "blocks"})
# Short forms for the command line.
ALIASES = MappingProxyType(
    {
        "upstream": UPSTREAM,
        "published": UPSTREAM,
        **{policy: name for name, policy in CHECKPOINTING.items()},
    }
)
ALLOCATORS = ("kept", "system", "programs")
PROCESSES = ("own", "shared")
DEVICES = ("cpu", "cuda")


def list_of(
    parse: Callable[[str], Any],
    kind: str,
    choices: Sequence[Any] = (),
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[str], list[Any]]:
    """A type for argparse: a comma-separated list without duplicates."""

    def parse_list(text: str) -> list[Any]:
        values = []
        for part in text.split(","):
            part = aliases.get(part, part)
            try:
                value = parse(part)
            except ValueError as error:
                raise argparse.ArgumentTypeError(f"invalid {kind} {part!r}: {error}") from error
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
    """Options of every subcommand; `quick` describes what --quick changes."""
    parser.add_argument("--quick", action="store_true", help=f"a first impression: {quick}")
    parser.add_argument("--rounds", type=positive, help="rounds; each contender runs once a round")
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=60.0,
        help="start no further round of a part this long after its first one [60]",
    )
    default = Path("output/benchmark")
    parser.add_argument("--output", type=Path, default=default, help=f"folder [{default}]")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    here = [device for device in DEVICES if device == "cpu" or torch.cuda.is_available()]
    parser.add_argument(
        "--devices",
        type=list_of(str, "device", DEVICES),
        default=here,
        help=f"devices [all available]; of {', '.join(DEVICES)}",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="measure peak memory on a CPU too, in a process per row",
    )


def add_threads_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=positive,
        default=torch.get_num_threads(),
        help="on a CPU [torch's default]",
    )


def add_model_runtime_options(parser: argparse.ArgumentParser) -> None:
    """Threads, allocator and processes of whole models on a CPU."""
    add_threads_option(parser)
    parser.add_argument(
        "--allocator",
        choices=ALLOCATORS,
        default=ALLOCATORS[0],
        help="freed memory on a CPU. kept: all contenders keep it; system: glibc returns large "
        "blocks at once; programs: ours keeps it, as our programs do, the others do not [kept]",
    )
    parser.add_argument(
        "--processes",
        choices=PROCESSES,
        help="on a CPU, run each contender in its own process, as its users do, or all in "
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
    """Whether contenders run in processes of their own. On a GPU they share one."""
    return options.processes == "own" and device == "cpu"


def add_choices(
    parser: argparse.ArgumentParser,
    name: str,
    kind: str,
    known: Sequence[str],
    default: Sequence[str] | None,
    text: str,
    aliases: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """An option --name that takes a comma-separated subset of `known`."""
    parser.add_argument(
        f"--{name}",
        type=list_of(str, kind, known, aliases),
        default=default if default is None else list(default),
        help=f"{text}; of {', '.join(known)}",
    )
