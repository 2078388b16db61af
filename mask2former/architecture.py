"""Which architecture a state dict belongs to, read from its names and shapes alone.

Only the project's and Detectron2's own parts are recognised; others are told apart by the names of
their modules.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_BACKBONE = "backbone."
_PIXEL_DECODER = "sem_seg_head.pixel_decoder."
_DECODER = "sem_seg_head.predictor."

_SWINS: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "Swin-T",
    (96, (2, 2, 18, 2)): "Swin-S",
    (128, (2, 2, 18, 2)): "Swin-B",
    (192, (2, 2, 18, 2)): "Swin-L",
}
_POINTS = 4  # per level and head of deformable attention
# Parts of a head by the beginning of a name that only they have; the first that fits.
_PIXEL_DECODERS = {
    "transformer.encoder.layers.0.self_attn.sampling_offsets.": "MSDeformAttnPixelDecoder",
    "transformer.encoder.": "TransformerEncoderPixelDecoder",
    "branches.": "SemanticFPNPixelDecoder",
    "alignments.": "FaPNPixelDecoder",
    "layers.0.top_down.": "BiFPNPixelDecoder",
    "mask_features.": "BasePixelDecoder",
}
MASKED_DECODER, STANDARD_DECODER = (
    "MultiScaleMaskedTransformerDecoder",
    "StandardTransformerDecoder",
)
_DECODERS = {
    "transformer_cross_attention_layers.": MASKED_DECODER,
    "transformer.decoder.": STANDARD_DECODER,
    "weight": "a per-pixel classifier",
}

_UNKNOWN = "modules "  # then their names

# Files of other projects by the beginning of a name that only they have, and what to do with them.
_NOT_CONVERTED = "which are not converted: use the checkpoint in Detectron2's format"
_CONVERT = "to convert with tools/convert_weights.py"
_TRANSFORMERS = "the transformers package, but not those of its Mask2Former"
_FOREIGN = {
    "model.pixel_level_module.": _TRANSFORMERS,
    "model.transformer_module.": _TRANSFORMERS,
    "pixel_level_module.": _TRANSFORMERS,
    "transformer_module.": _TRANSFORMERS,
    "class_predictor.": _TRANSFORMERS,
    "panoptic_head.": f"MMDetection, {_NOT_CONVERTED}",
    "decode_head.": f"MMSegmentation, {_NOT_CONVERTED}",
    "_blocks.0._depthwise_conv.": f"an EfficientNet of efficientnet-pytorch, {_CONVERT}",
    "layer1.0.conv1.": f"a ResNet of torchvision, {_CONVERT}",
    "layers.0.blocks.0.attn.": f"a Swin Transformer of its authors' release, {_CONVERT}",
}


@dataclass(frozen=True)
class Setting:
    """A config key whose value shows in names or shapes.

    Args:
        key: the key.
        what: what the number is, for messages.
        part: the part whose kind gives the number its meaning; "": any.
        value: reads it; None where the part that has it is missing.
        decides: the names that depend on it.
    """

    key: str
    what: str
    part: str
    value: Callable[[Shapes], int | None]
    decides: re.Pattern


def _size(pattern: str, dim: int, offset: int = 0) -> Callable[[Shapes], int | None]:
    """Reads one dimension of the first parameter whose name fits."""
    compiled = re.compile(pattern)

    def read(shapes: Shapes) -> int | None:
        for name, shape in shapes.items():
            if compiled.fullmatch(name) and len(shape) > dim:
                return shape[dim] + offset
        return None

    return read


def _num_layers(*patterns: tuple[str, int]) -> Callable[[Shapes], int | None]:
    """Counts the layers of the first pattern that fits, plus its offset."""

    def read(shapes: Shapes) -> int | None:
        for pattern, offset in patterns:
            count = _count(shapes, pattern)
            if count:
                return count + offset
        return None

    return read


def _count(shapes: Iterable[str], pattern: str) -> int:
    """Number of layers, whose index is the pattern's group."""
    return len({match[1] for match in map(re.compile(pattern).match, shapes) if match})


def _num_heads(shapes: Shapes) -> int | None:
    """Heads of the pixel decoder's deformable attention."""
    num_levels = _NUM_LEVELS(shapes)
    rows = _ATTENTION_ROWS(shapes)
    return rows // (num_levels * _POINTS) if rows and num_levels else None


def _window_size(shapes: Shapes) -> int | None:
    num_offsets = _NUM_OFFSETS(shapes)
    return (math.isqrt(num_offsets) + 1) // 2 if num_offsets else None


_NUM_LEVELS = _size(r"sem_seg_head\.pixel_decoder\.transformer\.level_embed", 0)
_ATTENTION_ROWS = _size(
    r"sem_seg_head\.pixel_decoder\..*\.layers\.0\.self_attn\.attention_weights\.bias", 0
)
_NUM_OFFSETS = _size(r"backbone\.layers\.0\.blocks\.0\.attn\.relative_position_bias_table", 0)

QUERIES = Setting(
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES",
    "number of object queries",
    "",
    _size(r"sem_seg_head\..*\bquery_(embed|feat)\.weight", 0),
    re.compile(r"sem_seg_head\..*\bquery_(embed|feat)\.weight"),
)
CLASSES = Setting(
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    "number of classes",
    "",
    lambda shapes: (
        _size(r"sem_seg_head\..*\bclass_embed\.weight", 0, -1)(shapes)
        or _size(r"sem_seg_head\.predictor\.weight", 0)(shapes)
    ),
    re.compile(
        r"sem_seg_head\..*\bclass_embed\.(weight|bias)|sem_seg_head\.predictor\.(weight|bias)"
    ),
)
SETTINGS = (
    QUERIES,
    CLASSES,
    Setting(
        "MODEL.MASK_FORMER.DEC_LAYERS",
        "number of decoder layers, as the key counts them",
        "transformer decoder",
        # Of the masked decoder the key counts predictions, one more than layers.
        _num_layers(
            (r"sem_seg_head\.predictor\.transformer_ffn_layers\.(\d+)\.", 1),
            (r"sem_seg_head\.predictor\.transformer\.decoder\.layers\.(\d+)\.", 0),
        ),
        re.compile(r"sem_seg_head\.predictor\.transformer(_\w+_layers|\.decoder\.layers)\.\d+\..*"),
    ),
    Setting(
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS",
        "number of encoder layers in the pixel decoder",
        "pixel decoder",
        _num_layers((r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.", 0)),
        re.compile(r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\..*"),
    ),
    Setting(
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES",
        "number of feature levels in the pixel decoder",
        "pixel decoder",
        _NUM_LEVELS,
        re.compile(
            r"sem_seg_head\.pixel_decoder\.((input_proj|adapter_\d|layer_\d)\..*|.*level_embed"
            r"|.*\.(sampling_offsets|attention_weights)\..*)"
        ),
    ),
    Setting(
        "MODEL.MASK_FORMER.HIDDEN_DIM",
        "width of the transformer decoder",
        "transformer decoder",
        _size(r"sem_seg_head\.predictor\.query_embed\.weight", 1),
        re.compile(r"sem_seg_head\.predictor\..*"),
    ),
    Setting(
        "MODEL.SEM_SEG_HEAD.CONVS_DIM",
        "width of the pixel decoder",
        "pixel decoder",
        _size(r"sem_seg_head\.pixel_decoder\.mask_features\.weight", 1),
        re.compile(r"sem_seg_head\.(pixel_decoder|predictor\.input_proj)\..*"),
    ),
    Setting(
        "MODEL.SEM_SEG_HEAD.MASK_DIM",
        "width of the mask embeddings",
        "pixel decoder",
        _size(r"sem_seg_head\.pixel_decoder\.mask_features\.weight", 0),
        re.compile(r".*\bmask_features\..*|.*\bmask_embed\.layers\.\d\..*"),
    ),
    Setting(
        "MODEL.MASK_FORMER.DIM_FEEDFORWARD",
        "width of the feed-forward layers",
        "transformer decoder",
        _size(r"sem_seg_head\.predictor\..*\.0\.linear1\.weight", 0),
        re.compile(r"sem_seg_head\..*\.linear[12]\.\w+"),
    ),
    Setting(
        "MODEL.MASK_FORMER.NHEADS",
        "number of attention heads",
        "pixel decoder",
        _num_heads,
        re.compile(r".*\.(sampling_offsets|attention_weights)\.\w+"),
    ),
    Setting(
        "MODEL.SWIN.WINDOW_SIZE",
        "window size",
        "backbone",
        _window_size,
        re.compile(r"backbone\..*\.relative_position_(bias_table|index)"),
    ),
)


def _modules(names: list[str]) -> str:
    return _UNKNOWN + ", ".join(sorted({name.split(".")[0] for name in names})[:6])


def _backbone(shapes: Shapes) -> str:
    blocks = [_count(shapes, rf"res{stage}\.(\d+)\.") for stage in range(2, 6)]
    if all(blocks):
        convolutions = 3 if "res2.0.conv3.weight" in shapes else 2
        return f"ResNet-{convolutions * sum(blocks) + 2}"
    depths = [_count(shapes, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4)]
    width = _size(r"patch_embed\.proj\.weight", 0)(shapes)
    if width and all(depths):
        other = f"Swin of width {width} and depths {'-'.join(map(str, depths))}"
        return _SWINS.get((width, tuple(depths)), other)
    for prefix, kind in (("body.", "timm model"), ("net.body.", "plain vision transformer")):
        # The innermost numbered modules, which are what sizes of a family differ in.
        layers = _count(shapes, rf"{re.escape(prefix)}(.*\.\d+)\.")
        if layers:
            return f"{kind} of {layers} numbered layers"
    return _modules(list(shapes))


def _of_table(table: Mapping[str, str]) -> Callable[[Shapes], str]:
    def describe(shapes: Shapes) -> str:
        for beginning, kind in table.items():
            if any(name.startswith(beginning) for name in shapes):
                return kind
        return _modules(list(shapes))

    return describe


PARTS: dict[str, tuple[str, Callable[[Shapes], str]]] = {
    "backbone": (_BACKBONE, _backbone),
    "pixel decoder": (_PIXEL_DECODER, _of_table(_PIXEL_DECODERS)),
    "transformer decoder": (_DECODER, _of_table(_DECODERS)),
}


def is_known(kind: str) -> bool:
    return not kind.startswith(_UNKNOWN)


def has_class_layer(names: Iterable[str]) -> bool:
    """Whether queries predict classes; else the model is per-pixel or has a query per class."""
    return any(name.endswith("class_embed.weight") for name in names)


def describe_parts(shapes: Shapes) -> dict[str, str]:
    """The kind of each part that a state dict holds, such as `{"backbone": "ResNet-50"}`."""
    parts = {}
    for part, (prefix, describe) in PARTS.items():
        own = {k.removeprefix(prefix): shape for k, shape in shapes.items() if k.startswith(prefix)}
        if own:
            parts[part] = describe(own)
    return parts


def foreign_format(names: Iterable[str]) -> str | None:
    """The project whose names these are and what to do, if it is a known other one."""
    names = list(names)
    for beginning, project in _FOREIGN.items():
        if any(name.startswith(beginning) for name in names):
            return project
    return None
