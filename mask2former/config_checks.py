"""Checks of config values: ranges, names, and keys that contradict each other or are not read.

`check_config` needs nothing but the config. What needs the data sets, the device or the number of
processes is in `preflight.py`.
"""

import hashlib
import math
from collections.abc import Callable, Collection
from typing import Any

from detectron2.config import CfgNode

from .data.dataset_mappers import DATASET_MAPPER_REGISTRY
from .modeling.criterion import LOSS_REGISTRY
from .modeling.matcher import MATCHER_REGISTRY
from .utils.registry import is_mask_former, registered_names

CHECKPOINTING = ("none", "selective", "blocks", "auto")

_HEAD = "MaskFormerHead"
_MASKED_DECODER = "MultiScaleMaskedTransformerDecoder"
_PIXEL_DECODERS = ("BasePixelDecoder", "MSDeformAttnPixelDecoder", "TransformerEncoderPixelDecoder")
_MULTI_SCALE = "multi_scale_pixel_decoder"
# The criterion's own losses, by their names in `SetCriterion.losses` and in the logs.
_BUILT_IN_LOSSES = ("labels", "masks", "ce", "mask", "dice")
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

    All checks run for the meta-architecture `MaskFormer` and its subclasses. Other architectures
    may give the same keys another meaning, so only DETERMINISTIC and the parts they build from this
    project are checked. Keys of a registered part (mapper, pixel decoder, transformer decoder) are
    checked if the config names one of this project's.

    Raises:
        ValueError: naming the key, its value and the values allowed.
    """
    _check_deterministic(cfg)
    if is_mask_former(cfg.MODEL.META_ARCHITECTURE):
        _check_input(cfg)
        _check_solver(cfg)
        _check_model(cfg)
        _check_head(cfg)
        _check_test(cfg)
    elif cfg.MODEL.SEM_SEG_HEAD.NAME == _HEAD:
        _check_head(cfg)


def _is_subclassed(cfg: CfgNode) -> bool:
    """Whether the config names a subclass, whose project may train with its own trainer."""
    return cfg.MODEL.META_ARCHITECTURE != "MaskFormer"


def _check_deterministic(cfg: CfgNode) -> None:
    # A project with its own copy of `add_maskformer2_config` lacks this key.
    deterministic = cfg.get("DETERMINISTIC", False)
    if not isinstance(deterministic, bool):
        raise _bad_value("DETERMINISTIC", deterministic, "True, False")
    if not deterministic:
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
    if not _is_subclassed(cfg):
        _require_one_of(cfg, "INPUT.DATASET_MAPPER_NAME", registered_names(DATASET_MAPPER_REGISTRY))
    _require_one_of(cfg, "INPUT.FORMAT", ("RGB", "BGR"))
    _require_one_of(cfg, "INPUT.RANDOM_FLIP", ("horizontal", "vertical", "none"))
    _require_one_of(
        cfg, "INPUT.CROP.TYPE", ("relative_range", "relative", "absolute", "absolute_range")
    )
    _require_range(cfg, "INPUT.IMAGE_SIZE", low=1)
    size_divisibility = cfg.INPUT.SIZE_DIVISIBILITY
    if size_divisibility != -1 and size_divisibility < 1:
        raise _bad_value("INPUT.SIZE_DIVISIBILITY", size_divisibility, "-1 (off) or at least 1")
    if name in DATASET_MAPPER_REGISTRY:
        mapper = DATASET_MAPPER_REGISTRY.get(name)
        for key, only in getattr(mapper, "unread_keys", {}).items():
            value = get_value(cfg, key)
            if value != only:
                raise _bad_value(key, value, f"{only!r}, because mapper {name!r} ignores it")
    min_scale, max_scale = cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE
    if not 0 < min_scale <= max_scale:
        raise ValueError(
            f"INPUT.MIN_SCALE is {min_scale} and INPUT.MAX_SCALE is {max_scale}; "
            "allowed: 0 < MIN_SCALE <= MAX_SCALE."
        )


def _check_solver(cfg: CfgNode) -> None:
    # As for the mapper's name; `build_optimizer` checks it otherwise.
    if not _is_subclassed(cfg):
        _require_one_of(cfg, "SOLVER.OPTIMIZER", ("ADAMW", "SGD"))
    _require_range(cfg, "SOLVER.BACKBONE_MULTIPLIER", low=0)
    _require_range(cfg, "SOLVER.WEIGHT_DECAY_EMBED", low=0)
    # A project with its own copy of `add_maskformer2_config` lacks the added keys.
    if "DTYPE" in cfg.SOLVER.AMP:
        _require_one_of(cfg, "SOLVER.AMP.DTYPE", ("float16", "bfloat16"))
    if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        _require_one_of(cfg, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ("value", "norm", "full_model"))


def _check_model(cfg: CfgNode) -> None:
    """The keys that `MaskFormer.from_config` reads itself."""
    for name in ("NO_OBJECT", "CLASS", "DICE", "MASK"):
        _require_range(cfg, f"MODEL.MASK_FORMER.{name}_WEIGHT", low=0)
    for name in ("OBJECT_MASK_THRESHOLD", "OVERLAP_THRESHOLD"):
        _require_range(cfg, f"MODEL.MASK_FORMER.TEST.{name}", low=0, high=1)
    _require_range(cfg, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", low=1)
    _require_range(cfg, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", low=1)
    _require_range(cfg, "MODEL.MASK_FORMER.OVERSAMPLE_RATIO", low=1)
    _require_range(cfg, "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO", low=0, high=1)
    _require_range(cfg, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", low=1)
    # A project with its own copy of `add_maskformer2_config` lacks the added keys.
    if "FAST" in cfg.MODEL and not isinstance(cfg.MODEL.FAST, bool):
        raise _bad_value("MODEL.FAST", cfg.MODEL.FAST, "True, False")
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
        raise _bad_value(key, losses, "a list of [name, weight]")
    seen = set()
    for i, pair in enumerate(losses):
        entry = f"{key}[{i}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _bad_value(entry, pair, "[name, weight]")
        name, weight = pair
        if not isinstance(name, str):
            raise _bad_value(entry, pair, "[name, weight]")
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
            raise _bad_value(entry, pair, "[name, weight] with a finite weight of at least 0")


def _check_head(cfg: CfgNode) -> None:
    """The keys of `MaskFormerHead` and of the decoders that the config names."""
    mask_former, head = cfg.MODEL.MASK_FORMER, cfg.MODEL.SEM_SEG_HEAD
    _require_range(cfg, "MODEL.MASK_FORMER.DROPOUT", low=0, high=1)
    for name in ("NHEADS", "HIDDEN_DIM", "DIM_FEEDFORWARD"):
        _require_range(cfg, f"MODEL.MASK_FORMER.{name}", low=1)
    if head.NAME == _HEAD and head.LOSS_WEIGHT != 1.0:
        raise _bad_value(
            "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
            head.LOSS_WEIGHT,
            "1.0, because the losses have MODEL.MASK_FORMER.{CLASS,MASK,DICE}_WEIGHT",
        )
    if mask_former.HIDDEN_DIM % mask_former.NHEADS:
        raise ValueError(
            f"MODEL.MASK_FORMER.HIDDEN_DIM is {mask_former.HIDDEN_DIM}; allowed: multiples of "
            f"MODEL.MASK_FORMER.NHEADS, which is {mask_former.NHEADS}."
        )

    # Configs of the original release with another NHEADS leave this key at its default, 8.
    num_heads = head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS
    if head.PIXEL_DECODER_NAME in _PIXEL_DECODERS and num_heads not in (8, mask_former.NHEADS):
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS is {num_heads}, but pixel "
            f"decoders have MODEL.MASK_FORMER.NHEADS = {mask_former.NHEADS} heads; allowed: 8 (the "
            f"default) or {mask_former.NHEADS}."
        )
    if head.PIXEL_DECODER_NAME == "MSDeformAttnPixelDecoder":
        _check_msdeformattn(cfg)
    if mask_former.TRANSFORMER_DECODER_NAME == _MASKED_DECODER:
        _check_masked_decoder(cfg)


def _check_test(cfg: CfgNode) -> None:
    if not cfg.TEST.AUG.ENABLED:
        return
    if not cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON:
        raise ValueError(
            "TEST.AUG.ENABLED is True, but test-time augmentation averages semantic scores and "
            "MODEL.MASK_FORMER.TEST.SEMANTIC_ON is False: turn that on or the augmentation off."
        )
    min_sizes = cfg.TEST.AUG.MIN_SIZES
    if not min_sizes or min(min_sizes) < 1:
        raise _bad_value("TEST.AUG.MIN_SIZES", min_sizes, "one or more sizes of at least 1")
    _require_range(cfg, "TEST.AUG.MAX_SIZE", low=1)


def _check_msdeformattn(cfg: CfgNode) -> None:
    head, num_heads = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER.NHEADS
    prefix = "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER"
    _require_range(cfg, f"{prefix}_N_POINTS", low=1)
    if head.CONVS_DIM % num_heads:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.CONVS_DIM is {head.CONVS_DIM}; allowed: multiples of "
            f"MODEL.MASK_FORMER.NHEADS, which is {num_heads}."
        )
    if head.CONVS_DIM % 32:
        raise _bad_value("MODEL.SEM_SEG_HEAD.CONVS_DIM", head.CONVS_DIM, "multiples of 32 (groups)")
    features = head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES
    unknown = [name for name in features if name not in head.IN_FEATURES]
    if unknown or not features:
        raise _bad_value(
            f"{prefix}_IN_FEATURES",
            features,
            f"one or more of MODEL.SEM_SEG_HEAD.IN_FEATURES, which is {head.IN_FEATURES}",
        )


def _check_masked_decoder(cfg: CfgNode) -> None:
    mask_former = cfg.MODEL.MASK_FORMER
    # The first prediction precedes the first layer, so 1 is a decoder without layers.
    _require_range(cfg, "MODEL.MASK_FORMER.DEC_LAYERS", low=1)
    if mask_former.ENC_LAYERS != 0:
        raise ValueError(
            f"MODEL.MASK_FORMER.ENC_LAYERS is {mask_former.ENC_LAYERS}, which {_MASKED_DECODER} "
            "does not read; allowed: 0. For layers in the pixel decoder set "
            "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS."
        )
    if mask_former.HIDDEN_DIM % 4:
        raise _bad_value(
            "MODEL.MASK_FORMER.HIDDEN_DIM",
            mask_former.HIDDEN_DIM,
            "multiples of 4 (sine and cosine of two axes)",
        )
    if cfg.MODEL.SEM_SEG_HEAD.NAME == _HEAD and mask_former.TRANSFORMER_IN_FEATURE != _MULTI_SCALE:
        raise ValueError(
            f"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE is {mask_former.TRANSFORMER_IN_FEATURE!r}; "
            f"allowed with {_MASKED_DECODER}: {_MULTI_SCALE!r}."
        )


def _require_one_of(cfg: CfgNode, key: str, allowed: Collection[str]) -> None:
    value = get_value(cfg, key)
    if value not in allowed:
        raise _bad_value(key, value, ", ".join(repr(name) for name in allowed))


def _require_range(cfg: CfgNode, key: str, low: float, high: float | None = None) -> None:
    value = get_value(cfg, key)
    # Written so that NaN and None fail as well.
    is_number = isinstance(value, int | float)
    if not (is_number and value >= low and (high is None or value <= high)):
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
        raise _bad_value(key, value, allowed)


def _bad_value(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{key} is {value!r}; allowed: {allowed}.")


def get_value(cfg: CfgNode, key: str) -> Any:
    """The value, or the section, at a dotted key; the config itself at an empty one."""
    value = cfg
    for part in key.split(".") if key else ():
        value = value[part]
    return value


def has_key(cfg: CfgNode, key: str) -> bool:
    """Whether a dotted key exists."""
    node = cfg
    for part in str(key).split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return False
        node = node[part]
    return True
