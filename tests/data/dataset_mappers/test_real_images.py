"""The mappers on real COCO images, against Detectron2's own steps."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.structures import BitMasks
from panopticapi.utils import rgb2id

from mask2former import add_maskformer2_config
from mask2former.data.dataset_mappers import build_mapper
from mask2former.data.datasets.register_coco_panoptic_annos_semseg import (
    get_metadata,
    load_coco_panoptic_json,
)

COCO = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "coco"

pytestmark = pytest.mark.skipif(not COCO.is_dir(), reason=f"no COCO images in {COCO}")


def make_mapper(name: str, num_classes: int):
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.INPUT.DATASET_MAPPER_NAME = name
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.IMAGE_SIZE = 512
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (300, 400), 600
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = "absolute", (256, 256)
    cfg.INPUT.SIZE_DIVISIBILITY = 256
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = num_classes
    cfg.DATASETS.TRAIN = ("coco_2017_train_panoptic_with_sem_seg",)
    return build_mapper(cfg)


@pytest.fixture(scope="module")
def panoptic() -> list[dict]:
    split = "val2017"
    return load_coco_panoptic_json(
        str(COCO / "annotations" / f"panoptic_{split}.json"),
        str(COCO / split),
        str(COCO / f"panoptic_{split}"),
        str(COCO / f"panoptic_semseg_{split}"),
        get_metadata(),
    )


@pytest.fixture(scope="module")
def instances() -> dict[str, list[dict]]:
    """Train annotations are polygons, val annotations are RLEs."""
    return {
        split: load_coco_json(
            str(COCO / "annotations" / f"instances_{split}2017.json"),
            str(COCO / f"{split}2017"),
            f"tests_coco_{split}",
        )
        for split in ("train", "val")
    }


def augmented(record: dict, augmentations: list) -> tuple[torch.Tensor, T.TransformList]:
    image, transforms = T.apply_transform_gens(
        augmentations, utils.read_image(record["file_name"], "RGB")
    )
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), transforms


JITTER = [T.RandomFlip(), T.ResizeScale(0.1, 2.0, 512, 512), T.FixedSizeCrop((512, 512))]
RESIZE_CROP = [
    T.ResizeShortestEdge((300, 400), 600, "choice"),
    T.RandomCrop("absolute", (256, 256)),
    T.RandomFlip(),
]


@pytest.mark.parametrize(
    "name, augmentations",
    [("coco_panoptic_lsj", JITTER), ("mask_former_panoptic", RESIZE_CROP)],
)
def test_panoptic(name, augmentations, panoptic):
    mapper = make_mapper(name, 133)
    for seed, record in enumerate(panoptic[:4]):
        np.random.seed(seed)
        sample = mapper({k: v for k, v in record.items() if k != "sem_seg_file_name"})
        np.random.seed(seed)
        image, transforms = augmented(record, augmentations)
        colours = utils.read_image(record["pan_seg_file_name"], "RGB")
        ids = rgb2id(transforms.apply_segmentation(colours))
        targets = [s for s in record["segments_info"] if not s["iscrowd"]]
        masks = BitMasks(np.stack([ids == s["id"] for s in targets]))
        assert torch.equal(sample["image"], image)
        assert sample["instances"].gt_classes.tolist() == [s["category_id"] for s in targets]
        assert torch.equal(sample["instances"].gt_masks, masks.tensor)
        boxes = masks.get_bounding_boxes().tensor
        assert torch.equal(sample["instances"].gt_boxes.tensor, boxes)


def test_jittered_polygons(instances):
    mapper = make_mapper("coco_instance_lsj", 80)
    num_targets = 0
    for seed, record in enumerate(instances["train"][:8]):
        np.random.seed(seed)
        sample = mapper(record)
        np.random.seed(seed)
        image, transforms = augmented(record, JITTER)
        annotations = [
            utils.transform_instance_annotations(annotation, transforms, (512, 512))
            for annotation in copy.deepcopy(record["annotations"])
            if not annotation["iscrowd"]
        ]
        expected = utils.annotations_to_instances(annotations, (512, 512))
        expected.gt_boxes = expected.gt_masks.get_bounding_boxes()
        expected = utils.filter_empty_instances(expected)
        masks = BitMasks.from_polygon_masks(expected.gt_masks, 512, 512).tensor
        assert torch.equal(sample["image"], image)
        assert torch.equal(sample["instances"].gt_classes, expected.gt_classes)
        assert torch.equal(sample["instances"].gt_masks, masks)
        assert torch.equal(sample["instances"].gt_boxes.tensor, expected.gt_boxes.tensor)
        num_targets += len(masks)
    assert num_targets > 10


@pytest.mark.parametrize("split", ["train", "val"])
def test_cropped_instances(split, instances):
    mapper = make_mapper("mask_former_instance", 80)
    for seed, record in enumerate(instances[split][:6]):
        np.random.seed(seed)
        sample = mapper(record)
        np.random.seed(seed)
        image, transforms = augmented(record, RESIZE_CROP)
        annotations = [
            utils.transform_instance_annotations(annotation, transforms, (256, 256))
            for annotation in copy.deepcopy(record["annotations"])
            if not annotation["iscrowd"]
        ]
        expected = utils.annotations_to_instances(annotations, (256, 256), "bitmask")
        assert torch.equal(sample["image"], image)
        assert torch.equal(sample["instances"].gt_classes, expected.gt_classes)
        assert torch.equal(sample["instances"].gt_masks, expected.gt_masks.tensor)


def test_rle_and_polygons_jitter_alike(instances):
    """Masks from scaled polygons and scaled masks are nearly the same."""
    record = next(r for r in instances["train"] if any(not a["iscrowd"] for a in r["annotations"]))
    size = (record["height"], record["width"])
    as_masks = copy.deepcopy(record)
    for annotation in as_masks["annotations"]:
        if not annotation["iscrowd"]:
            polygons = [np.array(p) for p in annotation["segmentation"]]
            mask = BitMasks.from_polygon_masks([polygons], *size).tensor[0].numpy()
            annotation["segmentation"] = mask
    mapper = make_mapper("coco_instance_lsj", 80)
    results = []
    for variant in (record, as_masks):
        np.random.seed(1)
        results.append(mapper(variant)["instances"])
    large = results[0].gt_masks.sum(dim=(1, 2)) > 2000
    assert large.any() and len(results[0]) == len(results[1])
    inter = (results[0].gt_masks & results[1].gt_masks).sum(dim=(1, 2))
    union = (results[0].gt_masks | results[1].gt_masks).sum(dim=(1, 2))
    assert (inter[large] / union[large] > 0.95).all()
