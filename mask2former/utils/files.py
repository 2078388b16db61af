"""Files: safe reading of checkpoints from unknown sources, atomic writing, errors that name files.

Unpickling can execute arbitrary code. Here checkpoints may contain only tensors, NumPy arrays and
plain containers (`plain_pickle.py`, `torch_files.py`).
"""

import errno
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, Literal

import torch
from detectron2.utils.file_io import PathManager

from .plain_pickle import PlainUnpickler, require_plain
from .torch_files import STORAGE_NAMES, is_torch_zip, read_torch


class MissingPackageError(ValueError):
    """A file is sound, but its format needs a package that is not installed."""


class WriteError(OSError):
    """A file cannot be written; one line names the file, the cause and what to do."""


def list_names(folder: str) -> set[str]:
    """The names in a folder of what a program can read: files and folders.

    Links to nothing, which a listing shows like files, and pipes, which may never end, are left
    out.
    """
    if not os.path.isdir(folder):  # not local
        return set(PathManager.ls(folder))
    names = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            # Unlike the entry, these answer False for a link to itself.
            path = entry.path if entry.is_symlink() else None
            is_file = os.path.isfile(path) if path else entry.is_file()
            if is_file or (os.path.isdir(path) if path else entry.is_dir()):
                names.add(entry.name)
    return names


_OTHER_FOLDER = "or choose another folder"
# Cause, if the system's own words do not tell it, and remedy.
_WRITE_PROBLEMS = {
    errno.ENOSPC: ("", f"Free space there, {_OTHER_FOLDER}"),
    errno.EDQUOT: ("", f"Free some of your quota there, {_OTHER_FOLDER}"),
    errno.EFBIG: ("", "Raise the limit of file sizes (`ulimit -f`)"),
    errno.EROFS: ("", f"Mount it writable, {_OTHER_FOLDER}"),
    errno.EACCES: ("", f"Allow this user to write there, {_OTHER_FOLDER}"),
    errno.EPERM: ("", f"Allow this user to write there, {_OTHER_FOLDER}"),
    errno.ENOENT: (
        "it, or its folder, does not exist",
        f"Restore it, {_OTHER_FOLDER}",
    ),
    errno.EEXIST: ("a file is in the place of a folder", f"Rename it, {_OTHER_FOLDER}"),
    errno.ENOTDIR: ("a file is in the place of a folder", f"Rename it, {_OTHER_FOLDER}"),
    errno.EISDIR: ("a folder is in the place of the file", f"Rename it, {_OTHER_FOLDER}"),
}


def _system_error(error: BaseException | None, outer: BaseException | None) -> OSError | None:
    """The error of the system behind an error: torch hides it behind a RuntimeError.

    Args:
        error: what was raised.
        outer: what was being handled before, which is no cause.
    """
    while error is not None and error is not outer:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def explained_write_errors(path: str) -> Iterator[None]:
    """Turn errors of the system while writing into errors that name the file.

    Args:
        path: what is written. Where the system names another file, that one is named.

    Raises:
        WriteError: the file cannot be written.
    """
    outer = sys.exc_info()[1]
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        cause = _system_error(error, outer)
        if cause is None:
            raise
        name = cause.filename
        if not isinstance(name, str | bytes) or os.fsdecode(name) == _temporary(path):
            name = path
        problem, remedy = _WRITE_PROBLEMS.get(
            cause.errno or 0, ("", f"Make it writable, {_OTHER_FOLDER}")
        )
        text = problem or cause.strerror or str(cause)
        explained = WriteError(f"Cannot write {os.fsdecode(name)}: {text}. {remedy}.")
        explained.errno = cause.errno
        raise explained from error


def _temporary(path: str) -> str:
    return f"{path}.tmp"


@contextmanager
def atomic_write(path: str, mode: str = "w") -> Iterator[IO]:
    """Open a local file for writing; it appears under its name only when it is complete.

    Args:
        path: the file; an existing one is replaced.
        mode: "w" or "wb".

    Raises:
        WriteError: the file cannot be written. An existing one is as it was.
    """
    temporary = _temporary(path)
    with explained_write_errors(path):
        file = open(temporary, mode)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            # It may be gone, with its folder.
            with suppress(OSError):
                os.unlink(temporary)
            raise


def atomic_link(source: str, path: str) -> None:
    """Give a file a second name, as a hard link, or a copy where the file system has none.

    Args:
        source: an existing file.
        path: its second name; an existing file is replaced.

    Raises:
        WriteError: the file cannot be written. An existing one is as it was.
    """
    temporary = _temporary(path)
    with explained_write_errors(path):
        try:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
            os.replace(temporary, path)
        finally:
            # Left after an error, and if `path` was a link to the same file already.
            with suppress(OSError):
                os.unlink(temporary)


def make_folder(path: str) -> None:
    """Make a folder and its parents if missing.

    Raises:
        WriteError: it cannot be made.
    """
    with explained_write_errors(path):
        os.makedirs(path, exist_ok=True)


def require_writable(path: str) -> None:
    """Make a folder if missing, and try to write a MiB in it: before long work, not after.

    Raises:
        WriteError: the folder cannot be made or written.
    """
    make_folder(path)
    with explained_write_errors(path), tempfile.NamedTemporaryFile(dir=path, suffix=".tmp") as file:
        file.write(bytes(2**20))


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
    except OSError as error:
        raise ValueError(
            f"Checkpoint {path} cannot be read: {error.strerror or error}. Make it readable, or "
            "name another."
        ) from error
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
