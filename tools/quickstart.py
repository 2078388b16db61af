#!/usr/bin/env python
"""Train one model for panoptic, instance and semantic segmentation in minutes on any machine.

    python tools/quickstart.py [--output output/quickstart] [--fresh] [KEY VALUE ...]

Prepares the Shapes data set if missing, trains a small model with tools/train_net.py, prints its
PQ, AP and mIoU on held-out images and draws some of them on a contact sheet. A finished run is
reused, an interrupted one resumes; --fresh starts over.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from mask2former.config import load_config
from mask2former.data.formats.images import read_image
from mask2former.predictor import Predictor
from mask2former.utils.interrupts import ignore_interrupts, run_program
from mask2former.utils.memory import keep_freed_memory
from mask2former.utils.visualization import (
    contact_sheet,
    draw_panoptic_gt,
    draw_prediction,
    enabled_tasks,
    magnify,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/shapes/panoptic-segmentation/maskformer2_R18_quickstart.yaml"
# {task: (metric name, evaluator task, evaluator metric)}
METRICS = {
    "panoptic": ("PQ", "panoptic_seg", "PQ"),
    "instance": ("AP", "segm", "AP"),
    "semantic": ("mIoU", "sem_seg", "mIoU"),
}
SCALE = 2.5  # of the drawings: class names do not fit into small images


def prepare_data() -> None:
    """Write the Shapes data set if it is missing."""
    data = Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))) / "shapes"
    if not (data / "annotations").is_dir():
        script = ROOT / "datasets/prepare_shapes.py"
        subprocess.run([sys.executable, str(script), "--output", str(data)], check=True)


def clear_run(output: Path) -> None:
    """Delete an earlier run.

    Raises:
        ValueError: the folder is not the output of a run.
    """
    if not output.exists():
        return
    if not (output / "config.yaml").is_file():
        raise ValueError(f"{output} has no config.yaml, so it is not a training run: not deleted")
    shutil.rmtree(output)


def check_same_config(
    output: Path, cfg: CfgNode, remedy: str = "add --fresh to replace it"
) -> None:
    """Check that the run in `output`, if any, was started with `cfg`.

    Args:
        output: an OUTPUT_DIR.
        cfg: the config of the run to come.
        remedy: what the error proposes, besides another folder.

    Raises:
        ValueError: the config of the run differs.
    """
    file = output / "config.yaml"
    if not file.is_file():
        return
    # Compare both as YAML, which has no tuples. A run may move to another machine or folder.
    current, recorded = (
        _flatten(CfgNode.load_cfg(text)) for text in (cfg.dump(), load_config(str(file)).dump())
    )
    keys = sorted((current | recorded).keys() - {"MODEL.DEVICE", "OUTPUT_DIR"})
    changed = [key for key in keys if current.get(key) != recorded.get(key)]
    if changed:
        raise ValueError(
            f"{output} holds a run with different {', '.join(changed)}: {remedy}, or choose "
            "another --output"
        )


def _flatten(node: CfgNode, prefix: str = "") -> dict:
    flat = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def train(output: Path, opts: list[str]) -> None:
    """Run tools/train_net.py unless the final model and its evaluation exist."""
    command = [sys.executable, "-u", str(ROOT / "tools/train_net.py"), "--config-file", str(CONFIG)]
    final = output / "model_final.pth"
    if final.is_file() and (output / "evaluation.json").is_file():
        print(f"{output} holds a finished run: training skipped (--fresh starts over)")
        return
    if final.is_file():  # interrupted during evaluation
        command += ["--eval-only"]
    # Ctrl-C ends both, and this program says how to continue.
    subprocess.run([*command, "--resume", *opts], check=True, preexec_fn=ignore_interrupts)


def results_table(results: dict, tasks: list[str]) -> str:
    """Return a table with the metric of each task in percent.

    Args:
        results: {evaluator task: {metric: value}}.
        tasks: the tasks to list.
    """
    lines = [f"{'task':<10} {'metric':<6} {'value':>6}"]
    for task in tasks:
        name, evaluator_task, metric = METRICS[task]
        lines.append(f"{task:<10} {name:<6} {results[evaluator_task][metric]:>6.1f}")
    return "\n".join(lines)


def draw_contact_sheet(cfg: CfgNode, num_images: int) -> Path:
    """Draw the first test images, their ground truth and predictions; return the file."""
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    predictor = Predictor(cfg)
    name, tasks = cfg.DATASETS.TEST[0], enabled_tasks(cfg)
    metadata, rows = MetadataCatalog.get(name), []
    for record in tqdm(DatasetCatalog.get(name)[:num_images], desc="drawing", unit="image"):
        image = read_image(record["file_name"], "BGR")
        outputs, image = predictor(image), image[:, :, ::-1]
        drawings = [draw_prediction(image, outputs, metadata, task, scale=SCALE) for task in tasks]
        gt = draw_panoptic_gt(image, record, metadata, scale=SCALE)
        rows.append([magnify(image, SCALE), gt, *drawings])
    path = Path(cfg.OUTPUT_DIR) / "contact_sheet.png"
    contact_sheet(rows, path, ["image", "ground truth", *tasks])
    return path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train and show a small model on Shapes.")
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"), help="run folder")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run there first")
    parser.add_argument("--num-images", type=int, default=8, help="images on the contact sheet")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    if args.num_images < 1:
        parser.error(f"--num-images must be at least 1, got {args.num_images}")

    device = [] if torch.cuda.is_available() else ["MODEL.DEVICE", "cpu"]
    opts = [*device, *args.opts, "OUTPUT_DIR", str(args.output)]
    try:
        cfg = load_config(str(CONFIG), opts)
        if args.fresh:
            clear_run(args.output)
        check_same_config(args.output, cfg)
        prepare_data()
        train(args.output, opts)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {' '.join(error.cmd[:3])} exited with status {error.returncode}")
    cfg.MODEL.WEIGHTS = str(args.output / "model_final.pth")
    path = draw_contact_sheet(cfg, args.num_images)
    results = json.loads((args.output / "evaluation.json").read_text())[cfg.DATASETS.TEST[0]]
    print(f"\n{results_table(results, enabled_tasks(cfg))}\n\ncontact sheet: {path.absolute()}")


if __name__ == "__main__":
    run_program(main)
