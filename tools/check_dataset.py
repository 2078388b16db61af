#!/usr/bin/env python
"""Read whole data sets and report every broken image and annotation.

    python tools/check_dataset.py coco_2017_train coco_2017_val --output check
    python tools/check_dataset.py --config-file my_data.yaml [--opts KEY VALUE ...]

A config adds the data sets of its DATASETS.CUSTOM; without names, its DATASETS.TRAIN and
DATASETS.TEST are checked. Writes report.md, report.json (each problem with file, id and reason;
classes and sizes) and a contact_sheet_NAME.png per data set to --output. Exits with status 1 if
there is any problem. Warnings are about things that may be intended.
"""

import argparse
import os
import sys

from mask2former.config import load_config
from mask2former.data.check.run import check_datasets
from mask2former.data.class_counts import check_class_counts
from mask2former.data.formats.findings import Finding
from mask2former.data.loader import check_dataset_names
from mask2former.utils.files import WriteError, require_writable
from mask2former.utils.interrupts import run_program
from mask2former.utils.log_file import kept_warnings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Read whole data sets and report every broken image and annotation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="registered data sets")
    parser.add_argument("--config-file", metavar="FILE", help="config with DATASETS.CUSTOM")
    parser.add_argument("--output", default="dataset_check", metavar="DIR", help="report folder")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="number of processes"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides"
    )
    args = parser.parse_intermixed_args(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if args.opts and not args.config_file:
        parser.error("--opts overrides a config: add --config-file")
    if not args.names and not args.config_file:
        parser.error("give a data set NAME or --config-file")
    return args


def resolve_names(args: argparse.Namespace) -> tuple[list[str], str | None, set[str]]:
    """Register the data sets of the config and choose the ones to check.

    Returns:
        The names without duplicates; a message if the classes of the config's data sets differ
        from each other or from the model's, else None; and the names that are only tested on.

    Raises:
        FileNotFoundError: the config, or a file needed to register its data, is missing.
        ValueError: the config is invalid, a data set is not registered, or no name is given.
    """
    names, mismatch, tested = args.names, None, set()
    if args.config_file:
        with kept_warnings():  # prints what formats have been recognised
            cfg = load_config(args.config_file, args.opts)
        names = names or [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
        tested = {*cfg.DATASETS.TEST} - {*cfg.DATASETS.TRAIN}
        try:
            check_class_counts(cfg)
        except ValueError as error:
            mismatch = str(error)
    check_dataset_names(names)
    if not names:
        raise ValueError(
            f"{args.config_file} has empty DATASETS.TRAIN and DATASETS.TEST: give a NAME."
        )
    return list(dict.fromkeys(names)), mismatch, tested


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        names, mismatch, tested = resolve_names(args)
        require_writable(args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        known = Finding(args.config_file, None, mismatch) if mismatch else None
        has_problems = check_datasets(names, args.output, args.workers, tested, known)
    except WriteError as error:
        sys.exit(f"error: {error}")
    sys.exit(has_problems)


if __name__ == "__main__":
    run_program(main)
