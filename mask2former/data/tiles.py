"""Trains on tiles of large images: INPUT.TILES.

    records → split_records → one record a tile, with `tile` → mapper reads the tile's window

A record of a tile has the size of the tile. Annotations stay in pixels of the image until a mapper
cuts them (`record_annotations`); label maps are read by windows, too.

H W pixels of an image, h w pixels of a tile.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from ..utils.instance_masks import InstanceMasks
from ..utils.tile_grid import check_tile_size, tile_grid
from ..utils.windows import Window, intersection, shifted
from .formats.images import check_panoptic_mode, read_header, read_image, read_panoptic_png
from .formats.masks import is_polygon
from .formats.windows import more_pixels, open_image
from .lazy_augmentation import apply_polygons

TILE = "tile"


class TileWindow(NamedTuple):
    """The part of an image that a record is about, in pixels."""

    y: int
    x: int
    height: int
    width: int
    image_size: tuple[int, int]

    @property
    def window(self) -> Window:
        return slice(self.y, self.y + self.height), slice(self.x, self.x + self.width)


# ---- records ----


def split_records(
    records: Iterable[dict[str, Any]], tile_size: int, overlap: int, drop_empty: bool
) -> list[dict[str, Any]]:
    """Split the images of a data set into tiles.

    Args:
        records: in Detectron2's format, checked.
        tile_size, overlap: see `tile_grid`.
        drop_empty: drop tiles without object of records with `annotations`. What is in
            a tile of a label map or panoptic PNG is not known before it is read.

    Returns:
        Records with `tile`, `height` and `width` of the tile, and the annotations whose box
        overlaps the tile. An image that one tile covers keeps its record.

    Raises:
        FileNotFoundError, ValueError: an image has no size in its record, and its header cannot be
            read.
        ValueError: see `check_tile_size`.
    """
    check_tile_size(tile_size, overlap, "INPUT.TILES.SIZE and INPUT.TILES.OVERLAP")
    tiles = []
    for record in records:
        size = record.get("height"), record.get("width")
        if None in size:
            with more_pixels():
                size = read_header(record["file_name"]).size
        grid = tile_grid((int(size[0]), int(size[1])), tile_size, overlap)
        if len(grid) == len(grid[0]) == 1:
            tiles.append(record)
            continue
        boxes = _boxes(record.get("annotations", ()))
        for tile in itertools.chain(*grid):
            height, width = tile.size
            part = TileWindow(
                tile.y.start, tile.x.start, height, width, (int(size[0]), int(size[1]))
            )
            new = record | {TILE: part, "height": height, "width": width}
            if "annotations" in record:
                inside = _overlapping(boxes, part)
                new["annotations"] = [record["annotations"][i] for i in inside]
                if drop_empty and all(a.get("iscrowd", 0) for a in new["annotations"]):
                    continue
            tiles.append(new)
    return tiles


def _boxes(annotations: Sequence[dict[str, Any]]) -> np.ndarray:
    """Boxes (N, 4) x0 y0 x1 y1 of annotations in pixels; without limits where none is known."""
    boxes = np.full((len(annotations), 4), [-np.inf, -np.inf, np.inf, np.inf])
    for box, annotation in zip(boxes, annotations, strict=True):
        shape = annotation.get("segmentation")
        if isinstance(shape, dict) and isinstance(shape["counts"], str | bytes):
            box[:] = BoxMode.convert(
                mask_util.toBbox(shape).tolist(), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS
            )
        elif isinstance(shape, list) and shape and all(map(_is_finite_polygon, shape)):
            points = np.concatenate([np.asarray(part, dtype=np.float64) for part in shape])
            box[:2], box[2:] = points.reshape(-1, 2).min(0), points.reshape(-1, 2).max(0)
        elif "bbox" in annotation:
            box[:] = BoxMode.convert(
                list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS
            )
    return boxes


def _overlapping(boxes: np.ndarray, tile: TileWindow) -> list[int]:
    x0, y0, x1, y1 = boxes.T
    inside = (x0 < tile.x + tile.width) & (x1 > tile.x)
    inside &= (y0 < tile.y + tile.height) & (y1 > tile.y)
    return np.flatnonzero(inside).tolist()


# ---- reading ----


def read_pixels(record: dict[str, Any], file_name: str, image_format: str | None) -> np.ndarray:
    """Read an image or label map of a record: all of it, or the window of the record's tile.

    Raises:
        FileNotFoundError, ValueError: see `read_image`.
        ValueError: the file has another size than the image that was split.
    """
    tile: TileWindow | None = record.get(TILE)
    if tile is None:
        return read_image(file_name, image_format)
    with open_image(file_name, image_format) as image:
        if image.size != tile.image_size:
            raise ValueError(
                f"{file_name} has (height, width) {image.size}, but the image of its record, "
                f"{record['file_name']}, has {tile.image_size}"
            )
        return image.read(*tile.window)


def read_panoptic_pixels(record: dict[str, Any], file_name: str) -> np.ndarray:
    """The colours (h, w, 3) of the panoptic PNG of a record, see `read_pixels`."""
    if TILE not in record:
        return read_panoptic_png(file_name)
    with more_pixels():
        check_panoptic_mode(file_name)
    return read_pixels(record, file_name, "RGB")


def record_annotations(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The `annotations` of a record, in pixels of its tile if it has one.

    Polygons and masks are cut at the borders of the tile, and those without pixels in it are left
    out. What is malformed stays as it is, for `read_annotations` to refuse.
    """
    tile: TileWindow | None = record.get(TILE)
    if tile is None:
        return record["annotations"]
    cut = []
    for annotation in record["annotations"]:
        stored = annotation.get("segmentation")
        shape = _cut(stored, tile)
        if shape is not None or stored is None:
            others = {k: v for k, v in annotation.items() if k not in ("bbox", "bbox_mode")}
            cut.append(others | {"segmentation": shape})
    return cut


def _cut(shape: Any, tile: TileWindow) -> Any:
    """A segmentation in the tile; None if it has no pixel there."""
    if isinstance(shape, np.ndarray) and shape.shape == tile.image_size:
        mask = shape[tile.window]
        return mask if mask.any() else None
    if isinstance(shape, dict) and tuple(shape["size"]) == tile.image_size:
        masks = InstanceMasks.from_rle([shape])
        shared = intersection(masks.window(0), tile.window)
        inside = masks.crops[0][shifted(shared, masks.window(0))]
        if not inside.any():
            return None
        mask = np.zeros((tile.height, tile.width), dtype=np.uint8)
        mask[shifted(shared, tile.window)] = inside
        return mask
    if isinstance(shape, list) and shape and all(map(_is_finite_polygon, shape)):
        crop = T.CropTransform(tile.x, tile.y, tile.width, tile.height)
        points = [np.array(part, dtype=np.float64).reshape(-1, 2) for part in shape]
        parts = apply_polygons(T.TransformList([crop]), points)
        return [part.reshape(-1) for part in parts if len(part) >= 3] or None
    return shape


def _is_finite_polygon(part: Any) -> bool:
    try:
        points = np.asarray(part, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    return points.ndim == 1 and is_polygon(points) and bool(np.isfinite(points).all())
