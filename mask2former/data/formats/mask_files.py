"""Reads one mask file an object, as in the Data Science Bowl 2018.

    ID/images/ID.png  and  ID/masks/*.png               a folder an image
    images/ID.png     and  masks/ID/*.png               or the images in one folder

- A mask has the size of its image; all that is not black is the object. A file with more than two
  values is a label map, not a mask, and refused (but for JPEG, whose values are rounded at half).
- Folders in the folder of the masks of an image are classes: `masks/ID/cell/1.png`. Without them
  all objects are of the one class in `ReadOptions.classes`, or else of the class `object`.
- An image without masks has no objects. A mask without image is a mistake.

`ReadOptions.split` is the name of a folder, such as stage1_train.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from .annotated_images import AnnotatedImage, AnnotatedImages, AnnotationFormat, ReadOptions
from .drawings import Drawings
from .findings import Findings
from .images import read_image
from .splits import images_below, split_folder, split_folders

_IMAGES, _MASKS = "images", "masks"
_ONE_CLASS = "object"
_LOSSY = (".jpg", ".jpeg", ".webp")


def read_mask_files(root: Path, options: ReadOptions) -> AnnotatedImages:
    """Read the images of a folder; see the module.

    Args:
        root: the folder.
        options: `split` and `classes`.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    folder = split_folder(root, options.split)
    drawings = Drawings("mask files")
    pairs = _pairs(folder, drawings.findings)
    if not pairs:
        drawings.findings.raise_first(is_data=False)
        inner = [path.name for path in _folders(folder) if _layout(path) is not None]
        hint = f" Its folder {inner[0]} has: state it as the split." if inner else ""
        raise FileNotFoundError(
            f"{folder} has neither folders with an image in {_IMAGES} and its masks in {_MASKS}, "
            f"nor images in {_IMAGES} and their masks in {_MASKS}/NAME.{hint}"
        )
    # All parts of the data must agree on the classes.
    parts = split_folders(root).values() if options.split is not None else ()
    all_pairs = [*pairs, *(pair for part in parts for pair in _pairs(part, Findings()))]
    folders = {path.name for _, masks in all_pairs for path in _folders(masks)}
    classes = sorted(folders) or [_one_class(options.classes)]
    # Nothing is shown where the output is no terminal.
    for path, masks in tqdm(pairs, desc="mask files", disable=None):
        image = drawings.add_image(path, str(path))
        if image is None:
            continue
        for file in images_below(masks):
            inner_folders = file.relative_to(masks).parts[:-1]
            if not folders:
                _add_mask(file, classes[0], image, drawings)
            elif inner_folders:
                _add_mask(file, inner_folders[0], image, drawings)
            else:
                why = "the mask is in no folder of a class, but others are"
                drawings.findings.problem(str(file), None, why)
    return drawings.finish(classes)


def _one_class(given: Sequence[str] | None) -> str:
    if given is not None and len(given) != 1:
        raise ValueError(
            f"The classes {', '.join(given)} are given, but the masks are not in folders of "
            "classes; give one class."
        )
    name = _ONE_CLASS if given is None else given[0]
    logging.getLogger(__name__).info(f"The masks are in no folders of classes: all are {name!r}.")
    return name


def _pairs(root: Path, findings: Findings) -> list[tuple[Path, Path]]:
    """The images of a folder, each with the folder of its masks, which may not exist."""
    layout = _layout(root)
    if layout == "flat":
        images = images_below(root / _IMAGES)
        pairs = [
            (path, root / _MASKS / path.relative_to(root / _IMAGES).with_suffix(""))
            for path in images
        ]
        used = {masks.name for _, masks in pairs}
        for folder in _folders(root / _MASKS):
            if folder.name not in used and images_below(folder):
                why = f"masks of an image that is not in {root / _IMAGES}"
                findings.problem(str(folder), None, why, is_missing=True)
        return pairs
    pairs = []
    for folder in _folders(root) if layout == "nested" else ():
        images = images_below(folder / _IMAGES)
        if len(images) == 1:
            pairs.append((images[0], folder / _MASKS))
        elif images or (folder / _MASKS).is_dir():
            findings.problem(str(folder / _IMAGES), None, f"holds {len(images)} images, not one")
    return pairs


def _layout(root: Path) -> Literal["flat", "nested"] | None:
    """How the masks of a folder are arranged; None: it has none."""
    if (root / _IMAGES).is_dir() and _folders(root / _MASKS):
        return "flat"
    for folder in _folders(root):
        is_pair = (folder / _IMAGES).is_dir() and (folder / _MASKS).is_dir()
        if is_pair and len(images_below(folder / _IMAGES)) == 1 and images_below(folder / _MASKS):
            return "nested"
    return None


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    names = (n for n in sorted(os.listdir(root)) if not n.startswith((".", "__MACOSX")))
    return [root / name for name in names if (root / name).is_dir()]


def _add_mask(file: Path, name: str, image: AnnotatedImage, drawings: Drawings) -> None:
    try:
        array = read_image(str(file))
    except (OSError, ValueError) as error:
        drawings.findings.problem(str(file), None, str(error).removeprefix(f"{file} "))
        return
    if array.ndim == 3:
        # Transparency says nothing; a mask in colours is black and one colour.
        colours = array[..., : 1 if array.shape[2] == 2 else 3]
        array = colours.max(axis=2)
    if array.shape != (image.height, image.width):
        why = (
            f"has {array.shape[1]} x {array.shape[0]} pixels, but its image {image.path} has "
            f"{image.width} x {image.height}"
        )
        drawings.findings.problem(str(file), None, why)
        return
    if file.suffix.lower() in _LOSSY:
        array = array > 127
    else:
        values = np.unique(array)
        if len(values) > 2 or (len(values) == 2 and values[0] != 0):
            why = (
                f"has {len(values)} values ({', '.join(map(str, values[:4].tolist()))}, ...): a "
                "mask of one object has 0 and one other; is it a label map?"
            )
            drawings.findings.problem(str(file), None, why)
            return
    drawings.add_mask(image, name, array > 0, (0, 0), str(file), None)


def _recognise(root: Path) -> str | None:
    if root.is_file():
        return None
    if _layout(root) is not None:
        return f"a folder {_MASKS} with a file an object"
    for folder in _folders(root):
        if _layout(folder) is not None:
            return f"a folder {_MASKS} with a file an object in {folder.name}"
    return None


MASK_FILES = AnnotationFormat("mask_files", "one mask file an object", read_mask_files, _recognise)
