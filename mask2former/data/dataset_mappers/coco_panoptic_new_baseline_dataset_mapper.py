"""Panoptic segmentation with large-scale jittering: one target for each segment.

Shape letters: H W pixels of the jittered square, N segments.
"""

from typing import Any

from detectron2.config import CfgNode

from ..augmentations import build_transform_gen
from .base import LargeScaleJitterDatasetMapper, lsj_arguments, panoptic_sample
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
        return panoptic_sample(self, self.tfm_gens, dataset_dict)
