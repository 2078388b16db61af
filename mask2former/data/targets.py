"""Training targets (classes and packed masks) from annotations of any kind.

    polygons, RLE → read_annotations → transform_annotations → pack_shapes, annotation_boxes
    panoptic PNG  → segment_layers → (label_maps.py)
    semantic map  → check_sem_seg → (transform) → semantic_targets

Annotations are checked before augmentation, so that errors describe the file on disk.

Shape letters: N targets of the image, H W pixels of the augmented image, h w of the file.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, polygons_to_bitmask
from torch import Tensor

from .formats.masks import farthest, is_polygon, rle_problems
from .label_maps import Runs, pack_layers, present_values
from .lazy_augmentation import apply_labels, apply_polygons
from .packed_masks import BITS_PER_PLANE, PackedMasks, TargetInstances

# Shape of one object: polygons, each (2 * points,) x y in pixels, or a mask (h, w) uint8 in {0, 1}.
Shape = list[np.ndarray] | np.ndarray


def build_instances(
    classes: Tensor, masks: PackedMasks, boxes: Boxes | None = None
) -> TargetInstances:
    """Put the targets of one image into Detectron2's `Instances`.

    Args:
        classes: (N,) int64 contiguous category ids.
        masks: N of (H, W).
        boxes: N boxes in pixels of the augmented image.
    """
    assert classes.shape == masks.shape[:1]
    instances = TargetInstances(masks.shape[-2:])
    instances.gt_classes = classes
    instances.gt_masks = masks
    if boxes is not None:
        instances.gt_boxes = boxes
    return instances


def check_size(size: Sequence[int], image_size: tuple[int, int], what: str, file_name: str) -> None:
    """Check that an annotation has the size of its image.

    Raises:
        ValueError: the sizes differ.
    """
    if tuple(size) != image_size:
        raise ValueError(
            f"{what} has (height, width) {tuple(size)}, but its image {file_name} has "
            f"{image_size}. Annotate the image at the size it has on disk."
        )


def check_category(category_id: int, num_classes: int | None, where: str) -> None:
    """Check a contiguous category id; with `num_classes` None every id is valid.

    Raises:
        ValueError: it is not in [0, num_classes).
    """
    if num_classes is not None and not 0 <= category_id < num_classes:
        raise ValueError(
            f"{where} has category_id {category_id}, which is not in [0, {num_classes}). Set "
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES to the number of classes of the data set, and map its "
            "category ids to contiguous ids from 0."
        )


# ---- semantic ----


def check_sem_seg(sem_seg: np.ndarray, num_classes: int, ignore_label: int, file_name: str) -> None:
    """Check the labels of a semantic map.

    Args:
        sem_seg: (h, w) labels.
        num_classes: labels must be in [0, num_classes) or `ignore_label`.
        ignore_label: label of pixels without a class.
        file_name: of the map, for the error.

    Raises:
        ValueError: the map contains another label.
    """
    values = present_values(sem_seg)
    bad = values[((values < 0) | (values >= num_classes)) & (values != ignore_label)]
    if bad.size:
        listed = ", ".join(f"{float(value):g}" for value in bad[:5]) + ", ..." * (bad.size > 5)
        raise ValueError(
            f"{file_name} contains labels that are neither in [0, {num_classes}) nor the ignore "
            f"label {ignore_label}: {listed}. Correct the map, MODEL.SEM_SEG_HEAD.NUM_CLASSES or "
            "the data set's ignore_label."
        )


def semantic_targets(sem_seg: np.ndarray, ignore_label: int) -> tuple[Tensor, PackedMasks]:
    """One target per class in the map.

    Args:
        sem_seg: (H, W) int64 labels.
        ignore_label: label of pixels without a class.

    Returns:
        Classes (N,) int64, ascending, and their masks (N, H, W).
    """
    runs = Runs(sem_seg)
    classes = runs.values[runs.values != ignore_label]
    layers = runs.layers(classes)
    return torch.from_numpy(classes), pack_layers(layers, len(classes), sem_seg.shape)


# ---- panoptic ----


def segment_layers(
    pan_seg: np.ndarray,
    segments_info: Sequence[dict[str, Any]],
    file_name: str,
    num_classes: int | None = None,
) -> tuple[Tensor, list[np.ndarray]]:
    """The target segments of a panoptic PNG as uint8 label maps, which are cheap to augment.

    Crowd segments are dropped. The others keep the order of `segments_info`: layer 0 holds the
    first 254 of them as labels 1 to 254, layer 1 the next 254, and so on.

    Args:
        pan_seg: (h, w, 3) uint8, the colours of the PNG as RGB.
        segments_info: dicts with `id`, `category_id` (contiguous) and optionally `iscrowd`.
        file_name: of the PNG, for errors.
        num_classes: if not None, category ids must be in [0, num_classes).

    Returns:
        Classes (N,) int64, and the layers, each (h, w) uint8.

    Raises:
        ValueError: PNG and `segments_info` have different segment ids, an id repeats, or a
            category id is out of range.
    """
    ids = np.array([segment["id"] for segment in segments_info], dtype=np.int64)
    sorted_ids, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{file_name}: segments_info repeats the ids {sorted_ids[counts > 1]}.")

    runs = Runs(_segment_ids(pan_seg))
    unknown = np.setdiff1d(runs.values[runs.values != 0], ids)
    if unknown.size:
        raise ValueError(
            f"{file_name} contains the segment id {unknown[0]} ({unknown.size} unknown ids), which "
            "its segments_info in the panoptic JSON does not list. PNG and JSON do not match."
        )
    absent = np.setdiff1d(ids, runs.values)
    if absent.size:
        raise ValueError(
            f"{file_name} has no pixel of the segment id {absent[0]} ({absent.size} missing ids), "
            "which its segments_info in the panoptic JSON lists. PNG and JSON do not match."
        )

    targets = [segment for segment in segments_info if not segment.get("iscrowd", 0)]
    for segment in targets:
        where = f"{file_name}: segment {segment['id']}"
        check_category(segment["category_id"], num_classes, where)
    classes = torch.tensor([segment["category_id"] for segment in targets], dtype=torch.int64)
    target_ids = np.array([segment["id"] for segment in targets], dtype=np.int64)
    return classes, runs.layers(target_ids)


def segments_in_tile(
    pan_seg: np.ndarray, segments_info: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The segments of an image that have pixels in a tile of it.

    Args:
        pan_seg: (h, w, 3) uint8, the tile of the panoptic PNG as RGB.
        segments_info: of the image.
    """
    present = set(present_values(_segment_ids(pan_seg)).tolist())
    return [segment for segment in segments_info if segment["id"] in present]


def _segment_ids(pan_seg: np.ndarray) -> np.ndarray:
    # An id is red + 256 green + 65536 blue: the RGBA bytes as one uint32, without alpha.
    rgba = cv2.cvtColor(np.ascontiguousarray(pan_seg), cv2.COLOR_RGB2RGBA)
    return rgba.view("<u4")[..., 0] & 0xFFFFFF


# ---- instances ----


def read_annotations(
    annotations: Sequence[dict[str, Any]],
    image_size: tuple[int, int],
    file_name: str,
    num_classes: int | None = None,
) -> tuple[Tensor, list[Shape]]:
    """The objects of one image without crowds.

    Args:
        annotations: dicts with `category_id` (contiguous), `segmentation` (polygons, COCO RLE or a
            mask) and optionally `iscrowd`. Boxes are not read.
        image_size: (h, w).
        file_name: of the image, for errors.
        num_classes: if not None, category ids must be in [0, num_classes).

    Returns:
        Classes (N,) int64 and shapes, which do not share memory with `annotations`.

    Raises:
        ValueError: a segmentation is missing, malformed or has another size, or a category id is
            out of range.
    """
    classes: list[int] = []
    shapes: list[Any] = []  # Shape; RLEs until they are decoded
    rles: dict[int, str] = {}  # index of the shape → which annotation
    for i, annotation in enumerate(annotations):
        if annotation.get("iscrowd", 0):
            continue
        # Detectron2's loader drops the id; then name the annotation by its position.
        name = f"id {annotation['id']}" if "id" in annotation else f"number {i} (from 0)"
        where = f"{file_name}: annotation {name}"
        check_category(annotation["category_id"], num_classes, where)
        classes.append(annotation["category_id"])
        shape = _read_shape(annotation.get("segmentation"), image_size, where, file_name)
        if isinstance(shape, dict):
            rles[len(shapes)] = where
        shapes.append(shape)
    if rles:
        _decode_rles(shapes, rles, image_size)
    return torch.tensor(classes, dtype=torch.int64), shapes


def read_crowds(
    annotations: Sequence[dict[str, Any]], image_size: tuple[int, int], file_name: str
) -> list[Shape]:
    """The shapes of the crowds of one image; arguments and errors as in `read_annotations`."""
    crowds = [{**crowd, "iscrowd": 0} for crowd in annotations if crowd.get("iscrowd", 0)]
    return read_annotations(crowds, image_size, file_name)[1]


def crowd_region(crowds: PackedMasks, objects: PackedMasks) -> Tensor:
    """Pixels of crowds, (H, W) bool, without those of objects, whose label is known."""
    return ~crowds.uncovered() & objects.uncovered()


def _read_shape(
    segmentation: Any, image_size: tuple[int, int], where: str, file_name: str
) -> Shape | dict[str, Any]:
    """The checked shape; an RLE is returned as it is."""
    if isinstance(segmentation, list) and segmentation:
        reach = farthest(image_size)
        polygons = []
        for segment in segmentation:
            try:
                # Integers become float64 too, or scaling in place would truncate them.
                polygon = np.array(segment, dtype=np.float64)
            except (TypeError, ValueError, OverflowError) as error:
                raise ValueError(
                    f"{where} has a polygon that is not a list of numbers: {error}."
                ) from error
            if polygon.ndim != 1 or not is_polygon(polygon):
                raise ValueError(
                    f"{where} has a polygon of {polygon.size} coordinates, shape {polygon.shape}; "
                    "a polygon is x1, y1, x2, y2, ... of at least 3 points."
                )
            low, high = polygon.min(), polygon.max()
            # NaN compares false.
            if not (low >= -reach and high <= max(image_size) + reach):
                what = "far outside the image"
                if not np.isfinite(low) or not np.isfinite(high):
                    what = "that are not finite"
                raise ValueError(f"{where} has a polygon with coordinates {what}.")
            polygons.append(polygon)
        return polygons
    if isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        size: Any = segmentation["size"]
        if np.ndim(size) != 1:
            size = (size,)
        check_size(size, image_size, f"{where}, an RLE,", file_name)
        return segmentation
    if isinstance(segmentation, np.ndarray) and segmentation.ndim == 2:
        check_size(segmentation.shape, image_size, f"{where}, a mask,", file_name)
        return (segmentation != 0).astype(np.uint8)
    raise ValueError(
        f"{where} has the segmentation {str(segmentation)[:60]!r}; it must be a list of polygons, "
        "a COCO RLE (a dict with size and counts) or a mask (height, width)."
    )


def _decode_rles(shapes: list, rles: dict[int, str], image_size: tuple[int, int]) -> None:
    """Replace RLEs, compressed (str or bytes) or not (list), by masks (h, w) uint8.

    Args:
        shapes: changed in place.
        rles: index of each RLE in `shapes` → which annotation it is, for errors.
        image_size: (h, w), the checked size of all.
    """
    num_pixels = image_size[0] * image_size[1]
    # pycocotools would leave pixels beyond the last run uninitialised.
    reasons = rle_problems([shapes[i]["counts"] for i in rles], [num_pixels] * len(rles))
    for (i, where), reason in zip(rles.items(), reasons, strict=True):
        if reason is not None:
            raise ValueError(f"{where} has an RLE that cannot be decoded: {reason}")
        rle = shapes[i]
        if not isinstance(rle["counts"], str | bytes):
            rle = mask_util.frPyObjects(rle, *image_size)
        shapes[i] = mask_util.decode(rle)


def transform_annotations(shapes: Sequence[Shape], transforms: T.TransformList) -> list[Shape]:
    """Apply the transforms of the image to each object. Polygons are changed in place.

    Args:
        shapes: from `read_annotations`.
        transforms: applied to the image.

    Returns:
        The shapes in the augmented image; an empty list or mask for an object outside.
    """
    transformed: list[Shape] = []
    for shape in shapes:
        if isinstance(shape, list):
            polygons = apply_polygons(transforms, [polygon.reshape(-1, 2) for polygon in shape])
            transformed.append([polygon.reshape(-1) for polygon in polygons])
        else:
            # Crops may pad with 255, which is not part of the object.
            transformed.append((apply_labels(transforms, shape) == 1).view(np.uint8))
    return transformed


def annotation_boxes(shapes: Sequence[Shape]) -> Boxes:
    """Tight boxes of objects in pixels; zeros for an empty object."""
    boxes = [
        _polygon_box(shape) if isinstance(shape, list) else _mask_box(shape) for shape in shapes
    ]
    return Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))


def _polygon_box(polygons: list[np.ndarray]) -> tuple[float, float, float, float]:
    if not polygons:
        return 0, 0, 0, 0
    points = np.concatenate(polygons).reshape(-1, 2)
    return *points.min(axis=0), *points.max(axis=0)


def _mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return 0, 0, 0, 0
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def pack_shapes(shapes: Sequence[Shape], image_size: tuple[int, int]) -> PackedMasks:
    """Draw objects, which may overlap, as masks of an image of size (H, W)."""
    planes = np.zeros((-(-len(shapes) // BITS_PER_PLANE), *image_size), dtype=np.uint8)
    for i, shape in enumerate(shapes):
        plane, bit = planes[i // BITS_PER_PLANE], np.uint8(1 << i % BITS_PER_PLANE)
        if not isinstance(shape, list):
            np.bitwise_or(plane, shape * bit, out=plane)
        elif shape:
            rows, columns, mask = _rasterise_polygons(shape, image_size)
            plane[rows, columns] |= mask * bit
    return PackedMasks(torch.from_numpy(planes), len(shapes), overlapping=True)


def _rasterise_polygons(
    polygons: list[np.ndarray], image_size: tuple[int, int]
) -> tuple[slice, slice, np.ndarray]:
    """The window (rows, columns) around the polygons and their uint8 mask in it."""
    left, top, right, bottom = _polygon_box(polygons)
    # A margin of up to two pixels, since pycocotools rounds. The polygons are not shifted to the
    # window: where an edge runs exactly between two pixels, rounding depends on the position.
    rows, columns = (
        slice(*(min(max(int(end), 0), size) for end in (low - 1, high + 3)))
        for low, high, size in ((top, bottom, image_size[0]), (left, right, image_size[1]))
    )
    if rows.start == rows.stop or columns.start == columns.stop:
        return slice(0), slice(0), np.zeros((0, 0), dtype=np.uint8)
    mask = polygons_to_bitmask(polygons, rows.stop, columns.stop).view(np.uint8)
    # pycocotools returns column-major masks, which OpenCV transposes faster than NumPy.
    return rows, columns, cv2.transpose(mask.T[columns, rows])


def rasterise(shapes: Sequence[Shape], image_size: tuple[int, int]) -> Tensor:
    """Masks (N, H, W) bool of objects in an image of size (H, W)."""
    return pack_shapes(shapes, image_size).expand()


def convert_coco_poly_to_mask(
    segmentations: list[list[np.ndarray]], height: int, width: int
) -> Tensor:
    """Masks (N, height, width) bool of N objects, each a list of polygons in pixels."""
    return BitMasks.from_polygon_masks(segmentations, height, width).tensor
