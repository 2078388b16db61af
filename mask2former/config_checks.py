"""Checks of config values: names, and keys that contradict each other or are not read.

The type and range of each key alone is in `config_schema.py`. `check_config` needs nothing but the
config. What needs the data sets, the device or the number of processes is in `preflight.py`.
"""

import hashlib
import logging
import math
import re
from collections.abc import Callable, Collection, Set
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY

from .config_schema import (
    MASK_FORMER_HEAD,
    MASKED_DECODER,
    MSDEFORMATTN,
    OUR_DECODERS,
    OUR_HEADS,
    OUR_PIXEL_DECODERS,
    bad_value,
    check_values,
    get_value,
    has_key,
    has_only_known_parts,
    has_our_mapper,
    has_resnet,
    has_swin,
    is_plain,
    unread_keys,
)
from .data.dataset_mappers import DATASET_MAPPER_REGISTRY
from .modeling.backbone.swin import check_stages
from .modeling.criterion import LOSS_REGISTRY
from .modeling.matcher import MATCHER_REGISTRY
from .utils.registry import is_mask_former, look_up, registered_names

_logger = logging.getLogger(__name__)

CHECKPOINTING = ("none", "selective", "blocks", "auto")

_MULTI_SCALE = "multi_scale_pixel_decoder"
# The criterion's own losses, by their names in `SetCriterion.losses` and in the logs.
_BUILT_IN_LOSSES = ("labels", "masks", "ce", "mask", "dice")
# Features of Detectron2's backbones, whose stride is 2 to the power of the number.
_LEVEL = re.compile(r"(res|p)\d")
_NUM_SCALES = 3  # that the masked decoder attends to
_DEFAULT_FREEZE_AT = 2  # in Detectron2's config
# The only values with which Detectron2 builds ResNet-18 and ResNet-34.
_ONLY_WITH_SMALL_RESNETS = {"RES2_OUT_CHANNELS": 64, "RES5_DILATION": 1, "NUM_GROUPS": 1}
_GROUPS = 32  # of every GroupNorm
# What a sampler of Detectron2 reads although Detectron2's config lacks it.
_SAMPLER_KEYS = {
    "RandomSubsetTrainingSampler": "DATALOADER.RANDOM_SUBSET_RATIO",
    "WeightedTrainingSampler": "DATASETS.TRAIN_REPEAT_FACTOR",
    "WeightedCategoryTrainingSampler": "DATASETS.TRAIN_REPEAT_FACTOR",
}
# Attribute of a config object, not a key: (digest of its content, names of the checks it passed).
_PASSED = "_mask2former_passed_checks"


def check_once(cfg: CfgNode, name: str, check: Callable[[CfgNode], None]) -> None:
    """Run a check unless this config has passed it.

    The config object remembers what it passed; so do its clones and pickles, frozen or not, until a
    value changes. Neither its keys nor its dump show it.

    Args:
        cfg: the config.
        name: identifies the check and what it depends on besides the config.
        check: raises if the config is wrong.
    """
    digest = hashlib.sha256(repr(cfg).encode()).hexdigest()
    passed_digest, passed = cfg.__dict__.get(_PASSED, (digest, frozenset()))
    if passed_digest != digest:
        passed = frozenset()
    if name in passed:
        return
    check(cfg)
    cfg.__dict__[_PASSED] = digest, passed | {name}


def check_config(cfg: CfgNode) -> None:
    """Reject values that nothing reads, that make no sense, or that contradict each other.

    Types and ranges come first (`config_schema.py`). The other checks run for the meta-architecture
    `MaskFormer` and its subclasses. Other architectures may give the same keys another meaning, so
    only the parts they build from this project are checked. Keys of a registered part (mapper,
    pixel decoder, transformer decoder) are checked if the config names one of this project's.

    Raises:
        ValueError: naming the key, its value and the values allowed.
    """
    check_values(cfg)
    _check_deterministic(cfg)
    if has_resnet(cfg):
        _check_resnet(cfg)
    if has_swin(cfg):
        _check_swin(cfg)
    if is_mask_former(cfg.MODEL.META_ARCHITECTURE):
        _check_input(cfg)
        check_schedule(cfg)
        _check_solver(cfg)
        _check_model(cfg)
        _check_head(cfg)
        _check_test(cfg)
    elif cfg.MODEL.SEM_SEG_HEAD.NAME == MASK_FORMER_HEAD:
        _check_head(cfg)
    elif cfg.MODEL.SEM_SEG_HEAD.NAME in OUR_HEADS:
        _check_attention_heads(cfg)
    if cfg.MODEL.SEM_SEG_HEAD.NAME in OUR_HEADS:
        _check_groups(cfg)


def check_set_keys(cfg: CfgNode, file_keys: Set[str], option_keys: Set[str]) -> None:
    """Reject or report keys that somebody set and that no part of the model reads.

    Keys of base files are not looked at: they serve several models. Nor are those of a complete
    config, as runs write it.

    Args:
        cfg: the config, checked.
        file_keys: dotted keys of the config file itself.
        option_keys: dotted keys of the overrides.

    Raises:
        ValueError: MODEL.BACKBONE.FREEZE_AT is overridden for a backbone that freezes nothing.
    """
    unread = {key for key in unread_keys(cfg) if has_key(cfg, key)}
    freeze_at, defaults = "MODEL.BACKBONE.FREEZE_AT", get_cfg()
    # Another project's backbone may read it; 0 is what Swin does.
    if not has_swin(cfg) or cfg.MODEL.BACKBONE.FREEZE_AT <= 0:
        unread.discard(freeze_at)
    if freeze_at in unread & option_keys:
        raise _unread_freeze_at(cfg)
    is_complete = unread <= file_keys
    ignored = [
        f"{key} {get_value(cfg, key)!r}"
        for key in sorted(unread & (option_keys if is_complete else option_keys | file_keys))
        if key == freeze_at
        or not has_key(defaults, key)
        or get_value(defaults, key) != get_value(cfg, key)
    ]
    if ignored and has_only_known_parts(cfg):
        _logger.warning(
            f"Set but not read with these parts: {', '.join(ignored)}. They have no effect on "
            "training or inference."
        )


def _check_deterministic(cfg: CfgNode) -> None:
    # A project with its own copy of `add_maskformer2_config` lacks this key.
    if not cfg.get("DETERMINISTIC", False):
        return
    if cfg.CUDNN_BENCHMARK:
        raise ValueError(
            "DETERMINISTIC and CUDNN_BENCHMARK are both True, but a benchmark chooses algorithms "
            "by timing, so that runs differ: set one of them to False."
        )
    uses_ape = cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer" and cfg.MODEL.SWIN.APE
    if uses_ape and not cfg.MODEL.DEVICE.startswith("cpu"):
        raise ValueError(
            "DETERMINISTIC and MODEL.SWIN.APE are both True, but torch has no deterministic "
            "algorithm on a GPU to train the position table: set one of them to False."
        )


def _check_input(cfg: CfgNode) -> None:
    name = cfg.INPUT.DATASET_MAPPER_NAME
    # A trainer of another project may build a mapper that is not registered here; `build_mapper`
    # checks the name otherwise.
    if is_plain(cfg):
        _require_one_of(cfg, "INPUT.DATASET_MAPPER_NAME", registered_names(DATASET_MAPPER_REGISTRY))
    size_divisibility = cfg.INPUT.SIZE_DIVISIBILITY
    if size_divisibility == 0:
        raise bad_value("INPUT.SIZE_DIVISIBILITY", size_divisibility, "-1 (off) or at least 1")
    _check_sizes(cfg)
    _check_channels(cfg)
    if name in DATASET_MAPPER_REGISTRY:
        mapper = DATASET_MAPPER_REGISTRY.get(name)
        for key, only in getattr(mapper, "unread_keys", {}).items():
            value = get_value(cfg, key)
            if value != only:
                raise bad_value(key, value, f"{only!r}, because mapper {name!r} ignores it")
    min_scale, max_scale = cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE
    if not 0 < min_scale <= max_scale:
        raise ValueError(
            f"INPUT.MIN_SCALE is {min_scale} and INPUT.MAX_SCALE is {max_scale}; "
            "allowed: 0 < MIN_SCALE <= MAX_SCALE."
        )


def _check_sizes(cfg: CfgNode) -> None:
    """The sizes between which training images and their crops are drawn."""
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    is_range = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and isinstance(sizes, list | tuple)
    if is_range and not (len(sizes) == 2 and sizes[0] <= sizes[1]):
        raise bad_value(
            "INPUT.MIN_SIZE_TRAIN",
            sizes,
            "[smallest, largest], because INPUT.MIN_SIZE_TRAIN_SAMPLING is 'range'",
        )
    crop = cfg.INPUT.CROP
    if crop.ENABLED and crop.TYPE == "absolute_range" and crop.SIZE[0] > crop.SIZE[1]:
        raise bad_value(
            "INPUT.CROP.SIZE",
            crop.SIZE,
            "[smallest, largest], because INPUT.CROP.TYPE is 'absolute_range'",
        )


def _check_channels(cfg: CfgNode) -> None:
    """Mean and deviation of each channel of the images.

    Images of other projects may have any number of channels: from their own mapper, or for a
    backbone or an architecture of theirs that handles them.
    """
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if len(mean) != len(std):
        raise ValueError(
            f"MODEL.PIXEL_MEAN is {mean!r} and MODEL.PIXEL_STD is {std!r}; allowed: one number for "
            "each channel in both."
        )
    is_ours = is_plain(cfg) and has_our_mapper(cfg) and (has_swin(cfg) or has_resnet(cfg))
    if is_ours and len(mean) != len(cfg.INPUT.FORMAT):
        raise ValueError(
            f"MODEL.PIXEL_MEAN and MODEL.PIXEL_STD have {len(mean)} values ({mean!r}, {std!r}), "
            f"but INPUT.FORMAT is {cfg.INPUT.FORMAT!r}: allowed: {len(cfg.INPUT.FORMAT)} values. "
            "Images with other channels need a mapper of your own (INPUT.DATASET_MAPPER_NAME)."
        )


def _check_solver(cfg: CfgNode) -> None:
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    # Detectron2's clippers would set every gradient to 0; the one of full_model does not clip.
    if clip.ENABLED and clip.CLIP_TYPE in ("value", "norm") and clip.CLIP_VALUE == 0:
        raise bad_value(
            "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
            clip.CLIP_VALUE,
            f"above 0 with SOLVER.CLIP_GRADIENTS.CLIP_TYPE {clip.CLIP_TYPE!r}",
        )
    if not is_plain(cfg):  # its project may train with its own trainer
        return
    if solver.OPTIMIZER == "SGD" and solver.NESTEROV and solver.MOMENTUM == 0:
        raise bad_value("SOLVER.MOMENTUM", solver.MOMENTUM, "above 0 with SOLVER.NESTEROV True")
    sampler = cfg.DATALOADER.SAMPLER_TRAIN
    key = _SAMPLER_KEYS.get(sampler)
    if key is not None and not has_key(cfg, key):
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is {sampler!r}, which reads {key}, but the config lacks "
            "that key: add it with `extend_config`, or choose another sampler."
        )


def check_parts(cfg: CfgNode) -> None:
    """Check that the architecture and the parts it builds by name are registered.

    Raises:
        ValueError: naming the key, its value and the registered names.
    """
    look_up(META_ARCH_REGISTRY, cfg.MODEL.META_ARCHITECTURE, "MODEL.META_ARCHITECTURE")
    if is_mask_former(cfg.MODEL.META_ARCHITECTURE):
        look_up(BACKBONE_REGISTRY, cfg.MODEL.BACKBONE.NAME, "MODEL.BACKBONE.NAME")
        look_up(SEM_SEG_HEADS_REGISTRY, cfg.MODEL.SEM_SEG_HEAD.NAME, "MODEL.SEM_SEG_HEAD.NAME")


def check_training(cfg: CfgNode, num_workers: int) -> None:
    """Check what a training run needs: data, and lengths for this number of processes.

    Raises:
        ValueError: naming the keys.
    """
    if is_mask_former(cfg.MODEL.META_ARCHITECTURE):
        if not cfg.DATASETS.TRAIN:
            raise bad_value("DATASETS.TRAIN", cfg.DATASETS.TRAIN, "one or more data sets")
        check_schedule(cfg, num_workers / (cfg.SOLVER.REFERENCE_WORLD_SIZE or num_workers))


def check_schedule(cfg: CfgNode, factor: float = 1.0) -> None:
    """Check the lengths in iterations and the learning rate schedule.

    Args:
        cfg: the config.
        factor: what Detectron2 divides the lengths by, because the number of processes differs from
            SOLVER.REFERENCE_WORLD_SIZE.

    Raises:
        ValueError: naming the keys.
    """
    solver = cfg.SOLVER
    max_iter, period = (
        round(value / factor) for value in (solver.MAX_ITER, solver.CHECKPOINT_PERIOD)
    )
    steps = [round(step / factor) for step in solver.STEPS]
    scaled = "" if factor == 1 else f" ({steps} for {max_iter} iterations on these processes)"
    for key, value in (("MAX_ITER", max_iter), ("CHECKPOINT_PERIOD", period)):
        if value < 1:
            raise bad_value(
                f"SOLVER.{key}",
                solver[key],
                f"at least {math.ceil(factor)}, because it is divided by {factor:g}, the number of "
                "processes relative to SOLVER.REFERENCE_WORLD_SIZE",
            )
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        # Detectron2 ignores steps behind the end.
        steps = [step for step in steps if step <= max_iter]
        if [0, *steps, max_iter] != sorted({0, *steps, max_iter}):
            raise bad_value(
                "SOLVER.STEPS",
                solver.STEPS,
                f"iterations in ascending order, above 0 and not SOLVER.MAX_ITER "
                f"({solver.MAX_ITER}){scaled}",
            )
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" and solver.BASE_LR_END > solver.BASE_LR:
        raise bad_value(
            "SOLVER.BASE_LR_END", solver.BASE_LR_END, f"0 to SOLVER.BASE_LR ({solver.BASE_LR})"
        )


def _check_model(cfg: CfgNode) -> None:
    """The keys that `MaskFormer.from_config` reads itself."""
    # A project with its own copy of `add_maskformer2_config` lacks the added keys.
    if "CHECKPOINTING" in cfg.MODEL:
        _require_one_of(cfg, "MODEL.CHECKPOINTING", CHECKPOINTING)
    if "MATCHER_NAME" in cfg.MODEL.MASK_FORMER:
        _require_one_of(cfg, "MODEL.MASK_FORMER.MATCHER_NAME", registered_names(MATCHER_REGISTRY))
    _check_extra_losses(cfg.MODEL.MASK_FORMER.get("EXTRA_LOSSES", []))

    test = cfg.MODEL.MASK_FORMER.TEST
    if not (test.SEMANTIC_ON or test.INSTANCE_ON or test.PANOPTIC_ON):
        raise ValueError(
            "MODEL.MASK_FORMER.TEST has SEMANTIC_ON, INSTANCE_ON and PANOPTIC_ON all False, so "
            "inference would return nothing; set at least one of them to True."
        )


def _check_extra_losses(losses: Any) -> None:
    key = "MODEL.MASK_FORMER.EXTRA_LOSSES"
    if not isinstance(losses, list | tuple):
        raise bad_value(key, losses, "a list of [name, weight]")
    seen = set()
    for i, pair in enumerate(losses):
        entry = f"{key}[{i}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise bad_value(entry, pair, "[name, weight]")
        name, weight = pair
        if not isinstance(name, str):
            raise bad_value(entry, pair, "[name, weight]")
        if name in _BUILT_IN_LOSSES:
            raise ValueError(
                f"{entry} is {pair!r}, but {name!r} belongs to the losses that are always "
                "computed: register your loss under another name."
            )
        if name.rpartition("_")[2].isdigit():
            raise ValueError(
                f"{entry} is {pair!r}, but a name that ends in _ and a number would be taken for "
                "the loss of an earlier layer: register your loss under another name."
            )
        if name not in LOSS_REGISTRY:
            known = ", ".join(map(repr, registered_names(LOSS_REGISTRY))) or "none"
            raise ValueError(
                f"{entry} is {pair!r}, but no loss {name!r} is registered (registered: {known}). "
                "Import the module that registers it before the config is loaded."
            )
        if name in seen:
            raise ValueError(f"{key} names the loss {name!r} twice: {losses!r}.")
        seen.add(name)
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (is_number and math.isfinite(weight) and weight >= 0):
            raise bad_value(entry, pair, "[name, weight] with a finite weight of at least 0")


def _check_head(cfg: CfgNode) -> None:
    """The keys of `MaskFormerHead` and of the decoders that the config names."""
    mask_former, head = cfg.MODEL.MASK_FORMER, cfg.MODEL.SEM_SEG_HEAD
    if head.NAME == MASK_FORMER_HEAD and head.LOSS_WEIGHT != 1.0:
        raise bad_value(
            "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
            head.LOSS_WEIGHT,
            "1.0, because the losses have MODEL.MASK_FORMER.{CLASS,MASK,DICE}_WEIGHT",
        )
    _check_attention_heads(cfg)

    # Configs of the original release with another NHEADS leave this key at its default, 8.
    num_heads = head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS
    if head.PIXEL_DECODER_NAME in OUR_PIXEL_DECODERS and num_heads not in (8, mask_former.NHEADS):
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS is {num_heads}, but pixel "
            f"decoders have MODEL.MASK_FORMER.NHEADS = {mask_former.NHEADS} heads; allowed: 8 (the "
            f"default) or {mask_former.NHEADS}."
        )
    if head.PIXEL_DECODER_NAME == MSDEFORMATTN:
        _check_msdeformattn(cfg)
    if mask_former.TRANSFORMER_DECODER_NAME == MASKED_DECODER:
        _check_masked_decoder(cfg)
        if head.NAME == MASK_FORMER_HEAD and head.PIXEL_DECODER_NAME in OUR_PIXEL_DECODERS:
            _check_scales(cfg)
    elif mask_former.TRANSFORMER_DECODER_NAME in OUR_DECODERS and head.NAME == MASK_FORMER_HEAD:
        _check_standard_decoder(cfg)


def _check_test(cfg: CfgNode) -> None:
    if not cfg.TEST.AUG.ENABLED:
        return
    if not cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON:
        raise ValueError(
            "TEST.AUG.ENABLED is True, but test-time augmentation averages semantic scores and "
            "MODEL.MASK_FORMER.TEST.SEMANTIC_ON is False: turn that on or the augmentation off."
        )
    if not cfg.TEST.AUG.MIN_SIZES:
        raise bad_value("TEST.AUG.MIN_SIZES", cfg.TEST.AUG.MIN_SIZES, "one or more sizes")


def _check_attention_heads(cfg: CfgNode) -> None:
    head, mask_former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    if mask_former.HIDDEN_DIM % mask_former.NHEADS:
        raise ValueError(
            f"MODEL.MASK_FORMER.HIDDEN_DIM is {mask_former.HIDDEN_DIM}; allowed: multiples of "
            f"MODEL.MASK_FORMER.NHEADS, which is {mask_former.NHEADS}."
        )
    has_encoder = head.PIXEL_DECODER_NAME in (MSDEFORMATTN, "TransformerEncoderPixelDecoder")
    if has_encoder and head.CONVS_DIM % mask_former.NHEADS:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.CONVS_DIM is {head.CONVS_DIM}; allowed: multiples of "
            f"MODEL.MASK_FORMER.NHEADS, which is {mask_former.NHEADS}."
        )


def _check_groups(cfg: CfgNode) -> None:
    """The channels of the pixel decoders' GroupNorm."""
    head = cfg.MODEL.SEM_SEG_HEAD
    has_groups = head.NORM == "GN" or head.PIXEL_DECODER_NAME == MSDEFORMATTN
    if head.PIXEL_DECODER_NAME in OUR_PIXEL_DECODERS and has_groups and head.CONVS_DIM % _GROUPS:
        raise bad_value(
            "MODEL.SEM_SEG_HEAD.CONVS_DIM", head.CONVS_DIM, f"multiples of {_GROUPS} (groups)"
        )


def _check_msdeformattn(cfg: CfgNode) -> None:
    head = cfg.MODEL.SEM_SEG_HEAD
    prefix = "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER"
    features = head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES
    unknown = [name for name in features if name not in head.IN_FEATURES]
    if unknown or not features:
        raise bad_value(
            f"{prefix}_IN_FEATURES",
            features,
            f"one or more of MODEL.SEM_SEG_HEAD.IN_FEATURES, which is {head.IN_FEATURES}",
        )


def _check_scales(cfg: CfgNode) -> None:
    """The number of scales that the pixel decoder gives the masked decoder."""
    head = cfg.MODEL.SEM_SEG_HEAD
    key, features, num_scales = "IN_FEATURES", head.IN_FEATURES, len(head.IN_FEATURES)
    if head.PIXEL_DECODER_NAME == MSDEFORMATTN:
        key = "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
        features = head[key]
        if not all(_LEVEL.fullmatch(name) for name in features):
            return
        # The FPN adds the levels between the finest encoded one and the mask features.
        finest = min(int(name[-1]) for name in features)
        num_scales = len(features) + max(finest - int(math.log2(head.COMMON_STRIDE)), 0)
    if num_scales < _NUM_SCALES:
        raise bad_value(
            f"MODEL.SEM_SEG_HEAD.{key}",
            features,
            f"features for {_NUM_SCALES} scales, to which {MASKED_DECODER} attends; with "
            f"{head.PIXEL_DECODER_NAME} these give {num_scales}",
        )


def _check_masked_decoder(cfg: CfgNode) -> None:
    mask_former = cfg.MODEL.MASK_FORMER
    if mask_former.ENC_LAYERS != 0:
        raise ValueError(
            f"MODEL.MASK_FORMER.ENC_LAYERS is {mask_former.ENC_LAYERS}, which {MASKED_DECODER} "
            "does not read; allowed: 0. For layers in the pixel decoder set "
            "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS."
        )
    if mask_former.HIDDEN_DIM % 4:
        raise bad_value(
            "MODEL.MASK_FORMER.HIDDEN_DIM",
            mask_former.HIDDEN_DIM,
            "multiples of 4 (sine and cosine of two axes)",
        )
    if (
        cfg.MODEL.SEM_SEG_HEAD.NAME == MASK_FORMER_HEAD
        and mask_former.TRANSFORMER_IN_FEATURE != _MULTI_SCALE
    ):
        raise ValueError(
            f"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE is {mask_former.TRANSFORMER_IN_FEATURE!r}; "
            f"allowed with {MASKED_DECODER}: {_MULTI_SCALE!r}."
        )


def _check_standard_decoder(cfg: CfgNode) -> None:
    in_feature = cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE
    pixel_decoder = cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME
    key = "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE"
    if in_feature == _MULTI_SCALE:
        raise bad_value(
            key,
            in_feature,
            f"'transformer_encoder', 'pixel_embedding' or a feature of the backbone with "
            f"{cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME}",
        )
    if in_feature == "transformer_encoder" and pixel_decoder == "BasePixelDecoder":
        raise bad_value(
            key,
            in_feature,
            f"'pixel_embedding' or a feature of the backbone, because {pixel_decoder} has no "
            "encoder",
        )


def _require_one_of(cfg: CfgNode, key: str, allowed: Collection[str]) -> None:
    value = get_value(cfg, key)
    if value not in allowed:
        raise bad_value(key, value, ", ".join(repr(name) for name in allowed))


# ---- backbones ----


def _check_swin(cfg: CfgNode) -> None:
    """The stages, and FREEZE_AT, which Swin does not read.

    A config that does not set FREEZE_AT has Detectron2's default, so that is accepted.
    """
    swin, freeze_at = cfg.MODEL.SWIN, cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at > 0 and freeze_at != _DEFAULT_FREEZE_AT:
        raise _unread_freeze_at(cfg)
    check_stages(swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS)


def _unread_freeze_at(cfg: CfgNode) -> ValueError:
    """The error of a backbone that freezes nothing."""
    return bad_value(
        "MODEL.BACKBONE.FREEZE_AT",
        cfg.MODEL.BACKBONE.FREEZE_AT,
        f"0, because backbone {cfg.MODEL.BACKBONE.NAME!r} freezes nothing",
    )


def _check_resnet(cfg: CfgNode) -> None:
    """What Detectron2's builders assert, and the numbers of channels."""
    resnet = cfg.MODEL.RESNETS
    if resnet.DEPTH in (18, 34):
        for key, only in _ONLY_WITH_SMALL_RESNETS.items():
            if resnet[key] != only:
                raise bad_value(
                    f"MODEL.RESNETS.{key}",
                    resnet[key],
                    f"{only!r} with MODEL.RESNETS.DEPTH {resnet.DEPTH}",
                )
        if any(resnet.DEFORM_ON_PER_STAGE):
            raise bad_value(
                "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
                resnet.DEFORM_ON_PER_STAGE,
                f"all False with MODEL.RESNETS.DEPTH {resnet.DEPTH}",
            )
    if cfg.MODEL.BACKBONE.NAME != "build_resnet_deeplab_backbone":
        dilations: tuple[int, ...] = (1, 2)
    else:
        dilations = (4,) if resnet.RES4_DILATION == 2 else (1, 2, 4)
    if resnet.RES5_DILATION not in dilations:
        raise bad_value(
            "MODEL.RESNETS.RES5_DILATION",
            resnet.RES5_DILATION,
            f"{', '.join(map(str, dilations))} with backbone {cfg.MODEL.BACKBONE.NAME!r}"
            + (" and MODEL.RESNETS.RES4_DILATION 2" if dilations == (4,) else ""),
        )
    if cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone":
        _check_fpn(cfg)
    # The stem of DeepLab halves its channels first.
    is_deeplab = cfg.MODEL.BACKBONE.NAME == "build_resnet_deeplab_backbone"
    halves = 2 if is_deeplab and resnet.STEM_TYPE == "deeplab" else 1
    if resnet.STEM_OUT_CHANNELS % halves:
        raise bad_value(
            "MODEL.RESNETS.STEM_OUT_CHANNELS",
            resnet.STEM_OUT_CHANNELS,
            "even numbers with MODEL.RESNETS.STEM_TYPE 'deeplab'",
        )
    width = resnet.NUM_GROUPS * resnet.WIDTH_PER_GROUP
    if any(resnet.DEFORM_ON_PER_STAGE) and width % resnet.DEFORM_NUM_GROUPS:
        raise bad_value(
            "MODEL.RESNETS.DEFORM_NUM_GROUPS",
            resnet.DEFORM_NUM_GROUPS,
            f"divisors of MODEL.RESNETS.NUM_GROUPS * MODEL.RESNETS.WIDTH_PER_GROUP, {width}",
        )
    if resnet.NORM == "GN":
        for key, groups in (
            ("STEM_OUT_CHANNELS", halves * _GROUPS),
            ("RES2_OUT_CHANNELS", _GROUPS),
        ):
            if resnet[key] % groups:
                raise bad_value(
                    f"MODEL.RESNETS.{key}",
                    resnet[key],
                    f"multiples of {groups} with MODEL.RESNETS.NORM 'GN'",
                )
        if width % _GROUPS:
            raise bad_value(
                "MODEL.RESNETS.WIDTH_PER_GROUP",
                resnet.WIDTH_PER_GROUP,
                f"MODEL.RESNETS.NUM_GROUPS * WIDTH_PER_GROUP, which is {width}, must be a multiple "
                f"of {_GROUPS} with MODEL.RESNETS.NORM 'GN'",
            )


def _check_fpn(cfg: CfgNode) -> None:
    """The levels of Detectron2's FPN, and the size of images that it can add up."""
    names, stages = list(cfg.MODEL.FPN.IN_FEATURES), list(cfg.MODEL.RESNETS.OUT_FEATURES)
    first = int(names[0][-1]) if _LEVEL.fullmatch(names[0]) else 0
    if not set(names) <= set(stages) or names != [f"res{first + i}" for i in range(len(names))]:
        raise bad_value(
            "MODEL.FPN.IN_FEATURES",
            names,
            f"neighbouring stages in ascending order of MODEL.RESNETS.OUT_FEATURES, {stages}",
        )
    if not is_mask_former(cfg.MODEL.META_ARCHITECTURE):
        return
    size, stride = cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY, 2 ** int(names[-1][-1])
    if size >= 0 and (size == 0 or size % stride):
        raise bad_value(
            "MODEL.MASK_FORMER.SIZE_DIVISIBILITY",
            size,
            f"multiples of {stride}, or -1, with backbone {cfg.MODEL.BACKBONE.NAME!r}",
        )
