"""Timing that survives a noisy machine: contenders take turns, and ratios are formed within a turn.

A machine that is slow for a minute is slow for everybody in that minute's rounds, so a ratio of two
times of one round says more than a ratio of two medians. ``tools/benchmark.py`` uses this.
"""

import importlib.metadata
import io
import json
import math
import os
import platform
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from matplotlib.figure import Figure

from .files import atomic_write

Name = TypeVar("Name", bound=Hashable)
Times = dict[str, float]

# A single measurement repeats short calls until it takes about so many seconds,
_SECONDS_PER_MEASUREMENT = 5e-3
# but not so often that a GPU's queue of launches fills up.
_MAX_REPEATS = 10
_MAX_LEAD_SECONDS = 20e-3
# Faster than any GPU's clock: a lead that ends early would count the host's work as the device's.
_LEAD_CYCLES_PER_SECOND = 3e9


def interleave(
    names: Sequence[Name],
    measure: Callable[[Name], Times],
    rounds: int,
    max_seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
    on_round: Callable[[], object] = lambda: None,
) -> dict[Name, list[Times]]:
    """Measure every contender once a round, each round beginning with another one.

    Args:
        names: the contenders.
        measure: measures one of them once.
        rounds: number of rounds.
        max_seconds: no round starts later than this; the first always runs.
        clock: seconds.
        on_round: called after each round.

    Returns:
        for each contender its measurements in order of the rounds.
    """
    samples: dict[Name, list[Times]] = {name: [] for name in names}
    start = clock()
    for index in range(rounds):
        if index and clock() - start >= max_seconds:
            break
        first = index % max(len(names), 1)
        for name in [*names[first:], *names[:first]]:
            samples[name].append(measure(name))
        on_round()
    return samples


def summarize(seconds: Sequence[float]) -> dict[str, Any]:
    """Median and minimum, and the samples themselves."""
    return {"median": float(np.median(seconds)), "min": min(seconds), "samples": list(seconds)}


def ratios(baseline: Sequence[float], seconds: Sequence[float]) -> dict[str, float]:
    """How many times faster than the baseline: median and quartiles of the rounds' ratios."""
    per_round = np.asarray(baseline) / np.asarray(seconds)
    q1, median, q3 = np.percentile(per_round, [25, 50, 75])
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}


def repeats_for(seconds: float) -> int:
    """How often a single measurement should repeat a call that takes `seconds`."""
    return min(max(int(_SECONDS_PER_MEASUREMENT / max(seconds, 1e-9)), 1), _MAX_REPEATS)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """Time that this process, and those it started and waited for, have kept processors busy."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def time_call(run: Callable[[], object], device: str, repeats: int = 1) -> Times:
    """Seconds a call takes: "wall" and, of all threads together, "cpu"; on a GPU also "device".

    Wall time goes from the first call on an idle device until the device is idle again. Device time
    is that between two events while the device always has work queued, so that the gaps in which it
    waits for the host do not count. A contender that synchronises inside has such gaps all the
    same.
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


def peak_cuda_bytes(run: Callable[[], object]) -> int:
    """Most bytes of GPU memory in use at a time during a call, above those in use before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_resident_bytes(run: Callable[[], object]) -> int:
    """Most bytes by which this process's resident memory grows during a call. Linux only.

    For a process of its own, started with MALLOC_MMAP_THRESHOLD_ set: blocks above that size are
    returned to the system when they are freed, so that earlier ones are not used again unseen.
    """
    status = Path("/proc/self/status")
    before = _kibibytes(status.read_text(), "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    run()
    return max(_kibibytes(status.read_text(), "VmHWM") - before, 0) * 1024


def _kibibytes(status: str, key: str) -> int:
    (line,) = (line for line in status.splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


def describe_machine(devices: Sequence[str], packages: Sequence[str] = ()) -> dict[str, Any]:
    """Processor, GPU where one is measured, and versions, for the head of a report.

    Args:
        devices: "cpu", "cuda" or both.
        packages: further distributions whose versions matter, listed where installed.
    """
    machine: dict[str, Any] = {
        "cpu": _cpu_model(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
    }
    if "cuda" in devices:
        major, minor = torch.cuda.get_device_capability()
        machine |= {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}"}
    for package in packages:
        try:
            machine[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            machine[package] = "not installed"
    return machine


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """A table of rows with equal keys, under a line with the columns that never change."""
    if not rows:
        return "No results."
    constant = {
        key: value for key, value in rows[0].items() if len({row[key] for row in rows}) == 1
    }
    if len(rows) == 1:  # everything is constant then
        constant = {}
    columns = [key for key in rows[0] if key not in constant]
    lines = [f"| {' | '.join(columns)} |", f"|{'|'.join('---' for _ in columns)}|"]
    lines += [f"| {' | '.join(row[column] for column in columns)} |" for row in rows]
    said = ", ".join(f"{key} {value}" for key, value in constant.items() if value)
    return "\n".join([f"Everywhere: {said}.\n"] * bool(said) + lines)


def milliseconds(seconds: float) -> str:
    """A time as tables show it, without the unit."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def bar_chart(title: str, bars: Sequence[tuple[str, str, float, str]]) -> bytes:
    """Draw times as horizontal bars.

    Args:
        title: stands above.
        bars: (group, contender, seconds, note) each; those of a group stand together in this order,
            a contender has one colour, and the note stands behind its bar.

    Returns:
        A PNG file.
    """
    groups = list(dict.fromkeys(group for group, *_ in bars))
    contenders = list(dict.fromkeys(contender for _, contender, *_ in bars))
    longest = max((seconds for *_, seconds, _ in bars), default=1.0) * 1e3
    shortest = min((seconds for *_, seconds, _ in bars), default=1.0) * 1e3
    figure = Figure(figsize=(10, 1.6 + 0.22 * len(bars) + 0.18 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    position, ticks = 0.0, []
    for group in groups:
        own = [bar for bar in bars if bar[0] == group]
        ticks.append(position + (len(own) - 1) / 2)
        for _, contender, seconds, note in own:
            colour = f"C{contenders.index(contender) % 10}"
            axes.barh(position, seconds * 1e3, color=colour, height=0.9)
            text = f" {milliseconds(seconds)} ms" + (f", {note}" if note else "")
            axes.text(seconds * 1e3, position, text, va="center", fontsize=7)
            position += 1
        position += 0.8
    if longest > 50 * shortest > 0:
        axes.set_xscale("log")
        axes.set_xlim(shortest / 2, longest * math.sqrt(longest / shortest))
    else:
        axes.set_xlim(0, longest * 1.35)
    axes.set_yticks(ticks, groups, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=10, loc="left")
    for index, contender in enumerate(contenders):
        axes.barh(0, 0, color=f"C{index % 10}", label=contender)
    # Above the bars, on the right of the title.
    axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=5, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def write_report(
    folder: Path, name: str, report: dict[str, Any], markdown: str, chart: bytes
) -> None:
    """Write ``name.json``, ``name.md`` and ``name.png``, each complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"json": json.dumps(report, indent=1), "md": markdown}
    contents = {suffix: (text.rstrip("\n") + "\n").encode() for suffix, text in texts.items()}
    for suffix, content in (contents | {"png": chart}).items():
        with atomic_write(str(folder / f"{name}.{suffix}"), "wb") as file:
            file.write(content)
