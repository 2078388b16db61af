"""Defaults, recipes, and the errors of `load_config` and `check_config`."""

import json
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.projects.deeplab import add_deeplab_config

from mask2former.config import (
    add_maskformer2_config,
    check_config,
    load_config,
    without_added_defaults,
)
from mask2former.config_checks import get_value
from mask2former.data.dataset_mappers import DATASET_MAPPER_REGISTRY
from mask2former.maskformer_model import MaskFormer
from mask2former.modeling.criterion import LOSS_REGISTRY

ROOT = Path(__file__).parents[1]
CONTRACTS = Path(__file__).parent / "contracts"
CONFIGS = ROOT / "configs"
R50_PANOPTIC = CONFIGS / "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"

_recipes = json.loads((CONTRACTS / "recipes.json").read_text())
RECIPES = {path: _recipes["all"] | differences for path, differences in _recipes["recipes"].items()}
# Data set and task → backbone → the paper's figures (tables 1, 2, 3, 6 and 7).
PAPER_FIGURES = {
    "coco/panoptic": {
        "R50": "PQ 51.9, AP 41.7, mIoU 61.7",
        "R101": "PQ 52.6, AP 42.6, mIoU 62.4",
        "swin_large": "PQ 57.8, AP 48.6, mIoU 67.4",
    },
    "coco/instance": {"R50": "AP 43.7", "R101": "AP 44.2", "swin_large": "AP 50.1"},
    "ade20k/panoptic": {"R50": "PQ 39.7, AP 26.5, mIoU 46.1"},
    "ade20k/instance": {"R50": "AP 26.4"},
    "ade20k/semantic": {
        "R50": "mIoU 47.2, with TEST.AUG.ENABLED True 49.2",
        "swin_tiny": "mIoU 47.7, with TEST.AUG.ENABLED True 49.6",
        "swin_large_IN21k_384_bs16": "mIoU 56.1, with TEST.AUG.ENABLED True 57.3",
        "swin_large_IN21k_384_fapn": "mIoU 56.4, with TEST.AUG.ENABLED True 57.7",
    },
    "cityscapes/panoptic": {
        "R50": "PQ 62.1, AP 37.3, mIoU 77.5",
        "swin_base_IN21k": "PQ 66.1, AP 42.8, mIoU 82.7",
        "swin_large": "PQ 66.6, AP 43.6, mIoU 82.9",
    },
    "cityscapes/instance": {"R50": "AP 37.4"},
    "cityscapes/semantic": {
        "R50": "mIoU 79.4, with TEST.AUG.ENABLED True 82.2",
        "swin_base_IN21k": "mIoU 83.3, with TEST.AUG.ENABLED True 84.5",
        "swin_large": "mIoU 83.3, with TEST.AUG.ENABLED True 84.3",
    },
}
# Keys that the original release does not have.
ADDED = {
    "DETERMINISTIC": False,
    "DISTRIBUTED_TIMEOUT": 30.0,
    "INPUT.IGNORE_UNLABELLED": False,
    "INPUT.TILES.SIZE": 0,
    "INPUT.TILES.OVERLAP": 0,
    "LOGGING.PICTURES": 4,
    "LOGGING.HARD_EXAMPLES": 4,
    "LOGGING.GRADIENT_NORM": False,
    "LOGGING.WANDB": False,
    "LOGGING.MLFLOW": False,
    "LOGGING.PROJECT": "mask2former",
    "MODEL.FAST": True,
    "MODEL.CHECKPOINTING": "auto",
    "MODEL.MASK_FORMER.CRITERION_NAME": "SetCriterion",
    "MODEL.MASK_FORMER.EXTRA_LOSSES": [],
    "MODEL.MASK_FORMER.MATCHER_NAME": "HungarianMatcher",
    "MODEL.MASK_FORMER.TEST.PRUNE_QUERIES_AFTER": 0,
    "MODEL.MASK_FORMER.TEST.PRUNE_QUERIES_THRESHOLD": 0.9,
    "MODEL.SEM_SEG_HEAD.BIFPN_LAYERS": 9,
    "SOLVER.LAYER_DECAY": 1.0,
    "MODEL.MASK_FORMER.DECODER.CROSS_ATTENTION": "masked",
    "MODEL.MASK_FORMER.DECODER.SCALES": [32, 16, 8],
    "MODEL.MASK_FORMER.DECODER.CONCATENATE_SCALES": False,
    "MODEL.MASK_FORMER.DECODER.LEARNABLE_QUERY_FEATURES": True,
    "MODEL.MASK_FORMER.DECODER.CROSS_ATTENTION_FIRST": True,
    "MODEL.MASK_FORMER.DECODER.DROPOUT": 0.0,
    "MODEL.TIMM.NAME": "",
    "MODEL.TIMM.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.TIMM.DROP_PATH_RATE": 0.0,
    "MODEL.TIMM.NORM": "FrozenBN",
    "MODEL.VIT.NAME": "",
    "MODEL.VIT.OUT_CHANNELS": 256,
    "MODEL.VIT.DROP_PATH_RATE": 0.0,
    "SOLVER.AMP.DTYPE": "float16",
    "SOLVER.NON_FINITE.MAX_SKIPPED": 0,
    "SOLVER.NUM_ACCUMULATION_STEPS": 1,
    "SOLVER.REFERENCE_BATCH_SIZE": 0,
    "SOLVER.EMA.ENABLED": False,
    "SOLVER.EMA.DECAY": 0.9998,
    "SOLVER.EMA.WARMUP": True,
    "TEST.BOXES": False,
    "TEST.BEST_METRIC": "",
    "TEST.BEST_MODE": "max",
    "TEST.EARLY_STOPPING_PATIENCE": 0,
    "TEST.EARLY_STOPPING_MIN_DELTA": 0.0,
    "TEST.TILES.SIZE": 0,
    "TEST.TILES.OVERLAP": 0,
    "TEST.TILES.BATCH_SIZE": 1,
}
COCO_SEMANTIC = "coco/semantic-segmentation/maskformer2_R50_bs16_50ep.yaml"
FAPN = (
    "ade20k/semantic-segmentation/swin/maskformer2_swin_large_IN21k_384_fapn_bs16_160k_res640.yaml"
)
LVIS = "lvis/instance-segmentation/maskformer2_R50_bs16_50ep.yaml"


def flatten(node, prefix=""):
    leaves = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = list(value) if isinstance(value, tuple) else value
    return leaves


def deeplab_cfg():
    cfg = get_cfg()
    add_deeplab_config(cfg)
    return cfg


def default_cfg():
    cfg = deeplab_cfg()
    add_maskformer2_config(cfg)
    return cfg


@pytest.fixture
def cfg():
    return load_config(str(R50_PANOPTIC))


def write(folder, text, name="config.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_defaults_are_those_of_the_original_release():
    before, after = flatten(deeplab_cfg()), flatten(default_cfg())
    assert before.keys() <= after.keys()
    changed = {k: v for k, v in after.items() if k not in before or before[k] != v}
    expected = json.loads((CONTRACTS / "defaults.json").read_text()) | ADDED
    assert changed == expected
    # 1 == 1.0 == True, but a config tells their types apart.
    types = {k: type(v) for k, v in changed.items()}
    assert types == {k: type(v) for k, v in expected.items()}


@pytest.mark.parametrize("path", RECIPES)
def test_recipe_resolves_to_the_original_values(path):
    defaults = flatten(default_cfg())
    resolved = flatten(load_config(str(CONFIGS / path)))  # load_config checks it as well
    assert {k: v for k, v in resolved.items() if v != defaults[k]} == RECIPES[path]


@pytest.mark.parametrize("path", [*RECIPES, FAPN, LVIS])
def test_recipe_opens_with_its_command_hardware_and_figures(path):
    lines = (CONFIGS / path).read_text().splitlines()
    assert lines[1] == f"#   tools/train_net.py --config-file configs/{path} --num-gpus 8"
    assert lines[2] == "# Eight GPUs, two images each (batch 16)."
    figures = [
        figures
        for task, by_backbone in PAPER_FIGURES.items()
        for backbone, figures in by_backbone.items()
        if path.startswith(f"{task}-segmentation/") and f"_{backbone}_" in path
    ]
    stated = [line for line in lines if line.startswith("# Published on val")]
    assert len(stated) == len(figures) <= 1
    assert not figures or f": {figures[0]} (paper, table " in stated[0]


def test_every_recipe_is_known():
    files = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("maskformer*.yaml")}
    # Recipes of models and tasks that the original release lacks: test_maskformer_recipes.py.
    added = {path for path in files if path.startswith(("_base/", "shapes/", "maskformer/"))}
    added |= {path for path in files if "/timm/" in path}  # tests/modeling/backbone/test_timm.py
    light = {path for path in files if "/light/" in path}  # test_light_recipes.py
    assert files - added - light == {*RECIPES, FAPN, LVIS, COCO_SEMANTIC}


def test_fapn_recipe():
    msdeformattn = flatten(load_config(str(CONFIGS / FAPN.replace("_fapn", ""))))
    fapn = flatten(load_config(str(CONFIGS / FAPN)))
    assert {k: v for k, v in fapn.items() if v != msdeformattn[k]} == {
        "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "FaPNPixelDecoder"
    }


@pytest.mark.parametrize(
    ("row", "pixel_decoder"),
    [
        ("fpn", "BasePixelDecoder"),
        ("semantic_fpn", "SemanticFPNPixelDecoder"),
        ("fapn", "FaPNPixelDecoder"),
        ("bifpn", "BiFPNPixelDecoder"),
        ("msdeformattn", "MSDeformAttnPixelDecoder"),
    ],
)
def test_pixel_decoders_of_table_4e(row, pixel_decoder, caplog):
    path = CONFIGS / f"ablations/table4e/{row}.yaml"
    cfg = load_config(str(path))
    assert "not read" not in caplog.text
    base = load_config(str(CONFIGS / "coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml"))
    base.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = pixel_decoder
    assert cfg == base
    command = f"python tools/train_net.py --num-gpus 8 --config-file {path.relative_to(ROOT)}"
    assert path.read_text().splitlines()[1] == f"#   {command}"


def test_lvis_recipe():
    cfg = load_config(str(CONFIGS / LVIS))
    coco = flatten(load_config(str(CONFIGS / LVIS.replace("lvis/", "coco/"))))
    assert {k: v for k, v in flatten(cfg).items() if v != coco[k]} == {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 1203,
        "DATASETS.TRAIN": ["lvis_v1_train"],
        "DATASETS.TEST": ["lvis_v1_val"],
        "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
        "DATALOADER.REPEAT_THRESHOLD": 0.001,
        "SOLVER.MAX_ITER": 50 * 100170 // 16,
        "SOLVER.STEPS": [278250, 301437],
        "TEST.DETECTIONS_PER_IMAGE": 300,
        "TEST.EVAL_PERIOD": 50000,
    }


def test_base_files_give_data_and_schedule_but_no_model():
    folder = CONFIGS / "coco"
    panoptic = load_config(
        str(folder / "panoptic-segmentation/Base-COCO-PanopticSegmentation.yaml")
    )
    assert panoptic.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    assert panoptic.DATASETS.TRAIN == ("coco_2017_train_panoptic",)
    assert panoptic.SOLVER.MAX_ITER == 368750
    instance = load_config(
        str(folder / "instance-segmentation/Base-COCO-InstanceSegmentation.yaml")
    )
    assert instance.DATASETS.TRAIN == ("coco_2017_train",)
    assert instance.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME == "BasePixelDecoder"


def test_opts_override_the_file():
    cfg = load_config(str(R50_PANOPTIC), ["SOLVER.IMS_PER_BATCH", "2", "MODEL.DEVICE", "cpu"])
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.DEVICE) == (2, "cpu")
    assert not cfg.is_frozen()


def test_computed_values_of_original_configs_load(tmp_path):
    path = write(
        tmp_path,
        "VERSION: 2\nINPUT:\n  MIN_SIZE_TRAIN: "
        '!!python/object/apply:eval ["[int(x * 0.1 * 512) for x in range(5, 8)]"]\n',
    )
    assert load_config(path).INPUT.MIN_SIZE_TRAIN == (256, 307, 358)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_config(str(tmp_path / "nowhere.yaml"))
    path = write(tmp_path, "_BASE_: absent_base.yaml\n")
    with pytest.raises(FileNotFoundError, match="absent_base.yaml"):
        load_config(path)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "- a\n- list\n"])
def test_file_without_keys(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match="config.yaml.*KEY: VALUE"):
        load_config(path)


def test_unknown_key_in_file(tmp_path):
    path = write(tmp_path, "MODEL:\n  MASK_FORMER:\n    NUM_OBJECT_QUERY: 3\n")
    with pytest.raises(ValueError, match=r"config\.yaml.*NUM_OBJECT_QUERY.*NUM_OBJECT_QUERIES"):
        load_config(path)


def test_unknown_section_and_value_for_a_section(tmp_path):
    path = write(tmp_path, "MODEL:\n  SWINN:\n    APE: True\n")
    with pytest.raises(ValueError, match=r"MODEL\.SWINN\.APE.*MODEL\.SWIN\.APE"):
        load_config(path)
    path = write(tmp_path, "VERSION: 2\nMODEL:\n  SWIN: 3\n")
    with pytest.raises(ValueError, match=r"config\.yaml.*MODEL\.SWIN to 3, but that is a section"):
        load_config(path)


def test_wrong_type_in_file(tmp_path):
    path = write(tmp_path, "VERSION: 2\nMODEL:\n  MASK_FORMER:\n    NHEADS: many\n")
    with pytest.raises(ValueError, match=r"config\.yaml.*MODEL\.MASK_FORMER\.NHEADS"):
        load_config(path)


def test_bad_opts():
    path = str(R50_PANOPTIC)
    with pytest.raises(ValueError, match="pairs KEY VALUE, but got 3 items"):
        load_config(path, ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER"])
    with pytest.raises(ValueError, match=r"command line.*SOLVER\.MAX_ITERS.*SOLVER\.MAX_ITER or"):
        load_config(path, ["SOLVER.MAX_ITERS", "3"])
    with pytest.raises(ValueError, match=r"SOLVER\.MAX_ITER='soon'"):
        load_config(path, ["SOLVER.MAX_ITER", "soon"])
    # The check comes after the overrides.
    with pytest.raises(ValueError, match=r"SOLVER\.OPTIMIZER is 'ADAM'"):
        load_config(path, ["SOLVER.OPTIMIZER", "ADAM"])


TEST = "MODEL.MASK_FORMER.TEST"
REJECTED = [
    ("INPUT.DATASET_MAPPER_NAME", "coco_panoptic", "allowed: 'coco_instance_lsj', "),
    ("INPUT.FORMAT", "YUV", "allowed: 'RGB', 'BGR'"),
    ("INPUT.RANDOM_FLIP", "diagonal", "'horizontal', 'vertical', 'none'"),
    ("INPUT.CROP.TYPE", "square", "'relative_range', 'relative', 'absolute'"),
    ("INPUT.IMAGE_SIZE", 0, "at least 1"),
    ("INPUT.SIZE_DIVISIBILITY", 0, "-1 .off. or at least 1"),
    ("INPUT.MIN_SCALE", 0.0, "0 < MIN_SCALE <= MAX_SCALE"),
    ("INPUT.MIN_SCALE", 2.5, "MIN_SCALE is 2.5 and INPUT.MAX_SCALE is 2.0"),
    ("SOLVER.OPTIMIZER", "adamw", "allowed: 'ADAMW', 'SGD'"),
    ("SOLVER.BACKBONE_MULTIPLIER", -0.1, "at least 0"),
    ("SOLVER.WEIGHT_DECAY_EMBED", -1.0, "at least 0"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "model", "'value', 'norm', 'full_model'"),
    ("MODEL.MASK_FORMER.CLASS_WEIGHT", -2.0, "at least 0"),
    ("MODEL.MASK_FORMER.DICE_WEIGHT", float("nan"), "at least 0"),
    ("MODEL.MASK_FORMER.MASK_WEIGHT", -5.0, "at least 0"),
    ("MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", -0.1, "at least 0"),
    (f"{TEST}.OBJECT_MASK_THRESHOLD", 1.1, "0 to 1"),
    (f"{TEST}.OVERLAP_THRESHOLD", -0.1, "0 to 1"),
    (f"{TEST}.PRUNE_QUERIES_AFTER", -1, "at least 0 and at most 1000"),
    (f"{TEST}.PRUNE_QUERIES_AFTER", 9, "0 .off. or 1 to 8, because the decoder has 9 layers"),
    (f"{TEST}.PRUNE_QUERIES_THRESHOLD", 1.1, "0 to 1"),
    ("MODEL.MASK_FORMER.DROPOUT", 1.5, "0 to 1"),
    ("MODEL.MASK_FORMER.HIDDEN_DIM", 252, "multiples of MODEL.MASK_FORMER.NHEADS, which is 8"),
    ("MODEL.MASK_FORMER.NHEADS", 0, "at least 1"),
    ("MODEL.MASK_FORMER.NHEADS", None, "at least 1"),
    ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 0, "at least 1"),
    ("MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 0, "at least 1"),
    ("MODEL.MASK_FORMER.OVERSAMPLE_RATIO", 0.9, "at least 1"),
    ("MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO", 1.01, "0 to 1"),
    ("MODEL.MASK_FORMER.DEC_LAYERS", 0, "at least 1"),
    ("MODEL.MASK_FORMER.ENC_LAYERS", 6, "does not read; allowed: 0"),
    ("MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE", "res5", "'multi_scale_pixel_decoder'"),
    ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 0, "at least 1"),
    ("MODEL.SEM_SEG_HEAD.CONVS_DIM", 100, "multiples of MODEL.MASK_FORMER.NHEADS"),
    ("MODEL.SEM_SEG_HEAD.CONVS_DIM", 48, "multiples of 32"),
    ("MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", 2.0, "allowed: 1.0, because"),
    ("MODEL.CHECKPOINTING", "all", "'none', 'selective', 'blocks', 'auto'"),
    ("SOLVER.AMP.DTYPE", "half", "'float16', 'bfloat16'"),
    ("MODEL.MASK_FORMER.MATCHER_NAME", "Greedy", "'HungarianMatcher'"),
    ("MODEL.MASK_FORMER.CRITERION_NAME", "Boxes", "'MaskFormerCriterion', 'SetCriterion'"),
    ("INPUT.COLOR_AUG_SSD", True, "mapper 'coco_panoptic_lsj' ignores it"),
    ("INPUT.SIZE_DIVISIBILITY", 512, "mapper 'coco_panoptic_lsj' ignores it"),
    ("INPUT.CROP.ENABLED", True, "mapper 'coco_panoptic_lsj' ignores it"),
    ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS", 4, "8 .the default. or 8"),
    ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS", 0, "at least 1"),
    ("MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES", ["res6"], "res2.*res5"),
]


@pytest.fixture
def registries(monkeypatch):
    """Entries that a test registers are gone afterwards; a loss `toy` and a mapper are added."""
    for registry in (LOSS_REGISTRY, DATASET_MAPPER_REGISTRY, META_ARCH_REGISTRY):
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))

    @LOSS_REGISTRY.register()
    def toy(matched):
        return matched.mask_logits.flatten(1).mean(1)

    @DATASET_MAPPER_REGISTRY.register()
    class ToyMapper:
        unread_keys = {"INPUT.MAX_SCALE": 2.0}


@pytest.mark.parametrize(("key", "value", "allowed"), REJECTED)
def test_rejected_value(cfg, key, value, allowed):
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=allowed) as error:
        check_config(cfg)
    assert key in str(error.value)
    if value is not None:
        assert str(value) in str(error.value)


BAD_LOSSES = [
    (["toy"], r"\[name, weight\]"),
    ([["toy"]], r"\[name, weight\]"),
    ([[1.0, "toy"]], r"\[name, weight\]"),
    ([["nobody", 1.0]], "no loss 'nobody' is registered .*'toy'"),
    ([["dice", 1.0]], "'dice' belongs to the losses that are"),
    ([["edge_3", 1.0]], "would be taken for the loss of an earlier layer"),
    ([["toy", 1.0], ["toy", 2.0]], "names the loss 'toy' twice"),
    ([["toy", -1.0]], "a finite weight of at least 0"),
    ([["toy", float("inf")]], "a finite weight of at least 0"),
    ([["toy", True]], "a finite weight of at least 0"),
]


@pytest.mark.parametrize(("losses", "message"), BAD_LOSSES)
def test_rejected_losses(cfg, registries, losses, message):
    cfg.MODEL.MASK_FORMER.EXTRA_LOSSES = losses
    with pytest.raises(ValueError, match=message) as error:
        check_config(cfg)
    assert str(error.value).startswith("MODEL.MASK_FORMER.EXTRA_LOSSES")
    assert str(losses[-1]) in str(error.value)


def test_added_keys(cfg, registries):
    cfg.MODEL.FAST = False
    cfg.MODEL.CHECKPOINTING = "blocks"
    cfg.MODEL.MASK_FORMER.EXTRA_LOSSES = [["toy", 2], ["boundary", 0.0]]
    with pytest.raises(ValueError, match=r"EXTRA_LOSSES\[1\].*'boundary'.* Import the module"):
        check_config(cfg)
    cfg.MODEL.MASK_FORMER.EXTRA_LOSSES = [["toy", 2]]
    check_config(cfg)
    cfg.MODEL.FAST = "no"
    with pytest.raises(ValueError, match="MODEL.FAST is 'no'; allowed: True, False"):
        check_config(cfg)
    # A project with its own copy of the config function lacks them.
    for key in ADDED:
        section, _, name = key.rpartition(".")
        del get_value(cfg, section)[name]
    check_config(cfg)


@pytest.mark.parametrize("architecture", ["MaskFormer", "SemanticSegmentor"])
def test_deterministic_mode_is_checked(cfg, architecture):
    """For every architecture, since the trainer reads the key for every one."""
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.DETERMINISTIC = 1
    with pytest.raises(ValueError, match="DETERMINISTIC is 1; allowed: True, False"):
        check_config(cfg)
    cfg.DETERMINISTIC = True
    check_config(cfg)
    cfg.CUDNN_BENCHMARK = True
    with pytest.raises(ValueError, match="DETERMINISTIC and CUDNN_BENCHMARK are both True"):
        check_config(cfg)
    cfg.CUDNN_BENCHMARK = False
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.SWIN.APE = "D2SwinTransformer", True
    cfg.MODEL.DEVICE = "cpu"
    check_config(cfg)
    cfg.MODEL.DEVICE = "cuda"
    with pytest.raises(ValueError, match=r"DETERMINISTIC and MODEL\.SWIN\.APE are both True"):
        check_config(cfg)
    cfg.MODEL.SWIN.APE = False
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "FaPNPixelDecoder"
    with pytest.raises(ValueError, match=r"DETERMINISTIC is True and .*'FaPNPixelDecoder', but"):
        check_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    check_config(cfg)


def test_registered_mappers_are_accepted(cfg, registries):
    cfg.INPUT.DATASET_MAPPER_NAME = "ToyMapper"
    cfg.INPUT.COLOR_AUG_SSD = True  # not among what it says it ignores
    check_config(cfg)
    cfg.INPUT.MAX_SCALE = 3.0
    with pytest.raises(ValueError, match=r"MAX_SCALE is 3\.0; .*mapper 'ToyMapper' ignores it"):
        check_config(cfg)


def test_keys_of_other_projects(tmp_path):
    def extend(cfg):
        cfg.MODEL.OF_MINE = CfgNode()
        cfg.MODEL.OF_MINE.WIDTH = 3

    path = write(tmp_path, "VERSION: 2\nMODEL:\n  OF_MINE:\n    WIDTH: 5\n")
    assert load_config(path, extend_config=extend).MODEL.OF_MINE.WIDTH == 5
    overridden = load_config(path, ["MODEL.OF_MINE.WIDTH", "7"], extend_config=extend)
    assert overridden.MODEL.OF_MINE.WIDTH == 7
    with pytest.raises(ValueError, match=r"'MODEL\.OF_MINE\.WIDTH', which is not a config key"):
        load_config(path)
    path = write(tmp_path, "VERSION: 2\nMODEL:\n  OF_MINE:\n    WIDHT: 5\n")
    with pytest.raises(ValueError, match=r"Did you mean MODEL\.OF_MINE\.WIDTH"):
        load_config(path, extend_config=extend)


def test_written_config_is_readable_for_the_original_release(cfg):
    """It rejects unknown keys, so ours are left out where they have their default."""
    original = default_cfg()
    for key in ADDED:
        section, _, name = key.rpartition(".")
        del get_value(original, section)[name]
    del original.SOLVER["NON_FINITE"]
    del original.MODEL.MASK_FORMER["DECODER"], original.MODEL["TIMM"], original.MODEL["VIT"]
    text = without_added_defaults(cfg).dump()
    original.merge_from_other_cfg(CfgNode.load_cfg(text))
    assert {*flatten(cfg)} - {*flatten(original)} == {*ADDED}
    cfg.MODEL.FAST = False
    assert {*flatten(without_added_defaults(cfg))} - {*flatten(original)} == {"MODEL.FAST"}
    assert {*flatten(cfg)} >= {*ADDED}


def test_subclasses_keep_the_checks(cfg, registries):
    @META_ARCH_REGISTRY.register()
    class MyFormer(MaskFormer):
        pass

    cfg.MODEL.META_ARCHITECTURE = "MyFormer"
    # Its project may train with its own trainer.
    cfg.INPUT.DATASET_MAPPER_NAME = "mapper_of_its_trainer"
    cfg.SOLVER.OPTIMIZER = "LION"
    check_config(cfg)
    cfg.MODEL.MASK_FORMER.TRAIN_NUM_POINTS = 0
    with pytest.raises(ValueError, match="TRAIN_NUM_POINTS is 0"):
        check_config(cfg)


def test_parts_of_ours_in_another_architecture(cfg, registries):
    """Its own keys are its business; those of our decoders are checked."""

    @META_ARCH_REGISTRY.register()
    def AnotherArchitecture(cfg):
        pass

    cfg.MODEL.META_ARCHITECTURE = "AnotherArchitecture"
    cfg.MODEL.MASK_FORMER.TRAIN_NUM_POINTS = 0
    check_config(cfg)
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 48
    with pytest.raises(ValueError, match="CONVS_DIM is 48"):
        check_config(cfg)
    cfg.MODEL.SEM_SEG_HEAD.NAME = "AnotherHead"
    check_config(cfg)


def test_flips_that_a_mapper_does_not_make_are_rejected(cfg):
    cfg.INPUT.RANDOM_FLIP = "none"
    check_config(cfg)  # large-scale jittering reads it
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_panoptic"
    with pytest.raises(
        ValueError, match="RANDOM_FLIP is 'none'.*'mask_former_panoptic' ignores it"
    ):
        check_config(cfg)


def test_no_task_is_rejected(cfg):
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = False
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    check_config(cfg)  # instances remain
    cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
    with pytest.raises(ValueError, match="all False"):
        check_config(cfg)


def test_bounds_themselves_are_accepted(cfg):
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 2
    cfg.MODEL.MASK_FORMER.TRAIN_NUM_POINTS = 1
    cfg.MODEL.MASK_FORMER.OVERSAMPLE_RATIO = 1.0
    cfg.MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO = 0.0
    cfg.MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD = 1.0
    cfg.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT = 0.0
    cfg.INPUT.MIN_SCALE = cfg.INPUT.MAX_SCALE = 1.0
    check_config(cfg)


def test_number_of_heads_may_be_written_twice(cfg):
    cfg.MODEL.MASK_FORMER.NHEADS = 4
    check_config(cfg)  # the other key still has its default
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 4
    check_config(cfg)
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 2
    with pytest.raises(ValueError, match="NHEADS = 4 heads"):
        check_config(cfg)


def test_keys_of_the_other_decoder_are_accepted(cfg):
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = "StandardTransformerDecoder"
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "res5"
    cfg.MODEL.MASK_FORMER.ENC_LAYERS = 6
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 1
    check_config(cfg)


def test_other_projects_are_left_alone(cfg):
    cfg.MODEL.MASK_FORMER.OF_ANOTHER_PROJECT = 3
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = "AnotherDecoder"
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "AnotherPixelDecoder"
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 3
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "anything"
    check_config(cfg)
    cfg.INPUT.DATASET_MAPPER_NAME = "another_mapper"
    cfg.SOLVER.OPTIMIZER = "LION"
    cfg.MODEL.META_ARCHITECTURE = "AnotherArchitecture"
    check_config(cfg)
