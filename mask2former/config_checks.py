"""Checks of config values: names, and keys that contradict each other or are not read.

The type and range of each key alone is in `config_schema.py`. `check_config` needs nothing but the
config. Keys of backbones, heads and decoders are in `model_checks.py`. What needs the data sets,
the device or the number of processes is in `preflight.py`.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Collection, Set
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY

from .config_parts import (
    FAPN,
    MASK_FORMER_HEAD,
    OUR_HEADS,
    get_value,
    has_best_metric,
    has_key,
    has_known_backbone,
    has_only_known_parts,
    has_our_mapper,
    has_resnet,
    has_swin,
    has_timm,
    has_vit,
    is_plain,
    is_positive,
    mapped_by,
    stops_early,
)
from .config_schema import bad_value, check_values, unread_keys
from .data.dataset_mappers import DATASET_MAPPER_REGISTRY
from .data.dataset_mappers.base import BaseDatasetMapper
from .data.formats.bands import BANDS
from .model_checks import (
    check_attention_heads,
    check_deterministic_vit,
    check_groups,
    check_head,
    check_resnet,
    check_swin,
    check_timm,
)
from .modeling.accumulation import check_accumulation
from .modeling.criterion import CRITERION_REGISTRY, LOSS_REGISTRY
from .modeling.matcher import MATCHER_REGISTRY
from .utils.registry import is_mask_former, look_up, registered_names
from .utils.tile_grid import check_tile_size

_logger = logging.getLogger(__name__)

CHECKPOINTING = ("none", "selective", "blocks", "auto")

# The criterion's own losses, by their names in `SetCriterion.losses` and in the logs.
_BUILT_IN_LOSSES = ("labels", "masks", "ce", "mask", "dice")
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
    _check_reference(cfg)
    _check_best_metric(cfg)
    _check_tiles(cfg)
    if has_resnet(cfg):
        check_resnet(cfg)
    if has_swin(cfg):
        check_swin(cfg)
    if has_timm(cfg):
        check_timm(cfg, "MODEL.TIMM")
    if has_vit(cfg):
        check_timm(cfg, "MODEL.VIT")
    if is_mask_former(cfg.MODEL.META_ARCHITECTURE):
        _check_input(cfg)
        check_schedule(cfg)
        _check_solver(cfg)
        _check_model(cfg)
        check_head(cfg)
        _check_test(cfg)
    elif cfg.MODEL.SEM_SEG_HEAD.NAME == MASK_FORMER_HEAD:
        check_head(cfg)
    elif cfg.MODEL.SEM_SEG_HEAD.NAME in OUR_HEADS:
        check_attention_heads(cfg)
    if cfg.MODEL.SEM_SEG_HEAD.NAME in OUR_HEADS:
        check_groups(cfg)


def check_set_keys(cfg: CfgNode, keys: Set[str]) -> None:
    """Report keys that somebody set and that no part of the model reads.

    Keys of base files are not looked at: they serve several models.

    Args:
        cfg: the config, checked.
        keys: dotted keys of the overrides and, unless it is complete, of the config file itself.
    """
    unread, defaults = _unread_present_keys(cfg), get_cfg()
    ignored = [
        f"{key} {get_value(cfg, key)!r}"
        for key in sorted(unread & keys)
        if not has_key(defaults, key) or get_value(defaults, key) != get_value(cfg, key)
    ]
    if ignored and has_only_known_parts(cfg):
        _logger.warning(
            f"Set but not read with these parts: {', '.join(ignored)}. They have no effect on "
            "training or inference."
        )


def is_complete(cfg: CfgNode, file_keys: Set[str], added_keys: Collection[str]) -> bool:
    """Whether a config file has every key, whoever set it, as the ones have that runs write.

    Args:
        cfg: the config.
        file_keys: dotted keys of the config file itself.
        added_keys: keys and sections that files of the original release lack, and those of this
            project where they have their default.
    """
    added = tuple(added_keys)
    sections = tuple(f"{key}." for key in added)
    unread = {key for key in _unread_present_keys(cfg) if not key.startswith(sections)}
    return unread.difference(added) <= file_keys


def _unread_present_keys(cfg: CfgNode) -> set[str]:
    unread = {key for key in unread_keys(cfg) if has_key(cfg, key)}
    # Another project's backbone may read it.
    return unread - {"MODEL.BACKBONE.FREEZE_AT"}


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
    if has_vit(cfg) and not cfg.MODEL.DEVICE.startswith("cpu"):
        check_deterministic_vit(cfg)
    if cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME == FAPN and not cfg.MODEL.DEVICE.startswith("cpu"):
        raise ValueError(
            f"DETERMINISTIC is True and MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME is {FAPN!r}, but "
            "torchvision has no deterministic algorithm on a GPU to train deformable convolutions: "
            "set DETERMINISTIC to False or choose another pixel decoder."
        )


def _check_reference(cfg: CfgNode) -> None:
    workers, batch_size = "REFERENCE_WORLD_SIZE", "REFERENCE_BATCH_SIZE"
    # Configs made by another project's copy of `add_maskformer2_config` lack the second.
    if cfg.SOLVER[workers] and cfg.SOLVER.get(batch_size, 0):
        raise ValueError(
            f"SOLVER.{workers} is {cfg.SOLVER[workers]} and SOLVER.{batch_size} is "
            f"{cfg.SOLVER[batch_size]}, but both scale the learning rate: set one of them to 0."
        )


def _check_best_metric(cfg: CfgNode) -> None:
    """The best checkpoint and early stopping need evaluations in training."""
    if has_best_metric(cfg) and cfg.TEST.EVAL_PERIOD == 0:
        raise ValueError(
            f"TEST.BEST_METRIC is {cfg.TEST.BEST_METRIC!r}, but TEST.EVAL_PERIOD is 0, so that "
            "only the last weights are evaluated: set TEST.EVAL_PERIOD to a number of iterations."
        )
    if stops_early(cfg) and not has_best_metric(cfg):
        raise ValueError(
            f"TEST.EARLY_STOPPING_PATIENCE is {cfg.TEST.EARLY_STOPPING_PATIENCE}, but "
            "TEST.BEST_METRIC is empty: name the metric that must improve."
        )


def _check_tiles(cfg: CfgNode) -> None:
    for section in ("INPUT", "TEST"):
        # Configs made by another project's copy of `add_maskformer2_config` lack them.
        if is_positive(f"{section}.TILES.SIZE")(cfg):
            tiles, name = cfg[section].TILES, f"{section}.TILES"
            check_tile_size(tiles.SIZE, tiles.OVERLAP, f"{name}.SIZE and {name}.OVERLAP")
    if is_positive("TEST.TILES.SIZE")(cfg) and cfg.TEST.AUG.ENABLED:
        raise ValueError(
            f"TEST.TILES.SIZE is {cfg.TEST.TILES.SIZE} and TEST.AUG.ENABLED is True, but "
            "test-time augmentation reads whole images: turn one of them off."
        )
    if is_positive("INPUT.TILES.SIZE")(cfg) and not mapped_by(BaseDatasetMapper)(cfg):
        raise ValueError(
            f"INPUT.TILES.SIZE is {cfg.INPUT.TILES.SIZE}, but INPUT.DATASET_MAPPER_NAME is "
            f"{cfg.INPUT.DATASET_MAPPER_NAME!r}, which does not read tiles: set it to 0, or choose "
            "a mapper of this project."
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
    is_ours = is_plain(cfg) and has_our_mapper(cfg) and has_known_backbone(cfg)
    image_format = cfg.INPUT.FORMAT
    if is_ours and image_format != BANDS and len(mean) != len(image_format):
        raise ValueError(
            f"MODEL.PIXEL_MEAN and MODEL.PIXEL_STD have {len(mean)} values ({mean!r}, {std!r}), "
            f"but INPUT.FORMAT is {image_format!r}: allowed: {len(image_format)} values. Grey "
            "images have INPUT.FORMAT L; images with any number of channels have BANDS, or need a "
            "mapper of your own (INPUT.DATASET_MAPPER_NAME)."
        )
    if not is_plain(cfg) or image_format in ("RGB", "BGR"):
        return
    for key, what in (
        ("INPUT.COLOR_AUG_SSD", "the colour jitter is for colour images"),
        ("TEST.AUG.ENABLED", "Detectron2's test-time augmentation is for colour images"),
    ):
        if get_value(cfg, key):
            raise ValueError(
                f"{key} is True and INPUT.FORMAT is {image_format!r}, but {what}: set {key} to "
                "False."
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
    """Check what a training run needs: data, lengths for this number of processes, micro-batches.

    Raises:
        ValueError: naming the keys.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    _check_accumulation(cfg)
    if is_mask_former(name):
        if not cfg.DATASETS.TRAIN:
            raise bad_value("DATASETS.TRAIN", cfg.DATASETS.TRAIN, "one or more data sets")
        check_schedule(cfg, num_workers / (cfg.SOLVER.REFERENCE_WORLD_SIZE or num_workers))


def _check_accumulation(cfg: CfgNode) -> None:
    """The parts of the model, as far as their names tell; `Trainer` checks what it has built."""
    name = cfg.MODEL.META_ARCHITECTURE
    model = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    criterion = None
    if is_plain(cfg):
        criterion_name = cfg.MODEL.MASK_FORMER.get("CRITERION_NAME", "SetCriterion")
        criterion = CRITERION_REGISTRY.get(criterion_name)
    # A function that builds the part may be registered as well.
    if isinstance(model, type):
        criterion = criterion if isinstance(criterion, type) else None
        # Configs made by another project's copy of `add_maskformer2_config` lack the key.
        check_accumulation(cfg.SOLVER.get("NUM_ACCUMULATION_STEPS", 1), model, criterion)


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
    for name, registry in (("MATCHER", MATCHER_REGISTRY), ("CRITERION", CRITERION_REGISTRY)):
        if f"{name}_NAME" in cfg.MODEL.MASK_FORMER:
            _require_one_of(cfg, f"MODEL.MASK_FORMER.{name}_NAME", registered_names(registry))
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


def _require_one_of(cfg: CfgNode, key: str, allowed: Collection[str]) -> None:
    value = get_value(cfg, key)
    if value not in allowed:
        raise bad_value(key, value, ", ".join(repr(name) for name in allowed))
