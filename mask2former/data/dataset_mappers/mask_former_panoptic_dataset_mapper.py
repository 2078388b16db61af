"""Panoptic segmentation from panoptic PNGs: one target for each segment.

Shape letters: H W pixels of the augmented and padded image, N segments.
"""

from detectron2.data import transforms as T

from ..label_maps import layers_to_boxes, pack_layers, transform_layers
from ..targets import build_instances
from .mask_former_semantic_dataset_mapper import MaskFormerSemanticDatasetMapper

__all__ = ["MaskFormerPanopticDatasetMapper"]


class MaskFormerPanopticDatasetMapper(MaskFormerSemanticDatasetMapper):
    """`INPUT.DATASET_MAPPER_NAME: mask_former_panoptic`."""

    def __call__(self, dataset_dict: dict) -> dict:
        """Make a training sample.

        Args:
            dataset_dict: record with `file_name`, `pan_seg_file_name`, `segments_info` and
                optionally `sem_seg_file_name`, at which only crops look.

        Returns:
            The record with `image` (3, H, W) uint8, `sem_seg` (H, W) int64 if the record has a
            label map, and `instances` in the order of `segments_info` without crowds:
            `gt_classes` (N,) int64, `gt_masks` (N, H, W) bool and `gt_boxes`. Segments that were
            cropped away stay, with an empty mask.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: a file is unreadable, or the annotation does not fit the image or config.
        """
        sample, image = self.load_training(dataset_dict)
        self.reject_annotations(dataset_dict)
        sem_seg = None
        if "sem_seg_file_name" in sample:
            # Labels are no targets here, so they may be of another set of classes.
            sem_seg = self.load_sem_seg(sample, image.shape[:2], num_classes=None)
        elif self._crop_needs_sem_seg():
            raise ValueError(
                f"The record of {sample['file_name']} has no 'sem_seg_file_name', at which the "
                "crop looks. Add semantic label maps to the data set, or set "
                "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA to 1.0."
            )
        classes, layers = self.load_pan_seg(sample, image.shape[:2])

        image, sem_seg, transforms = self.augment(image, sem_seg)
        padding = self.padding(image, sample["file_name"])
        layers = transform_layers(layers, transforms)
        masks = pack_layers(layers, len(classes), tuple(image.shape[-2:]))
        sample["image"] = self.pad_image(image, padding)
        if sem_seg is not None:
            sample["sem_seg"] = self.pad_sem_seg(sem_seg, padding)
        boxes = layers_to_boxes(layers, len(classes))
        sample["instances"] = build_instances(classes, masks.pad(padding), boxes)
        return sample

    def _crop_needs_sem_seg(self) -> bool:
        return any(
            isinstance(augmentation, T.RandomCrop_CategoryAreaConstraint)
            and augmentation.single_category_max_area < 1
            for augmentation in self.tfm_gens
        )
