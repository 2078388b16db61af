"""Evaluation results as files: JSON for programs, a Markdown table for people."""

import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from ..utils.files import atomic_write

# Metrics of one class, such as "AP-cat"; the metric itself has a hyphen in one case.
_OF_CLASS = re.compile(r"(min\(IoU, B-Iou\)|[^-]+)-(.+)")

Results = Mapping[str, Mapping[str, Mapping[str, float]]]


def write_results(output_dir: str, results: Results, name: str = "evaluation") -> None:
    """Write `evaluation.json` and `evaluation.md` to a folder, each complete or not at all.

    Args:
        output_dir: made if it does not exist.
        results: {data set: {task: {metric: value}}}; values that are not finite become null.
        name: of the files, without extension.
    """
    os.makedirs(output_dir, exist_ok=True)
    with atomic_write(os.path.join(output_dir, f"{name}.json")) as file:
        json.dump(_plain(results), file, indent=1)
    with atomic_write(os.path.join(output_dir, f"{name}.md")) as file:
        file.write(results_table(results))


def results_table(results: Results) -> str:
    """One Markdown table of all metrics, then for each data set one of its classes, if known."""
    rows, classes = [], {}
    for dataset, tasks in results.items():
        for task, metrics in tasks.items():
            for metric, value in metrics.items():
                of_class = _OF_CLASS.fullmatch(metric)
                if of_class is None:
                    rows.append([_cell(dataset), _cell(task), _cell(metric), _number(value)])
                else:
                    scores = classes.setdefault(dataset, {}).setdefault(of_class[2], {})
                    scores[f"{task}/{of_class[1]}"] = value
    parts = [_markdown(rows, ["data set", "task", "metric", "value"])]
    for dataset, of_classes in classes.items():
        metrics = list(dict.fromkeys(m for scores in of_classes.values() for m in scores))
        rows = [
            [_cell(name), *(_number(scores[m]) if m in scores else "" for m in metrics)]
            for name, scores in of_classes.items()
        ]
        parts += [f"Classes of {dataset}:", _markdown(rows, ["class", *metrics])]
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
