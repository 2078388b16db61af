"""Contenders on a CPU, each in its own process.

In a shared process a contender would reuse memory that others freed, which hides the cost of fresh
pages for large tensors. Peak memory also can only be measured per process.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from options import OURS
from timing import Call, Key, Row, Times, interleave, peak_resident_bytes, time_call

from mask2former.utils.memory import KEEP_VARIABLE


class Task(NamedTuple):
    """The work of a process.

    Attributes:
        run: does it once.
        measure: does it once and returns the times.
    """

    run: Call
    measure: Callable[[], Times]


def cpu_task(call: Call) -> Task:
    return Task(call, partial(time_call, call, "cpu"))


class Alone:
    """The process of one contender.

    Args:
        subcommand: the one whose `tasks_alone` gives warm-up and task.
        arguments: of that function.
        threads: of the process.
        environment: further environment variables.
    """

    def __init__(self, subcommand: str, arguments: Row, threads: int, environment: dict[str, str]):
        request = {"subcommand": subcommand, "arguments": arguments, "threads": threads}
        program = str(Path(__file__).parent)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", program, "alone", json.dumps(request)],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Alone":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, so that it ends

    def ask(self, command: str) -> Any:
        """Send a command, see `serve`, and wait for the reply.

        Raises:
            RuntimeError: the process failed; its own message is in the output.
        """
        with contextlib.suppress(BrokenPipeError):
            print(command, file=self._process.stdin, flush=True)
        reply = self._process.stdout.readline()
        if not reply:
            raise RuntimeError(f"a contender's process ended with status {self._process.wait()}")
        return json.loads(reply)


def serve(tasks: Iterable[Task], commands: Iterator[str], replies: TextIO) -> None:
    """The loop inside a process of `Alone`.

    Args:
        tasks: warm-ups, then the task itself.
        commands: lines. The first one runs all tasks: "start" replies with the times of the last
            one, "peak" with the bytes by which the process grew during it. Each further line
            measures the task once.
        replies: receives a line of JSON for each command.
    """

    def reply(result: Any) -> None:
        print(json.dumps(result), file=replies, flush=True)

    wants_peak = next(commands).strip() == "peak"
    for task in tasks:
        result = peak_resident_bytes(task.run) if wants_peak else task.measure()
    reply(result)
    for _ in commands:
        reply(task.measure())


def take_turns_alone(
    subcommand: str,
    requests: dict[Key, Row],
    options: argparse.Namespace,
    on_round: Call,
    beside: dict[Key, Callable[[], Times]] | None = None,
) -> dict[Key, list[Times]]:
    """`timing.take_turns` on a CPU for contenders in processes of their own.

    Args:
        subcommand: of each process.
        requests: arguments of each process, with its contender's name as "contender".
        options: `allocator`, `threads`, `rounds` and `max_seconds` are read.
        on_round: called after each round.
        beside: further calls that take turns with them, in this process.

    Returns:
        for each contender its times, one per round.
    """
    measures = dict(beside or {})
    with contextlib.ExitStack() as stack:
        for name, request in requests.items():
            keeps = options.allocator == "kept" or (
                options.allocator == "programs" and request["contender"] == OURS
            )
            environment = {KEEP_VARIABLE: str(int(keeps))}
            alone = Alone(subcommand, request, options.threads, environment)
            stack.enter_context(alone).ask("start")
            measures[name] = partial(alone.ask, "measure")
        return interleave(
            list(measures),
            lambda name: measures[name](),
            options.rounds,
            options.max_seconds,
            on_round=on_round,
        )


def peak_in_process(subcommand: str, arguments: Row, threads: int) -> int:
    """Bytes by which a new process grows during the last of the tasks for the arguments."""
    environment = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), KEEP_VARIABLE: "0"}
    with Alone(subcommand, arguments, threads, environment) as alone:
        return alone.ask("peak")
