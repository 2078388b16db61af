"""Lists and pictures of label-error candidates, for a person to check.

H W pixels of an image.
"""

import csv
import json
import os
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from ..data.formats.images import read_colours
from ..utils.files import atomic_write
from ..utils.visualization import contact_sheet
from .mask_errors import encoded

_COLUMNS = (
    "kind",
    "rank",
    "image_id",
    "file_name",
    "annotation_id",
    "gt_class",
    "predicted_class",
    "score",
    "iou",
)
_GT_COLOUR, _PRED_COLOUR = (0, 200, 0), (230, 0, 0)
# Of a crop, in pixels, and its margin as a share of the object.
_CROP_SIZE, _MARGIN, _CAPTION = 300, 0.4, 40
_COLUMNS_OF_SHEET = 4


def write_candidates(stem: str, gt: COCO, candidates: Sequence[dict[str, Any]]) -> None:
    """Write a JSON and a CSV file atomically.

    Args:
        stem: their path without extension.
        gt: with the file names of the images.
        candidates: of `analyze_masks`.

    Raises:
        WriteError: a file cannot be written.
    """
    rows = [
        {
            key: gt.imgs[c["image_id"]].get("file_name", "") if key == "file_name" else c[key]
            for key in _COLUMNS
        }
        for c in candidates
    ]
    with atomic_write(f"{stem}.json") as file:
        json.dump(rows, file, indent=1)
    with atomic_write(f"{stem}.csv") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def draw_candidates(
    path: str, gt: COCO, candidates: Sequence[dict[str, Any]], image_root: str
) -> None:
    """Draw crops of the images as one PNG: ground truth in green, the prediction in red.

    Args:
        path: file to write.
        gt: with the file names of the images.
        candidates: at least one.
        image_root: folder of the images.

    Raises:
        FileNotFoundError, ValueError: an image is missing or differs in size from the masks.
        WriteError: the file cannot be written.
    """
    crops = [_draw(gt, candidate, image_root) for candidate in candidates]
    columns = min(_COLUMNS_OF_SHEET, len(crops))
    crops += [np.full((1, 1, 3), 255, np.uint8)] * (-len(crops) % columns)
    contact_sheet([crops[i : i + columns] for i in range(0, len(crops), columns)], path)


def _draw(gt: COCO, candidate: dict[str, Any], image_root: str) -> np.ndarray:
    file_name = os.path.join(image_root, gt.imgs[candidate["image_id"]]["file_name"])
    if not os.path.isfile(file_name):
        raise FileNotFoundError(f"{file_name} is missing: name the folder of images by --images.")
    image = read_colours(file_name)
    size = candidate["result"]["segmentation"]["size"]
    if list(image.shape[:2]) != list(size):
        raise ValueError(
            f"{file_name} has (height, width) {image.shape[:2]}, but its masks have {tuple(size)}."
        )
    pred = mask_util.decode(encoded(candidate["result"]["segmentation"], size))
    shown = [(pred, _PRED_COLOUR)]
    if candidate["annotation"] is not None:
        mask = mask_util.decode(encoded(candidate["annotation"]["segmentation"], size))
        shown.insert(0, (mask, _GT_COLOUR))
    top, bottom, left, right = _window(np.any([mask for mask, _ in shown], axis=0))
    crop = image[top:bottom, left:right]
    scale = _CROP_SIZE / max(crop.shape[:2])
    drawn_size = tuple(max(1, round(side * scale)) for side in crop.shape[1::-1])
    crop = cv2.resize(crop, drawn_size, interpolation=cv2.INTER_LINEAR)
    for mask, colour in shown:
        # Copied: OpenCV does not take a view.
        part = cv2.resize(
            np.ascontiguousarray(mask[top:bottom, left:right]),
            drawn_size,
            interpolation=cv2.INTER_NEAREST,
        )
        contours, _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        # The prediction is drawn thinner, so that both show where they agree.
        cv2.drawContours(crop, contours, -1, colour, 5 if colour == _GT_COLOUR else 2)
    return _captioned(crop, candidate)


def _window(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Rows and columns of a mask (H, W) with a margin; the whole image if it is empty."""
    if not mask.any():
        return 0, mask.shape[0], 0, mask.shape[1]
    window = []
    for axis, length in enumerate(mask.shape):
        used = np.flatnonzero(mask.any(axis=1 - axis))
        margin = max(8, round(_MARGIN * (used[-1] - used[0] + 1)))
        window += [max(0, used[0] - margin), min(length, used[-1] + margin + 1)]
    return tuple(window)


def _captioned(crop: np.ndarray, candidate: dict[str, Any]) -> np.ndarray:
    sheet = Image.new("RGB", (_CROP_SIZE, crop.shape[0] + _CAPTION), "white")
    sheet.paste(Image.fromarray(crop), (0, _CAPTION))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    gt_class = candidate["gt_class"] or "no label"
    lines = [
        f"{candidate['kind']}, IoU {candidate['iou']:.2f}, image {candidate['image_id']}",
        f"{gt_class}, predicted {candidate['predicted_class']} {candidate['score']:.2f}",
    ]
    for number, line in enumerate(lines):
        draw.text((2, 2 + 18 * number), line, fill="black", font=font)
    return np.asarray(sheet)
