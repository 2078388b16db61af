"""Writes evaluation results to files: JSON for programs, a Markdown table for people."""

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from ..utils.files import atomic_write

# Per-class metrics such as "AP-cat". One metric has a hyphen in its own name.
_CLASS_METRIC = re.compile(r"(min\(IoU, B-Iou\)|[^-]+)-(.+)")

Results = Mapping[str, Mapping[str, Mapping[str, float]]]


def write_results(output_dir: str, results: Results, name: str = "evaluation") -> None:
    """Write `evaluation.json` and `evaluation.md` to a folder, each atomically.

    Args:
        output_dir: created if missing.
        results: {data set: {task: {metric: value}}}; non-finite values become null.
        name: file name without extension.
    """
    os.makedirs(output_dir, exist_ok=True)
    with atomic_write(os.path.join(output_dir, f"{name}.json")) as file:
        json.dump(_plain(results), file, indent=1)
    with atomic_write(os.path.join(output_dir, f"{name}.md")) as file:
        file.write(results_table(results))


def results_table(results: Results) -> str:
    """Return a Markdown table of all metrics and one of per-class metrics for each data set."""
    rows: list[list[str]] = []
    classes: dict[str, dict[str, dict[str, float]]] = {}
    for dataset, tasks in results.items():
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                class_metric = _CLASS_METRIC.fullmatch(metric)
                if class_metric is None:
                    rows.append([_cell(dataset), _cell(task), _cell(metric), _number(value)])
                else:
                    scores = classes.setdefault(dataset, {}).setdefault(class_metric[2], {})
                    scores[f"{task}/{class_metric[1]}"] = value
    parts = [_markdown(rows, ["data set", "task", "metric", "value"])]
    for dataset, class_scores in classes.items():
        names = list(dict.fromkeys(m for scores in class_scores.values() for m in scores))
        rows = [
            [_cell(label), *(_number(scores[m]) if m in scores else "" for m in names)]
            for label, scores in class_scores.items()
        ]
        parts += [f"Classes of {dataset}:", _markdown(rows, ["class", *names])]
    return "\n\n".join(parts) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return float(value) if math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _markdown(rows: list[list[str]], headers: list[str]) -> str:
    text = ["data set", "task", "metric", "class"]
    align = ["left" if header in text else "right" for header in headers]
    return tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)
