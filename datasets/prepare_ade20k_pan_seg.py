#!/usr/bin/env python3
"""Writes ADE20K's panoptic annotations (150 classes) as `ade20k_panoptic_{train,val}` reads them.

    python datasets/prepare_ade20k_pan_seg.py [--root DIR]

Stuff comes from ADEChallengeData2016/annotations/, the 100 things from annotations_instance/ and
are pasted over the stuff. ADEChallengeData2016/ade20k_panoptic_{train,val}/ then has COCO panoptic
PNGs, ade20k_panoptic_{train,val}.json their segments. Class ids are 0 to 149.

The validation truth is as in the original release, so that PQ can be compared: `area` and `bbox` of
stuff are those before things are pasted, stuff that things hide altogether stays in the JSON, and
"road, route" and "skyscraper", which have one colour in the class table, have one segment id.
Training needs segments that can be told apart: there hidden stuff is left out, and of two stuff
classes with one colour the second gets another. Colours of things are drawn at random, the same in
each run.
"""

import argparse
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from prepare_common import (
    bounding_box,
    check_size,
    image_size,
    is_complete,
    is_finished,
    list_files,
    load_categories,
    parse_args,
    process,
    read_array,
    require,
    run,
    save_image,
    save_json,
)

SPLITS = {"train": "training", "val": "validation"}  # name in the output → in the download
UNLABELLED = 255
MAX_COLOR_DISTANCE = 30
EXPECTED = (
    "the folder ADEChallengeData2016 unpacked from "
    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip, and in it "
    "annotations_instance/ unpacked from "
    "http://sceneparsing.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar."
)

CATEGORIES = load_categories("ade20k_150")
# Class in the instance PNGs, from 1 → class of the 150, from 0.
THING_IDS = {
    row["instance_id"]: row["scene_parse_150_id"] - 1
    for row in load_categories("ade20k_instance_to_150")
}


def image_entry(image: Path) -> dict:
    """Returns an image's entry in the JSON. Its id is the file name without extension."""
    width, height = image_size(image)
    return {"id": image.stem, "file_name": image.name, "width": width, "height": height}


def read_things(path: Path, size: tuple[int, int], image: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the objects of an instance PNG in the order of their numbers.

    Args:
        path: the PNG.
        size: (width, height) of its image.
        image: for errors.

    Yields:
        Class id of the 150, from 0, and mask (H, W) bool.

    Raises:
        FileNotFoundError: there is no PNG.
        ValueError: it is damaged or does not fit the image.
    """
    pixels = read_array(path)
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise ValueError(f"{path} is no instance annotation: expected RGB of 8 bits. {EXPECTED}")
    check_size(pixels, size, path, image)
    classes, numbers = pixels[..., 0], pixels[..., 1]
    for number in np.unique(numbers[numbers > 0]):
        mask = numbers == number
        found = np.unique(classes[mask])
        if len(found) != 1 or int(found[0]) not in THING_IDS:
            raise ValueError(
                f"{path}: object {number} has the classes {found.tolist()}; expected one class "
                f"from 1 to {len(THING_IDS)}. Download the annotation again: {EXPECTED}"
            )
        yield THING_IDS[int(found[0])], mask


def read_stuff(path: Path, size: tuple[int, int], image: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the stuff of a semantic PNG, by class; arguments and results as of `read_things`."""
    labels = read_array(path)
    if labels.dtype != np.uint8 or labels.ndim != 2 or labels.max() > len(CATEGORIES):
        raise ValueError(
            f"{path} is no label map of the scene parsing benchmark: expected one channel of 8 "
            f"bits with values from 0 to {len(CATEGORIES)}, from {EXPECTED}"
        )
    check_size(labels, size, path, image)
    classes = labels - np.uint8(1)
    for class_id in np.unique(classes):
        if class_id != UNLABELLED and not CATEGORIES[class_id]["isthing"]:
            yield int(class_id), classes == class_id


class ColorGenerator:
    """Colours of the segments of one image; a segment's id is its colour.

    Stuff has the colour of its class, as has the first thing of a class if no other segment has
    it; further things have colours near it.
    """

    def __init__(self, name: str, distinct_stuff: bool) -> None:
        """
        Args:
            name: of the image; fixes the random colours.
            distinct_stuff: give a stuff class another colour if one before it has its colour.
        """
        self._rng = np.random.default_rng(zlib.crc32(name.encode()))
        self._distinct_stuff = distinct_stuff
        self._stuff = {tuple(c["color"]) for c in CATEGORIES if not c["isthing"]}
        # Black would be the id 0, which is no segment.
        self._taken = {(0, 0, 0)}

    def __call__(self, category: dict) -> tuple[int, int, int]:
        """Returns the colour (RGB) of the next segment."""
        color = base = tuple(category["color"])
        if not category["isthing"]:
            if not self._distinct_stuff:
                return base
            forbidden = self._taken
        else:
            forbidden = self._taken | self._stuff
        while color in forbidden:
            low, high = -MAX_COLOR_DISTANCE, MAX_COLOR_DISTANCE
            shift = self._rng.integers(low, high, size=3, endpoint=True)
            color = tuple(int(value) for value in np.clip(np.add(base, shift), 0, 255))
            # Also what is yet to come has a right to its own colour.
            forbidden = self._taken | self._stuff
        self._taken.add(color)
        return color


def annotate(task: tuple[Path, Path, Path, Path, bool]) -> tuple[dict, dict]:
    """Writes the panoptic PNG of one image.

    Args:
        task: image, semantic PNG, instance PNG, target, whether segments must be distinct (see
            above).

    Returns:
        The image's entry in the JSON and its annotation.

    Raises:
        FileNotFoundError: a PNG does not exist.
        ValueError: a PNG is damaged or does not fit the image.
    """
    image, semantic, instance, target, distinct = task
    entry = image_entry(image)
    size = entry["width"], entry["height"]
    next_color = ColorGenerator(image.stem, distinct)
    owners = np.zeros((entry["height"], entry["width"]), np.int32)  # 0, then segments from 1
    colors, segments = [(0, 0, 0)], []
    # Both annotate some pixels; there things count.
    for reader, source in ((read_stuff, semantic), (read_things, instance)):
        for category_id, mask in reader(source, size, image):
            color = next_color(CATEGORIES[category_id])
            owners[mask] = len(colors)
            colors.append(color)
            segments.append(
                {
                    "id": int(np.dot(color, [1, 256, 65536])),
                    "category_id": category_id,
                    "area": int(mask.sum()),
                    "bbox": bounding_box(mask),
                    "iscrowd": 0,
                }
            )
    if distinct:
        visible = np.bincount(owners.ravel(), minlength=len(colors))[1:]
        segments = [segment for segment, area in zip(segments, visible, strict=True) if area]
    save_image(np.array(colors, np.uint8)[owners], target)
    return entry, {"image_id": image.stem, "file_name": target.name, "segments_info": segments}


def prepare(args: argparse.Namespace) -> None:
    base = args.root / "ADEChallengeData2016"
    for split in args.splits:
        images = list_files(base / "images" / SPLITS[split], "*.jpg", EXPECTED)
        semantic = base / "annotations" / SPLITS[split]
        instance = base / "annotations_instance" / SPLITS[split]
        require([semantic, instance], EXPECTED)
        target = base / f"ade20k_panoptic_{split}"
        json_file = base / f"ade20k_panoptic_{split}.json"
        targets = [target / f"{image.stem}.png" for image in images]
        pairs = zip(images, targets, strict=True)
        if (
            not args.force
            and is_finished(json_file, images)
            and all(is_complete(png, image_size(image)) for image, png in pairs)
        ):
            print(f"{json_file} is complete: nothing to do")
            continue
        # The JSON of other PNGs must not outlive them.
        json_file.unlink(missing_ok=True)
        tasks = [
            (image, semantic / png.name, instance / png.name, png, split == "train")
            for image, png in zip(images, targets, strict=True)
        ]
        results = process(annotate, tasks, f"ade20k panoptic {split}", args.workers, [target])
        content = {
            "images": [entry for entry, _ in results],
            "annotations": [annotation for _, annotation in results],
            "categories": CATEGORIES,
        }
        save_json(content, json_file)
        num_segments = sum(len(a["segments_info"]) for a in content["annotations"])
        print(f"{json_file}: {len(images)} images, {num_segments} segments")


def main(argv: list[str] | None = None) -> None:
    run(prepare, parse_args("Write the panoptic annotations of ADE20K.", tuple(SPLITS), argv))


if __name__ == "__main__":
    main()
