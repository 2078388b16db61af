"""Every config key of the project: its default and its meaning. `config_schema.py` has the ranges.

The keys extend Detectron2's config tree after `detectron2.projects.deeplab.add_deeplab_config`.
Names and defaults are those of the original release, so its YAML files load unchanged; the few keys
added here have defaults that keep its behaviour.
"""

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from detectron2.config import CfgNode, downgrade_config, get_cfg, upgrade_config
from detectron2.config.compat import guess_version
from detectron2.projects.deeplab import add_deeplab_config

from .config_checks import check_config, check_once, check_set_keys, is_complete
from .config_file import read_config_file
from .config_parts import get_value, has_key, has_own_backbone
from .config_schema import check_values
from .data.class_counts import follow_own_data
from .data.datasets.custom_entries import register_entries
from .modeling.backbone.freezing import (
    FREEZE_AT,
    FREEZE_AT_COUNTS,
    freeze_at_of,
    is_chosen_default,
)
from .utils.chosen_keys import is_unset, remember_keys

__all__ = [
    "add_maskformer2_config",
    "check_config",
    "is_unset",
    "load_config",
    "register_custom_datasets",
    "without_added_defaults",
]

_logger = logging.getLogger(__name__)

ExtendConfig = Callable[[CfgNode], Any]
# What merging raises; text that is deeply nested reaches the limits of Python's parser.
_MERGE_ERRORS = (ValueError, TypeError, KeyError, AssertionError, MemoryError, RecursionError)
# Keys and sections that the original release does not have.
_ADDED_KEYS = (
    "DETERMINISTIC",
    "DISTRIBUTED_TIMEOUT",
    "INPUT.IGNORE_UNLABELLED",
    "INPUT.TILES",
    "LOGGING",
    "MODEL.FAST",
    "MODEL.CHECKPOINTING",
    "MODEL.MASK_FORMER.CRITERION_NAME",
    "MODEL.MASK_FORMER.EXTRA_LOSSES",
    "MODEL.MASK_FORMER.MATCHER_NAME",
    "MODEL.MASK_FORMER.TEST.PRUNE_QUERIES_AFTER",
    "MODEL.MASK_FORMER.TEST.PRUNE_QUERIES_THRESHOLD",
    "MODEL.SEM_SEG_HEAD.BIFPN_LAYERS",
    "MODEL.MASK_FORMER.DECODER",
    "MODEL.TIMM",
    "MODEL.VIT",
    "SOLVER.AMP.DTYPE",
    "SOLVER.LAYER_DECAY",
    "SOLVER.NON_FINITE",
    "SOLVER.NUM_ACCUMULATION_STEPS",
    "SOLVER.REFERENCE_BATCH_SIZE",
    "SOLVER.EMA",
    "TEST.BOXES",
    "TEST.BEST_METRIC",
    "TEST.BEST_MODE",
    "TEST.EARLY_STOPPING_PATIENCE",
    "TEST.EARLY_STOPPING_MIN_DELTA",
    "TEST.TILES",
)


def add_maskformer2_config(cfg: CfgNode) -> None:
    """Add the keys of Mask2Former and their defaults to `cfg`, in place.

    Args:
        cfg: the result of `get_cfg()` after `add_deeplab_config(cfg)`.
    """
    # Detectron2's keys that mean more here than there:
    #
    # INPUT.FORMAT: RGB, BGR: colours; L: grey, one channel; BANDS: all channels as the file stores
    #   them (data/formats/bands.py). MODEL.PIXEL_MEAN and PIXEL_STD have one value per channel,
    #   and the backbone's stem has as many inputs.
    # MODEL.BACKBONE.FREEZE_AT, for every backbone of this project and Detectron2's ResNets:
    #     0 or less          everything is trained
    #     1                  the stem is frozen: ResNet: stem; Swin: patch embedding, position table
    #     n                  also the first n - 1 stages: ResNet: res2 to res{n}; Swin: layers.0 to
    #                        layers.{n - 2}, with the norms of their outputs; plain transformers:
    #                        n - 1 blocks
    #     5                  all of a backbone with four stages
    #   Frozen parts compute as in evaluation, also in training. Swin and the backbones of timm take
    #   2, Detectron2's default, for "not set", unless the config file itself (not one of its bases)
    #   or an override sets it; `load_config` makes it 0 then.

    # Registered name of the dataset mapper, which turns annotations into training samples
    # (DATASET_MAPPER_REGISTRY in data/dataset_mappers).
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    # Jitter brightness, contrast, saturation and hue as SSD does (mask_former_* mappers).
    cfg.INPUT.COLOR_AUG_SSD = False
    # Pad training images to this height and width in pixels (mask_former_* mappers); -1: off.
    cfg.INPUT.SIZE_DIVISIBILITY = -1
    # Side in pixels of the square crop of large-scale jittering (coco_*_lsj mappers).
    cfg.INPUT.IMAGE_SIZE = 1024
    # Leave pixels without a label out of matching and mask losses: ignore label, void, crowds and
    # padding. False, as in the original release: they train as background.
    cfg.INPUT.IGNORE_UNLABELLED = False
    # Train on tiles of the images instead, for images that are too large: height and width of a
    # tile in pixels (0: off), and what neighbours share at least. A tile takes part as an image of
    # its size would; DATALOADER.FILTER_EMPTY_ANNOTATIONS leaves out tiles without object.
    cfg.INPUT.TILES = CfgNode()
    cfg.INPUT.TILES.SIZE = 0
    cfg.INPUT.TILES.OVERLAP = 0
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
    # Compute the losses on the prediction of every decoder layer, not only of the last one.
    cfg.MODEL.MASK_FORMER.DEEP_SUPERVISION = True
    # Weight of the class "no object" in the classification loss, relative to real classes.
    cfg.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT = 0.1
    # Weights of the class, dice and mask (binary cross entropy or focal) terms, in matching and in
    # the loss.
    cfg.MODEL.MASK_FORMER.CLASS_WEIGHT = 1.0
    cfg.MODEL.MASK_FORMER.DICE_WEIGHT = 1.0
    cfg.MODEL.MASK_FORMER.MASK_WEIGHT = 20.0

    # Attention heads of the transformer decoder and of the pixel decoder's encoder.
    cfg.MODEL.MASK_FORMER.NHEADS = 8
    # Dropout probability in the pixel decoder's encoder and in StandardTransformerDecoder.
    cfg.MODEL.MASK_FORMER.DROPOUT = 0.1
    # Hidden width of the feed-forward blocks of the transformer decoder.
    cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD = 2048
    # Encoder layers of StandardTransformerDecoder; must be 0 for the masked-attention decoder.
    cfg.MODEL.MASK_FORMER.ENC_LAYERS = 0
    # Predictions of the masked-attention decoder: one from the learned queries alone, then one
    # after each of DEC_LAYERS - 1 layers. For StandardTransformerDecoder the number of layers.
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 6
    # Normalise before each block of the decoder instead of after.
    cfg.MODEL.MASK_FORMER.PRE_NORM = False

    # Width C of queries and attention.
    cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 256
    # Number Q of queries, an upper bound on the segments per image.
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 100

    # What the decoder attends to: multi_scale_pixel_decoder, transformer_encoder, pixel_embedding
    # or the name of a backbone feature.
    cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "res5"
    # Project the decoder's input features even if they already have HIDDEN_DIM channels.
    cfg.MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ = False

    cfg.MODEL.MASK_FORMER.TEST = CfgNode()
    # Which outputs inference computes.
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = True
    cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    # Panoptic: drop queries whose class probability is not above this threshold.
    cfg.MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD = 0.0
    # Panoptic: drop segments that keep less than this fraction of their own mask after the
    # per-pixel argmax over queries.
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
    # Activation checkpointing of the blocks: less memory, more time.
    cfg.MODEL.SWIN.USE_CHECKPOINT = False

    # Registered name of the transformer decoder.
    cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"

    # MSDeformAttnPixelDecoder: backbone features its encoder attends to.
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    # Points sampled by each head on each level.
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4
    # Kept for configs of the original release; the number of heads is MODEL.MASK_FORMER.NHEADS.
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8

    # Points K at which masks are compared, in matching and in the loss (paper, section 3.3). Parts
    # that compare whole masks (modeling/full_mask_losses.py) do not read these three keys.
    cfg.MODEL.MASK_FORMER.TRAIN_NUM_POINTS = 12544
    # Loss: draw OVERSAMPLE_RATIO * K candidate points and keep the most uncertain ones.
    cfg.MODEL.MASK_FORMER.OVERSAMPLE_RATIO = 3.0
    # Loss: fraction of the K points chosen by uncertainty; the rest are uniform.
    cfg.MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO = 0.75

    # Not in the original release. Use the fast implementation of each part that has one (same
    # numbers, see mask2former/fast); False: run every part as written.
    cfg.MODEL.FAST = True
    # Activation checkpointing in training: "none", "selective" (the large intermediate tensors of
    # single operations), "blocks" (whole layers; least memory, most time) or "auto": selective, and
    # on a GPU none after the first iterations if memory is ample (fast/checkpointing.py).
    cfg.MODEL.CHECKPOINTING = "auto"
    # Losses in addition to class, mask and dice: a list of [name, weight], with names registered
    # in LOSS_REGISTRY (modeling/criterion.py).
    cfg.MODEL.MASK_FORMER.EXTRA_LOSSES = []
    # Registered name of the matcher (MATCHER_REGISTRY in modeling/matcher.py).
    cfg.MODEL.MASK_FORMER.MATCHER_NAME = "HungarianMatcher"
    # Registered name of the criterion (CRITERION_REGISTRY in modeling/criterion.py): SetCriterion
    # or, on whole masks, FullMaskCriterion or MaskFormerCriterion; matchers of the same names.
    cfg.MODEL.MASK_FORMER.CRITERION_NAME = "SetCriterion"
    # Layers of BiFPNPixelDecoder.
    cfg.MODEL.SEM_SEG_HEAD.BIFPN_LAYERS = 9
    # In inference, after this many decoder layers, drop the queries whose most probable class is
    # no-object with a probability above the threshold: faster, at a loss (docs/speed.md). 0: off.
    cfg.MODEL.MASK_FORMER.TEST.PRUNE_QUERIES_AFTER = 0
    cfg.MODEL.MASK_FORMER.TEST.PRUNE_QUERIES_THRESHOLD = 0.9
    # ConfigurableTransformerDecoder, for the ablations of the decoder (paper, tables 4a to 4d).
    cfg.MODEL.MASK_FORMER.DECODER = CfgNode()
    # Registered name of the cross-attention: masked, full, smca, mask_pooling or your own
    # (CROSS_ATTENTION_REGISTRY in modeling/layers/cross_attention_variants.py).
    cfg.MODEL.MASK_FORMER.DECODER.CROSS_ATTENTION = "masked"
    # Strides of the feature maps to which the layers attend round robin.
    cfg.MODEL.MASK_FORMER.DECODER.SCALES = [32, 16, 8]
    # Let every layer attend to all SCALES at once.
    cfg.MODEL.MASK_FORMER.DECODER.CONCATENATE_SCALES = False
    # Train the query features; False: they start from zero, as in DETR.
    cfg.MODEL.MASK_FORMER.DECODER.LEARNABLE_QUERY_FEATURES = True
    # In each layer, cross-attention before self-attention.
    cfg.MODEL.MASK_FORMER.DECODER.CROSS_ATTENTION_FIRST = True
    # Dropout probability, on residual branches and attention weights.
    cfg.MODEL.MASK_FORMER.DECODER.DROPOUT = 0.0
    # TimmBackbone (or build_timm_backbone): hierarchical models of timm.
    cfg.MODEL.TIMM = CfgNode()
    # The model: architecture or architecture.weights, such as convnext_tiny.fb_in22k_ft_in1k. The
    # weights are loaded only if MODEL.WEIGHTS names them.
    cfg.MODEL.TIMM.NAME = ""
    # Which maps the backbone returns: res2 to res5, strides 4 to 32.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # The largest stochastic depth.
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0
    # Batch norms of models that have them: FrozenBN for pretrained weights and few images per GPU,
    # BN or SyncBN to train them, as training from scratch needs.
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    # TimmViTBackbone: plain vision transformers of timm with a simple feature pyramid.
    cfg.MODEL.VIT = CfgNode()
    # The model, as MODEL.TIMM.NAME; such as vit_base_patch14_dinov2.lvd142m.
    cfg.MODEL.VIT.NAME = ""
    # Channels of each map of the pyramid.
    cfg.MODEL.VIT.OUT_CHANNELS = 256
    # The largest stochastic depth.
    cfg.MODEL.VIT.DROP_PATH_RATE = 0.0
    # Training and evaluation by tools/train_net.py or `Trainer`: use deterministic algorithms only,
    # so that a run can be repeated or resumed with the same bits on a GPU too. Slower; an operator
    # without such an algorithm raises. Not together with CUDNN_BENCHMARK.
    cfg.DETERMINISTIC = False
    # Minutes that ranks wait for one that does not answer before the job ends with an error. The
    # others also wait while the main process computes metrics (PQ, AP) or writes a checkpoint, so
    # it must be longer than that takes.
    cfg.DISTRIBUTED_TIMEOUT = 30.0
    # What SOLVER.AMP.ENABLED computes in: "float16", as the original release, with scaled
    # gradients, or "bfloat16", which needs none.
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Layer-wise learning rate decay: each block of the backbone learns this much slower than the
    # block after it; 1.0: off. Besides BACKBONE_MULTIPLIER, the learning rate of a block has the
    # factor LAYER_DECAY ** (number of blocks from it to the last one, both included).
    cfg.SOLVER.LAYER_DECAY = 1.0
    # An iteration whose loss or matching costs are infinite or NaN is captured in OUTPUT_DIR, for
    # tools/replay.py. It ends the run; or, up to MAX_SKIPPED times in a run, its update is left out
    # on all ranks, which takes a host sync in every iteration. 0: none is skipped.
    cfg.SOLVER.NON_FINITE = CfgNode()
    cfg.SOLVER.NON_FINITE.MAX_SKIPPED = 0
    # Micro-batches into which each process splits its share of SOLVER.IMS_PER_BATCH, to train in
    # the memory of one of them. Gradients and losses are those of the whole batch.
    cfg.SOLVER.NUM_ACCUMULATION_STEPS = 1
    # Batch size for which SOLVER.BASE_LR (and BASE_LR_END) is given: training multiplies it by
    # IMS_PER_BATCH / REFERENCE_BATCH_SIZE. 0: off.
    cfg.SOLVER.REFERENCE_BATCH_SIZE = 0
    # Exponential moving average of the weights (ema.py), evaluated and saved beside them.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    # Share of the average that each iteration keeps: 0.9998 averages over about the last 5000.
    cfg.SOLVER.EMA.DECAY = 0.9998
    # Average over at most about the last tenth of the iterations so far.
    cfg.SOLVER.EMA.WARMUP = True
    # Fill `pred_boxes` of instances with the boxes of their masks. False, as in the original
    # release: they are zeros.
    cfg.TEST.BOXES = False
    # Metric by which model_best.pth is chosen among the evaluations of TEST.EVAL_PERIOD, such as
    # "panoptic_seg/PQ", "segm/AP" or "sem_seg/mIoU"; "ema/segm/AP" is that of SOLVER.EMA, whose
    # weights are then saved. With several test sets their name comes first: "my_val/segm/AP".
    # Empty: off.
    cfg.TEST.BEST_METRIC = ""
    # Whether larger ("max") or smaller ("min") values are better.
    cfg.TEST.BEST_MODE = "max"
    # End training after this number of evaluations in which BEST_METRIC has not improved by more
    # than EARLY_STOPPING_MIN_DELTA; 0: off.
    cfg.TEST.EARLY_STOPPING_PATIENCE = 0
    cfg.TEST.EARLY_STOPPING_MIN_DELTA = 0.0
    # Evaluate in tiles of this height and width in pixels (0: off), which share OVERLAP pixels with
    # their neighbours and are resized as images of their size would be (inference/tiles.py);
    # BATCH_SIZE of them run together.
    cfg.TEST.TILES = CfgNode()
    cfg.TEST.TILES.SIZE = 0
    cfg.TEST.TILES.OVERLAP = 0
    cfg.TEST.TILES.BATCH_SIZE = 1
    # What a training logs besides the losses (training_log.py); it changes no number.
    cfg.LOGGING = CfgNode()
    # Images of each of DATASETS.TEST drawn at every evaluation, ground truth beside prediction, for
    # TensorBoard and in OUTPUT_DIR/pictures; 0: off.
    cfg.LOGGING.PICTURES = 4
    # Training batches with the largest losses since the last evaluation, drawn there too; 0: off.
    cfg.LOGGING.HARD_EXAMPLES = 4
    # Log the norm of all gradients before clipping also if clipping does not compute it, as
    # SOLVER.CLIP_GRADIENTS.CLIP_TYPE full_model does.
    cfg.LOGGING.GRADIENT_NORM = False
    # Write to Weights & Biases (package wandb) and to MLflow (mlflow or mlflow-skinny), by default
    # without network into OUTPUT_DIR (experiment_trackers.py).
    cfg.LOGGING.WANDB = False
    cfg.LOGGING.MLFLOW = False
    # Their name for the project or experiment; the run is named after OUTPUT_DIR.
    cfg.LOGGING.PROJECT = "mask2former"


def load_config(
    config_file: str,
    opts: Sequence[Any] = (),
    extend_config: ExtendConfig | None = None,
) -> CfgNode:
    """Read a config file, apply overrides and check the values.

    Files may come from anybody: unlike Detectron2's `CfgNode.merge_from_file`, reading them never
    runs code (`config_file.py`).

    Besides Detectron2's keys and those above it knows DATASETS.CUSTOM: a list of your own data sets
    (`data/datasets/custom_entries.py`), which are registered. MODEL.SEM_SEG_HEAD.NUM_CLASSES and
    IGNORE_VALUE follow from the first data set of your own in DATASETS.TRAIN and DATASETS.TEST,
    unless they are set in the same file or by `opts` (`data/class_counts.py`).

    Args:
        config_file: YAML file; `_BASE_` names the files it builds on.
        opts: overrides, `KEY1 VALUE1 KEY2 VALUE2 ...`.
        extend_config: called with the default config before the file is read, to add the keys of
            another project in place.

    Returns:
        The config, not frozen. It has DATASETS.CUSTOM only if that was set, so that other programs
        can read the config otherwise.

    Raises:
        FileNotFoundError: the file, a file it names as `_BASE_`, or one of your own data does not
            exist.
        ValueError: an unknown key, a value of the wrong type, or one `check_config` rejects.
    """
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.DATASETS.CUSTOM = []
    if extend_config is not None:
        extend_config(cfg)

    loaded, own_keys, places = read_config_file(config_file)
    known = [key for key, _ in _leaves(cfg)]
    for key, value in _leaves(loaded):
        if not has_key(cfg, key):
            raise ValueError(_unknown_key(key, known, places[key]))
        if isinstance(get_value(cfg, key), CfgNode) and not isinstance(value, dict):
            raise ValueError(_value_of_section(key, value, places[key]))
    _merge(cfg, loaded, config_file)

    if len(opts) % 2:
        raise ValueError(
            f"Config overrides come in pairs KEY VALUE, but got {len(opts)} items: {list(opts)}."
        )
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        if not has_key(cfg, key):
            raise ValueError(_unknown_key(key, known, "The command line"))
        section = get_value(cfg, key)
        if isinstance(section, CfgNode):
            text = _value_of_section(key, value, "The command line")
            raise ValueError(f"{text} Set them one by one, such as {key}.{min(section)}.")
        try:
            cfg.merge_from_list([key, value])
        except _MERGE_ERRORS as error:
            raise ValueError(f"Command line override {key}={value!r}: {error}") from error
    _check_version(cfg.VERSION, "The command line")

    file_keys = {key for key, _ in _leaves(loaded)}
    check_values(cfg)  # before the first of them is used
    options = set(opts[::2])
    if is_complete(cfg, own_keys, _ADDED_KEYS):
        # Somebody has set the others in another file, or nobody.
        chosen = options | (own_keys & {FREEZE_AT} if FREEZE_AT_COUNTS in own_keys else set())
    else:
        chosen = options | own_keys
    remember_keys(cfg, set(known) - file_keys - options, chosen)
    if has_own_backbone(cfg):
        # A file to which the config is written then says what is frozen.
        cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at_of(cfg)
    register_custom_datasets(cfg)
    if not cfg.DATASETS.CUSTOM:
        del cfg.DATASETS["CUSTOM"]
    follow_own_data(cfg, own_keys, options)
    check_once(cfg, "config", check_config)
    check_set_keys(cfg, chosen)
    return cfg


def register_custom_datasets(cfg: CfgNode) -> None:
    """Register the data sets of DATASETS.CUSTOM in this process, unless they are already.

    Raises:
        FileNotFoundError: a file or a folder of a data set does not exist.
        ValueError: an entry is wrong, or its name is taken.
    """
    register_entries(cfg.DATASETS.get("CUSTOM", []))


def without_added_defaults(cfg: CfgNode) -> CfgNode:
    """A copy for files that the original release should be able to read.

    Args:
        cfg: the config.

    Returns:
        Its clone without the keys that the original release does not have, where they still have
        their default. One of them says that FREEZE_AT counts, see `freezing.py`.
    """
    defaults = get_cfg()
    add_deeplab_config(defaults)
    add_maskformer2_config(defaults)
    result = cfg.clone()
    for key in _ADDED_KEYS:
        section, _, name = key.rpartition(".")
        if key == FREEZE_AT_COUNTS and has_own_backbone(cfg) and is_chosen_default(cfg):
            continue
        if has_key(result, key) and get_value(result, key) == get_value(defaults, key):
            del get_value(result, section)[name]
    return result


def _unknown_key(key: str, known: list[str], where: str) -> str:
    close = difflib.get_close_matches(key, known, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{where} sets {key!r}, which is not a config key.{hint}"


def _value_of_section(key: str, value: Any, where: str) -> str:
    return f"{where} sets {key} to {value!r}, but that is a section with keys of its own."


def _check_version(version: Any, where: str) -> None:
    """Check the version of the config format; Mask2Former has known one only.

    Raises:
        ValueError: another one than Detectron2's current one.
    """
    current = get_cfg().VERSION
    if version != current:
        raise ValueError(
            f"{where} sets VERSION to {version!r}; allowed: {current}, the version of Detectron2's "
            f"config keys. Write {current}, and rename keys of older versions, such as "
            "MODEL.WEIGHT."
        )


def _merge(cfg: CfgNode, values: dict[str, Any], config_file: str) -> None:
    """Merge what a file says, as `CfgNode.merge_from_file` does but without reading it again."""
    try:
        loaded = CfgNode(values)
        version = loaded.get("VERSION")
        if version is None:
            version = guess_version(loaded, config_file)
        if version == cfg.VERSION:
            cfg.merge_from_other_cfg(loaded)
            return
        if version not in range(1, cfg.VERSION):
            raise ValueError(f"VERSION is {version!r}; allowed: 1 to {cfg.VERSION}.")
        _logger.warning(f"Config file {config_file!r} is of version {version} and is upgraded.")
        old = downgrade_config(cfg, to_version=version)
        old.merge_from_other_cfg(loaded)
        upgraded = upgrade_config(old)
        cfg.clear()
        cfg.update(upgraded)
    except _MERGE_ERRORS as error:
        raise ValueError(f"Config file {config_file!r}: {error}") from error


def _leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every value of a nested dict that is not a dict itself."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
