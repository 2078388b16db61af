"""Finds the label maps of images, and the classes of their labels."""

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ...config_file import load_plain_yaml
from ..formats.images import read_image
from ..formats.semantic_folders import IMAGE_EXTENSIONS
from ..label_maps import check_whole

# JPEG changes labels, so that such a file beside a label map is its image.
_LOSSY = (".jpg", ".jpeg")


def read_label_classes(file: Path) -> dict[int, str]:
    """Read label → class name.

    Args:
        file: text with one name a line, that of label 0 first; or YAML or JSON that maps labels to
            names. Several labels may have one name.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is neither.
    """
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix.lower() not in (".yaml", ".yml", ".json"):
        names = [line.strip() for line in text.rstrip().splitlines()]
        if not all(names) or len(set(names)) < len(names):
            what = "an empty line" if not all(names) else "a name twice"
            raise ValueError(f"{file} has {what}; it must list one class a line, label 0 first.")
        return dict(enumerate(names))
    try:
        content = load_plain_yaml(text)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    items = content.items() if isinstance(content, dict) else ()
    classes = {_as_label(key): name for key, name in items}
    if (
        not classes
        or None in classes
        or not all(isinstance(n, str) and n for n in classes.values())
    ):
        raise ValueError(
            f"{file} must map labels to names, such as {{0: background, 255: object}}. YAML reads "
            "words such as yes, no, on and off as true or false: quote them."
        )
    return classes


def _as_label(key: Any) -> int | None:
    if isinstance(key, str) and key.isdecimal():
        return int(key)  # JSON has only texts as keys
    return key if isinstance(key, int) and not isinstance(key, bool) else None


class LabelMaps:
    """The label maps in a folder and its subfolders, by the names of their images."""

    def __init__(self, root: Path) -> None:
        """
        Raises:
            FileNotFoundError: the folder does not exist.
            ValueError: it holds no images.
        """
        if not root.is_dir():
            raise FileNotFoundError(f"The folder of the label maps {root} does not exist.")
        self._root = root
        self._files: dict[str, Path] = {}  # path below the folder, without extension
        self._by_name: dict[str, list[str]] = {}
        files = [f for f in root.rglob("*") if f.suffix.lower() in IMAGE_EXTENSIONS]
        for file in sorted(files, key=lambda file: (file.suffix.lower() in _LOSSY, file)):
            key = file.relative_to(root).with_suffix("").as_posix()
            if self._files.setdefault(key, file) is file:
                self._by_name.setdefault(file.stem, []).append(key)
        if not self._files:
            raise ValueError(f"The folder of the label maps {root} holds no images.")

    def __len__(self) -> int:
        return len(self._files)

    def find(self, image: str) -> Path | None:
        """The label map of an image, by its path in the folder of images, else by its name.

        Raises:
            ValueError: several have its name.
        """
        path = PurePosixPath(image).with_suffix("")
        if path.as_posix() in self._files:
            return self._files[path.as_posix()]
        keys = self._by_name.get(path.name, [])
        if len(keys) > 1:
            raise ValueError(
                f"The image {image} has several label maps in {self._root}: {keys[0]}, {keys[1]}. "
                "Name the folder of one, or give the label maps the folders of the images."
            )
        return self._files[keys[0]] if keys else None


def read_label_map(file: Path) -> np.ndarray:
    """Read a label map (H, W) of integers.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it cannot be read, or has several channels or fractions.
    """
    labels = read_image(str(file))
    if labels.ndim != 2:
        raise ValueError(
            f"Label map {file} has {labels.shape[-1]} channels; a label map has one, the class of "
            "each pixel."
        )
    check_whole(labels, str(file))
    return labels.astype(np.int64) if labels.dtype.kind == "f" else labels
