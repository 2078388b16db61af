"""Mean IoU by Detectron2's evaluator, from label images or from panoptic annotations.

K classes, H W pixels of an image.
"""

from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.utils.file_io import PathManager
from panopticapi.utils import rgb2id
from PIL import Image
from torch import Tensor

from .mask_encoding import encode_transposed

_IGNORE = 255


def build_semantic_evaluator(dataset_name: str, output_folder: str | None) -> SemSegEvaluator:
    """Mean IoU on a data set whose records have `sem_seg_file_name` or panoptic annotations."""
    records = DatasetCatalog.get(dataset_name)
    if all("sem_seg_file_name" in record for record in records):
        loading_fn = LabelReader(MetadataCatalog.get(dataset_name))
    else:
        loading_fn = PanopticToSemantic(records)
        dataset_name = _register_semantic_view(dataset_name, records)
    return SemanticEvaluator(
        dataset_name, distributed=True, output_dir=output_folder, sem_seg_loading_fn=loading_fn
    )


class SemanticEvaluator(SemSegEvaluator):
    """Detectron2's evaluator with the same results, faster on what a CPU has to do per image."""

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """
        Args:
            inputs: with `file_name`.
            outputs: with `sem_seg`, scores (K, H, W).
        """
        for of_image, output in zip(inputs, outputs, strict=True):
            labels = best_labels(output["sem_seg"]).astype(int)
            truth_file = self.input_file_to_gt_file[of_image["file_name"]]
            truth = self.sem_seg_loading_fn(truth_file, dtype=int)
            truth[truth == self._ignore_label] = self._num_classes
            self._conf_matrix += self._confusion(labels, truth)
            if self._compute_boundary_iou:
                # Of 8 bits also in their sums: Detectron2's figures, which wrap, are kept.
                boundaries = [self._mask_to_boundary(x.astype(np.uint8)) for x in (labels, truth)]
                self._b_conf_matrix += self._confusion(*boundaries)
            self._predictions.extend(self.encode_json_sem_seg(labels, of_image["file_name"]))

    def _confusion(self, labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
        pairs = (self._num_classes + 1) * labels.ravel() + truth.ravel()
        counts = np.bincount(pairs, minlength=self._conf_matrix.size)
        return counts.reshape(self._conf_matrix.shape)

    def encode_json_sem_seg(
        self, sem_seg: np.ndarray, input_file_name: str
    ) -> list[dict[str, Any]]:
        """The classes of a label map (H, W) as masks, in the COCO stuff format.

        Raises:
            ValueError: the metadata has no such class.
        """
        columns = cv2.transpose(sem_seg.astype(np.int32))
        dataset_ids = self._contiguous_id_to_dataset_id
        results = []
        for label in np.flatnonzero(np.bincount(sem_seg.ravel())).tolist():
            if dataset_ids is not None and label not in dataset_ids:
                raise ValueError(
                    f"Class {label} was predicted, which is not in the metadata of "
                    f"{self._dataset_name}."
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
    """The class (H, W) of the highest score, the first of several; as `argmax` over the classes.

    Args:
        scores: (K, H, W).
    """
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return scores.argmax(dim=0).cpu().numpy()
    # Class by class in rows of memory, in place of down all the classes at each pixel.
    scores = scores.numpy()
    highest = scores[0].copy()
    labels = np.zeros(highest.shape, dtype=np.min_scalar_type(len(scores) - 1))
    is_higher = np.empty(highest.shape, dtype=bool)
    for label, of_class in enumerate(scores[1:], start=1):
        np.greater(of_class, highest, out=is_higher)
        np.maximum(of_class, highest, out=highest)
        np.putmask(labels, is_higher, label)
    if np.isnan(highest).any():
        # No number is higher than NaN, which counts as the highest.
        return torch.from_numpy(scores).argmax(dim=0).numpy()
    return labels


def load_label_map(file_name: str, dtype: np.dtype | type | None = None) -> np.ndarray:
    """Read a label image (H, W), one class id a pixel."""
    with PathManager.open(file_name, "rb") as file:
        return np.array(Image.open(file), dtype=dtype)


class LabelReader:
    """Reads label images and checks them."""

    def __init__(self, metadata: Metadata) -> None:
        """
        Args:
            metadata: of the data set: `stuff_classes` and `ignore_label` are read.
        """
        self._num_classes = len(metadata.stuff_classes)
        self._ignore_label = metadata.ignore_label

    def __call__(self, file_name: str, dtype: np.dtype | type = int) -> np.ndarray:
        """The label map (H, W) of a file.

        Raises:
            ValueError: it is no label image, or has labels that are no class.
        """
        labels = load_label_map(file_name, dtype)
        if labels.ndim != 2:
            raise ValueError(
                f"{file_name} has shape {labels.shape}: a label image has one channel."
            )
        strange = (labels < 0) | (labels >= self._num_classes)
        strange &= labels != self._ignore_label
        if strange.any():
            raise ValueError(
                f"{file_name} has labels {np.unique(labels[strange])[:5].tolist()}, but the "
                f"classes are 0 to {self._num_classes - 1}, and {self._ignore_label} is ignored."
            )
        return labels


class PanopticToSemantic:
    """Reads semantic truth out of panoptic PNGs: each segment's class, 255 where there is none."""

    def __init__(self, records: list[dict]) -> None:
        """
        Args:
            records: with `pan_seg_file_name` and `segments_info` in contiguous class ids.
        """
        self._classes = {
            record["pan_seg_file_name"]: {
                s["id"]: s["category_id"] for s in record["segments_info"]
            }
            for record in records
        }

    def __call__(self, file_name: str, dtype: np.dtype | type = int) -> np.ndarray:
        """The label map (H, W) of a panoptic PNG."""
        segment_ids = rgb2id(load_label_map(file_name))
        semantic = np.full(segment_ids.shape, _IGNORE, dtype=dtype)
        for segment_id, class_id in self._classes[file_name].items():
            semantic[segment_ids == segment_id] = class_id
        return semantic


def _register_semantic_view(dataset_name: str, records: list[dict]) -> str:
    """Register the panoptic data set under a second name, as the semantic evaluator wants it.

    Raises:
        ValueError: thing and stuff classes overlap, or `stuff_classes` does not name all classes.
    """
    view = f"{dataset_name}/semantic_from_panoptic"
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
            f"Semantic segmentation cannot be evaluated on {dataset_name}: it has no "
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
