"""Checks whole data sets: reads every image and annotation, prints findings, writes the reports."""

import os
import re
from collections.abc import Collection, Sequence
from typing import Any

from ...utils.parallel import map_tasks
from ..formats.findings import Finding
from .images import ItemChecker
from .index import build_index, find_unlisted
from .report import choose_examples, draw_examples, summarise, write_reports

# Findings printed per data set; the report has all.
_NUM_PRINTED = 10

# Examples on the contact sheet.
_NUM_EXAMPLES = 12


def check_datasets(
    names: Sequence[str],
    output: str,
    workers: int,
    tested: Collection[str] = (),
    known_problem: Finding | None = None,
) -> bool:
    """Check registered data sets, print findings and write the reports.

    Args:
        names: of the data sets.
        output: folder of the reports, created if necessary.
        workers: number of processes.
        tested: names that are only tested on, which need nothing to train on.
        known_problem: what is known to be wrong, to be listed with the first data set.

    Returns:
        Whether there are problems.

    Raises:
        WriteError: a report cannot be written.
    """
    indices = [build_index(name, for_training=name not in tested) for name in names]
    if known_problem:
        indices[0].problems.append(known_problem)
    unlisted = find_unlisted(indices)
    summaries = {}
    for index in indices:
        in_folders: list[Finding] = [
            f for f in unlisted if os.path.dirname(f.file) in map(os.path.normpath, index.folders)
        ]
        index.warnings.extend(in_folders)
        reports = map_tasks(ItemChecker(index), index.items, workers, index.name)
        summary = summarise(index, reports)
        summaries[index.name] = summary
        # Written after each data set, so that an interruption loses little.
        write_reports(output, summaries)
        examples = choose_examples(index, reports, _NUM_EXAMPLES)
        if examples:
            file_name = f"contact_sheet_{re.sub(r'[^-.0-9A-Za-z]', '_', index.name)}.png"
            draw_examples(index, examples, os.path.join(output, file_name))
        problems, warnings = summary["problems"], summary["warnings"]
        print(
            f"{index.name}: {summary['num_images']} images, {len(problems)} problems, "
            f"{len(warnings)} warnings, {len(summary['classes_never_seen'])} of "
            f"{len(index.classes)} classes never seen"
        )
        _print_findings("problem", problems)
        _print_findings("warning", warnings)
    print(f"report: {os.path.join(output, 'report.md')}")
    return any(summary["problems"] for summary in summaries.values())


def _print_findings(title: str, findings: Sequence[dict[str, Any]]) -> None:
    for finding in findings[:_NUM_PRINTED]:
        item_id = "" if finding["id"] is None else f", {finding['id']}"
        print(f"  {title}: {finding['file']}{item_id}: {finding['why']}")
    if len(findings) > _NUM_PRINTED:
        print(f"  ... and {len(findings) - _NUM_PRINTED} more {title}s")
