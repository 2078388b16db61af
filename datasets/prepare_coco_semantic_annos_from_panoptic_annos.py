#!/usr/bin/env python3
"""Writes semantic labels of all 133 COCO classes from the panoptic annotations.

    python datasets/prepare_coco_semantic_annos_from_panoptic_annos.py [--root DIR]

coco/panoptic_semseg_{train,val}2017/ then hold one PNG an image: 0 to 79 are the things, 80 to 132
the stuff, in the order of their COCO ids; 255 is unlabelled. Crowds count as their class.
"""

import argparse
from pathlib import Path

import numpy as np
from prepare_common import (
    image_size,
    is_complete,
    load_json,
    parse_args,
    process,
    read_array,
    report,
    require,
    run,
    save_image,
    segment_ids,
)

SPLITS = ("val2017", "train2017")
IGNORE_LABEL = 255
EXPECTED = (
    "the panoptic annotations of https://cocodataset.org/#download "
    "(panoptic_annotations_trainval2017.zip, and the two archives of PNGs inside it, unpacked)."
)


def contiguous_ids(categories: list[dict]) -> dict[int, int]:
    """Returns the map from COCO's ids to labels: things first, each group by id.

    Raises:
        ValueError: these are not COCO's 80 things and 53 other classes.
    """
    ordered = sorted(categories, key=lambda c: (not c["isthing"], c["id"]))
    num_things = sum(bool(c["isthing"]) for c in categories)
    if (len(ordered), num_things) != (133, 80):
        raise ValueError(
            f"expected COCO's 133 classes, 80 of them things, but found {len(ordered)} and "
            f"{num_things}"
        )
    return {category["id"]: label for label, category in enumerate(ordered)}


def convert(task: tuple[Path, Path, dict[int, int], bool]) -> bool:
    """Writes the labels of one image.

    Args:
        task: panoptic PNG, target, label of each segment id, whether to replace a complete target.

    Returns:
        Whether it was written.

    Raises:
        FileNotFoundError: there is no panoptic PNG.
        ValueError: it is damaged or has a segment that the JSON lacks.
    """
    source, target, labels, force = task
    if not force and is_complete(target, image_size(source)):
        return False
    panoptic = read_array(source)
    if panoptic.dtype != np.uint8 or panoptic.ndim != 3 or panoptic.shape[2] != 3:
        raise ValueError(f"{source} is no panoptic PNG: expected three channels of 8 bits.")
    ids, inverse = np.unique(segment_ids(panoptic), return_inverse=True)
    unknown = [int(i) for i in ids if i != 0 and int(i) not in labels]
    if unknown:
        raise ValueError(
            f"{source} has the segment id {unknown[0]} ({len(unknown)} such), which the panoptic "
            f"JSON does not list for it. Use the PNGs and the JSON of one download: {EXPECTED}"
        )
    lookup = np.array([labels.get(int(i), IGNORE_LABEL) for i in ids], np.uint8)
    save_image(lookup[inverse].reshape(panoptic.shape[:2]), target)
    return True


def tasks_of(json_file: Path, source: Path, target: Path, force: bool) -> list[tuple]:
    """Returns what `convert` needs, an element for each annotation of the panoptic JSON.

    Raises:
        ValueError: the JSON is damaged or not of COCO.
    """
    content = load_json(json_file)
    try:
        label_of = contiguous_ids(content["categories"])
        return [
            (
                source / annotation["file_name"],
                target / annotation["file_name"],
                {s["id"]: label_of[s["category_id"]] for s in annotation["segments_info"]},
                force,
            )
            for annotation in content["annotations"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{json_file} is no COCO panoptic JSON ({type(error).__name__}: {error}). "
            f"Expected: {EXPECTED}"
        ) from error


def prepare(args: argparse.Namespace) -> None:
    base = args.root / "coco"
    for split in args.splits:
        json_file = base / "annotations" / f"panoptic_{split}.json"
        source, target = base / f"panoptic_{split}", base / f"panoptic_semseg_{split}"
        require([json_file, source], EXPECTED)
        tasks = tasks_of(json_file, source, target, args.force)
        report(process(convert, tasks, f"coco {split}", args.workers, [target]), target)


def main(argv: list[str] | None = None) -> None:
    description = "Write semantic labels from COCO's panoptic annotations."
    run(prepare, parse_args(description, SPLITS, argv))


if __name__ == "__main__":
    main()
