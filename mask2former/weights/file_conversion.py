"""Weights from and to other libraries as files: what `tools/convert_weights.py` does.

convert             ImageNet weights of a backbone → .pkl of Detectron2, or .pth of timm
from_transformers   a model of `transformers` → .pth and .yaml
to_transformers     a trained model → a folder for `transformers`
"""

import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.modeling import build_model

from ..checkpoint import Mask2FormerCheckpointer
from ..config import load_config, without_added_defaults
from ..inference.pretrained import find_pretrained
from ..utils.files import (
    atomic_write,
    checkpoint_format,
    explained_read_errors,
    load_safetensors,
    load_torch,
)
from .backbones import CONVERTERS, NAMES, identify
from .folders import INDEX
from .metadata import known_data
from .transformers import (
    is_transformers_folder,
    load_transformers_folder,
    save_transformers_folder,
)


def convert(source: str, target: str) -> tuple[str, int, list[str]]:
    """Convert the ImageNet weights of a backbone, writing the output atomically.

    Args:
        source: file written by `torch.save`, or a safetensors file.
        target: the file to write, `.pkl`, or `.pth` for an EfficientNet; an existing one is
            replaced.

    Returns:
        The kind of the source, the number of tensors written, and the names left out.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: the source is of no such kind or cannot be read, or the target ends wrongly.
    """
    if Path(target).suffix not in (".pkl", ".pth"):
        raise ValueError(
            f"{target}: the output must end in .pkl, which tells Detectron2 its format, or in .pth "
            "for an EfficientNet or a model of transformers; for a folder of transformers add "
            "--to transformers."
        )
    if Path(source).is_dir():
        raise ValueError(
            f"{source} is a folder without config.json of transformers: MODEL.WEIGHTS and "
            "Predictor.from_pretrained read a model folder of this project as it is, and --to "
            "transformers converts it."
        )
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source} does not exist.")
    if Path(source).suffix == ".pkl":
        raise ValueError(f"{source} is a .pkl, which is already in Detectron2's format.")
    with explained_read_errors(source):
        is_safe = checkpoint_format(source) == "safetensors"
        data = load_safetensors(source) if is_safe else load_torch(source)
    kind, weights = identify(data, source)
    expected = ".pth" if kind == "efficientnet" else ".pkl"
    if Path(target).suffix != expected:
        raise ValueError(f"{target}: the output must end in {expected}, for {NAMES[kind]}.")
    try:
        converted, left_out = CONVERTERS[kind](weights)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{source} looks like {NAMES[kind]}, but: {error}") from error
    bad = [name for name, value in converted.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"{source} holds NaN or infinite values, in {', '.join(bad[:5])}.")
    if kind == "efficientnet":
        with atomic_write(target, "wb") as file:
            torch.save(converted, file)
        return kind, len(converted), left_out
    result = {
        "model": {name: value.detach().numpy() for name, value in converted.items()},
        "__author__": "torchvision" if kind == "torchvision" else "third_party",
        "matching_heuristics": True,
    }
    with atomic_write(target, "wb") as file:
        pickle.dump(result, file)
    return kind, len(converted), left_out


def from_transformers(
    source: str, target: str, overwrite: bool = False
) -> tuple[int, str, list[str]]:
    """Convert a model of `transformers` to a checkpoint and a config file beside it.

    Args:
        source: its folder, or the file of weights in it.
        target: the file to write, `.pth`.
        overwrite: replace existing files.

    Returns:
        The number of tensors, the config file, and the class names if these are not those of a
        data set that the config names.

    Raises:
        FileExistsError: an output exists.
        ValueError: the source is of another model, or the target ends wrongly.
    """
    if Path(target).suffix != ".pth":
        raise ValueError(f"{target}: the output must end in .pth, for a model of transformers.")
    config_file = str(Path(target).with_suffix(".yaml"))
    for path in (target, config_file):
        if os.path.lexists(path) and not overwrite:
            raise FileExistsError(f"{path} exists: name another, or set --overwrite.")
    cfg, weights, metadata = load_transformers_folder(source)
    names = metadata.get("stuff_classes") or metadata["thing_classes"]
    known = known_data(names)
    # Names of its own exist in this process only.
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (known.name,) if known else ()
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = os.path.abspath(target), "cuda"
    with atomic_write(target, "wb") as file:
        torch.save({"model": weights}, file)
    with atomic_write(config_file) as file:
        file.write(without_added_defaults(cfg).dump())
    return len(weights), config_file, [] if known else names


def to_transformers(
    source: str,
    target: str,
    config_file: str | None,
    opts: Sequence[str] = (),
    overwrite: bool = False,
) -> int:
    """Convert a checkpoint to a folder of `transformers`.

    Args:
        source: what `Predictor.from_pretrained` accepts; with a config file any file or folder that
            MODEL.WEIGHTS accepts.
        target: the folder to write.
        config_file: of the model; None: the source has it.
        opts: config overrides.
        overwrite: replace an existing folder of a model of `transformers`.

    Returns:
        The number of tensors.

    Raises:
        FileNotFoundError: a file does not exist.
        FileExistsError: the folder exists.
        ValueError: the checkpoint does not fit the config, or `transformers` has no such model.
    """
    if config_file is not None:
        cfg = load_config(config_file, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", source, *opts])
        model = build_model(cfg)
        Mask2FormerCheckpointer(model).load(source)
        return save_transformers_folder(model.state_dict(), cfg, target, overwrite=overwrite)
    try:
        saved = find_pretrained(source, opts)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Here --config-file names the config.") from error
    weights = saved.weights
    if weights is None:
        saved.cfg.MODEL.DEVICE = "cpu"
        model = build_model(saved.cfg)
        Mask2FormerCheckpointer(model).load(saved.path)
        weights = model.state_dict()
    return save_transformers_folder(weights, saved.cfg, target, saved.metadata, overwrite=overwrite)


def is_transformers_source(source: str) -> bool:
    """Whether the source is a folder of `transformers`, or a file in one."""
    if os.path.isfile(source) and (INDEX in source or not source.endswith((".pkl", ".pth"))):
        return is_transformers_folder(os.path.dirname(os.path.abspath(source)))
    return is_transformers_folder(source)
