"""Every config key of the project: its default, its meaning, and which values make sense.

The keys extend Detectron2's config tree after `detectron2.projects.deeplab.add_deeplab_config`.
Names and defaults are those of the published release, so its YAML files load unchanged.
"""

import difflib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.utils.file_io import PathManager

from .data.class_counts import follow_own_data
from .data.datasets.custom_entries import register_entries

DATASET_MAPPER_NAMES = (
    "coco_instance_lsj",
    "coco_panoptic_lsj",
    "mask_former_instance",
    "mask_former_panoptic",
    "mask_former_semantic",
)
_MASKED_DECODER = "MultiScaleMaskedTransformerDecoder"
_PIXEL_DECODERS = ("BasePixelDecoder", "MSDeformAttnPixelDecoder", "TransformerEncoderPixelDecoder")
_MULTI_SCALE = "multi_scale_pixel_decoder"


def add_maskformer2_config(cfg: CfgNode) -> None:
    """Add the keys of Mask2Former and their defaults to `cfg`, in place.

    Args:
        cfg: the result of `get_cfg()` after `add_deeplab_config(cfg)`.
    """
    # Name of the dataset mapper that turns annotations into training samples.
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    # Jitter brightness, contrast, saturation and hue as SSD does (mask_former_* mappers).
    cfg.INPUT.COLOR_AUG_SSD = False
    # Pad training images to this height and width in pixels (mask_former_* mappers); -1: do not.
    cfg.INPUT.SIZE_DIVISIBILITY = -1
    # Side in pixels of the square crop of large-scale jittering (coco_*_lsj mappers).
    cfg.INPUT.IMAGE_SIZE = 1024
    # Smallest and largest factor of large-scale jittering, relative to INPUT.IMAGE_SIZE.
    cfg.INPUT.MIN_SCALE = 0.1
    cfg.INPUT.MAX_SCALE = 2.0

    # Optimiser: ADAMW or SGD.
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    # Weight decay of embeddings (queries, levels); norms follow SOLVER.WEIGHT_DECAY_NORM.
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    # Learning rate of the backbone, relative to SOLVER.BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1

    cfg.MODEL.MASK_FORMER = CfgNode()
    # Add a loss on the prediction of every decoder layer, not of the last one only.
    cfg.MODEL.MASK_FORMER.DEEP_SUPERVISION = True
    # Weight of the class "no object" in the classification loss, relative to real classes.
    cfg.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT = 0.1
    # Weights of the class, dice and mask (binary cross entropy) terms, in matching and in the loss.
    cfg.MODEL.MASK_FORMER.CLASS_WEIGHT = 1.0
    cfg.MODEL.MASK_FORMER.DICE_WEIGHT = 1.0
    cfg.MODEL.MASK_FORMER.MASK_WEIGHT = 20.0

    # Attention heads, of the transformer decoder and of the pixel decoder's encoder alike.
    cfg.MODEL.MASK_FORMER.NHEADS = 8
    # Dropout probability in the pixel decoder's encoder and in StandardTransformerDecoder.
    cfg.MODEL.MASK_FORMER.DROPOUT = 0.1
    # Hidden width of the feed-forward blocks of the transformer decoder.
    cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD = 2048
    # Encoder layers of StandardTransformerDecoder; the masked-attention decoder has none.
    cfg.MODEL.MASK_FORMER.ENC_LAYERS = 0
    # Predictions of the masked-attention decoder: one from the learned queries alone, then one
    # after each of DEC_LAYERS - 1 layers. For StandardTransformerDecoder the number of layers.
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 6
    # Normalise before each block of the decoder instead of after.
    cfg.MODEL.MASK_FORMER.PRE_NORM = False

    # Width C of queries and attention.
    cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 256
    # Number Q of queries, the most segments one image can have.
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 100

    # What the decoder attends to: multi_scale_pixel_decoder, transformer_encoder, pixel_embedding
    # or the name of a backbone feature.
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "res5"
    # Project the decoder's input features even where they already are HIDDEN_DIM wide.
    cfg.MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ = False

    cfg.MODEL.MASK_FORMER.TEST = CfgNode()
    # Which outputs inference computes.
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = True
    cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    # Panoptic: least class probability of a query that may become a segment.
    cfg.MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD = 0.0
    # Panoptic: least share of its own mask that a segment must keep once masks compete.
    cfg.MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD = 0.0
    # Resize masks to the original image before combining them into a semantic map (more memory).
    cfg.MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False

    # Batches are padded to a multiple of this many pixels; negative: the backbone's own multiple.
    cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY = 32

    # Width of the per-pixel and per-query mask embeddings whose product is the mask logit.
    cfg.MODEL.SEM_SEG_HEAD.MASK_DIM = 256
    # Layers of the encoder inside the pixel decoder.
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 0
    # Registered name of the pixel decoder.
    cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "BasePixelDecoder"

    # Swin: size in pixels of the images it was pretrained on (absolute position table only).
    cfg.MODEL.SWIN = CfgNode()
    cfg.MODEL.SWIN.PRETRAIN_IMG_SIZE = 224
    # Side of a patch in pixels.
    cfg.MODEL.SWIN.PATCH_SIZE = 4
    # Channels of the first stage; each following stage doubles them.
    cfg.MODEL.SWIN.EMBED_DIM = 96
    # Blocks and attention heads of each stage.
    cfg.MODEL.SWIN.DEPTHS = [2, 2, 6, 2]
    cfg.MODEL.SWIN.NUM_HEADS = [3, 6, 12, 24]
    # Side of an attention window in patches.
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    # Hidden width of the feed-forward blocks, relative to the stage's channels.
    cfg.MODEL.SWIN.MLP_RATIO = 4.0
    # Whether the query, key and value projections have a bias.
    cfg.MODEL.SWIN.QKV_BIAS = True
    # Factor on the attention logits; None: 1 / sqrt(channels of a head).
    cfg.MODEL.SWIN.QK_SCALE = None
    # Dropout probability of projections, of attention weights, and the largest stochastic depth.
    cfg.MODEL.SWIN.DROP_RATE = 0.0
    cfg.MODEL.SWIN.ATTN_DROP_RATE = 0.0
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.3
    # Add a learned absolute position table to the patches.
    cfg.MODEL.SWIN.APE = False
    # Normalise the patch embedding.
    cfg.MODEL.SWIN.PATCH_NORM = True
    # Which stages the backbone returns.
    cfg.MODEL.SWIN.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Recompute blocks in the backward pass: less memory, more time.
    cfg.MODEL.SWIN.USE_CHECKPOINT = False

    # Registered name of the transformer decoder.
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = _MASKED_DECODER

    # MSDeformAttnPixelDecoder: backbone features its encoder attends to.
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    # Points sampled by each head on each level.
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4
    # Kept for published configs: the number of heads is MODEL.MASK_FORMER.NHEADS.
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8

    # Points K at which masks are compared, in matching and in the loss (paper, section 3.3).
    cfg.MODEL.MASK_FORMER.TRAIN_NUM_POINTS = 12544
    # Loss: draw this many times K candidates, from which the most uncertain are kept.
    cfg.MODEL.MASK_FORMER.OVERSAMPLE_RATIO = 3.0
    # Loss: share of the K points chosen by uncertainty; the others are uniform.
    cfg.MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO = 0.75


def load_config(config_file: str, opts: Sequence[Any] = ()) -> CfgNode:
    """Read a config file, apply overrides and check the result.

    Beyond Detectron2's keys and those above, it knows DATASETS.CUSTOM: a list of your own data sets
    (`data/datasets/custom_entries.py`), which are registered. MODEL.SEM_SEG_HEAD.NUM_CLASSES and
    IGNORE_VALUE follow from the first data set of your own in DATASETS.TRAIN and DATASETS.TEST,
    unless they are set in the same file, or after it (`data/class_counts.py`).

    Args:
        config_file: YAML file; `_BASE_` names the files it builds on.
        opts: overrides, `KEY1 VALUE1 KEY2 VALUE2 ...`.

    Returns:
        The config, not frozen. DATASETS.CUSTOM is in it only where it was set, so that other
        programs can read the configs of published data sets.

    Raises:
        FileNotFoundError: the file, a file it names as `_BASE_`, or one of your own data does not
            exist.
        ValueError: an unknown key, a value of the wrong type, or one `check_config` rejects.
    """
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.DATASETS.CUSTOM = []

    if not PathManager.isfile(config_file):
        raise FileNotFoundError(f"Config file {config_file!r} does not exist.")
    with PathManager.open(config_file) as file:
        # Composed, not constructed: only the keys are of interest here.
        root = yaml.compose(file, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"Config file {config_file!r} has no KEY: VALUE entries at its top level.")
    # Published configs compute some values with YAML's Python tags, so these stay allowed, as they
    # are by Detectron2's default.
    loaded = CfgNode.load_yaml_with_base(config_file, allow_unsafe=True)
    known = [key for key, _ in _leaves(cfg)]
    for key, value in _leaves(loaded):
        if not _has_key(cfg, key):
            raise ValueError(_unknown_key(key, known, f"Config file {config_file!r}"))
        if isinstance(_get(cfg, key), CfgNode) and not isinstance(value, dict):
            raise ValueError(
                f"Config file {config_file!r} sets {key} to {value!r}, but that is a section with "
                "keys of its own."
            )
    try:
        cfg.merge_from_file(config_file, allow_unsafe=True)
    except ValueError as error:
        raise ValueError(f"Config file {config_file!r}: {error}") from error

    if len(opts) % 2:
        raise ValueError(
            f"Config overrides come in pairs KEY VALUE, but got {len(opts)} items: {list(opts)}."
        )
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if not _has_key(cfg, key):
            raise ValueError(_unknown_key(key, known, "The command line"))
        try:
            cfg.merge_from_list([key, value])
        except ValueError as error:
            raise ValueError(f"Command line override {key}={value!r}: {error}") from error

    register_entries(cfg.DATASETS.CUSTOM)
    if not cfg.DATASETS.CUSTOM:
        del cfg.DATASETS["CUSTOM"]
    follow_own_data(cfg, set(_keys_of_file(root)), set(opts[::2]))
    check_config(cfg)
    return cfg


def check_config(cfg: CfgNode) -> None:
    """Reject values that nothing reads, that make no sense, or that contradict each other.

    Only configs of the meta-architecture `MaskFormer` are checked: others may give the same keys
    another meaning. What belongs to a registered part (a pixel decoder, a transformer decoder, a
    backbone) is checked only where the config names one of this project's.

    Raises:
        ValueError: naming the key, its value and the values allowed.
    """
    if cfg.MODEL.META_ARCHITECTURE != "MaskFormer":
        return
    _check_input(cfg)
    _check_solver(cfg)
    _check_model(cfg)
    _check_test(cfg)


def _check_input(cfg: CfgNode) -> None:
    _require_one_of(cfg, "INPUT.DATASET_MAPPER_NAME", DATASET_MAPPER_NAMES)
    _require_one_of(cfg, "INPUT.FORMAT", ("RGB", "BGR"))
    _require_one_of(cfg, "INPUT.RANDOM_FLIP", ("horizontal", "vertical", "none"))
    _require_one_of(
        cfg, "INPUT.CROP.TYPE", ("relative_range", "relative", "absolute", "absolute_range")
    )
    _require_range(cfg, "INPUT.IMAGE_SIZE", low=1)
    size_divisibility = cfg.INPUT.SIZE_DIVISIBILITY
    if size_divisibility != -1 and size_divisibility < 1:
        raise _bad_value("INPUT.SIZE_DIVISIBILITY", size_divisibility, "-1 (off) or at least 1")
    name = cfg.INPUT.DATASET_MAPPER_NAME
    # What the chosen mapper would ignore in silence.
    if name.endswith("_lsj"):
        unread = {"COLOR_AUG_SSD": False, "SIZE_DIVISIBILITY": -1, "CROP.ENABLED": False}
    else:
        unread = {"RANDOM_FLIP": "horizontal"}
    for key, only in unread.items():
        value = _get(cfg.INPUT, key)
        if value != only:
            raise _bad_value(f"INPUT.{key}", value, f"{only!r}, because mapper {name!r} ignores it")
    min_scale, max_scale = cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE
    if not 0 < min_scale <= max_scale:
        raise ValueError(
            f"INPUT.MIN_SCALE is {min_scale} and INPUT.MAX_SCALE is {max_scale}; "
            "allowed: 0 < MIN_SCALE <= MAX_SCALE."
        )


def _check_solver(cfg: CfgNode) -> None:
    _require_one_of(cfg, "SOLVER.OPTIMIZER", ("ADAMW", "SGD"))
    _require_range(cfg, "SOLVER.BACKBONE_MULTIPLIER", low=0)
    _require_range(cfg, "SOLVER.WEIGHT_DECAY_EMBED", low=0)
    if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        _require_one_of(cfg, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ("value", "norm", "full_model"))


def _check_model(cfg: CfgNode) -> None:
    mask_former, head = cfg.MODEL.MASK_FORMER, cfg.MODEL.SEM_SEG_HEAD
    for name in ("NO_OBJECT", "CLASS", "DICE", "MASK"):
        _require_range(cfg, f"MODEL.MASK_FORMER.{name}_WEIGHT", low=0)
    for name in ("TEST.OBJECT_MASK_THRESHOLD", "TEST.OVERLAP_THRESHOLD", "DROPOUT"):
        _require_range(cfg, f"MODEL.MASK_FORMER.{name}", low=0, high=1)
    for name in ("NHEADS", "HIDDEN_DIM", "DIM_FEEDFORWARD", "NUM_OBJECT_QUERIES"):
        _require_range(cfg, f"MODEL.MASK_FORMER.{name}", low=1)
    _require_range(cfg, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", low=1)
    _require_range(cfg, "MODEL.MASK_FORMER.OVERSAMPLE_RATIO", low=1)
    _require_range(cfg, "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO", low=0, high=1)
    _require_range(cfg, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", low=1)
    if head.NAME == "MaskFormerHead" and head.LOSS_WEIGHT != 1.0:
        raise _bad_value(
            "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
            head.LOSS_WEIGHT,
            "1.0, because the losses have MODEL.MASK_FORMER.{CLASS,MASK,DICE}_WEIGHT",
        )

    test = mask_former.TEST
    if not (test.SEMANTIC_ON or test.INSTANCE_ON or test.PANOPTIC_ON):
        raise ValueError(
            "MODEL.MASK_FORMER.TEST has SEMANTIC_ON, INSTANCE_ON and PANOPTIC_ON all False, so "
            "inference would return nothing; set at least one of them to True."
        )
    if mask_former.HIDDEN_DIM % mask_former.NHEADS:
        raise ValueError(
            f"MODEL.MASK_FORMER.HIDDEN_DIM is {mask_former.HIDDEN_DIM}; allowed: multiples of "
            f"MODEL.MASK_FORMER.NHEADS, which is {mask_former.NHEADS}."
        )

    # 8 is the default, which published configs with another NHEADS leave as it is.
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
    # One prediction comes before the first layer: 1 is a decoder without layers.
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
    head_name = cfg.MODEL.SEM_SEG_HEAD.NAME
    if head_name == "MaskFormerHead" and mask_former.TRANSFORMER_IN_FEATURE != _MULTI_SCALE:
        raise ValueError(
            f"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE is {mask_former.TRANSFORMER_IN_FEATURE!r}; "
            f"allowed with {_MASKED_DECODER}: {_MULTI_SCALE!r}."
        )


def _require_one_of(cfg: CfgNode, key: str, allowed: Collection[str]) -> None:
    value = _get(cfg, key)
    if value not in allowed:
        raise _bad_value(key, value, ", ".join(repr(name) for name in allowed))


def _require_range(cfg: CfgNode, key: str, low: float, high: float | None = None) -> None:
    value = _get(cfg, key)
    # Written so that NaN and None fail as well.
    is_number = isinstance(value, int | float)
    if not (is_number and value >= low and (high is None or value <= high)):
        allowed = f"at least {low}" if high is None else f"{low} to {high}"
        raise _bad_value(key, value, allowed)


def _bad_value(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{key} is {value!r}; allowed: {allowed}.")


def _unknown_key(key: str, known: list[str], where: str) -> str:
    close = difflib.get_close_matches(key, known, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{where} sets {key!r}, which is not a config key.{hint}"


def _keys_of_file(node: yaml.MappingNode, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a composed file, without those of the files it builds on."""
    for key, value in node.value:
        if key.value == "<<":  # merges one mapping, or several, into this one
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for mapping in merged:
                yield from _keys_of_file(mapping, prefix)
            continue
        yield f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode):
            yield from _keys_of_file(value, f"{prefix}{key.value}.")


def _leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every value of a nested dict that is not a dict itself."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _get(cfg: CfgNode, key: str) -> Any:
    value = cfg
    for part in key.split("."):
        value = value[part]
    return value


def _has_key(cfg: CfgNode, key: str) -> bool:
    node = cfg
    for part in str(key).split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return False
        node = node[part]
    return True
