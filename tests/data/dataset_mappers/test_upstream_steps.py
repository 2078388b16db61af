"""The original's mappers against its own steps: full-size arrays, a boolean mask per target."""

import copy
import random

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, polygons_to_bitmask
from panopticapi.utils import id2rgb, rgb2id
from PIL import Image

from mask2former.data.dataset_mappers import build_mapper
from mask2former.data.packed_masks import PackedMasks

NAMES = [
    "coco_instance_lsj",
    "coco_panoptic_lsj",
    "mask_former_instance",
    "mask_former_panoptic",
    "mask_former_semantic",
]
SIZES = [(48, 64), (70, 33), (7, 9)]


def make_record(folder, size: tuple[int, int], num_objects: int, seed: int) -> dict:
    """A noise image with blocks of labels and segments, void, crowds and overlapping objects."""
    rng = np.random.default_rng(seed)
    height, width = size
    blocks = rng.integers(0, 9, (height // 6 + 1, width // 6 + 1))
    labels = np.kron(blocks, np.ones((6, 6), dtype=int))[:height, :width]
    labels[0, 0] = 0  # a one-pixel segment, unless its class has another block
    files = {key: str(folder / f"{key}.png") for key in ("image", "semantic", "panoptic")}
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(files["image"])
    Image.fromarray(np.where(labels == 8, 255, labels).astype(np.uint8)).save(files["semantic"])
    Image.fromarray(id2rgb(labels * 70001)).save(files["panoptic"])

    segments = [
        {"id": int(i) * 70001, "category_id": int(i) % 5, "iscrowd": int(i == 3)}
        for i in rng.permutation(np.unique(labels[labels > 0]))
    ]
    annotations = []
    for i in range(num_objects):
        corners = rng.uniform(-2, 1.1 * width, 2), rng.uniform(-2, 1.1 * height, 2)
        (x0, x1), (y0, y1) = map(sorted, corners)
        segmentation = [np.round([x0, y0, x1, y0 + 1, x1 - 1, y1, x0, y1], i % 3).tolist()]
        if i % 4 == 0:
            mask = rng.random(size) < 0.3
            segmentation = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
        elif i % 4 == 1:
            segmentation.append(rng.uniform(0, min(size), 10).tolist())  # self-intersecting
        annotations.append(
            {"category_id": i % 5, "segmentation": segmentation, "iscrowd": int(i % 7 == 5)}
        )
    return {
        "file_name": files["image"],
        "sem_seg_file_name": files["semantic"],
        "pan_seg_file_name": files["panoptic"],
        "segments_info": segments,
        "annotations": annotations,
    }


def record_for(name: str, record: dict) -> dict:
    keys = {"instance": ["annotations"], "panoptic": ["pan_seg_file_name", "segments_info"]}
    used = ["file_name", *next((v for k, v in keys.items() if k in name), [])]
    if name in ("mask_former_panoptic", "mask_former_semantic"):
        used.append("sem_seg_file_name")
    return {key: record[key] for key in used}


def upstream_sample(
    name: str, record: dict, augmentations: list, padded_size: int
) -> dict[str, torch.Tensor]:
    """The expected sample, from Detectron2's functions and N full-size masks."""
    image = utils.read_image(record["file_name"], "RGB")
    sem_seg = None
    if "sem_seg_file_name" in record:
        sem_seg = utils.read_image(record["sem_seg_file_name"]).astype("double")
    inputs = T.AugInput(image, sem_seg=sem_seg)
    transforms = T.AugmentationList(augmentations)(inputs)
    height, width = inputs.image.shape[:2]
    classes, masks = [], []
    if "instance" in name:
        for annotation in copy.deepcopy(record["annotations"]):
            if annotation["iscrowd"]:
                continue
            shape = annotation["segmentation"]
            if isinstance(shape, list):
                polygons = [np.asarray(p).reshape(-1, 2) for p in shape]
                polygons = [p.reshape(-1) for p in transforms.apply_polygons(polygons)]
                empty, mask = True, np.zeros((height, width), dtype=bool)
                if polygons:
                    points = np.concatenate(polygons).reshape(-1, 2)
                    empty = np.ptp(points, axis=0).min() <= 1e-5
                    mask = polygons_to_bitmask(polygons, height, width)
            else:
                mask = transforms.apply_segmentation(mask_util.decode(shape)) == 1
                empty = not mask.any()
            if not (empty and name == "coco_instance_lsj"):
                classes.append(annotation["category_id"])
                masks.append(mask)
    elif "panoptic" in name:
        colours = utils.read_image(record["pan_seg_file_name"], "RGB")
        ids = rgb2id(transforms.apply_segmentation(colours))
        targets = [s for s in record["segments_info"] if not s["iscrowd"]]
        classes = [s["category_id"] for s in targets]
        masks = [ids == s["id"] for s in targets]
    else:
        classes = [int(c) for c in np.unique(inputs.sem_seg) if c != 255]
        masks = [inputs.sem_seg == c for c in classes]

    padding = [0, padded_size - width, 0, padded_size - height]
    image = torch.from_numpy(inputs.image.transpose(2, 0, 1).copy())
    stacked = BitMasks(np.array(masks).reshape(-1, height, width)).tensor
    result = {
        "image": F.pad(image, padding, value=128),
        "gt_classes": torch.tensor(classes, dtype=torch.int64),
        "gt_masks": F.pad(stacked, padding),
    }
    if sem_seg is not None:
        labels = torch.from_numpy(inputs.sem_seg.astype(np.int64))
        result["sem_seg"] = F.pad(labels, padding, value=255)
    if "instance" in name and "lsj" in name:
        inside = transforms.apply_segmentation(np.ones(record_size(record)))
        result["padding_mask"] = torch.from_numpy(inside != 1)
    return result


def record_size(record: dict) -> tuple[int, int]:
    return Image.open(record["file_name"]).size[::-1]


@pytest.mark.parametrize("num_objects", [0, 1, 30])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_same_as_upstream(name, size, num_objects, cfg, tmp_path):
    cfg.INPUT.DATASET_MAPPER_NAME = name
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = 80, 0.2, 2.0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (20, 41, 63, 90), 130
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = "absolute", (30, 40)
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    cfg.INPUT.COLOR_AUG_SSD = True
    cfg.INPUT.SIZE_DIVISIBILITY = 45
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 8
    mapper = build_mapper(cfg)
    padded_size = 80 if "lsj" in name else 45
    for seed in range(4):
        record = record_for(name, make_record(tmp_path, size, num_objects, seed))
        random.seed(seed)
        np.random.seed(seed)
        expected = upstream_sample(name, record, mapper.tfm_gens, padded_size)
        draws = random.random(), np.random.rand()
        random.seed(seed)
        np.random.seed(seed)
        sample = mapper(record)
        assert (random.random(), np.random.rand()) == draws

        packed = sample["instances"]._fields["gt_masks"]
        assert isinstance(packed, PackedMasks)
        assert packed.overlapping == ("instance" in name)
        actual = sample | sample["instances"].get_fields()
        for key, tensor in expected.items():
            assert actual[key].dtype == tensor.dtype, key
            assert torch.equal(actual[key], tensor), key
