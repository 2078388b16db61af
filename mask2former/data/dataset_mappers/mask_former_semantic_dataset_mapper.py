"""Semantic segmentation: one target for each class of the label map.

Shape letters: H W pixels of the augmented and padded image, N classes in it.
"""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog

from ..targets import build_instances, semantic_targets
from .base import (
    ResizeCropDatasetMapper,
    augment_image,
    load_record,
    load_sem_seg,
    pad_image,
    pad_sem_seg,
    padding,
    reject_annotations,
    require_key,
    require_training,
)
from .build import register_mapper

__all__ = ["MaskFormerSemanticDatasetMapper"]


@register_mapper("mask_former_semantic")
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
        ignore_unlabelled: bool = False,
    ) -> None:
        """
        Args:
            is_train: must be True to make samples.
            augmentations: Detectron2 augmentations and transforms, applied in this order.
            image_format: "RGB" or "BGR".
            ignore_label: label of pixels without a class.
            size_divisibility: height and width in pixels to pad to; 0 or less: no padding.
            num_classes: if not None, labels and category ids must be below it.
            ignore_unlabelled: see `BaseDatasetMapper`.
        """
        super().__init__(
            is_train,
            augmentations,
            image_format,
            size_divisibility,
            num_classes,
            ignore_unlabelled,
        )
        self.ignore_label = ignore_label

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """The constructor's arguments; the ignore label is that of the first training data set."""
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
            has `gt_classes` (N,) int64, ascending, and `gt_masks` (N, H, W) bool. With
            `ignore_unlabelled` also `ignored` (H, W) bool, where `sem_seg` is the ignore label.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: a file is unreadable, or the annotation does not fit the image or config.
        """
        require_training(self)
        sample, pixels = load_record(dataset_dict, self.img_format)
        reject_annotations(dataset_dict)
        require_key(sample, "sem_seg_file_name", "semantic", self)
        sem_seg = load_sem_seg(sample, pixels.shape[:2], self.num_classes, self.ignore_label)

        image, sem_seg, _ = augment_image(self.tfm_gens, pixels, sem_seg)
        pad = padding(image, self.size_divisibility, sample["file_name"])
        sample["image"] = pad_image(image, pad)
        sample["sem_seg"] = pad_sem_seg(sem_seg, pad, self.ignore_label)
        classes, masks = semantic_targets(sample["sem_seg"].numpy(), self.ignore_label)
        sample["instances"] = build_instances(classes, masks)
        if self.ignore_unlabelled:
            sample["ignored"] = sample["sem_seg"] == self.ignore_label
        return sample
