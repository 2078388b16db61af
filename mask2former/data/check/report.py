"""Reports of a check: totals as JSON and Markdown, and a contact sheet of examples.

H W pixels of an image.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog

from ...utils.files import atomic_write, make_folder
from ...utils.seeding import isolated_rng
from ...utils.visualization import contact_sheet, draw_gt, shrink
from ..formats.findings import NO_LABELLED_PIXEL, Finding
from ..formats.images import read_colours
from ..formats.semantic_folders import hidden_classes
from .images import ItemReport
from .index import Index, Item

# An object is small or medium below the area of a square of this side in pixels, as in COCO.
_SMALL, _MEDIUM = 32, 96

# Longest side of a drawing in pixels.
_DRAWING_SIZE = 400


def summarise(index: Index, reports: Sequence[ItemReport]) -> dict[str, Any]:
    """Sum up the findings in one data set.

    Args:
        index: index of the data set.
        reports: reports of its items.

    Returns:
        JSON-serialisable data, as in report.json.
    """
    problems = index.problems + [finding for report in reports for finding in report.problems]
    warnings = index.warnings + [finding for report in reports for finding in report.warnings]
    images: Counter[int] = Counter()
    pixels: Counter[int] = Counter()
    objects: Counter[int] = Counter()
    for report in reports:
        images.update(set(report.pixels))
        pixels.update(report.pixels)
        objects.update(report.objects)
    areas = np.array([area for report in reports for area in report.areas])
    small, medium = (areas < side**2 for side in (_SMALL, _MEDIUM))
    sizes = [report.size for report in reports if report.size is not None]
    total = sum(pixels.values())
    classes = [
        {
            "id": i,
            "name": name,
            "images": images[i],
            "objects": objects[i],
            "pixels": pixels[i],
            "share": pixels[i] / total if total else 0.0,
        }
        for i, name in enumerate(index.classes)
    ]
    if _is_all_ignored(index, reports):
        why = NO_LABELLED_PIXEL.format(ignore_label=index.ignore_label)
        (problems if index.for_training else warnings).append(Finding(index.name, None, why))
    never_seen = [name for i, name in enumerate(index.classes) if not pixels[i]]
    if never_seen and any(report.num_ignored for report in reports):
        why = hidden_classes(never_seen, index.ignore_label)
        warnings.append(Finding(index.name, None, why))
    return {
        "num_images": len(index.items),
        "num_objects": sum(objects.values()),
        "num_crowds": sum(report.num_crowds for report in reports),
        "num_images_without_annotation": sum(not report.pixels for report in reports),
        "problems": [finding._asdict() for finding in problems],
        "warnings": [finding._asdict() for finding in warnings],
        "classes": classes,
        "classes_never_seen": never_seen,
        "image_sizes": {
            "width": _spread([width for _, width in sizes]),
            "height": _spread([height for height, _ in sizes]),
            "most_frequent": [
                {"width": width, "height": height, "images": count}
                for (height, width), count in Counter(sizes).most_common(5)
            ],
        },
        "object_sizes": {
            "small": int(small.sum()),
            "medium": int((medium & ~small).sum()),
            "large": int((~medium).sum()),
            "pixels": _spread(areas.tolist()),
        },
    }


def _is_all_ignored(index: Index, reports: Sequence[ItemReport]) -> bool:
    """Whether a semantic data set has no pixel of a class."""
    is_semantic = all(
        item.sem_seg_file_name and item.annotations is None and item.pan_seg_file_name is None
        for item in index.items
    )
    # An image with a problem may have had some.
    is_unsure = not reports or any(report.problems or report.pixels for report in reports)
    return is_semantic and not is_unsure


def _spread(values: list[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


# ---- files ----


def write_reports(output: str, summaries: dict[str, dict[str, Any]]) -> None:
    """Write report.json and report.md atomically.

    Args:
        output: folder, created if necessary.
        summaries: data set name → result of `summarise`.

    Raises:
        WriteError: a file cannot be written.
    """
    make_folder(output)
    with atomic_write(os.path.join(output, "report.json")) as file:
        json.dump(summaries, file, indent=1)
        file.write("\n")
    with atomic_write(os.path.join(output, "report.md")) as file:
        file.write("# Data set check\n")
        for name, summary in summaries.items():
            file.write("\n".join(_markdown(name, summary)) + "\n")


def _markdown(name: str, summary: dict[str, Any]) -> list[str]:
    sizes, objects = summary["image_sizes"], summary["object_sizes"]
    lines = [
        f"\n## {name}\n",
        f"{len(summary['problems'])} problems, {len(summary['warnings'])} warnings; "
        f"{summary['num_images']} images, {summary['num_objects']} objects or segments, "
        f"{summary['num_crowds']} crowds, {summary['num_images_without_annotation']} images "
        "without annotation.\n",
    ]
    for key in ("problems", "warnings"):
        if summary[key]:
            lines += [f"### {key.capitalize()}\n", "| file | id | why |", "|---|---|---|"]
            lines += [
                f"| {_cell(f['file'])} | {_cell(f['id'])} | {_cell(f['why'])} |"
                for f in summary[key]
            ]
            lines.append("")
    never = summary["classes_never_seen"]
    lines += ["### Classes\n"]
    if never:
        lines += [f"Never seen ({len(never)}): {', '.join(map(_cell, never))}\n"]
    lines += ["| id | class | images | objects | pixels | share |", "|--:|---|--:|--:|--:|--:|"]
    lines += [
        f"| {c['id']} | {_cell(c['name'])} | {c['images']} | {c['objects']} | {c['pixels']} "
        f"| {c['share']:.2%} |"
        for c in summary["classes"]
    ]
    lines += ["\n### Sizes\n", "| | min | median | max |", "|---|--:|--:|--:|"]
    rows = {
        "image width": sizes["width"],
        "image height": sizes["height"],
        "object pixels": objects["pixels"],
    }
    for title, spread in rows.items():
        values = spread.values() if spread else ("", "", "")
        lines.append(f"| {title} | {' | '.join(map(str, values))} |")
    frequent = ", ".join(
        f"{s['width']} x {s['height']} ({s['images']})" for s in sizes["most_frequent"]
    )
    lines += [
        f"\nMost frequent image sizes: {frequent or 'none'}.",
        f"Objects: {objects['small']} small (below {_SMALL}² pixels), {objects['medium']} medium, "
        f"{objects['large']} large (from {_MEDIUM}² pixels).",
    ]
    return lines


def _cell(value: object) -> str:
    text = "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


# ---- examples ----


def choose_examples(index: Index, reports: Sequence[ItemReport], number: int) -> list[Item]:
    """Choose items without problems that cover as many classes as possible, greedily."""
    good = [i for i, report in enumerate(reports) if not report.problems and report.size]
    seen: Counter[int] = Counter()
    chosen: list[int] = []
    while good and len(chosen) < number:
        # A class counts less each time it was chosen.
        best = max(good, key=lambda i: sum(0.25 ** seen[c] for c in reports[i].pixels))
        good.remove(best)
        chosen.append(best)
        seen.update(set(reports[best].pixels))
    return [index.items[i] for i in chosen]


def draw_examples(index: Index, items: Sequence[Item], path: str, columns: int = 4) -> None:
    """Draw items with their annotations as one PNG.

    Args:
        index: index of the data set.
        items: items of the data set without problems.
        path: file to write.
        columns: number of drawings per row.
    """
    with isolated_rng(0):  # the visualizer picks random colours
        drawings = [_draw(index, item) for item in items]
    blank = np.full((1, 1, 3), 255, np.uint8)
    drawings += [blank] * (-len(drawings) % columns)
    rows = [drawings[i : i + columns] for i in range(0, len(drawings), columns)]
    contact_sheet(rows, path)


def _draw(index: Index, item: Item) -> np.ndarray:
    image = read_colours(item.file_name)
    record: dict[str, Any] = {
        "file_name": item.file_name,
        "height": image.shape[0],
        "width": image.shape[1],
        "sem_seg_file_name": item.sem_seg_file_name,
    }
    task = "semantic"
    if item.annotations is not None:
        task = "instance"
        record["annotations"] = [
            annotation | {"category_id": index.contiguous_ids[annotation["category_id"]]}
            for annotation in item.annotations
        ]
    elif item.pan_seg_file_name is not None:
        task = "panoptic"
        record["pan_seg_file_name"] = item.pan_seg_file_name
        record["segments_info"] = [
            {"id": segment["id"], "category_id": class_id, "isthing": class_id in index.thing_ids}
            for segment in item.segments_info
            for class_id in (index.contiguous_ids[segment["category_id"]],)
        ]
    drawing = draw_gt(
        shrink(image, _DRAWING_SIZE),
        record,
        MetadataCatalog.get(index.name),
        task,
        classes=index.classes,
        ignore_label=index.ignore_label,
    )
    assert drawing is not None
    return drawing
