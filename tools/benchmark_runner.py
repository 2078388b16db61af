"""What all subcommands of `benchmark.py` share: contenders take turns, and a report is written.

A subcommand goes through its cases. For each it prepares the contenders, leaves out those whose
numbers are wrong (`try_each`), lets the others take turns at one thing after the other
(`take_turns`), makes rows of the times (`timed_rows`) and saves its `Report`.
"""

import argparse
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import datetime, timezone
from typing import Any, TypeVar

import torch
from tqdm import tqdm

import mask2former
from mask2former.ops import _library
from mask2former.ops._kernels import COMPILED_DEVICES
from mask2former.utils import benchmark

Key = TypeVar("Key", bound=Hashable)
Row = dict[str, Any]
Call = Callable[[], object]

OURS, PUBLISHED, PEER = "mask2former", "published", "transformers"


class WrongNumbers(ValueError):
    """A contender does not give the answers of the one it is compared with."""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """norm(difference) / norm(expected), 0 where both are empty or zero."""
    wide = torch.promote_types(expected.dtype, torch.float32)
    difference = (actual.to(wide) - expected.to(wide)).norm().item()
    return difference and difference / max(expected.to(wide).norm().item(), 1e-30)


def require_equal(errors: dict[str, float], tolerance: float, other: str) -> None:
    """Raise WrongNumbers unless all errors are within the tolerance."""
    # Not "error > tolerance": NaN fails.
    wrong = [f"{key} {error:.1e}" for key, error in errors.items() if not error <= tolerance]
    if wrong:
        raise WrongNumbers(f"relative error against {other}: {', '.join(wrong)}")


# ---- times ----


def set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.ones(1 << 17).sum()  # starts the threads, so that no measurement pays for it


def take_turns(
    calls: dict[Key, Callable[[], Call]],
    device: str,
    options: argparse.Namespace,
    on_round: Call,
    is_repeatable: bool = True,
) -> tuple[dict[Key, list[benchmark.Times]], dict[Key, int]]:
    """Time contenders, after a warm-up.

    Args:
        calls: for each contender a function that prepares one measurement, untimed, and returns
            what is timed.
        device: "cpu" or "cuda".
        options: read are rounds and max_seconds.
        on_round: called after each round.
        is_repeatable: whether what is timed may be called more than once.

    Returns:
        for each contender its times by round, and how many calls one of them is the mean of.
    """
    repeats = dict.fromkeys(calls, 1)

    def measure(key: Key) -> benchmark.Times:
        return benchmark.time_call(calls[key](), device, repeats[key])

    for key in calls:
        seconds = measure(key)["wall"]
        if is_repeatable:
            repeats[key] = benchmark.repeats_for(seconds)
    samples = benchmark.interleave(
        list(calls), measure, options.rounds, options.max_seconds, on_round=on_round
    )
    return samples, repeats


def main_clock(device: str) -> str:
    """The clock that ratios are of."""
    return "wall" if device == "cpu" else "device"


def statistics(samples: Sequence[benchmark.Times]) -> Row:
    """The entries of a row that say how long it took."""
    summaries = {
        f"{clock}_seconds": benchmark.summarize([times[clock] for times in samples])
        for clock in samples[0]
    }
    return {"rounds": len(samples)} | summaries


def timed_rows(
    labels: Row,
    samples: dict[str, list[benchmark.Times]],
    baselines: Sequence[str],
    clock: str = "wall",
) -> list[Row]:
    """A row for each contender, with ratios to all baselines that took part.

    Args:
        labels: what is said of all rows: the case, and what was timed.
        samples: times of each contender by round.
        baselines: contenders.
        clock: of the ratios; on a CPU there are ratios of processor time besides.
    """
    rows = []
    for name, own in samples.items():
        row = labels | {"contender": name} | statistics(own)
        for key, of in (("ratios", clock), ("cpu_ratios", "cpu")):
            if key == "cpu_ratios" and clock != "wall":
                continue
            row[key] = {
                baseline: benchmark.ratios(
                    [times[of] for times in samples[baseline]], [times[of] for times in own]
                )
                for baseline in baselines
                if baseline in samples
            }
        rows.append(row)
    return rows


# ---- what did not work ----


def try_each(
    names: Sequence[str], attempt: Callable[[str], object]
) -> tuple[list[str], dict[str, Exception]]:
    """Try every contender: names of those that work, and {name: error} of the others."""
    usable, failed = [], {}
    for name in names:
        try:
            attempt(name)
            usable.append(name)
        # A peer fails in a way of its own, which is a result to report like a time.
        except Exception as error:
            # Its traceback would keep tensors alive.
            failed[name] = error.with_traceback(None)
    return usable, failed


def failure(error: Exception, is_ours: bool) -> Row:
    """What a row says instead of times; and whether it makes the whole run a failure."""
    message = (str(error).splitlines() or [""])[0]
    return {
        "error": f"{type(error).__name__}: {message}",
        "wrong": is_ours or isinstance(error, WrongNumbers),
    }


# ---- report ----


class Report:
    """Rows of results, written as JSON, as a table and as a chart whenever a case is done.

    Args:
        name: of the subcommand.
        options: read are command, output and devices.
        table_row: the cells of a row's line in the table, {column: text}.
        total: number of rounds to come.
        packages: distributions whose versions matter.
        who: the entry of a row that names the contender; those before it say what was timed.
        head: further entries.
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
            "machine": benchmark.describe_machine(options.devices, packages)
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
        """Note contenders that take no part; each is said once."""
        known = self.data["absent"].setdefault(device, {})
        if new := {name: why for name, why in reasons.items() if name not in known}:
            self.progress.write(_absent_note(device, new), file=sys.stderr)
            known |= new

    def round(self) -> None:
        """Count a round."""
        self.progress.update()

    def note(self, text: str) -> None:
        """Note something below the table."""
        self.data["notes"].append(text)

    def add(self, rows: Iterable[Row]) -> None:
        self.data["results"] += rows

    def save(self) -> None:
        """Write what there is: a run that is cut short keeps it."""
        chart = benchmark.bar_chart(*self._chart())
        benchmark.write_report(self._folder, self.name, self.data, self.markdown(), chart)

    def finish(self) -> int:
        """Print the table; the exit status is 1 where numbers were wrong or our code failed."""
        self.progress.close()
        print(self.markdown())
        return int(any(row.get("wrong", False) for row in self.data["results"]))

    def _chart(self) -> tuple[str, list[tuple[str, str, float, str]]]:
        """Arguments of `bar_chart`: what never changes is in the title, not at every group."""
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
        """The cells that stand before the contender's: what was timed."""
        cells = self._table_row(row)
        names = list(cells)
        return {
            key: f"batch {cells[key]}" if key == "batch" else cells[key]
            for key in names[: names.index(self._who)]
        }

    def markdown(self) -> str:
        """The report as text, with a table that has a line for each row of results."""
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
            benchmark.markdown_table([self._table_row(row) for row in self.data["results"]]),
            "\n".join(f"- {note}" for note in [*absent, *self.data["notes"], *failures]),
        ]
        return "\n\n".join(line for line in lines if line)


def _absent_note(device: str, absent: dict[str, str]) -> str:
    reasons = ", ".join(f"{name} ({reason})" for name, reason in absent.items())
    return f"Not measured on {device}: {reasons}"


def time_cells(row: Row) -> dict[str, str]:
    """Cells of the times of a row; empty where it has none."""

    def cell(clock: str, statistic: str) -> str:
        summary = row.get(f"{clock}_seconds")
        return "" if summary is None else benchmark.milliseconds(summary[statistic])

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
    """What makes the cells of rows that `timed_rows` made.

    Args:
        labels: entries that say what was timed.
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
