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
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import cv2
import torch
from tqdm import tqdm

from mask2former.config import load_config
from mask2former.data.check.images import ItemChecker, ItemReport
from mask2former.data.check.index import Index, build_index, find_unlisted
from mask2former.data.check.report import (
    choose_examples,
    draw_examples,
    summarise,
    write_reports,
)
from mask2former.data.class_counts import check_class_counts
from mask2former.data.formats.findings import Finding
from mask2former.data.loader import check_dataset_names
from mask2former.utils.files import WriteError, require_writable
from mask2former.utils.interrupts import run_program
from mask2former.utils.log_file import kept_warnings

# Findings printed per data set; the report has all.
_NUM_PRINTED = 10

# Examples on the contact sheet.
_NUM_EXAMPLES = 12


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
    args = parser.parse_args(argv)
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


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of single-threaded processes: a fork would deadlock on its parent's threads."""
    return ProcessPoolExecutor(workers, initializer=_use_one_thread)


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def check_items(index: Index, workers: int) -> list[ItemReport]:
    """Check every image and annotation in parallel; return one report per item, in order."""
    checker = ItemChecker(index)
    items = index.items

    def results() -> Iterator[ItemReport]:
        if workers == 1 or len(items) < 2:
            yield from map(checker, items)
            return
        with worker_pool(min(workers, len(items))) as pool:
            chunk = max(1, min(32, len(items) // (4 * workers)))
            yield from pool.map(checker, items, chunksize=chunk)

    return list(tqdm(results(), total=len(items), desc=index.name, unit="image"))


def print_findings(title: str, findings: Sequence[dict[str, Any]]) -> None:
    for finding in findings[:_NUM_PRINTED]:
        item_id = "" if finding["id"] is None else f", {finding['id']}"
        print(f"  {title}: {finding['file']}{item_id}: {finding['why']}")
    if len(findings) > _NUM_PRINTED:
        print(f"  ... and {len(findings) - _NUM_PRINTED} more {title}s")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        names, mismatch, tested = resolve_names(args)
        require_writable(args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        has_problems = check_all(args, names, mismatch, tested)
    except WriteError as error:
        sys.exit(f"error: {error}")
    sys.exit(has_problems)


def check_all(
    args: argparse.Namespace, names: list[str], mismatch: str | None, tested: set[str]
) -> bool:
    """Check data sets, print findings and write the reports. Returns whether there are problems.

    Args:
        args: the command's arguments.
        names, mismatch, tested: of `resolve_names`.

    Raises:
        WriteError: a report cannot be written.
    """
    indices = [build_index(name, for_training=name not in tested) for name in names]
    if mismatch:
        indices[0].problem(args.config_file, None, mismatch)
    unlisted = find_unlisted(indices)
    summaries = {}
    for index in indices:
        in_folders: list[Finding] = [
            f for f in unlisted if os.path.dirname(f.file) in map(os.path.normpath, index.folders)
        ]
        index.warnings.extend(in_folders)
        reports = check_items(index, args.workers)
        summary = summarise(index, reports)
        summaries[index.name] = summary
        # Written after each data set, so that an interruption loses little.
        write_reports(args.output, summaries)
        examples = choose_examples(index, reports, _NUM_EXAMPLES)
        if examples:
            file_name = f"contact_sheet_{re.sub(r'[^-.0-9A-Za-z]', '_', index.name)}.png"
            draw_examples(index, examples, os.path.join(args.output, file_name))
        problems, warnings = summary["problems"], summary["warnings"]
        print(
            f"{index.name}: {summary['num_images']} images, {len(problems)} problems, "
            f"{len(warnings)} warnings, {len(summary['classes_never_seen'])} of "
            f"{len(index.classes)} classes never seen"
        )
        print_findings("problem", problems)
        print_findings("warning", warnings)
    print(f"report: {os.path.join(args.output, 'report.md')}")
    return any(summary["problems"] for summary in summaries.values())


if __name__ == "__main__":
    run_program(main)
