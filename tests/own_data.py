"""Writes small data sets in the formats of DATASETS.CUSTOM, with hand-computed annotations.

Images are 12 x 8 pixels. Every image has a cup (id 3) of 4 x 8 pixels in its left third and a plate
(id 7) of 4 x 4 pixels at the top of the middle third; in panoptic data the rest is table (id 9).
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
from dataset_trees import HEIGHT, WIDTH, photograph, save, write_json

CATEGORIES = [
    {"id": 3, "name": "cup", "isthing": 1},
    {"id": 9, "name": "table", "isthing": 0},
    {"id": 7, "name": "plate", "isthing": 1},
]
THINGS = [category for category in CATEGORIES if category["isthing"]]
CLASSES = ["cup", "plate", "table"]
STEMS = ("a", "b", "c")


def images(root: Path) -> list[dict[str, Any]]:
    """Writes root/images/{a,b,c}.jpg; returns their entries in a COCO JSON."""
    for stem in STEMS:
        photograph(root / "images" / f"{stem}.jpg")
    return [
        {"id": i, "file_name": f"{stem}.jpg", "width": WIDTH, "height": HEIGHT}
        for i, stem in enumerate(STEMS, start=1)
    ]


def instances(root: Path, name: str = "instances.json") -> dict[str, Any]:
    """Writes images and a COCO instance JSON; returns its content. Annotation ids are 10 to 15."""
    entries = images(root)
    annotations = []
    for image in entries:
        for category_id, (x, y, width, height) in ((3, (0, 0, 4, 8)), (7, (4, 0, 4, 4))):
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotation = {
                "id": 10 + len(annotations),
                "image_id": image["id"],
                "category_id": category_id,
                "segmentation": [corners],
                "bbox": [x, y, width, height],
                "area": width * height,
                "iscrowd": 0,
            }
            annotations.append(annotation)
    content = {"images": entries, "annotations": annotations, "categories": THINGS}
    write_json(root / name, content)
    return copy.deepcopy(content)


def labels() -> np.ndarray:
    """Label map of CLASSES."""
    array = np.full((HEIGHT, WIDTH), 2, np.uint8)
    array[:, :4], array[:4, 4:8] = 0, 1
    return array


def panoptic(root: Path, name: str = "panoptic.json") -> dict[str, Any]:
    """Writes images, PNGs and a COCO panoptic JSON; returns its content.

    Segments are 1 (cup, 32 pixels), 2 (plate, 16) and 300 (table, 48).
    """
    entries = images(root)
    ids = np.array([1, 2, 300])[labels()]
    colours = np.stack([ids % 256, ids // 256, ids * 0], -1).astype(np.uint8)
    segments = [
        {"id": 1, "category_id": 3, "area": 32, "bbox": [0, 0, 4, 8], "iscrowd": 0},
        {"id": 2, "category_id": 7, "area": 16, "bbox": [4, 0, 4, 4], "iscrowd": 0},
        {"id": 300, "category_id": 9, "area": 48, "bbox": [4, 0, 8, 8], "iscrowd": 0},
    ]
    annotations = []
    for image, stem in zip(entries, STEMS, strict=True):
        save(root / "panoptic" / f"{stem}.png", colours)
        annotations.append(
            {"image_id": image["id"], "file_name": f"{stem}.png", "segments_info": segments}
        )
    content = {"images": entries, "annotations": annotations, "categories": CATEGORIES}
    write_json(root / name, content)
    return copy.deepcopy(content)


def semantic(root: Path) -> None:
    """Writes images and label maps."""
    images(root)
    for stem in STEMS:
        save(root / "labels" / f"{stem}.png", labels())


def entry(kind: str, root: Path, name: str = "own_train", **others: Any) -> dict[str, Any]:
    """An entry of DATASETS.CUSTOM for data written by the functions above."""
    keys = {
        "instance": {"INSTANCES_JSON": str(root / "instances.json")},
        "panoptic": {
            "PANOPTIC_ROOT": str(root / "panoptic"),
            "PANOPTIC_JSON": str(root / "panoptic.json"),
        },
        "semantic": {"LABEL_ROOT": str(root / "labels"), "CLASSES": CLASSES},
    }[kind]
    return {"NAME": name, "TYPE": kind, "IMAGE_ROOT": str(root / "images"), **keys, **others}


def many_images(root: Path, number: int = 40) -> list[str]:
    """Adds root/images/00.jpg, 01.jpg, ... to data of one of the functions above; their names."""
    names = [f"{i:02}.jpg" for i in range(number)]
    for name in names:
        photograph(root / "images" / name)
    return names


def yolo(root: Path, train: int = 2, val: int = 1) -> None:
    """Writes YOLO polygons: classes cat, dog and bird; each image has a cat of 6 x 4 pixels at the
    top left, and all but the first of a split a dog of 3 x 4 at the bottom right."""
    cat, dog = "0 0 0 0.5 0 0.5 0.5 0 0.5", "1 0.75 0.5 1 0.5 1 1 0.75 1"
    for split, number in (("train", train), ("val", val)):
        for i in range(number):
            photograph(root / f"images/{split}/{split}{i}.jpg")
            labels = root / f"labels/{split}/{split}{i}.txt"
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text("\n".join([cat, dog][: 1 + (i > 0)]) + "\n")
    (root / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog, 2: bird}\n"
    )
