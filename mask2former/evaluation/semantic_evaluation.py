"""Mean IoU by Detectron2's evaluator, from label images or from panoptic annotations.

K classes, H W pixels of an image.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.utils import comm
from torch import Tensor

from ..data.formats.images import read_image
from ..data.label_maps import check_whole
from .class_tables import semantic_rows, write_class_table
from .image_statistics import write_semantic_statistics
from .mask_encoding import encode_transposed
from .panoptic_quality import read_segment_ids
from .results import WritesPredictions

_IGNORE = 255
_VIEW = "/semantic_from_panoptic"


def build_semantic_evaluator(dataset_name: str, output_folder: str | None) -> SemSegEvaluator:
    """Build the mIoU evaluator of a data set with `sem_seg_file_name` or panoptic annotations."""
    records = DatasetCatalog.get(dataset_name)
    loading_fn: Callable[..., np.ndarray]
    if all("sem_seg_file_name" in record for record in records):
        loading_fn = LabelReader(MetadataCatalog.get(dataset_name))
    else:
        loading_fn = PanopticToSemantic(records)
        dataset_name = _register_semantic_view(dataset_name, records)
    return SemanticEvaluator(
        dataset_name, distributed=True, output_dir=output_folder, sem_seg_loading_fn=loading_fn
    )


class SemanticEvaluator(WritesPredictions, SemSegEvaluator):
    """Detectron2's evaluator with faster per-image CPU work and the same results."""

    def reset(self) -> None:
        super().reset()
        # By file: (predicted class, gt class, pixels), the counts of its confusion matrix.
        self._images: dict[str, list[list[int]]] = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """
        Args:
            inputs: with `file_name`.
            outputs: with `sem_seg`, scores (K, H, W).
        """
        for image, output in zip(inputs, outputs, strict=True):
            labels = best_labels(output["sem_seg"]).astype(int)
            gt_file = self.input_file_to_gt_file[image["file_name"]]
            gt = self.sem_seg_loading_fn(gt_file, dtype=int)
            gt[gt == self._ignore_label] = self._num_classes
            confusion = self._confusion(labels, gt)
            self._conf_matrix += confusion
            if self._output_dir:
                self._images[image["file_name"]] = self._known_pixels(confusion)
            if self._compute_boundary_iou:
                # 8-bit sums that wrap around, for the same values as Detectron2.
                boundaries = [self._mask_to_boundary(x.astype(np.uint8)) for x in (labels, gt)]
                self._b_conf_matrix += self._confusion(*boundaries)
            self._predictions.extend(self.encode_json_sem_seg(labels, image["file_name"]))

    def evaluate(self) -> OrderedDict | None:
        """Return {"sem_seg": {metric: value}} in percent, on the main worker.

        Raises:
            WriteError: a file of the output folder cannot be written.
        """
        shards = comm.gather(self._images) if self._distributed else [self._images]
        results = super().evaluate()
        if results is not None:
            self._write_tables({name: rows for shard in shards for name, rows in shard.items()})
            self.write_predictions("sem_seg_predictions.json", self._predictions)
            self.write_predictions("sem_seg_evaluation.pth", results["sem_seg"])
        return results

    def _write_tables(self, images: dict[str, list[list[int]]]) -> None:
        """Write what explains the averages: classes and images."""
        name = self._dataset_name.removesuffix(_VIEW)
        rows = semantic_rows(self._conf_matrix[:-1, :-1], self._class_names)
        write_class_table(self._folder, name, "sem_seg", rows)
        if self._folder:
            write_semantic_statistics(self._folder, name, self._class_names, images)

    @staticmethod
    def _known_pixels(confusion: np.ndarray) -> list[list[int]]:
        known = confusion[:-1, :-1]
        predicted, labels = np.nonzero(known)
        return np.stack([predicted, labels, known[predicted, labels]], 1).tolist()

    def _confusion(self, labels: np.ndarray, gt: np.ndarray) -> np.ndarray:
        pairs = (self._num_classes + 1) * labels.ravel() + gt.ravel()
        counts = np.bincount(pairs, minlength=self._conf_matrix.size)
        return counts.reshape(self._conf_matrix.shape)

    def encode_json_sem_seg(
        self, sem_seg: np.ndarray, input_file_name: str
    ) -> list[dict[str, Any]]:
        """Encode a label map (H, W) as one mask per class, in the COCO stuff format.

        Raises:
            ValueError: a class is not in the metadata.
        """
        columns = cv2.transpose(sem_seg.astype(np.int32))
        dataset_ids = self._contiguous_id_to_dataset_id
        results = []
        for label in np.flatnonzero(np.bincount(sem_seg.ravel())).tolist():
            if dataset_ids is not None and label not in dataset_ids:
                raise ValueError(
                    f"Predicted class {label} is not in the metadata of {self._dataset_name}."
                )
            results.append(
                {
                    "file_name": input_file_name,
                    "category_id": label if dataset_ids is None else dataset_ids[label],
                    "segmentation": encode_transposed((columns == label).view(np.uint8)),
                }
            )
        return results


def best_labels(scores: Tensor) -> np.ndarray:
    """Return the class (H, W) of the highest score, the first in case of ties, like `argmax`.

    Args:
        scores: (K, H, W).
    """
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return scores.argmax(dim=0).cpu().numpy()
    # Go class by class through contiguous memory, which is faster than pixel by pixel.
    score_maps = scores.numpy()
    highest = score_maps[0].copy()
    labels = np.zeros(highest.shape, dtype=np.min_scalar_type(len(score_maps) - 1))
    is_higher = np.empty(highest.shape, dtype=bool)
    for label, score_map in enumerate(score_maps[1:], start=1):
        np.greater(score_map, highest, out=is_higher)
        np.maximum(score_map, highest, out=highest)
        np.putmask(labels, is_higher, label)
    if np.isnan(highest).any():
        # `argmax` treats NaN as the highest score, which `greater` does not.
        return scores.argmax(dim=0).numpy()
    return labels


def load_label_map(file_name: str, dtype: np.dtype | type | None = None) -> np.ndarray:
    """Read a label image (H, W) with one class id per pixel."""
    return np.array(read_image(file_name), dtype=dtype)


class LabelReader:
    """Reads label images and checks them."""

    def __init__(self, metadata: Metadata) -> None:
        """
        Args:
            metadata: of the data set, with `stuff_classes` and `ignore_label`.
        """
        self._num_classes = len(metadata.stuff_classes)
        self._ignore_label = metadata.ignore_label

    def __call__(self, file_name: str, dtype: np.dtype | type = int) -> np.ndarray:
        """Read the label map (H, W) of a file.

        Raises:
            ValueError: the file is not a label image, or has labels outside the class range.
        """
        labels = load_label_map(file_name)
        check_whole(labels, file_name)
        labels = labels.astype(dtype)
        if labels.ndim != 2:
            raise ValueError(
                f"{file_name} has shape {labels.shape}: a label image has one channel."
            )
        invalid = (labels < 0) | (labels >= self._num_classes)
        invalid &= labels != self._ignore_label
        if invalid.any():
            raise ValueError(
                f"{file_name} has labels {np.unique(labels[invalid])[:5].tolist()}; valid are "
                f"0 to {self._num_classes - 1} and the ignore label {self._ignore_label}."
            )
        return labels


class PanopticToSemantic:
    """Reads semantic labels from panoptic PNGs: the class of each segment, 255 for void."""

    def __init__(self, records: list[dict]) -> None:
        """
        Args:
            records: with `pan_seg_file_name` and `segments_info` with contiguous class ids.
        """
        self._classes = {
            record["pan_seg_file_name"]: {
                s["id"]: s["category_id"] for s in record["segments_info"]
            }
            for record in records
        }

    def __call__(self, file_name: str, dtype: np.dtype | type = int) -> np.ndarray:
        """Read the label map (H, W) of a panoptic PNG."""
        segment_ids = read_segment_ids(file_name)
        semantic = np.full(segment_ids.shape, _IGNORE, dtype=dtype)
        for segment_id, class_id in self._classes[file_name].items():
            semantic[segment_ids == segment_id] = class_id
        return semantic


def _register_semantic_view(dataset_name: str, records: list[dict]) -> str:
    """Register a panoptic data set under a second name, in the form of a semantic data set.

    Raises:
        ValueError: thing and stuff ids overlap, or `stuff_classes` does not name all classes.
    """
    view = f"{dataset_name}{_VIEW}"
    if view in DatasetCatalog.list():
        return view
    metadata: Metadata = MetadataCatalog.get(dataset_name)
    to_contiguous = {
        **metadata.stuff_dataset_id_to_contiguous_id,
        **metadata.thing_dataset_id_to_contiguous_id,
    }
    num_classes = len(metadata.stuff_classes)
    if sorted(to_contiguous.values()) != list(range(num_classes)):
        raise ValueError(
            f"Semantic segmentation cannot be evaluated on {dataset_name}: its records have no "
            "sem_seg_file_name, and its panoptic classes do not match its metadata: stuff_classes "
            f"has {num_classes} names, the contiguous ids are {sorted(to_contiguous.values())}."
        )
    keys = {"file_name": "file_name", "sem_seg_file_name": "pan_seg_file_name"}
    view_records = [{new: record[old] for new, old in keys.items()} for record in records]
    DatasetCatalog.register(view, lambda: view_records)
    MetadataCatalog.get(view).set(
        stuff_classes=metadata.stuff_classes,
        stuff_dataset_id_to_contiguous_id=to_contiguous,
        ignore_label=_IGNORE,
    )
    return view
