"""What the mappers share: reading, augmenting and padding, and the two kinds of constructor.

    record (dict)
      → load_record                  copy of the record, image read and checked
      → load_pan_seg, load_sem_seg   label maps read and checked as stored on disk
      → augment_image                image and labels, and the transforms to apply to targets
      → panoptic_sample              all of these, for panoptic mappers that do not pad
      → padding, pad_image           fixed size of the mask_former_* mappers

The steps are functions, because a subclass may use any name for its own methods and attributes.

Shape letters: H W pixels of the augmented image, h w of the file, N targets.
"""

import copy
import inspect
import logging
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from torch import Tensor

from ..augmentations import build_resize_crop_gen
from ..formats.bands import image_format_of

# Not used here, but other code imports it from this module.
from ..formats.images import read_image as read_image
from ..label_maps import check_whole, layers_to_boxes, pack_layers, transform_layers
from ..lazy_augmentation import augment
from ..records import with_whole_numbers
from ..targets import (
    build_instances,
    check_sem_seg,
    check_size,
    segment_layers,
    segments_in_tile,
)
from ..tiles import TILE, read_panoptic_pixels, read_pixels

# ---- mappers ----


class BaseDatasetMapper:
    """Base of all mappers; subclasses make samples in `__call__`.

    Attributes:
        is_train: whether samples get targets.
        tfm_gens: Detectron2 augmentations and transforms.
        img_format: of `read_image`, such as "RGB" or "BGR".
        num_classes: if not None, labels and category ids must be below it.
        ignore_unlabelled: whether samples get `ignored` (H, W) bool, the pixels without a label,
            which losses leave out: ignore label, void, crowds, padding.
        unread_keys: config keys that this mapper does not read, such as "INPUT.CROP.ENABLED", and
            the only value accepted for each. A subclass that reads more keys overrides it.
    """

    # Class attributes, because subclasses with their own __init__ set only the other three.
    num_classes: int | None = None
    ignore_unlabelled: bool = False
    unread_keys: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        is_train: bool,
        augmentations: list,
        image_format: str,
        num_classes: int | None,
        ignore_unlabelled: bool = False,
    ) -> None:
        self.is_train = is_train
        self.ignore_unlabelled = ignore_unlabelled
        self.tfm_gens = augmentations
        self.img_format = image_format
        self.num_classes = num_classes
        mode = "training" if is_train else "inference"
        logging.getLogger(__name__).info(
            f"[{type(self).__name__}] Augmentations used in {mode}: {augmentations}"
        )


class ResizeCropDatasetMapper(BaseDatasetMapper):
    """Base of the mask_former_* mappers: images are resized, cropped and padded to a square."""

    unread_keys: ClassVar[dict[str, Any]] = {"INPUT.RANDOM_FLIP": "horizontal"}

    # Whether crops obey INPUT.CROP.SINGLE_CATEGORY_MAX_AREA, which needs semantic labels.
    limit_category_area = True

    def __init__(
        self,
        is_train: bool,
        augmentations: list,
        image_format: str,
        size_divisibility: int,
        num_classes: int | None,
        ignore_unlabelled: bool = False,
    ) -> None:
        """
        Args:
            is_train, augmentations, image_format, num_classes, ignore_unlabelled: see
                `BaseDatasetMapper`.
            size_divisibility: height and width in pixels to pad to; 0 or less: no padding.
        """
        super().__init__(is_train, augmentations, image_format, num_classes, ignore_unlabelled)
        self.size_divisibility = size_divisibility

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """The constructor's arguments from the config."""
        return accepted_arguments(
            cls,
            {
                "is_train": is_train,
                "augmentations": build_resize_crop_gen(
                    cfg, limit_category_area=cls.limit_category_area
                ),
                "image_format": image_format_of(cfg),
                "size_divisibility": cfg.INPUT.SIZE_DIVISIBILITY,
                **label_arguments(cfg),
            },
        )


class LargeScaleJitterDatasetMapper(BaseDatasetMapper):
    """Base of the coco_*_lsj mappers: large-scale jittering to a fixed square."""

    unread_keys: ClassVar[dict[str, Any]] = {
        "INPUT.COLOR_AUG_SSD": False,
        "INPUT.SIZE_DIVISIBILITY": -1,
        "INPUT.CROP.ENABLED": False,
    }

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        tfm_gens: list,
        image_format: str,
        num_classes: int | None = None,
        ignore_unlabelled: bool = False,
    ) -> None:
        """
        Args:
            is_train: whether to make targets.
            tfm_gens: Detectron2 augmentations and transforms, applied in this order.
            image_format: of `read_image`, such as "RGB" or "BGR".
            num_classes: if not None, category ids must be below it.
            ignore_unlabelled: see `BaseDatasetMapper`.
        """
        super().__init__(is_train, tfm_gens, image_format, num_classes, ignore_unlabelled)


def lsj_arguments(cls: type, cfg: CfgNode, is_train: bool, tfm_gens: list) -> dict[str, Any]:
    """Constructor arguments of a coco_*_lsj mapper from the config and its augmentations."""
    return accepted_arguments(
        cls,
        {
            "is_train": is_train,
            "tfm_gens": tfm_gens,
            "image_format": image_format_of(cfg),
            **label_arguments(cfg),
        },
    )


def label_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Constructor arguments that the original's mappers do not have."""
    return {
        "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        # Configs made by another project's copy of `add_maskformer2_config` lack the key.
        "ignore_unlabelled": cfg.INPUT.get("IGNORE_UNLABELLED", False),
    }


def accepted_arguments(cls: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Drop those of `label_arguments` that a subclass with the original constructor lacks.

    Raises:
        ValueError: INPUT.IGNORE_UNLABELLED is on, and the constructor does not take it.
    """
    accepted = inspect.signature(cls).parameters
    if "ignore_unlabelled" not in accepted and arguments.pop("ignore_unlabelled"):
        raise ValueError(
            f"INPUT.IGNORE_UNLABELLED is True, but the constructor of {cls.__name__} takes no "
            "'ignore_unlabelled': add it and pass it on, or set the key to False."
        )
    if "num_classes" not in accepted:
        del arguments["num_classes"]
    return arguments


# ---- reading ----


def load_record(record: dict, image_format: str) -> tuple[dict, np.ndarray]:
    """Copy a record, so that the data set stays unchanged, and read its image.

    Args:
        record: of the data set, with at least `file_name`.
        image_format: of `read_image`, such as "RGB" or "BGR".

    Returns:
        The copy without `annotations`, and the image (h, w, C).

    Raises:
        FileNotFoundError: the image does not exist.
        ValueError: the image is unreadable or differs in size from the record.
    """
    # Annotations are large, and targets are made from the original record.
    sample = copy.deepcopy({k: v for k, v in record.items() if k != "annotations"})
    sample = with_whole_numbers(sample)
    image = read_pixels(sample, sample["file_name"], image_format)
    utils.check_image_size(sample, image)
    return sample, image


def require_training(mapper: BaseDatasetMapper) -> None:
    """Check that a mapper was built for training.

    Raises:
        ValueError: its `is_train` is False.
    """
    if not mapper.is_train:
        raise ValueError(
            f"{type(mapper).__name__} is for training only; evaluate with Detectron2's "
            "DatasetMapper."
        )


def require_key(record: dict, key: str, task: str, mapper: BaseDatasetMapper) -> None:
    """Check that a record has a key.

    Raises:
        ValueError: the key is missing.
    """
    if key not in record:
        raise ValueError(
            f"The record of {record['file_name']} has no {key!r}, which "
            f"{type(mapper).__name__} needs. Use a data set with {task} annotations or another "
            "INPUT.DATASET_MAPPER_NAME."
        )


def reject_annotations(record: dict) -> None:
    """Check that a record has no instances, which a semantic or panoptic mapper would drop.

    Raises:
        ValueError: it has `annotations`.
    """
    if "annotations" in record:
        raise ValueError(
            f"The record of {record['file_name']} has 'annotations', which this mapper does "
            "not read; use an instance mapper (INPUT.DATASET_MAPPER_NAME) or remove them."
        )


def load_pan_seg(
    sample: dict, image_size: tuple[int, int], mapper: BaseDatasetMapper
) -> tuple[Tensor, list[np.ndarray]]:
    """Read the panoptic PNG; removes `pan_seg_file_name` from `sample`.

    Returns:
        Classes (N,) and label maps of the segments, see `segment_layers`.

    Raises:
        ValueError: the record has no panoptic annotation, or an invalid one.
    """
    for key in ("pan_seg_file_name", "segments_info"):
        require_key(sample, key, "panoptic", mapper)
    file_name = sample.pop("pan_seg_file_name")
    pan_seg = read_panoptic_pixels(sample, file_name)
    check_size(pan_seg.shape[:2], image_size, file_name, sample["file_name"])
    if TILE in sample:
        sample["segments_info"] = segments_in_tile(pan_seg, sample["segments_info"])
    return segment_layers(pan_seg, sample["segments_info"], file_name, mapper.num_classes)


def load_sem_seg(
    sample: dict, image_size: tuple[int, int], num_classes: int | None, ignore_label: int
) -> np.ndarray:
    """Read the semantic label map; removes `sem_seg_file_name` from `sample`.

    Args:
        sample: copy of the record.
        image_size: (h, w) of its image.
        num_classes: if not None, labels must be below it or `ignore_label`.
        ignore_label: label of pixels without a class.

    Returns:
        (h, w) float64 labels.

    Raises:
        ValueError: the map has several channels, another size than the image, or labels that are
            unknown or not whole.
    """
    file_name = sample.pop("sem_seg_file_name")
    sem_seg = read_pixels(sample, file_name, None)
    if sem_seg.ndim != 2:
        raise ValueError(
            f"{file_name} has {sem_seg.shape[-1]} channels; a semantic map has one, the label. "
            "VALUE_MAP in DATASETS.CUSTOM maps colours."
        )
    check_size(sem_seg.shape, image_size, file_name, sample["file_name"])
    check_whole(sem_seg, file_name)
    if num_classes is not None:
        check_sem_seg(sem_seg, num_classes, ignore_label, file_name)
    # Detectron2 cannot resize 16-bit labels, and picks other pixels for uint8 than for float64.
    return sem_seg.astype(np.float64)


# ---- augmenting and padding ----


def augment_image(
    augmentations: list, image: np.ndarray, sem_seg: np.ndarray | None = None
) -> tuple[Tensor, np.ndarray | None, T.TransformList]:
    """Augment an image and its semantic labels, if given.

    Args:
        augmentations: Detectron2 augmentations and transforms, applied in this order.
        image: (h, w, 3) uint8.
        sem_seg: (h, w) float64 labels.

    Returns:
        The image (3, H, W) uint8, contiguous; the labels (H, W); the applied transforms.
    """
    image, sem_seg, transforms = augment(augmentations, image, sem_seg)
    return torch.from_numpy(image.transpose(2, 0, 1).copy()), sem_seg, transforms


def panoptic_sample(mapper: BaseDatasetMapper, augmentations: list, record: dict) -> dict:
    """Make the sample of a panoptic mapper that does not pad.

    Args:
        mapper: reads the record; its `tfm_gens` are not used.
        augmentations: Detectron2 augmentations and transforms, applied in this order.
        record: with `file_name` and, for training, `pan_seg_file_name` and `segments_info`.

    Returns:
        The record with `image` (3, H, W) uint8. For training on a record with `pan_seg_file_name`
        also `instances`, with `gt_classes` (N,) int64, `gt_masks` (N, H, W) bool and `gt_boxes`, in
        the order of `segments_info` without crowds. Segments outside the crop are kept with an
        empty mask. With `mapper.ignore_unlabelled` also `ignored`, the pixels of no target.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is unreadable, or the annotation does not fit the image or config.
    """
    sample, image = load_record(record, mapper.img_format)
    if mapper.is_train and "annotations" in record:
        # Not read here, but kept for subclasses.
        sample["annotations"] = copy.deepcopy(record["annotations"])
    if not mapper.is_train or "pan_seg_file_name" not in sample:
        sample["image"], _, _ = augment_image(augmentations, image)
        return sample

    classes, layers = load_pan_seg(sample, image.shape[:2], mapper)
    sample["image"], _, transforms = augment_image(augmentations, image)
    layers = transform_layers(layers, transforms)
    masks = pack_layers(layers, len(classes), tuple(sample["image"].shape[-2:]))
    boxes = layers_to_boxes(layers, len(classes))
    sample["instances"] = build_instances(classes, masks, boxes)
    if mapper.ignore_unlabelled:
        sample["ignored"] = masks.uncovered()
    return sample


def padding(image: Tensor, size: int, file_name: str) -> list[int]:
    """Pixels to add left, right, top and bottom, as `F.pad` takes them.

    Args:
        image: (3, H, W).
        size: height and width in pixels to pad to; 0 or less: no padding.
        file_name: of the image, for the error.

    Raises:
        ValueError: the image is larger than `size`.
    """
    height, width = image.shape[-2:]
    if size <= 0:
        return [0, 0, 0, 0]
    if max(height, width) > size:
        raise ValueError(
            f"{file_name} has (height, width) {(height, width)} after augmentation, more than "
            f"the INPUT.SIZE_DIVISIBILITY of {size} that training images are padded to. Crop "
            "to that size (INPUT.CROP), or set INPUT.SIZE_DIVISIBILITY to -1."
        )
    return [0, size - width, 0, size - height]


def pad_image(image: Tensor, padding: list[int]) -> Tensor:
    """Pad an image with grey."""
    return F.pad(image, padding, value=128) if any(padding) else image


def pad_sem_seg(sem_seg: np.ndarray, padding: list[int], ignore_label: int) -> Tensor:
    """Augmented labels as (H, W) int64, padded with the ignore label."""
    labels = torch.from_numpy(sem_seg.astype(np.int64))
    return F.pad(labels, padding, value=ignore_label) if any(padding) else labels
