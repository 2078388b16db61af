"""Files: safe reading of checkpoints from unknown sources, and atomic writing.

Unpickling can execute arbitrary code. Here checkpoints may contain only tensors, NumPy arrays and
plain containers (`plain_pickle.py`, `torch_files.py`).
"""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Literal

import torch
from detectron2.utils.file_io import PathManager

from .plain_pickle import PlainUnpickler, require_plain
from .torch_files import STORAGE_NAMES, is_torch_zip, read_torch


class MissingPackageError(ValueError):
    """A file is sound, but its format needs a package that is not installed."""


@contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO]:
    """Open a local file for writing; it appears under its name only when it is complete.

    Args:
        path: the file; an existing one is replaced.
        mode: "w" or "wb".
    """
    temporary = f"{path}.tmp"
    file = open(temporary, mode)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def explained_read_errors(path: str) -> Iterator[None]:
    """Turn decoding errors into errors that name the file.

    Raises:
        ValueError: the file contains more than data, or is damaged.
    """
    try:
        yield
    except MissingPackageError:
        raise
    # Damaged bytes can raise any exception in a decoder.
    except Exception as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise ValueError(
                f"Checkpoint {path} was not loaded: it refers to {refused[1]}, and only tensors, "
                "NumPy arrays and plain containers are accepted, because anything else could run "
                "code. If you trust the file, convert it first."
            ) from error
        summary = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"Checkpoint {path} cannot be read: it is truncated, damaged or not a checkpoint "
            f"({type(error).__name__}: {summary})."
        ) from error


def load_pickle(path: str) -> Any:
    """Read a `.pkl` file (latin1 strings, as in Detectron2's model zoo) without executing code."""
    with PathManager.open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        data = PlainUnpickler(file, size, names=STORAGE_NAMES).load()
    require_plain(data)
    return data


def load_torch(path: str) -> Any:
    """Read a file of `torch.save` onto the CPU without executing code; NumPy data is allowed."""
    with PathManager.open(path, "rb") as file:
        data = read_torch(file)
    require_plain(data)
    return data


def load_safetensors(path: str) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingPackageError(
            f"Checkpoint {path} is a safetensors file, which needs the package safetensors: "
            "`pip install safetensors`."
        ) from error
    return load_file(path)


def checkpoint_format(path: str) -> Literal["torch", "pickle", "safetensors"]:
    """The format of a checkpoint, from its first bytes and its name."""
    with PathManager.open(path, "rb") as file:
        start = file.read(9)
    if is_torch_zip(start):
        return "torch"
    # A header's length, then JSON; a pickle begins with its protocol.
    if path.endswith(".safetensors") or (start[8:] == b"{" and start[:1] != b"\x80"):
        return "safetensors"
    return "pickle" if path.endswith(".pkl") else "torch"
