"""Writes evaluation results and predictions to files, each complete or absent.

Results: JSON for programs, a Markdown table for people.
"""

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from tabulate import tabulate

from ..utils.files import atomic_link, atomic_write, explained_write_errors, make_folder

# Per-class metrics such as "AP-cat". One metric has a hyphen in its own name.
_CLASS_METRIC = re.compile(r"(min\(IoU, B-Iou\)|[^-]+)-(.+)")

_logger = logging.getLogger(__name__)

Results = Mapping[str, Mapping[str, Mapping[str, float]]]


def write_results(output_dir: str, results: Results, name: str = "evaluation") -> None:
    """Write `evaluation.json` and `evaluation.md` to a folder, each atomically.

    Args:
        output_dir: created if missing.
        results: {data set: {task: {metric: value}}}; non-finite values become null.
        name: file name without extension.

    Raises:
        WriteError: a file cannot be written.
    """
    make_folder(output_dir)
    with atomic_write(os.path.join(output_dir, f"{name}.json")) as file:
        json.dump(_plain(results), file, indent=1)
    with atomic_write(os.path.join(output_dir, f"{name}.md")) as file:
        file.write(results_table(results))


class WritesPredictions(DatasetEvaluator):
    """Mixin for Detectron2 evaluators: writes what they write, but atomically, with named errors.

    List it before Detectron2's class among the bases.
    """

    _output_dir: str | None
    # `_output_dir` during `evaluate`, where Detectron2's class must not write itself.
    _folder: str | None = None

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self._folder, self._output_dir = self._output_dir, None
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._output_dir = self._folder

    def write_predictions(self, name: str, content: Any) -> None:
        """Write a file of the output folder, if there is one.

        Args:
            name: ends in `.json`, or in `.pth` for `torch.save`.
            content: what to write.

        Raises:
            WriteError: the file cannot be written.
        """
        if not self._folder:
            return
        make_folder(self._folder)
        path = os.path.join(self._folder, name)
        _logger.info(f"Saving predictions to {path}")
        with atomic_write(path, "wb") as file:
            if name.endswith(".json"):
                # `dumps` is much faster than `dump`.
                file.write(json.dumps(content).encode())
            else:
                torch.save(content, file)

    def link_predictions(self, name: str, alias: str) -> None:
        """Give a file that `write_predictions` has written a second name, which needs no space.

        Raises:
            WriteError: the file cannot be written.
        """
        if self._folder:
            atomic_link(os.path.join(self._folder, name), os.path.join(self._folder, alias))

    def _eval_box_proposals(self, predictions: list[dict]) -> None:
        """Of Detectron2's classes for instances."""
        folder = self._folder or ""
        with explained_write_errors(os.path.join(folder, "box_proposals.pkl")):
            if folder:
                os.makedirs(folder, exist_ok=True)
            self._output_dir = self._folder
            super()._eval_box_proposals(predictions)  # type: ignore[misc]
            self._output_dir = None


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
