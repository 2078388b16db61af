"""MaskFormer, the predecessor, and per-pixel classification: recipes, config files, checkpoints.

Keys, values and parameter names are those of MaskFormer's own release.
"""

import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_model

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.config import load_config
from mask2former.config_parts import get_value
from mask2former.modeling.full_mask_losses import MaskFormerCriterion, MaskFormerMatcher

CONFIGS = Path(__file__).parents[1] / "configs"
COCO = "maskformer/coco-panoptic/maskformer_panoptic_"
INSTANCE = "maskformer/coco-instance/maskformer_instance_R50_bs64_554k.yaml"
ADE20K = "maskformer/ade20k-150/"
FAPN = ADE20K + "swin/maskformer_swin_large_IN21k_384_fapn_bs16_160k_res640.yaml"
SEMANTIC = "coco/semantic-segmentation/maskformer2_R50_bs16_50ep.yaml"
SWIN_COCO = COCO.replace("maskformer_panoptic_", "swin/maskformer_panoptic_swin_")
TTA = "with TEST.AUG.ENABLED True"
# Recipe → its published figures.
FIGURES = {
    COCO + "R50_bs64_554k.yaml": "PQ 46.5, AP 33.0, mIoU 57.8 (paper, table 1)",
    COCO + "R101_bs64_554k.yaml": "PQ 47.6, AP 34.1, mIoU 59.3 (paper, table 1)",
    SWIN_COCO + "tiny_bs64_554k.yaml": "PQ 47.7 (MaskFormer)",
    SWIN_COCO + "small_bs64_554k.yaml": "PQ 49.7 (MaskFormer)",
    SWIN_COCO + "base_IN21k_384_bs64_554k.yaml": "PQ 51.8 (MaskFormer)",
    SWIN_COCO + "large_IN21k_384_bs64_554k.yaml": "PQ 52.7, AP 40.1, mIoU 64.8 (paper, table 1)",
    INSTANCE: "AP 34.0 (paper, table 2)",
    ADE20K + "maskformer_R50_bs16_160k.yaml": f"mIoU 44.5, {TTA} 46.7 (paper, table 3)",
    ADE20K + "maskformer_R101_bs16_160k.yaml": f"mIoU 45.5, {TTA} 47.2 (MaskFormer)",
    ADE20K + "swin/maskformer_swin_tiny_bs16_160k.yaml": f"mIoU 46.7, {TTA} 48.8 (paper, table 3)",
    ADE20K + "swin/maskformer_swin_small_bs16_160k.yaml": f"mIoU 49.8, {TTA} 51.0 (MaskFormer)",
    ADE20K + "swin/maskformer_swin_base_IN21k_384_bs16_160k_res640.yaml": (
        f"mIoU 52.7, {TTA} 53.9 (MaskFormer)"
    ),
    ADE20K + "swin/maskformer_swin_large_IN21k_384_bs16_160k_res640.yaml": (
        f"mIoU 54.1, {TTA} 55.6 (paper, table 3)"
    ),
    FAPN: f"mIoU 55.2, {TTA} 56.7 (paper, table 3)",
    ADE20K + "per_pixel_baseline_R50_bs16_160k.yaml": f"mIoU 39.2, {TTA} 40.9 (MaskFormer)",
    ADE20K + "per_pixel_baseline_plus_R50_bs16_160k.yaml": f"mIoU 41.9, {TTA} 42.9 (MaskFormer)",
    SEMANTIC: "mIoU 61.5 (paper, table 7)",
}
# What a config file of MaskFormer's release must be given here.
NAMES = [
    *("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", "StandardTransformerDecoder"),
    *("MODEL.MASK_FORMER.MATCHER_NAME", "MaskFormerMatcher"),
    *("MODEL.MASK_FORMER.CRITERION_NAME", "MaskFormerCriterion"),
]
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 16,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
}
TINY_OPTIONS = [str(part) for pair in TINY.items() for part in pair]


def load(recipe, *opts):
    return load_config(str(CONFIGS / recipe), list(opts))


# ---- recipes ----


@pytest.mark.parametrize("path", FIGURES)
def test_recipe_opens_with_its_command_hardware_and_figures(path):
    lines = (CONFIGS / path).read_text().splitlines()
    command = f"#   tools/train_net.py --config-file configs/{path} --num-gpus 8"
    batch_size = load(path).SOLVER.IMS_PER_BATCH
    if batch_size == 64:
        assert lines[1] == f"{command} --num-machines 8"
        assert lines[2] == "# Eight machines of eight GPUs, one image each (batch 64)."
    else:
        assert lines[1] == command and batch_size == 16
        assert lines[2] == "# Eight GPUs, two images each (batch 16)."
    assert re.fullmatch(r"# Published on val(2017)?: " + re.escape(FIGURES[path]) + r"\.", lines[3])


def test_every_recipe_is_known():
    files = {str(p.relative_to(CONFIGS)) for p in (CONFIGS / "maskformer").rglob("*.yaml")}
    assert files == {*FIGURES, ADE20K + "Base-ADE20K-150.yaml"} - {SEMANTIC}


@pytest.mark.parametrize("path", [path for path in FIGURES if "_swin_" in path])
def test_swin_recipes(path):
    cfg = load(path)
    solver, is_coco = cfg.SOLVER, "coco" in path
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.BACKBONE_MULTIPLIER) == (6e-5, 0.01, 1.0)
    assert (solver.WARMUP_FACTOR, solver.WARMUP_ITERS) == (1e-6, 1500)
    assert not solver.AMP.ENABLED
    assert cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE == "res5"
    assert cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME == (
        "FaPNPixelDecoder" if path == FAPN else "BasePixelDecoder"
    )
    side = 640 if "res640" in path else 512
    assert is_coco or (cfg.INPUT.SIZE_DIVISIBILITY, *cfg.INPUT.CROP.SIZE) == (side,) * 3
    if is_coco:
        assert cfg.INPUT.MAX_SIZE_TRAIN == (1000 if "large" in path else 1333)


def test_per_pixel_recipes():
    for name, plus in (("baseline", False), ("baseline_plus", True)):
        cfg = load(f"{ADE20K}per_pixel_{name}_R50_bs16_160k.yaml")
        assert cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor"
        assert cfg.MODEL.SEM_SEG_HEAD.NAME == f"PerPixelBaseline{'Plus' * plus}Head"
        assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 150
        assert cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES == (150 if plus else 100)
        assert (cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (
            *(0.0001, 0.0001),
            160000,
        )


def test_instance_and_semantic_recipes_of_coco():
    cfg = load(INSTANCE)
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 80
    assert cfg.INPUT.DATASET_MAPPER_NAME == "mask_former_instance"
    cfg, panoptic = load(SEMANTIC), load(SEMANTIC.replace("semantic-", "panoptic-"))
    assert cfg.SOLVER == panoptic.SOLVER and cfg.MODEL.RESNETS == panoptic.MODEL.RESNETS
    differing = {
        key for key, value in cfg.MODEL.items() if value != panoptic.MODEL[key]
    }  # the tasks that are evaluated
    assert differing == {"MASK_FORMER"}
    assert cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON and not cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON


# ---- config files of MaskFormer's release ----


def nested(values: dict) -> dict:
    """{dotted key: value} → nested dicts."""
    result: dict = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        node = result
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return result


# Keys of the original files, defaults included.
MODEL_KEYS = {
    "MODEL.META_ARCHITECTURE": "MaskFormer",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_TYPE": "basic",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.RESNETS.RES5_MULTI_GRID": [1, 1, 1],
    "MODEL.SEM_SEG_HEAD.NAME": "MaskFormerHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": 255,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": 4,
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": 1.0,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 256,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 256,
    "MODEL.SEM_SEG_HEAD.NORM": "GN",
    "MODEL.MASK_FORMER.DEEP_SUPERVISION": True,
    "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": 0.1,
    "MODEL.MASK_FORMER.DICE_WEIGHT": 1.0,
    "MODEL.MASK_FORMER.MASK_WEIGHT": 20.0,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 256,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 100,
    "MODEL.MASK_FORMER.NHEADS": 8,
    "MODEL.MASK_FORMER.DROPOUT": 0.1,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 2048,
    "MODEL.MASK_FORMER.ENC_LAYERS": 0,
    "MODEL.MASK_FORMER.DEC_LAYERS": 6,
    "MODEL.MASK_FORMER.PRE_NORM": False,
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.BASE_LR": 0.0001,
    "SOLVER.WEIGHT_DECAY": 0.0001,
    "SOLVER.BACKBONE_MULTIPLIER": 0.1,
    "SOLVER.WARMUP_FACTOR": 1.0,
    "SOLVER.CLIP_GRADIENTS.ENABLED": True,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "full_model",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.01,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": 2.0,
    "INPUT.FORMAT": "RGB",
    "INPUT.CROP.ENABLED": True,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": True,
    "DATALOADER.NUM_WORKERS": 4,
    "VERSION": 2,
}
COCO_KEYS = MODEL_KEYS | {
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 133,
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "TransformerEncoderPixelDecoder",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 6,
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "transformer_encoder",
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": 0,
    "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": True,
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": 0.8,
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": 0.8,
    "DATASETS.TRAIN": ["coco_2017_train_panoptic"],
    "DATASETS.TEST": ["coco_2017_val_panoptic"],
    "SOLVER.IMS_PER_BATCH": 64,
    "SOLVER.STEPS": [369600],
    "SOLVER.MAX_ITER": 554400,
    "SOLVER.WARMUP_ITERS": 10,
    "INPUT.MIN_SIZE_TRAIN": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
    "INPUT.CROP.TYPE": "absolute_range",
    "INPUT.CROP.SIZE": [384, 600],
    "INPUT.DATASET_MAPPER_NAME": "detr_panoptic",
    "TEST.EVAL_PERIOD": 0,
}
ADE20K_KEYS = MODEL_KEYS | {
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 150,
    "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "res5",
    "DATASETS.TRAIN": ["ade20k_sem_seg_train"],
    "DATASETS.TEST": ["ade20k_sem_seg_val"],
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.LR_SCHEDULER_NAME": "WarmupPolyLR",
    "SOLVER.MAX_ITER": 160000,
    "SOLVER.WARMUP_ITERS": 0,
    "INPUT.MIN_SIZE_TRAIN": [int(x * 0.1 * 512) for x in range(5, 21)],
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "INPUT.MIN_SIZE_TEST": 512,
    "INPUT.MAX_SIZE_TRAIN": 2048,
    "INPUT.MAX_SIZE_TEST": 2048,
    "INPUT.CROP.TYPE": "absolute",
    "INPUT.CROP.SIZE": [512, 512],
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": 1.0,
    "INPUT.COLOR_AUG_SSD": True,
    "INPUT.SIZE_DIVISIBILITY": 512,
    "INPUT.DATASET_MAPPER_NAME": "mask_former_semantic",
    "TEST.EVAL_PERIOD": 5000,
    "TEST.AUG.ENABLED": False,
    "TEST.AUG.MIN_SIZES": [256, 384, 512, 640, 768, 896],
    "TEST.AUG.MAX_SIZE": 3584,
    "TEST.AUG.FLIP": True,
}
# Recipe → keys of the original file.
ORIGINAL = {
    COCO + "R50_bs64_554k.yaml": COCO_KEYS,
    ADE20K + "maskformer_R50_bs16_160k.yaml": ADE20K_KEYS,
}


@pytest.mark.parametrize("recipe", ORIGINAL)
def test_original_file_loads_and_is_the_recipe(recipe, tmp_path):
    path = tmp_path / "original.yaml"
    path.write_text(yaml.safe_dump(nested(ORIGINAL[recipe])))
    theirs, ours = load_config(str(path), NAMES), load(recipe)
    # All tasks of table 1 are evaluated, where the original file is panoptic only.
    ours.DATASETS.TEST = theirs.DATASETS.TEST
    for task in ("SEMANTIC_ON", "INSTANCE_ON"):
        ours.MODEL.MASK_FORMER.TEST[task] = theirs.MODEL.MASK_FORMER.TEST[task]
    assert ours == theirs
    for key, value in ORIGINAL[recipe].items():
        resolved = get_value(theirs, key)
        assert (list(resolved) if isinstance(resolved, tuple) else resolved) == value, key


def test_original_file_without_the_names_says_which(tmp_path):
    path = tmp_path / "original.yaml"
    path.write_text(yaml.safe_dump(nested(ADE20K_KEYS)))
    message = "IN_FEATURE is 'res5'.*DECODER_NAME to StandardTransformerDecoder.*MaskFormerCrit"
    with pytest.raises(ValueError, match=message):
        load_config(str(path))


# ---- checkpoints ----

LINEAR = ("weight", "bias")


def attention_names(*modules: str) -> set[str]:
    parameters = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    return {f"{module}.{parameter}" for module in modules for parameter in parameters}


def layer_names(attentions: tuple[str, ...], num_norms: int) -> set[str]:
    modules = ("linear1", "linear2", *(f"norm{i + 1}" for i in range(num_norms)))
    return attention_names(*attentions) | {f"{m}.{p}" for m in modules for p in LINEAR}


def head_names(encoder_layers: int) -> set[str]:
    """The names below `sem_seg_head` in a checkpoint of MaskFormer, version 2."""
    convs = [f"adapter_{i}" for i in (1, 2, 3)] + [f"layer_{i}" for i in (1, 2, 3, 4)]
    pixel = {f"{conv}.{p}" for conv in convs for p in ("weight", "norm.weight", "norm.bias")}
    pixel |= {f"mask_features.{p}" for p in LINEAR}
    encoder = layer_names(("self_attn",), 2)
    pixel |= {f"transformer.encoder.layers.{i}.{n}" for i in range(encoder_layers) for n in encoder}
    decoder = layer_names(("self_attn", "multihead_attn"), 3)
    predictor = {f"transformer.decoder.layers.{i}.{n}" for i in range(6) for n in decoder}
    predictor |= {f"transformer.decoder.norm.{p}" for p in LINEAR}
    predictor |= {f"mask_embed.layers.{i}.{p}" for i in range(3) for p in LINEAR}
    predictor |= {f"class_embed.{p}" for p in LINEAR} | {"query_embed.weight"}
    projection = {f"input_proj.{p}" for p in LINEAR}
    # The encoder projects the backbone's features, and the decoder takes its output as it is.
    if encoder_layers:
        pixel |= projection
    else:
        predictor |= projection
    return {f"pixel_decoder.{n}" for n in pixel} | {f"predictor.{n}" for n in predictor}


@pytest.mark.parametrize(
    ("recipe", "encoder_layers"),
    [(COCO + "R50_bs64_554k.yaml", 6), (ADE20K + "maskformer_R50_bs16_160k.yaml", 0)],
)
@pytest.mark.parametrize("version", [1, 2])
def test_original_checkpoint_loads(recipe, encoder_layers, version, tmp_path):
    torch.manual_seed(0)
    model = build_model(load(recipe, *TINY_OPTIONS))
    assert type(model.criterion) is MaskFormerCriterion
    assert type(model.criterion.matcher) is MaskFormerMatcher
    expected = model.state_dict()
    prefix = "sem_seg_head."
    names = {n.removeprefix(prefix) for n in expected if n.startswith(prefix)}
    assert names == head_names(encoder_layers)
    rest = {n for n in expected if not n.startswith((prefix, "backbone."))}
    assert rest == {"criterion.empty_weight"}

    # Before version 2 the pixel decoder was the head itself. A pickle has no versions.
    old = prefix if version == 1 else f"{prefix}pixel_decoder."
    weights = {
        name.replace(f"{prefix}pixel_decoder.", old): torch.rand_like(value).numpy()
        for name, value in expected.items()
    }
    assert len(weights) == len(expected)
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "MaskFormer"}))
    Mask2FormerCheckpointer(model).load(str(path))
    for name, value in model.state_dict().items():
        stored = weights[name.replace(f"{prefix}pixel_decoder.", old)]
        assert torch.equal(value, torch.from_numpy(stored)), name


# ---- models ----


@pytest.mark.parametrize("recipe", [path for path in FIGURES if "_R50_" in path])
def test_every_parameter_gets_a_gradient(recipe, make_input):
    torch.manual_seed(0)
    queries = 150 if "plus" in recipe else 10
    options = [*TINY_OPTIONS, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", str(queries)]
    model = build_model(load(recipe, *options)).train()
    # Odd sizes, which differ, and an image without targets.
    batch = [make_input(61, 75, [0, 3]), make_input(64, 50, [], seed=1)]
    for sample in batch:
        height, width = sample["image"].shape[-2:]
        sample["sem_seg"] = torch.randint(0, 150, (height, width))
    sum(model(batch).values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name

    with torch.no_grad():
        result = model.eval()([{"image": batch[0]["image"], "height": 30, "width": 41}])[0]
    if "sem_seg" in result:
        assert result["sem_seg"].shape[-2:] == (30, 41)
    else:
        assert result["instances"].image_size == (30, 41)


def test_fapn_recipe_builds():
    if "FaPNPixelDecoder" not in SEM_SEG_HEADS_REGISTRY:
        pytest.skip("FaPNPixelDecoder is not registered")
    with torch.device("meta"):
        model = build_model(load(FAPN, "MODEL.DEVICE", "meta"))
    assert type(model.sem_seg_head.pixel_decoder).__name__ == "FaPNPixelDecoder"
