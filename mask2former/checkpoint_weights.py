"""The weights of a checkpoint: found in files of several kinds, renamed and fitted to a model."""

import logging
import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from fvcore.common.checkpoint import _strip_prefix_if_present

from .architecture import QUERIES, has_class_layer

_logger = logging.getLogger(__name__)

Weights = dict[str, torch.Tensor]

# The losses' class weights, which the config determines.
CLASS_WEIGHTS = "criterion.empty_weight"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Where training programs put a state dict, in order of preference; the last are averages.
_WEIGHTS_KEYS = (
    *("model", "state_dict", "model_state_dict", "module"),
    *("ema_state", "model_ema", "state_dict_ema", "ema"),
)
# What wrappers of a model put before all names.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# Older names of parameters, in early checkpoints of Mask2Former and MaskFormer.
_OLD_NAMES = (
    (".static_query.", ".query_feat."),
    ("sem_seg_head.", "sem_seg_head.pixel_decoder."),
)


def find_weights(data: dict[str, Any], path: str, others: Collection[str] = ()) -> dict[str, Any]:
    """Put the state dict of a file under the key "model".

    Args:
        data: a state dict, or a dict that holds one.
        path: the file's name, for messages.
        others: keys of other objects that the run restores.
    """
    found = [key for key in _WEIGHTS_KEYS if _is_dict(data, key) and key not in others]
    if "model" in data:
        found = ["model", *(key for key in found if key != "model")]
    if not found:
        return {"model": data}
    if len(found) > 1:
        _logger.warning(
            f"{path} holds several sets of weights: those under {found[0]!r} are used, not those "
            f"under {', '.join(map(repr, found[1:]))}."
        )
    elif found[0] != "model":
        _logger.info(f"{path} holds its weights under {found[0]!r}.")
    rest = {key: value for key, value in data.items() if key != found[0]}
    return {**rest, "model": data[found[0]]}


def _is_dict(data: dict[str, Any], key: str) -> bool:
    return isinstance(data.get(key), dict)


def from_pickle(data: Any, path: str, others: Collection[str] = ()) -> dict[str, Any]:
    """Distinguish Detectron2's and Caffe2's model zoo formats, as Detectron2 does.

    Args: as of `find_weights`.
    """
    if not isinstance(data, dict):
        raise ValueError(f"Checkpoint {path} holds {type(data).__name__}, not a dict.")
    if "model" in data and "__author__" in data:
        return data
    if any(_is_dict(data, key) for key in _WEIGHTS_KEYS):
        return find_weights(data, path, others)
    data = data.get("blobs", data)
    if not isinstance(data, dict):
        raise ValueError(f"Checkpoint {path}: its 'blobs' are no dict.")
    weights = {k: v for k, v in data.items() if not str(k).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def from_pycls(data: dict, path: str) -> dict[str, Any]:
    weights = data.get("model_state")
    if not isinstance(weights, dict):
        raise ValueError(f"Checkpoint {path} is no pycls file: it has no 'model_state'.")
    weights = {k: v for k, v in weights.items() if not str(k).endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def as_tensors(weights: Any, path: str) -> Weights:
    """Arrays become tensors, in place."""
    if not isinstance(weights, dict):
        raise ValueError(
            f"Checkpoint {path}: its 'model' is a {type(weights).__name__}, not a dict."
        )
    for name, value in weights.items():
        kind = f"of type {type(value).__name__}"
        if isinstance(value, np.ndarray):
            if value.dtype.kind in "biufc" and value.dtype.itemsize <= 16:
                native = value.astype(value.dtype.newbyteorder("="), copy=False)
                value = torch.from_numpy(np.require(native, requirements="W"))
            else:
                kind = f"an array of {value.dtype}"
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"Checkpoint {path} is not a state dict: its entry {name!r} is {kind}. "
                "Weights belong under the key 'model'."
            )
        weights[name] = value
    return weights


def non_finite(tensors: Weights) -> set[str]:
    """Names of the tensors with NaN or infinite values. One device sync."""
    checked = {
        name: value.detach()
        for name, value in tensors.items()
        if value.dtype in _FLOATS and value.numel() and not value.is_meta
    }
    if not checked:
        return set()
    # Extremes are much faster than `isfinite` of all elements; NaN is both.
    finite = [torch.stack(value.aminmax()).isfinite().all() for value in checked.values()]
    flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()
    return {name for name, is_finite in zip(checked, flags, strict=True) if not is_finite}


def update_names(weights: Weights, in_model: Weights) -> None:
    """Undo wrappers and replace older names, in place.

    The modules of the model also replace older names, but only while they load, which is after
    shapes are compared.
    """
    of_average = all(name == "n_averaged" or name.startswith("module.") for name in weights)
    if of_average and "n_averaged" not in in_model:
        weights.pop("n_averaged", None)  # of torch's AveragedModel
    while prefix := _wrapper(weights, in_model):
        _strip_prefix_if_present(weights, prefix)
    for name in list(weights):
        for old, new in _OLD_NAMES:
            renamed = name.replace(old, new, 1)
            if name not in in_model and renamed in in_model and renamed not in weights:
                weights[renamed] = weights.pop(name)
                break


def _wrapper(weights: Weights, in_model: Weights) -> str | None:
    """The prefix that all names have and none of the model's."""
    for prefix in _WRAPPERS:
        in_all = bool(weights) and all(name.startswith(prefix) for name in weights)
        if in_all and not any(name.startswith(prefix) for name in in_model):
            return prefix
    return None


def drop_class_weights(weights: Weights, in_model: Weights) -> tuple[float, float] | None:
    """Leave out, in place, the class weights of the losses, because the config determines them.

    They stay if the criterion has other class weights than a single one for "no object".

    Returns:
        The weight of "no object" in the file and in the model, if they differ.
    """
    different = None
    for name in [name for name in weights if name.endswith(CLASS_WEIGHTS)]:
        if name not in in_model or weights[name].shape != in_model[name].shape:
            del weights[name]
            continue
        in_file, of_model = (_no_object_weight(w[name]) for w in (weights, in_model))
        if in_file is None or of_model is None:
            continue
        del weights[name]
        # Half precision keeps three digits.
        if not math.isclose(in_file, of_model, rel_tol=1e-2):
            different = in_file, of_model
    return different


def adapt_stem(weights: Weights, in_model: Weights, by_suffix: bool) -> str | None:
    """Fit the stem of a backbone for colour images, in place, to another number of channels.

    Args:
        weights: of a file.
        in_model: of the model. Its stem is the convolution of the backbone that has the channels of
            the images, where the file has 3, and else the same shape.
        by_suffix: names in the file are the ends of the model's.

    Returns:
        What was done, if the stem was fitted.
    """
    for name, target in in_model.items():
        if not name.startswith("backbone.") or target.dim() != 4 or target.shape[1] == 3:
            continue
        parts = name.split(".")
        names = [".".join(parts[i:]) for i in range(len(parts) - 1 if by_suffix else 1)]
        for key in (key for key in names if key in weights):
            value, channels = weights[key], target.shape[1]
            is_stem = value.shape == (target.shape[0], 3, *target.shape[2:])
            if not (is_stem and value.is_floating_point()):
                continue
            weights[key], how = fit_channels(value, channels)
            return f"{name} has 3 input channels, in the model (MODEL.PIXEL_MEAN) {how}"
    return None


def fit_channels(stem: torch.Tensor, channels: int) -> tuple[torch.Tensor, str]:
    """Fit the convolution of a stem for colours to another number of channels.

    Args:
        stem: (C, 3, h, w).
        channels: of the images.

    Returns:
        (C, channels, h, w), and in words what was done. One channel: the sum over the three, so
        that a grey image gives what it gives as colours. Other numbers: the three are repeated, and
        scaled so that the sum stays.
    """
    if channels == 1:
        return stem.sum(dim=1, keepdim=True), "one with the sum of these"
    repeated = stem.repeat(1, -(-channels // 3), 1, 1)[:, :channels]
    how = f"{channels}, which are these repeated and scaled by 3/{channels}"
    return repeated * (3 / channels), how


def _no_object_weight(class_weights: torch.Tensor) -> float | None:
    """The last of (K+1,) weights if it is finite and all others are 1."""
    if class_weights.dim() != 1 or not len(class_weights):
        return None
    *others, last = class_weights.tolist()
    return last if math.isfinite(last) and all(weight == 1 for weight in others) else None


def keep_queries(weights: Weights, in_model: Weights) -> dict[str, tuple[int, int]]:
    """Fit query embeddings, in place, to a model with another number of queries.

    The first queries are those of the file; if the model has more, the others keep its own values.
    Not where each query stands for a class.

    Returns:
        The names of the embeddings and the number of queries in the file and in the model.
    """
    changed: dict[str, tuple[int, int]] = {}
    if not has_class_layer(in_model):
        return changed
    for name in [name for name in weights if QUERIES.decides.fullmatch(name)]:
        value, target = weights[name], in_model.get(name)
        if target is None or value.dim() != 2 or value.shape[1:] != target.shape[1:]:
            continue
        if len(value) != len(target):
            fitted = target.detach().to("cpu", copy=True)
            num_kept = min(len(value), len(target))
            fitted[:num_kept] = value[:num_kept]
            weights[name] = fitted
            changed[name] = len(value), len(target)
    return changed
