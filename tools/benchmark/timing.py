"""Timing for noisy machines: contenders take turns, ratios are formed within a round.

A machine that is slow for a minute is slow for every contender in that minute's rounds. So the
ratio of two times from the same round is more reliable than the ratio of two medians.
"""

import argparse
import os
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

Key = TypeVar("Key", bound=Hashable)
Times = dict[str, float]
Row = dict[str, Any]
Call = Callable[[], object]

# A measurement repeats short calls until it takes about this long,
_SECONDS_PER_MEASUREMENT = 5e-3
# but not so often that the GPU's launch queue fills up.
_MAX_REPEATS = 10
_MAX_LEAD_SECONDS = 20e-3
# Above any GPU's clock rate: if the lead ended early, host time would count as device time.
_LEAD_CYCLES_PER_SECOND = 3e9


# ---- one call ----


def set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.ones(1 << 17).sum()  # starts the threads, so that no measurement pays for it


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """CPU time of this process and of the child processes that it has waited for."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def time_call(run: Call, device: str, repeats: int = 1) -> Times:
    """Seconds per call: "wall", "cpu" (all threads together) and, on a GPU, "device".

    Wall time runs from the first call on an idle device until the device is idle again. Device time
    is measured between two events while work is always queued, so gaps in which the device waits
    for the host do not count. A contender that synchronises inside still has such gaps.
    """
    synchronize(device)
    start, cpu_start = time.perf_counter(), cpu_seconds()
    for _ in range(repeats):
        run()
    synchronize(device)
    wall, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    times = {"wall": wall / repeats, "cpu": cpu / repeats}
    if device != "cuda":
        return times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Keeps the device busy while the host queues the calls. torch has no public function for it.
    torch.cuda._sleep(int(min(wall, _MAX_LEAD_SECONDS) * _LEAD_CYCLES_PER_SECOND))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return times | {"device": begin.elapsed_time(end) / 1e3 / repeats}


def repeats_for(seconds: float) -> int:
    """How often one measurement repeats a call that takes `seconds`."""
    return min(max(int(_SECONDS_PER_MEASUREMENT / max(seconds, 1e-9)), 1), _MAX_REPEATS)


def peak_cuda_bytes(run: Call) -> int:
    """Peak GPU memory during a call, in bytes above what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_resident_bytes(run: Call) -> int:
    """Peak growth of this process's resident memory during a call. Linux only.

    Start the process with MALLOC_MMAP_THRESHOLD_ set: larger blocks then go back to the system when
    they are freed. Otherwise reused blocks would not show up as growth.
    """
    status = Path("/proc/self/status")
    before = _kibibytes(status.read_text(), "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    run()
    return max(_kibibytes(status.read_text(), "VmHWM") - before, 0) * 1024


def has_peak_resident() -> bool:
    """Whether `peak_resident_bytes` works on this system."""
    return Path("/proc/self/clear_refs").exists()


def _kibibytes(status: str, key: str) -> int:
    (line,) = (line for line in status.splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


# ---- taking turns ----


def interleave(
    names: Sequence[Key],
    measure: Callable[[Key], Times],
    rounds: int,
    max_seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
    on_round: Call = lambda: None,
) -> dict[Key, list[Times]]:
    """Measure every contender once per round; the order rotates from round to round.

    Args:
        names: the contenders.
        measure: measures one of them once.
        rounds: number of rounds.
        max_seconds: no round starts later than this; the first always runs.
        clock: returns seconds.
        on_round: called after each round.

    Returns:
        for each contender its measurements, one per round.
    """
    samples: dict[Key, list[Times]] = {name: [] for name in names}
    start = clock()
    for index in range(rounds):
        if index and clock() - start >= max_seconds:
            break
        first = index % max(len(names), 1)
        for name in [*names[first:], *names[:first]]:
            samples[name].append(measure(name))
        on_round()
    return samples


def take_turns(
    calls: dict[Key, Callable[[], Call]],
    device: str,
    options: argparse.Namespace,
    on_round: Call,
    is_repeatable: bool = True,
) -> tuple[dict[Key, list[Times]], dict[Key, int]]:
    """Time contenders in this process, after a warm-up.

    Args:
        calls: for each contender a function that prepares one measurement, untimed, and returns
            the call to time.
        device: "cpu" or "cuda".
        options: `rounds` and `max_seconds` are read.
        on_round: called after each round.
        is_repeatable: whether a prepared call may run more than once.

    Returns:
        for each contender its times, one per round, and the number of calls each is the mean of.
    """
    repeats = dict.fromkeys(calls, 1)

    def measure(key: Key) -> Times:
        return time_call(calls[key](), device, repeats[key])

    for key in calls:
        seconds = measure(key)["wall"]
        if is_repeatable:
            repeats[key] = repeats_for(seconds)
    samples = interleave(
        list(calls), measure, options.rounds, options.max_seconds, on_round=on_round
    )
    return samples, repeats


# ---- statistics ----


def summarize(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, minimum and the samples themselves."""
    return {"median": float(np.median(seconds)), "min": min(seconds), "samples": list(seconds)}


def ratios(baseline: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """Speed-up over the baseline: median and quartiles of the per-round ratios."""
    per_round = np.asarray(baseline) / np.asarray(seconds)
    q1, median, q3 = np.percentile(per_round, [25, 50, 75])
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}


def main_clock(device: str) -> str:
    """The clock that ratios use."""
    return "wall" if device == "cpu" else "device"


def statistics(samples: Sequence[Times]) -> Row:
    """The timing entries of a row."""
    summaries = {
        f"{clock}_seconds": summarize([times[clock] for times in samples]) for clock in samples[0]
    }
    return {"rounds": len(samples)} | summaries


def timed_rows(
    labels: Row,
    samples: dict[str, list[Times]],
    baselines: Sequence[str],
    clock: str = "wall",
) -> list[Row]:
    """One row per contender, with ratios to each baseline that took part.

    Args:
        labels: entries common to all rows: the case and the part that was timed.
        samples: times of each contender, one per round.
        baselines: contenders.
        clock: the clock of the ratios; if it is "wall", ratios of CPU time are added.
    """
    rows = []
    for name, own in samples.items():
        row = labels | {"contender": name} | statistics(own)
        for key, ratio_clock in (("ratios", clock), ("cpu_ratios", "cpu")):
            if key == "cpu_ratios" and clock != "wall":
                continue
            row[key] = {
                baseline: ratios(
                    [times[ratio_clock] for times in samples[baseline]],
                    [times[ratio_clock] for times in own],
                )
                for baseline in baselines
                if baseline in samples
            }
        rows.append(row)
    return rows
