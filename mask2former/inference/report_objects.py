"""Objects of a report, scaled to its size: of predictions and of ground truth.

h w: size of an image in the report, H W: of the image itself, in pixels.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from panopticapi.utils import rgb2id

from ..data.formats.images import read_image, read_panoptic_png
from ..data.targets import rasterise, read_annotations
from ..evaluation.mask_encoding import encode_transposed
from .html_report import ReportObject
from .result import Result

UNITS = {"panoptic": "segment", "instance": "instance", "semantic": "region"}


def predicted_objects(
    result: Result, task: str, target: tuple[int, int], *, min_score: float = 0.0
) -> list[ReportObject]:
    """What a model predicts for an image.

    Args:
        result: of the image, with this task.
        task: "panoptic", "instance" or "semantic", whose objects are the classes in the map.
        target: (h, w).
        min_score: instances and segments of a lower score are left out.
    """
    size = result.image_size
    num_pixels = size[0] * size[1]
    if task == "instance":
        assert result.instances is not None
        masks = result.instances.masks
        return [
            ReportObject(
                label,
                report_mask(crop, (int(x), int(y)), size, target),
                np.count_nonzero(crop) / num_pixels,
                score,
            )
            for crop, (x, y), label, score in zip(
                masks.crops,
                masks.offsets,
                result.instances.labels.tolist(),
                result.instances.scores.tolist(),
                strict=True,
            )
            if score >= min_score
        ]
    if task == "panoptic":
        assert result.panoptic is not None
        segments = {
            one.id: one
            for one in result.panoptic.segments
            if one.score is None or one.score >= min_score
        }
        counts = _map_masks(result.panoptic.segment_ids, list(segments), target)
        return [
            ReportObject(segments[i].label, text, segments[i].area / num_pixels, segments[i].score)
            for i, text in counts.items()
        ]
    assert result.semantic is not None
    return _classes_of_map(result.semantic, target)


class GroundTruth:
    """The ground truth of a registered data set, by file name."""

    def __init__(self, dataset_name: str) -> None:
        """
        Args:
            dataset_name: as it is registered.

        Raises:
            ValueError: it is not registered, or damaged.
            FileNotFoundError: its files are missing.
        """
        if dataset_name not in DatasetCatalog:
            raise ValueError(f"data set {dataset_name!r} is not registered")
        self.name = dataset_name
        self._ignore_label = MetadataCatalog.get(dataset_name).get("ignore_label", 255)
        self._by_path: dict[str, dict[str, Any]] = {}
        self._by_name: dict[str, dict[str, Any] | None] = {}
        for record in DatasetCatalog.get(dataset_name):
            file_name = record["file_name"]
            self._by_path[os.path.realpath(file_name)] = record
            base = os.path.basename(file_name)
            # Several images of that name: only the path can tell.
            self._by_name[base] = None if base in self._by_name else record

    def find(self, path: Path, *, by_name: bool = True) -> dict[str, Any] | None:
        """The record of an image: of the same file, or else of the only one of its name.

        Args:
            path: of the image.
            by_name: False: of the same file only.
        """
        record = self._by_path.get(os.path.realpath(path))
        return self._by_name.get(path.name) if record is None and by_name else record

    def image_ids(self) -> list[Any]:
        """Ids of all images that have one."""
        return [r["image_id"] for r in self._by_path.values() if "image_id" in r]

    def objects(
        self, record: Mapping[str, Any], task: str, size: tuple[int, int], target: tuple[int, int]
    ) -> list[ReportObject] | None:
        """The objects of a record, of its task if it has that one, or else of another.

        Args:
            record: of the data set.
            task: "panoptic", "instance" or "semantic".
            size: (H, W) of the image.
            target: (h, w).

        Returns:
            None if the record has no ground truth.

        Raises:
            FileNotFoundError, ValueError: a file or an annotation cannot be read, or is of another
                size.
        """
        has_instances = record.get("annotations") is not None
        has_panoptic = bool(record.get("pan_seg_file_name"))
        has_semantic = bool(record.get("sem_seg_file_name"))
        if has_semantic and (task == "semantic" or not (has_panoptic or has_instances)):
            labels = read_image(record["sem_seg_file_name"])
            _require_size(labels, size, record["sem_seg_file_name"])
            return _classes_of_map(labels, target, self._ignore_label)
        if has_panoptic and not (task == "instance" and has_instances):
            return _panoptic_gt(record, size, target, things_only=task == "instance")
        if has_instances:
            return _instance_gt(record, size, target)
        return None


def _panoptic_gt(
    record: Mapping[str, Any], size: tuple[int, int], target: tuple[int, int], *, things_only: bool
) -> list[ReportObject]:
    ids = rgb2id(read_panoptic_png(record["pan_seg_file_name"]))
    _require_size(ids, size, record["pan_seg_file_name"])
    segments = {
        int(one["id"]): one
        for one in record["segments_info"]
        if one.get("isthing", True) or not things_only
    }
    areas = dict(
        zip(*(values.tolist() for values in np.unique(ids, return_counts=True)), strict=True)
    )
    return [
        ReportObject(
            int(segments[i]["category_id"]),
            text,
            areas[i] / ids.size,
            is_crowd=bool(segments[i].get("iscrowd", 0)),
        )
        for i, text in _map_masks(ids, list(segments), target).items()
    ]


def _instance_gt(
    record: Mapping[str, Any], size: tuple[int, int], target: tuple[int, int]
) -> list[ReportObject]:
    objects = []
    for annotation in record["annotations"]:
        # `read_annotations` leaves crowds out.
        plain = annotation | {"iscrowd": 0}
        labels, shapes = read_annotations([plain], size, record["file_name"])
        mask = rasterise(shapes, size)[0].numpy()
        objects.append(
            ReportObject(
                int(labels[0]),
                report_mask(mask, (0, 0), size, target),
                float(mask.mean()),
                is_crowd=bool(annotation.get("iscrowd", 0)),
            )
        )
    return objects


def _classes_of_map(
    labels: np.ndarray, target: tuple[int, int], ignore_label: int = -1
) -> list[ReportObject]:
    values, areas = np.unique(labels, return_counts=True)
    shares = {
        int(value): area / labels.size
        for value, area in zip(values, areas, strict=True)
        if value != ignore_label
    }
    masks = _map_masks(labels, list(shares), target)
    return [ReportObject(value, text, shares[value]) for value, text in masks.items()]


def _require_size(array: np.ndarray, size: tuple[int, int], file_name: str) -> None:
    if array.shape[:2] != size:
        raise ValueError(
            f"{file_name} has (height, width) {array.shape[:2]}, but its image has {size}"
        )


def _map_masks(ids: np.ndarray, values: Sequence[int], target: tuple[int, int]) -> dict[int, str]:
    """Run lengths at the size of the report of the pixels (H, W) of each value that occurs."""
    size = ids.shape[0], ids.shape[1]
    rows, _ = _sampled(0, size[0], size[0], target[0])
    columns, _ = _sampled(0, size[1], size[1], target[1])
    small = cv2.transpose(ids[rows[:, None], columns].astype(np.int32))  # (w, h)
    sampled = set(np.unique(small).tolist())
    masks = {}
    for value in values:
        if value in sampled:
            masks[value] = encode_transposed((small == value).view(np.uint8))["counts"]
        elif (mask := ids == value).any():
            masks[value] = report_mask(mask, (0, 0), size, target)
    return masks


def report_mask(
    mask: np.ndarray, offset: tuple[int, int], size: tuple[int, int], target: tuple[int, int]
) -> str:
    """Scale a mask to the size of the report and encode it.

    A mask keeps at least one pixel.

    Args:
        mask: bool, a crop of the full-size mask.
        offset: (x, y) of the crop in the image.
        size: (H, W) of the image.
        target: (h, w) in the report.

    Returns:
        Compressed COCO run lengths.
    """
    small = np.zeros(target[::-1], np.uint8)  # (w, h), as run lengths go
    if mask.any():
        rows, y = _sampled(offset[1], mask.shape[0], size[0], target[0])
        columns, x = _sampled(offset[0], mask.shape[1], size[1], target[1])
        part = mask[rows[:, None], columns].astype(np.uint8)
        if part.any():
            small[x : x + len(columns), y : y + len(rows)] = cv2.transpose(part)
        else:  # too thin to be sampled
            points = np.argwhere(mask)
            point = points[len(points) // 2]
            row = (offset[1] + point[0]) * target[0] // size[0]
            small[(offset[0] + point[1]) * target[1] // size[1], row] = 1
    return encode_transposed(small)["counts"]


def _sampled(start: int, length: int, full: int, target: int) -> tuple[np.ndarray, int]:
    """Indices into a crop of nearest-neighbour samples, and the target index of the first."""
    # The centre of pixel i of the target is in pixel (2 i + 1) full / (2 target) of the image.
    centres = (2 * np.arange(target) + 1) * full // (2 * target)
    first, last = np.searchsorted(centres, (start, start + length))
    return centres[first:last] - start, int(first)
