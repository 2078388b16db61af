"""Instance segmentation with large-scale jittering: one target for each visible object.

Shape letters: H W pixels of the jittered square, N objects.
"""

from typing import Any

import torch
from detectron2.config import CfgNode

from ..augmentations import build_transform_gen
from ..lazy_augmentation import padding_mask
from ..targets import (
    annotation_boxes,
    build_instances,
    convert_coco_poly_to_mask,
    crowd_region,
    pack_shapes,
    read_annotations,
    read_crowds,
    transform_annotations,
)
from ..tiles import record_annotations
from .base import LargeScaleJitterDatasetMapper, augment_image, load_record, lsj_arguments
from .build import register_mapper

__all__ = [
    "COCOInstanceNewBaselineDatasetMapper",
    "build_transform_gen",
    "convert_coco_poly_to_mask",
]


@register_mapper("coco_instance_lsj")
class COCOInstanceNewBaselineDatasetMapper(LargeScaleJitterDatasetMapper):
    """`INPUT.DATASET_MAPPER_NAME: coco_instance_lsj`."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """The constructor's arguments from the config."""
        # `build_transform_gen` is looked up in this module, where other projects replace it.
        return lsj_arguments(cls, cfg, is_train, build_transform_gen(cfg, is_train))

    def __call__(self, dataset_dict: dict) -> dict:
        """Make a sample.

        Args:
            dataset_dict: record with `file_name` and, for training, `annotations`: polygons, RLEs
                or masks.

        Returns:
            The record without `annotations`, with `image` (3, H, W) uint8 and `padding_mask`
            (H, W) bool, True outside the image. For training on a record with `annotations` also
            `instances`, with `gt_classes` (N,) int64, `gt_masks` (N, H, W) bool and `gt_boxes`, in
            the order of the annotations; crowds and objects outside the crop are dropped. With
            `ignore_unlabelled` also `ignored` (H, W) bool: crowds and padding.

        Raises:
            FileNotFoundError: the image does not exist.
            ValueError: it is unreadable, or an annotation does not fit the image or config.
        """
        sample, image = load_record(dataset_dict, self.img_format)
        image_size = image.shape[:2]
        # A subclass may remove the annotations to make its own targets.
        has_targets = self.is_train and "annotations" in dataset_dict
        if has_targets:
            annotations = record_annotations(dataset_dict)
            classes, shapes = read_annotations(
                annotations, image_size, sample["file_name"], self.num_classes
            )
            crowds = read_crowds(annotations, image_size, sample["file_name"])

        sample["image"], _, transforms = augment_image(self.tfm_gens, image)
        sample["padding_mask"] = torch.from_numpy(padding_mask(transforms, image_size))
        if not has_targets:
            return sample

        output_size = tuple(sample["image"].shape[-2:])
        shapes = transform_annotations(shapes, transforms)
        boxes = annotation_boxes(shapes)
        visible = boxes.nonempty(threshold=1e-5)
        masks = pack_shapes(
            [shapes[i] for i in visible.nonzero().flatten().tolist()],
            output_size,
        )
        sample["instances"] = build_instances(classes[visible], masks, boxes[visible])
        if self.ignore_unlabelled:
            crowd_masks = pack_shapes(transform_annotations(crowds, transforms), output_size)
            sample["ignored"] = crowd_region(crowd_masks, masks) | sample["padding_mask"]
        return sample
