#!/usr/bin/env python3
"""Writes images and labels of COCO-Stuff 10k for `coco_2017_{train,test}_stuff_10k_sem_seg`.

    python datasets/prepare_coco_stuff_10k_sem_seg.py [--root DIR]

Input: coco/coco_stuff_10k/annotations/*.mat with class ids up to 182, with gaps; 0 is unlabelled.
Output: annotations_detectron2/ with PNGs, the 171 classes as 0 to 170 and unlabelled as 255;
images_detectron2/ with one folder of images per split (hard links, which take no space).
"""

import argparse
from pathlib import Path

import numpy as np
from prepare_common import (
    check_size,
    image_size,
    is_complete,
    link_or_copy,
    load_categories,
    parse_args,
    process,
    report,
    require,
    run,
    save_image,
)
from scipy.io import loadmat

SPLITS = ("train", "test")
IGNORE_LABEL = 255
EXPECTED = (
    "coco/coco_stuff_10k with images/, annotations/ and imageLists/, unpacked from "
    "cocostuff-10k-v1.1.zip of https://github.com/nightrome/cocostuff10k."
)


def label_table() -> np.ndarray:
    """Returns the label of each class id, -1 for unused ids."""
    table = np.full(183, -1, np.int16)
    table[0] = IGNORE_LABEL
    for label, category in enumerate(load_categories("coco_stuff_10k")):
        table[category["id"]] = label
    return table


TABLE = label_table()


def read_classes(path: Path) -> np.ndarray:
    """Returns the class ids (H, W) of a .mat file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged, has no label map or unknown ids.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist, the download is incomplete.")
    try:
        classes = loadmat(str(path), variable_names=["S"])["S"]
    # SciPy's reader can raise any error on damaged bytes.
    except Exception as error:
        raise ValueError(f"{path} cannot be read, download it again: {error}") from error
    if classes.ndim != 2 or classes.max() >= len(TABLE) or (TABLE[classes] < 0).any():
        raise ValueError(f"{path} has class ids unknown to COCO-Stuff. Expected: {EXPECTED}")
    return classes


def convert(task: tuple[Path, Path, Path, Path, bool]) -> bool:
    """Writes the labels of one image and links the image.

    Args:
        task: image, .mat file, target of the image, target of the labels, whether to overwrite
            complete targets.

    Returns:
        Whether they were written.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a file is damaged.
    """
    image, source, image_target, label_target, force = task
    size = image_size(image)
    done = image_target.exists() and image_target.stat().st_size == image.stat().st_size
    if not force and done and is_complete(label_target, size):
        return False
    classes = read_classes(source)
    check_size(classes, size, source, image)
    save_image(TABLE[classes].astype(np.uint8), label_target)
    link_or_copy(image, image_target)
    return True


def prepare(args: argparse.Namespace) -> None:
    base = args.root / "coco" / "coco_stuff_10k"
    for split in args.splits:
        images, labels = (base / f"{k}_detectron2" / split for k in ("images", "annotations"))
        names_file = base / "imageLists" / f"{split}.txt"
        require([names_file, base / "images", base / "annotations"], EXPECTED)
        tasks = [
            (
                base / "images" / f"{name}.jpg",
                base / "annotations" / f"{name}.mat",
                images / f"{name}.jpg",
                labels / f"{name}.png",
                args.force,
            )
            for name in names_file.read_text().split()
        ]
        what = f"coco-stuff 10k {split}"
        report(process(convert, tasks, what, args.workers, [images, labels]), labels)


def main(argv: list[str] | None = None) -> None:
    run(prepare, parse_args("Write the labels of COCO-Stuff 10k.", SPLITS, argv))


if __name__ == "__main__":
    main()
