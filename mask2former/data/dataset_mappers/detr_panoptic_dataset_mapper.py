"""Panoptic segmentation with DETR's augmentation, as MaskFormer on COCO: one target a segment.

Shape letters: H W pixels of the augmented image, N segments.
"""

from typing import Any, ClassVar

import numpy as np
from detectron2.config import CfgNode, configurable

from ..augmentations import build_detr_crop_gen, build_detr_gen
from ..formats.bands import image_format_of
from .base import BaseDatasetMapper, accepted_arguments, label_arguments, panoptic_sample
from .build import register_mapper

__all__ = ["DETRPanopticDatasetMapper"]


@register_mapper("detr_panoptic")
class DETRPanopticDatasetMapper(BaseDatasetMapper):
    """`INPUT.DATASET_MAPPER_NAME: detr_panoptic`.

    Half of the images are flipped. Half are resized; the others are resized to a random short side,
    cropped and resized again.

    Attributes:
        crop_gen: augmentations before the last one of `tfm_gens`, for half of the images; None:
            never.
    """

    unread_keys: ClassVar[dict[str, Any]] = {
        "INPUT.RANDOM_FLIP": "horizontal",
        "INPUT.COLOR_AUG_SSD": False,
        "INPUT.SIZE_DIVISIBILITY": -1,
        "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": 1.0,
    }

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        crop_gen: list | None,
        tfm_gens: list,
        image_format: str,
        num_classes: int | None = None,
        ignore_unlabelled: bool = False,
    ) -> None:
        """
        Args:
            is_train: whether to make targets.
            crop_gen: Detectron2 augmentations to insert, see the attribute.
            tfm_gens: Detectron2 augmentations and transforms, applied in this order.
            image_format: "RGB" or "BGR".
            num_classes: if not None, category ids must be below it.
            ignore_unlabelled: see `BaseDatasetMapper`.
        """
        super().__init__(is_train, tfm_gens, image_format, num_classes, ignore_unlabelled)
        self.crop_gen = crop_gen

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """The constructor's arguments from the config."""
        crops = is_train and cfg.INPUT.CROP.ENABLED
        return accepted_arguments(
            cls,
            {
                "is_train": is_train,
                "crop_gen": build_detr_crop_gen(cfg) if crops else None,
                "tfm_gens": build_detr_gen(cfg, is_train),
                "image_format": image_format_of(cfg),
                **label_arguments(cfg),
            },
        )

    def __call__(self, dataset_dict: dict) -> dict:
        """Make a sample; see `panoptic_sample` for arguments, result and errors."""
        augmentations = self.tfm_gens
        if self.crop_gen is not None and np.random.rand() <= 0.5:
            augmentations = [*augmentations[:-1], *self.crop_gen, *augmentations[-1:]]
        return panoptic_sample(self, augmentations, dataset_dict)
