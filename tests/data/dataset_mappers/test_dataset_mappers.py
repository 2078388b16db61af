"""The mappers on a 4x6 image whose samples can be worked out by hand."""

import copy
import random

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from PIL import Image

from mask2former.data.dataset_mappers import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    DETRPanopticDatasetMapper,
    MaskFormerInstanceDatasetMapper,
    MaskFormerPanopticDatasetMapper,
    MaskFormerSemanticDatasetMapper,
    build_mapper,
    coco_instance_new_baseline_dataset_mapper,
    coco_panoptic_new_baseline_dataset_mapper,
)

MAPPERS = {
    "coco_instance_lsj": COCOInstanceNewBaselineDatasetMapper,
    "coco_panoptic_lsj": COCOPanopticNewBaselineDatasetMapper,
    "detr_panoptic": DETRPanopticDatasetMapper,
    "mask_former_instance": MaskFormerInstanceDatasetMapper,
    "mask_former_panoptic": MaskFormerPanopticDatasetMapper,
    "mask_former_semantic": MaskFormerSemanticDatasetMapper,
}
LSJ = [name for name in MAPPERS if name.endswith("lsj")]
RESIZE_CROP = [name for name in MAPPERS if name.startswith("mask_former")]
NAME = "tests_mappers"


@pytest.mark.parametrize("name", MAPPERS)
@pytest.mark.parametrize("flip", [False, True])
def test_sample(name, flip, records, build, gt):
    mapper = build(name, [T.HFlipTransform(6)] if flip else [])
    record = records[name]
    before = copy.deepcopy(record)
    sample = mapper(record)
    step = -1 if flip else 1

    assert repr(record) == repr(before), "the record was changed"
    assert sample["image"].dtype == torch.uint8 and sample["image"].is_contiguous()
    assert (sample["image"].numpy() == gt.pixels[:, ::step].transpose(2, 0, 1)).all()
    classes, masks = gt.targets(name)
    instances = sample["instances"]
    assert instances.image_size == (4, 6)
    assert instances.gt_classes.tolist() == classes
    assert instances.gt_classes.dtype == torch.int64
    assert instances.gt_masks.dtype == torch.bool and instances.gt_masks.is_contiguous()
    assert (instances.gt_masks.numpy() == masks[:, :, ::step]).all()
    assert (sample["image_id"], sample["height"], sample["width"]) == (3, 4, 6)
    # As in the original, keys that were turned into targets are removed.
    for key in ("annotations", "pan_seg_file_name"):
        assert key not in sample
    if name in RESIZE_CROP:
        assert "sem_seg_file_name" not in sample
    if "sem_seg_file_name" in record:
        assert sample["sem_seg"].dtype == torch.int64
        assert (sample["sem_seg"].numpy() == gt.sem_seg[:, ::step]).all()
    if "panoptic" in name:
        assert sample["segments_info"] == gt.segments
        assert sample["segments_info"] is not record["segments_info"]


@pytest.mark.parametrize("name", [n for n in MAPPERS if n != "mask_former_semantic"])
def test_boxes(name, records, build):
    instances = build(name, [])(records[name])["instances"]
    if name == "mask_former_instance":
        assert not instances.has("gt_boxes")
    elif name == "coco_instance_lsj":
        assert instances.gt_boxes.tensor.tolist() == [[1, 1, 3, 3], [4, 3, 6, 4]]
    else:
        assert instances.gt_boxes.tensor.tolist() == [[3, 0, 6, 3], [0, 0, 3, 2]]


@pytest.mark.parametrize("name", RESIZE_CROP)
def test_padding(name, records, build, gt):
    sample = build(name, [], size_divisibility=8)(records[name])
    assert sample["image"].shape == (3, 8, 8)
    assert (sample["image"][:, :4, :6].numpy() == gt.pixels.transpose(2, 0, 1)).all()
    assert (sample["image"][:, 4:] == 128).all() and (sample["image"][:, :, 6:] == 128).all()
    instances = sample["instances"]
    assert instances.image_size == (8, 8)
    classes, masks = gt.targets(name)
    assert instances.gt_classes.tolist() == classes
    assert (instances.gt_masks.numpy() == np.pad(masks, ((0, 0), (0, 4), (0, 2)))).all()
    if "sem_seg" in sample:
        padded = np.pad(gt.sem_seg, ((0, 4), (0, 2)), constant_values=255)
        assert (sample["sem_seg"].numpy() == padded).all()


@pytest.mark.parametrize("name", RESIZE_CROP)
def test_image_larger_than_padding(name, records, build):
    with pytest.raises(ValueError, match=r"image\.png .*\(4, 6\).*INPUT\.SIZE_DIVISIBILITY of 5"):
        build(name, [], size_divisibility=5)(records[name])


@pytest.mark.parametrize("name", LSJ)
def test_jitter_pads_right_and_bottom(name, cfg, records, gt):
    cfg.INPUT.DATASET_MAPPER_NAME = name
    # The image fits into the scaled target of 6x6 unchanged and is then padded to 12x12.
    cfg.INPUT.IMAGE_SIZE = 12
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 0.5
    sample = build_mapper(cfg)(records[name])
    inside = np.zeros((12, 12), dtype=bool)
    inside[:4, :6] = True
    assert sample["image"].shape == (3, 12, 12)
    assert (sample["image"][:, :4, :6].numpy() == gt.pixels.transpose(2, 0, 1)).all()
    assert (sample["image"].numpy()[:, ~inside] == 128).all()
    classes, masks = gt.targets(name)
    assert sample["instances"].gt_classes.tolist() == classes
    expected = np.pad(masks, ((0, 0), (0, 8), (0, 6)))
    assert (sample["instances"].gt_masks.numpy() == expected).all()
    if name == "coco_instance_lsj":
        assert sample["padding_mask"].dtype == torch.bool
        assert (sample["padding_mask"].numpy() == ~inside).all()


@pytest.mark.parametrize("name", LSJ)
@pytest.mark.parametrize("seed", range(4))
def test_jitter_crops(name, seed, cfg, records, gt):
    cfg.INPUT.DATASET_MAPPER_NAME = name
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 2.0
    mapper = build_mapper(cfg)
    np.random.seed(seed)
    sample = mapper(records[name])
    after = np.random.rand()

    np.random.seed(seed)
    np.random.uniform(2.0, 2.0)
    # The image is scaled to 8x12; the 6x6 crop starts up to 2 rows and 6 columns in.
    offset = np.random.uniform()
    top, left = round(2 * offset), round(6 * offset)
    assert after == np.random.rand(), "the number of random draws differs"

    classes, masks = gt.targets(name)
    scaled = masks.repeat(2, axis=1).repeat(2, axis=2)
    cropped = scaled[:, top : top + 6, left : left + 6]
    if "instance" in name:
        visible = cropped.any(axis=(1, 2))
        classes, cropped = np.array(classes)[visible].tolist(), cropped[visible]
        assert not sample["padding_mask"].any()
    instances = sample["instances"]
    assert instances.gt_classes.tolist() == classes
    assert (instances.gt_masks.numpy() == cropped).all()
    expected_boxes = [
        [x.min(), y.min(), x.max() + 1, y.max() + 1] if x.size else [0, 0, 0, 0]
        for y, x in map(np.nonzero, cropped)
    ]
    assert instances.gt_boxes.tensor.tolist() == expected_boxes


def test_targets_outside_the_crop(records, build):
    crop = [T.CropTransform(4, 0, 2, 4)]  # does not contain the square
    kept = build("mask_former_instance", crop)(records["mask_former_instance"])["instances"]
    assert kept.gt_classes.tolist() == [1, 0]
    assert kept.gt_masks.sum(dim=(1, 2)).tolist() == [0, 2]
    dropped = build("coco_instance_lsj", crop)(records["coco_instance_lsj"])["instances"]
    assert dropped.gt_classes.tolist() == [0]
    assert dropped.gt_masks.sum(dim=(1, 2)).tolist() == [2]


@pytest.mark.parametrize("name", MAPPERS)
def test_no_annotation_is_a_valid_sample(name, records, files, build):
    record = records[name]
    if "annotations" in record:
        record["annotations"] = []
    if "segments_info" in record:
        record["segments_info"] = []
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(files["panoptic"])
    Image.fromarray(np.full((4, 6), 255, np.uint8)).save(files["semantic"])
    for augmentations in ([], [T.FixedSizeCrop((8, 8))]):
        instances = build(name, augmentations, num_classes=3)(record)["instances"]
        assert instances.gt_masks.shape == (0, *instances.image_size)
        assert instances.gt_masks.dtype == torch.bool
        assert instances.gt_classes.shape == (0,) and instances.gt_classes.dtype == torch.int64


def test_only_crowd(records, build):
    record = records["coco_instance_lsj"]
    record["annotations"] = record["annotations"][2:]
    assert len(build("coco_instance_lsj", [])(record)["instances"]) == 0


def test_16_bit_labels(records, files, build, gt):
    labels = gt.sem_seg.astype(np.uint16) + 300
    Image.fromarray(labels).save(files["semantic"])
    sample = build("mask_former_semantic", [])(records["mask_former_semantic"])
    assert sample["instances"].gt_classes.tolist() == [300, 301, 302, 555]


@pytest.mark.parametrize("name", ["mask_former_semantic", "mask_former_panoptic"])
def test_labels_are_resized_as_float64(name, records, build, gt):
    # Column i takes the label at floor(1.5 i); resizing uint8 labels would pick others.
    sample = build(name, [T.ResizeTransform(4, 6, 4, 4)])(records[name])
    assert (sample["sem_seg"].numpy() == gt.sem_seg[:, [0, 1, 3, 4]]).all()


def test_panoptic_without_semantic_labels(cfg, records, build):
    record = records["mask_former_panoptic"]
    del record["sem_seg_file_name"]
    crop = T.RandomCrop_CategoryAreaConstraint("absolute", (4, 6), 1.0, 255)
    sample = build("mask_former_panoptic", [crop])(record)
    assert "sem_seg" not in sample
    assert len(sample["instances"]) == 2
    crop = T.RandomCrop_CategoryAreaConstraint("absolute", (4, 6), 0.7, 255)
    with pytest.raises(ValueError, match=r"sem_seg_file_name.*SINGLE_CATEGORY_MAX_AREA to 1\.0"):
        build("mask_former_panoptic", [crop])(record)


@pytest.mark.parametrize("name", RESIZE_CROP)
def test_augmentations_of_the_config(name, cfg, records, gt):
    """Same image, labels and random draws as Detectron2's own transforms."""
    cfg.INPUT.DATASET_MAPPER_NAME = name
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (6, 8, 10), 40
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", (5, 5)
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.6
    cfg.INPUT.COLOR_AUG_SSD = True
    mapper = build_mapper(cfg)
    assert mapper.num_classes == 3 and mapper.size_divisibility == -1
    crop = (
        T.RandomCrop("absolute", (5, 5))
        if name == "mask_former_instance"
        else T.RandomCrop_CategoryAreaConstraint("absolute", (5, 5), 0.6, 255)
    )
    reference = [T.ResizeShortestEdge((6, 8, 10), 40, "choice"), crop]
    # Share the colour jitter with the mapper; its own tests cover its random draws.
    reference += [mapper.tfm_gens[2], T.RandomFlip()]
    for seed in range(5):
        random.seed(seed)
        np.random.seed(seed)
        sample = mapper(records[name])
        after = random.random(), np.random.rand()
        random.seed(seed)
        np.random.seed(seed)
        inputs = T.AugInput(gt.pixels, sem_seg=gt.sem_seg.astype("double"))
        T.AugmentationList(reference)(inputs)
        assert after == (random.random(), np.random.rand())
        assert (sample["image"].numpy() == inputs.image.transpose(2, 0, 1)).all()
        if "sem_seg" in sample:
            assert (sample["sem_seg"].numpy() == inputs.sem_seg).all()


def test_evaluation_samples(records, build, gt):
    for name in LSJ:
        mapper = MAPPERS[name](False, tfm_gens=[T.FixedSizeCrop((8, 8))], image_format="BGR")
        sample = mapper(records[name])
        assert sample["image"].shape == (3, 8, 8)
        assert (
            sample["image"][:, :4, :6].numpy() == gt.pixels[:, :, ::-1].transpose(2, 0, 1)
        ).all()
        assert "instances" not in sample and "annotations" not in sample
    for name in RESIZE_CROP:
        mapper = build(name, [])
        mapper.is_train = False
        with pytest.raises(ValueError, match=f"{type(mapper).__name__} is for training only"):
            mapper(records[name])


def test_ignore_label_of_the_training_set(cfg):
    MetadataCatalog.get("tests_mappers_other").ignore_label = 17
    cfg.DATASETS.TRAIN = ("tests_mappers_other", NAME)
    assert MaskFormerPanopticDatasetMapper(cfg).ignore_label == 17
    cfg.DATASETS.TRAIN = ("tests_mappers_without_label",)
    with pytest.raises(ValueError, match="'tests_mappers_without_label' has no ignore_label"):
        MaskFormerSemanticDatasetMapper(cfg)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty"):
        MaskFormerSemanticDatasetMapper(cfg)


def test_helpers_of_the_original_modules():
    for module in (
        coco_instance_new_baseline_dataset_mapper,
        coco_panoptic_new_baseline_dataset_mapper,
    ):
        assert callable(module.build_transform_gen)
    assert callable(coco_instance_new_baseline_dataset_mapper.convert_coco_poly_to_mask)
