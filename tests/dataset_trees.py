"""Tiny data sets in the exact layout of the official downloads, for tests.

Each function writes below `root`, the folder that DETECTRON2_DATASETS names. Images are 12 x 8
pixels (Cityscapes: 32 x 16), and all images of a data set have the same annotation, so that tests
can use hand-computed numbers.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

WIDTH, HEIGHT = 12, 8


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def photograph(path: Path, width: int = WIDTH, height: int = HEIGHT) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    save(path, pixels)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# ---- ADE20K ----

# Image stems by folder of the download.
ADE20K_STEMS = {
    "training": ("ADE_train_00000001", "ADE_train_00000002"),
    "validation": ("ADE_val_00000001",),
}


def ade20k_labels() -> np.ndarray:
    """Labels of the download: wall 1, sky 3, road 7, skyscraper 49, other 0.

    columns  0 1 2 3   4 ... 7   8 ... 11
    rows 0-6 wall      road      skyscraper     (sky at rows 4-5, columns 0-1)
    row 7    other
    """
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:7, :4], labels[:7, 4:8], labels[:7, 8:] = 1, 7, 49
    labels[4:6, :2] = 3
    return labels


def ade20k_objects() -> np.ndarray:
    """Objects of 2 x 2 pixels; R is the class, G the object number.

    bed (class 1) number 1 at the top left, person (class 4) number 2 to its right, bed number 3
    below, and person number 9 below that, which covers the sky.
    """
    objects = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for row, column, class_id, number in ((0, 0, 1, 1), (0, 2, 4, 2), (2, 0, 1, 3), (4, 0, 4, 9)):
        objects[row : row + 2, column : column + 2, :2] = class_id, number
    return objects


def ade20k(root: Path) -> Path:
    """ADEChallengeData2016.zip and annotations_instance.tar; returns the data set's folder."""
    base = root / "ADEChallengeData2016"
    for folder, stems in ADE20K_STEMS.items():
        for stem in stems:
            photograph(base / "images" / folder / f"{stem}.jpg")
            save(base / "annotations" / folder / f"{stem}.png", ade20k_labels())
            save(base / "annotations_instance" / folder / f"{stem}.png", ade20k_objects())
    return base


def ade20k_full(root: Path) -> Path:
    """ADE20K full; returns the data set's folder.

    Left half wall (class 2978, label 0), right half "adding machine" (3148, label 846), top row a
    class that is not among the 847 (9), bottom row unlabelled (0).
    """
    classes = np.full((HEIGHT, WIDTH), 2978)
    classes[:, 6:], classes[0], classes[-1] = 3148, 9, 0
    # B is the object number; the last digit of R has no meaning.
    pixels = np.stack([classes // 256 * 10 + 3, classes % 256, classes * 0 + 5], -1)
    base = root / "ADE20K_2021_17_01"
    for folder, stems in ADE20K_STEMS.items():
        scene = base / "images" / "ADE" / folder / "urban" / "street"
        for stem in stems:
            photograph(scene / f"{stem}.jpg")
            save(scene / f"{stem}_seg.png", pixels.astype(np.uint8))
            save(scene / f"{stem}_parts_1.png", pixels.astype(np.uint8))
            write_json(scene / f"{stem}.json", {"annotation": {}})
    return base


# ---- COCO ----

# Image ids by folder of the download.
COCO_SPLITS = {"train2017": (9, 25), "val2017": (139,)}


def coco_stuff_10k(root: Path) -> Path:
    """COCO-Stuff 10k v1.1; returns the data set's folder.

    Left half person (id 1, label 0), right half wood (182, label 170), top row unlabelled (0),
    bottom row traffic light (10) and stop sign (13); an id between these is unused.
    """
    classes = np.full((HEIGHT, WIDTH), 1, np.uint16)
    classes[:, 6:], classes[0], classes[-1, :6], classes[-1, 6:] = 182, 0, 10, 13
    base = root / "coco" / "coco_stuff_10k"
    names = {"train": ["COCO_train2014_000000000077", "x"], "test": ["COCO_train2014_000000000092"]}
    for split, stems in names.items():
        for stem in stems:
            photograph(base / "images" / f"{stem}.jpg")
            (base / "annotations").mkdir(exist_ok=True)
            savemat(base / "annotations" / f"{stem}.mat", {"S": classes, "names": ["unlabeled"]})
        (base / "imageLists").mkdir(exist_ok=True)
        (base / "imageLists" / f"{split}.txt").write_text("\n".join(stems) + "\n")
    return base


def coco_panoptic(root: Path, categories: list[dict]) -> Path:
    """COCO panoptic train2017 and val2017; returns the data set's folder.

    Left half person (segment 1000, id 1, label 0), right half rug-merged (70000, id 200, label
    132), bottom row a crowd of toothbrushes (5, id 90, label 79), top row unlabelled.
    """
    ids = np.full((HEIGHT, WIDTH), 1000)
    ids[:, 6:], ids[0], ids[-1] = 70000, 0, 5
    pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    segments = [
        {"id": i, "category_id": c, "iscrowd": crowd, "area": area, "bbox": box}
        for i, c, crowd, area, box in (
            (1000, 1, 0, 36, [0, 1, 6, 6]),
            (70000, 200, 0, 36, [6, 1, 6, 6]),
            (5, 90, 1, 12, [0, 7, 12, 1]),
        )
    ]
    base = root / "coco"
    for split, image_ids in COCO_SPLITS.items():
        for image_id in image_ids:
            photograph(base / split / f"{image_id:012d}.jpg")
            save(base / f"panoptic_{split}" / f"{image_id:012d}.png", pixels)
        content = {
            "images": [
                {"id": i, "file_name": f"{i:012d}.jpg", "width": WIDTH, "height": HEIGHT}
                for i in image_ids
            ],
            "annotations": [
                {"image_id": i, "file_name": f"{i:012d}.png", "segments_info": segments}
                for i in image_ids
            ],
            "categories": categories,
        }
        write_json(base / "annotations" / f"panoptic_{split}.json", content)
    return base


def coco_instances(root: Path, categories: list[dict]) -> Path:
    """COCO instances train2017 and val2017; returns the data set's folder.

    Images and objects of `coco_panoptic`: the person as a polygon, the crowd as RLE.
    """
    base = root / "coco"
    for split, image_ids in COCO_SPLITS.items():
        annotations = []
        for image_id in image_ids:
            photograph(base / split / f"{image_id:012d}.jpg")
            crowd = {
                "image_id": image_id,
                "category_id": 90,
                # In each column seven pixels of background and one of the crowd.
                "segmentation": {"counts": [7, 1] * WIDTH, "size": [HEIGHT, WIDTH]},
                "bbox": [0, 7, WIDTH, 1],
                "area": WIDTH,
                "iscrowd": 1,
            }
            annotations += [rectangle(1, image_id, (0, 1, 6, 7)) | {"iscrowd": 0}, crowd]
        content = {
            "info": {"year": 2017},
            "licenses": [],
            "images": [coco_image(split, image_id) for image_id in image_ids],
            "annotations": [a | {"id": 900 + i} for i, a in enumerate(annotations)],
            "categories": categories,
        }
        write_json(base / "annotations" / f"instances_{split}.json", content)
    return base


def coco_image(split: str, image_id: int) -> dict:
    name = f"{image_id:012d}.jpg"
    url = f"http://images.cocodataset.org/{split}/{name}"
    size = {"width": WIDTH, "height": HEIGHT}
    return {"id": image_id, "license": 1, "file_name": name, "coco_url": url, **size}


def rectangle(category_id: int, image_id: int, box: tuple[int, int, int, int]) -> dict:
    """A rectangle as a polygon; the box is x0, y0, x1, y1."""
    x0, y0, x1, y1 = box
    return {
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
    }


def lvis(root: Path, categories: list[dict]) -> Path:
    """LVIS v1; returns the data set's folder. Val has images of both COCO folders.

    Left half person (id 793, label 792), and within it a bolo tie (123, label 122), which is rare;
    a bottle (133, label 132) on the right of training images, and a negative label for it in val.
    """
    base = root / "lvis"
    training = {793: (0, 1, 6, 7), 123: (2, 2, 4, 6), 133: (8, 2, 11, 7)}
    validation = {793: training[793], 123: training[123]}
    for split, images, objects, absent in (
        ("train", (("train2017", 9), ("train2017", 25)), training, []),
        ("val", (("val2017", 139), ("train2017", 42)), validation, [133]),
    ):
        for folder, image_id in images:
            photograph(root / "coco" / folder / f"{image_id:012d}.jpg")
        annotations = [
            rectangle(category_id, image_id, box)
            for _, image_id in images
            for category_id, box in objects.items()
        ]
        counts = {c["id"]: len(images) * (c["id"] in objects) for c in categories}
        extra = {"neg_category_ids": absent, "not_exhaustive_category_ids": []}
        content = {
            "info": {"version": "v1.0"},
            "licenses": [],
            "images": [coco_image(*image) | extra for image in images],
            "annotations": [a | {"id": i} for i, a in enumerate(annotations, start=1)],
            "categories": [
                c | {"image_count": counts[c["id"]], "instance_count": counts[c["id"]]}
                for c in categories
            ],
        }
        for image in content["images"]:
            del image["file_name"]  # LVIS has only the URL
        write_json(base / f"lvis_v1_{split}.json", content)
    return base


# ---- Mapillary Vistas ----


def mapillary_vistas(root: Path, categories: list[dict]) -> Path:
    """Mapillary Vistas v1.2; returns the data set's folder.

    Left half Bird (id 1, label 0; two objects, left and right of column 3), right half Ego Vehicle
    (id 65, label 64), bottom row unlabelled (65).
    """
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:, 6:], labels[-1] = 64, 65
    # 16 bits: 256 * label + object number.
    instances = labels.astype(np.uint16) * 256
    instances[:-1, 3:6] += 1
    ids = np.zeros((HEIGHT, WIDTH), np.int64)
    ids[:-1, :3], ids[:-1, 3:6], ids[:-1, 6:] = 11, 300, 66000
    pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    segments = [
        {"id": i, "category_id": c, "iscrowd": 0, "area": area, "bbox": box}
        for i, c, area, box in (
            (11, 1, 21, [0, 0, 3, 7]),
            (300, 1, 21, [3, 0, 3, 7]),
            (66000, 65, 42, [6, 0, 6, 7]),
        )
    ]
    base = root / "mapillary_vistas"
    palette = np.random.default_rng(0).integers(0, 256, 768, np.uint8).tolist()
    for folder, stems in (("training", ("__CRyFzoDOXn6unQ6a3DnQ", "b")), ("validation", ("c",))):
        for stem in stems:
            photograph(base / folder / "images" / f"{stem}.jpg")
            (base / folder / "labels").mkdir(exist_ok=True)
            image = Image.fromarray(labels)
            image.putpalette(palette)  # as in the download
            image.save(base / folder / "labels" / f"{stem}.png")
            save(base / folder / "instances" / f"{stem}.png", instances)
            save(base / folder / "panoptic" / f"{stem}.png", pixels)
        content = {
            "images": [
                {"id": s, "file_name": f"{s}.jpg", "width": WIDTH, "height": HEIGHT} for s in stems
            ],
            "annotations": [
                {"image_id": s, "file_name": f"{s}.png", "segments_info": segments} for s in stems
            ],
            "categories": categories,
        }
        write_json(base / folder / "panoptic" / "panoptic_2018.json", content)
    write_json(base / "config.json", {"version": "1.1", "labels": []})
    return base


# ---- Cityscapes ----


def cityscapes(root: Path) -> Path:
    """gtFine_trainvaltest.zip and leftImg8bit_trainvaltest.zip; returns the data set's folder.

    Road (id 7) everywhere, a car (id 26) of 9 x 12 pixels (instances below 100 pixels do not
    count), and a group of persons.
    """
    width, height = 32, 16
    squares = {"road": (0, 0, 31, 15), "car": (2, 2, 10, 13), "persongroup": (20, 4, 29, 11)}
    objects = [
        {"label": label, "polygon": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]}
        for label, (x0, y0, x1, y1) in squares.items()
    ]
    labels = np.full((height, width), 7, np.uint8)
    instances = labels.astype(np.uint16)
    labels[2:14, 2:11], labels[4:12, 20:30] = 26, 24
    instances[2:14, 2:11], instances[4:12, 20:30] = 26000, 24  # a group has only the class
    base = root / "cityscapes"
    for split, city in (("train", "aachen"), ("val", "frankfurt")):
        for number in range(2):
            stem = f"{city}_{number:06d}_000019"
            photograph(
                base / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", width, height
            )
            folder = base / "gtFine" / split / city
            save(folder / f"{stem}_gtFine_labelIds.png", labels)
            save(folder / f"{stem}_gtFine_instanceIds.png", instances)
            write_json(
                folder / f"{stem}_gtFine_polygons.json",
                {"imgHeight": height, "imgWidth": width, "objects": objects},
            )
    return base
