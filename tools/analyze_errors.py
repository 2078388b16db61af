#!/usr/bin/env python
"""What costs a model its score: kinds of errors, confused classes, object sizes, label errors.

    python tools/analyze_errors.py output/my_run [--output DIR] [--images DIR] [--min-score 0.5]

RUN is an OUTPUT_DIR with the files that an evaluation writes to its folder inference. Writes to
--output (default: RUN's error_analysis): error_analysis.md and .png; of instances also the ranked
label_errors_DATASET_segm.json and .csv, objects that confident predictions contradict, and a
picture of the first ones.

Instances: TIDE, average precision gained at IoU 0.5 if a kind of error were fixed. Segments of
panoptic segmentation: this project's own analogue, PQ gained if the errors of a kind did not count.
"""

import argparse
import os
import sys
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mask2former.evaluation.class_tables import result_file, table
from mask2former.evaluation.image_statistics import confusion_of
from mask2former.evaluation.label_errors import draw_candidates, write_candidates
from mask2former.evaluation.mask_errors import analyze_masks, confused_pairs, size_of
from mask2former.evaluation.panoptic_errors import SegmentError, error_table
from mask2former.evaluation.run_files import (
    class_tables,
    evaluation_folder,
    read_json,
    read_masks,
)
from mask2former.utils.files import WriteError, atomic_write, require_writable
from mask2former.utils.interrupts import run_program

# Rows of the page's lists.
_NUM_CONFUSIONS = 15

Bars = dict[str, list[tuple[str, float]]]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of an evaluated run")
    parser.add_argument("--output", metavar="DIR", help="report folder [RUN/error_analysis]")
    parser.add_argument("--gt", metavar="FILE", help="COCO JSON, if it moved since the evaluation")
    parser.add_argument("--images", metavar="DIR", help="folder of the images, if they moved")
    parser.add_argument(
        "--min-score", type=float, default=0.5, help="of a confident prediction [0.5]"
    )
    parser.add_argument(
        "--num-pictures", type=int, default=24, help="label errors that are drawn [24]"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.min_score <= 1:
        parser.error(f"--min-score must be from 0 to 1, got {args.min_score}")
    if args.num_pictures < 0:
        parser.error(f"--num-pictures must be at least 0, got {args.num_pictures}")
    return args


def mask_part(
    args: argparse.Namespace, folder: str, evaluated: dict[str, Any]
) -> tuple[list[str], list[tuple[str, float]]]:
    """Analyse instances; return Markdown and the bars of the plot."""
    gt, results, _ = read_masks(folder, evaluated, args.gt)
    errors = analyze_masks(gt, results, args.min_score)
    parts = [
        f"AP50 is {errors.ap50:.2f}. Errors by TIDE, and the AP50 gained if a kind were fixed:",
        table(errors.kinds),
        "Objects found with IoU > 0.5 by any prediction of their class:",
        table(errors.sizes),
        f"Most confused classes (scores from {args.min_score}, IoU > 0.5):",
        table(errors.confusions[:_NUM_CONFUSIONS]),
    ]
    name = result_file("label_errors", evaluated["dataset"], "segm")
    write_candidates(os.path.join(args.output, name), gt, errors.candidates)
    parts.append(
        f"Label-error candidates: {len(errors.candidates)}, ranked in {name}.csv. A "
        "prediction with a high score contradicts them: check before changing anything."
    )
    shown = errors.candidates[: args.num_pictures]
    if shown:
        image_root = args.images or evaluated.get("image_root") or ""
        first = os.path.join(image_root, gt.imgs[shown[0]["image_id"]].get("file_name", ""))
        if args.images or os.path.isfile(first):
            draw_candidates(os.path.join(args.output, f"{name}.png"), gt, shown, image_root)
            parts.append(f"![Ground truth in green, prediction in red]({name}.png)")
        else:
            print(f"note: label errors are not drawn: {first} is missing, see --images")
    return parts, [(row["kind"], row["dAP"]) for row in errors.kinds]


def panoptic_part(
    folder: str, evaluated: dict[str, Any]
) -> tuple[list[str], list[tuple[str, float]]]:
    """Analyse segments; return Markdown and the bars of the plot."""
    name = result_file("segment_errors", evaluated["dataset"], "panoptic_seg")
    path = os.path.join(folder, f"{name}.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: evaluate again.")
    content = read_json(path)
    errors = [SegmentError(*row) for rows in content["images"].values() for row in rows]
    # Of a class that does not occur, the table has null.
    classes = [row | {"SQ": row["SQ"] or 0.0} for row in evaluated["classes"]]
    kinds = error_table(classes, errors)
    ids = [row["id"] for row in classes]
    names = [row["class"] for row in classes]
    matrix = np.zeros((len(ids), len(ids)), dtype=np.int64)
    for error in errors:
        if error.kind == "wrong class" and not error.is_fp:
            matrix[ids.index(error.gt_category), ids.index(error.pred_category)] += 1
    matrix += np.diag([row["gt"] for row in classes]) - np.diag(matrix.sum(1))
    sizes = [
        {
            "size": size,
            "FP": sum(e.is_fp and size_of(e.area) == size for e in errors),
            "FN": sum(not e.is_fp and size_of(e.area) == size for e in errors),
        }
        for size in ("small", "medium", "large")
    ]
    parts = [
        "Kinds of this project, not of the official evaluation: why a segment is a false positive "
        "or negative, and the PQ gained if those of a kind did not count.",
        table(kinds),
        "By size of the segment:",
        table(sizes),
        "Most confused classes (IoU > 0.5):",
        table(confused_pairs(matrix, names)[:_NUM_CONFUSIONS]),
    ]
    return parts, [(row["kind"], row["dPQ"]) for row in kinds]


def semantic_part(folder: str, evaluated: dict[str, Any]) -> list[str]:
    """List confused classes of semantic segmentation, by pixels, as Markdown."""
    name = result_file("per_image", evaluated["dataset"], "sem_seg")
    path = os.path.join(folder, f"{name}.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: evaluate again.")
    names, confusion = confusion_of(path)
    pairs = confused_pairs(confusion.T, names)[:_NUM_CONFUSIONS]
    return ["Most confused classes, by pixels:", table(pairs)]


def plot(path: str, bars: Bars) -> None:
    """Draw one panel of bars per task as PNG."""
    figure = Figure(figsize=(6.5, 3.2 * len(bars)), layout="constrained")
    panels = figure.subplots(len(bars), squeeze=False)[:, 0]
    for panel, (title, values) in zip(panels, bars.items(), strict=True):
        drawn = panel.barh([name for name, _ in values], [value for _, value in values])
        panel.bar_label(drawn, fmt="%.2f", padding=3)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set_title(title)
        panel.set_xlabel("points gained without these errors")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)


def analyze(args: argparse.Namespace) -> str:
    """Write the report; return the path of its page.

    Raises:
        FileNotFoundError, ValueError: a file of the evaluation cannot be used.
        WriteError: a file cannot be written.
    """
    folder = evaluation_folder(args.run)
    args.output = args.output or os.path.join(args.run, "error_analysis")
    require_writable(args.output)
    page, bars = ["# Errors"], {}
    for (dataset, task), evaluated in class_tables(folder).items():
        if task == "segm":
            parts, values = mask_part(args, folder, evaluated)
            bars[f"{dataset}: AP50 by TIDE"] = values
        elif task == "panoptic_seg":
            parts, values = panoptic_part(folder, evaluated)
            bars[f"{dataset}: PQ by kind of segment error"] = values
        else:
            parts = semantic_part(folder, evaluated)
        page += [f"## {dataset}, {task}", *parts]
    if bars:
        plot(os.path.join(args.output, "error_analysis.png"), bars)
        page.insert(1, "![Points gained](error_analysis.png)")
    path = os.path.join(args.output, "error_analysis.md")
    with atomic_write(path) as file:
        file.write("\n\n".join(page) + "\n")
    return path


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        print(f"report: {analyze(args)}")
    except (ValueError, FileNotFoundError, WriteError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_program(main)
