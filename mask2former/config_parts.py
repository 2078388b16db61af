"""Names of the parts that a config chooses, and conditions on them: which part reads a key."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.utils.registry import Registry

from .data.dataset_mappers import DATASET_MAPPER_REGISTRY
from .modeling.backbone import D2SwinTransformer, TimmBackbone, TimmViTBackbone, build_timm_backbone
from .utils.registry import is_mask_former

MASK_FORMER_HEAD = "MaskFormerHead"
OUR_HEADS = (MASK_FORMER_HEAD, "PerPixelBaselineHead", "PerPixelBaselinePlusHead")
MASKED_DECODER = "MultiScaleMaskedTransformerDecoder"
CONFIGURABLE_DECODER = "ConfigurableTransformerDecoder"
MASKED_DECODERS = (MASKED_DECODER, CONFIGURABLE_DECODER)
OUR_DECODERS = (*MASKED_DECODERS, "StandardTransformerDecoder")
MSDEFORMATTN = "MSDeformAttnPixelDecoder"
FULL_MASK_MATCHERS = ("FullMaskMatcher", "MaskFormerMatcher")
FULL_MASK_CRITERIA = ("FullMaskCriterion", "MaskFormerCriterion")
FAPN, BIFPN = "FaPNPixelDecoder", "BiFPNPixelDecoder"
PIXEL_DECODERS_WITH_ENCODER = (MSDEFORMATTN, "TransformerEncoderPixelDecoder")
OUR_PIXEL_DECODERS = (
    *PIXEL_DECODERS_WITH_ENCODER,
    "BasePixelDecoder",
    "SemanticFPNPixelDecoder",
    FAPN,
    BIFPN,
)
RESNETS = (
    "build_resnet_backbone",
    "build_resnet_deeplab_backbone",
    "build_resnet_fpn_backbone",
)
Condition = Callable[[CfgNode], bool]


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


def is_plain(cfg: CfgNode) -> bool:
    """Whether the architecture is `MaskFormer` itself.

    A subclass belongs to another project, which may train with its own trainer, mapper and
    optimizer: the names of those are its own.
    """
    return get_value(cfg, "MODEL.META_ARCHITECTURE") == "MaskFormer"


def has_our_head(cfg: CfgNode) -> bool:
    """Whether the head reads the keys of MODEL.MASK_FORMER as this project does."""
    return has_mask_former(cfg) or get_value(cfg, "MODEL.SEM_SEG_HEAD.NAME") in OUR_HEADS


def has_swin(cfg: CfgNode) -> bool:
    """Whether the backbone is this project's Swin, not one of another project or a subclass."""
    return _registered(cfg, BACKBONE_REGISTRY, "MODEL.BACKBONE.NAME") is D2SwinTransformer


def has_timm(cfg: CfgNode) -> bool:
    """Whether the backbone is a hierarchical model of timm."""
    builders = (TimmBackbone, build_timm_backbone)
    return _registered(cfg, BACKBONE_REGISTRY, "MODEL.BACKBONE.NAME") in builders


def has_vit(cfg: CfgNode) -> bool:
    """Whether the backbone is a plain vision transformer of timm."""
    return _registered(cfg, BACKBONE_REGISTRY, "MODEL.BACKBONE.NAME") is TimmViTBackbone


def has_own_backbone(cfg: CfgNode) -> bool:
    """Whether the backbone is one of this project."""
    return has_swin(cfg) or has_timm(cfg) or has_vit(cfg)


def has_known_backbone(cfg: CfgNode) -> bool:
    """Whether the backbone is Detectron2's ResNet or one of this project."""
    return has_resnet(cfg) or has_own_backbone(cfg)


def has_resnet(cfg: CfgNode) -> bool:
    """Whether the backbone is one of Detectron2's ResNets."""
    builder = _registered(cfg, BACKBONE_REGISTRY, "MODEL.BACKBONE.NAME")
    is_builtin = getattr(builder, "__module__", "").startswith("detectron2.")
    return is_builtin and get_value(cfg, "MODEL.BACKBONE.NAME") in RESNETS


def has_our_mapper(cfg: CfgNode) -> bool:
    """Whether images are read by a mapper of this project."""
    mapper = _registered(cfg, DATASET_MAPPER_REGISTRY, "INPUT.DATASET_MAPPER_NAME")
    return getattr(mapper, "__module__", "").startswith(f"{__package__}.data.")


def has_only_known_parts(cfg: CfgNode) -> bool:
    """Whether no part of another project, which may read any key, is chosen."""
    head, decoder = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME
    return (
        is_plain(cfg)
        and has_our_mapper(cfg)
        and has_known_backbone(cfg)
        and head.NAME in OUR_HEADS
        and head.PIXEL_DECODER_NAME in OUR_PIXEL_DECODERS
        and decoder in OUR_DECODERS
    )


def _registered(cfg: CfgNode, registry: Registry, key: str) -> Any:
    name = get_value(cfg, key) if has_key(cfg, key) else None
    return registry.get(name) if name in registry else None


def always(_: CfgNode) -> bool:
    return True


def never(_: CfgNode) -> bool:
    return False


def has_mask_former(cfg: CfgNode) -> bool:
    return is_mask_former(get_value(cfg, "MODEL.META_ARCHITECTURE"))


def named(key: str, *names: str) -> Condition:
    return lambda cfg: has_key(cfg, key) and get_value(cfg, key) in names


def scheduled_by(*names: str) -> Condition:
    return named("SOLVER.LR_SCHEDULER_NAME", *names)


def mapped_by(*bases: type) -> Condition:
    def is_mapped(cfg: CfgNode) -> bool:
        mapper = _registered(cfg, DATASET_MAPPER_REGISTRY, "INPUT.DATASET_MAPPER_NAME")
        return isinstance(mapper, type) and issubclass(mapper, bases)

    return is_mapped


def turned_on(key: str) -> Condition:
    return lambda cfg: has_key(cfg, key) and get_value(cfg, key) is True


def is_positive(key: str) -> Condition:
    return lambda cfg: has_key(cfg, key) and get_value(cfg, key) > 0


def has_best_metric(cfg: CfgNode) -> bool:
    return has_key(cfg, "TEST.BEST_METRIC") and get_value(cfg, "TEST.BEST_METRIC") != ""


def stops_early(cfg: CfgNode) -> bool:
    key = "TEST.EARLY_STOPPING_PATIENCE"
    return has_key(cfg, key) and get_value(cfg, key) > 0


def matches_at_points(cfg: CfgNode) -> bool:
    return not named("MODEL.MASK_FORMER.MATCHER_NAME", *FULL_MASK_MATCHERS)(cfg)


def has_losses_at_points(cfg: CfgNode) -> bool:
    """Whether the criterion draws points; those of whole masks do for additional losses."""
    is_full = named("MODEL.MASK_FORMER.CRITERION_NAME", *FULL_MASK_CRITERIA)(cfg)
    return not is_full or bool(get_value(cfg, "MODEL.MASK_FORMER").get("EXTRA_LOSSES"))


def all_of(*conditions: Condition) -> Condition:
    return lambda cfg: all(condition(cfg) for condition in conditions)
