"""The files that an evaluation leaves, found and read by tools that explain or compare runs."""

import glob
import json
import math
import os
from typing import Any

import numpy as np

from ..utils.files import list_names
from .ground_truth import read_coco
from .image_statistics import ImageStatistics, read_statistics
from .mask_statistics import match_masks, read_results

_RESULTS_FILE = "coco_instances_results.json"
# Folders of a run that evaluations write to.
_FOLDERS = ("", "inference", "inference_TTA")
# Percent points by which AP, recomputed, may differ from the evaluation.
_TOLERANCE = 0.05


def evaluation_folder(run: str) -> str:
    """Return the folder of a run that has the files of an evaluation.

    Args:
        run: OUTPUT_DIR of a run, or a folder in it.

    Raises:
        FileNotFoundError: it is no folder, or has none of them.
    """
    if not os.path.isdir(run):
        raise FileNotFoundError(f"{run} is not a folder.")
    for name in _FOLDERS:
        folder = os.path.join(run, name) if name else run
        if os.path.isdir(folder) and any(n.startswith("per_class_") for n in list_names(folder)):
            return folder
    raise FileNotFoundError(
        f"{run} has no per_class_*.json, nor has its folder inference: evaluate it, "
        "`tools/train_net.py --eval-only`. Evaluations of earlier versions did not write them."
    )


def read_json(path: str) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged.
    """
    with open(path) as file:
        try:
            return json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not JSON: {error}. Evaluate again.") from error


def class_tables(folder: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Read all per_class files of a folder, by data set and task."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "per_class_*.json")))
    tables = [read_json(path) for path in paths]
    return {(table["dataset"], table["task"]): table for table in tables}


def run_statistics(
    run: str, gt_file: str | None = None
) -> tuple[dict[tuple[str, str], ImageStatistics], dict[tuple[str, str], str]]:
    """Read what each image contributes to the metrics of a run, by data set and task.

    Args:
        run: OUTPUT_DIR of a run, or a folder in it.
        gt_file: COCO JSON of the instances; default: the one that the evaluation read.

    Returns:
        Statistics, and what is wrong with the files of instances that cannot be used.

    Raises:
        FileNotFoundError: another file is missing.
        ValueError: another file is damaged, or belongs to another evaluation.
    """
    folder = evaluation_folder(run)
    found: dict[tuple[str, str], ImageStatistics] = {}
    problems: dict[tuple[str, str], str] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "per_image_*.json"))):
        dataset, task, statistics = read_statistics(path)
        found[dataset, task] = statistics
    for key, table in class_tables(folder).items():
        if table["task"] == "segm":
            try:
                _, _, found[key] = read_masks(folder, table, gt_file)
            except (FileNotFoundError, ValueError) as error:
                problems[key] = str(error)
    return found, problems


def read_masks(
    folder: str, table: dict[str, Any], gt_file: str | None
) -> tuple[Any, list[dict[str, Any]], ImageStatistics]:
    """Read gt and predicted instances of an evaluation, and compare their counts with its table.

    Args:
        folder: of the evaluation.
        table: content of its per_class file.
        gt_file: replaces the annotation file noted there.

    Returns:
        `COCO`, results, and what each image contributes to the metrics.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or belongs to another evaluation.
    """
    # Evaluations of earlier versions noted no name.
    results_file = os.path.join(folder, table.get("results_file") or _RESULTS_FILE)
    if not os.path.isfile(results_file):
        raise FileNotFoundError(f"{results_file} is missing: evaluate again.")
    gt_file = gt_file or table["gt_file"]
    if not os.path.isfile(gt_file):
        raise FileNotFoundError(
            f"{gt_file}, the annotations that {folder} was evaluated with, is missing: name it "
            "with --gt."
        )
    gt, results = read_coco(gt_file), read_results(results_file)
    try:
        statistics = match_masks(gt, results)
    except ValueError as error:
        raise ValueError(f"{results_file}: {error}") from error
    recorded = [row["gt"] for row in table["classes"]]
    if statistics.gt_counts().sum(0).tolist() != recorded:
        raise ValueError(
            f"{gt_file} does not have the {sum(recorded)} objects that {folder} was evaluated "
            f"with for {table['dataset']}: name the right annotations with --gt."
        )
    once = np.ones((1, len(statistics.image_ids)), dtype=np.int64)
    ap = float(statistics.scores(once)[0]["AP"][0])
    known = [row["AP"] for row in table["classes"] if row["AP"] is not None]
    evaluated = sum(known) / len(known) if known else math.nan
    if abs(ap - evaluated) > _TOLERANCE:
        raise ValueError(
            f"{results_file} has AP {ap:.2f}, but its evaluation had {evaluated:.2f}: the file is "
            "of another evaluation. Evaluate again."
        )
    return gt, results, statistics
