"""Panoptic segmentation with large-scale jittering: one target for each segment.

Shape letters: H W pixels of the jittered square, N segments.
"""

import copy
from typing import Any

from detectron2.config import CfgNode

from ..augmentations import build_transform_gen
from ..label_maps import layers_to_boxes, pack_layers, transform_layers
from ..targets import build_instances
from .base import (
    LargeScaleJitterDatasetMapper,
    augment_image,
    load_pan_seg,
    load_record,
    lsj_arguments,
)
from .build import register_mapper

__all__ = ["COCOPanopticNewBaselineDatasetMapper", "build_transform_gen"]


@register_mapper("coco_panoptic_lsj")
class COCOPanopticNewBaselineDatasetMapper(LargeScaleJitterDatasetMapper):
    """`INPUT.DATASET_MAPPER_NAME: coco_panoptic_lsj`."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """The constructor's arguments from the config."""
        # `build_transform_gen` is looked up in this module, where other projects replace it.
        return lsj_arguments(cls, cfg, is_train, build_transform_gen(cfg, is_train))

    def __call__(self, dataset_dict: dict) -> dict:
        """Make a sample.

        Args:
            dataset_dict: record with `file_name` and, for training, `pan_seg_file_name` and
                `segments_info`.

        Returns:
            The record with `image` (3, H, W) uint8. For training on a record with
            `pan_seg_file_name` also `instances`, with `gt_classes` (N,) int64, `gt_masks`
            (N, H, W) bool and `gt_boxes`, in the order of `segments_info` without crowds. Segments
            outside the crop are kept with an empty mask.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: a file is unreadable, or the annotation does not fit the image or config.
        """
        sample, image = load_record(dataset_dict, self.img_format)
        if self.is_train and "annotations" in dataset_dict:
            # Not read here, but kept for subclasses.
            sample["annotations"] = copy.deepcopy(dataset_dict["annotations"])
        if not self.is_train or "pan_seg_file_name" not in sample:
            sample["image"], _, _ = augment_image(self.tfm_gens, image)
            return sample

        classes, layers = load_pan_seg(sample, image.shape[:2], self)
        sample["image"], _, transforms = augment_image(self.tfm_gens, image)
        layers = transform_layers(layers, transforms)
        masks = pack_layers(layers, len(classes), tuple(sample["image"].shape[-2:]))
        boxes = layers_to_boxes(layers, len(classes))
        sample["instances"] = build_instances(classes, masks, boxes)
        return sample
