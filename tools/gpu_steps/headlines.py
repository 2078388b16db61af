"""Numbers of a step for the summary, from its folder and its log."""

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runner import Headline


def read_result(folder: Path, log: str) -> Headline:
    """What a program of gpu_steps wrote."""
    return json.loads((folder / "result.json").read_text())


def read_self_test(folder: Path, log: str) -> Headline:
    lines = [line for line in log.splitlines() if line.startswith("self-test on ")]
    return {
        "passed": sum(": passed" in line for line in lines),
        "failed": sum(": FAILED" in line for line in lines),
    }


def read_pytest(folder: Path, log: str) -> Headline:
    """The last line of pytest, and the first tests that failed."""
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", log.strip().splitlines()[-1])
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
    return {word: int(number) for number, word in counts} | (
        {"first": " ".join(failed[:3])} if failed else {}
    )


def read_sanitizer(folder: Path, log: str) -> Headline:
    summaries = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", log, re.MULTILINE)
    return {"summary": summaries[-1]} if summaries else {}


def read_benchmark(name: str, ours: str, parts: Sequence[str]) -> Callable[[Path, str], Headline]:
    """Our times, the others' times as multiples of ours, memory, and who is missing or failed.

    Args:
        name: of the subcommand, which wrote NAME.json.
        ours: the contender or backend that is ours.
        parts: parts or passes that matter.
    """

    def read(folder: Path, log: str) -> Headline:
        report = json.loads((folder / f"{name}.json").read_text())
        cases: dict[str, dict[str, dict[str, Any]]] = {}
        numbers: Headline = {}
        for row in report["results"]:
            size = row.get("size") or f"{row['height']}x{row['width']}"
            part, who = row.get("part") or row["pass"], row.get("contender") or row["backend"]
            case = f"{row.get('precision') or row['dtype']} {size} batch {row['batch']} {part}"
            if "error" in row:
                numbers[f"{case} {who}"] = row["error"]
            elif part in parts:
                cases.setdefault(case, {})[who] = row
        for case, rows in cases.items():
            if (row := rows.pop(ours, None)) is None:
                continue
            texts = [f"{median(row) * 1e3:.3g} ms"]
            texts += [f"{median(other) / median(row):.2f}x {who}" for who, other in rows.items()]
            if row.get("peak_bytes"):
                texts.append(f"{row['peak_bytes'] / 2**30:.2f} GiB")
                peaks = {who: other.get("peak_bytes") for who, other in rows.items()}
                texts += [f"{peak / 2**30:.2f} GiB {who}" for who, peak in peaks.items() if peak]
            if "operator_calls" in row:
                texts.append(f"{row['operator_calls']} calls, {row['host_syncs']} syncs")
            numbers[case] = ", ".join(texts)
        absent = {device: reasons for device, reasons in report["absent"].items() if reasons}
        return numbers | ({"absent": json.dumps(absent)} if absent else {})

    return read


def median(row: dict[str, Any]) -> float:
    """Seconds by the device's clock if it was used."""
    return (row.get("device_seconds") or row["wall_seconds"])["median"]


def read_ncu(folder: Path, log: str) -> Headline:
    """The metrics of each launch; ncu prints lines of its own before the table."""
    if not (folder / "ncu.csv").exists():
        return {}
    lines = [x for x in (folder / "ncu.csv").read_text().splitlines() if x.startswith('"')]
    launches: Headline = {}
    for row in csv.DictReader(lines):
        label = f"{row['ID']} {row['Kernel Name'].split('(')[0]}"
        metric = re.sub(r"\.(sum|avg)\b|_sustained_\w+|pct_of_", "", row["Metric Name"])
        value = f"{metric} {row['Metric Value']} {row['Metric Unit']}".strip()
        launches[label] = ", ".join(filter(None, [launches.get(label), value]))
    return launches or {"launches": 0}
