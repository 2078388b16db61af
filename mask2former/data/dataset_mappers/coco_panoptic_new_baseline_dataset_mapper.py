"""Panoptic segmentation with large-scale jittering: one target for each segment.

Shape letters: H W pixels of the jittered square, N segments.
"""

from ..augmentations import build_transform_gen
from ..label_maps import layers_to_boxes, pack_layers, transform_layers
from ..targets import build_instances
from .base import LargeScaleJitterDatasetMapper

__all__ = ["COCOPanopticNewBaselineDatasetMapper", "build_transform_gen"]


class COCOPanopticNewBaselineDatasetMapper(LargeScaleJitterDatasetMapper):
    """`INPUT.DATASET_MAPPER_NAME: coco_panoptic_lsj`."""

    def __call__(self, dataset_dict: dict) -> dict:
        """Make a sample.

        Args:
            dataset_dict: record with `file_name` and, for training, `pan_seg_file_name` and
                `segments_info`.

        Returns:
            The record with `image` (3, H, W) uint8. For training also `instances`: in the order of
            `segments_info` without crowds `gt_classes` (N,) int64, `gt_masks` (N, H, W) bool and
            `gt_boxes`. Segments that were cropped away stay, with an empty mask.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: a file is unreadable, or the annotation does not fit the image or config.
        """
        sample, image = self.load(dataset_dict)
        if not self.is_train:
            sample["image"], _, _ = self.augment(image)
            return sample

        classes, layers = self.load_pan_seg(sample, image.shape[:2])
        sample["image"], _, transforms = self.augment(image)
        layers = transform_layers(layers, transforms)
        masks = pack_layers(layers, len(classes), tuple(sample["image"].shape[-2:]))
        boxes = layers_to_boxes(layers, len(classes))
        sample["instances"] = build_instances(classes, masks, boxes)
        return sample
