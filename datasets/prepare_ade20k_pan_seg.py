#!/usr/bin/env python3
"""Writes the panoptic annotations of ADE20K (150 classes) for `ade20k_panoptic_{train,val}`.

    python datasets/prepare_ade20k_pan_seg.py [--root DIR]

Input: stuff from ADEChallengeData2016/annotations/; the 100 things from annotations_instance/,
which are pasted over the stuff.
Output: COCO panoptic PNGs in ADEChallengeData2016/ade20k_panoptic_{train,val}/ and their segments
in ade20k_panoptic_{train,val}.json. Class ids are 0 to 149.

Validation annotations equal those of the original release, so that PQ is comparable: `area` and
`bbox` of stuff are computed before things are pasted, hidden stuff stays in the JSON, and
"road, route" and "skyscraper", which share a colour in the class table, share a segment id.
Training needs distinct segments, so hidden stuff is dropped, and the second of two stuff classes of
the same colour gets another one. Random colours of things are the same in every run.
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
# Class in the instance PNGs, from 1 → index among the 150 classes, from 0.
THING_IDS = {
    row["instance_id"]: row["scene_parse_150_id"] - 1
    for row in load_categories("ade20k_instance_to_150")
}


def image_entry(image: Path) -> dict:
    """Returns the JSON entry of an image; its id is the file name without extension."""
    width, height = image_size(image)
    return {"id": image.stem, "file_name": image.name, "width": width, "height": height}


def read_things(path: Path, size: tuple[int, int], image: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the objects of an instance PNG in the order of their numbers.

    Args:
        path: the PNG.
        size: (width, height) of its image.
        image: path of the image, for errors.

    Yields:
        Index among the 150 classes, from 0, and mask (H, W) bool.

    Raises:
        FileNotFoundError: the PNG does not exist.
        ValueError: it is damaged or does not match the image.
    """
    pixels = read_array(path)
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise ValueError(
            f"{path} is not an instance annotation: expected RGB of 8 bits, from {EXPECTED}"
        )
    check_size(pixels, size, path, image)
    classes, numbers = pixels[..., 0], pixels[..., 1]
    for number in np.unique(numbers[numbers > 0]):
        mask = numbers == number
        values = np.unique(classes[mask]).tolist()
        if len(values) != 1 or values[0] not in THING_IDS:
            raise ValueError(
                f"{path}: object {number} has the classes {values}; expected one class from 1 to "
                f"{len(THING_IDS)}. Download the annotation again: {EXPECTED}"
            )
        yield THING_IDS[values[0]], mask


def read_stuff(path: Path, size: tuple[int, int], image: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the stuff of a semantic PNG in the order of the classes; see `read_things`."""
    labels = read_array(path)
    if labels.dtype != np.uint8 or labels.ndim != 2 or labels.max() > len(CATEGORIES):
        raise ValueError(
            f"{path} is not a label map of the scene parsing benchmark: expected one channel of 8 "
            f"bits with values from 0 to {len(CATEGORIES)}, from {EXPECTED}"
        )
    check_size(labels, size, path, image)
    classes = labels - np.uint8(1)
    for class_id in np.unique(classes):
        if class_id != UNLABELLED and not CATEGORIES[class_id]["isthing"]:
            yield int(class_id), classes == class_id


class ColorGenerator:
    """Colours of the segments of one image; the colour encodes the segment id.

    Stuff and the first thing of a class get the colour of the class, unless another segment has it;
    other things get a colour near it.
    """

    def __init__(self, name: str, distinct_stuff: bool) -> None:
        """
        Args:
            name: of the image, seeds the random colours.
            distinct_stuff: whether a stuff class gets another colour if an earlier one has its
                colour.
        """
        self._rng = np.random.default_rng(zlib.crc32(name.encode()))
        self._distinct_stuff = distinct_stuff
        self._stuff = {tuple(c["color"]) for c in CATEGORIES if not c["isthing"]}
        # Black is the id 0, which means no segment.
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
            # Do not take the colour of a stuff class that may follow.
            forbidden = self._taken | self._stuff
        self._taken.add(color)
        return color


def annotate(task: tuple[Path, Path, Path, Path, bool]) -> tuple[dict, dict]:
    """Writes the panoptic PNG of one image.

    Args:
        task: image, semantic PNG, instance PNG, target, whether segments must be distinct (see the
            top of the module).

    Returns:
        The JSON entry of the image and its annotation.

    Raises:
        FileNotFoundError: a PNG does not exist.
        ValueError: a PNG is damaged or does not match the image.
    """
    image, semantic, instance, target, distinct = task
    entry = image_entry(image)
    size = entry["width"], entry["height"]
    next_color = ColorGenerator(image.stem, distinct)
    # Index of the segment of each pixel, from 1; 0 is unlabelled.
    owners = np.zeros((entry["height"], entry["width"]), np.int32)
    colors, segments = [(0, 0, 0)], []
    # Things come second, because they overwrite stuff.
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
        # Delete the old JSON before its PNGs are overwritten.
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
