"""What the five mappers share: read a record, augment, pad, and the two published constructors.

    record of the data set (dict)
      → load               copy of the record, image read and checked
      → load_* / read_*    annotations read and checked as they are on disk
      → augment            image and label map; the transforms for everything else
      → pad, targets       `image`, `instances` (and `sem_seg`, `padding_mask`) of the sample

Shape letters: H W pixels of the augmented image, h w of the file, N targets.
"""

import copy
import inspect
import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from torch import Tensor

from ..augmentations import build_resize_crop_gen, build_transform_gen
from ..fused_augmentation import augment
from ..targets import check_size, segment_layers


def read_image(file_name: str, image_format: str | None = None) -> np.ndarray:
    """Detectron2's `read_image`; an unreadable file is an error that names it.

    Args:
        file_name: of the image.
        image_format: a PIL mode or "BGR"; None leaves the pixels as they are stored.

    Returns:
        (h, w, 3), or (h, w) for a label map read without a format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or no image (unless PIL's `LOAD_TRUNCATED_IMAGES` was set).
    """
    try:
        return utils.read_image(file_name, image_format)
    except OSError as error:
        # The operating system's errors carry the file name, those of PIL do not.
        if error.filename is not None:
            raise
        raise ValueError(f"{file_name} cannot be read as an image: {error}") from error


class BaseDatasetMapper:
    """Reads and augments; subclasses turn annotations into targets in `__call__`."""

    def __init__(
        self,
        is_train: bool,
        augmentations: list,
        image_format: str,
        num_classes: int | None,
    ) -> None:
        """
        Args:
            is_train: whether samples are for training.
            augmentations: Detectron2 augmentations and transforms, applied in this order.
            image_format: "RGB" or "BGR".
            num_classes: if given, labels and category ids are checked to lie below it.
        """
        self.is_train = is_train
        self.tfm_gens = augmentations
        self.img_format = image_format
        self.num_classes = num_classes
        mode = "training" if is_train else "inference"
        logging.getLogger(__name__).info(
            f"[{type(self).__name__}] Augmentations used in {mode}: {augmentations}"
        )

    @classmethod
    def _only_accepted(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Leave out `num_classes` for subclasses with a constructor as published, without it."""
        if "num_classes" not in inspect.signature(cls.__init__).parameters:
            del arguments["num_classes"]
        return arguments

    def load(self, dataset_dict: dict) -> tuple[dict, np.ndarray]:
        """Copy the record, so that the data set stays as it is, and read its image.

        Args:
            dataset_dict: of the data set, with at least `file_name`.

        Returns:
            The copy, without `annotations`, and the image (h, w, 3).

        Raises:
            FileNotFoundError: there is no such image.
            ValueError: the image is unreadable or not of the size that the record says.
        """
        # Annotations are large and no part of the sample; they are read from the original.
        sample = copy.deepcopy({k: v for k, v in dataset_dict.items() if k != "annotations"})
        image = read_image(sample["file_name"], self.img_format)
        utils.check_image_size(sample, image)
        return sample, image

    def load_training(self, dataset_dict: dict) -> tuple[dict, np.ndarray]:
        """As `load`, of a mapper that has no use but training.

        Raises:
            ValueError: the mapper was built with `is_train` False.
        """
        if not self.is_train:
            raise ValueError(
                f"{type(self).__name__} is for training only; evaluate with Detectron2's "
                "DatasetMapper."
            )
        return self.load(dataset_dict)

    def load_pan_seg(
        self, sample: dict, image_size: tuple[int, int]
    ) -> tuple[Tensor, list[np.ndarray]]:
        """Classes and layers (`segment_layers`) of the record's panoptic PNG.

        Takes `pan_seg_file_name` out of `sample`.

        Raises:
            ValueError: the record has no panoptic annotation, or a wrong one.
        """
        for key in ("pan_seg_file_name", "segments_info"):
            self.require(sample, key, "panoptic")
        file_name = sample.pop("pan_seg_file_name")
        pan_seg = read_image(file_name, "RGB")
        check_size(pan_seg.shape[:2], image_size, file_name, sample["file_name"])
        return segment_layers(pan_seg, sample["segments_info"], file_name, self.num_classes)

    def require(self, record: dict, key: str, task: str) -> None:
        """Check that a record has a key.

        Raises:
            ValueError: it has not.
        """
        if key not in record:
            raise ValueError(
                f"The record of {record['file_name']} has no {key!r}, which "
                f"{type(self).__name__} needs. Use a data set with {task} annotations or another "
                "INPUT.DATASET_MAPPER_NAME."
            )

    def augment(
        self, image: np.ndarray, sem_seg: np.ndarray | None = None
    ) -> tuple[Tensor, np.ndarray | None, T.TransformList]:
        """Augment an image, and its semantic labels where there are some.

        Args:
            image: (h, w, 3) uint8.
            sem_seg: (h, w) float64 labels.

        Returns:
            The image (3, H, W) uint8, contiguous, the labels (H, W), and what was applied.
        """
        image, sem_seg, transforms = augment(self.tfm_gens, image, sem_seg)
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), sem_seg, transforms


class ResizeCropDatasetMapper(BaseDatasetMapper):
    """Base of the mask_former_* mappers: resized and cropped images, padded to a square."""

    # Whether crops obey INPUT.CROP.SINGLE_CATEGORY_MAX_AREA, for which they look at labels.
    limit_category_area = True

    def __init__(
        self,
        is_train: bool,
        augmentations: list,
        image_format: str,
        size_divisibility: int,
        num_classes: int | None,
    ) -> None:
        """
        Args:
            is_train, augmentations, image_format, num_classes: see `BaseDatasetMapper`.
            size_divisibility: height and width in pixels to pad to; 0 or less: no padding.
        """
        super().__init__(is_train, augmentations, image_format, num_classes)
        self.size_divisibility = size_divisibility

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """The constructor's arguments from the config."""
        return cls._only_accepted(
            {
                "is_train": is_train,
                "augmentations": build_resize_crop_gen(
                    cfg, limit_category_area=cls.limit_category_area
                ),
                "image_format": cfg.INPUT.FORMAT,
                "size_divisibility": cfg.INPUT.SIZE_DIVISIBILITY,
                "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            }
        )

    def padding(self, image: Tensor, file_name: str) -> list[int]:
        """Pixels to add left, right, top and bottom, as `F.pad` takes them.

        Args:
            image: (3, H, W).
            file_name: the image's, for the error.

        Raises:
            ValueError: the image is larger than what it should be padded to.
        """
        height, width = image.shape[-2:]
        size = self.size_divisibility
        if size <= 0:
            return [0, 0, 0, 0]
        if max(height, width) > size:
            raise ValueError(
                f"{file_name} has (height, width) {(height, width)} after augmentation, more than "
                f"the INPUT.SIZE_DIVISIBILITY of {size} that training images are padded to. Crop "
                "to that size (INPUT.CROP), or set INPUT.SIZE_DIVISIBILITY to -1."
            )
        return [0, size - width, 0, size - height]

    @staticmethod
    def pad(tensor: Tensor, padding: list[int], value: int) -> Tensor:
        """Pad the last two dimensions; without padding the tensor itself."""
        return F.pad(tensor, padding, value=value) if any(padding) else tensor

    @staticmethod
    def pad_image(image: Tensor, padding: list[int]) -> Tensor:
        """Pad an image with grey."""
        return ResizeCropDatasetMapper.pad(image, padding, 128)


class LargeScaleJitterDatasetMapper(BaseDatasetMapper):
    """Base of the coco_*_lsj mappers: large-scale jittering to a fixed square."""

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        tfm_gens: list,
        image_format: str,
        num_classes: int | None = None,
    ) -> None:
        """
        Args:
            is_train: whether to make targets.
            tfm_gens: Detectron2 augmentations and transforms, applied in this order.
            image_format: "RGB" or "BGR".
            num_classes: if given, category ids are checked to lie below it.
        """
        super().__init__(is_train, tfm_gens, image_format, num_classes)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """The constructor's arguments from the config."""
        return cls._only_accepted(
            {
                "is_train": is_train,
                "tfm_gens": build_transform_gen(cfg, is_train),
                "image_format": cfg.INPUT.FORMAT,
                "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            }
        )
