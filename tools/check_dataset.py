#!/usr/bin/env python
"""Read whole data sets and report every broken image and annotation.

    python tools/check_dataset.py coco_2017_train coco_2017_val --output check
    python tools/check_dataset.py --config-file my_data.yaml [--opts KEY VALUE ...]

With a config the data sets of its DATASETS.CUSTOM are known too, and without names those of its
DATASETS.TRAIN and DATASETS.TEST are read. --output receives report.md and report.json (each problem
with its file, id and reason; classes and sizes) and, for each data set, contact_sheet_NAME.png. The
exit status is 1 if there is a problem. Warnings are about what may be intended.
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
from mask2former.data.check.index import Finding, Index, build_index, find_unlisted
from mask2former.data.check.report import (
    choose_examples,
    draw_examples,
    summarise,
    write_reports,
)
from mask2former.data.class_counts import check_class_counts
from mask2former.data.loader import check_dataset_names

# Findings printed of each data set; the report has all.
_NUM_PRINTED = 10

# Examples on the contact sheet.
_NUM_EXAMPLES = 12


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Read whole data sets and report every broken image and annotation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="registered data sets")
    parser.add_argument("--config-file", metavar="FILE", help="config that names your own data")
    parser.add_argument("--output", default="dataset_check", metavar="DIR", help="for the report")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that read"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, not {args.workers}")
    if args.opts and not args.config_file:
        parser.error("--opts overrides a config: give --config-file too")
    if not args.names and not args.config_file:
        parser.error("give the NAME of a data set, or --config-file")
    return args


def resolve_names(args: argparse.Namespace) -> tuple[list[str], str | None]:
    """Registers the data sets of the config.

    Returns:
        The data sets to check, each once, and how the classes of those in the config differ from
        each other or from the model's; None: they agree.

    Raises:
        FileNotFoundError: the config, or a file of own data that registration needs, is missing.
        ValueError: the config is wrong, a data set is not registered, or none is named.
    """
    names, mismatch = args.names, None
    if args.config_file:
        cfg = load_config(args.config_file, args.opts)
        names = names or [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
        try:
            check_class_counts(cfg)
        except ValueError as error:
            mismatch = str(error)
    check_dataset_names(names)
    if not names:
        raise ValueError(
            f"{args.config_file} has no data set in DATASETS.TRAIN and DATASETS.TEST: give a NAME."
        )
    return list(dict.fromkeys(names)), mismatch


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that use one thread each: a forked one waits forever for threads of its parent."""
    return ProcessPoolExecutor(workers, initializer=_use_one_thread)


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def check_items(index: Index, workers: int) -> list[ItemReport]:
    """Reads every image and annotation, in parallel; returns a report for each, in their order."""
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
        named = "" if finding["id"] is None else f", {finding['id']}"
        print(f"  {title}: {finding['file']}{named}: {finding['why']}")
    if len(findings) > _NUM_PRINTED:
        print(f"  ... and {len(findings) - _NUM_PRINTED} more {title}s")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        names, mismatch = resolve_names(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    indices = [build_index(name) for name in names]
    if mismatch:
        indices[0].problem(args.config_file, None, mismatch)
    unlisted = find_unlisted(indices)
    summaries = {}
    for index in indices:
        of_folders: list[Finding] = [
            f for f in unlisted if os.path.dirname(f.file) in map(os.path.normpath, index.folders)
        ]
        index.warnings += of_folders
        reports = check_items(index, args.workers)
        summary = summarise(index, reports)
        summaries[index.name] = summary
        # After each data set, so that an interruption loses little.
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
    sys.exit(any(summary["problems"] for summary in summaries.values()))


if __name__ == "__main__":
    main()
