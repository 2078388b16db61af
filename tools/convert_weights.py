#!/usr/bin/env python
"""Convert ImageNet weights of a backbone to Detectron2's names and format.

    python tools/convert_weights.py resnet101-63fe2227.pth R-101.pkl
    python tools/convert_weights.py swin_small_patch4_window7_224.{pth,pkl}

The input is a ResNet of torchvision or a Swin Transformer of its authors' release, told apart by
their keys. The output is the file that `MODEL.WEIGHTS` of the recipes names. Classifier weights are
left out and listed.
"""

import argparse
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mask2former.utils.files import (
    atomic_write,
    checkpoint_format,
    explained_read_errors,
    load_safetensors,
    load_torch,
)
from mask2former.utils.interrupts import run_program

_NAMES = {"torchvision": "a ResNet of torchvision", "swin": "an official Swin Transformer"}
# Keys that each kind of file must have, and patterns of all keys that it may have.
_RESNET_KEYS = {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight"}
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
# Other common files, recognised by a key.
_OTHERS = {
    r"(^|\.)sem_seg_head\.": "a whole segmentation model, which MODEL.WEIGHTS accepts unconverted",
    r"^backbone\.": "a backbone inside another model",
    r"^features\.\d+\.\d+\.attn\.": "torchvision's Swin, which has a different layout",
    r"\.attn\.logit_scale$": "Swin V2, which is not supported",
    r"^layers\.1\.downsample\.reduction\.weight$": "timm's Swin, which has a different layout",
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


def identify(data: Any, path: str) -> tuple[str, Mapping[str, Tensor]]:
    """Identify the content of a file.

    Args:
        data: the loaded content.
        path: the file, for error messages.

    Returns:
        "torchvision" or "swin", and the weights.

    Raises:
        ValueError: the file is neither.
    """
    weights = data.get("model", data) if isinstance(data, dict) else data
    is_state_dict = isinstance(weights, dict) and weights
    if not is_state_dict or not all(isinstance(value, Tensor) for value in weights.values()):
        content = (
            sorted(map(str, weights))[:5] if isinstance(weights, dict) else type(data).__name__
        )
        raise ValueError(f"{path} does not hold a state dict, but {content}.")
    kinds = (("torchvision", _RESNET_KEYS, _RESNET_KEY), ("swin", _SWIN_KEYS, _SWIN_KEY))
    for kind, required, allowed in kinds:
        if required <= weights.keys():
            unknown = [name for name in weights if not allowed.fullmatch(name)]
            if unknown:
                raise ValueError(
                    f"{path} looks like {_NAMES[kind]}, but has {len(unknown)} unknown keys: "
                    f"{', '.join(unknown[:5])}."
                )
            return kind, weights
    for pattern, what in _OTHERS.items():
        for name in weights:
            if re.search(pattern, name):
                raise ValueError(f"{path} holds {what} (it has {name}); it cannot be converted.")
    raise ValueError(
        f"{path} is neither {_NAMES['torchvision']} nor {_NAMES['swin']}: its first keys are "
        f"{', '.join(list(weights)[:5])}."
    )


def convert(source: str, target: str) -> tuple[str, int, list[str]]:
    """Convert a file, writing the output atomically.

    Args:
        source: file written by `torch.save`, or a safetensors file.
        target: the `.pkl` to write; an existing file is replaced.

    Returns:
        The kind of the source, the number of tensors written, and the names left out.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: the source is of neither kind or cannot be read, or the target is not a `.pkl`.
    """
    if Path(target).suffix != ".pkl":
        raise ValueError(
            f"{target}: the output must end in .pkl, which tells Detectron2 its format."
        )
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source} does not exist.")
    if Path(source).suffix == ".pkl":
        raise ValueError(f"{source} is a .pkl, which is already in Detectron2's format.")
    with explained_read_errors(source):
        is_safe = checkpoint_format(source) == "safetensors"
        data = load_safetensors(source) if is_safe else load_torch(source)
    kind, weights = identify(data, source)
    converted, left_out = (convert_resnet if kind == "torchvision" else convert_swin)(weights)
    bad = [name for name, value in converted.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"{source} holds NaN or infinite values, in {', '.join(bad[:5])}.")
    result = {
        "model": {name: value.detach().numpy() for name, value in converted.items()},
        "__author__": "torchvision" if kind == "torchvision" else "third_party",
        "matching_heuristics": True,
    }
    with atomic_write(target, "wb") as file:
        pickle.dump(result, file)
    return kind, len(converted), left_out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Convert ImageNet weights for Detectron2.")
    parser.add_argument(
        "source", metavar="INPUT", help="weights of torchvision's or Swin's release"
    )
    parser.add_argument("target", metavar="OUTPUT", help="the .pkl to write")
    args = parser.parse_args(argv)
    try:
        kind, number, left_out = convert(args.source, args.target)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.source} is {_NAMES[kind]}: wrote {number} tensors to {args.target}")
    if left_out:
        print(f"left out: {', '.join(left_out)}")


if __name__ == "__main__":
    run_program(main)
