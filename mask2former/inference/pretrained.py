"""Finds a trained model by the path that a user gives: folder, output of a training, checkpoint.

model.safetensors in it        a folder of `save_model_folder`
config.json in it              a folder of the transformers package
model_best/, model_final/      OUTPUT_DIR of a training: the best model, else the last
last_checkpoint, config.yaml   OUTPUT_DIR of a training that has not ended
a file NAME.pth, NAME.pkl      a checkpoint with its config.yaml beside it
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from torch import Tensor

from ..config import ExtendConfig, load_config
from ..data.class_labels import class_names_of
from ..weights.folders import CONFIG, read_json
from ..weights.transformers import is_transformers_folder, load_transformers_folder
from .model_file import (
    WEIGHTS_FILE,
    is_model_file,
    load_model_folder,
    merge_overrides,
)

# Of the files that tools/export.py writes.
EXPORTED_SUFFIXES = (".onnx", ".pt2", ".ts")
_CONFIG_YAML = "config.yaml"
# The folders that a training writes, the first that exists counts.
_FOLDERS = ("model_best", "model_final")


@dataclass
class Pretrained:
    """A trained model.

    Attributes:
        cfg: its config, not frozen.
        class_names: K names, by label.
        metadata: of the data set it was trained on.
        path: of the checkpoint to load.
        weights: converted ones to load instead.
    """

    cfg: CfgNode
    class_names: tuple[str, ...]
    metadata: Metadata
    path: str
    weights: dict[str, Tensor] | None = None


def find_pretrained(
    path: str, opts: Sequence[Any] = (), extend_config: ExtendConfig | None = None
) -> Pretrained:
    """Read what a path names, except for the weights.

    Args:
        path: see above.
        opts: overrides of the config, `KEY1 VALUE1 KEY2 VALUE2 ...`.
        extend_config: see `load_config`.

    Raises:
        FileNotFoundError: there is no model.
        ValueError: it is damaged, of a newer version or incomplete, or an override is wrong.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"Model {path} does not exist.")
    if os.path.isfile(path):
        return _of_file(path, opts, extend_config)
    if is_model_file(os.path.join(path, WEIGHTS_FILE)):
        return _of_model_file(path, opts, extend_config)
    if is_transformers_folder(path):
        return _of_transformers(path, opts)
    for name in _FOLDERS:
        folder = os.path.join(path, name)
        if os.path.isfile(os.path.join(folder, WEIGHTS_FILE)):
            return _of_model_file(folder, opts, extend_config)
    return _of_checkpoint(_last_checkpoint(path), opts, extend_config)


def _of_file(path: str, opts: Sequence[Any], extend_config: ExtendConfig | None) -> Pretrained:
    if is_model_file(path):
        return _of_model_file(path, opts, extend_config)
    suffix = os.path.splitext(path)[1].lower()
    if suffix in EXPORTED_SUFFIXES:
        raise ValueError(
            f"{path} is an exported model: load it by mask2former.export.load_exported."
        )
    if suffix in (".json", ".yaml", ".yml"):
        raise ValueError(f"{path} describes a model: name its folder, or the file of its weights.")
    if not path.endswith((".pth", ".pkl")) and is_transformers_folder(os.path.dirname(path)):
        return _of_transformers(path, opts)
    return _of_checkpoint(path, opts, extend_config)


def _of_model_file(
    path: str, opts: Sequence[Any], extend_config: ExtendConfig | None
) -> Pretrained:
    saved = load_model_folder(path, opts, extend_config=extend_config)
    return Pretrained(saved.cfg, saved.class_names, saved.metadata, saved.path)


def _of_transformers(path: str, opts: Sequence[Any]) -> Pretrained:
    cfg, weights, _ = load_transformers_folder(path)
    cfg = cfg.clone()
    cfg.defrost()
    merge_overrides(cfg, opts)
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    names = class_names_of([metadata], cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    return Pretrained(cfg, names, metadata, path, weights)


def _of_checkpoint(
    path: str, opts: Sequence[Any], extend_config: ExtendConfig | None
) -> Pretrained:
    config_file = os.path.join(os.path.dirname(path), _CONFIG_YAML)
    if not os.path.isfile(config_file):
        raise FileNotFoundError(
            f"{path} has no {_CONFIG_YAML} beside it, as training writes it to OUTPUT_DIR: copy it "
            "there, or call Predictor(cfg) with the config of the training and MODEL.WEIGHTS."
        )
    cfg = load_config(config_file, opts, extend_config)
    candidates = [MetadataCatalog.get(x) for x in (*cfg.DATASETS.TRAIN[:1], *cfg.DATASETS.TEST[:1])]
    if not candidates:
        raise ValueError(f"{config_file}: DATASETS.TRAIN and TEST are empty: name the data set.")
    names = class_names_of(candidates, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    return Pretrained(cfg, names, candidates[0], path)


def _last_checkpoint(folder: str) -> str:
    """The checkpoint that a training names as its last."""
    marker = os.path.join(folder, "last_checkpoint")
    if not os.path.isfile(marker):
        if os.path.isfile(os.path.join(folder, CONFIG)):
            kind = read_json(Path(folder) / CONFIG).get("model_type")  # or it is damaged
            raise ValueError(f"{folder}/{CONFIG} is of the model_type {kind!r}, not mask2former.")
        raise FileNotFoundError(
            f"Folder {folder} holds no model: neither {WEIGHTS_FILE}, config.json of "
            f"transformers, {' or '.join(_FOLDERS)} nor last_checkpoint of a training."
        )
    with open(marker, errors="replace") as file:
        name = file.read(256).strip()
    path = os.path.join(folder, os.path.basename(name))
    if not name or not os.path.isfile(path):
        raise FileNotFoundError(f"{marker} names {name!r}, which is no file in its folder.")
    return path
