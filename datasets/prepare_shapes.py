#!/usr/bin/env python3
"""Writes Shapes: small synthetic images in the COCO panoptic and instance format.

    python datasets/prepare_shapes.py [--output DIR] [--num-train 400] [--num-val 80]

Textured things (circle, square, triangle, star, ring, cross) on textured stuff (sky, grass, water,
brick), with occlusion, small objects, crowds and unlabelled pixels. The script takes seconds and
needs no network. All tasks, dataset mappers and evaluators use the same code for it as for COCO.

An image depends only on (seed, split, index): the same seed gives the same bytes (with the same
library versions), and generating more images does not change the first ones. Fixed indices cover
rare cases even in a tiny data set: 1, 101, ... have no things, 2 of the training split is
completely unlabelled, 3, 103, ... have a crowd.

H W image size in pixels.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as mask_util
from shapes_scenes import SPLITS, make_scene
from tqdm import tqdm

VERSION = 1  # increase when the same parameters give other images
IGNORE_LABEL = 255

CATEGORIES_FILE = (
    Path(__file__).resolve().parents[1] / "mask2former/data/datasets/categories/shapes.json"
)


def load_categories() -> list[dict]:
    """Returns the class table: things first, then stuff."""
    return json.loads(CATEGORIES_FILE.read_text())


def encode_mask(mask: np.ndarray, iscrowd: int) -> list[list[int]] | dict:
    """Returns the COCO segmentation of a boolean mask (H, W).

    A polygon along the pixel borders if it encodes the mask exactly. Otherwise an RLE: uncompressed
    for crowds, as in COCO's files, and compressed for masks with several parts or holes.
    """
    if iscrowd:
        pixels = mask.flatten(order="F")
        changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
        counts = np.diff(np.concatenate([[0], changes, [pixels.size]])).tolist()
        return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}
    polygon = trace_polygon(mask)
    if polygon is not None:
        rle = mask_util.merge(mask_util.frPyObjects([polygon], *mask.shape))
        if np.array_equal(mask_util.decode(rle).astype(bool), mask):
            return [polygon]
    rle = mask_util.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def trace_polygon(mask: np.ndarray) -> list[int] | None:
    """Returns the border of a mask as x0, y0, x1, y1, ...; None if it has holes or is split."""
    # Contours pass through pixel centres. In a magnified mask, rounding moves each point to the
    # pixel corner next to it.
    magnified = np.kron(np.pad(mask, 1).astype(np.uint8), np.ones((4, 4), np.uint8))
    contours, _ = cv2.findContours(magnified, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if len(contours) != 1:
        return None
    corners = np.floor((contours[0][:, 0] + 0.5) / 4 + 0.5).astype(int) - 1
    corners = corners[np.any(corners != np.roll(corners, 1, 0), 1)]
    before, after = corners - np.roll(corners, 1, 0), np.roll(corners, -1, 0) - corners
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return corners[turns].reshape(-1).tolist()


def bounding_box(mask: np.ndarray) -> list[int]:
    """Returns [x, y, width, height] in pixels of a non-empty mask."""
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)]


def segment_colors(seed: int, image_id: int, count: int) -> np.ndarray:
    """Returns distinct random RGB colours (count, 3), without black; they encode segment ids."""
    rng = np.random.default_rng([seed, image_id])
    ids = rng.choice(2**24 - 1, count, replace=False) + 1
    return np.stack([ids & 255, (ids >> 8) & 255, ids >> 16], 1).astype(np.uint8)


def write_split(root: Path, split: str, args: argparse.Namespace, info: dict) -> None:
    """Writes the images and annotations of one split below `root`."""
    categories = load_categories()
    things = [c for c in categories if c["isthing"]]
    folders = [
        root / "images" / split,
        root / f"panoptic_{split}",
        root / f"panoptic_semseg_{split}",
    ]
    for folder in folders:
        folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)

    images, panoptic, instances = [], [], []
    count = {"train": args.num_train, "val": args.num_val}[split]
    for index in tqdm(range(count), desc=f"shapes {split}", unit="image"):
        image_id = SPLITS[split] + index
        scene = make_scene(args.seed, split, index, args.size, categories)
        height, width = scene.segment_map.shape
        name = f"{image_id:06d}"
        segments_info = []
        panoptic_map = np.zeros((height, width, 3), np.uint8)
        semantic_map = np.full((height, width), IGNORE_LABEL, np.uint8)
        colors = segment_colors(args.seed, image_id, len(scene.segments))
        for i, (contiguous_id, iscrowd) in enumerate(scene.segments):
            mask = scene.segment_map == i
            if not mask.any():
                continue
            panoptic_map[mask], semantic_map[mask] = colors[i], contiguous_id
            category = categories[contiguous_id]
            annotation = {
                "category_id": category["id"],
                "area": int(mask.sum()),
                "bbox": bounding_box(mask),
                "iscrowd": iscrowd,
            }
            segments_info.append({"id": int(colors[i] @ [1, 256, 65536]), **annotation})
            if category["isthing"]:
                segmentation = encode_mask(mask, iscrowd)
                instances.append(
                    {
                        "id": len(instances) + 1,
                        "image_id": image_id,
                        "segmentation": segmentation,
                        **annotation,
                    }
                )
        image = np.clip(np.round(scene.image), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folders[0] / f"{name}.jpg", quality=95)
        Image.fromarray(panoptic_map).save(folders[1] / f"{name}.png")
        Image.fromarray(semantic_map).save(folders[2] / f"{name}.png")
        images.append(
            {"id": image_id, "file_name": f"{name}.jpg", "width": width, "height": height}
        )
        panoptic.append(
            {"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments_info}
        )
    for kind, annotations, table in (
        ("panoptic", panoptic, categories),
        ("instances", instances, things),
    ):
        content = {"info": info, "images": images, "annotations": annotations, "categories": table}
        (root / "annotations" / f"{kind}_{split}.json").write_text(json.dumps(content))


def read_info(root: Path) -> dict | None:
    """Returns the parameters stored in an existing Shapes data set, or None if it is not one."""
    file = root / "annotations" / "panoptic_val.json"
    if not file.is_file():
        return None
    info = json.loads(file.read_text()).get("info", {})
    return info if info.get("description") == "Shapes" else None


def prepare(args: argparse.Namespace) -> None:
    """Writes the data set, unless it exists with the same parameters.

    Raises:
        FileExistsError: the output folder has other content.
    """
    info = {
        "description": "Shapes",
        "version": VERSION,
        "seed": args.seed,
        "size": args.size,
        "num_train": args.num_train,
        "num_val": args.num_val,
    }
    output = args.output.absolute()
    existing = read_info(output)
    if existing == info:
        print(f"{output} is complete: nothing to do")
        return
    if existing is not None and not args.force:
        raise FileExistsError(
            f"{output} contains Shapes with {existing}: add --force to replace it"
        )
    if existing is None and output.exists() and any(output.iterdir()):
        raise FileExistsError(
            f"{output} is not empty and does not contain Shapes: choose another --output"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    # Renamed at the end, so that the output folder is always complete.
    with tempfile.TemporaryDirectory(prefix=".shapes-", dir=output.parent) as temporary:
        root = Path(temporary) / "shapes"
        for split in SPLITS:
            write_split(root, split, args, info)
        if existing is not None:
            output.rename(Path(temporary) / "old")
        root.rename(output)
    print(f"wrote {args.num_train} + {args.num_val} images to {output}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    root = Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
    parser = argparse.ArgumentParser(
        description="Write the Shapes data set.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=root / "shapes", help="folder to write")
    parser.add_argument("--num-train", type=int, default=400, help="training images")
    parser.add_argument("--num-val", type=int, default=80, help="validation images")
    parser.add_argument("--size", type=int, default=128, help="mean side of an image in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random images")
    parser.add_argument("--force", action="store_true", help="replace Shapes with other parameters")
    args = parser.parse_args(argv)
    for name, lowest in (("num_train", 1), ("num_val", 1), ("size", 48), ("seed", 0)):
        if getattr(args, name) < lowest:
            option = "--" + name.replace("_", "-")
            parser.error(f"{option} must be at least {lowest}, not {getattr(args, name)}")
    if args.num_train >= SPLITS["val"]:
        parser.error(f"--num-train must be below {SPLITS['val']}, not {args.num_train}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        prepare(args)
    except FileExistsError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
