"""Semantic segmentation: one target for each class of the label map.

Shape letters: H W pixels of the augmented and padded image, N classes in it.
"""

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from torch import Tensor

from ..targets import build_instances, check_sem_seg, check_size, semantic_targets
from .base import ResizeCropDatasetMapper, read_image

__all__ = ["MaskFormerSemanticDatasetMapper"]


class MaskFormerSemanticDatasetMapper(ResizeCropDatasetMapper):
    """`INPUT.DATASET_MAPPER_NAME: mask_former_semantic`."""

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        augmentations: list,
        image_format: str,
        ignore_label: int,
        size_divisibility: int,
        num_classes: int | None = None,
    ) -> None:
        """
        Args:
            is_train: must be True when samples are made.
            augmentations: Detectron2 augmentations and transforms, applied in this order.
            image_format: "RGB" or "BGR".
            ignore_label: of pixels without a class.
            size_divisibility: height and width in pixels to pad to; 0 or less: no padding.
            num_classes: if given, labels and category ids are checked to lie below it.
        """
        super().__init__(is_train, augmentations, image_format, size_divisibility, num_classes)
        self.ignore_label = ignore_label

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """The constructor's arguments; the first training data set knows the ignore label."""
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN is empty: name at least one data set to train on.")
        name = cfg.DATASETS.TRAIN[0]
        ignore_label = MetadataCatalog.get(name).get("ignore_label")
        if ignore_label is None:
            raise ValueError(
                f"The metadata of data set {name!r} has no ignore_label, the label of pixels "
                f"without a class; set MetadataCatalog.get({name!r}).ignore_label, usually to 255."
            )
        return super().from_config(cfg, is_train) | {"ignore_label": ignore_label}

    def __call__(self, dataset_dict: dict) -> dict:
        """Make a training sample.

        Args:
            dataset_dict: record with `file_name` and `sem_seg_file_name`.

        Returns:
            The record with `image` (3, H, W) uint8, `sem_seg` (H, W) int64 and `instances`, which
            has `gt_classes` (N,) int64, ascending, and `gt_masks` (N, H, W) bool.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: a file is unreadable, or the annotation does not fit the image or config.
        """
        sample, image = self.load_training(dataset_dict)
        self.reject_annotations(dataset_dict)
        self.require(sample, "sem_seg_file_name", "semantic")
        sem_seg = self.load_sem_seg(sample, image.shape[:2], self.num_classes)

        image, sem_seg, _ = self.augment(image, sem_seg)
        padding = self.padding(image, sample["file_name"])
        sample["image"] = self.pad_image(image, padding)
        sample["sem_seg"] = self.pad_sem_seg(sem_seg, padding)
        classes, masks = semantic_targets(sample["sem_seg"].numpy(), self.ignore_label)
        sample["instances"] = build_instances(classes, masks)
        return sample

    @staticmethod
    def reject_annotations(record: dict) -> None:
        """Check that the record has no objects, which would be lost.

        Raises:
            ValueError: it has.
        """
        if "annotations" in record:
            raise ValueError(
                f"The record of {record['file_name']} has 'annotations', which this mapper does "
                "not read; use an instance mapper (INPUT.DATASET_MAPPER_NAME) or remove them."
            )

    def load_sem_seg(
        self, sample: dict, image_size: tuple[int, int], num_classes: int | None
    ) -> np.ndarray:
        """Read the label map; takes `sem_seg_file_name` out of `sample`.

        Args:
            sample: the copied record.
            image_size: (h, w) of its image.
            num_classes: if given, the labels are checked.

        Returns:
            (h, w) float64 labels.

        Raises:
            ValueError: the map does not have one channel, the size of the image or known labels.
        """
        file_name = sample.pop("sem_seg_file_name")
        sem_seg = read_image(file_name)
        if sem_seg.ndim != 2:
            raise ValueError(
                f"{file_name} has {sem_seg.shape[-1]} channels; a semantic map has one, the label."
            )
        check_size(sem_seg.shape, image_size, file_name, sample["file_name"])
        if num_classes is not None:
            check_sem_seg(sem_seg, num_classes, self.ignore_label, file_name)
        # Resizing knows no 16-bit labels; and with uint8 it would choose other pixels.
        return sem_seg.astype(np.float64)

    def pad_sem_seg(self, sem_seg: np.ndarray, padding: list[int]) -> Tensor:
        """Augmented labels as (H, W) int64, padded with the ignore label."""
        labels = torch.from_numpy(sem_seg.astype(np.int64))
        return self.pad(labels, padding, self.ignore_label)
