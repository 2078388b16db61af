"""Metrics of an exported file beside those of its model, by the evaluators of training."""

import tempfile
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from ..predictor import Predictor
from ..preflight import check_run
from ..trainer import Trainer
from .loading import build_exported_model
from .metadata import ExportedDescription, write_description

METRICS = ("PQ", "AP", "mIoU")


@dataclass(frozen=True)
class Accuracy:
    """One metric, in percent, of the model in PyTorch and of the exported file."""

    dataset: str
    task: str
    metric: str
    live: float
    exported: float


def check_evaluation(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: the data sets of DATASETS.TEST cannot be evaluated; says why.
    """
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST names no data set to evaluate on")
    check_run(cfg, "evaluate")


def add_accuracy(predictor: Predictor, path: str, description: ExportedDescription) -> str:
    """Evaluate a model and its exported file, and add the metrics to the description beside it.

    Args:
        predictor: what was exported; DATASETS.TEST of its config names the data.
        path: the file.
        description: of the file, changed in place and written.

    Returns:
        The metrics as a Markdown table.

    Raises:
        ValueError: the file has post-processing of its own, or is for one size, which is too small.
        WriteError: the description cannot be written.
    """
    live = _metrics(predictor.cfg, predictor.model)
    exported = _metrics(predictor.cfg, build_exported_model(path, predictor.cfg))
    rows = [Accuracy(*key, value, exported[key]) for key, value in live.items()]
    text = _table(rows)
    description.accuracy = {"rows": [vars(row) for row in rows], "table": text}
    write_description(path, description)
    return text


def _metrics(cfg: CfgNode, model: Any) -> dict[tuple[str, str, str], float]:
    """{(data set, task, metric): value in percent}."""
    cfg = cfg.clone()
    cfg.defrost()
    with tempfile.TemporaryDirectory() as folder:
        # The files of an evaluation would replace those of the training run.
        cfg.OUTPUT_DIR = folder
        results = Trainer.test(cfg, model)
    names = cfg.DATASETS.TEST
    by_dataset = {names[0]: results} if len(names) == 1 else results
    return {
        (dataset, task, metric): float(values[metric])
        for dataset, tasks in by_dataset.items()
        for task, values in tasks.items()
        for metric in METRICS
        if metric in values
    }


def _table(rows: list[Accuracy]) -> str:
    lines = [
        "| data set | task | metric | model | file | difference |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.dataset} | {row.task} | {row.metric} | {row.live:.2f} | {row.exported:.2f} | "
        f"{row.exported - row.live:+.2f} |"
        for row in rows
    ]
    return "\n".join(lines)
