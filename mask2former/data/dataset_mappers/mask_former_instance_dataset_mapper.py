"""Instance segmentation with resize and crop: one target for each object.

Shape letters: H W pixels of the augmented and padded image, N objects.
"""

from detectron2.config import configurable

from ..targets import build_instances, pack_shapes, read_annotations, transform_annotations
from .base import ResizeCropDatasetMapper

__all__ = ["MaskFormerInstanceDatasetMapper"]


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
    ) -> None:
        """
        Args:
            is_train: must be True when samples are made.
            augmentations: Detectron2 augmentations and transforms, applied in this order.
            image_format: "RGB" or "BGR".
            size_divisibility: height and width in pixels to pad to; 0 or less: no padding.
            num_classes: if given, category ids are checked to lie below it.
        """
        super().__init__(is_train, augmentations, image_format, size_divisibility, num_classes)

    def __call__(self, dataset_dict: dict) -> dict:
        """Make a training sample.

        Args:
            dataset_dict: record with `file_name` and `annotations`: polygons, RLEs or masks.

        Returns:
            The record without `annotations`, with `image` (3, H, W) uint8 and `instances`: in the
            order of the annotations without crowds `gt_classes` (N,) int64 and `gt_masks`
            (N, H, W) bool. Objects that were cropped away stay, with an empty mask.

        Raises:
            FileNotFoundError: the image does not exist.
            ValueError: it is unreadable, or an annotation does not fit the image or config.
        """
        sample, image = self.load_training(dataset_dict)
        self.require(dataset_dict, "annotations", "instance")
        classes, shapes = read_annotations(
            dataset_dict["annotations"], image.shape[:2], sample["file_name"], self.num_classes
        )

        image, _, transforms = self.augment(image)
        padding = self.padding(image, sample["file_name"])
        masks = pack_shapes(transform_annotations(shapes, transforms), tuple(image.shape[-2:]))
        sample["image"] = self.pad_image(image, padding)
        sample["instances"] = build_instances(classes, masks.pad(padding))
        return sample
