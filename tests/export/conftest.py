"""A model of four small convolutions as backbone: exporters take seconds for it, not minutes."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import nn

from mask2former.predictor import Predictor

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


class TinyBackbone(Backbone):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.stages = nn.ModuleList(nn.Conv2d(8, 8, 2, 2) for _ in range(3))
        self.size_divisibility_ = 32

    @property
    def size_divisibility(self):
        return self.size_divisibility_

    def output_shape(self):
        return {name: ShapeSpec(channels=8, stride=stride) for name, stride in STRIDES.items()}

    def forward(self, x):
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1].relu()))
        return dict(zip(STRIDES, maps, strict=True))


if "tests_tiny_export_backbone" not in BACKBONE_REGISTRY:

    @BACKBONE_REGISTRY.register()
    def tests_tiny_export_backbone(cfg, input_shape):
        return TinyBackbone()


@pytest.fixture
def predictor(tiny_cfg) -> Predictor:
    torch.manual_seed(0)
    cfg = tiny_cfg
    cfg.MODEL.BACKBONE.NAME = "tests_tiny_export_backbone"
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 1
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 32
    cfg.MODEL.SEM_SEG_HEAD.MASK_DIM = 8
    cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD = 16
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 2
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    # A training set's metadata without panoptic files.
    from detectron2.data import MetadataCatalog

    model = build_model(cfg).eval()
    # Larger masks and classes than those of an untrained model, so that there are segments.
    with torch.no_grad():
        model.sem_seg_head.predictor.class_embed.weight.mul_(8)
    return Predictor.from_model(
        model, cfg, MetadataCatalog.get(cfg.DATASETS.TRAIN[0]), ("a", "b", "c")
    )
