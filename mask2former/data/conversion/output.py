"""Output of conversions: complete or absent, never overwritten by mistake, checked."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import msgspec
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ...utils.files import atomic_write, explained_write_errors, make_folder
from ..check.run import check_datasets

_STAGING = ".conversion.tmp"


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically.

    Raises:
        WriteError: it cannot be written.
    """
    with atomic_write(str(path), "wb") as file:
        file.write(msgspec.json.encode(content))


def png_names(images: Iterable[str]) -> dict[str, str]:
    """Image → name of its PNG, which keeps the folder.

    Raises:
        ValueError: two images would have the same PNG.
    """
    names: dict[str, str] = {}
    owners: dict[str, str] = {}
    for image in images:
        path = PurePosixPath(image)
        if path.is_absolute() or ".." in path.parts:
            path = PurePosixPath(path.name)  # stay in the output folder
        names[image] = path.with_suffix(".png").as_posix()
        first = owners.setdefault(names[image], image)
        if first != image:
            raise ValueError(
                f"The images {first} and {image} would have the same PNG {names[image]}; rename "
                "one of them."
            )
    return names


def save_png(array: np.ndarray, path: Path) -> None:
    """Write a PNG, and its folder if necessary.

    Raises:
        WriteError: it cannot be written.
    """
    with explained_write_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path, format="PNG")


def refuse_existing(paths: Sequence[Path], overwrite: bool) -> None:
    """Refuse to overwrite files or folders, unless `overwrite`.

    Raises:
        FileExistsError: one exists.
    """
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"{existing[0]} exists already. Choose another output, or add --overwrite."
        )


@contextmanager
def staged_output(output: Path, names: Sequence[str], overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder; afterwards its files and folders are moved to the output.

    Args:
        output: folder, created if necessary.
        names: what is moved, in this order; the last one tells that the output is complete.
        overwrite: whether what exists is replaced.

    Raises:
        FileExistsError: one exists, and is not to be overwritten.
        WriteError: the folder cannot be written.
    """
    refuse_existing([output / name for name in names], overwrite)
    staging = output / _STAGING
    is_new = not output.exists()
    make_folder(str(output))
    with explained_write_errors(str(staging)):
        _remove(staging)  # of a killed run
        staging.mkdir()
    try:
        yield staging
        with explained_write_errors(str(output)):
            for name in reversed(names):
                _remove(output / name)
            for name in names:
                os.replace(staging / name, output / name)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                output.rmdir()
        raise
    staging.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_output(
    name: str, register: Callable[[str], None], report_folder: Path, workers: int
) -> bool:
    """Read converted data as training does and report all problems.

    Args:
        name: of the data set in the report.
        register: registers the data set under the name it is given.
        report_folder: gets the reports.
        workers: number of processes.

    Returns:
        Whether there are problems.
    """
    while name in DatasetCatalog:
        name += "_converted"
    register(name)
    try:
        return check_datasets([name], str(report_folder), workers)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
