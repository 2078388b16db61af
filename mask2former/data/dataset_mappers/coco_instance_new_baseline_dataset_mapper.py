"""Instance segmentation with large-scale jittering: one target for each visible object.

Shape letters: H W pixels of the jittered square, N objects.
"""

import torch

from ..augmentations import build_transform_gen
from ..fused_augmentation import padding_mask
from ..targets import (
    annotation_boxes,
    build_instances,
    convert_coco_poly_to_mask,
    pack_shapes,
    read_annotations,
    transform_annotations,
)
from .base import LargeScaleJitterDatasetMapper

__all__ = [
    "COCOInstanceNewBaselineDatasetMapper",
    "build_transform_gen",
    "convert_coco_poly_to_mask",
]


class COCOInstanceNewBaselineDatasetMapper(LargeScaleJitterDatasetMapper):
    """`INPUT.DATASET_MAPPER_NAME: coco_instance_lsj`."""

    def __call__(self, dataset_dict: dict) -> dict:
        """Make a sample.

        Args:
            dataset_dict: record with `file_name` and, for training, `annotations`: polygons, RLEs
                or masks.

        Returns:
            The record without `annotations`, with `image` (3, H, W) uint8 and `padding_mask`
            (H, W) bool, True where there is no image. For training also `instances`: of the
            objects that are no crowd and were not cropped away, in the order of the annotations,
            `gt_classes` (N,) int64, `gt_masks` (N, H, W) bool and `gt_boxes`.

        Raises:
            FileNotFoundError: the image does not exist.
            ValueError: it is unreadable, or an annotation does not fit the image or config.
        """
        sample, image = self.load(dataset_dict)
        image_size = image.shape[:2]
        if self.is_train:
            self.require(dataset_dict, "annotations", "instance")
            classes, shapes = read_annotations(
                dataset_dict["annotations"], image_size, sample["file_name"], self.num_classes
            )

        sample["image"], _, transforms = self.augment(image)
        sample["padding_mask"] = torch.from_numpy(padding_mask(transforms, image_size))
        if not self.is_train:
            return sample

        shapes = transform_annotations(shapes, transforms)
        boxes = annotation_boxes(shapes)
        visible = boxes.nonempty(threshold=1e-5)
        masks = pack_shapes(
            [shapes[i] for i in visible.nonzero().flatten().tolist()],
            tuple(sample["image"].shape[-2:]),
        )
        sample["instances"] = build_instances(classes[visible], masks, boxes[visible])
        return sample
