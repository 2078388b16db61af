"""A model of four small convolutions as backbone: exporters take seconds for it, not minutes.

Its weights are the same in each test, so that what was exported once serves several.
"""

import shutil

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from torch import nn

from mask2former.export import ExportOptions, export_model, load_exported
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


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture
def traced_file(predictor, shared_folder, tmp_path) -> str:
    """A TorchScript file and its description, of 64 x 96 pixels, which the test may change."""
    path = shared_folder / "model.ts"
    if not path.exists():
        export_model(predictor, path, ExportOptions(format="torchscript", size=(64, 96)))
    for name in ("model.ts", "model.ts.json"):
        shutil.copy(shared_folder / name, tmp_path)
    return str(tmp_path / "model.ts")


@pytest.fixture
def assert_same_predictions(predictor):
    """Whether a file predicts for images of two sizes what the model does."""

    def check(path, sizes=((48, 60), (64, 90)), opts=()):
        exported = load_exported(path, opts=opts)
        cfg = predictor.cfg.clone()
        cfg.merge_from_list([*opts])
        live_predictor = Predictor.from_model(
            predictor.model, cfg, predictor.metadata, predictor.class_names
        )
        assert exported.class_names == predictor.class_names
        generator = np.random.default_rng(0)
        images = [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
        for image in images:
            live, own = live_predictor(image), exported(image)
            torch.testing.assert_close(own["sem_seg"], live["sem_seg"], atol=1e-3, rtol=1e-3)
            assert torch.equal(own["panoptic_seg"][0], live["panoptic_seg"][0])
            assert own["panoptic_seg"][1] == live["panoptic_seg"][1]
            torch.testing.assert_close(
                own["instances"].scores.sort().values,
                live["instances"].scores.sort().values,
                atol=1e-3,
                rtol=1e-3,
            )
        results = exported.predict(images, batch_size=2)
        assert [x.image_size for x in results] == [image.shape[:2] for image in images]

    return check
