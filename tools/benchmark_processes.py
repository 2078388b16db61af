"""Contenders of `benchmark.py` on a CPU, each in a process of its own.

In one process a contender would get the memory that others left free, which hides what fresh pages
for large tensors cost those who run it by itself; and peak memory is that of a process.
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

from benchmark_runner import OURS, Call, Key, Row

from mask2former.utils import benchmark
from mask2former.utils.memory import KEEP_VARIABLE


class Task(NamedTuple):
    """What a process of its own does.

    Attributes:
        run: does it once.
        measure: does it once and says how long that took.
    """

    run: Call
    measure: Callable[[], benchmark.Times]


def cpu_task(call: Call) -> Task:
    return Task(call, partial(benchmark.time_call, call, "cpu"))


class Alone:
    """The process of one contender.

    Args:
        subcommand: whose `tasks_alone` gives warm-up and task.
        arguments: of that function.
        threads: of the process.
        environment: further variables.
    """

    def __init__(self, subcommand: str, arguments: Row, threads: int, environment: dict[str, str]):
        request = {"subcommand": subcommand, "arguments": arguments, "threads": threads}
        script = Path(__file__).with_name("benchmark.py")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), "alone", json.dumps(request)],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Alone":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # without input it ends

    def ask(self, order: str) -> Any:
        """Have it do something, see `serve`, and wait for the result.

        Raises:
            RuntimeError: it failed; its own message stands in the output.
        """
        with contextlib.suppress(BrokenPipeError):
            print(order, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a contender's process ended with status {self._process.wait()}")
        return json.loads(answer)


def serve(tasks: Iterable[Task], orders: Iterator[str], answers: TextIO) -> None:
    """What a process of `Alone` does.

    Args:
        tasks: warm-up, then the task itself.
        orders: lines. The first one, "start" or "peak", has all tasks done, "peak" for the bytes by
            which the task itself lets this process grow. Each further one measures it.
        answers: gets a line of JSON for each order.
    """

    def answer(result: Any) -> None:
        print(json.dumps(result), file=answers, flush=True)

    wants_peak = next(orders).strip() == "peak"
    for task in tasks:
        result = benchmark.peak_resident_bytes(task.run) if wants_peak else task.measure()
    answer(result)
    for _ in orders:
        answer(task.measure())


def take_turns_alone(
    subcommand: str,
    requests: dict[Key, Row],
    options: argparse.Namespace,
    on_round: Call,
    beside: dict[Key, Callable[[], benchmark.Times]] | None = None,
) -> dict[Key, list[benchmark.Times]]:
    """`take_turns` on a CPU for contenders in processes of their own.

    Args:
        subcommand: of each process.
        requests: arguments of each process; the entry contender says whose it is.
        options: read are allocator, threads, rounds and max_seconds.
        on_round: called after each round.
        beside: what else takes turns with them, in this process.

    Returns:
        for each contender its times by round.
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
        return benchmark.interleave(
            list(measures),
            lambda name: measures[name](),
            options.rounds,
            options.max_seconds,
            on_round=on_round,
        )


def has_peak_memory() -> bool:
    """Whether the peak of a process on the CPU can be measured."""
    return Path("/proc/self/clear_refs").exists()


def peak_in_process(subcommand: str, arguments: Row, threads: int) -> int:
    """Bytes by which a process grows in the last of the tasks for the arguments."""
    environment = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), KEEP_VARIABLE: "0"}
    with Alone(subcommand, arguments, threads, environment) as alone:
        return alone.ask("peak")
