"""A 4x6 image with annotations of every kind, and mappers for it."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.projects.deeplab import add_deeplab_config
from panopticapi.utils import id2rgb
from PIL import Image

from mask2former import add_maskformer2_config
from mask2former.data.dataset_mappers import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    DETRPanopticDatasetMapper,
    MaskFormerInstanceDatasetMapper,
    MaskFormerPanopticDatasetMapper,
    MaskFormerSemanticDatasetMapper,
)

MAPPERS = {
    "coco_instance_lsj": COCOInstanceNewBaselineDatasetMapper,
    "coco_panoptic_lsj": COCOPanopticNewBaselineDatasetMapper,
    "detr_panoptic": DETRPanopticDatasetMapper,
    "mask_former_instance": MaskFormerInstanceDatasetMapper,
    "mask_former_panoptic": MaskFormerPanopticDatasetMapper,
    "mask_former_semantic": MaskFormerSemanticDatasetMapper,
}
NAME = "tests_mappers"

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
SEM_SEG = np.array(
    [[0, 0, 0, 2, 2, 2], [0, 0, 0, 2, 2, 2], [1, 1, 1, 2, 2, 2], [255, 255, 1, 2, 2, 2]]
)
PAN_SEG = np.array(
    [
        [7, 7, 7, 500, 500, 500],
        [7, 7, 7, 500, 500, 500],
        [9, 9, 9, 500, 500, 500],
        [0] * 2 + [9] * 4,
    ]
)
SEGMENTS = [
    {"id": 500, "category_id": 2, "iscrowd": 0, "isthing": False},
    {"id": 9, "category_id": 0, "iscrowd": 1, "isthing": True},
    {"id": 7, "category_id": 0, "iscrowd": 0, "isthing": True},
]
SQUARE = [1, 1, 3, 1, 3, 3, 1, 3]  # columns 1 and 2 of rows 1 and 2
BOTTOM_RIGHT = np.zeros((4, 6), dtype=np.uint8)
BOTTOM_RIGHT[3, 4:] = 1


def expected_targets(name: str) -> tuple[list[int], np.ndarray]:
    """Classes and masks of the image as stored on disk."""
    if "instance" in name:
        square = np.zeros((4, 6), dtype=bool)
        square[1:3, 1:3] = True
        return [1, 0], np.stack([square, BOTTOM_RIGHT.astype(bool)])
    if "panoptic" in name:
        return [2, 0], np.stack([PAN_SEG == 500, PAN_SEG == 7])
    return [0, 1, 2], np.stack([SEM_SEG == label for label in (0, 1, 2)])


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    MetadataCatalog.get(NAME).ignore_label = 255
    cfg.DATASETS.TRAIN = (NAME,)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 1.0
    cfg.INPUT.IMAGE_SIZE = 6
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    return cfg


@pytest.fixture
def mappers() -> dict[str, type]:
    """Mapper classes by their names in the config."""
    return MAPPERS


@pytest.fixture
def gt() -> SimpleNamespace:
    """The image and its annotations; `targets(name)`: classes and masks as stored on disk."""
    return SimpleNamespace(
        pixels=PIXELS, sem_seg=SEM_SEG, pan_seg=PAN_SEG, segments=SEGMENTS, targets=expected_targets
    )


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    paths = {key: str(tmp_path / f"{key}.png") for key in ("image", "semantic", "panoptic")}
    Image.fromarray(PIXELS).save(paths["image"])
    Image.fromarray(SEM_SEG.astype(np.uint8)).save(paths["semantic"])
    Image.fromarray(id2rgb(PAN_SEG)).save(paths["panoptic"])
    return paths


@pytest.fixture
def records(files) -> dict[str, dict]:
    """A record of the image for each mapper."""
    image = {"file_name": files["image"], "image_id": 3, "height": 4, "width": 6}
    instance = image | {
        "annotations": [
            {"category_id": 1, "segmentation": [SQUARE], "keypoints": [1.0, 1.0, 2]},
            {
                "category_id": 0,
                "iscrowd": 0,
                "segmentation": mask_util.encode(np.asfortranarray(BOTTOM_RIGHT)),
            },
            {"category_id": 2, "iscrowd": 1, "segmentation": [SQUARE]},
        ]
    }
    panoptic = image | {"pan_seg_file_name": files["panoptic"], "segments_info": SEGMENTS}
    semantic = image | {"sem_seg_file_name": files["semantic"]}
    return {
        "coco_instance_lsj": instance,
        "coco_panoptic_lsj": panoptic,
        "detr_panoptic": panoptic,
        "mask_former_instance": instance,
        "mask_former_panoptic": panoptic | semantic,
        "mask_former_semantic": semantic,
    }


@pytest.fixture
def build() -> Callable:
    """Function (name, augmentations, size_divisibility=-1, **kwargs) → mapper.

    Calls the constructors with the original's arguments.
    """

    def build(name: str, augmentations: list, size_divisibility: int = -1, **kwargs):
        kwargs |= {"is_train": True, "image_format": "RGB"}
        if name.endswith("lsj"):
            return MAPPERS[name](tfm_gens=augmentations, **kwargs)
        if name == "detr_panoptic":
            return MAPPERS[name](tfm_gens=augmentations, crop_gen=None, **kwargs)
        if name != "mask_former_instance":
            kwargs["ignore_label"] = 255
        return MAPPERS[name](
            augmentations=augmentations, size_divisibility=size_divisibility, **kwargs
        )

    return build
