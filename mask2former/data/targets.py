"""Training targets from annotations: classes and binary masks, whatever the annotation was.

    polygons, RLE → read_annotations → transform_annotations → rasterise, annotation_boxes
    panoptic PNG  → segment_layers → transform_layers → layers_to_masks, layers_to_boxes
    semantic map  → check_sem_seg → (transform) → semantic_targets

What goes in is checked before it is augmented, so an error speaks of the file as it is on disk.

Shape letters: N targets of the image, H W pixels of the augmented image, h w of the file.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, Instances, polygons_to_bitmask
from panopticapi.utils import rgb2id
from scipy.ndimage import find_objects
from torch import Tensor

# Segments of one layer: labels are uint8, where 0 is nothing and 255 what crops pad with.
_LAYER_SIZE = 254

# Of one object: polygons, each (2 * points,) x y in pixels, or a mask (h, w) uint8 of 0 and 1.
Shape = list[np.ndarray] | np.ndarray


def build_instances(classes: Tensor, masks: Tensor, boxes: Boxes | None = None) -> Instances:
    """Put the targets of one image into Detectron2's container.

    Args:
        classes: (N,) int64 contiguous category ids.
        masks: (N, H, W) bool.
        boxes: N boxes in pixels of the augmented image.
    """
    assert masks.dtype == torch.bool and classes.shape == masks.shape[:1]
    instances = Instances(tuple(masks.shape[-2:]))
    instances.gt_classes = classes
    instances.gt_masks = masks
    if boxes is not None:
        instances.gt_boxes = boxes
    return instances


def check_size(size: Sequence[int], image_size: tuple[int, int], what: str, file_name: str) -> None:
    """Check that an annotation has the size of its image.

    Raises:
        ValueError: it has not.
    """
    if tuple(size) != image_size:
        raise ValueError(
            f"{what} has (height, width) {tuple(size)}, but its image {file_name} has "
            f"{image_size}. Annotate the image at the size it has on disk."
        )


def check_category(category_id: int, num_classes: int | None, where: str) -> None:
    """Check a contiguous category id; `num_classes` None allows every id.

    Raises:
        ValueError: it is not in [0, num_classes).
    """
    if num_classes is not None and not 0 <= category_id < num_classes:
        raise ValueError(
            f"{where} has category_id {category_id}, which is not in [0, {num_classes}). Set "
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES to the number of classes of the data set, and map its "
            "category ids to contiguous ids from 0."
        )


def present_values(labels: np.ndarray) -> np.ndarray:
    """The distinct values of a label map, ascending.

    Neighbouring pixels mostly agree, so one value per run is sorted instead of every pixel.
    """
    flat = labels.reshape(-1)
    return np.unique(flat[_run_starts(flat)])


def _run_starts(flat: np.ndarray) -> np.ndarray:
    starts = np.ones(flat.shape, dtype=bool)
    np.not_equal(flat[1:], flat[:-1], out=starts[1:])
    return np.flatnonzero(starts)


# ---- semantic ----


def check_sem_seg(sem_seg: np.ndarray, num_classes: int, ignore_label: int, file_name: str) -> None:
    """Check the labels of a semantic map.

    Args:
        sem_seg: (h, w) labels.
        num_classes: labels lie in [0, num_classes), or are `ignore_label`.
        ignore_label: of pixels without a class.
        file_name: the map's, for the error.

    Raises:
        ValueError: there is another label.
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


def semantic_targets(sem_seg: np.ndarray, ignore_label: int) -> tuple[Tensor, Tensor]:
    """One target for each class in the map.

    Args:
        sem_seg: (H, W) int64 labels.
        ignore_label: of pixels without a class.

    Returns:
        Classes (N,) int64, ascending, and masks (N, H, W) bool.
    """
    classes = present_values(sem_seg)
    classes = classes[classes != ignore_label]
    masks = sem_seg == classes[:, None, None]  # (N, H, W)
    return torch.from_numpy(classes), torch.from_numpy(masks)


# ---- panoptic ----


def segment_layers(
    pan_seg: np.ndarray,
    segments_info: Sequence[dict[str, Any]],
    file_name: str,
    num_classes: int | None = None,
) -> tuple[Tensor, list[np.ndarray]]:
    """The target segments of a panoptic PNG as uint8 label maps, which are cheap to augment.

    Crowd segments are no targets. The others are numbered in the order of `segments_info`: layer 0
    holds the first 254 of them under the labels 1 to 254, layer 1 the next, and so on.

    Args:
        pan_seg: (h, w, 3) uint8, the colours of the PNG as RGB.
        segments_info: dicts with `id`, `category_id` (contiguous) and optionally `iscrowd`.
        file_name: the PNG's, for errors.
        num_classes: if given, category ids lie in [0, num_classes).

    Returns:
        Classes (N,) int64, and the layers, each (h, w) uint8.

    Raises:
        ValueError: PNG and `segments_info` do not have the same segment ids, an id repeats, or a
            category id is out of range.
    """
    ids = np.array([segment["id"] for segment in segments_info], dtype=np.int64)
    sorted_ids, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{file_name}: segments_info repeats the ids {sorted_ids[counts > 1]}.")

    flat = rgb2id(pan_seg).reshape(-1)
    starts = _run_starts(flat)
    run_ids, run_lengths = flat[starts], np.diff(starts, append=flat.size)
    png_ids, runs = np.unique(run_ids, return_inverse=True)
    unknown = np.setdiff1d(png_ids[png_ids != 0], ids)
    if unknown.size:
        raise ValueError(
            f"{file_name} contains the segment id {unknown[0]} ({unknown.size} such), which its "
            "segments_info in the panoptic JSON does not list. PNG and JSON do not belong together."
        )
    absent = np.setdiff1d(ids, png_ids)
    if absent.size:
        raise ValueError(
            f"{file_name} has no pixel of the segment id {absent[0]} ({absent.size} such), which "
            "its segments_info in the panoptic JSON lists. PNG and JSON do not belong together."
        )

    targets = [segment for segment in segments_info if not segment.get("iscrowd", 0)]
    for segment in targets:
        where = f"{file_name}: segment {segment['id']}"
        check_category(segment["category_id"], num_classes, where)
    classes = torch.tensor([segment["category_id"] for segment in targets], dtype=torch.int64)
    layers = []
    for start in range(0, len(targets), _LAYER_SIZE):
        label_of_id = np.zeros(png_ids.shape, dtype=np.uint8)
        chunk = [segment["id"] for segment in targets[start : start + _LAYER_SIZE]]
        label_of_id[np.searchsorted(png_ids, chunk)] = np.arange(1, len(chunk) + 1)
        layers.append(np.repeat(label_of_id[runs], run_lengths).reshape(pan_seg.shape[:2]))
    return classes, layers


def transform_layers(layers: Sequence[np.ndarray], transforms: T.TransformList) -> list[np.ndarray]:
    """Apply to each layer what was applied to the image.

    Raises:
        ValueError: a transform pads with a value that the layers use for a segment.
    """
    for transform in transforms.transforms:
        if isinstance(transform, T.PadTransform) and 0 < transform.seg_pad_value <= _LAYER_SIZE:
            raise ValueError(
                f"An augmentation pads segmentations with {transform.seg_pad_value}; panoptic maps "
                "can be padded with 0 or 255 (seg_pad_value)."
            )
    return [transforms.apply_segmentation(layer) for layer in layers]


def layers_to_masks(
    layers: Sequence[np.ndarray], num_segments: int, image_size: tuple[int, int]
) -> Tensor:
    """Masks (N, H, W) bool of augmented layers; empty where a segment was cropped away.

    Args:
        layers: from `transform_layers`, each (H, W) uint8.
        num_segments: N.
        image_size: (H, W), needed when N is 0.
    """
    masks = np.empty((num_segments, *image_size), dtype=bool)
    for i, layer in enumerate(layers):
        chunk = masks[i * _LAYER_SIZE : (i + 1) * _LAYER_SIZE]
        labels = np.arange(1, len(chunk) + 1, dtype=np.uint8)
        np.equal(layer, labels[:, None, None], out=chunk)
    return torch.from_numpy(masks)


def layers_to_boxes(layers: Sequence[np.ndarray], num_segments: int) -> Boxes:
    """The tight boxes of augmented layers; zeros where a segment was cropped away."""
    boxes = []
    for layer in layers:
        chunk_size = min(num_segments - len(boxes), _LAYER_SIZE)
        boxes += _label_boxes(layer, chunk_size)
    return Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))


def _label_boxes(labels: np.ndarray, num_labels: int) -> list[tuple[int, int, int, int]]:
    """Boxes of the labels 1 to `num_labels`, as `BitMasks.get_bounding_boxes` but in one pass."""
    return [
        (0, 0, 0, 0)
        if found is None
        else (found[1].start, found[0].start, found[1].stop, found[0].stop)
        for found in find_objects(labels, num_labels)
    ]


# ---- instances ----


def read_annotations(
    annotations: Sequence[dict[str, Any]],
    image_size: tuple[int, int],
    file_name: str,
    num_classes: int | None = None,
) -> tuple[Tensor, list[Shape]]:
    """The objects of one image; crowds are no targets.

    Args:
        annotations: dicts with `category_id` (contiguous), `segmentation` (polygons, COCO RLE or a
            mask) and optionally `iscrowd`. Boxes are not read.
        image_size: (h, w).
        file_name: the image's, for errors.
        num_classes: if given, category ids lie in [0, num_classes).

    Returns:
        Classes (N,) int64 and shapes, which share no memory with `annotations`.

    Raises:
        ValueError: a segmentation is missing, malformed or of another size, or a category id is
            out of range.
    """
    classes, shapes = [], []
    for i, annotation in enumerate(annotations):
        if annotation.get("iscrowd", 0):
            continue
        # Detectron2's loader leaves out the id, so the position stands in for it.
        name = f"id {annotation['id']}" if "id" in annotation else f"number {i} (from 0)"
        where = f"{file_name}: annotation {name}"
        check_category(annotation["category_id"], num_classes, where)
        classes.append(annotation["category_id"])
        shapes.append(_read_shape(annotation.get("segmentation"), image_size, where, file_name))
    return torch.tensor(classes, dtype=torch.int64), shapes


def _read_shape(
    segmentation: Any, image_size: tuple[int, int], where: str, file_name: str
) -> Shape:
    if isinstance(segmentation, list) and segmentation:
        # float64 also for whole numbers, which would be truncated when they are scaled in place.
        polygons = [np.array(polygon, dtype=np.float64) for polygon in segmentation]
        for polygon in polygons:
            if polygon.ndim != 1 or polygon.size < 6 or polygon.size % 2:
                raise ValueError(
                    f"{where} has a polygon of {polygon.size} coordinates, shape {polygon.shape}; "
                    "a polygon is x1, y1, x2, y2, ... of at least 3 points."
                )
            if not np.isfinite(polygon).all():
                raise ValueError(f"{where} has a polygon with coordinates that are not finite.")
        return polygons
    if isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        check_size(segmentation["size"], image_size, f"{where}, an RLE,", file_name)
        try:
            return _decode_rle(segmentation)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where} has an RLE that cannot be decoded: {error}") from error
    if isinstance(segmentation, np.ndarray) and segmentation.ndim == 2:
        check_size(segmentation.shape, image_size, f"{where}, a mask,", file_name)
        return (segmentation != 0).astype(np.uint8)
    raise ValueError(
        f"{where} has the segmentation {str(segmentation)[:60]!r}; it must be a list of polygons, "
        "a COCO RLE (a dict with size and counts) or a mask (height, width)."
    )


def _decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """Mask (h, w) uint8 of an RLE, compressed (str or bytes) or not (list)."""
    if isinstance(rle["counts"], list):
        num_pixels = rle["size"][0] * rle["size"][1]
        if sum(rle["counts"]) != num_pixels:
            # pycocotools would leave the rest of the mask uninitialised.
            raise ValueError(f"it counts {sum(rle['counts'])} of {num_pixels} pixels")
        rle = mask_util.frPyObjects(rle, *rle["size"])
    return mask_util.decode(rle)


def transform_annotations(shapes: Sequence[Shape], transforms: T.TransformList) -> list[Shape]:
    """Apply to each object what was applied to the image. Polygons are changed in place.

    Args:
        shapes: from `read_annotations`.
        transforms: what was applied.

    Returns:
        The shapes in the augmented image; an object outside is an empty list or an empty mask.
    """
    transformed: list[Shape] = []
    for shape in shapes:
        if isinstance(shape, list):
            polygons = transforms.apply_polygons([polygon.reshape(-1, 2) for polygon in shape])
            transformed.append([polygon.reshape(-1) for polygon in polygons])
        else:
            # Crops may pad with 255, which is no part of the object.
            transformed.append((transforms.apply_segmentation(shape) == 1).view(np.uint8))
    return transformed


def annotation_boxes(shapes: Sequence[Shape]) -> Boxes:
    """The tight boxes of objects in pixels; of an empty object a box without area."""
    boxes = [
        _polygon_box(shape) if isinstance(shape, list) else _label_boxes(shape, 1)[0]
        for shape in shapes
    ]
    return Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))


def _polygon_box(polygons: list[np.ndarray]) -> tuple[float, float, float, float]:
    if not polygons:
        return 0, 0, 0, 0
    points = np.concatenate(polygons).reshape(-1, 2)
    return *points.min(axis=0), *points.max(axis=0)


def rasterise(shapes: Sequence[Shape], image_size: tuple[int, int]) -> Tensor:
    """Masks (N, H, W) bool of objects in an image of size (H, W)."""
    masks = np.empty((len(shapes), *image_size), dtype=bool)
    for mask, shape in zip(masks, shapes, strict=True):
        if isinstance(shape, list):
            # pycocotools goes column by column, and OpenCV turns that faster than NumPy does.
            columns = np.ascontiguousarray(polygons_to_bitmask(shape, *image_size).T)
            cv2.transpose(columns.view(np.uint8), dst=mask.view(np.uint8))
        else:
            mask[...] = shape
    return torch.from_numpy(masks)


def convert_coco_poly_to_mask(
    segmentations: list[list[np.ndarray]], height: int, width: int
) -> Tensor:
    """Masks (N, height, width) bool of N objects, each a list of polygons in pixels."""
    return BitMasks.from_polygon_masks(segmentations, height, width).tensor
