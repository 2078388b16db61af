"""Checks of the config keys of a model's parts: what their builders would fail on.

Backbones, heads and decoders of Detectron2 and of this project only; see `config_checks.py`.
"""

import math
import re

from detectron2.config import CfgNode

from .config_parts import (
    CONFIGURABLE_DECODER,
    FAPN,
    MASK_FORMER_HEAD,
    MASKED_DECODERS,
    MSDEFORMATTN,
    OUR_DECODERS,
    OUR_PIXEL_DECODERS,
    PIXEL_DECODERS_WITH_ENCODER,
    get_value,
    has_resnet,
)
from .config_schema import bad_value
from .modeling.backbone.freezing import freeze_at_of
from .modeling.backbone.swin import check_stages
from .modeling.backbone.timm_models import check_name, on_meta
from .modeling.layers import CROSS_ATTENTION_REGISTRY
from .modeling.pixel_decoder.fapn import OFFSET_GROUPS
from .modeling.transformer_decoder.configurable_transformer_decoder import STRIDES
from .modeling.transformer_decoder.query_pruning import check_after
from .utils.registry import is_mask_former, registered_names

_MULTI_SCALE = "multi_scale_pixel_decoder"
# Features of Detectron2's backbones, whose stride is 2 to the power of the number.
_LEVEL = re.compile(r"(res|p)\d")
_NUM_SCALES = 3  # that the masked decoder attends to
# The only values with which Detectron2 builds ResNet-18 and ResNet-34.
_ONLY_WITH_SMALL_RESNETS = {"RES2_OUT_CHANNELS": 64, "RES5_DILATION": 1, "NUM_GROUPS": 1}
_GROUPS = 32  # of every GroupNorm


def check_head(cfg: CfgNode) -> None:
    """The keys of `MaskFormerHead` and of the decoders that the config names."""
    mask_former, head = cfg.MODEL.MASK_FORMER, cfg.MODEL.SEM_SEG_HEAD
    if head.NAME == MASK_FORMER_HEAD and head.LOSS_WEIGHT != 1.0:
        raise bad_value(
            "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
            head.LOSS_WEIGHT,
            "1.0, because the losses have MODEL.MASK_FORMER.{CLASS,MASK,DICE}_WEIGHT",
        )
    check_attention_heads(cfg)

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
    if mask_former.TRANSFORMER_DECODER_NAME in MASKED_DECODERS:
        _check_masked_decoder(cfg)
        if mask_former.TRANSFORMER_DECODER_NAME == CONFIGURABLE_DECODER:
            _check_configurable_decoder(cfg)
        if head.NAME == MASK_FORMER_HEAD and head.PIXEL_DECODER_NAME in OUR_PIXEL_DECODERS:
            _check_scales(cfg)
    elif mask_former.TRANSFORMER_DECODER_NAME in OUR_DECODERS and head.NAME == MASK_FORMER_HEAD:
        _check_standard_decoder(cfg)


def check_attention_heads(cfg: CfgNode) -> None:
    head, mask_former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    if mask_former.HIDDEN_DIM % mask_former.NHEADS:
        raise ValueError(
            f"MODEL.MASK_FORMER.HIDDEN_DIM is {mask_former.HIDDEN_DIM}; allowed: multiples of "
            f"MODEL.MASK_FORMER.NHEADS, which is {mask_former.NHEADS}."
        )
    has_encoder = head.PIXEL_DECODER_NAME in PIXEL_DECODERS_WITH_ENCODER
    if has_encoder and head.CONVS_DIM % mask_former.NHEADS:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.CONVS_DIM is {head.CONVS_DIM}; allowed: multiples of "
            f"MODEL.MASK_FORMER.NHEADS, which is {mask_former.NHEADS}."
        )


def check_groups(cfg: CfgNode) -> None:
    """The channels of the pixel decoders' GroupNorm, and of FaPN's deformable convolutions."""
    head = cfg.MODEL.SEM_SEG_HEAD
    has_groups = head.NORM == "GN" or head.PIXEL_DECODER_NAME == MSDEFORMATTN
    if head.PIXEL_DECODER_NAME in OUR_PIXEL_DECODERS and has_groups and head.CONVS_DIM % _GROUPS:
        raise bad_value(
            "MODEL.SEM_SEG_HEAD.CONVS_DIM", head.CONVS_DIM, f"multiples of {_GROUPS} (groups)"
        )
    if head.PIXEL_DECODER_NAME == FAPN and head.CONVS_DIM % OFFSET_GROUPS:
        raise bad_value(
            "MODEL.SEM_SEG_HEAD.CONVS_DIM",
            head.CONVS_DIM,
            f"multiples of {OFFSET_GROUPS} (groups of offsets) with {FAPN}",
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
    """The scales that the pixel decoder gives the masked decoder."""
    head, decoder = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME
    key, features, num_scales = "IN_FEATURES", head.IN_FEATURES, len(head.IN_FEATURES)
    if head.PIXEL_DECODER_NAME == MSDEFORMATTN:
        key = "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
        features = head[key]
    levels = sorted((int(name[-1]) for name in features if _LEVEL.fullmatch(name)), reverse=True)
    is_known = len(levels) == len(features)
    if head.PIXEL_DECODER_NAME == MSDEFORMATTN:
        if not is_known:
            return
        # The FPN adds the levels between the finest encoded one and the mask features.
        levels += range(levels[-1] - 1, int(math.log2(head.COMMON_STRIDE)) - 1, -1)
        num_scales = len(levels)
    if num_scales < _NUM_SCALES:
        raise bad_value(
            f"MODEL.SEM_SEG_HEAD.{key}",
            features,
            f"features for {_NUM_SCALES} scales, to which {decoder} attends; with "
            f"{head.PIXEL_DECODER_NAME} these give {num_scales}",
        )
    if decoder != CONFIGURABLE_DECODER or not is_known:
        return
    strides = tuple(2**level for level in levels[:_NUM_SCALES])
    if strides != STRIDES:
        raise bad_value(
            f"MODEL.SEM_SEG_HEAD.{key}",
            features,
            f"features from which {head.PIXEL_DECODER_NAME} gives strides {list(STRIDES)}, of "
            f"which MODEL.MASK_FORMER.DECODER.SCALES chooses; these give {list(strides)}",
        )
    if has_resnet(cfg) and cfg.MODEL.RESNETS.RES5_DILATION != 1:
        raise bad_value(
            "MODEL.RESNETS.RES5_DILATION",
            cfg.MODEL.RESNETS.RES5_DILATION,
            f"1 with {decoder}, whose MODEL.MASK_FORMER.DECODER.SCALES are strides",
        )


def _check_configurable_decoder(cfg: CfgNode) -> None:
    decoder, prefix = cfg.MODEL.MASK_FORMER.DECODER, "MODEL.MASK_FORMER.DECODER"
    names = registered_names(CROSS_ATTENTION_REGISTRY)
    if decoder.CROSS_ATTENTION not in names:
        raise bad_value(
            f"{prefix}.CROSS_ATTENTION", decoder.CROSS_ATTENTION, ", ".join(map(repr, names))
        )
    if decoder.CONCATENATE_SCALES and len(set(decoder.SCALES)) < len(decoder.SCALES):
        raise bad_value(
            f"{prefix}.SCALES",
            decoder.SCALES,
            f"a list without repetition with {prefix}.CONCATENATE_SCALES True",
        )


def _check_masked_decoder(cfg: CfgNode) -> None:
    mask_former = cfg.MODEL.MASK_FORMER
    # DEC_LAYERS counts the prediction of the learned queries too.
    check_after(mask_former.TEST.get("PRUNE_QUERIES_AFTER", 0), mask_former.DEC_LAYERS - 1)
    decoder = mask_former.TRANSFORMER_DECODER_NAME
    if mask_former.ENC_LAYERS != 0:
        raise ValueError(
            f"MODEL.MASK_FORMER.ENC_LAYERS is {mask_former.ENC_LAYERS}, which {decoder} "
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
            f"allowed with {decoder}: {_MULTI_SCALE!r}. A config of MaskFormer, the "
            "predecessor, names no decoder: set MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME to "
            "StandardTransformerDecoder and, to train with its losses, MATCHER_NAME to "
            "MaskFormerMatcher and CRITERION_NAME to MaskFormerCriterion."
        )


def _check_standard_decoder(cfg: CfgNode) -> None:
    if after := cfg.MODEL.MASK_FORMER.TEST.get("PRUNE_QUERIES_AFTER", 0):
        raise bad_value(
            "MODEL.MASK_FORMER.TEST.PRUNE_QUERIES_AFTER",
            after,
            f"0 (off) with {cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME}, which has classes "
            "of queries behind its last layer only",
        )
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
    has_encoder = pixel_decoder in PIXEL_DECODERS_WITH_ENCODER
    if in_feature == "transformer_encoder" and (
        pixel_decoder in OUR_PIXEL_DECODERS and not has_encoder
    ):
        raise bad_value(
            key,
            in_feature,
            f"'pixel_embedding' or a feature of the backbone, because {pixel_decoder} has no "
            "encoder",
        )


# ---- backbones ----


def check_swin(cfg: CfgNode) -> None:
    """The stages."""
    swin = cfg.MODEL.SWIN
    check_stages(swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS)


def check_timm(cfg: CfgNode, section: str) -> None:
    """The model's name. What the model itself decides is checked when it is built."""
    check_name(get_value(cfg, f"{section}.NAME"), f"{section}.NAME")


def check_deterministic_vit(cfg: CfgNode) -> None:
    """Position embeddings that are interpolated and trained."""
    name = cfg.MODEL.VIT.NAME
    check_name(name, "MODEL.VIT.NAME")
    is_trained = freeze_at_of(cfg) < 1
    if is_trained and getattr(on_meta(name), "pos_embed", None) is not None:
        raise ValueError(
            f"DETERMINISTIC is True and MODEL.VIT.NAME is {name!r}, but torch has no deterministic "
            "algorithm on a GPU to train its interpolated position embeddings: set "
            "MODEL.BACKBONE.FREEZE_AT to 1 to freeze them, or DETERMINISTIC to False."
        )


def check_resnet(cfg: CfgNode) -> None:
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
