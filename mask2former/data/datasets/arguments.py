"""Checks of the arguments that the functions which register your own data share."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..formats.semantic_folders import list_files, name_end
from .derived_json import Changes
from .selection import check_rename, make_selection


def make_changes(
    name: str,
    classes: Sequence[str] | str | None,
    rename: Mapping[str, str | None] | None,
    share: Sequence[float] | None,
    share_seed: int,
    image_list: str | None,
) -> Changes:
    """Check the arguments of a registration about images and classes."""
    return Changes(
        make_selection(name, share, share_seed, image_list),
        None if classes is None else tuple(class_list(name, classes)),
        check_rename(name, rename),
    )


def list_extensions(listed: str | Sequence[str]) -> tuple[str, ...]:
    """One or several file name extensions, each with its dot, or ends of names as they are."""
    extensions = (listed,) if isinstance(listed, str) else listed
    return tuple(map(name_end, extensions))


def check_extensions(name: str, folder: str, extensions: Sequence[str], key: str) -> None:
    """Check that a folder has a file with one of the extensions.

    Raises:
        ValueError: it has none.
    """
    if not extensions:
        raise ValueError(f"Data set {name!r}: {key} lists no extension, such as 'png'.")
    files = list_files(folder)
    suffixes = tuple(extension.lower() for extension in extensions)
    if any(file.lower().endswith(suffixes) for file in files):
        return
    present = sorted({Path(file).suffix for file in files})
    raise ValueError(
        f"Data set {name!r}: folder {folder} holds no {' or '.join(f'*{e}' for e in extensions)} "
        f"file ({key}); the extensions there are "
        f"{', '.join(map(repr, present)) or 'none, it is empty'}."
    )


def existing_folder(name: str, folder: str, what: str) -> str:
    """The path of a folder, with the home folder in place of `~`.

    Raises:
        FileNotFoundError: it does not exist.
    """
    path = os.path.expanduser(folder)
    if not os.path.isdir(path):
        raise FileNotFoundError(
            f"Data set {name!r}: folder {_where(folder, path)} of the {what} does not exist."
        )
    return path


def existing_file(name: str, file: str, what: str) -> str:
    """The path of a file, with the home folder in place of `~`.

    Raises:
        FileNotFoundError: it does not exist.
    """
    path = os.path.expanduser(file)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"Data set {name!r}: {what} {_where(file, path)} does not exist.")
    return path


def _where(given: str, path: str) -> str:
    return given if os.path.isabs(path) else f"{given} (in {os.getcwd()})"


def class_list(name: str, classes: Sequence[str] | str) -> list[str]:
    """Check class names, given or in a text file with one per line, or in the CSV of Roboflow.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: there is none, one repeats, or one is no text.
    """
    origin = "classes"
    if isinstance(classes, str):
        origin = existing_file(name, classes, "class list")
        lines = Path(origin).read_text(encoding="utf-8-sig").rstrip().splitlines()
        classes = [line.strip() for line in lines]
        if origin.lower().endswith(".csv"):
            classes = _classes_of_roboflow(name, origin, lines)
    names = list(classes)
    wrong = [i for i, value in enumerate(names) if not isinstance(value, str) or not value]
    if wrong:
        raise ValueError(
            f"Data set {name!r}: class {wrong[0]} (from 0) of {origin} is {names[wrong[0]]!r}, not "
            "a name. YAML reads words such as yes, no, on and off as true or false: quote them."
        )
    repeated = [value for value in names if names.count(value) > 1]
    if repeated or not names:
        what = f"names {repeated[0]!r} more than once" if repeated else "is empty"
        raise ValueError(f"Data set {name!r}: {origin} {what}.")
    return names


def _classes_of_roboflow(name: str, file: str, lines: Sequence[str]) -> list[str]:
    """The classes of _classes.csv beside the masks of Roboflow: pixel value and class a line."""
    header, *rows = list(csv.reader(lines, skipinitialspace=True)) or [[]]
    is_table = [title.strip().lower() for title in header] == ["pixel value", "class"]
    if not is_table or any(len(row) != 2 for row in rows):
        raise ValueError(
            f"Data set {name!r}: {file} is a CSV table, of which only that of Roboflow is read "
            "(Pixel Value, Class): give a text file with one class per line, or VALUE_MAP."
        )
    if [row[0].strip() for row in rows] != [str(i) for i in range(len(rows))]:
        raise ValueError(
            f"Data set {name!r}: the pixel values in {file} are not 0, 1, 2, ...: state VALUE_MAP."
        )
    return [row[1].strip() for row in rows]
