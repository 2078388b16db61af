#!/usr/bin/env python3
"""Writes images and labels of ADE20K full (847 classes) for `ade20k_full_sem_seg_{train,val}`.

    python datasets/prepare_ade20k_full_sem_seg.py [--root DIR]

Input: ADE20K_2021_17_01/ with one folder per scene, which holds images and `_seg.png` files. Their
red and green channels encode one of about 3,000 object classes.
Output: ADE20K_2021_17_01/annotations_detectron2/ with 16-bit TIFFs, the 847 most frequent classes
as 0 to 846 and 65535 elsewhere; images_detectron2/ with one folder of images per split (hard links,
which take no space).
"""

import argparse
from pathlib import Path

import numpy as np
from prepare_common import (
    check_size,
    image_size,
    is_complete,
    link_or_copy,
    list_files,
    load_categories,
    parse_args,
    process,
    read_array,
    report,
    run,
    save_image,
)

SPLITS = ("training", "validation")
IGNORE_LABEL = 65535
EXPECTED = (
    "the folder ADE20K_2021_17_01 of the full data set, available after registration at "
    "https://ade20k.csail.mit.edu/."
)


def object_classes(segmentation: np.ndarray) -> np.ndarray:
    """Returns the class (H, W) of a `_seg.png` (H, W, 3): 256 * (R // 10) + G; 0 is unlabelled."""
    return segmentation[..., 0].astype(np.int32) // 10 * 256 + segmentation[..., 1]


def label_table() -> np.ndarray:
    """Returns the uint16 label of each class."""
    table = np.full(26 * 256, IGNORE_LABEL, np.uint16)
    for category in load_categories("ade20k_full_847"):
        table[category["id"]] = category["trainId"]
    return table


TABLE = label_table()


def convert(task: tuple[Path, Path, Path, bool]) -> bool:
    """Writes the labels of one image and links the image.

    Args:
        task: image, target of the image, target of the labels, whether to overwrite complete
            targets.

    Returns:
        Whether they were written.

    Raises:
        FileNotFoundError: the image has no `_seg.png`.
        ValueError: a file is damaged.
    """
    image, image_target, label_target, force = task
    size = image_size(image)
    done = image_target.exists() and image_target.stat().st_size == image.stat().st_size
    if not force and done and is_complete(label_target, size):
        return False
    source = image.with_name(f"{image.stem}_seg.png")
    segmentation = read_array(source)
    if segmentation.dtype != np.uint8 or segmentation.ndim != 3:
        raise ValueError(f"{source} is not a segmentation of ADE20K: expected RGB of 8 bits.")
    check_size(segmentation, size, source, image)
    save_image(TABLE[object_classes(segmentation)], label_target)
    link_or_copy(image, image_target)
    return True


def prepare(args: argparse.Namespace) -> None:
    base = args.root / "ADE20K_2021_17_01"
    for split in args.splits:
        images, labels = (base / f"{k}_detectron2" / split for k in ("images", "annotations"))
        sources = list_files(base / "images" / "ADE" / split, "**/*.jpg", EXPECTED)
        tasks = [
            (source, images / source.name, labels / f"{source.stem}.tif", args.force)
            for source in sources
        ]
        what = f"ade20k full {split}"
        report(process(convert, tasks, what, args.workers, [images, labels]), labels)


def main(argv: list[str] | None = None) -> None:
    run(prepare, parse_args("Write the labels of ADE20K full.", SPLITS, argv))


if __name__ == "__main__":
    main()
