"""Names and conventions of other libraries, recognised in a checkpoint and converted for a model.

Whole models of the `transformers` package; ImageNet backbones of torchvision, timm, `transformers`
and Swin's authors for our ResNet and Swin. Backbones of timm in our `TimmBackbone` keep timm's
names (`modeling/backbone/timm_weights.py`).
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .backbones import CONVERTERS, NAMES, kind_of
from .folders import CONFIG, PROCESSOR, read_json
from .names import backbone_kind, from_transformers, is_transformers
from .transformers_config import input_values

_logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]

# A tensor that only these backbones of ours have → the kinds of weights that fit them.
_BACKBONES = {
    "backbone.stem.conv1.weight": {"torchvision"},
    "backbone.patch_embed.proj.weight": {"swin", "timm_swin"},
}


def convert_names(model: nn.Module, weights: Weights, path: str) -> Weights:
    """The weights by our names, if they have those of another library.

    Args:
        model: to load them into.
        weights: of a file.
        path: the file, for messages.

    Raises:
        ValueError: they are of a model whose options differ from those of ours.
    """
    in_model = model.state_dict()
    if is_transformers(weights):
        try:
            converted = from_transformers(weights, list(in_model))
        except ValueError as error:
            raise ValueError(f"Checkpoint {path}: {error}") from error
        is_whole = any(name.startswith("sem_seg_head.") for name in converted)
        what = "Mask2Former" if is_whole else "backbone"
        _logger.info(
            f"{path} is a {what} of the transformers package ({backbone_kind(weights)}): its names "
            "are converted."
        )
        _check_options(model, path)
        return converted
    kind, unknown = kind_of(weights)
    fitting = [kinds for name, kinds in _BACKBONES.items() if name in in_model]
    if kind is None or unknown or not any(kind in kinds for kinds in fitting):
        return weights
    if kind == "torchvision" and _has_stride_in_1x1(model):
        _logger.warning(
            f"{path} was trained with strides in 3x3 convolutions, but the config has "
            "MODEL.RESNETS.STRIDE_IN_1X1 True: set it to False."
        )
    converted, left_out = CONVERTERS[kind](weights)
    _logger.info(
        f"{path} is {NAMES[kind]}: its names are converted; left out: "
        f"{', '.join(left_out) if left_out else 'nothing'}."
    )
    return {f"backbone.{name}": value for name, value in converted.items()}


def _check_options(model: Any, path: str) -> None:
    """Compare what no name or shape shows with the files beside the weights.

    Raises:
        ValueError: an option of the model differs, which would give other outputs.
    """
    folder = Path(path).parent
    if not (folder / CONFIG).is_file():
        return
    content = read_json(folder / CONFIG)
    if content.get("model_type") != "mask2former":
        return
    predictor = getattr(getattr(model, "sem_seg_head", None), "predictor", None)
    layers = getattr(predictor, "transformer_ffn_layers", None)
    backbone = content.get("backbone_config") or {}
    options: list[tuple[str, bool, str, bool]] = []
    if layers is not None and len(layers):
        pre_norm = bool(content.get("pre_norm", False))
        options.append(
            ("pre_norm", pre_norm, "MODEL.MASK_FORMER.PRE_NORM", layers[0].normalize_before)
        )
    if backbone.get("model_type") == "resnet" and backbone.get("layer_type") != "basic":
        in_1x1 = bool(backbone.get("downsample_in_bottleneck", False))
        options.append(
            (
                "downsample_in_bottleneck",
                in_1x1,
                "MODEL.RESNETS.STRIDE_IN_1X1",
                _has_stride_in_1x1(model),
            )
        )
    for key, theirs, our_key, ours in options:
        if theirs != ours:
            raise ValueError(
                f"Checkpoint {path} is of a model with {key} {theirs}, but the config has "
                f"{our_key} {ours}: set it to {theirs}."
            )
    if (folder / PROCESSOR).is_file():
        _compare_pixels(model, read_json(folder / PROCESSOR), path)


def _compare_pixels(model: Any, processor: dict[str, Any], path: str) -> None:
    """Warn if images are normalised otherwise than in the training of the weights."""
    mean, std = getattr(model, "pixel_mean", None), getattr(model, "pixel_std", None)
    values = input_values(processor)
    right = [values["MODEL.PIXEL_MEAN"], values["MODEL.PIXEL_STD"]]
    if not (isinstance(mean, Tensor) and isinstance(std, Tensor)) or mean.numel() != len(right[0]):
        return
    ours = torch.stack([mean.flatten(), std.flatten()]).double().cpu()
    if not torch.allclose(ours, torch.tensor(right, dtype=torch.float64), atol=1.0):
        given = [[round(x, 3) for x in row] for row in ours.tolist()]
        _logger.warning(
            f"{path} was trained with INPUT.FORMAT RGB, MODEL.PIXEL_MEAN {right[0]} and "
            f"MODEL.PIXEL_STD {right[1]}, but the config has {given[0]} and {given[1]}."
        )


def _has_stride_in_1x1(model: Any) -> bool:
    """Whether the bottlenecks of Detectron2's ResNet have their stride in the first convolution."""
    stage = getattr(getattr(model, "backbone", None), "res3", None)
    if stage is None or not hasattr(stage[0], "conv3"):
        return False
    return tuple(stage[0].conv1.stride) != (1, 1)
