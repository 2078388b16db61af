"""The command line of demo.py."""

import argparse
from pathlib import Path

import cv2

from mask2former.inference.filters import PredictionFilter
from mask2former.inference.folder_results import KINDS
from mask2former.inference.video import CODECS, can_show_windows
from mask2former.utils.visualization import TASKS

# Folder in --output for the files of --save.
RESULTS = "results"


def _path(text: str) -> Path:
    return Path(text).expanduser()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Predict images, videos or a camera.",
        epilog="With --video-input several videos go to a folder. Containers that can be written: "
        f"{', '.join(CODECS)}; browsers play .webm only. ffmpeg, if installed, keeps the sound.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config-file", metavar="FILE", help="config of the model")
    model.add_argument(
        "--model",
        metavar="PATH",
        help="folder of a training or model, checkpoint, model of transformers, exported file",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="IMAGE", help="images, folders or globs")
    source.add_argument("--video-input", nargs="+", metavar="VIDEO", help="video files")
    source.add_argument(
        "--webcam", nargs="?", const=0, type=int, metavar="INDEX", help="camera (default: 0)"
    )
    parser.add_argument("--output", type=_path, help="folder, or a file; default: show windows")
    parser.add_argument(
        "--recursive",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also the subfolders of folders (default)",
    )
    parser.add_argument(
        "--task", choices=[*TASKS, "all"], help="what to draw (default: the first one turned on)"
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        help="minimum score of the instances drawn (default: 0.5); --min-score is for all outputs",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images, or tiles, at once (default: 1)"
    )
    parser.add_argument(
        "--tile-size", type=int, metavar="N", help="predict in tiles of N x N pixels: large images"
    )
    parser.add_argument(
        "--overlap", type=int, metavar="N", help="of tiles (default: a quarter of them)"
    )
    parser.add_argument(
        "--max-frames", type=int, metavar="N", help="stop a video or camera after N frames"
    )
    results = parser.add_argument_group("results of images")
    results.add_argument(
        "--save",
        nargs="+",
        choices=KINDS,
        default=[],
        help=f"write to OUTPUT/{RESULTS}: COCO result JSON, COCO panoptic files, label maps",
    )
    results.add_argument("--html", type=_path, metavar="FILE", help="write a report for a browser")
    results.add_argument(
        "--dataset",
        metavar="NAME",
        help="registered data set with ground truth for the report and image ids for --save "
        "(default: the first of DATASETS.TEST)",
    )
    filters = parser.add_argument_group("filters, of everything that is written")
    filters.add_argument("--min-score", type=float, metavar="S", help="minimum score, 0 to 1")
    filters.add_argument(
        "--min-score-class",
        nargs="+",
        default=[],
        metavar="CLASS=S",
        help="minimum scores of single classes",
    )
    filters.add_argument("--min-area", type=int, metavar="N", help="minimum pixels of an object")
    filters.add_argument("--min-fragment", type=int, metavar="N", help="and of its parts")
    filters.add_argument(
        "--mask-nms", type=float, metavar="IOU", help="remove duplicates of higher IoU"
    )
    filters.add_argument(
        "--class-agnostic-nms", action="store_true", help="also those of another class"
    )
    filters.add_argument("--top-k", type=int, metavar="K", help="keep the K best instances")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides"
    )
    args = parser.parse_args(argv)
    problem = _wrong_combination(args)
    if problem:
        parser.error(problem)
    return args


def _wrong_combination(args: argparse.Namespace) -> str | None:
    if not 0 <= args.confidence_threshold <= 1:
        return f"--confidence-threshold is {args.confidence_threshold}, not in 0 to 1"
    for name in ("batch_size", "max_frames", "tile_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            return f"--{name.replace('_', '-')} is {getattr(args, name)}, not 1 or more"
    if args.overlap is not None:
        if args.tile_size is None:
            return "--overlap is of tiles: add --tile-size"
        if not 0 <= args.overlap <= args.tile_size // 2:
            return f"--overlap is {args.overlap}, not 0 to half of --tile-size"
    is_folder = args.output is not None and args.output.suffix.lower() != ".png"
    if args.input is None and args.tile_size is None and args.batch_size > 1:
        return "--batch-size is for --input, or of tiles: add --tile-size"
    if args.input is None and not args.recursive:
        return "--no-recursive is for the folders of --input"
    if args.input is not None and args.max_frames is not None:
        return "--max-frames is for --video-input and --webcam"
    if args.input is None and (args.save or args.html is not None):
        return "--save and --html are for --input"
    if args.save and not is_folder:
        return "--save writes to the folder --output: name one"
    if args.dataset is not None and not (args.save or args.html is not None):
        return "--dataset is for --html and --save: add one of them"
    if args.html is not None and args.html.suffix.lower() not in (".html", ".htm"):
        return f"--html is {args.html}, which does not end in .html"
    if args.output is None and args.html is None and not can_show_windows():
        return (
            "--output is missing: without it drawings are shown in windows, and this OpenCV "
            f"{cv2.__version__} has none (opencv-python-headless). Add --output, or install "
            "opencv-python instead"
        )
    return None


def read_filter(args: argparse.Namespace) -> PredictionFilter:
    """
    Raises:
        ValueError: a value is out of range.
    """
    per_class = {}
    for text in args.min_score_class:
        name, equals, value = text.rpartition("=")
        try:
            per_class[int(name) if name.isdigit() else name] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--min-score-class {text} is not CLASS=SCORE, such as person=0.7")
    return PredictionFilter(
        min_score=args.min_score,
        min_score_per_class=per_class or None,
        min_fragment=args.min_fragment,
        min_area=args.min_area,
        mask_nms=args.mask_nms,
        class_agnostic_nms=args.class_agnostic_nms,
        top_k=args.top_k,
    )
