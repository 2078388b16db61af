#!/usr/bin/env python
"""Whether two models differ on the same test set, with 95 % intervals over images.

    python tools/compare_runs.py output/a output/b
    python tools/compare_runs.py output/a_seed1+output/a_seed2 output/b_seed1+output/b_seed2

A run is an OUTPUT_DIR with the files that an evaluation writes to its folder inference. Images are
resampled in pairs: both models see the same ones. With one run per side, an interval says whether
the difference would hold on other images; with several seeds per side, joined by "+", also whether
it would hold for another training. PQ, mIoU and mask AP are compared, with the classes that differ
beyond noise (at most 5 % of those listed by chance).
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from mask2former.evaluation.class_tables import table
from mask2former.evaluation.run_comparison import Comparison, check_same_test_set, compare
from mask2former.evaluation.run_files import run_statistics
from mask2former.utils.files import WriteError, atomic_write, require_writable
from mask2former.utils.interrupts import run_program

# Classes beyond noise that are printed, largest difference first; the JSON has all.
_NUM_PRINTED = 20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", metavar="RUN_A", help="folder, or several joined by +")
    parser.add_argument("b", metavar="RUN_B", help="folder, or several joined by +")
    parser.add_argument("--resamples", type=int, default=1000, help="of the images [1000]")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling [0]")
    parser.add_argument("--gt", metavar="FILE", help="COCO JSON, if it moved since the evaluation")
    parser.add_argument("--output", metavar="DIR", help="also write comparison.json and .md there")
    args = parser.parse_args(argv)
    if args.resamples < 100:
        parser.error(f"--resamples must be at least 100, got {args.resamples}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    return args


def folders(side: str) -> list[str]:
    """Split "a+b"; a folder may have a plus in its name.

    Raises:
        ValueError: a folder is named twice, which would look like no variance between seeds.
    """
    names = [side] if os.path.isdir(side) else side.split("+")
    if len({os.path.realpath(name) for name in names}) < len(names):
        raise ValueError(f"{side} names a run twice: the variance between seeds would be wrong.")
    return names


def compare_folders(args: argparse.Namespace) -> dict[tuple[str, str], Comparison]:
    """Compare all tasks that all runs have evaluated.

    Raises:
        FileNotFoundError, ValueError: naming the folder or file.
    """
    names = [folders(args.a), folders(args.b)]
    flat_names = [name for side in names for name in side]
    flat = []
    problems: dict[tuple[str, str], str] = {}
    for name in flat_names:
        statistics, wrong = run_statistics(name, args.gt)
        flat.append(statistics)
        problems = wrong | problems
    runs = [flat[: len(names[0])], flat[len(names[0]) :]]
    shared = [key for key in flat[0] if all(key in run for run in flat)]
    every = list(dict.fromkeys([*(key for run in flat for key in run), *problems]))
    if not shared:
        lines = [
            f"  {name}: {', '.join(f'{task} on {dataset}' for dataset, task in run) or 'nothing'}"
            for name, run in zip(flat_names, flat, strict=True)
        ]
        raise ValueError(
            "\n".join(["The runs have no evaluation in common:", *lines, *problems.values()])
        )
    for dataset, task in every:
        if (dataset, task) not in shared:
            reason = problems.get((dataset, task), "not all runs evaluated it")
            print(f"note: {task} on {dataset} is left out: {reason}")
    for key in shared:
        check_same_test_set([run[key] for run in flat], flat_names)
    results = {}
    for dataset, task in shared:

        def progress(batches: Iterator, total: int, title: str = f"{dataset}, {task}") -> Iterator:
            return tqdm(batches, total=total, desc=title, unit="batch", leave=False)

        sides = [[run[dataset, task] for run in side] for side in runs]
        results[dataset, task] = compare(
            *sides, num_resamples=args.resamples, seed=args.seed, progress=progress
        )
    return results


def report(results: dict[tuple[str, str], Comparison], a: str, b: str) -> str:
    """Return the comparison as Markdown."""
    parts = [f"# Comparison\n\nA: {a}\n\nB: {b}"]
    for (dataset, task), comparison in results.items():
        parts.append(f"## {dataset}, {task}")
        first = next(iter(comparison.metrics.values()), None)
        parts.append(f"**{first['verdict'][0].upper()}{first['verdict'][1:]}.**" if first else "")
        rows = [
            {
                "metric": name,
                "A": _span(metric["a"]),
                "B": _span(metric["b"]),
                "B - A": _span(metric["difference"], "+"),
            }
            for name, metric in comparison.metrics.items()
        ]
        parts.append(f"Value and 95 % interval:\n\n{table(rows)}")
        runs = [
            f"- {name}: A {_values(metric['runs_a'])}; B {_values(metric['runs_b'])}"
            for name, metric in comparison.metrics.items()
            if len(metric["runs_a"]) + len(metric["runs_b"]) > 2
        ]
        parts += ["Each run:\n\n" + "\n".join(runs)] if runs else []
        beyond = [row for row in comparison.classes if row["beyond_noise"]]
        beyond.sort(key=lambda row: -abs(row["difference"]))
        known = sum(not math.isnan(row["difference"]) for row in comparison.classes)
        parts.append(f"Classes that differ beyond noise: {len(beyond)} of {known}.")
        if beyond:
            keys = ("class", "images", "A", "B", "difference", "low", "high")
            parts.append(table([{key: row[key] for key in keys} for row in beyond[:_NUM_PRINTED]]))
        parts += [f"Note: {note}" for note in comparison.notes]
    return "\n\n".join(part for part in parts if part) + "\n"


def _span(interval: tuple[float, float, float], sign: str = "") -> str:
    value, low, high = (f"{number:{sign}.2f}" for number in interval)
    return f"{value} ({low} to {high})"


def _values(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.output:
            require_writable(args.output)
        results = compare_folders(args)
        text = report(results, args.a, args.b)
        print(text)
        if args.output:
            content: dict[str, dict[str, Any]] = {}
            for (dataset, task), comparison in results.items():
                content.setdefault(dataset, {})[task] = _plain(comparison._asdict())
            with atomic_write(os.path.join(args.output, "comparison.json")) as file:
                json.dump(content, file, indent=1)
            with atomic_write(os.path.join(args.output, "comparison.md")) as file:
                file.write(text)
    except (ValueError, FileNotFoundError, WriteError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_program(main)
