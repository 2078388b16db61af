"""Fixtures that several test files use: a small model's config, inputs for it, plain or fast."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.structures import Instances
from torch import nn

from mask2former import add_maskformer2_config
from mask2former.utils.twins import run_plain

# Classes 0 and 1 are things, class 2 is stuff.
TINY_METADATA = "tests_tiny_panoptic"
TINY_NUM_CLASSES = 3


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests without a GPU. One without the marker fails there instead of hiding."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True, scope="session")
def annotation_cache(tmp_path_factory) -> Iterator[str]:
    """Keep converted annotations out of the home folder, also in programs that tests start."""
    folder = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASK2FORMER_CACHE", folder)
        yield folder


@pytest.fixture(params=["plain", "fast"])
def mode(request) -> Callable[[nn.Module], nn.Module]:
    """Function that makes a module run as written, or leaves its fast twins on; returns it."""
    return run_plain if request.param == "plain" else lambda module: module


@pytest.fixture
def tiny_cfg() -> CfgNode:
    """Config of a Mask2Former that runs in milliseconds: ResNet-18, 64 channels, 7 queries."""
    metadata = MetadataCatalog.get(TINY_METADATA)
    metadata.thing_dataset_id_to_contiguous_id = {5: 0, 9: 1}
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.DATASETS.TRAIN = (TINY_METADATA,)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "MaskFormer"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    head = cfg.MODEL.SEM_SEG_HEAD
    head.NAME = "MaskFormerHead"
    head.PIXEL_DECODER_NAME = "MSDeformAttnPixelDecoder"
    head.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    head.NUM_CLASSES = TINY_NUM_CLASSES
    head.CONVS_DIM = 64
    head.MASK_DIM = 32
    head.NORM = "GN"
    head.TRANSFORMER_ENC_LAYERS = 2
    model = cfg.MODEL.MASK_FORMER
    model.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    model.TRANSFORMER_IN_FEATURE = "multi_scale_pixel_decoder"
    model.HIDDEN_DIM = 64
    model.NHEADS = 4
    model.DIM_FEEDFORWARD = 128
    model.DEC_LAYERS = 5
    model.DROPOUT = 0.0
    model.NUM_OBJECT_QUERIES = 7
    model.TRAIN_NUM_POINTS = 64
    model.CLASS_WEIGHT = 2.0
    model.MASK_WEIGHT = 5.0
    model.DICE_WEIGHT = 5.0
    model.TEST.PANOPTIC_ON = True
    model.TEST.INSTANCE_ON = True
    model.TEST.SEMANTIC_ON = True
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    return cfg


@pytest.fixture
def make_input() -> Callable[..., dict[str, Any]]:
    """Function (height, width, labels, seed=0, **extra) → one training input of the model."""

    def make(
        height: int, width: int, labels: list[int], seed: int = 0, **extra: Any
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        instances = Instances((height, width))
        instances.gt_classes = torch.tensor(labels, dtype=torch.int64)
        # Disjoint vertical stripes, one per label.
        column = torch.arange(width) * max(len(labels), 1) // width
        masks = column[None] == torch.arange(len(labels))[:, None]  # (T, W)
        instances.gt_masks = masks[:, None].repeat(1, height, 1)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        return {"image": image, "instances": instances, **extra}

    return make


@pytest.fixture
def same_points(monkeypatch) -> None:
    """The same points for every image, layer and mask, however they are drawn."""
    points, original = torch.rand(1000, 2), torch.rand

    def rand(*size, **options):
        if size[-1] != 2:
            return original(*size, **options)
        return points[: size[-2]].expand(size).contiguous()

    monkeypatch.setattr(torch, "rand", rand)


@pytest.fixture
def restore_loggers() -> Iterator[None]:
    """Undo the loggers that a program sets up for its output folder."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "mask2former")]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers[:] = handlers
