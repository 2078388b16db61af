"""Reads the segmentation of Pascal VOC, also as CVAT (Segmentation mask 1.1), LabelMe export it.

    JPEGImages/            a.jpg
    SegmentationClass/     a.png     the class of each pixel
    SegmentationObject/    a.png     the object of each pixel
    ImageSets/Segmentation/train.txt, val.txt, ...: names of images without extension
    labelmap.txt           `name:r,g,b::` a class (CVAT), the background included
    class_names.txt        a class a line (labelme2voc), the background first

- Label 0 is background. Label 255, the borders of objects and difficult ones, belongs to no object.
- The PNGs have one channel or a palette, whose values are the labels, or three channels with the
  colours of the palette of VOC. With labelmap.txt, colours of classes are those it states, and a
  label without colour is the number of its line from 0 on.
- Classes are those of labelmap.txt or class_names.txt, else `ReadOptions.classes`, the names of the
  labels from 1 on, else the 20 of VOC 2012; these, too, if `classes` lists all that remain of them.
- A listed image without PNGs has no objects if there is labelmap.txt, as CVAT exports it.
- Folders SegmentationClassPNG and SegmentationObjectPNG come before those of the names above, where
  older versions of LabelMe put arrays.

`ReadOptions.split` is the name of a list of images, such as train; `image_root` is a folder of
images in place of JPEGImages.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from .annotated_images import AnnotatedImage, AnnotatedImages, AnnotationFormat, ReadOptions
from .drawings import Drawings
from .findings import Findings
from .images import read_header, read_image
from .splits import ImageFinder, choose_split, warn_of_unlabelled

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()
_VOID = 255
_IMAGES, _CLASSES, _OBJECTS = "JPEGImages", "SegmentationClass", "SegmentationObject"
_LISTS = Path("ImageSets", "Segmentation")
_LABELMAP, _CLASS_NAMES = "labelmap.txt", "class_names.txt"
# Pixels of no class, and those that belong to nothing.
_BACKGROUND_INDEX, _VOID_INDEX = -1, -2
_BACKGROUND = "background"
# Share of an object's pixels that must have one class.
_MAIN_SHARE = 0.95
# Share of the pixels of classes that may belong to no object, at hand-drawn borders.
_STRAY_SHARE = 0.02
# What labels 0 and -1 are called in class_names.txt; -1 is 255 in the PNGs.
_FIRST_LABELS = ("__ignore__", "_background_", _BACKGROUND)

_Colour = tuple[int, int, int]


@dataclass(frozen=True)
class _Classes:
    """The classes, and how pixels tell them.

    Attributes:
        names: without the background.
        by_label: label → index in `names`, or one of the two above.
        by_colour: the same by colour; None: the palette of VOC tells the label.
    """

    names: list[str]
    by_label: dict[int, int]
    by_colour: dict[_Colour, int] | None


def read_voc(root: Path, options: ReadOptions) -> AnnotatedImages:
    """Read one list of images; see the module.

    Args:
        root: the folder with SegmentationObject, or one that holds only that, such as VOCdevkit.
        options: `split`, `classes` and `image_root`.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    root = _find_root(root)
    names = _listed_names(root, options.split)
    classes = _read_classes(root, options)
    finder = ImageFinder([options.image_root, root / _IMAGES, root / "images"], root / _IMAGES)
    drawings = Drawings("Pascal VOC")
    class_root, object_root = _folder(root, _CLASSES), _folder(root, _OBJECTS)
    may_be_empty = (root / _LABELMAP).is_file()
    has_no_lists = not any((root / _LISTS).glob("*.txt"))
    empty: list[Path] = []
    # Nothing is shown where the output is no terminal.
    for name, source in tqdm(names, desc="Pascal VOC", disable=None):
        file, class_file = object_root / f"{name}.png", class_root / f"{name}.png"
        try:
            path = finder.find(name)
            if may_be_empty and not file.exists() and not class_file.exists():
                empty.append(path)
                drawings.add_image(path, source)
                continue
            labels = _read_labels(class_file, classes)
            objects = _read_objects(file)
        except (FileNotFoundError, ValueError) as error:
            is_missing = isinstance(error, FileNotFoundError)
            missing = getattr(error, "filename", None)
            why = f"{missing} does not exist" if missing else str(error)
            drawings.findings.problem(source, name, why, is_missing=is_missing)
            continue
        if labels.shape != objects.shape:
            why = f"the PNGs of {_CLASSES} and {_OBJECTS} differ in size"
            drawings.findings.problem(source, name, why)
            continue
        image = drawings.add_image(path, str(file), size=objects.shape)
        if image is not None:
            _add_objects(objects, labels, classes.names, image, str(file), drawings)
            _find_pixels_without_object(objects, labels, str(file), drawings.findings)
    if empty:
        why = f"has no PNGs, like {len(empty) - 1} more listed images: no objects"
        drawings.findings.warn(str(empty[0]), None, why)
    content = drawings.finish(classes.names)
    if has_no_lists:
        folder = options.image_root or root / _IMAGES
        warn_of_unlabelled(folder, content, f"has no PNG in {object_root.name}")
    return content


def _find_pixels_without_object(
    objects: np.ndarray, labels: np.ndarray, file: str, findings: Findings
) -> None:
    """Pixels of a class that belong to no object would be background.

    Args:
        objects, labels: see `_add_objects`.
        file: of the objects.
        findings: where to add them.
    """
    labelled = labels >= 0
    lost = int(np.count_nonzero(labelled & (objects == 0)))
    why = f"has no object number in {lost} pixels that have a class in {_CLASSES}"
    if lost and not objects[labelled].any():
        findings.problem(file, None, f"{why}, which are all: it does not number the objects from 1")
    elif lost > _STRAY_SHARE * np.count_nonzero(labelled):
        findings.warn(file, None, f"{why}: they are background")


def _add_objects(
    objects: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    image: AnnotatedImage,
    file: str,
    drawings: Drawings,
) -> None:
    """Add the objects of an image.

    Args:
        objects: (h, w), number of the object, 0 for none.
        labels: (h, w), index of the class in `names`, or -1 or -2.
        names: of the classes.
        image, file, drawings: where to add them.
    """
    for i, region in enumerate(ndimage.find_objects(objects), 1):
        if region is None:
            continue
        mask = (objects[region] == i) & (labels[region] != _VOID_INDEX)
        found, counts = np.unique(labels[region][mask], return_counts=True)
        if not found.size:
            continue
        main = found[counts.argmax()]
        is_clear = counts.max() >= _MAIN_SHARE * counts.sum() and main != _BACKGROUND_INDEX
        if not is_clear or found.size > 1:
            listed = ", ".join(_BACKGROUND if j == _BACKGROUND_INDEX else names[j] for j in found)
            why = f"its pixels have the classes {listed} in {_CLASSES}"
        if not is_clear:
            drawings.findings.problem(file, f"object {i}", f"{why}; all must have one class")
            continue
        if found.size > 1:
            # Hand-drawn borders may stray by a pixel.
            drawings.findings.warn(file, f"object {i}", f"{why}; it is taken for {names[main]}")
        rows, columns = region
        corner = columns.start, rows.start
        drawings.add_mask(image, names[main], mask, corner, file, f"object {i}")


def _find_root(root: Path) -> Path:
    """The folder with SegmentationObject."""
    for folder in (root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))):
        if _folder(folder, _OBJECTS).is_dir() and _folder(folder, _CLASSES).is_dir():
            return folder
    for folder in (root, *sorted(root.glob("*/"))):
        if _folder(folder, _CLASSES).is_dir():
            raise FileNotFoundError(
                f"{folder} has {_CLASSES}, but no {_OBJECTS}: it has no objects. Read it as label "
                "images (TYPE: semantic)."
            )
    raise FileNotFoundError(f"{root} has no folder {_OBJECTS}.")


def _folder(root: Path, name: str) -> Path:
    """The folder of the PNGs of classes or objects, which may not exist."""
    pngs = root / f"{name}PNG"
    return pngs if pngs.is_dir() else root / name


def _listed_names(root: Path, split: str | None) -> list[tuple[str, str]]:
    """The names of the images, each with the file that lists it."""
    lists = {file.stem: file for file in sorted((root / _LISTS).glob("*.txt"))}
    if not lists:
        if split is not None:
            raise FileNotFoundError(f"{root / _LISTS} has no {split}.txt.")
        base = _folder(root, _OBJECTS)
        files = sorted(base.rglob("*.png"))
        return [(f.relative_to(base).with_suffix("").as_posix(), str(base)) for f in files]
    file = choose_split(lists, split, root / _LISTS)
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    return [(line.strip(), str(file)) for line in lines if line.strip()]


# ---- classes ----


def _voc_colours() -> dict[_Colour, int]:
    """Colour → label in the palette of VOC, which spreads the bits of a label over the channels."""
    colours = {}
    for label in range(256):
        channels = [0, 0, 0]
        for bit in range(8):
            channels[bit % 3] |= (label >> bit & 1) << (7 - bit // 3)
        colours[channels[0], channels[1], channels[2]] = label
    return colours


def _read_classes(root: Path, options: ReadOptions) -> _Classes:
    file = root / _LABELMAP
    if file.is_file():
        return _read_labelmap(file)
    names = _read_class_names(root / _CLASS_NAMES)
    if names is None:
        given = None if _are_of_voc(options) else options.label_names(root)
        names = list(VOC_CLASSES) if given is None else given
        what = "the 20 of Pascal VOC 2012" if given is None else "those of CLASSES"
        listed = ", ".join(f"{label} {name}" for label, name in enumerate(names, 1))
        logging.getLogger(__name__).info(
            f"{root} has neither {_LABELMAP} nor {_CLASS_NAMES}: the classes of its labels are "
            f"{what}: {listed}"
        )
    by_label = {i: i - 1 for i in range(1, len(names) + 1)}
    return _Classes(names, {_VOID: _VOID_INDEX, **by_label, 0: _BACKGROUND_INDEX}, None)


def _are_of_voc(options: ReadOptions) -> bool:
    """Whether classes are selected of those of VOC, rather than named in the order of labels."""
    rename = options.rename or {}
    new = {rename.get(name, name) for name in VOC_CLASSES} - {None}
    given = {rename.get(name, name) for name in options.classes or ()} - {None}
    return bool(given) and given <= new and ("*" in rename or new <= given)


def _read_class_names(file: Path) -> list[str] | None:
    """The classes of the labels from 1 on; None: the file does not exist."""
    if not file.is_file():
        return None
    names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    names = [name for name in names if name]
    first = next((i for i, name in enumerate(names) if name not in _FIRST_LABELS), len(names))
    if first == 0 or first == len(names):
        raise ValueError(
            f"{file} must name {_FIRST_LABELS[1]} first, the class of label 0, and then others."
        )
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"{file} names {repeated[0]!r} more than once.")
    return names[first:]


def _read_labelmap(file: Path) -> _Classes:
    names: list[str] = []
    by_label: dict[int, int] = {}
    # Black and the colour of the borders unless they are stated for classes.
    by_colour = {(0, 0, 0): _BACKGROUND_INDEX, (224, 224, 192): _VOID_INDEX}
    stated: set[_Colour] = set()
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        # A name may have a colon; three fields follow it.
        name, colour, *_ = [*text.rsplit(":", 3), "", ""]
        values = [value.strip() for value in colour.split(",")]
        if not name or name in names or not (colour == "" or len(values) == 3):
            problem = "repeats a class" if name in names else "is not `name:red,green,blue::`"
            raise ValueError(f"{file}, line {number}: {text!r} {problem}.")
        index = _BACKGROUND_INDEX if name == _BACKGROUND else len(names)
        by_label[len(by_label)] = index
        if index != _BACKGROUND_INDEX:
            names.append(name)
        if colour == "":
            continue
        if not all(value.isdigit() for value in values):
            raise ValueError(f"{file}, line {number}: {colour!r} is not a colour.")
        red, green, blue = map(int, values)
        if (red, green, blue) in stated:
            raise ValueError(f"{file}, line {number}: the colour {colour} is that of another line.")
        stated.add((red, green, blue))
        by_colour[red, green, blue] = index
    if not names:
        raise ValueError(f"{file} names no class.")
    return _Classes(names, {_VOID: _VOID_INDEX, **by_label}, by_colour if stated else None)


# ---- PNGs ----


def _read_labels(file: Path, classes: _Classes) -> np.ndarray:
    """The class (h, w) of each pixel: an index, or -1 or -2.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read, or has another label or colour.
    """
    has_palette = read_header(str(file)).mode == "P"
    if has_palette and classes.by_colour is not None:
        array = read_image(str(file), "RGB")
    else:
        array = read_image(str(file))
    if array.ndim == 2:
        return _mapped(array, classes.by_label, file, "label {}")
    colours = classes.by_colour
    if colours is None:
        labels = _voc_colours()
        colours = {c: classes.by_label[i] for c, i in labels.items() if i in classes.by_label}
    codes = {_code(colour): index for colour, index in colours.items()}
    return _mapped(_codes(array), codes, file, "colour #{:06x}")


def _mapped(array: np.ndarray, table: dict[int, int], file: Path, text: str) -> np.ndarray:
    values, inverse = np.unique(array, return_inverse=True)
    unknown = [value for value in values.tolist() if value not in table]
    if unknown:
        raise ValueError(f"{file} has the {text.format(unknown[0])}, which is that of no class")
    return np.array([table[v] for v in values.tolist()])[inverse].reshape(array.shape)


def _read_objects(file: Path) -> np.ndarray:
    """The number (h, w) of the object of each pixel, from 1 on; 0 for none.

    Raises:
        FileNotFoundError, ValueError: the file cannot be read.
    """
    array = read_image(str(file))
    if array.ndim == 2:
        void = array == _VOID if array.dtype == np.uint8 else np.zeros(array.shape, bool)
        return np.where(void, 0, array).astype(np.int64)
    codes = _codes(array)
    known = {_code(colour): label for colour, label in _voc_colours().items()}
    # Colours that are not in the palette number the objects, too.
    others = [code for code in np.unique(codes).tolist() if code not in known]
    table = known | {code: i for i, code in enumerate(others, 256)}
    return _mapped(codes, table | {_code((224, 224, 192)): 0}, file, "colour {}")


def _codes(array: np.ndarray) -> np.ndarray:
    """Colours (h, w, 3) as numbers (h, w)."""
    channels = array.astype(np.int64)
    return channels[..., 0] << 16 | channels[..., 1] << 8 | channels[..., 2]


def _code(colour: _Colour) -> int:
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def _recognise(root: Path) -> str | None:
    if root.is_file():
        return None
    for folder in (root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))):
        if _folder(folder, _OBJECTS).is_dir() and _folder(folder, _CLASSES).is_dir():
            return f"{_CLASSES} and {_OBJECTS}"
    return None


VOC = AnnotationFormat("voc", "segmentation of Pascal VOC", read_voc, _recognise)
