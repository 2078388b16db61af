"""What the value of each config key may be: one table of every key that a run reads.

    key → type and range, in groups: a group applies if the part that reads its keys is chosen

The keys are Detectron2's and this project's (`config.py` has the meaning of the latter). Values
that depend on each other are in `config_checks.py`. A key that the config lacks is skipped: other
projects have their own copies of the functions that add keys. A part of another project may give a
key another meaning, so the keys of a part are checked only if the config names the part of
Detectron2 or of this project.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from .config_kinds import (
    Anything,
    Device,
    Either,
    Flag,
    Kind,
    ListOf,
    Metric,
    Norm,
    Null,
    Number,
    OneOf,
    Path,
    Row,
    Text,
    Whole,
    exactly,
)
from .config_parts import (
    BIFPN,
    CONFIGURABLE_DECODER,
    MSDEFORMATTN,
    OUR_HEADS,
    OUR_PIXEL_DECODERS,
    PIXEL_DECODERS_WITH_ENCODER,
    Condition,
    all_of,
    always,
    get_value,
    has_best_metric,
    has_key,
    has_losses_at_points,
    has_mask_former,
    has_our_head,
    has_our_mapper,
    has_resnet,
    has_swin,
    has_timm,
    has_vit,
    is_plain,
    is_positive,
    mapped_by,
    matches_at_points,
    named,
    never,
    scheduled_by,
    stops_early,
    turned_on,
)
from .data.dataset_mappers import DETRPanopticDatasetMapper
from .data.dataset_mappers.base import (
    BaseDatasetMapper,
    LargeScaleJitterDatasetMapper,
    ResizeCropDatasetMapper,
)
from .modeling.backbone.timm import NORMS
from .modeling.transformer_decoder.configurable_transformer_decoder import STRIDES

_SIZE = Whole(1, 2**16)  # pixels, channels, queries
_SIZE_OR_NONE = Whole(0, 2**16)  # 0: images are not resized
_LENGTH = Whole(0)  # iterations; larger than MAX_ITER: never
_WEIGHT = Number(0, 1e6)
_DECAY = Number(0, 1000)
_FRACTION = Number(0, 1)
_RATE = Number(0, 1, below=True)
_NAMES = ListOf(Text())
_FEATURES = ListOf(Text(), 1, distinct=True)
_STAGES = ("res2", "res3", "res4", "res5")
# NumPy takes seeds below 2^32, and Detectron2 adds the rank of the process.
_SEED = Whole(None, 2**32 - 2**16)
_EXPECTED_RESULT = Row(
    (Text(), Text(), Number(-1e9, 1e9), _WEIGHT), "[task, metric, expected value, tolerance]"
)


@dataclass(frozen=True)
class Group:
    """Keys with one meaning, under one condition.

    Attributes:
        applies: whether the keys have this meaning. May rely on the groups before.
        keys: dotted key → values.
        is_read: whether the config chooses what reads the keys; default: if they apply.
    """

    applies: Condition
    keys: Mapping[str, Kind]
    is_read: Condition | None = None


GROUPS = (
    # The names first, because the conditions below read them. A name is looked up when the part is
    # built, since its project may register it after the config is loaded.
    Group(
        always,
        {
            "MODEL.META_ARCHITECTURE": Text(),
            "MODEL.DEVICE": Device(),
            "MODEL.WEIGHTS": Path(True),
            "MODEL.BACKBONE.NAME": Text(),
            "MODEL.SEM_SEG_HEAD.NAME": Text(),
            "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": Text(),
            "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": Text(),
            "MODEL.MASK_FORMER.MATCHER_NAME": Text(),
            "MODEL.MASK_FORMER.CRITERION_NAME": Text(),
            "INPUT.DATASET_MAPPER_NAME": Text(),
        },
    ),
    # ---- training and evaluation of any architecture, as in Detectron2 ----
    Group(
        always,
        {
            "OUTPUT_DIR": Path(),
            "SEED": _SEED,
            "CUDNN_BENCHMARK": Flag(),
            "DETERMINISTIC": Flag(),
            "DISTRIBUTED_TIMEOUT": Number(0, 60 * 24 * 7, above=True),
            "DATASETS.TRAIN": _NAMES,
            "DATASETS.TEST": _NAMES,
            "DATASETS.CUSTOM": ListOf(Anything()),
            "DATALOADER.NUM_WORKERS": Whole(0, 1024),
            "DATALOADER.ASPECT_RATIO_GROUPING": Flag(),
            "DATALOADER.SAMPLER_TRAIN": Text(),
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS": Flag(),
            "SOLVER.OPTIMIZER": Text(),
            "SOLVER.LR_SCHEDULER_NAME": Text(),
            "SOLVER.MAX_ITER": Whole(1, 2**31 - 1),
            # Training needs a multiple of the number of processes (`preflight.py`).
            "SOLVER.IMS_PER_BATCH": Whole(0, 2**20),
            "SOLVER.REFERENCE_WORLD_SIZE": Whole(0, 2**20),
            "SOLVER.NUM_ACCUMULATION_STEPS": Whole(1, 2**20),
            "SOLVER.REFERENCE_BATCH_SIZE": Whole(0, 2**20),
            "SOLVER.CHECKPOINT_PERIOD": Whole(1),
            "SOLVER.BASE_LR": Number(0, 1000, above=True),
            "SOLVER.WEIGHT_DECAY": _DECAY,
            "SOLVER.WEIGHT_DECAY_NORM": _DECAY,
            "SOLVER.WARMUP_ITERS": _LENGTH,
            "SOLVER.WARMUP_FACTOR": _FRACTION,
            "SOLVER.WARMUP_METHOD": Text(),
            "SOLVER.CLIP_GRADIENTS.ENABLED": Flag(),
            "SOLVER.AMP.ENABLED": Flag(),
            "SOLVER.NON_FINITE.MAX_SKIPPED": Whole(0, 2**31 - 1),
            "LOGGING.PICTURES": Whole(0, 1000),
            "LOGGING.HARD_EXAMPLES": Whole(0, 1000),
            "LOGGING.GRADIENT_NORM": Flag(),
            "LOGGING.WANDB": Flag(),
            "LOGGING.MLFLOW": Flag(),
            "TEST.EVAL_PERIOD": _LENGTH,  # 0: only after the last iteration
            "TEST.EXPECTED_RESULTS": ListOf(_EXPECTED_RESULT),
            "TEST.PRECISE_BN.ENABLED": Flag(),
            "TEST.AUG.ENABLED": Flag(),
            "SOLVER.EMA.ENABLED": Flag(),
            "TEST.BEST_METRIC": Either(OneOf(""), Metric()),
            "TEST.EARLY_STOPPING_PATIENCE": _LENGTH,
            "INPUT.TILES.SIZE": Whole(0, 2**16),
            "TEST.TILES.SIZE": Whole(0, 2**16),
        },
    ),
    Group(always, {"INPUT.TILES.OVERLAP": Whole(0, 2**15)}, is_positive("INPUT.TILES.SIZE")),
    Group(
        always,
        {"TEST.TILES.OVERLAP": Whole(0, 2**15), "TEST.TILES.BATCH_SIZE": Whole(1, 2**10)},
        is_positive("TEST.TILES.SIZE"),
    ),
    Group(
        always,
        {"SOLVER.EMA.DECAY": Number(0, 1, above=True, below=True), "SOLVER.EMA.WARMUP": Flag()},
        turned_on("SOLVER.EMA.ENABLED"),
    ),
    Group(always, {"TEST.BEST_MODE": OneOf("max", "min")}, has_best_metric),
    Group(
        always,
        {"TEST.EARLY_STOPPING_MIN_DELTA": Number(0, 1e6)},
        all_of(has_best_metric, stops_early),
    ),
    Group(
        always,
        {"TEST.PRECISE_BN.NUM_ITER": Whole(1)},
        turned_on("TEST.PRECISE_BN.ENABLED"),
    ),
    Group(
        always,
        {
            "TEST.AUG.MIN_SIZES": ListOf(_SIZE),
            "TEST.AUG.MAX_SIZE": Whole(1),
            "TEST.AUG.FLIP": Flag(),
        },
        turned_on("TEST.AUG.ENABLED"),
    ),
    Group(
        always,
        {"LOGGING.PROJECT": Text()},
        lambda cfg: turned_on("LOGGING.WANDB")(cfg) or turned_on("LOGGING.MLFLOW")(cfg),
    ),
    Group(
        always,
        {
            "DATALOADER.REPEAT_THRESHOLD": _FRACTION,
            "DATALOADER.REPEAT_SQRT": Flag(),
        },
        named(
            "DATALOADER.SAMPLER_TRAIN",
            "RepeatFactorTrainingSampler",
            "WeightedCategoryTrainingSampler",
        ),
    ),
    Group(
        always,
        {"DATALOADER.RANDOM_SUBSET_RATIO": Number(0, 1, above=True)},
        named("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"),
    ),
    Group(
        always,
        {
            "SOLVER.MOMENTUM": _RATE,
            "SOLVER.NESTEROV": Flag(),
        },
        named("SOLVER.OPTIMIZER", "SGD"),
    ),
    Group(
        always,
        {
            "SOLVER.BIAS_LR_FACTOR": _WEIGHT,
            "SOLVER.WEIGHT_DECAY_BIAS": Either(Null(), _DECAY),
            "VIS_PERIOD": _LENGTH,
        },
        never,
    ),
    Group(
        always,
        {"SOLVER.STEPS": ListOf(Whole(0))},
        scheduled_by("WarmupMultiStepLR"),
    ),
    Group(
        always,
        {"SOLVER.GAMMA": Number(0, 1000, above=True)},
        scheduled_by("WarmupMultiStepLR", "WarmupStepWithFixedGammaLR"),
    ),
    Group(
        always,
        {"SOLVER.NUM_DECAYS": Whole(1, 10**6)},
        scheduled_by("WarmupStepWithFixedGammaLR"),
    ),
    Group(
        always,
        {
            "SOLVER.POLY_LR_POWER": Number(0, 100),
            "SOLVER.POLY_LR_CONSTANT_ENDING": _FRACTION,
        },
        scheduled_by("WarmupPolyLR"),
    ),
    Group(
        always,
        {"SOLVER.BASE_LR_END": Number(0, 1000)},
        scheduled_by("WarmupCosineLR"),
    ),
    Group(
        always,
        {"SOLVER.RESCALE_INTERVAL": Flag()},
        scheduled_by("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    ),
    Group(
        always,
        {
            "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": Text(),
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _WEIGHT,
        },
        turned_on("SOLVER.CLIP_GRADIENTS.ENABLED"),
    ),
    Group(
        always,
        {"SOLVER.CLIP_GRADIENTS.NORM_TYPE": Either(Number(0, 1000, above=True), OneOf(math.inf))},
        all_of(
            turned_on("SOLVER.CLIP_GRADIENTS.ENABLED"),
            named("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm", "full_model"),
        ),
    ),
    # ---- what this project's trainer reads; a subclass may come with another trainer ----
    Group(
        is_plain,
        {
            "DATALOADER.SAMPLER_TRAIN": OneOf(
                "TrainingSampler",
                "RepeatFactorTrainingSampler",
                "RandomSubsetTrainingSampler",
                "WeightedTrainingSampler",
                "WeightedCategoryTrainingSampler",
            ),
            "SOLVER.OPTIMIZER": OneOf("ADAMW", "SGD"),
            "SOLVER.LR_SCHEDULER_NAME": OneOf(
                "WarmupMultiStepLR",
                "WarmupPolyLR",
                "WarmupCosineLR",
                "WarmupStepWithFixedGammaLR",
            ),
            "SOLVER.WARMUP_METHOD": OneOf("linear", "constant"),
            "MODEL.LOAD_PROPOSALS": OneOf(False, because=", because Mask2Former has no proposals"),
            "MODEL.KEYPOINT_ON": OneOf(False, because=", because Mask2Former has no keypoints"),
        },
    ),
    # ---- MaskFormer and its subclasses ----
    Group(
        has_mask_former,
        {
            "DATASETS.TEST": ListOf(Text(), distinct=True),
            "SOLVER.BACKBONE_MULTIPLIER": Number(0, 1000),
            "SOLVER.LAYER_DECAY": Number(0, 1, above=True),
            "SOLVER.WEIGHT_DECAY_EMBED": _DECAY,
            "SOLVER.AMP.DTYPE": OneOf("float16", "bfloat16"),
            "INPUT.FORMAT": OneOf("RGB", "BGR", "L", "BANDS"),
            "INPUT.MIN_SIZE_TEST": _SIZE_OR_NONE,
            "INPUT.MAX_SIZE_TEST": Whole(1),
            "INPUT.MASK_FORMAT": OneOf("polygon", "bitmask"),
            "INPUT.CROP.ENABLED": Flag(),
            "MODEL.PIXEL_MEAN": ListOf(Number(-1e6, 1e6), 1),
            "MODEL.PIXEL_STD": ListOf(Number(0, 1e6, above=True), 1),
            "MODEL.MASK_ON": Flag(),
            "MODEL.FAST": Flag(),
            "MODEL.CHECKPOINTING": Text(),
            "MODEL.MASK_FORMER.DEEP_SUPERVISION": Flag(),
            "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": _WEIGHT,
            "MODEL.MASK_FORMER.CLASS_WEIGHT": _WEIGHT,
            "MODEL.MASK_FORMER.DICE_WEIGHT": _WEIGHT,
            "MODEL.MASK_FORMER.MASK_WEIGHT": _WEIGHT,
            "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": _SIZE,
            "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": Whole(None, 2**16),
            "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": Flag(),
            "MODEL.MASK_FORMER.TEST.INSTANCE_ON": Flag(),
            "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": Flag(),
            "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": _FRACTION,
            "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": _FRACTION,
            "MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": Flag(),
            "MODEL.MASK_FORMER.TEST.PRUNE_QUERIES_AFTER": Whole(0, 1000),
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": Whole(1, 2**20),
            "TEST.DETECTIONS_PER_IMAGE": Whole(1),
            "TEST.BOXES": Flag(),
        },
    ),
    Group(
        has_mask_former,
        {"MODEL.MASK_FORMER.TEST.PRUNE_QUERIES_THRESHOLD": _FRACTION},
        lambda cfg: cfg.MODEL.MASK_FORMER.TEST.get("PRUNE_QUERIES_AFTER", 0) != 0,
    ),
    Group(
        has_mask_former,
        {"MODEL.MASK_FORMER.TRAIN_NUM_POINTS": Whole(1, 2**24)},
        lambda cfg: matches_at_points(cfg) or has_losses_at_points(cfg),
    ),
    Group(
        has_mask_former,
        {
            "MODEL.MASK_FORMER.OVERSAMPLE_RATIO": Number(1, 1000),
            "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": _FRACTION,
        },
        has_losses_at_points,
    ),
    Group(
        has_mask_former,
        {
            "INPUT.MIN_SIZE_TRAIN": Either(_SIZE_OR_NONE, ListOf(_SIZE_OR_NONE, 1)),
            "INPUT.MIN_SIZE_TRAIN_SAMPLING": Text(),
            "INPUT.MAX_SIZE_TRAIN": Whole(1),
        },
        mapped_by(ResizeCropDatasetMapper, DETRPanopticDatasetMapper),
    ),
    Group(has_mask_former, {"INPUT.IGNORE_UNLABELLED": Flag()}, mapped_by(BaseDatasetMapper)),
    Group(
        has_mask_former,
        {
            "INPUT.COLOR_AUG_SSD": Flag(),
            "INPUT.SIZE_DIVISIBILITY": Whole(-1, 2**16),
        },
        mapped_by(ResizeCropDatasetMapper),
    ),
    Group(
        has_mask_former,
        {
            "INPUT.RANDOM_FLIP": OneOf("horizontal", "vertical", "none"),
            "INPUT.IMAGE_SIZE": _SIZE,
            "INPUT.MIN_SCALE": Number(0, 1000),
            "INPUT.MAX_SCALE": Number(0, 1000),
        },
        mapped_by(LargeScaleJitterDatasetMapper),
    ),
    Group(
        all_of(has_mask_former, has_our_mapper),
        {"INPUT.MIN_SIZE_TRAIN_SAMPLING": OneOf("choice", "range")},
    ),
    Group(
        all_of(has_mask_former, turned_on("SOLVER.CLIP_GRADIENTS.ENABLED")),
        {"SOLVER.CLIP_GRADIENTS.CLIP_TYPE": OneOf("value", "norm", "full_model")},
    ),
    Group(
        has_mask_former,
        {
            "INPUT.CROP.TYPE": OneOf("relative_range", "relative", "absolute", "absolute_range"),
            "INPUT.CROP.SIZE": exactly(2, Number(0, 2**16, above=True)),
            "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": _FRACTION,
        },
        turned_on("INPUT.CROP.ENABLED"),
    ),
    Group(
        all_of(
            has_mask_former,
            turned_on("INPUT.CROP.ENABLED"),
            named("INPUT.CROP.TYPE", "absolute", "absolute_range"),
        ),
        {"INPUT.CROP.SIZE": exactly(2, _SIZE)},
    ),
    Group(
        all_of(
            has_mask_former,
            turned_on("INPUT.CROP.ENABLED"),
            named("INPUT.CROP.TYPE", "relative", "relative_range"),
        ),
        {"INPUT.CROP.SIZE": exactly(2, Number(0, 1, above=True))},
    ),
    # ---- heads and decoders ----
    Group(
        named("MODEL.SEM_SEG_HEAD.NAME", *OUR_HEADS),
        {
            "MODEL.SEM_SEG_HEAD.IN_FEATURES": _FEATURES,
            "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": Whole(-(2**31), 2**31 - 1),  # of an int32 map
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": Whole(1, 2**20),
            "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": _WEIGHT,
        },
    ),
    Group(
        named("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", *OUR_PIXEL_DECODERS),
        {
            "MODEL.SEM_SEG_HEAD.CONVS_DIM": _SIZE,
            "MODEL.SEM_SEG_HEAD.MASK_DIM": _SIZE,
            "MODEL.SEM_SEG_HEAD.NORM": Norm(),
        },
    ),
    Group(
        named("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", *PIXEL_DECODERS_WITH_ENCODER),
        {"MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": Whole(0, 1000)},
    ),
    Group(
        named("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", BIFPN),
        {"MODEL.SEM_SEG_HEAD.BIFPN_LAYERS": Whole(1, 1000)},
    ),
    Group(
        named("MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME", MSDEFORMATTN),
        {
            "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": OneOf(4, 8, 16, 32),
            "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": _FEATURES,
            "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS": Whole(1, 1024),
            "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS": Whole(1, 2**16),
        },
    ),
    Group(
        has_our_head,
        {
            "MODEL.MASK_FORMER.NHEADS": _SIZE,
            "MODEL.MASK_FORMER.DROPOUT": _FRACTION,
            "MODEL.MASK_FORMER.DIM_FEEDFORWARD": Whole(1, 2**20),
            "MODEL.MASK_FORMER.PRE_NORM": Flag(),
            "MODEL.MASK_FORMER.HIDDEN_DIM": _SIZE,
            "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE": Text(),
            "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": Flag(),
            # The first prediction precedes the first layer, so 1 is a decoder without layers.
            "MODEL.MASK_FORMER.DEC_LAYERS": Whole(1, 1000),
            "MODEL.MASK_FORMER.ENC_LAYERS": Whole(0, 1000),
        },
    ),
    Group(
        named("MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME", CONFIGURABLE_DECODER),
        {
            "MODEL.MASK_FORMER.DECODER.CROSS_ATTENTION": Text(),
            "MODEL.MASK_FORMER.DECODER.SCALES": ListOf(OneOf(*STRIDES), 1),
            "MODEL.MASK_FORMER.DECODER.CONCATENATE_SCALES": Flag(),
            "MODEL.MASK_FORMER.DECODER.LEARNABLE_QUERY_FEATURES": Flag(),
            "MODEL.MASK_FORMER.DECODER.CROSS_ATTENTION_FIRST": Flag(),
            "MODEL.MASK_FORMER.DECODER.DROPOUT": _FRACTION,
        },
    ),
    # ---- backbones ----
    # The stem is 1, the stages are 2 to 5; 0 and negative: nothing is frozen.
    Group(
        lambda cfg: has_swin(cfg) or has_resnet(cfg) or has_timm(cfg),
        {"MODEL.BACKBONE.FREEZE_AT": Whole(None, 5)},
    ),
    Group(
        has_swin,
        {
            "MODEL.SWIN.PRETRAIN_IMG_SIZE": _SIZE,
            "MODEL.SWIN.PATCH_SIZE": _SIZE,
            "MODEL.SWIN.EMBED_DIM": _SIZE,
            "MODEL.SWIN.DEPTHS": ListOf(Whole(1, 1000), 4),
            "MODEL.SWIN.NUM_HEADS": ListOf(_SIZE, 4),
            "MODEL.SWIN.WINDOW_SIZE": Whole(1, 4096),
            "MODEL.SWIN.MLP_RATIO": Number(0, 1000, above=True),
            "MODEL.SWIN.QKV_BIAS": Flag(),
            "MODEL.SWIN.QK_SCALE": Either(Null(), Number(0, 1e6, above=True)),
            "MODEL.SWIN.DROP_RATE": _RATE,
            "MODEL.SWIN.ATTN_DROP_RATE": _RATE,
            "MODEL.SWIN.DROP_PATH_RATE": _RATE,
            "MODEL.SWIN.APE": Flag(),
            "MODEL.SWIN.PATCH_NORM": Flag(),
            "MODEL.SWIN.OUT_FEATURES": ListOf(OneOf(*_STAGES), 1, distinct=True),
            "MODEL.SWIN.USE_CHECKPOINT": Flag(),
        },
    ),
    Group(
        has_timm,
        {
            "MODEL.TIMM.NAME": Text(),
            "MODEL.TIMM.OUT_FEATURES": ListOf(OneOf(*_STAGES), 1, distinct=True),
            "MODEL.TIMM.DROP_PATH_RATE": _RATE,
            "MODEL.TIMM.NORM": OneOf(*NORMS),
        },
    ),
    Group(
        has_vit,
        {
            "MODEL.VIT.NAME": Text(),
            "MODEL.VIT.OUT_CHANNELS": _SIZE,
            "MODEL.VIT.DROP_PATH_RATE": _RATE,
            # The embeddings are 1, then each block counts.
            "MODEL.BACKBONE.FREEZE_AT": Whole(None, 1000),
        },
    ),
    Group(
        has_resnet,
        {
            "MODEL.RESNETS.DEPTH": OneOf(18, 34, 50, 101, 152),
            "MODEL.RESNETS.OUT_FEATURES": ListOf(OneOf("stem", *_STAGES), 1, distinct=True),
            "MODEL.RESNETS.NUM_GROUPS": _SIZE,
            "MODEL.RESNETS.WIDTH_PER_GROUP": _SIZE,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": _SIZE,
            "MODEL.RESNETS.STEM_OUT_CHANNELS": _SIZE,
            "MODEL.RESNETS.RES5_DILATION": OneOf(1, 2, 4),
            "MODEL.RESNETS.STRIDE_IN_1X1": Flag(),
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE": exactly(4, Flag()),
            "MODEL.RESNETS.DEFORM_MODULATED": Flag(),
            "MODEL.RESNETS.DEFORM_NUM_GROUPS": _SIZE,
            "MODEL.RESNETS.NORM": Norm(),
        },
    ),
    Group(
        all_of(has_resnet, named("MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone")),
        {
            "MODEL.RESNETS.DEPTH": OneOf(50, 101, 152),
            "MODEL.RESNETS.RES4_DILATION": OneOf(1, 2),
            "MODEL.RESNETS.RES5_MULTI_GRID": exactly(3, _SIZE),
            "MODEL.RESNETS.STEM_TYPE": OneOf("basic", "deeplab"),
        },
    ),
    Group(
        all_of(has_resnet, named("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")),
        {
            "MODEL.FPN.IN_FEATURES": _FEATURES,
            "MODEL.FPN.OUT_CHANNELS": _SIZE,
            "MODEL.FPN.NORM": Norm(),
            "MODEL.FPN.FUSE_TYPE": OneOf("sum", "avg"),
        },
    ),
)


def check_values(cfg: CfgNode) -> None:
    """Check every value of the table that the config has and reads.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """
    for group in GROUPS:
        if not group.applies(cfg):
            continue
        for key, kind in group.keys.items():
            if has_key(cfg, key) and not kind.accepts(value := get_value(cfg, key)):
                raise bad_value(key, value, kind.allowed)


def unread_keys(cfg: CfgNode) -> set[str]:
    """The keys of the table that nothing reads which the config chooses."""
    known: set[str] = set()
    read: set[str] = set()
    for group in GROUPS:
        known |= group.keys.keys()
        if group.applies(cfg) and (group.is_read is None or group.is_read(cfg)):
            read |= group.keys.keys()
    return known - read


def bad_value(key: str, value: Any, allowed: str) -> ValueError:
    """The error of a value that a key does not take."""
    return ValueError(f"{key} is {value!r}; allowed: {allowed}.")
