"""A trained model as a folder that needs nothing else: weights, config, class names, colours.

    folder/
      model.safetensors   the weights; its header also holds what model.json says
      model.json          config, classes, tasks, sizes, thresholds, versions, for people to read

The weights file alone is complete, and it replaces an older one in one step. However a program that
writes a folder is ended, the folder therefore holds one model and never parts of two. What is
loaded is the header; `model.json` is a copy of it.

Paths of the machine that wrote the model are left out: the data sets' folders, MODEL.WEIGHTS and
OUTPUT_DIR.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import Metadata
from detectron2.projects.deeplab import add_deeplab_config
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint_weights import CLASS_WEIGHTS
from ..config import ExtendConfig, add_maskformer2_config
from ..data.class_labels import class_names_of
from ..utils.files import atomic_write, make_folder
from ..utils.visualization import enabled_tasks

WEIGHTS_FILE, JSON_FILE = "model.safetensors", "model.json"
# The entry of the header of a safetensors file.
_HEADER_KEY = "mask2former"
# Raised when older versions of this project cannot read what is written.
_FORMAT = 1
_METADATA = (
    "thing_classes",
    "stuff_classes",
    "thing_colors",
    "stuff_colors",
    "thing_dataset_id_to_contiguous_id",
    "stuff_dataset_id_to_contiguous_id",
    "ignore_label",
    "evaluator_type",
    "label_divisor",
)
_MAPPINGS = ("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id")


@dataclass
class ModelFile:
    """A model as it was saved.

    Attributes:
        path: of the weights.
        cfg: the config it was trained with, not frozen.
        class_names: K names, by label.
        metadata: of the data set it was trained on: classes, colours and ids.
    """

    path: str
    cfg: CfgNode
    class_names: tuple[str, ...]
    metadata: Metadata


def save_model_folder(model: nn.Module, cfg: CfgNode, metadata: Metadata, folder: str) -> None:
    """Write a model, with all that inference needs, into a folder.

    Args:
        model: its weights are written.
        cfg: the config that builds it.
        metadata: of its data set.
        folder: made if missing. A model in it is replaced.

    Raises:
        WriteError: the folder cannot be written. A model in it is as it was.
    """
    tensors = _portable_weights(model)
    text = json.dumps(_description(cfg, metadata, tensors), indent=1, default=_plain)
    make_folder(folder)
    with atomic_write(os.path.join(folder, WEIGHTS_FILE), "wb") as file:
        # Into the open file, which is then complete on disk before it is renamed.
        save_file(tensors, file.name, {_HEADER_KEY: text, "format": "pt"})
    with atomic_write(os.path.join(folder, JSON_FILE)) as file:
        file.write(f"{text}\n")


def _portable_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, without the class weights of the losses."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in model.state_dict().items():
        if name.endswith(CLASS_WEIGHTS):
            continue
        value = value.detach().cpu().contiguous()
        # The format does not store a tensor under two names.
        address = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if address in storages else value
        storages.add(address)
    return tensors


def _description(cfg: CfgNode, metadata: Metadata, tensors: dict[str, Tensor]) -> dict[str, Any]:
    from .. import __version__

    test = cfg.MODEL.MASK_FORMER.TEST
    return {
        "format": _FORMAT,
        "mask2former": __version__,
        "tasks": enabled_tasks(cfg),
        "class_names": list(class_names_of([metadata], cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)),
        "metadata": plain_metadata(metadata),
        "input": {key: cfg.INPUT[key] for key in ("FORMAT", "MIN_SIZE_TEST", "MAX_SIZE_TEST")},
        "thresholds": {key: test[key] for key in ("OBJECT_MASK_THRESHOLD", "OVERLAP_THRESHOLD")},
        "sha256": _checksum(tensors),
        "config": portable_config(cfg),
    }


def _plain(value: Any) -> Any:
    """Numbers and arrays of NumPy in metadata, for JSON."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be saved with a model: {value!r:.80}")


def plain_metadata(metadata: Metadata) -> dict[str, Any]:
    """What inference needs of a data set's metadata, for JSON."""
    return {name: metadata.get(name) for name in _METADATA if metadata.get(name) is not None}


def stored_metadata(name: str, stored: dict[str, Any]) -> Metadata:
    """The metadata that `plain_metadata` returned, read from JSON, whose keys are strings."""
    values = dict(stored)
    for key in _MAPPINGS:
        if key in values:
            values[key] = {int(category): label for category, label in values[key].items()}
    return Metadata(name=name, **values)


def portable_config(cfg: CfgNode) -> CfgNode:
    """The config without paths of this machine."""
    cfg, defaults = cfg.clone(), get_cfg()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = ""
    cfg.OUTPUT_DIR = defaults.OUTPUT_DIR
    cfg.DATASETS.pop("CUSTOM", None)
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    return cfg


def _checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        # NumPy has no bfloat16.
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_model_file(path: str) -> bool:
    """Whether a file is the weights file of `save_model_folder`."""
    return os.path.isfile(path) and path.endswith(".safetensors") and bool(_header(path))


def _header(path: str) -> str | None:
    """What a safetensors file says about its model; None if another program wrote it."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(_HEADER_KEY)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read: it is truncated, damaged or no safetensors file ({error})."
        ) from error


def load_model_folder(
    path: str, opts: Sequence[Any] = (), *, extend_config: ExtendConfig | None = None
) -> ModelFile:
    """Read what `save_model_folder` wrote.

    The weights are checked here, and loaded by `Mask2FormerCheckpointer` from `ModelFile.path`.

    Args:
        path: the folder, or its weights file, which may stand alone.
        opts: overrides of the config, `KEY1 VALUE1 KEY2 VALUE2 ...`.
        extend_config: see `load_config`.

    Raises:
        FileNotFoundError: there is no weights file.
        ValueError: the file is damaged, of another kind or of a newer version, or an override is
            wrong.
    """
    file_name = os.path.join(path, WEIGHTS_FILE) if os.path.isdir(path) else path
    if not os.path.isfile(file_name):
        raise FileNotFoundError(f"Model {path}: {file_name} does not exist.")
    text = _header(file_name)
    if not text:
        raise ValueError(
            f"{file_name} holds weights only, without the config and the classes that "
            "save_model_folder writes: load it with its config, as MODEL.WEIGHTS."
        )
    description = _checked(file_name, text)
    _require_checksum(file_name, description["sha256"])
    _warn_of_other_json(file_name, text)
    cfg = stored_config(file_name, description, opts, extend_config)
    names, num_classes = tuple(description["class_names"]), cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if len(names) != num_classes:
        raise ValueError(
            f"{file_name} names {len(names)} classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
            f"{num_classes}."
        )
    name = cfg.DATASETS.TRAIN[0] if cfg.DATASETS.TRAIN else "unknown"
    try:
        metadata = stored_metadata(name, description["metadata"])
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{file_name}: the metadata in the description in its header is damaged ({error})."
        ) from error
    return ModelFile(file_name, cfg, names, metadata)


def _checked(file_name: str, text: str) -> dict[str, Any]:
    """The description in a header."""
    try:
        description = json.loads(text)
        number, version = description["format"], description["mask2former"]
        kinds = {"config": dict, "metadata": dict, "class_names": list, "sha256": str}
        if number <= _FORMAT and not all(isinstance(description[k], v) for k, v in kinds.items()):
            raise TypeError("an entry has the wrong type")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file_name}: the description of the model in its header is damaged ({error!r})."
        ) from error
    if number > _FORMAT:
        raise ValueError(
            f"{file_name} was written by Mask2Former {version} in format {number}; this version "
            f"reads up to {_FORMAT}: update Mask2Former."
        )
    return description


def _require_checksum(file_name: str, expected: str) -> None:
    with safe_open(file_name, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if _checksum(tensors) != expected:
        raise ValueError(
            f"{file_name} is damaged: its weights do not have the checksum that was written with "
            "them. Copy it again."
        )


def _warn_of_other_json(file_name: str, text: str) -> None:
    path = os.path.join(os.path.dirname(file_name), JSON_FILE)
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        if file.read().strip() != text.strip():
            logging.getLogger(__name__).warning(
                f"{path} is not what {file_name} holds, which counts: it was edited, or writing "
                "the folder was interrupted. Change values by overrides (opts) instead."
            )


def stored_config(
    file_name: str,
    description: dict[str, Any],
    opts: Sequence[Any] = (),
    extend_config: ExtendConfig | None = None,
) -> CfgNode:
    """The config that `portable_config` returned, read from JSON.

    Args:
        file_name: named in errors.
        description: its entry `config`, and `mask2former`, the version that wrote it.
        opts, extend_config: see `load_model_folder`.

    Raises:
        ValueError: it does not fit this version, or an override is wrong.
    """
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    if extend_config is not None:
        extend_config(cfg)
    try:
        cfg.merge_from_other_cfg(CfgNode(description["config"]))
    except (KeyError, ValueError, AssertionError) as error:
        raise ValueError(
            f"{file_name}, written by Mask2Former {description['mask2former']}: its config does "
            f"not fit this version and its Detectron2: {error.args[0]}"
        ) from error
    merge_overrides(cfg, opts)
    return cfg


def merge_overrides(cfg: CfgNode, opts: Sequence[Any]) -> None:
    """Change a config in place by `KEY1 VALUE1 KEY2 VALUE2 ...`.

    Raises:
        ValueError: a key is unknown or a value of another type.
    """
    if len(opts) % 2:
        raise ValueError(f"Overrides come in pairs KEY VALUE, but got {len(opts)}: {list(opts)}.")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, ValueError, AssertionError, TypeError) as error:
            raise ValueError(f"Override {key}={value!r}: {error.args[0]}") from error
