"""Recipes with a light decoder, and the block for data of your own: what they change, a step."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from mask2former.config import load_config
from mask2former.optimizer import build_optimizer, scale_learning_rate
from mask2former.train_step import Step

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
FOLDER = "coco/panoptic-segmentation/light"
# Recipe → depth of the ResNet, pixel decoder and its encoder layers, size of training images.
RECIPES = {
    "maskformer2_R50_fpn_bs16_50ep.yaml": (50, "BasePixelDecoder", 0, 1024),
    "maskformer2_R50_msdeformattn_bs16_50ep.yaml": (50, "MSDeformAttnPixelDecoder", 3, 1024),
    "maskformer2_R18_fpn_bs16_50ep.yaml": (18, "BasePixelDecoder", 0, 1024),
    "maskformer2_R18_fpn_640_bs16_50ep.yaml": (18, "BasePixelDecoder", 0, 640),
}
SHAPES = CONFIGS / "shapes/panoptic-segmentation"
# Of the quickstart recipe: decoder layers and queries, pixel decoder, image size.
SHAPES_RECIPES = {
    "maskformer2_R18_9layers.yaml": (9, 30, "MSDeformAttnPixelDecoder", 128),
    "maskformer2_R18_quickstart.yaml": (3, 30, "MSDeformAttnPixelDecoder", 128),
    "light/maskformer2_R18_fpn.yaml": (3, 15, "BasePixelDecoder", 128),
    "light/maskformer2_R18_fpn_96.yaml": (1, 15, "BasePixelDecoder", 96),
}
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
}


def leaves(cfg):
    return dict(line.split(": ", 1) for line in flat(cfg))


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}: {value!r}"


def test_every_light_recipe_is_known():
    assert {path.name for path in (CONFIGS / FOLDER).iterdir()} == {*RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
def test_differences_from_the_full_recipe(recipe, caplog):
    cfg = load_config(str(CONFIGS / FOLDER / recipe))
    assert "not read" not in caplog.text
    full = load_config(str(CONFIGS / FOLDER / "../maskformer2_R50_bs16_50ep.yaml"))
    depth, pixel_decoder, num_layers, size = RECIPES[recipe]
    head, decoder = full.MODEL.SEM_SEG_HEAD, full.MODEL.MASK_FORMER
    head.PIXEL_DECODER_NAME, head.TRANSFORMER_ENC_LAYERS = pixel_decoder, num_layers
    decoder.NUM_OBJECT_QUERIES, decoder.DEC_LAYERS, decoder.DIM_FEEDFORWARD = 50, 4, 1024
    if depth == 18:
        full.MODEL.WEIGHTS = "R-18.pkl"
        full.MODEL.RESNETS.DEPTH, full.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    if size == 640:
        full.INPUT.IMAGE_SIZE, full.INPUT.MIN_SIZE_TEST, full.INPUT.MAX_SIZE_TEST = 640, 512, 853
    assert leaves(cfg) == leaves(full)


def test_every_recipe_of_shapes_is_known():
    files = {str(path.relative_to(SHAPES)) for path in SHAPES.rglob("*.yaml")}
    assert files == {*SHAPES_RECIPES}


@pytest.mark.parametrize("recipe", SHAPES_RECIPES)
def test_differences_from_the_quickstart(recipe):
    opts = ["MODEL.DEVICE", "cpu"]
    cfg = load_config(str(SHAPES / recipe), opts)
    full = load_config(str(SHAPES / "maskformer2_R18_quickstart.yaml"), opts)
    num_layers, num_queries, pixel_decoder, size = SHAPES_RECIPES[recipe]
    full.MODEL.MASK_FORMER.DEC_LAYERS = num_layers + 1
    full.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = num_queries
    if pixel_decoder == "BasePixelDecoder":
        full.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = pixel_decoder
        full.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 0
    if size == 96:
        full.INPUT.IMAGE_SIZE, full.INPUT.MIN_SIZE_TEST, full.INPUT.MAX_SIZE_TEST = 96, 96, 144
    assert leaves(cfg) == leaves(full)


@pytest.mark.parametrize("recipe", RECIPES)
def test_head_of_the_file(recipe):
    """The command and the size of the model, as `tools/analyze_model.py` counts it."""
    lines = (CONFIGS / FOLDER / recipe).read_text().splitlines()
    assert lines[1] == (
        f"#   tools/train_net.py --config-file configs/{FOLDER}/{recipe} --num-gpus 8"
    )
    (stated,) = [float(x) for line in lines for x in re.findall(r"([\d.]+) M parameters", line)]
    with torch.device("meta"):
        model = build_model(load_config(str(CONFIGS / FOLDER / recipe), ["MODEL.DEVICE", "meta"]))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(stated, abs=0.05)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_on_own_data(tmp_path, make_input, recipe):
    """With the block for data of your own: four images, two at a time; each weight changes."""
    path = tmp_path / "own.yaml"
    path.write_text(
        f"_BASE_: [{CONFIGS / FOLDER / recipe}, {CONFIGS / '_base/own_data.yaml'}]\nVERSION: 2\n"
    )
    cfg = load_config(str(path), [x for key, value in SMALL.items() for x in (key, str(value))])
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.NUM_ACCUMULATION_STEPS) == (8, 4)
    cfg = scale_learning_rate(cfg)
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.0001 * 8 / 16)
    torch.manual_seed(0)
    model = build_model(cfg)
    step = Step(model, iter([[make_input(64, 64, [0, 7])] * 4]), build_optimizer(cfg, model))
    step.num_accumulation_steps = 2
    step._write_metrics = lambda losses, data_time: losses_of.update(losses)
    losses_of: dict = {}
    with EventStorage():
        step.run_step()
    assert len(losses_of) == 3 * 4 and all(loss.isfinite() for loss in losses_of.values())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    unused = [name for name in trained if model.get_parameter(name).grad is None]
    assert trained and not unused
