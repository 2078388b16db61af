#!/usr/bin/env python
"""Predict images, folders, videos or a camera: drawings, result files, an HTML report.

    python tools/demo.py --config-file configs/... --input a.jpg folder/ --output drawings \
        --opts MODEL.WEIGHTS model_final.pth
    python tools/demo.py --model output/model_final --input folder/ --output out \
        --save json panoptic --html out/report.html --dataset coco_2017_val_panoptic
    python tools/demo.py --model output/model_final --video-input clip.mp4 --output drawn.mp4

--input takes image files, folders with their subfolders, and glob patterns. --output is a folder,
which receives a PNG for each image (in the subfolder that the image is in) or a video for each
video; or, for one drawing, a file. Without --output drawings are shown in windows, which OpenCV's
headless packages cannot do. Without a GPU add `MODEL.DEVICE cpu` to --opts.

--model is a folder that training wrote, or an exported file. With --config-file the class names and
colours are those of the first data set in DATASETS.TEST; for your own data use a config with
DATASETS.CUSTOM, such as the config.yaml that training wrote.

A file that cannot be read or predicted is left out and named at the end, with exit status 1.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from demo_options import RESULTS, parse_args, read_filter
from detectron2.config import CfgNode

from mask2former.inference.drawing_files import plan_drawings, plan_videos
from mask2former.inference.filters import PredictionFilter
from mask2former.inference.folder_results import TASK_OF_KIND
from mask2former.inference.folder_run import FolderRun
from mask2former.inference.image_files import find_images, stems_of
from mask2former.inference.pretrained import EXPORTED_SUFFIXES
from mask2former.inference.result import Result
from mask2former.inference.result_files import write_png
from mask2former.inference.video import VideoReader, require_container
from mask2former.inference.video_run import predict_video
from mask2former.predictor import Predictor
from mask2former.preflight import load_and_check
from mask2former.utils.files import WriteError, require_writable
from mask2former.utils.interrupts import run_program
from mask2former.utils.memory import keep_freed_memory
from mask2former.utils.visualization import enabled_tasks

_ESCAPE = 27


# ---- what to predict, and what to write ----


def choose_tasks(requested: str | None, enabled: list[str], saved: Sequence[str] = ()) -> list[str]:
    """Returns the tasks to draw.

    Args:
        requested: a task, "all", or None for the first enabled one.
        enabled: tasks that the config turns on.
        saved: kinds of result files that are asked for.

    Raises:
        ValueError: a task that is needed is off.
    """
    needed = {} if requested in (None, "all") else {requested: f"--task {requested}"}
    needed |= {TASK_OF_KIND[kind]: f"--save {kind}" for kind in saved}
    for task, option in needed.items():
        if task not in enabled:
            raise ValueError(
                f"{option}, but the config turns on {', '.join(enabled)} only: "
                f"add MODEL.MASK_FORMER.TEST.{task.upper()}_ON True to --opts"
            )
    if requested == "all":
        return enabled
    return enabled[:1] if requested is None else [requested]


def load(args: argparse.Namespace) -> tuple[Predictor, list[str]]:
    """Load the model; returns it and the tasks to draw.

    Raises:
        FileNotFoundError, ValueError: the config or the model is missing or wrong.
    """
    if args.model is not None:
        predictor = load_model(args.model, args.opts)
        _keep_memory_on_cpu(predictor.cfg)
        return predictor, choose_tasks(args.task, enabled_tasks(predictor.cfg), args.save)
    cfg = load_and_check(args.config_file, args.opts, "predict")
    tasks = choose_tasks(args.task, enabled_tasks(cfg), args.save)
    _keep_memory_on_cpu(cfg)
    return Predictor(cfg), tasks


def load_model(name: str, opts: list[str]) -> Predictor:
    """Load a model folder or an exported file; see `load`."""
    path = Path(name).expanduser()
    if path.suffix.lower() not in EXPORTED_SUFFIXES:
        return Predictor.from_pretrained(path, opts=opts)
    # Its formats need packages of their own.
    from mask2former.export import load_exported

    return load_exported(path, opts=opts)


def _keep_memory_on_cpu(cfg: CfgNode) -> None:
    if torch.device(cfg.MODEL.DEVICE).type == "cpu":
        keep_freed_memory()


# ---- images ----


def predict_images(args: argparse.Namespace) -> None:
    """Predict --input.

    Raises:
        FileNotFoundError, ValueError, WriteError: before the first prediction, something is missing
            or would not work.
        SystemExit: images could not be predicted; the others are.
    """
    has_folder = args.output is not None and args.output.suffix.lower() != ".png"
    outputs = [args.output] if has_folder else []
    images = find_images(args.input, recursive=args.recursive, leave_out=outputs)
    stems = stems_of(images)
    predictor, tasks = load(args)
    planned = {}
    if args.output is not None:
        planned = plan_drawings(images, stems, tasks, args.output)
        if args.save and any(len(x.parts) > 1 and x.parts[0] == RESULTS for x in stems):
            raise ValueError(
                f"a folder of the input is named {RESULTS}, as that of --save: rename it"
            )
    run = FolderRun(
        predictor,
        tasks[0],
        read_filter(args),
        batch_size=args.batch_size,
        tile_size=args.tile_size,
        overlap=args.overlap,
        confidence_threshold=args.confidence_threshold,
    )
    folders = {target.parent for target in planned.values()}
    if args.html is not None:
        folders.add(args.html.parent)
    if args.save:
        folders.add(args.output / RESULTS)
    for folder in folders:
        require_writable(str(folder))
    if args.html is not None or args.save:
        run.find_gt(args.dataset)
    if args.save:
        run.save_results(args.output / RESULTS, args.save)
    title = ", ".join(Path(pattern).name or pattern for pattern in args.input)
    num_drawn = 0
    with ExitStack() as stack:
        if args.html is not None:
            stack.enter_context(run.write_report(args.html, title, len(images)))
        for image, result in run.results(images, stems):
            for task in tasks:
                drawing = draw(result, task, args)
                target = planned.get((image.path, task))
                if target is not None:
                    write_png(target, drawing)
                    num_drawn += 1
                elif args.html is None and not show(str(image.name), drawing, wait=True):
                    return
    if args.output is not None:
        print(f"wrote {num_drawn} drawings to {args.output}")
    for path in run.finish():
        print(f"wrote {path}")
    if run.failed:
        lines = "".join(f"\n  {path}: {reason}" for path, reason in run.failed.items())
        sys.exit(f"error: {len(run.failed)} images could not be predicted:{lines}")


def draw(result: Result, task: str, args: argparse.Namespace) -> np.ndarray:
    """Draw a task; of instances those above --confidence-threshold."""
    if task == "instance":
        # Other tasks are not filtered, and need no scores.
        only = replace(result, panoptic=None, semantic=None)
        result = only.filter(PredictionFilter(min_score=args.confidence_threshold))
    return result.draw(task)


def show(title: str, drawing: np.ndarray, *, wait: bool) -> bool:
    """Show a drawing in a window; False when the user has pressed Escape."""
    cv2.imshow(title, cv2.cvtColor(drawing, cv2.COLOR_RGB2BGR))
    key = cv2.waitKey(0 if wait else 1)
    if wait:
        cv2.destroyWindow(title)
    return key != _ESCAPE


# ---- videos and cameras ----


def predict_videos(args: argparse.Namespace) -> None:
    """Predict --video-input; as `predict_images`."""
    videos = [Path(name).expanduser() for name in args.video_input]
    for video in videos if len(videos) == 1 else ():
        VideoReader(video).close()  # before the model is loaded
    predictor, tasks = load(args)
    planned = {} if args.output is None else plan_videos(videos, tasks, args.output)
    for folder in {target.parent for target in planned.values()}:
        require_writable(str(folder))
    failed = {}
    for video in videos:
        targets = {task: planned[video, task] for task in tasks if (video, task) in planned}
        try:
            predict_frames(args, predictor, tasks, video, targets)
        except (FileNotFoundError, ValueError, RuntimeError, WriteError) as error:
            if len(videos) == 1 or isinstance(error, WriteError):
                raise
            failed[video] = str(error)
    if failed:
        lines = "".join(f"\n  {reason}" for reason in failed.values())
        sys.exit(f"error: {len(failed)} of {len(videos)} videos could not be predicted:{lines}")


def predict_camera(args: argparse.Namespace) -> None:
    """Predict --webcam until Ctrl-C, Escape in the window, or --max-frames; the video is kept."""
    VideoReader(args.webcam).close()
    predictor, tasks = load(args)
    targets = {}
    if args.output is not None:
        if args.output.suffix == "" or args.output.is_dir() or len(tasks) > 1:
            raise ValueError("with --webcam, --output is one video file, and --task one task")
        targets = {tasks[0]: args.output}
        require_container(args.output)
        require_writable(str(args.output.parent))
    predict_frames(args, predictor, tasks, args.webcam, targets)


def predict_frames(
    args: argparse.Namespace,
    predictor: Predictor,
    tasks: list[str],
    source: Path | int,
    targets: dict[str, Path],
) -> None:
    """Predict a video or camera; without targets frames are shown."""
    numbers = predict_video(
        predictor,
        source,
        tasks,
        targets,
        draw=lambda result, task: draw(result, task, args),
        show=lambda title, drawing: show(title, drawing, wait=False),
        filter=read_filter(args),
        max_frames=args.max_frames,
        batch_size=args.batch_size,
        tile_size=args.tile_size,
        overlap=args.overlap,
    )
    for task, number in numbers.items():
        print(f"wrote {number} frames to {targets[task]}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        read_filter(args)  # before the model is loaded
        if args.input is not None:
            predict_images(args)
        elif args.video_input is not None:
            predict_videos(args)
        else:
            predict_camera(args)
    except (ValueError, FileNotFoundError, WriteError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_program(main)
