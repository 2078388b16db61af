"""Folders of the `transformers` package's Mask2Former: read and written without the package.

model.safetensors          weights, see names.py
config.json                architecture, losses, class names
preprocessor_config.json   image size and normalisation
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from torch import Tensor

from ..modeling.backbone.timm_models import on_meta
from ..utils.files import atomic_write, explained_write_errors, make_folder
from .folders import CONFIG, PROCESSOR, load_file, read_json, weights_file
from .metadata import (
    known_data,
    make_metadata,
    read_class_names,
    register,
    require_class_names,
    tasks_of,
    thing_ids_of,
)
from .names import ENCODER, OUR_TIMM, backbone_kind, from_transformers, to_transformers
from .timm_features import feature_names
from .transformers_config import OURS, image_processor, model_config, our_config

_logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
_MODEL_TYPE = "mask2former"
_CLASS_LAYER = "class_predictor.weight"
# Convolutions that see the images.
_STEMS = ("backbone.stem.conv1.weight", "backbone.patch_embed.proj.weight")
# A norm of its Swin behind the last stage, which nothing reads.
_UNUSED_NORM = f"{ENCODER}swin.layernorm"


def is_transformers_folder(path: str) -> bool:
    """Whether a path is a folder with the config.json of a Mask2Former of `transformers`."""
    if not (Path(path) / CONFIG).is_file():
        return False
    try:
        return read_json(Path(path) / CONFIG).get("model_type") == _MODEL_TYPE
    except ValueError:
        return False


def load_transformers_folder(path: str) -> tuple[CfgNode, dict[str, Tensor], dict[str, Any]]:
    """Read a model of `transformers`.

    Args:
        path: the folder, or the file of weights with config.json beside it.

    Returns:
        Our config for the GPU if there is one, of which DATASETS.TRAIN and TEST name metadata
        registered here; the weights by our names; and that metadata, with class names, things and
        stuff.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is of another model, or of one that ours cannot be.
    """
    is_file = os.path.isfile(path)
    folder = os.path.dirname(os.path.abspath(path)) if is_file else os.path.abspath(path)
    file = path if is_file else weights_file(path)
    config_path = os.path.join(folder, CONFIG)
    content = read_json(config_path)
    if content.get("model_type") != _MODEL_TYPE:
        raise ValueError(
            f"{config_path} is of a model of the type {content.get('model_type')!r}, not "
            f"{_MODEL_TYPE!r}."
        )
    processor_path = os.path.join(folder, PROCESSOR)
    processor = read_json(processor_path) if os.path.isfile(processor_path) else {}
    tensors = load_file(file)
    if not isinstance(tensors, dict) or _CLASS_LAYER not in tensors:
        raise ValueError(
            f"{file} has no {_CLASS_LAYER}: it is not of Mask2FormerForUniversalSegmentation."
        )
    num_classes = len(tensors[_CLASS_LAYER]) - 1
    names = read_class_names(content, num_classes, config_path)
    ours = content.get(OURS)
    things = ours.get("thing_ids") if isinstance(ours, Mapping) else None
    known = known_data(names) if things is None else None
    if known is not None:
        things = thing_ids_of(known, num_classes)
    tasks = tasks_of(content, things, folder)
    cfg = our_config(content, processor, num_classes, tasks, config_path)
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    metadata = make_metadata(names, things, tasks)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (register(metadata),)
    our_names: list[str] = []
    if cfg.MODEL.BACKBONE.NAME == "TimmBackbone":
        our_names = [OUR_TIMM + name for name in on_meta(cfg.MODEL.TIMM.NAME).state_dict()]
    try:
        weights = from_transformers(tensors, our_names)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    _logger.info(
        f"{file} is a Mask2Former of the transformers package ({backbone_kind(tensors)}, "
        f"{num_classes} classes, {', '.join(tasks)}): its names are converted."
    )
    return cfg, weights, metadata


def to_transformers_weights(cfg: CfgNode, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model as `transformers` has them: names, channel order, unused tensors.

    Args:
        cfg: of the model.
        weights: its whole state dict.

    Raises:
        ValueError: a tensor has no counterpart.
    """
    tensors = dict(weights)
    is_timm = any(name.startswith(OUR_TIMM) for name in tensors)
    features: tuple[str, ...] = ()
    if is_timm:
        features = feature_names(cfg.MODEL.TIMM.NAME, len(cfg.MODEL.PIXEL_MEAN))
    if cfg.INPUT.FORMAT == "BGR":
        stems = [name for name in _stems(cfg) if name in tensors]
        if not stems:
            raise ValueError(
                "INPUT.FORMAT is BGR, but the first convolution, whose channels must be swapped "
                "for RGB images, is unknown in this backbone."
            )
        for name in stems:
            tensors[name] = tensors[name].flip(1)
    renamed, unknown = to_transformers(tensors, features)
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors have no counterpart in transformers' Mask2Former: "
            f"{', '.join(unknown[:5])}."
        )
    for name in [name for name in renamed if name.endswith(".running_mean")]:
        counter = name.replace("running_mean", "num_batches_tracked")
        if not is_timm or counter.removeprefix(f"{ENCODER}_backbone.") in features:
            renamed.setdefault(counter, torch.zeros((), dtype=torch.int64))
    if cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer":
        width = cfg.MODEL.SWIN.EMBED_DIM * 2 ** (len(cfg.MODEL.SWIN.DEPTHS) - 1)
        renamed[f"{_UNUSED_NORM}.weight"] = torch.ones(width)
        renamed[f"{_UNUSED_NORM}.bias"] = torch.zeros(width)
    # Files of safetensors hold whole tensors, which share no memory.
    return {name: value.detach().cpu().contiguous().clone() for name, value in renamed.items()}


def _stems(cfg: CfgNode) -> list[str]:
    if cfg.MODEL.BACKBONE.NAME not in ("TimmBackbone", "build_timm_backbone"):
        return list(_STEMS)
    first = on_meta(cfg.MODEL.TIMM.NAME).pretrained_cfg.get("first_conv") or ()
    return [f"{OUR_TIMM}{name}.weight" for name in ((first,) if isinstance(first, str) else first)]


def save_transformers_folder(
    weights: Mapping[str, Tensor],
    cfg: CfgNode,
    folder: str,
    metadata: Metadata | None = None,
    *,
    overwrite: bool = False,
) -> int:
    """Write a model for `Mask2FormerForUniversalSegmentation.from_pretrained`.

    The folder appears under its name only when it is complete.

    Args:
        weights: state dict of our model.
        cfg: its config.
        folder: to write.
        metadata: with class names, things and stuff; default: of DATASETS.TEST or TRAIN.
        overwrite: replace an existing folder of such a model.

    Returns:
        The number of tensors.

    Raises:
        FileExistsError: the folder exists.
        ValueError: `transformers` has no such model; nothing is written.
        WriteError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder = os.path.abspath(folder)
    if os.path.lexists(folder):
        if not overwrite:
            raise FileExistsError(f"{folder} exists: name another, or set --overwrite.")
        if not is_transformers_folder(folder):
            raise FileExistsError(
                f"{folder} exists and is not a model of transformers: it is not replaced."
            )
    if metadata is None:
        data_sets = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
        if not data_sets:
            raise ValueError("DATASETS.TEST is empty: name the data set with the class names.")
        metadata = MetadataCatalog.get(data_sets[0])
    num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    names = require_class_names(metadata, num_classes)
    config = model_config(cfg, names, thing_ids_of(metadata, num_classes))
    processor = image_processor(cfg)
    tensors = to_transformers_weights(cfg, weights)
    parent = os.path.dirname(folder)
    make_folder(parent)
    with explained_write_errors(folder):
        temporary = tempfile.mkdtemp(prefix=f".{os.path.basename(folder)}.", dir=parent)
        try:
            # The permissions of a new folder, which mkdtemp withholds.
            os.chmod(temporary, 0o777 & ~_umask())
            save_file(tensors, os.path.join(temporary, WEIGHTS), {"format": "pt"})
            for name, content in ((CONFIG, config), (PROCESSOR, processor)):
                with atomic_write(os.path.join(temporary, name)) as file:
                    file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            _rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return len(tensors)


def _rename(source: str, target: str) -> None:
    """Rename a folder; an existing target is moved aside, then deleted."""
    if not os.path.lexists(target):
        os.rename(source, target)
        return
    old = f"{source}.old"
    os.rename(target, old)
    try:
        os.rename(source, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
