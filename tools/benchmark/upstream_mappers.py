"""Training samples by the original's steps: full-size arrays and a boolean mask per target.

Written with Detectron2's functions. The same random numbers give the same samples as our mappers.

Shape letters: N targets, H W pixels of the augmented image, h w of the file.
"""

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances
from panopticapi.utils import rgb2id
from pycocotools import mask as mask_util
from torch import Tensor

Sample = dict[str, Any]


def _image_tensor(image: np.ndarray) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _stack(masks: list[np.ndarray], size: tuple[int, int]) -> BitMasks:
    if not masks:
        return BitMasks(torch.zeros(0, *size))
    return BitMasks(torch.stack([torch.from_numpy(np.ascontiguousarray(m.copy())) for m in masks]))


def panoptic_sample(record: Sample, augmentations: list) -> Sample:
    """As `coco_panoptic_lsj`: augment the PNG's colours, then compare them with every id."""
    sample = copy.deepcopy(record)
    image = utils.read_image(sample["file_name"], "RGB")
    utils.check_image_size(sample, image)
    image, transforms = T.apply_transform_gens(augmentations, image)
    sample["image"] = _image_tensor(image)
    colours = utils.read_image(sample.pop("pan_seg_file_name"), "RGB")
    ids = rgb2id(transforms.apply_segmentation(colours))
    targets = [segment for segment in sample["segments_info"] if not segment["iscrowd"]]
    instances = Instances(image.shape[:2])
    classes = np.array([segment["category_id"] for segment in targets])
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    masks = _stack([ids == segment["id"] for segment in targets], image.shape[:2])
    instances.gt_masks = masks.tensor
    instances.gt_boxes = masks.get_bounding_boxes()
    sample["instances"] = instances
    return sample


def instance_sample(record: Sample, augmentations: list) -> Sample:
    """As `coco_instance_lsj`: transform polygons one by one, then draw them at full size."""
    sample = copy.deepcopy(record)
    image = utils.read_image(sample["file_name"], "RGB")
    utils.check_image_size(sample, image)
    inside = np.ones(image.shape[:2])
    image, transforms = T.apply_transform_gens(augmentations, image)
    sample["image"] = _image_tensor(image)
    inside = transforms.apply_segmentation(inside)
    sample["padding_mask"] = torch.as_tensor(np.ascontiguousarray(inside != 1))
    size = image.shape[:2]
    annotations = [
        utils.transform_instance_annotations(annotation, transforms, size)
        for annotation in sample.pop("annotations")
        if not annotation.get("iscrowd", 0)
    ]
    instances = utils.annotations_to_instances(annotations, size)
    if instances.has("gt_masks"):
        instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        instances = utils.filter_empty_instances(instances)
        polygons = instances.gt_masks.polygons
        instances.gt_masks = torch.stack([_draw(p, size) for p in polygons] or [torch.zeros(size)])
        instances.gt_masks = instances.gt_masks[: len(polygons)]
    sample["instances"] = instances
    return sample


def _draw(polygons: list[np.ndarray], size: tuple[int, int]) -> Tensor:
    """Polygons of an object → (H, W) bool."""
    mask = mask_util.decode(mask_util.frPyObjects([p.tolist() for p in polygons], *size))
    return torch.as_tensor(mask, dtype=torch.uint8).any(dim=2)


def semantic_sample(
    record: Sample, augmentations: list, padded_size: int, ignore_label: int
) -> Sample:
    """As `mask_former_semantic`: compare float64 labels with every class."""
    sample = copy.deepcopy(record)
    image = utils.read_image(sample["file_name"], "RGB")
    utils.check_image_size(sample, image)
    labels = utils.read_image(sample.pop("sem_seg_file_name")).astype("double")
    inputs = T.AugInput(image, sem_seg=labels)
    T.AugmentationList(augmentations)(inputs)
    image = _image_tensor(inputs.image)
    labels = torch.as_tensor(inputs.sem_seg.astype("long"))
    if padded_size > 0:
        padding = [0, padded_size - image.shape[2], 0, padded_size - image.shape[1]]
        image = F.pad(image, padding, value=128)
        labels = F.pad(labels, padding, value=ignore_label)
    sample["image"], sample["sem_seg"] = image, labels.long()
    labels = labels.numpy()
    classes = np.unique(labels)
    classes = classes[classes != ignore_label]
    instances = Instances(tuple(image.shape[-2:]))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    instances.gt_masks = _stack([labels == c for c in classes], labels.shape).tensor
    sample["instances"] = instances
    return sample
