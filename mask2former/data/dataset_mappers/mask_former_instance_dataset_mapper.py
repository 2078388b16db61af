"""Instance segmentation with resize and crop: one target for each object.

Shape letters: H W pixels of the augmented and padded image, N objects.
"""

import torch.nn.functional as F
from detectron2.config import configurable

from ..targets import (
    build_instances,
    crowd_region,
    pack_shapes,
    read_annotations,
    read_crowds,
    transform_annotations,
)
from ..tiles import record_annotations
from .base import (
    ResizeCropDatasetMapper,
    augment_image,
    load_record,
    pad_image,
    padding,
    require_key,
    require_training,
)
from .build import register_mapper

__all__ = ["MaskFormerInstanceDatasetMapper"]


@register_mapper("mask_former_instance")
class MaskFormerInstanceDatasetMapper(ResizeCropDatasetMapper):
    """`INPUT.DATASET_MAPPER_NAME: mask_former_instance`."""

    limit_category_area = False

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        augmentations: list,
        image_format: str,
        size_divisibility: int,
        num_classes: int | None = None,
        ignore_unlabelled: bool = False,
    ) -> None:
        """
        Args:
            is_train: must be True to make samples.
            augmentations: Detectron2 augmentations and transforms, applied in this order.
            image_format: "RGB" or "BGR".
            size_divisibility: height and width in pixels to pad to; 0 or less: no padding.
            num_classes: if not None, category ids must be below it.
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

    def __call__(self, dataset_dict: dict) -> dict:
        """Make a training sample.

        Args:
            dataset_dict: record with `file_name` and `annotations`: polygons, RLEs or masks.

        Returns:
            The record without `annotations`, with `image` (3, H, W) uint8 and `instances`, which
            has `gt_classes` (N,) int64 and `gt_masks` (N, H, W) bool, in the order of the
            annotations without crowds. Objects outside the crop are kept with an empty mask. With
            `ignore_unlabelled` also `ignored` (H, W) bool: crowds and padding.

        Raises:
            FileNotFoundError: the image does not exist.
            ValueError: it is unreadable, or an annotation does not fit the image or config.
        """
        require_training(self)
        sample, pixels = load_record(dataset_dict, self.img_format)
        require_key(dataset_dict, "annotations", "instance", self)
        annotations = record_annotations(dataset_dict)
        classes, shapes = read_annotations(
            annotations, pixels.shape[:2], sample["file_name"], self.num_classes
        )

        image, _, transforms = augment_image(self.tfm_gens, pixels)
        pad = padding(image, self.size_divisibility, sample["file_name"])
        masks = pack_shapes(
            transform_annotations(shapes, transforms), (image.shape[1], image.shape[2])
        )
        sample["image"] = pad_image(image, pad)
        sample["instances"] = build_instances(classes, masks.pad(pad))
        if self.ignore_unlabelled:
            crowds = read_crowds(annotations, pixels.shape[:2], sample["file_name"])
            crowd_masks = pack_shapes(
                transform_annotations(crowds, transforms), (image.shape[1], image.shape[2])
            )
            sample["ignored"] = F.pad(crowd_region(crowd_masks, masks), pad, value=True)
        return sample
