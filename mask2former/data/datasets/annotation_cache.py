"""The cache of annotations that are derived from your files: made once, then read like any data.

A file of the cache is named after what it is derived from: the names, times and sizes of the source
files, the options, and the code that reads them. So it is never stale, and the folder may be
deleted at any time between runs. It is `~/.cache/mask2former`, or what the environment variable
MASK2FORMER_CACHE names.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ...utils.files import WriteError, explained_write_errors
from ...utils.output_lock import LOCK_FILE
from ..formats.semantic_folders import IMAGE_EXTENSIONS

VARIABLE = "MASK2FORMER_CACHE"
# What file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# Of files that are images or annotations.
_SUFFIXES = (*IMAGE_EXTENSIONS, ".csv", ".json", ".txt", ".xml", ".yaml", ".yml")
# The packages whose code decides what is derived.
_CODE = (Path(__file__).parent, Path(__file__).parents[1] / "formats")

Stamp = tuple[str, int, int]


def cache_folder() -> str:
    return os.path.expanduser(os.environ.get(VARIABLE) or "~/.cache/mask2former")


def stamp(file: str) -> Stamp:
    """Path, time and size of a file, which change with its content.

    Raises:
        FileNotFoundError: it does not exist.
    """
    status = os.stat(file)
    return os.path.realpath(file), status.st_mtime_ns, status.st_size


def stamp_tree(folder: str) -> list[Stamp]:
    """The stamps of the images and annotations in a folder and below, in order of their paths.

    Output folders of a training are left out: they change while it runs.
    """
    stamps: list[Stamp] = []
    seen: set[str] = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        # A link may lead to a folder above.
        if real in seen or LOCK_FILE in files:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        stamps += _stamps(path, files)
    return sorted(stamps)


def stamp_folder(folder: str) -> list[Stamp]:
    """The stamps of the images and annotations in a folder, but not below."""
    return _stamps(folder, os.listdir(folder)) if os.path.isdir(folder) else []


def _stamps(folder: str, names: Iterable[str]) -> list[Stamp]:
    stamps = []
    for name in sorted(names):
        if name.lower().endswith(_SUFFIXES):
            # Links to nothing are no content; the readers name those they need.
            with contextlib.suppress(FileNotFoundError):
                stamps.append(stamp(os.path.join(folder, name)))
    return stamps


def cached(source: str, suffix: str, key: Any, write: Callable[[str], None]) -> str:
    """The path of a file or folder of the cache, which is made if it is not there.

    Of several processes that need it one makes it, and the others wait.

    Args:
        source: what it is derived from, for its name.
        suffix: of its name, such as ".json".
        key: all that it depends on, as JSON holds it.
        write: makes it under the path given; called at most once.

    Returns:
        The path.

    Raises:
        WriteError: the cache cannot be written.
    """
    text = json.dumps([_code_version(), key], ensure_ascii=False)
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    stem = re.sub(r"[^\w.-]+", "_", source)[-60:].strip("_.")
    folder = cache_folder()
    target = os.path.join(folder, f"{stem}-{digest}{suffix}")
    if os.path.exists(target):
        return target
    try:
        with explained_write_errors(target):
            os.makedirs(folder, exist_ok=True)
        with _lock(f"{target}.lock"):
            if not os.path.exists(target):
                _make(target, write)
    except WriteError as error:
        explained = WriteError(
            f"{error} Annotations that are converted once are kept there; the environment variable "
            f"{VARIABLE} names another folder."
        )
        explained.errno = error.errno
        raise explained from error
    return target


def _make(target: str, write: Callable[[str], None]) -> None:
    with explained_write_errors(target):
        temporary = tempfile.mkdtemp(dir=os.path.dirname(target), suffix=".tmp")
    try:
        made = os.path.join(temporary, os.path.basename(target))
        write(made)
        try:
            with explained_write_errors(target):
                os.rename(made, target)
        except WriteError:
            # Without locks, another process may have made the same folder meanwhile.
            if not os.path.isdir(target):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: str) -> Iterator[None]:
    """Hold a lock on a file, which is removed at the end, unless the file system has no locks."""
    with contextlib.ExitStack() as stack:
        with explained_write_errors(path):
            file = stack.enter_context(open(path, "a"))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        try:
            yield
        finally:
            # Who waits for it holds the removed file then, and finds what has been made.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


@cache
def _code_version() -> str:
    """A digest of the code that reads and converts annotations."""
    digest = hashlib.sha256()
    for file in sorted(path for folder in _CODE for path in folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def write_json(path: str, data: bytes) -> None:
    """Write a file of the cache.

    Raises:
        WriteError: it cannot be written.
    """
    with explained_write_errors(path), open(path, "wb") as file:
        file.write(data)
