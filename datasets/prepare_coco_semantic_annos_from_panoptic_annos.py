#!/usr/bin/env python3
"""Writes semantic labels of all 133 COCO classes, made from the panoptic annotations.

    python datasets/prepare_coco_semantic_annos_from_panoptic_annos.py [--root DIR]

Output: coco/panoptic_semseg_{train,val}2017/ with one PNG per image. 0 to 79 are the things, 80 to
132 the stuff, each in the order of the COCO ids; 255 is unlabelled. Crowds get the label of their
class.
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
    """Returns the map from COCO ids to labels: things first, then stuff, each sorted by id.

    Raises:
        ValueError: the categories are not COCO's 80 things and 53 stuff classes.
    """
    ordered = sorted(categories, key=lambda c: (not c["isthing"], c["id"]))
    num_things = sum(bool(c["isthing"]) for c in categories)
    if (len(ordered), num_things) != (133, 80):
        raise ValueError(
            f"expected COCO's 133 classes, 80 of them things, but got {len(ordered)} and "
            f"{num_things}"
        )
    return {category["id"]: label for label, category in enumerate(ordered)}


def convert(task: tuple[Path, Path, dict[int, int], bool]) -> bool:
    """Writes the labels of one image.

    Args:
        task: panoptic PNG, target, label of each segment id, whether to overwrite a complete
            target.

    Returns:
        Whether it was written.

    Raises:
        FileNotFoundError: the panoptic PNG does not exist.
        ValueError: it is damaged or has a segment that the JSON does not list.
    """
    source, target, labels, force = task
    if not force and is_complete(target, image_size(source)):
        return False
    panoptic = read_array(source)
    if panoptic.dtype != np.uint8 or panoptic.ndim != 3 or panoptic.shape[2] != 3:
        raise ValueError(f"{source} is not a panoptic PNG: expected three channels of 8 bits.")
    ids, inverse = np.unique(segment_ids(panoptic), return_inverse=True)
    unknown = [int(i) for i in ids if i != 0 and int(i) not in labels]
    if unknown:
        raise ValueError(
            f"{source} has the segment id {unknown[0]} ({len(unknown)} unknown ids), which the "
            f"panoptic JSON does not list for it. Use PNGs and JSON of the same download: "
            f"{EXPECTED}"
        )
    lookup = np.array([labels.get(int(i), IGNORE_LABEL) for i in ids], np.uint8)
    save_image(lookup[inverse].reshape(panoptic.shape[:2]), target)
    return True


def list_tasks(json_file: Path, source: Path, target: Path, force: bool) -> list[tuple]:
    """Returns the argument of `convert` for each annotation of the panoptic JSON.

    Raises:
        ValueError: the JSON is damaged or not COCO's.
    """
    content = load_json(json_file)
    try:
        labels = contiguous_ids(content["categories"])
        return [
            (
                source / annotation["file_name"],
                target / annotation["file_name"],
                {s["id"]: labels[s["category_id"]] for s in annotation["segments_info"]},
                force,
            )
            for annotation in content["annotations"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{json_file} is not a COCO panoptic JSON ({type(error).__name__}: {error}). "
            f"Expected: {EXPECTED}"
        ) from error


def prepare(args: argparse.Namespace) -> None:
    base = args.root / "coco"
    for split in args.splits:
        json_file = base / "annotations" / f"panoptic_{split}.json"
        source, target = base / f"panoptic_{split}", base / f"panoptic_semseg_{split}"
        require([json_file, source], EXPECTED)
        tasks = list_tasks(json_file, source, target, args.force)
        report(process(convert, tasks, f"coco {split}", args.workers, [target]), target)


def main(argv: list[str] | None = None) -> None:
    description = "Write semantic labels from COCO's panoptic annotations."
    run(prepare, parse_args(description, SPLITS, argv))


if __name__ == "__main__":
    main()
