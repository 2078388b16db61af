"""Folders in the layout of Hugging Face: config.json beside weights, in one file or in shards."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..utils.files import (
    checkpoint_format,
    explained_read_errors,
    load_pickle,
    load_safetensors,
    load_torch,
)

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
INDEX = ".index.json"
# In order of preference.
_FILES = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
    "pytorch_model.pth",
    "model.pth",
)


def weights_file(folder: str) -> str:
    """The file of weights in a folder, or the index of its shards.

    Raises:
        ValueError: there is none.
    """
    for name in _FILES:
        if (Path(folder) / name).is_file():
            return str(Path(folder) / name)
    raise ValueError(
        f"MODEL.WEIGHTS is the folder {folder}, without any of {', '.join(_FILES)}: name the file."
    )


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def load_file(path: str) -> Any:
    """The content of a file of weights, on the CPU, without executing code.

    Args:
        path: a file of torch, pickle or safetensors, or the index of shards of these.

    Raises:
        FileNotFoundError: a shard does not exist.
        ValueError: a file is damaged, or holds more than data.
    """
    if path.endswith(INDEX):
        return _load_shards(path)
    with explained_read_errors(path):
        file_format = checkpoint_format(path)
        if file_format == "safetensors":
            return load_safetensors(path)
        return load_pickle(path) if file_format == "pickle" else load_torch(path)


def _load_shards(index: str) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index} has no 'weight_map' from names to files.")
    shards = {}
    for file in sorted(set(places.values())):
        path = Path(index).parent / file
        if os.path.basename(file) != file:
            raise ValueError(f"{index} names {file!r}, which is not a file in its folder.")
        if not path.is_file():
            raise FileNotFoundError(f"{index} names the shard {file}, which does not exist.")
        shards[file] = load_file(str(path))
    for name, file in places.items():
        if name not in shards[file]:
            raise ValueError(f"{index} says that {name} is in {file}, which lacks it.")
    return {name: shards[file][name] for name, file in places.items()}
