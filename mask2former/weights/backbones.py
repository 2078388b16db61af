"""ImageNet weights of backbones: which program wrote them, and their names in our backbones."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

NAMES = {
    "torchvision": "a ResNet of torchvision or timm",
    "swin": "an official Swin Transformer",
    "timm_swin": "a Swin Transformer of timm",
    "efficientnet": "an EfficientNet of efficientnet-pytorch",
}
# Keys that each kind of file must have, and patterns of all keys that it may have.
RESNET_KEYS = {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"}
_RESNET_KEY = re.compile(
    r"(conv1|bn1|fc|layer[1-4]\.\d+\.(conv[1-3]|bn[1-3]|downsample\.[01]))\.\w+"
)
_SWIN_KEYS = {
    "patch_embed.proj.weight",
    "layers.0.blocks.0.attn.relative_position_bias_table",
    "layers.0.downsample.reduction.weight",
}
_SWIN_KEY = re.compile(
    r"(patch_embed\.(proj|norm)|norm|head)\.\w+|layers\.\d\.downsample\..+"
    r"|layers\.\d\.blocks\.\d+\.((norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.\w+|attn_mask"
    r"|attn\.relative_position_(bias_table|index))"
)
# timm has the reduction before the blocks of a stage, its authors behind those of the stage before.
_TIMM_SWIN_KEYS = {
    "patch_embed.proj.weight",
    "layers.0.blocks.0.attn.relative_position_bias_table",
    "layers.1.downsample.reduction.weight",
}
_TIMM_SWIN_KEY = re.compile(_SWIN_KEY.pattern + r"|head\.fc\.\w+")
_EFFICIENTNET_KEYS = {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_fc.weight"}
_EFFICIENTNET_KEY = re.compile(
    r"_(conv_stem|conv_head|bn0|bn1|fc)\.\w+"
    r"|_blocks\.\d+\._((expand|depthwise|project)_conv|bn[0-2]|se_(reduce|expand))\.\w+"
)
# By timm's names. A block without expansion lacks the first pair, and timm then numbers its norms
# from 1 and calls its projection conv_pw.
_EFFICIENTNET_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_se_reduce": "se.conv_reduce",
    "_se_expand": "se.conv_expand",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_EFFICIENTNET_FIRST_BLOCK = {
    **_EFFICIENTNET_BLOCK,
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
_EFFICIENTNET_REST = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# Other common files, recognised by a key.
_OTHERS = {
    r"(^|\.)sem_seg_head\.": "a whole segmentation model, which MODEL.WEIGHTS accepts unconverted",
    r"^backbone\.": "a backbone inside another model",
    r"^features\.\d+\.\d+\.attn\.": "torchvision's Swin, which has a different layout",
    r"\.attn\.logit_scale$": "Swin V2, which is not supported",
}
# The final norm, the classifier, and masks that the backbone computes.
_SWIN_LEFT_OUT = re.compile(r"^(norm|head)\.|\.attn_mask$")


def convert_resnet(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the weights of a torchvision ResNet.

    Args:
        weights: by torchvision's names.

    Returns:
        The weights by Detectron2's names, and the names left out.
    """
    renamed, left_out = {}, []
    for name, value in weights.items():
        if name.startswith("fc."):
            left_out.append(name)
            continue
        new = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
        if new == name:
            new = f"stem.{name}"
        new = re.sub(r"\bbn(\d)", r"conv\1.norm", new)
        new = new.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[new] = value
    return renamed, left_out


def convert_swin(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Select the backbone weights of an official Swin, whose names stay the same.

    Args:
        weights: by the official names.

    Returns:
        The backbone weights, and the names left out.
    """
    left_out = [name for name in weights if _SWIN_LEFT_OUT.search(name)]
    return {k: v for k, v in weights.items() if k not in left_out}, left_out


def convert_timm_swin(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the weights of timm's Swin to the official names.

    Args:
        weights: by timm's names.

    Returns:
        The backbone weights, and the names left out.
    """

    def earlier(match: re.Match) -> str:
        return f"layers.{int(match[1]) - 1}.downsample."

    renamed = {re.sub(r"^layers\.(\d+)\.downsample\.", earlier, k): v for k, v in weights.items()}
    return convert_swin(renamed)


def convert_efficientnet(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the weights of an EfficientNet to those of timm's `tf_efficientnet_*`.

    There blocks are numbered throughout, in timm within their stage. Each stage has other output
    channels than the one before.

    Args:
        weights: by the names of efficientnet-pytorch.

    Returns:
        All weights by timm's names, and nothing left out.
    """
    places: dict[str, tuple[int, int]] = {}
    stage, block, channels = -1, 0, None
    while f"_blocks.{len(places)}._project_conv.weight" in weights:
        number = str(len(places))
        out_channels = len(weights[f"_blocks.{number}._project_conv.weight"])
        stage, block = (stage + 1, 0) if out_channels != channels else (stage, block + 1)
        places[number], channels = (stage, block), out_channels
    renamed = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] != "_blocks":
            renamed[f"{_EFFICIENTNET_REST[parts[0]]}.{parts[1]}"] = value
            continue
        if parts[1] not in places:
            raise ValueError(f"block {parts[1]} has no projection, or one before it is missing.")
        has_expansion = f"_blocks.{parts[1]}._expand_conv.weight" in weights
        table = _EFFICIENTNET_BLOCK if has_expansion else _EFFICIENTNET_FIRST_BLOCK
        stage, block = places[parts[1]]
        renamed[f"blocks.{stage}.{block}.{table[parts[2]]}.{parts[3]}"] = value
    return renamed, []


_KINDS = {
    "torchvision": (RESNET_KEYS, _RESNET_KEY),
    "swin": (_SWIN_KEYS, _SWIN_KEY),
    "timm_swin": (_TIMM_SWIN_KEYS, _TIMM_SWIN_KEY),
    "efficientnet": (_EFFICIENTNET_KEYS, _EFFICIENTNET_KEY),
}


def kind_of(names: Collection[str]) -> tuple[str | None, list[str]]:
    """The kind whose keys a state dict has, and its names that this kind does not know.

    Returns:
        A key of `NAMES`, or None.
    """
    for kind, (required, allowed) in _KINDS.items():
        if required <= set(names):
            return kind, [name for name in names if not allowed.fullmatch(name)]
    return None, []


def identify(data: Any, path: str) -> tuple[str, Mapping[str, Tensor]]:
    """Identify the content of a file.

    Args:
        data: the loaded content.
        path: the file, for error messages.

    Returns:
        A key of `NAMES`, and the weights.

    Raises:
        ValueError: the file is none of them.
    """
    weights = data.get("model", data) if isinstance(data, dict) else data
    is_state_dict = isinstance(weights, dict) and weights
    if not is_state_dict or not all(isinstance(value, Tensor) for value in weights.values()):
        content = (
            sorted(map(str, weights))[:5] if isinstance(weights, dict) else type(data).__name__
        )
        raise ValueError(f"{path} does not hold a state dict, but {content}.")
    kind, unknown = kind_of(weights)
    if unknown:
        raise ValueError(
            f"{path} looks like {NAMES[kind]}, but has {len(unknown)} unknown keys: "
            f"{', '.join(unknown[:5])}."
        )
    if kind is not None:
        return kind, weights
    for pattern, what in _OTHERS.items():
        for name in weights:
            if re.search(pattern, name):
                raise ValueError(f"{path} holds {what} (it has {name}); it cannot be converted.")
    raise ValueError(
        f"{path} is neither {' nor '.join(NAMES.values())}: its first keys are "
        f"{', '.join(list(weights)[:5])}."
    )


CONVERTERS = {
    "torchvision": convert_resnet,
    "swin": convert_swin,
    "timm_swin": convert_timm_swin,
    "efficientnet": convert_efficientnet,
}
