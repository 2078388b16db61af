#!/usr/bin/env python
"""Export a trained model: torch.export, AOTInductor, ONNX, TorchScript.

    python tools/export.py --model output/model_final --format onnx --output model.onnx
    python tools/export.py --config-file configs/... --format torch --output model.pt2 \
        --opts MODEL.WEIGHTS model_final.pth
    python tools/export.py --model output/model_final --format torchscript --size 512x512 \
        --output model.ts

FILE.json beside the file holds config, classes, pixel values, sizes and the table of differences to
the model in PyTorch, which is also printed; too large a difference ends with status 1. `--evaluate`
adds the metrics of model and file on DATASETS.TEST. See docs/export.md.
"""

import argparse
import re
import sys

from mask2former.export.accuracy import add_accuracy, check_evaluation
from mask2former.export.exporter import export_model
from mask2former.export.options import FORMATS, POSTPROCESSING, PRECISIONS, ExportOptions
from mask2former.ops.ms_deform_attn import EXPORTED_FORMULATIONS
from mask2former.predictor import Predictor
from mask2former.preflight import load_and_check
from mask2former.utils.files import WriteError
from mask2former.utils.interrupts import run_program


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no HEIGHTxWIDTH, such as 800x1216")
    return int(match[1]), int(match[2])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Export a trained model to a file.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="FOLDER", help="model folder that training wrote")
    source.add_argument(
        "--config-file", metavar="FILE", help="config; with MODEL.WEIGHTS in --opts"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write")
    parser.add_argument("--format", required=True, choices=tuple(FORMATS))
    parser.add_argument(
        "--op",
        default="gather",
        choices=EXPORTED_FORMULATIONS,
        help="deformable attention as gathers (default), as GridSample, or as this project's op",
    )
    parser.add_argument(
        "--postprocess",
        default="none",
        choices=POSTPROCESSING,
        help="compute the results of a task too, at the size of the input (default: none)",
    )
    parser.add_argument("--precision", default="fp32", choices=tuple(PRECISIONS))
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="image size of a TorchScript file"
    )
    parser.add_argument("--batch", type=int, default=1, help="batch of a TorchScript file")
    parser.add_argument(
        "--max-size", type=int, default=4096, help="largest height and width (default: 4096)"
    )
    parser.add_argument("--opset", type=int, default=18, help="of ONNX, 17 or more (default: 18)")
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest difference (default: 1e-4, ONNX 1e-3, any in reduced precision)",
    )
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="evaluate the model and the file on DATASETS.TEST, and print PQ, AP and mIoU",
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides"
    )
    return parser.parse_args(argv)


def load(args: argparse.Namespace) -> Predictor:
    """The predictor that the arguments name, on MODEL.DEVICE; a model folder on the CPU."""
    if args.model is not None:
        return Predictor.from_pretrained(args.model, device="cpu", opts=args.opts)
    return Predictor(load_and_check(args.config_file, args.opts, "predict"))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        names = ("format", "op", "postprocess", "precision", "size", "batch", "max_size", "opset")
        options = ExportOptions(
            **{name: getattr(args, name) for name in names}, tolerance=args.tolerance
        )
        if args.evaluate and args.postprocess != "none":
            raise ValueError(
                "--evaluate takes the post-processing of the evaluators: leave out --postprocess"
            )
        predictor = load(args)
        if args.evaluate:
            check_evaluation(predictor.cfg)
        description = export_model(predictor, args.output, options)
        print(f"wrote {args.output} and {args.output}.json")
        print(description.parity["table"], flush=True)
        if args.evaluate:
            print(f"\n{add_accuracy(predictor, args.output, description)}")
    except (ValueError, FileNotFoundError, WriteError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run_program(main)
