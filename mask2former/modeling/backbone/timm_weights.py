"""Weights of timm for its backbones: found by name or in a folder, renamed, checked for coverage.

    timm://NAME, a folder of Hugging Face, a file → state dict of timm's model → of the backbone

The state dict is that of the whole classification model. What the backbone does not have, the
classifier first of all, is left out.
"""

import json
import logging
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint_weights import fit_channels
from ...weights.folders import CONFIG, weights_file
from .timm_models import TimmParts, check_name, import_timm, on_meta

_logger = logging.getLogger(__name__)

PREFIX = "timm://"
_FILE = "model.safetensors"
# Detectron2's layout: not a state dict of timm.
_DETECTRON = ("backbone.", "sem_seg_head.", "criterion.")
_WRAPPERS = ("module", "model")
# In the names of transformers' vision models.
_TRANSFORMERS = "attention.attention.query"
_UNSAVED = "num_batches_tracked"
# What the functions raise that read weights of other programs, for weights that are not theirs.
_FILTER_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def local_file(path: str) -> str:
    """The file that a path stands for.

    Args:
        path: `timm://NAME`, which is downloaded to timm's cache once; a folder with `config.json`
            and weights, as timm and transformers save for Hugging Face, of which it may be the
            index of the shards; anything else stays as it is.

    Raises:
        ValueError: timm has no weights of the name, they cannot be downloaded, or the folder has
            none.
    """
    if path.startswith(PREFIX):
        return _download(path.removeprefix(PREFIX))
    folder = Path(path)
    if not folder.is_dir() or not (folder / CONFIG).is_file():
        return path
    return weights_file(path)


def _download(name: str) -> str:
    """The cached file of pretrained weights.

    Raises:
        ValueError: timm has no such weights, or there is no network.
    """
    check_name(name, "MODEL.WEIGHTS")
    timm = import_timm()
    source = timm.get_pretrained_cfg(name)
    if source is None or not (source.hf_hub_id or source.url):
        raise ValueError(f"MODEL.WEIGHTS is {PREFIX}{name}, of which timm has no weights.")
    if not source.hf_hub_id:
        return source.url  # which Detectron2 downloads
    from huggingface_hub import hf_hub_download

    repository, _, revision = source.hf_hub_id.partition("@")
    file = source.hf_hub_filename or _FILE
    try:
        return hf_hub_download(repository, file, revision=revision or None)
    # Errors of the hub and of the network are OSErrors; httpx's are not.
    except (OSError, ValueError, RuntimeError) as error:
        summary = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"MODEL.WEIGHTS is {PREFIX}{name}, which cannot be downloaded: {summary}. Without "
            f"network, fetch {file} from huggingface.co/{repository} on another machine and set "
            "MODEL.WEIGHTS to it."
        ) from error


def fit_weights(model: nn.Module, weights: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The weights with which a training starts, by the model's names.

    Args:
        model: the whole model.
        weights: state dict of a timm model; others stay as they are, and so do all if the model's
            backbone is not of timm.
        path: the file, for messages.

    Raises:
        ValueError: see `backbone_weights`.
    """
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, TimmParts) or any(name.startswith(_DETECTRON) for name in weights):
        return weights
    weights = backbone_weights(backbone, weights, path)
    mean, std = (getattr(model, name, None) for name in ("pixel_mean", "pixel_std"))
    if isinstance(mean, Tensor) and isinstance(std, Tensor):
        check_pixels(backbone, mean, std)
    return {f"backbone.{name}": value for name, value in weights.items()}


def warn_without_weights(model: nn.Module) -> None:
    """Warn if training starts from random weights with batch norms that do not normalise."""
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, TimmParts) and backbone.has_frozen_norms:
        _logger.warning(
            f"The batch norms of {backbone.timm_name!r} are frozen (MODEL.TIMM.NORM FrozenBN), and "
            "without MODEL.WEIGHTS they do not normalise: name weights, such as "
            f"{PREFIX}{backbone.timm_name}, or set MODEL.TIMM.NORM to BN."
        )


def backbone_weights(
    backbone: TimmParts, weights: dict[str, Tensor], path: str
) -> dict[str, Tensor]:
    """Rename and fit the weights of a timm model to a backbone made of it.

    Stems of another number of channels are adapted, see `fit_channels`. Position embeddings are
    interpolated if the model does so.

    Args:
        backbone: the backbone.
        weights: state dict of the classification model, in timm's names or others that timm reads.
        path: the file, for messages.

    Returns:
        The backbone's state dict, complete but for the modules added to the timm model.

    Raises:
        ValueError: the weights are of another model, or do not fill the backbone.
    """
    name, model = backbone.timm_name, backbone.timm_model
    _check_architecture(path, name)
    whole = on_meta(name)
    weights = _filtered(_unwrapped(weights, whole), whole, name, path)
    target = {k: v for k, v in model.state_dict().items() if not k.endswith(_UNSAVED)}
    _adapt_stem(weights, target, whole)
    missing = target.keys() - weights.keys()
    misshapen = {
        f"{k} {tuple(weights[k].shape)} instead of {tuple(v.shape)}"
        for k, v in target.items()
        if k in weights and weights[k].shape != v.shape
    }
    left_out = {k for k in weights.keys() - target.keys() if not k.endswith(_UNSAVED)}
    trunks = {k.partition(".")[0] for k, _ in model.named_parameters()}
    other = {
        k
        for k in left_out - whole.state_dict().keys()
        if k.partition(".")[0] in trunks and weights[k].is_floating_point()
    }
    problems = [
        f"{len(names)} tensors {what} ({_first(names)})"
        for what, names in (
            ("are missing", missing),
            ("have another shape", misshapen),
            ("are of layers that the model lacks", other),
        )
        if names
    ]
    if problems and any(_TRANSFORMERS in k for k in weights):
        raise ValueError(
            f"Checkpoint {path} has the names of the transformers package. Name timm's file of "
            f"{name!r} instead, or {PREFIX}{name}."
        )
    if problems:
        raise ValueError(
            f"Checkpoint {path} does not fit timm's {name!r}: {'; '.join(problems)}. Set "
            f"{_key(backbone)} to the model of the file, or name another file."
        )
    _logger.info(
        f"{path} fills all {len(target)} parameters and statistics of {name!r}; left out: "
        f"{_first(left_out, 20) if left_out else 'nothing'}."
    )
    return {f"{backbone.timm_prefix}{k}": weights[k] for k in target}


def _unwrapped(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Without the names of wrappers (DataParallel, Lightning) before those of a model."""
    names = {name for name, _ in model.named_children()}
    while True:
        (first, *others) = {key.partition(".")[0] for key in weights} or {""}
        if others or first not in _WRAPPERS or first in names:
            return weights
        weights = {key.partition(".")[2]: value for key, value in weights.items()}


def check_pixels(backbone: TimmParts, mean: Tensor, std: Tensor) -> None:
    """Warn if images are normalised otherwise than in the training of the model's weights.

    Args:
        backbone: the backbone.
        mean: of each channel, 0 to 255.
        std: of each channel.
    """
    source = import_timm().get_pretrained_cfg(backbone.timm_name)
    if source is None or not len(source.mean) == len(source.std) == mean.numel():
        return
    expected = torch.tensor([source.mean, source.std], dtype=torch.float64) * 255
    given = torch.stack([mean.flatten(), std.flatten()]).double().cpu()
    if not torch.allclose(given, expected, atol=1.0):
        right, ours = (
            [[round(x, 3) for x in row] for row in values.tolist()] for values in (expected, given)
        )
        _logger.warning(
            f"The weights of timm's {backbone.timm_name!r} were trained with MODEL.PIXEL_MEAN "
            f"{right[0]} and MODEL.PIXEL_STD {right[1]} (RGB), but the config has {ours[0]} and "
            f"{ours[1]}."
        )


def _filtered(
    weights: dict[str, Tensor], model: nn.Module, name: str, path: str
) -> dict[str, Tensor]:
    """The weights by timm's names, as timm reads files of the models' authors.

    Args:
        model: the classification model.
    """
    module: Any = sys.modules[type(model).__module__]
    convert = next(
        (
            getattr(module, function)
            for function in ("checkpoint_filter_fn", "_filter_fn")
            if hasattr(module, function)
        ),
        None,
    )
    shapes = {k: v.shape for k, v in weights.items()}
    fits = all(shapes.get(k) == v.shape for k, v in model.state_dict().items())
    if convert is None or fits:
        return dict(weights)
    try:
        return dict(convert(dict(weights), model))
    except _FILTER_ERRORS as error:
        raise ValueError(
            f"Checkpoint {path} cannot be read as weights of timm's {name!r} "
            f"({type(error).__name__}: {error}): it is of another model."
        ) from error


def _adapt_stem(weights: dict[str, Tensor], target: dict[str, Tensor], model: Any) -> None:
    """Fit the first convolutions, of which a model may have several, to the channels, in place."""
    stems = model.pretrained_cfg.get("first_conv") or ()
    for stem in (stems,) if isinstance(stems, str) else stems:
        name = f"{stem}.weight"
        if name not in weights or name not in target:
            continue
        in_file, in_model = weights[name].shape, target[name].shape
        is_conv = len(in_file) == len(in_model) == 4
        if is_conv and in_file != in_model and in_file[1] == 3:
            weights[name], how = fit_channels(weights[name], in_model[1])
            _logger.warning(f"{name} has 3 input channels, in the model (MODEL.PIXEL_MEAN) {how}.")


def _check_architecture(path: str, name: str) -> None:
    """Compare the architecture that a folder of Hugging Face names."""
    description = Path(path).parent / CONFIG
    if not description.is_file():
        return
    try:
        content = json.loads(description.read_text())
    except (OSError, ValueError):
        return  # the file of another program; shapes are compared anyway
    architecture = content.get("architecture") if isinstance(content, dict) else None
    if isinstance(architecture, str) and architecture != name.partition(".")[0]:
        raise ValueError(
            f"{description} says that the weights are of {architecture!r}, but the config names "
            f"{name!r}: set the config's NAME to {architecture!r}, or name another folder."
        )


def _key(backbone: TimmParts) -> str:
    return "MODEL.TIMM.NAME" if backbone.timm_prefix == "body." else "MODEL.VIT.NAME"


def _first(names: Collection[str], limit: int = 5) -> str:
    return ", ".join(sorted(names)[:limit]) + (", ..." if len(names) > limit else "")
