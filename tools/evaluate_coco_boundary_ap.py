#!/usr/bin/env python
"""Boundary AP of instance predictions.

    python tools/evaluate_coco_boundary_ap.py --gt-json-file instances_val2017.json \
        --dt-json-file OUTPUT_DIR/inference/coco_instances_results.json

An instance segmentation evaluation writes the predictions to OUTPUT_DIR/inference. The table is
printed and, with --output-dir, also written to boundary_ap.md and boundary_ap.json.
"""

import argparse
import sys

from mask2former.evaluation.boundary_ap import DILATION_RATIO, evaluate_boundary_ap
from mask2former.evaluation.results import results_table, write_results
from mask2former.utils.files import WriteError, require_writable
from mask2former.utils.interrupts import run_program


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Boundary AP of instance predictions.")
    parser.add_argument(
        "--gt-json-file", required=True, metavar="FILE", help="COCO instance annotations"
    )
    parser.add_argument(
        "--dt-json-file", required=True, metavar="FILE", help="predictions, COCO result format"
    )
    parser.add_argument(
        "--iou-type",
        default="boundary",
        choices=["boundary", "segm"],
        help="segm: plain mask AP (default: boundary)",
    )
    parser.add_argument(
        "--dilation-ratio",
        type=float,
        default=DILATION_RATIO,
        help="boundary width as a fraction of the image diagonal (default: %(default)s)",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="folder to also write the table to")
    args = parser.parse_args(argv)
    if not 0 < args.dilation_ratio < 1:
        parser.error(f"--dilation-ratio must be between 0 and 1, got {args.dilation_ratio}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if args.output_dir:
            require_writable(args.output_dir)
        metrics = evaluate_boundary_ap(
            args.gt_json_file, args.dt_json_file, args.dilation_ratio, args.iou_type
        )
    except (ValueError, FileNotFoundError, WriteError) as error:
        sys.exit(f"error: {error}")
    results = {args.gt_json_file: {args.iou_type: metrics}}
    print(results_table(results))
    if args.output_dir:
        write_results(args.output_dir, results, "boundary_ap")


if __name__ == "__main__":
    run_program(main)
