#!/usr/bin/env python
"""Draw a model's predictions on images.

    python tools/demo.py --config-file configs/... --input a.jpg b.jpg --output drawings \
        --opts MODEL.WEIGHTS model_final.pth

--input takes image files, folders and glob patterns. --output is a folder, which receives a PNG
named after each image, or, for one drawing, a file. Without a GPU add `MODEL.DEVICE cpu` to --opts.

Class names and colours are those of the first data set in DATASETS.TEST. For your own data use a
config with DATASETS.CUSTOM, such as the config.yaml that training wrote.
"""

import argparse
import glob
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from mask2former.predictor import Predictor
from mask2former.preflight import load_and_check
from mask2former.utils.files import WriteError, atomic_write, make_folder, require_writable
from mask2former.utils.interrupts import run_program
from mask2former.utils.memory import keep_freed_memory
from mask2former.utils.visualization import TASKS, draw_prediction, enabled_tasks

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp")


def find_images(patterns: list[str]) -> list[Path]:
    """Returns the image files that match the patterns, in order and without duplicates.

    Args:
        patterns: files, folders (their images, not those of subfolders) or glob patterns.

    Raises:
        FileNotFoundError: a pattern matches nothing.
    """
    images: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            matches = [path]
        else:
            matches = [p for p in map(Path, sorted(glob.glob(str(path)))) if p.is_file()]
        if not matches:
            raise FileNotFoundError(f"--input {pattern}: no image file there")
        images |= dict.fromkeys(matches)
    return list(images)


def choose_tasks(requested: str | None, enabled: list[str]) -> list[str]:
    """Returns the tasks to draw.

    Args:
        requested: a task, "all", or None for the first enabled one.
        enabled: tasks that the config turns on.

    Raises:
        ValueError: the requested task is off.
    """
    if requested == "all":
        return enabled
    if requested is None:
        return enabled[:1]
    if requested not in enabled:
        raise ValueError(
            f"--task {requested}, but the config turns on {', '.join(enabled)} only: "
            f"add MODEL.MASK_FORMER.TEST.{requested.upper()}_ON True to --opts"
        )
    return [requested]


def plan_outputs(
    images: list[Path], tasks: list[str], output: Path
) -> dict[tuple[Path, str], Path]:
    """Returns the file to write for each (image, task).

    Raises:
        ValueError: a file would be written twice, or over an input.
    """
    if output.suffix.lower() == ".png" and not output.is_dir():
        if len(images) * len(tasks) > 1:
            raise ValueError(
                f"--output {output} is one file, but there are {len(images) * len(tasks)} "
                "drawings: name a folder"
            )
        planned = {(images[0], tasks[0]): output}
    else:
        if output.exists() and not output.is_dir():
            raise ValueError(f"--output {output} is a file, but neither a folder nor a .png")
        many = len(tasks) > 1
        planned = {
            (image, task): output / f"{image.stem}{f'_{task}' if many else ''}.png"
            for image in images
            for task in tasks
        }
    inputs = {image.resolve() for image in images}
    sources: dict[Path, Path] = {}
    for (image, _), path in planned.items():
        if path.resolve() in inputs:
            raise ValueError(f"{path} would be overwritten, but it is an input: change --output")
        if path in sources:
            raise ValueError(f"{sources[path]} and {image} would both be drawn to {path}")
        sources[path] = image
    return planned


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw a model's predictions on images.")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the model")
    parser.add_argument("--input", required=True, nargs="+", help="images, folders or globs")
    parser.add_argument("--output", required=True, type=Path, help="folder, or a .png file")
    parser.add_argument(
        "--task", choices=[*TASKS, "all"], help="what to draw (default: the first one turned on)"
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        help="minimum score of the instances drawn (default: 0.5)",
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.confidence_threshold <= 1:
        parser.error(f"--confidence-threshold is {args.confidence_threshold}, not in 0 to 1")
    return args


def draw_all(
    predictor: Predictor, planned: dict[tuple[Path, str], Path], confidence_threshold: float
) -> dict[Path, str]:
    """Writes all drawings; returns the images that could not be drawn, with the reason."""
    tasks_by_image: dict[Path, list[str]] = {}
    for image, task in planned:
        tasks_by_image.setdefault(image, []).append(task)
    failed = {}
    for path, tasks in tqdm(tasks_by_image.items(), desc="images", unit="image"):
        try:
            image = predictor.read(str(path))
        except (OSError, ValueError) as error:
            failed[path] = str(error)
            continue
        try:
            outputs = predictor(image)
        # Such as too little memory for this image; the others may fit.
        except (RuntimeError, ValueError) as error:
            failed[path] = str(error)
            continue
        for task in tasks:
            drawing = draw_prediction(
                predictor.colours(image),
                outputs,
                predictor.metadata,
                task,
                confidence_threshold=confidence_threshold,
            )
            target = planned[path, task]
            make_folder(str(target.parent))
            with atomic_write(str(target), "wb") as file:
                Image.fromarray(drawing).save(file, format="PNG")
    return failed


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        cfg = load_and_check(args.config_file, args.opts, "predict")
        tasks = choose_tasks(args.task, enabled_tasks(cfg))
        planned = plan_outputs(find_images(args.input), tasks, args.output)
        for folder in {target.parent for target in planned.values()}:
            require_writable(str(folder))
        if torch.device(cfg.MODEL.DEVICE).type == "cpu":
            keep_freed_memory()
        predictor = Predictor(cfg)
    except (ValueError, FileNotFoundError, WriteError) as error:
        sys.exit(f"error: {error}")
    try:
        failed = draw_all(predictor, planned, args.confidence_threshold)
    except WriteError as error:
        sys.exit(f"error: {error}")
    written = [path for (image, _), path in planned.items() if image not in failed]
    print(f"wrote {len(written)} drawings to {args.output}")
    if failed:
        lines = "".join(f"\n  {path}: {reason}" for path, reason in failed.items())
        sys.exit(f"error: {len(failed)} images could not be drawn:{lines}")


if __name__ == "__main__":
    run_program(main)
