"""A random data set in COCO's formats: star-shaped objects on vertical patches of stuff."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.structures import BoxMode
from panopticapi.utils import id2rgb
from PIL import Image
from pycocotools import mask as mask_util

HEIGHT, WIDTH = 480, 640
NUM_THINGS, NUM_CLASSES = 80, 133
# The ignore label of the semantic maps.
IGNORE_LABEL = 255


def category_id(class_id: int) -> int:
    """The category id in the files for a contiguous class id."""
    return class_id + 1


def random_polygon(rng: np.random.Generator) -> np.ndarray:
    """The outline (points, 2) of an object within the image, x and y in pixels."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(12, 60)))
    radius = np.exp(rng.uniform(np.log(10), np.log(160))) * rng.uniform(0.7, 1, len(angle))
    centre = rng.uniform(0, 1, 2) * (WIDTH, HEIGHT)
    points = centre + radius[:, None] * np.stack((np.cos(angle), np.sin(angle)), 1)
    return points.clip(0, (WIDTH, HEIGHT)).round(2)


def draw(polygon: np.ndarray) -> np.ndarray:
    """(H, W) bool."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    return cv2.fillPoly(mask, [polygon.round().astype(np.int32)], 1).astype(bool)


def write_image(folder: Path, image_id: int, rng: np.random.Generator) -> dict[str, Any]:
    """Write one image with all its annotations.

    Returns:
        its record, as from a registered data set, with polygons in `annotations` and with
        `segments_info`; class ids are contiguous.
    """
    files = {
        key: str(folder / key / f"{image_id:06d}.{'jpg' if key == 'image' else 'png'}")
        for key in ("image", "panoptic", "semantic")
    }
    noise = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    pixels = cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    Image.fromarray(pixels).save(files["image"], quality=90)

    # Stuff in vertical patches, objects on top of it.
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
    classes: list[int] = []
    for columns in np.array_split(np.arange(WIDTH), 5):
        classes.append(int(rng.integers(NUM_THINGS, NUM_CLASSES)))
        ids[:, columns] = len(classes) * 1001
    annotations = []
    for _ in range(rng.integers(4, 14)):
        polygon, class_id = random_polygon(rng), int(rng.integers(NUM_THINGS))
        box = [*polygon.min(0), *np.ptp(polygon, axis=0)]
        annotations.append(
            {
                "category_id": class_id,
                "segmentation": [polygon.flatten().tolist()],
                "bbox": [float(x) for x in box],
                "bbox_mode": BoxMode.XYWH_ABS,
                "iscrowd": 0,
            }
        )
        classes.append(class_id)
        ids[draw(polygon)] = len(classes) * 1001
    present = np.unique(ids)
    segments = [
        {"id": int(i), "category_id": classes[i // 1001 - 1], "iscrowd": 0} for i in present if i
    ]
    labels = np.array([IGNORE_LABEL, *classes], dtype=np.uint8)[ids // 1001]
    Image.fromarray(id2rgb(ids)).save(files["panoptic"])
    Image.fromarray(labels).save(files["semantic"])
    return {
        "image_id": image_id,
        "height": HEIGHT,
        "width": WIDTH,
        "file_name": files["image"],
        "pan_seg_file_name": files["panoptic"],
        "sem_seg_file_name": files["semantic"],
        "segments_info": segments,
        "annotations": annotations,
    }


def write_dataset(folder: Path, num_images: int) -> list[dict[str, Any]]:
    """Write images, and instances.json and panoptic.json; returns the records."""
    for name in ("image", "panoptic", "semantic"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = [write_image(folder, image_id, rng) for image_id in range(1, num_images + 1)]
    images, instances, panoptic = [], [], []
    for record in records:
        image_id = record["image_id"]
        name = f"{image_id:06d}"
        size = {"height": HEIGHT, "width": WIDTH}
        images.append({"id": image_id, "file_name": f"{name}.jpg", **size})
        for annotation in record["annotations"]:
            rle = mask_util.encode(
                np.asfortranarray(draw(np.reshape(annotation["segmentation"][0], (-1, 2))))
            )
            instances.append(
                annotation
                | {
                    "id": len(instances) + 1,
                    "image_id": image_id,
                    "category_id": category_id(annotation["category_id"]),
                    "area": float(mask_util.area(rle)),
                }
            )
        ids = np.array(Image.open(record["pan_seg_file_name"])).astype(np.int64)
        ids = ids @ (1, 256, 256**2)
        segments = [
            segment
            | {
                "category_id": category_id(segment["category_id"]),
                "area": int((ids == segment["id"]).sum()),
            }
            for segment in record["segments_info"]
        ]
        entry = {"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments}
        panoptic.append(entry)
    categories = [
        {"id": category_id(c), "name": f"class {c}", "isthing": int(c < NUM_THINGS)}
        for c in range(NUM_CLASSES)
    ]
    things = categories[:NUM_THINGS]
    for name, annotations, classes in (
        ("instances", instances, things),
        ("panoptic", panoptic, categories),
    ):
        content = {"info": {}, "images": images, "annotations": annotations, "categories": classes}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return records
