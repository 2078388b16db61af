"""Wrong values of every config key: each is refused by name, or on a list of reviewed exceptions.

One wrong value of each kind for every key of several recipes, set in a loaded config.
"""

import fnmatch
import math
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from mask2former.config import check_config, load_config
from mask2former.config_checks import check_parts, check_training
from mask2former.config_parts import get_value
from mask2former.config_schema import GROUPS, unread_keys
from mask2former.data.dataset_mappers import DATASET_MAPPER_REGISTRY
from mask2former.maskformer_model import MaskFormer
from mask2former.modeling.backbone.swin import D2SwinTransformer

CONFIGS = Path(__file__).parents[1] / "configs"
R50 = "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
SWIN = "ade20k/semantic-segmentation/swin/maskformer2_swin_tiny_bs16_160k.yaml"
# Recipes that together read every key of the table: file and overrides.
BASES = {
    "R50": (R50, {}),
    "Swin": (SWIN, {}),
    "LVIS": (
        "lvis/instance-segmentation/maskformer2_R50_bs16_50ep.yaml",
        {"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BiFPNPixelDecoder"},
    ),
    "Ablation": (
        R50,
        {
            "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": "ConfigurableTransformerDecoder",
            "MODEL.MASK_FORMER.DECODER.CROSS_ATTENTION": "smca",
        },
    ),
    "SGD": (
        "cityscapes/semantic-segmentation/maskformer2_R101_bs16_90k.yaml",
        {
            "SOLVER.OPTIMIZER": "SGD",
            "SOLVER.NESTEROV": True,
            "SOLVER.LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR",
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
            "TEST.AUG.ENABLED": True,
            "TEST.PRECISE_BN.ENABLED": True,
            "MODEL.BACKBONE.NAME": "build_resnet_deeplab_backbone",
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, False, True],
        },
    ),
    "timm": (
        "coco/panoptic-segmentation/timm/maskformer2_convnext_tiny_bs16_50ep.yaml",
        {"MODEL.TIMM.NAME": "test_convnext"},
    ),
    "ViT": (
        "coco/panoptic-segmentation/timm/maskformer2_dinov2_base_bs16_50ep.yaml",
        {"MODEL.VIT.NAME": "test_vit"},
    ),
    "FPN": (
        "mapillary-vistas/semantic-segmentation/maskformer2_R50_bs16_300k.yaml",
        {
            "SOLVER.LR_SCHEDULER_NAME": "WarmupCosineLR",
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "value",
            "INPUT.CROP.TYPE": "relative",
            "INPUT.CROP.SIZE": [0.5, 0.5],
            "INPUT.MIN_SIZE_TRAIN": [512, 1024],
            "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range",
            "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
            "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "TransformerEncoderPixelDecoder",
            "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": "StandardTransformerDecoder",
            "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "transformer_encoder",
        },
    ),
}
# Keys that no part of this project reads.
OTHER_ARCHITECTURES = (
    "VERSION",
    "GLOBAL.*",
    "DATASETS.PRECOMPUTED_PROPOSAL_*",
    "DATASETS.PROPOSAL_FILES_*",
    "MODEL.ANCHOR_GENERATOR.*",
    "MODEL.PANOPTIC_FPN.*",
    "MODEL.PROPOSAL_GENERATOR.*",
    "MODEL.RETINANET.*",
    "MODEL.ROI_*",
    "MODEL.RPN.*",
    "MODEL.SEM_SEG_HEAD.ASPP_*",
    "MODEL.SEM_SEG_HEAD.LOSS_TYPE",
    "MODEL.SEM_SEG_HEAD.PROJECT_*",
    "MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV",
    "TEST.KEYPOINT_OKS_SIGMAS",
)
NAN, INF = math.nan, math.inf
NUMBERS = {
    "null": None,
    "text": "wrong",
    "negative": -1,
    "zero": 0,
    "fraction": 1.5,
    "huge": 10**18,
    "huge fraction": 1e30,
    "too large for a float": 10**400,
    "NaN": NAN,
    "infinite": INF,
    "minus infinite": -INF,
    "flag": True,
    "empty list": [],
    "list": [1],
    "mapping": {"a": 1},
}
FLAGS = {"null": None, "text": "no", "number": 1, "fraction": 0.5, "NaN": NAN, "empty list": []}
TEXTS = {
    "null": None,
    "number": 3,
    "NaN": NAN,
    "flag": True,
    "empty": "",
    "space": " ",
    "another": "no such thing",
    "empty list": [],
    "list": ["x"],
}
ITEMS = {
    kind: NUMBERS[kind]
    for kind in ("null", "text", "negative", "zero", "fraction", "huge", "NaN", "infinite", "flag")
}
# What a key takes although it looks wrong: reason → kinds and keys (patterns).
ACCEPTED = {
    "a part or data set of another project, looked up before a run": (
        ("another", "text items"),
        ("*NAME", "MODEL.META_ARCHITECTURE", "DATASETS.T*"),
    ),
    "text without a meaning of its own": (("another", "space"), ("MODEL.WEIGHTS", "OUTPUT_DIR")),
    "a name that the user makes up": (("another",), ("LOGGING.PROJECT",)),
    "0 draws nothing": (("zero",), ("LOGGING.PICTURES", "LOGGING.HARD_EXAMPLES")),
    "none": (("null", "empty"), ("MODEL.WEIGHTS", "*.NORM")),
    "no files": (("empty",), ("OUTPUT_DIR",)),
    "0 turns the term, the limit or the randomness off": (
        ("zero",),
        (
            "*_WEIGHT",
            "*DROP*",
            "*_THRESHOLD",
            "*WEIGHT_DECAY*",
            "*BASE_LR_END",
            "*BIAS_LR_FACTOR",
            "*MOMENTUM",
            "*BACKBONE_MULTIPLIER",
            "*WARMUP_*",
            "*POLY_LR_*",
            "*CLIP_VALUE",
            "*IMPORTANCE_SAMPLE_RATIO",
            "*SIZE_DIVISIBILITY",
            "*SINGLE_CATEGORY_MAX_AREA",
            "*NUM_WORKERS",
            "*EVAL_PERIOD",
            "*MIN_DELTA",
            "*REFERENCE_WORLD_SIZE",
            "*REFERENCE_BATCH_SIZE",
            "*TRANSFORMER_ENC_LAYERS",
            "*MAX_SKIPPED",
            "VIS_PERIOD",
        ),
    ),
    "0: images keep their size": (("zero", "zero items"), ("INPUT.MIN_SIZE_T*",)),
    "training refuses it, evaluation does not read it": (("zero",), ("SOLVER.IMS_PER_BATCH",)),
    "any integer": (("zero", "negative"), ("SEED", "*IGNORE_VALUE")),
    "negative turns it off": (
        ("negative",),
        ("*SIZE_DIVISIBILITY", "MODEL.BACKBONE.FREEZE_AT"),
    ),
    "larger than 1 by its nature": (
        ("fraction", "fraction items"),
        (
            "*_WEIGHT",
            "*WEIGHT_DECAY*",
            "*OVERSAMPLE_RATIO",
            "*MIN_DELTA",
            "*_SCALE",
            "*BASE_LR",
            "*GAMMA",
            "*MLP_RATIO",
            "*CLIP_VALUE",
            "*NORM_TYPE",
            "*BACKBONE_MULTIPLIER",
            "*POLY_LR_POWER",
            "*BASE_LR_END",
            "*BIAS_LR_FACTOR",
            "MODEL.PIXEL_*",
            "DISTRIBUTED_TIMEOUT",
            "INPUT.CROP.SIZE",  # in pixels, or read by no mapper
        ),
    ),
    "any pixel value": (("zero items", "negative items"), ("MODEL.PIXEL_MEAN",)),
    "the largest norm": (("infinite",), ("*NORM_TYPE",)),
    "never, or without limit": (
        ("huge", "huge items"),
        (
            "*MAX_SIZE*",
            "*_PERIOD",
            "*WARMUP_ITERS",
            "*DETECTIONS_PER_IMAGE",
            "*NUM_ITER",
            "SOLVER.STEPS",
        ),
    ),
    "lists of any length": (
        ("shorter", "longer", "twice", "empty list"),
        ("SOLVER.STEPS", "DATASETS.TRAIN", "INPUT.MIN_SIZE_TRAIN", "TEST.AUG.MIN_SIZES"),
    ),
    "lists that may be shorter": (
        ("shorter", "empty list"),
        ("DATASETS.TEST", "*IN_FEATURES", "*OUT_FEATURES"),
    ),
    "scales, in any order": (("shorter", "longer", "twice"), ("*DECODER.SCALES",)),
    "one size": (("number",), ("INPUT.MIN_SIZE_TRAIN",)),
    "right values": (
        ("flag items", "zero", "shorter", "twice", "longer"),
        ("*DEFORM_ON_PER_STAGE", "*RES5_MULTI_GRID", "INPUT.CROP.SIZE", "TEST.EXPECTED_RESULTS"),
    ),
}


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def matches(key, patterns):
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def wrong_values(default):
    """One value of each kind for a key with this default."""
    if isinstance(default, bool):
        return FLAGS
    if isinstance(default, int | float) or default is None:
        return NUMBERS
    if isinstance(default, str):
        return TEXTS
    items, first = list(default), default[0] if default else "x"
    return {
        "null": None,
        "text": "wrong",
        "number": 3,
        "empty list": [],
        "shorter": items[:-1],
        "longer": [*items, first],
        "twice": [first, first],
        "nested": [items],
        "mappings": [{"a": 1}],
    } | {f"{kind} items": [value] * max(len(items), 1) for kind, value in ITEMS.items()}


def outcome(cfg, key, value):
    """The error that checking the config raises after setting the key, or None."""
    section, _, name = key.rpartition(".")
    node = get_value(cfg, section)
    before = node[name]
    node[name] = value
    try:
        check_config(cfg)
    except Exception as error:  # the test tells what it is
        return error
    finally:
        node[name] = before
    return None


@pytest.fixture(scope="module")
def configs():
    loaded = {}
    for name, (file, overrides) in BASES.items():
        opts = [part for pair in overrides.items() for part in pair]
        loaded[name] = load_config(str(CONFIGS / file), opts)
    return loaded


def test_every_key_has_values(configs):
    """A key is in the table, checked elsewhere, or of an architecture that is not ours."""
    table = {key for group in GROUPS for key in group.keys}
    for cfg in configs.values():
        others = {key for key, _ in leaves(cfg)} - table
        others -= {"MODEL.MASK_FORMER.EXTRA_LOSSES"}
        assert not {key for key in others if not matches(key, OTHER_ARCHITECTURES)}
    unused = {key for key in table if matches(key, OTHER_ARCHITECTURES)}
    assert not unused


def test_wrong_values(configs):
    tested, problems, num_values = set(), [], 0
    for name, cfg in configs.items():
        keys = set.union(*({*group.keys} for group in GROUPS if group.applies(cfg)))
        unread = unread_keys(cfg)
        # All of the first, then what no config before reads.
        keys -= tested if name == "R50" else tested | unread
        tested |= keys - unread
        for key, default in leaves(cfg):
            if key not in keys:
                continue
            for kind, value in wrong_values(default).items():
                if repr(value) == repr(default):
                    continue
                num_values += 1
                error = outcome(cfg, key, value)
                if error is None:
                    reviewed = any(
                        kind in kinds and matches(key, patterns)
                        for kinds, patterns in ACCEPTED.values()
                    )
                    if not reviewed:
                        problems.append(f"{name}: {key} takes {value!r} ({kind})")
                elif not isinstance(error, ValueError) or key not in str(error):
                    problems.append(f"{name}: {key} {value!r} ({kind}): {error!r}")
    assert not problems, "\n".join(problems)
    assert num_values > 1800


WRONG_IN_FILES = {
    "DATASETS": {"TRAIN": None},
    "SOLVER": {"BASE_LR": NAN},
    "INPUT": {"CROP": {"SIZE": [[1, 2]]}},
    "MODEL": {"MASK_FORMER": {"DEC_LAYERS": 2.5}},
}


@pytest.mark.parametrize("section", WRONG_IN_FILES)
def test_wrong_values_in_files(tmp_path, section):
    """Before anything uses them, whoever notices them."""
    content = {"_BASE_": str(CONFIGS / R50), section: WRONG_IN_FILES[section]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    (key,) = (key for key, _ in leaves(CfgNode(content)) if key != "_BASE_")
    with pytest.raises(ValueError, match=key):
        load_config(str(tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("DATASETS.CUSTOM", "None"),
        ("DATASETS.TEST", "('a', 'a')"),
        ("MODEL.DEVICE", "gpu"),
        ("MODEL.PIXEL_STD", "[1, 0, 1]"),
        ("SEED", "4294967295"),
        ("SOLVER.MAX_ITER", "-1"),
        ("SOLVER.WEIGHT_DECAY", "1e999"),
        ("SOLVER.REFERENCE_WORLD_SIZE", "-2"),
        ("SOLVER.REFERENCE_BATCH_SIZE", "-1"),
        ("SOLVER.NUM_ACCUMULATION_STEPS", "0"),
        ("TEST.EXPECTED_RESULTS", "[['segm', 'AP', 3]]"),
    ],
)
def test_wrong_overrides(key, text):
    with pytest.raises(ValueError, match=f"{key}.*allowed: "):
        load_config(str(CONFIGS / R50), [key, text])


NESTED = "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
# Base, overrides and what the error says.
CONTRADICTIONS = [
    ("R50", {"MODEL.PIXEL_MEAN": [1.0], "MODEL.PIXEL_STD": [1.0]}, "PIXEL_MEAN.*INPUT.FORMAT"),
    ("R50", {"MODEL.PIXEL_STD": [1.0, 1.0]}, "PIXEL_MEAN.*PIXEL_STD"),
    ("R50", {"INPUT.FORMAT": "L"}, "PIXEL_MEAN.*INPUT.FORMAT is 'L': allowed: 1 values"),
    ("Swin", {"INPUT.FORMAT": "BANDS"}, "COLOR_AUG_SSD is True and INPUT.FORMAT is 'BANDS'"),
    ("SGD", {"INPUT.FORMAT": "BANDS", "INPUT.COLOR_AUG_SSD": False}, "TEST.AUG.ENABLED is True"),
    ("R50", {"SOLVER.STEPS": [9, 5]}, "SOLVER.STEPS.*ascending"),
    ("R50", {"SOLVER.STEPS": [0, 5]}, "SOLVER.STEPS.*above 0"),
    (
        "R50",
        {"SOLVER.REFERENCE_WORLD_SIZE": 8, "SOLVER.REFERENCE_BATCH_SIZE": 16},
        "WORLD_SIZE is 8 and SOLVER.REFERENCE_BATCH_SIZE is 16, but both scale",
    ),
    ("R50", {"SOLVER.MAX_ITER": 50, "SOLVER.STEPS": [50]}, "SOLVER.STEPS.*not SOLVER.MAX_ITER"),
    ("R50", {NESTED: ["res3"]}, "3 scales.*these give 2"),
    ("R50", {"MODEL.RESNETS.DEPTH": 18}, "RES2_OUT_CHANNELS is 256; allowed: 64"),
    ("R50", {"MODEL.RESNETS.RES5_DILATION": 4}, "RES5_DILATION is 4; allowed: 1, 2"),
    (
        "R50",
        {"MODEL.RESNETS.NORM": "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS": 48},
        "STEM_OUT_CHANNELS is 48; allowed: multiples of 32",
    ),
    ("R50", {"DATALOADER.SAMPLER_TRAIN": "WeightedTrainingSampler"}, "TRAIN_REPEAT_FACTOR"),
    ("SGD", {"SOLVER.MOMENTUM": 0.0}, "SOLVER.MOMENTUM.*NESTEROV"),
    ("SGD", {"SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.0}, "CLIP_VALUE.*above 0 with"),
    ("SGD", {"MODEL.RESNETS.RES4_DILATION": 2}, "RES5_DILATION is 1; allowed: 4"),
    (
        "SGD",
        {"MODEL.RESNETS.STEM_TYPE": "deeplab", "MODEL.RESNETS.STEM_OUT_CHANNELS": 7},
        "STEM_OUT_CHANNELS is 7; allowed: even",
    ),
    ("SGD", {"TEST.AUG.MIN_SIZES": []}, "TEST.AUG.MIN_SIZES"),
    ("FPN", {"SOLVER.BASE_LR_END": 1.0}, "SOLVER.BASE_LR_END.*0 to SOLVER.BASE_LR"),
    ("FPN", {"INPUT.MIN_SIZE_TRAIN": [9, 5]}, "MIN_SIZE_TRAIN.*smallest, largest"),
    ("FPN", {"INPUT.CROP.TYPE": "absolute"}, r"CROP.SIZE is \[0.5, 0.5\]"),
    (
        "FPN",
        {"INPUT.CROP.TYPE": "absolute_range", "INPUT.CROP.SIZE": [9, 5]},
        "INPUT.CROP.SIZE.*smallest, largest",
    ),
    ("FPN", {"MODEL.SEM_SEG_HEAD.CONVS_DIM": 48}, "CONVS_DIM is 48; allowed: multiples of 32"),
    (
        "FPN",
        {"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": "multi_scale_pixel_decoder"},
        "'transformer_encoder', .* with StandardTransformerDecoder",
    ),
    (
        "FPN",
        {"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder"},
        "TRANSFORMER_IN_FEATURE is 'transformer_encoder'.*BasePixelDecoder has no encoder",
    ),
    (
        "FPN",
        {"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "FaPNPixelDecoder"},
        "TRANSFORMER_IN_FEATURE is 'transformer_encoder'.*FaPNPixelDecoder has no encoder",
    ),
    (
        "R50",
        {
            "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "FaPNPixelDecoder",
            "MODEL.SEM_SEG_HEAD.NORM": "LN",
            "MODEL.SEM_SEG_HEAD.CONVS_DIM": 100,
        },
        "CONVS_DIM is 100; allowed: multiples of 8 .groups of offsets. with FaPN",
    ),
    (
        "LVIS",
        {"MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res4", "res5"]},
        "IN_FEATURES.*3 scales.*with BiFPNPixelDecoder these give 2",
    ),
    ("LVIS", {"MODEL.SEM_SEG_HEAD.CONVS_DIM": 48}, "CONVS_DIM is 48; allowed: multiples of 32"),
    ("Swin", {"MODEL.SWIN.NUM_HEADS": [3, 6, 12, 24, 48]}, "MODEL.SWIN.DEPTHS.*NUM_HEADS"),
    ("Swin", {"MODEL.SWIN.EMBED_DIM": 97}, "MODEL.SWIN.NUM_HEADS.*EMBED_DIM 97"),
    (
        "Ablation",
        {"MODEL.MASK_FORMER.DECODER.CROSS_ATTENTION": "soft"},
        "CROSS_ATTENTION is 'soft'; allowed: .*'masked', 'smca'",
    ),
    (
        "Ablation",
        {
            "MODEL.MASK_FORMER.DECODER.SCALES": [8, 32, 8],
            "MODEL.MASK_FORMER.DECODER.CONCATENATE_SCALES": True,
        },
        r"DECODER.SCALES is \[8, 32, 8\]; allowed: .*without repetition",
    ),
    ("Ablation", {NESTED: ["res4"]}, r"gives strides \[32, 16, 8\].* these give \[16, 8, 4\]"),
    ("Ablation", {NESTED: ["res3"]}, "Configurable.* attends; .*these give 2"),
    (
        "Ablation",
        {
            "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder",
            "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3", "res4"],
        },
        r"SEM_SEG_HEAD.IN_FEATURES.* these give \[16, 8, 4\]",
    ),
    ("Ablation", {"MODEL.RESNETS.RES5_DILATION": 2}, "RES5_DILATION is 2; allowed: 1 with Config"),
    (
        "Ablation",
        {"MODEL.MASK_FORMER.ENC_LAYERS": 1},
        "ENC_LAYERS is 1, which ConfigurableTransformerDecoder does not read",
    ),
    ("Swin", {"MODEL.BACKBONE.FREEZE_AT": 6}, "FREEZE_AT is 6; allowed: .*at most 5"),
    ("R50", {"SOLVER.LAYER_DECAY": 0.0}, "LAYER_DECAY is 0.0; allowed: .*above 0 and at most 1"),
]


@pytest.mark.parametrize(("base", "overrides", "message"), CONTRADICTIONS)
def test_contradictions(configs, base, overrides, message):
    cfg = configs[base].clone()
    check_config(cfg)
    for key, value in overrides.items():
        cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        check_config(cfg)


def test_two_fpns(configs):
    cfg = configs["R50"].clone()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["p3", "p4", "p5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res4"]
    with pytest.raises(ValueError, match=r"FPN.IN_FEATURES is .* neighbouring stages"):
        check_config(cfg)
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    check_config(cfg)
    cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = 48
    with pytest.raises(ValueError, match=r"SIZE_DIVISIBILITY is 48; allowed: multiples of 32"):
        check_config(cfg)


def test_channels_of_other_projects(configs, monkeypatch):
    """A mapper, a backbone or an architecture of theirs may handle any number of channels."""
    for registry in (DATASET_MAPPER_REGISTRY, BACKBONE_REGISTRY, META_ARCH_REGISTRY):
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    DATASET_MAPPER_REGISTRY.register(type("DepthMapper", (), {}))
    BACKBONE_REGISTRY.register(type("DepthSwin", (D2SwinTransformer,), {}))
    META_ARCH_REGISTRY.register(type("DepthFormer", (MaskFormer,), {}))
    for base in ("R50", "Swin"):
        for key, name in {
            "INPUT.DATASET_MAPPER_NAME": "DepthMapper",
            "MODEL.BACKBONE.NAME": "DepthSwin",
            "MODEL.META_ARCHITECTURE": "DepthFormer",
        }.items():
            cfg = configs[base].clone()
            cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0] * 4, [1.0] * 4
            with pytest.raises(ValueError, match="PIXEL_MEAN"):
                check_config(cfg)
            cfg.merge_from_list([key, name])
            check_config(cfg)
    # Their backbone reads these keys in its own way.
    cfg = configs["Swin"].clone()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "DepthSwin", 4
    cfg.MODEL.SWIN.DEPTHS, cfg.MODEL.SWIN.WINDOW_SIZE = [2], [7, 7]
    check_config(cfg)


def test_keys_that_a_config_lacks(configs):
    cfg = configs["R50"].clone()
    del cfg.MODEL["SWIN"], cfg.SOLVER["POLY_LR_POWER"], cfg["VIS_PERIOD"]
    check_config(cfg)


def test_set_keys_that_nothing_reads(caplog, tmp_path):
    """Those of the file itself and of overrides are named, those of base files are not."""
    overrides = ["SOLVER.MOMENTUM", "0.5", "MODEL.RESNETS.NUM_GROUPS", "2"]
    load_config(str(CONFIGS / SWIN), overrides)
    (message,) = (r.getMessage() for r in caplog.records if "not read" in r.getMessage())
    assert "SOLVER.MOMENTUM 0.5" in message and "MODEL.RESNETS.NUM_GROUPS 2" in message
    assert "RESNETS.DEPTH" not in message
    caplog.clear()
    text = f"_BASE_: {CONFIGS / R50}\nMODEL:\n  SWIN:\n    EMBED_DIM: 7\n"
    (tmp_path / "own.yaml").write_text(text)
    (tmp_path / "complete.yaml").write_text(load_config(str(tmp_path / "own.yaml")).dump())
    assert "MODEL.SWIN.EMBED_DIM 7" in caplog.text
    caplog.clear()
    load_config(str(tmp_path / "complete.yaml"))
    load_config(str(CONFIGS / SWIN), ["MODEL.BACKBONE.FREEZE_AT", "-1"])
    assert "not read" not in caplog.text


def test_lengths_divided_by_the_number_of_processes(configs):
    cfg = configs["R50"].clone()
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.CHECKPOINT_PERIOD = 1, 3
    check_training(cfg, 4)  # 3 / 4 is rounded
    with pytest.raises(ValueError, match="CHECKPOINT_PERIOD is 3; allowed: at least 8"):
        check_training(cfg, 8)
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.STEPS = 5000, [800, 801]
    check_training(cfg, 1)
    with pytest.raises(ValueError, match=r"SOLVER.STEPS.*\[100, 100\] for 46094 iterations"):
        check_training(cfg, 8)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match="DATASETS.TRAIN is \\(\\)"):
        check_training(cfg, 1)


def test_architecture_that_cannot_accumulate(configs):
    cfg = configs["R50"].clone()
    cfg.SOLVER.NUM_ACCUMULATION_STEPS = 2
    check_training(cfg, 1)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    check_config(cfg)
    message = "NUM_ACCUMULATION_STEPS is 2, but SemanticSegmentor has no method `accumulating`"
    with pytest.raises(ValueError, match=message):
        check_training(cfg, 1)
    cfg.SOLVER.NUM_ACCUMULATION_STEPS = 1
    check_training(cfg, 1)


@pytest.mark.parametrize(
    "key", ["MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME", "MODEL.SEM_SEG_HEAD.NAME"]
)
def test_unregistered_parts(configs, key):
    cfg = configs["R50"].clone()
    check_parts(cfg)
    cfg.merge_from_list([key, "Nobody"])
    check_config(cfg)
    with pytest.raises(ValueError, match=f"{key} is 'Nobody', which is not registered"):
        check_parts(cfg)
