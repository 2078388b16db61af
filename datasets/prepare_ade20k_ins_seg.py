#!/usr/bin/env python3
"""Writes the instance annotations of ADE20K (100 things) for `ade20k_instance_{train,val}`.

    python datasets/prepare_ade20k_ins_seg.py [--root DIR]

Input: PNGs in ADEChallengeData2016/annotations_instance/ with the class (1 to 100) in the red
channel and the number of the object in the green channel.
Output: ADEChallengeData2016/ade20k_instance_{train,val}.json in COCO format, with RLE masks and the
ids 0 to 149 of the 150 classes (bed is 7).
"""

import argparse
from pathlib import Path

import numpy as np
from prepare_ade20k_pan_seg import EXPECTED, SPLITS, image_entry, read_things
from prepare_common import (
    bounding_box,
    is_finished,
    list_files,
    load_categories,
    parse_args,
    process,
    require,
    run,
    save_json,
)
from pycocotools import mask as mask_util


def annotate(task: tuple[Path, Path]) -> tuple[dict, list[dict]]:
    """Returns the JSON entry of an image and its annotations, still without ids.

    Args:
        task: image, instance PNG.

    Raises:
        FileNotFoundError: the PNG does not exist.
        ValueError: it is damaged or does not match the image.
    """
    image, source = task
    entry = image_entry(image)
    annotations = []
    for category_id, mask in read_things(source, (entry["width"], entry["height"]), image):
        rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
        annotations.append(
            {
                "image_id": entry["id"],
                "iscrowd": 0,
                "category_id": category_id,
                "bbox": bounding_box(mask),
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                "area": int(mask.sum()),
            }
        )
    return entry, annotations


def prepare(args: argparse.Namespace) -> None:
    base = args.root / "ADEChallengeData2016"
    for split in args.splits:
        images = list_files(base / "images" / SPLITS[split], "*.jpg", EXPECTED)
        sources = base / "annotations_instance" / SPLITS[split]
        require([sources], EXPECTED)
        json_file = base / f"ade20k_instance_{split}.json"
        if not args.force and is_finished(json_file, images):
            print(f"{json_file} is complete: nothing to do")
            continue
        tasks = [(image, sources / f"{image.stem}.png") for image in images]
        results = process(annotate, tasks, f"ade20k instance {split}", args.workers)
        annotations = [annotation for _, per_image in results for annotation in per_image]
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
        content = {
            "images": [entry for entry, _ in results],
            "categories": load_categories("ade20k_instance_100"),
            "annotations": annotations,
        }
        save_json(content, json_file)
        print(f"{json_file}: {len(images)} images, {len(annotations)} objects")


def main(argv: list[str] | None = None) -> None:
    run(prepare, parse_args("Write the instance annotations of ADE20K.", tuple(SPLITS), argv))


if __name__ == "__main__":
    main()
