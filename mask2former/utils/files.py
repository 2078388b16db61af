"""Files: safe reading of pickles from unknown sources, and atomic writing.

Unpickling can execute arbitrary code. Here a `.pkl` file may contain only tensors, NumPy arrays and
plain containers, and files of `torch.save` are read by torch's weights-only loader.
"""

import io
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager


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


def _storage_from_bytes(data: bytes) -> Any:
    # torch's own function of this name unpickles without restrictions.
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _numpy_globals() -> dict[tuple[str, str], Any]:
    """What pickled arrays and scalars refer to, under the names of NumPy 1 and 2."""
    reconstruct = np.empty(0).__reduce__()[0]
    from_buffer = np.empty(0).__reduce_ex__(5)[0]
    scalar = np.float32(0).__reduce__()[0]
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.multiarray", "_reconstruct"] = reconstruct
        allowed[f"{core}.multiarray", "scalar"] = scalar
        allowed[f"{core}.numeric", "_frombuffer"] = from_buffer
    return allowed


def _allowed_globals() -> dict[tuple[str, str], Any]:
    allowed = {
        ("collections", "OrderedDict"): OrderedDict,
        # Python 3 pickles bytes this way for Python 2.
        ("_codecs", "encode"): _encode_latin1,
        ("torch", "Size"): torch.Size,
        ("torch", "device"): torch.device,
        ("torch.storage", "_load_from_bytes"): _storage_from_bytes,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    }
    for builtins in ("builtins", "__builtin__"):
        for kind in (set, frozenset, bytearray, complex, slice):
            allowed[builtins, kind.__name__] = kind
    return allowed | _numpy_globals()


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


class _RestrictedUnpickler(pickle.Unpickler):
    """Reads tensors, arrays and plain containers; rejects every other class or function."""

    _ALLOWED = _allowed_globals()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name} ")
        return self._ALLOWED[module, name]


@contextmanager
def explained_read_errors(path: str) -> Iterator[None]:
    """Turn decoding errors into errors that name the file.

    Raises:
        ValueError: the file contains more than data, or is damaged.
    """
    try:
        yield
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
        return _RestrictedUnpickler(file, encoding="latin1").load()


def load_torch(path: str) -> Any:
    """Read a file of `torch.save` onto the CPU without executing code; NumPy data is allowed."""
    numpy_globals = [(value, ".".join(key)) for key, value in _numpy_globals().items()]
    dtypes = [type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"]
    with torch.serialization.safe_globals([*numpy_globals, *dtypes]):
        return torch.load(path, map_location="cpu", weights_only=True)
