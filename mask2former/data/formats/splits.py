"""Finds the parts of data, such as train and val, and the images that annotations name."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from .annotated_images import AnnotatedImages
from .findings import Findings
from .semantic_folders import IMAGE_EXTENSIONS

T = TypeVar("T")

# Tools name the same part differently.
_SYNONYMS = (
    ("train", "training"),
    ("val", "valid", "validation"),
    ("test", "testing"),
)
_SPLIT_WORDS = {word for words in _SYNONYMS for word in words}


def same_split(name: str, other: str) -> bool:
    """Whether two names mean the same part, such as val and valid."""
    name, other = name.lower(), other.lower()
    return name == other or any(name in words and other in words for words in _SYNONYMS)


def choose_split(splits: Mapping[str, T], split: str | None, where: object) -> T:
    """The part with a name.

    Args:
        splits: name → part; not empty.
        split: the name, or a synonym; None: there is only one.
        where: what has these parts, for the error.

    Raises:
        ValueError: there is no such part, or several and none is named.
    """
    listed = ", ".join(splits)
    if split is None:
        if len(splits) == 1:
            return next(iter(splits.values()))
        raise ValueError(f"{where} has the splits {listed}; state which to read as SPLIT.")
    if split in splits:
        return splits[split]
    same = [name for name in splits if same_split(name, split)]
    if len(same) != 1:
        raise ValueError(f"{where} has no split {split!r}, only {listed}.")
    return splits[same[0]]


def split_folders(root: Path) -> dict[str, Path]:
    """The folders in a folder that are named as a part is, such as train; {} unless two."""
    if not root.is_dir():
        return {}
    names = sorted(os.listdir(root))
    found = {n: root / n for n in names if n.lower() in _SPLIT_WORDS and (root / n).is_dir()}
    return found if len(found) > 1 else {}


def split_folder(root: Path, split: str | None) -> Path:
    """The folder of a part, for formats that know no parts: a folder in `root`, or `root` itself.

    Raises:
        ValueError: there is no such folder, or there are several and none is named.
    """
    if split is not None:
        if root.is_dir() and (root / split).is_dir():
            return root / split
        names = sorted(n for n in os.listdir(root) if (root / n).is_dir()) if root.is_dir() else []
        same = [name for name in names if same_split(name, split)]
        if len(same) == 1:
            return root / same[0]
        listed = f"its folders are {', '.join(names)}" if names else "it has no folders"
        raise ValueError(f"{root} has no folder of the split {split!r}; {listed}.")
    folders = split_folders(root)
    return choose_split(folders, None, root) if folders else root


def files_below(root: Path, *extensions: str) -> list[Path]:
    """The files with one of the extensions in a folder and its folders, sorted; no hidden ones."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(n for n in folders if not n.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if name.lower().endswith(extensions) and not name.startswith("."):
                found.append(Path(folder, name))
    return found


def images_below(root: Path) -> list[Path]:
    """The images in a folder and its folders, sorted."""
    return files_below(root, *IMAGE_EXTENSIONS)


def warn_of_unlabelled(folder: Path, content: AnnotatedImages, why: str) -> None:
    """Warn of images without annotations: not labelled yet, which differs from having no objects.

    Args:
        folder: of the images; may not exist.
        content: the images that are read.
        why: what an image lacks, as a predicate.
    """
    used = {image.path.resolve() for image in content.images}
    others = [path for path in images_below(folder) if path.resolve() not in used]
    if others:
        findings = Findings()
        findings.warn(str(others[0]), None, f"{why}, like {len(others) - 1} more images: not read")
        findings.log()


class ImageFinder:
    """Finds images by the names that annotations state.

    A name may have a path of another machine, backslashes, or no extension.
    """

    def __init__(self, folders: Iterable[Path | None], root: Path | None = None) -> None:
        """
        Args:
            folders: to which names may be relative, the most likely first; None is left out.
            root: folder below which an image may be anywhere if only one has its name.
        """
        self._folders = list(dict.fromkeys(f for f in folders if f is not None))
        self._root = root
        self._below: dict[str, list[Path]] | None = None

    def find(self, name: str, folders: Sequence[Path] = ()) -> Path:
        """The file of an image.

        Args:
            name: what the annotation states.
            folders: to look into first.

        Raises:
            FileNotFoundError: it does not exist.
            ValueError: several files have the name.
        """
        stated = name.replace("\\", "/")
        searched = [*folders, *self._folders]
        if not stated.strip("/. "):
            raise ValueError(f"the name of the image is {name!r}")
        # A path on another machine is that of the folder, not of the image in it.
        is_foreign = stated.startswith(("/", "..")) or re.match(r"[A-Za-z]:", stated) is not None
        last = stated.rpartition("/")[2]
        for candidate in dict.fromkeys((stated, last) if is_foreign else (stated,)):
            for folder in searched:
                for path in _with_extension(folder / candidate):
                    if path.is_file():
                        return Path(os.path.normpath(path))
        found = self._anywhere(last if is_foreign else stated)
        if len(found) > 1:
            listed = ", ".join(map(str, found[:3]))
            raise ValueError(f"the image {name!r} is not unique: {listed}")
        if found:
            return found[0]
        listed = ", ".join(str(folder) for folder in searched[:4])
        raise FileNotFoundError(f"the image {name!r} does not exist; looked into {listed}")

    def _anywhere(self, name: str) -> list[Path]:
        if self._root is None:
            return []
        if self._below is None:
            self._below = {}
            for path in images_below(self._root):
                self._below.setdefault(path.name, []).append(path)
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        candidates = self._below.get(parts[-1], [])
        return [path for path in candidates if path.parts[-len(parts) :] == parts]


def _with_extension(path: Path) -> Iterator[Path]:
    yield path
    # Frames of a video are named without one.
    if path.suffix.lower() not in IMAGE_EXTENSIONS:
        for extension in IMAGE_EXTENSIONS:
            yield path.with_name(path.name + extension)
            yield path.with_name(path.name + extension.upper())
