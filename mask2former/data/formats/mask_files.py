"""Reads one mask file an object, as in the Data Science Bowl 2018, or one an image, as Penn-Fudan.

    ID/images/ID.png  and  ID/masks/*.png               a folder an image
    images/ID.png     and  masks/ID/*.png               or the images in one folder
    images/ID.png     and  MASK_ROOT/ID_mask.png        `mask_root` is stated
    PNGImages/ID.png  and  PedMasks/ID_mask.png         Penn-Fudan

- A mask has the size of its image; all that is not black is the object. A file with more than two
  values is a label map, not a mask, and refused (but for JPEG, whose values are rounded at half).
- Folders in the folder of the masks of an image are classes: `masks/ID/cell/1.png`. Without them
  all objects are of the one class in `ReadOptions.classes`, or else of the class `object`.
- An image without masks has no objects. A mask without image is a mistake.
- With `ReadOptions.mask_root`, the names of masks begin with that of their image (`ID.png`,
  `ID_mask.png`, `ID_2.png`, `ID/2.png`). Each value of a mask but 0, or colour but black, is an
  object. All objects are of one class. Label maps with classes are TYPE: semantic, not this.

`ReadOptions.split` is the name of a folder, such as stage1_train; `image_root` is the folder of the
images in place of `images`.
"""

import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from .annotated_images import AnnotatedImage, AnnotatedImages, AnnotationFormat, ReadOptions
from .drawings import Drawings
from .findings import Findings
from .images import read_image
from .splits import images_below, split_folder, split_folders

_IMAGES, _MASKS = "images", "masks"
_PENN_FUDAN = ("PNGImages", "PedMasks")
# What 8 bits hold besides object numbers: borders, and the inside of smoothed masks.
_VOID = 255
_ONE_CLASS = "object"
_LOSSY = (".jpg", ".jpeg", ".webp")


def read_mask_files(root: Path, options: ReadOptions) -> AnnotatedImages:
    """Read the images of a folder; see the module.

    Args:
        root: the folder.
        options: `split`, `classes`, `image_root` and `mask_root`.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    mask_root = options.mask_root or (root / _PENN_FUDAN[1] if _is_penn_fudan(root) else None)
    if mask_root is not None:
        return _read_numbered(root, mask_root, options)
    if options.image_root is not None:
        raise ValueError(
            f"IMAGE_ROOT is {options.image_root}, but masks are found by the folders {_IMAGES} and "
            f"{_MASKS} of {root}: state MASK_ROOT, too, or leave IMAGE_ROOT out."
        )
    folder = split_folder(root, options.split)
    drawings = Drawings("mask files")
    pairs = _pairs(folder, drawings.findings)
    if not pairs:
        drawings.findings.raise_first(is_data=False)
        inner = [path.name for path in _folders(folder) if _layout(path) is not None]
        hint = f" Its folder {inner[0]} has: state it as SPLIT." if inner else ""
        raise FileNotFoundError(
            f"{folder} has neither folders with an image in {_IMAGES} and its masks in {_MASKS}, "
            f"nor images in {_IMAGES} and their masks in {_MASKS}/NAME.{hint} Masks in one folder, "
            "whose names begin with that of their image, are read if it is stated as MASK_ROOT "
            "(with IMAGE_ROOT); label maps with classes are TYPE: semantic."
        )
    # All parts of the data must agree on the classes.
    parts = split_folders(root).values() if options.split is not None else ()
    all_pairs = [*pairs, *(pair for part in parts for pair in _pairs(part, Findings()))]
    folders = {path.name for _, masks in all_pairs for path in _folders(masks)}
    classes = sorted(folders) or [_one_class(options.classes)]
    # Nothing is shown where the output is no terminal.
    without = []
    for path, masks in tqdm(pairs, desc="mask files", disable=None):
        image = drawings.add_image(path, str(path))
        files = images_below(masks)
        if not files:
            without.append(path)
        for file in files if image is not None else ():
            inner_folders = file.relative_to(masks).parts[:-1]
            if not folders:
                _add_mask(file, classes[0], image, drawings)
            elif inner_folders:
                _add_mask(file, inner_folders[0], image, drawings)
            else:
                why = "the mask is in no folder of a class, but others are"
                drawings.findings.problem(str(file), None, why)
    if without:
        why = f"has no mask, like {len(without) - 1} more of the {len(pairs)} images: no objects"
        drawings.findings.warn(str(without[0]), None, why)
    return drawings.finish(classes)


# ---- masks with the numbers of objects ----


def _is_penn_fudan(root: Path) -> bool:
    return all((root / name).is_dir() for name in _PENN_FUDAN)


def _read_numbered(root: Path, mask_root: Path, options: ReadOptions) -> AnnotatedImages:
    """Read masks whose names begin with that of their image; see the module.

    Args:
        root: the folder.
        mask_root: of the masks.
        options: see `read_mask_files`.
    """
    image_root = options.image_root or root / _PENN_FUDAN[0]
    if not image_root.is_dir():
        image_root = root / _IMAGES
    if not image_root.is_dir():
        raise FileNotFoundError(f"{image_root} does not exist: state the images as IMAGE_ROOT.")
    image_folder = split_folder(image_root, options.split)
    mask_folder = split_folder(mask_root, options.split)
    if image_folder.samefile(mask_folder):
        raise ValueError(
            f"MASK_ROOT {mask_folder} is also the folder of the images: move the masks to another."
        )
    drawings = Drawings("mask files")
    paths: dict[str, Path] = {}
    for path in images_below(image_folder):
        if (first := paths.setdefault(_stem(path, image_folder), path)) != path:
            why = f"has the same name without extension as {first}: remove or rename one"
            drawings.findings.problem(str(path), None, why)
    masks_of: dict[str, list[Path]] = {stem: [] for stem in paths}
    for file in images_below(mask_folder):
        stem = _image_of(_stem(file, mask_folder), paths)
        if stem is None:
            why = f"is a mask, but its name begins with that of no image in {image_folder}"
            drawings.findings.problem(str(file), None, why, is_missing=True)
        else:
            masks_of[stem].append(file)
    without = [path for stem, path in paths.items() if not masks_of[stem]]
    if paths and len(without) == len(paths):
        why = f"no image has a mask in {mask_folder} whose name begins with that of the image"
        drawings.findings.problem(str(image_folder), None, why, is_missing=True)
    elif without:
        why = f"has no mask in {mask_folder}, like {len(without) - 1} more images: no objects"
        drawings.findings.warn(str(without[0]), None, why)
    classes = [_one_class(options.classes)]
    for stem, path in tqdm(paths.items(), desc="mask files", disable=None):
        image = drawings.add_image(path, str(path))
        for file in masks_of[stem] if image is not None else ():
            _add_numbered(file, classes[0], image, drawings)
    return drawings.finish(classes)


def _stem(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()


def _image_of(name: str, stems: Collection[str]) -> str | None:
    """The longest of the stems with which the name of a mask begins, up to the end of a word."""
    for end in range(len(name), 0, -1):
        if name[:end] in stems and not name[end : end + 1].isalnum():
            return name[:end]
    return None


def _add_numbered(file: Path, name: str, image: AnnotatedImage, drawings: Drawings) -> None:
    """Add the objects that the values of a mask number."""
    array = _read_pixels(file, image, drawings)
    if array is None:
        return
    if file.suffix.lower() in _LOSSY:
        array = ((array if array.ndim == 2 else array.max(axis=2)) > 127).astype(np.uint8)
    elif array.ndim == 3:
        channels = array.astype(np.int64)
        array = channels[..., 0] << 16 | channels[..., 1] << 8 | channels[..., 2]
    values, inverse = np.unique(array, return_inverse=True)
    if array.dtype == np.uint8 and values[-1] == _VOID and np.count_nonzero(values) > 1:
        why = (
            f"has {len(values)} values, among them {_VOID}: borders or a smoothed mask, not "
            "numbers of objects; save the numbers without it, or with 16 bits"
        )
        drawings.findings.problem(str(file), None, why)
        return
    numbers = (inverse.reshape(array.shape) + (values[0] != 0)).astype(np.int32)
    for i, region in enumerate(ndimage.find_objects(numbers), 1):
        if region is not None:
            rows, columns = region
            where = f"value {values[i - (values[0] != 0)]}"
            corner = columns.start, rows.start
            drawings.add_mask(image, name, numbers[region] == i, corner, str(file), where)


# ---- one mask an object ----


def _one_class(given: Sequence[str] | None) -> str:
    if given is not None and len(given) != 1:
        raise ValueError(
            f"CLASSES has {', '.join(given)}, but the masks are not in folders of classes; give "
            "one class."
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


def _read_pixels(file: Path, image: AnnotatedImage, drawings: Drawings) -> np.ndarray | None:
    """The values (h, w) or colours (h, w, 3) of a mask; None if they cannot be used: a problem."""
    try:
        array = read_image(str(file))
    except (OSError, ValueError) as error:
        drawings.findings.problem(str(file), None, str(error).removeprefix(f"{file} "))
        return None
    if array.shape[:2] != (image.height, image.width):
        why = (
            f"has {array.shape[1]} x {array.shape[0]} pixels, but its image {image.path} has "
            f"{image.width} x {image.height}"
        )
        drawings.findings.problem(str(file), None, why)
        return None
    if array.ndim == 3:
        # Transparency says nothing.
        array = array[..., 0] if array.shape[2] == 2 else array[..., :3]
    return array


def _add_mask(file: Path, name: str, image: AnnotatedImage, drawings: Drawings) -> None:
    array = _read_pixels(file, image, drawings)
    if array is None:
        return
    if array.ndim == 3:
        array = array.max(axis=2)  # a mask in colours is black and one colour
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
    if _is_penn_fudan(root):
        return f"masks with the numbers of objects in {_PENN_FUDAN[1]}, as in Penn-Fudan"
    if _layout(root) is not None:
        return f"a folder {_MASKS} with a file an object"
    for folder in _folders(root):
        if _layout(folder) is not None:
            return f"a folder {_MASKS} with a file an object in {folder.name}"
    return None


MASK_FILES = AnnotationFormat("mask_files", "mask files of objects", read_mask_files, _recognise)
