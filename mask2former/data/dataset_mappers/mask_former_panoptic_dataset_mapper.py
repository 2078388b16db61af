"""Panoptic segmentation from panoptic PNGs: one target for each segment.

Shape letters: H W pixels of the augmented and padded image, N segments.
"""

from detectron2.data import transforms as T

from ..label_maps import layers_to_boxes, pack_layers, transform_layers
from ..targets import build_instances
from .base import (
    augment_image,
    load_pan_seg,
    load_record,
    load_sem_seg,
    pad_image,
    pad_sem_seg,
    padding,
    reject_annotations,
    require_training,
)
from .build import register_mapper
from .mask_former_semantic_dataset_mapper import MaskFormerSemanticDatasetMapper

__all__ = ["MaskFormerPanopticDatasetMapper"]


@register_mapper("mask_former_panoptic")
class MaskFormerPanopticDatasetMapper(MaskFormerSemanticDatasetMapper):
    """`INPUT.DATASET_MAPPER_NAME: mask_former_panoptic`."""

    def __call__(self, dataset_dict: dict) -> dict:
        """Make a training sample.

        Args:
            dataset_dict: record with `file_name`, `pan_seg_file_name`, `segments_info` and
                optionally `sem_seg_file_name`, which only crops read.

        Returns:
            The record with `image` (3, H, W) uint8, `sem_seg` (H, W) int64 if the record has a
            label map, and `instances`, which has `gt_classes` (N,) int64, `gt_masks` (N, H, W)
            bool and `gt_boxes`, in the order of `segments_info` without crowds. Segments outside
            the crop are kept with an empty mask. With `ignore_unlabelled` also `ignored` (H, W)
            bool, the pixels of no target.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: a file is unreadable, or the annotation does not fit the image or config.
        """
        require_training(self)
        sample, pixels = load_record(dataset_dict, self.img_format)
        reject_annotations(dataset_dict)
        sem_seg = None
        if "sem_seg_file_name" in sample:
            # Labels are not targets here, so they may have other classes.
            sem_seg = load_sem_seg(sample, pixels.shape[:2], None, self.ignore_label)
        elif _crop_needs_sem_seg(self.tfm_gens):
            raise ValueError(
                f"The record of {sample['file_name']} has no 'sem_seg_file_name', which the crop "
                "needs. Add semantic label maps to the data set, or set "
                "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA to 1.0."
            )
        classes, layers = load_pan_seg(sample, pixels.shape[:2], self)

        image, sem_seg, transforms = augment_image(self.tfm_gens, pixels, sem_seg)
        pad = padding(image, self.size_divisibility, sample["file_name"])
        layers = transform_layers(layers, transforms)
        masks = pack_layers(layers, len(classes), (image.shape[1], image.shape[2]))
        sample["image"] = pad_image(image, pad)
        if sem_seg is not None:
            sample["sem_seg"] = pad_sem_seg(sem_seg, pad, self.ignore_label)
        boxes = layers_to_boxes(layers, len(classes))
        masks = masks.pad(pad)
        sample["instances"] = build_instances(classes, masks, boxes)
        if self.ignore_unlabelled:
            sample["ignored"] = masks.uncovered()
        return sample


def _crop_needs_sem_seg(augmentations: list) -> bool:
    return any(
        isinstance(augmentation, T.RandomCrop_CategoryAreaConstraint)
        and augmentation.single_category_max_area < 1
        for augmentation in augmentations
    )
