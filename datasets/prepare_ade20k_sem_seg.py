#!/usr/bin/env python3
"""Writes the semantic labels of ADE20K (150 classes) for `ade20k_sem_seg_{train,val}`.

    python datasets/prepare_ade20k_sem_seg.py [--root DIR]

Input: ADEChallengeData2016/annotations/ with "other" as 0 and the classes as 1 to 150.
Output: ADEChallengeData2016/annotations_detectron2/ with the classes as 0 to 149, "other" as 255.
"""

import argparse
from pathlib import Path

import numpy as np
from prepare_common import (
    image_size,
    is_complete,
    list_files,
    parse_args,
    process,
    read_array,
    report,
    run,
    save_image,
)

SPLITS = ("training", "validation")
NUM_CLASSES = 150
EXPECTED = (
    "the folder ADEChallengeData2016 unpacked from "
    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip."
)


def convert(task: tuple[Path, Path, bool]) -> bool:
    """Writes the labels of one image.

    Args:
        task: source, target, whether to overwrite a complete target.

    Returns:
        Whether it was written.

    Raises:
        ValueError: the source is damaged or not a map of these labels.
    """
    source, target, force = task
    if not force and is_complete(target, image_size(source)):
        return False
    labels = read_array(source)
    if labels.dtype != np.uint8 or labels.ndim != 2 or labels.max() > NUM_CLASSES:
        raise ValueError(
            f"{source} is not a label map of the scene parsing benchmark: expected one channel of "
            f"8 bits with values from 0 to {NUM_CLASSES}, from {EXPECTED}"
        )
    # 0 wraps around to 255.
    save_image(labels - np.uint8(1), target)
    return True


def prepare(args: argparse.Namespace) -> None:
    base = args.root / "ADEChallengeData2016"
    for split in args.splits:
        target = base / "annotations_detectron2" / split
        sources = list_files(base / "annotations" / split, "*.png", EXPECTED)
        tasks = [(source, target / source.name, args.force) for source in sources]
        report(process(convert, tasks, f"ade20k {split}", args.workers, [target]), target)


def main(argv: list[str] | None = None) -> None:
    run(prepare, parse_args("Write the semantic labels of ADE20K.", SPLITS, argv))


if __name__ == "__main__":
    main()
