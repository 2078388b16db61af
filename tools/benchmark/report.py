"""The report of a subcommand: JSON with every sample, a Markdown table and a bar chart."""

import argparse
import importlib.metadata
import io
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from checks import WrongNumbers
from matplotlib.figure import Figure
from timing import Row
from tqdm import tqdm

import mask2former
from mask2former.ops import _library
from mask2former.ops._kernels import COMPILED_DEVICES
from mask2former.utils.files import atomic_write


class Report:
    """Rows of results, written to disk whenever a case is done.

    Args:
        name: of the subcommand.
        options: `command`, `output` and `devices` are read.
        table_row: formats a row of results as table cells, {column: text}.
        total: number of rounds to come.
        packages: distributions whose versions matter.
        who: the entry of a row that names the contender; the cells before it name what was timed.
        head: further entries of the JSON file.
    """

    def __init__(
        self,
        name: str,
        options: argparse.Namespace,
        table_row: Callable[[Row], dict[str, str]],
        total: int,
        packages: Sequence[str] = (),
        who: str = "contender",
        head: Row | None = None,
    ):
        self.name = name
        self._who = who
        self._folder = options.output
        self._table_row = table_row
        self.data: dict[str, Any] = {
            "benchmark": name,
            "command": options.command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": describe_machine(options.devices, packages)
            | {
                "mask2former": mask2former.__version__,
                "compiled_for": sorted(COMPILED_DEVICES),
                "library_cpu": _library.cpu_instructions() if _library.is_loaded() else None,
                "library_cuda": _library.cuda_architectures() if _library.is_loaded() else None,
            },
            **(head or {}),
            "absent": {},
            "notes": [],
            "results": [],
        }
        self.progress = tqdm(total=total, desc=name, unit="round", file=sys.stderr)

    def absent(self, device: str, reasons: dict[str, str]) -> None:
        """Note contenders that cannot take part, each once."""
        known = self.data["absent"].setdefault(device, {})
        if new := {name: why for name, why in reasons.items() if name not in known}:
            self.progress.write(_absent_note(device, new), file=sys.stderr)
            known |= new

    def round(self) -> None:
        """Count a round."""
        self.progress.update()

    def note(self, text: str) -> None:
        """Add a note below the table."""
        self.data["notes"].append(text)

    def add(self, rows: Iterable[Row]) -> None:
        self.data["results"] += rows

    def save(self) -> None:
        """Write the results so far: an interrupted run keeps them."""
        write_report(self._folder, self.name, self.data, self.markdown(), bar_chart(*self._chart()))

    def finish(self) -> int:
        """Print the table.

        Returns:
            the exit status: 1 if numbers were wrong or our own code failed.
        """
        self.progress.close()
        print(self.markdown())
        return int(any(row.get("wrong", False) for row in self.data["results"]))

    def _chart(self) -> tuple[str, list[tuple[str, str, float, str]]]:
        """Arguments of `bar_chart`; labels common to all groups go to the title."""
        rows = [row for row in self.data["results"] if "wall_seconds" in row]
        labels = [self._labels(row) for row in rows]
        constant = {
            key: text
            for key, text in (labels[0] if rows else {}).items()
            if len({other[key] for other in labels}) == 1
        }
        bars = []
        for row, own in zip(rows, labels, strict=True):
            group = [text for key, text in own.items() if key not in constant and text]
            name = row[self._who]
            if "threads" in row:
                name += f", threads {row['threads']}"
            ratios = row.get("ratios", {})
            note = ", ".join(
                f"{ratio['median']:.2f} times {other}"
                for other, ratio in ratios.items()
                if other != row[self._who]
            )
            seconds = row.get("device_seconds", row["wall_seconds"])["median"]
            bars.append((", ".join(group), name, seconds, note))
        return ", ".join([self.name, *filter(None, constant.values())]), bars

    def _labels(self, row: Row) -> dict[str, str]:
        """The cells before the contender's: what was timed."""
        cells = self._table_row(row)
        names = list(cells)
        return {
            key: f"batch {cells[key]}" if key == "batch" else cells[key]
            for key in names[: names.index(self._who)]
        }

    def markdown(self) -> str:
        """The report as text, with one table line per row of results."""
        absent = [_absent_note(device, why) for device, why in self.data["absent"].items() if why]
        failures = {}
        for row in self.data["results"]:
            if "error" in row:
                labels = self._labels(row).items()
                case = ", ".join(text for key, text in labels if key != "pass" and text)
                failures[f"Failed: {row[self._who]} ({case}): {row['error']}"] = None
        machine = ", ".join(f"{k} {v}" for k, v in self.data["machine"].items() if v)
        lines = [
            f"`{self.data['command']}`, {self.data['date']}",
            f"Machine: {machine}.",
            markdown_table([self._table_row(row) for row in self.data["results"]]),
            "\n".join(f"- {note}" for note in [*absent, *self.data["notes"], *failures]),
        ]
        return "\n\n".join(line for line in lines if line)


def _absent_note(device: str, absent: dict[str, str]) -> str:
    reasons = ", ".join(f"{name} ({reason})" for name, reason in absent.items())
    return f"Not measured on {device}: {reasons}"


def failure(error: Exception, is_ours: bool) -> Row:
    """The entries of a row without times; "wrong" makes the whole run fail."""
    message = (str(error).splitlines() or [""])[0]
    return {
        "error": f"{type(error).__name__}: {message}",
        "wrong": is_ours or isinstance(error, WrongNumbers),
    }


# ---- cells ----


def milliseconds(seconds: float) -> str:
    """A time as tables show it, without the unit."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def time_cells(row: Row) -> dict[str, str]:
    """The timing cells of a row; empty if it has no times."""

    def cell(clock: str, statistic: str) -> str:
        summary = row.get(f"{clock}_seconds")
        return "" if summary is None else milliseconds(summary[statistic])

    return {
        "wall ms": "n/a" if "error" in row else cell("wall", "median"),
        "min": cell("wall", "min"),
        "CPU ms": cell("cpu", "median"),
        "device ms": cell("device", "median"),
        "device min": cell("device", "min"),
    }


def ratio_cell(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else "{median:.2f} ({q1:.2f}-{q3:.2f})".format(**ratio)


def peak_cell(row: Row) -> str:
    peak = row.get("peak_bytes")
    return "" if peak is None else f"{peak / 2**20:.1f}"


def table_row(
    labels: Sequence[str],
    baselines: Sequence[str],
    columns: dict[str, Callable[[Row], str]] | None = None,
) -> Callable[[Row], dict[str, str]]:
    """A formatter for rows from `timing.timed_rows`.

    Args:
        labels: entries that name what was timed.
        baselines: contenders.
        columns: further columns.
    """

    def cells(row: Row) -> dict[str, str]:
        texts = {key: "" if row[key] is None else str(row[key]) for key in labels}
        ratios = {
            f"times {name}{clock}": ratio_cell(row.get(key, {}).get(name))
            for name in baselines
            for clock, key in (("", "ratios"), (" (CPU time)", "cpu_ratios"))
        }
        more = {name: text(row) for name, text in (columns or {}).items()}
        more["peak MiB"] = peak_cell(row)
        return texts | {"contender": row["contender"]} | time_cells(row) | ratios | more

    return cells


# ---- files ----


def describe_machine(devices: Sequence[str], packages: Sequence[str] = ()) -> dict[str, Any]:
    """CPU, GPU if one is measured, and versions, for the head of a report.

    Args:
        devices: "cpu", "cuda" or both.
        packages: further distributions to list with their versions.
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
    """A table of rows with equal keys; columns with a single value go to a line above it."""
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
    text = ", ".join(f"{key} {value}" for key, value in constant.items() if value)
    return "\n".join([f"All rows: {text}.\n"] * bool(text) + lines)


def bar_chart(title: str, bars: Sequence[tuple[str, str, float, str]]) -> bytes:
    """Draw times as horizontal bars.

    Args:
        title: of the chart.
        bars: (group, contender, seconds, note) each. Bars of a group stand together, in this order;
            each contender has its own colour, and the note follows the bar.

    Returns:
        the bytes of a PNG file.
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
    if contenders:
        # Above the bars, to the right of the title.
        axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=5, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def write_report(
    folder: Path, name: str, report: dict[str, Any], markdown: str, chart: bytes
) -> None:
    """Write NAME.json, NAME.md and NAME.png, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"json": json.dumps(report, indent=1), "md": markdown}
    contents = {suffix: (text.rstrip("\n") + "\n").encode() for suffix, text in texts.items()}
    for suffix, content in (contents | {"png": chart}).items():
        with atomic_write(str(folder / f"{name}.{suffix}"), "wb") as file:
            file.write(content)
