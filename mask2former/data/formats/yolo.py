"""Reads polygons of YOLO (Ultralytics, Roboflow, CVAT, Label Studio): one text file an image.

    data.yaml     path, train, val, test: folders or lists of images; names, nc: the classes
    images/…      a.jpg
    labels/…      a.txt: a line an object, `class x1 y1 x2 y2 ...` in fractions of width and height

- The label file of an image is in the folder `labels` in place of `images`, or else beside it. An
  image without label file, or with an empty one, has no objects.
- `train`, `val` and `test` may each be a folder, a list of folders, or a text file with the images.
  They are relative to `path`, which is relative to data.yaml; a path that no longer fits, as in
  exports of Roboflow and on other machines, is looked for in the folder of data.yaml.
- Four numbers after the class are a box, which has no mask, and refused, unless it is read with
  `ReadOptions.boxes_as_masks`.
- Without data.yaml, the folders `images` and `labels` are read: with classes.txt (Label Studio), or
  with `ReadOptions.classes` (data of Ultralytics, whose YAML is in their package). Splits are the
  folders in `images`, or those that hold `images` and `labels`.

`ReadOptions.split` is train, val or test; `classes` names the classes of data without names.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config_file import load_plain_yaml
from .annotated_images import AnnotatedImage, AnnotatedImages, AnnotationFormat, ReadOptions
from .drawings import Drawings, rectangle
from .masks import is_polygon
from .other_formats import is_yolo_label
from .semantic_folders import IMAGE_EXTENSIONS
from .splits import choose_split, files_below, images_below

_SPLITS = ("train", "val", "valid", "test")
_IMAGES, _LABELS = "images", "labels"
# Label files, of which many may be empty, and their first bytes that are read to recognise them.
_NUM_TRIED, _HEAD = 100, 4096
# Text files beside labels that are none.
_NO_LABELS = ("classes.txt", "notes.txt", "readme.txt", "predefined_classes.txt", "obj.names")


@dataclass
class _Config:
    """What data.yaml says, or the folders without it.

    Attributes:
        file: data.yaml or classes.txt, or the folder without either.
        classes: by label.
        splits: name → folders or files, as written.
        bases: folders to which they may be relative, the most likely first.
    """

    file: Path
    classes: list[str]
    splits: dict[str, list[str]]
    bases: list[Path]


def read_yolo(root: Path, options: ReadOptions) -> AnnotatedImages:
    """Read one split; see the module.

    Args:
        root: data.yaml or its folder.
        options: `split`, `classes`, `boxes_as_masks` and `image_root`, to which the paths are then
            relative.

    Raises:
        FileNotFoundError, ValueError: naming file and line.
    """
    config = _read_config(root, options)
    entries = choose_split(config.splits, options.split, config.file)
    drawings = Drawings("YOLO")
    images: list[tuple[Path, str]] = []
    folders: list[Path] = []
    lists: list[Path] = []
    for entry in entries:
        path = _resolve(entry, config)
        if path.is_dir():
            folders.append(path)
            images += [(file, str(path)) for file in images_below(path)]
        elif path.suffix.lower() in IMAGE_EXTENSIONS:
            images.append((path, str(config.file)))
        else:
            lists.append(path)
            images += _listed_images(path, config)
    if not images:
        listed = ", ".join(str(_resolve(entry, config)) for entry in entries)
        raise ValueError(f"{config.file}: there are no images in {listed}.")
    if options.image_root is None:
        labels = [_label_file(path) for path, _ in images]
    else:
        labels = _labels_elsewhere([path for path, _ in images], options.image_root, config)
    if not any(label.is_file() for label in labels):
        raise FileNotFoundError(
            f"{config.file}: none of the {len(images)} images has a label file; that of "
            f"{images[0][0]} would be {labels[0]}."
        )
    unlabelled = []
    for (path, source), label in zip(images, labels, strict=True):
        image = drawings.add_image(path, source)
        if not label.is_file():
            unlabelled.append(path)
        elif image is not None:
            _read_labels(label, image, config.classes, drawings, options.boxes_as_masks)
    if unlabelled:
        why = (
            f"has no label file, like {len(unlabelled) - 1} more of the {len(images)} images: it "
            "is taken to have no objects, which an empty label file says without this warning"
        )
        drawings.findings.warn(str(unlabelled[0]), None, why)
    _find_orphans(folders, set(labels), drawings)
    content = drawings.finish(config.classes, boxes_as_masks=True)
    label_folders = {_label_file(folder / "x").parent for folder in folders}
    content.sources += [*folders, *lists, *{label.parent for label in labels} | label_folders]
    return content


def _labels_elsewhere(images: Sequence[Path], image_root: Path, config: _Config) -> list[Path]:
    """The label files of images that are stated apart: as if the images were beside data.yaml.

    Raises:
        ValueError: no image is in `image_root`.
    """
    root = Path(os.path.abspath(image_root))
    bases = [base for base in config.bases if base != image_root]
    labels, num_inside = [], 0
    for image in images:
        candidates = [_label_file(image)]
        absolute = Path(os.path.abspath(image))
        if absolute.is_relative_to(root):
            num_inside += 1
            inside = absolute.relative_to(root)
            candidates = [_label_file(base / inside) for base in bases] + candidates
        labels.append(next((file for file in candidates if file.is_file()), candidates[0]))
    if not num_inside:
        raise ValueError(
            f"IMAGE_ROOT is {image_root}, but none of the {len(images)} images of {config.file} is "
            f"there, such as {images[0]}."
        )
    return labels


# ---- data.yaml ----


def _read_config(root: Path, options: ReadOptions) -> _Config:
    file = root if root.is_file() else _find_config(root)
    bases = [] if options.image_root is None else [options.image_root]
    if file is None or file.suffix == ".txt":
        given = options.label_names(root) if file is None else None
        return _config_of_folders(root, file, given, bases)
    content = _load(file)
    splits = {}
    for name in _SPLITS:
        value = content.get(name)
        if value in (None, "", []):
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in values):
            raise ValueError(f"{file}: {name} is {value!r}; it must be a path or a list of paths.")
        splits[name] = values
    if not splits:
        raise ValueError(f"{file} names no images: it has none of the keys train, val and test.")
    if "kpt_shape" in content:
        raise ValueError(f"{file} has kpt_shape: it describes poses, which have no masks.")
    given = options.label_names(file) if content.get("names") is None else None
    classes = _classes(content, file, given)
    stated = content.get("path")
    if isinstance(stated, str) and stated:
        stated_path = Path(os.path.expanduser(stated))
        # YAML files of Ultralytics name their folder in that of all data sets.
        bases += [file.parent / stated_path, stated_path, file.parent / stated_path.name]
    bases += [file.parent, file.parent.parent]
    return _Config(file, classes, splits, bases)


def _config_of_folders(
    root: Path, file: Path | None, given: Sequence[str] | None, bases: list[Path]
) -> _Config:
    """What the folders say where there is no data.yaml.

    Args:
        root: the folder.
        file: classes.txt; None: there is none.
        given: the classes without classes.txt.
        bases: see `_Config`.
    """
    splits = _folder_splits(root)
    if not splits:
        raise FileNotFoundError(
            f"{root} holds no data.yaml with 'names' and 'train', 'val' or 'test', and no folders "
            "images and labels."
        )
    if file is not None:
        names = file.read_text(encoding="utf-8-sig").splitlines()
        classes = _class_names([name.strip() for name in names if name.strip()], file)
    elif given is not None:
        classes = _class_names(given, root)
    else:
        raise ValueError(
            f"{root} has no data.yaml and no classes.txt: name all classes in CLASSES, in the "
            "order of their labels from 0 on."
        )
    return _Config(root if file is None else file, classes, splits, [*bases, root])


def _folder_splits(root: Path) -> dict[str, list[str]]:
    """The folders of images that have labels: of each split, or of one that has no name."""
    if (root / _IMAGES).is_dir() and (root / _LABELS).is_dir():
        inner = [path.name for path in sorted((root / _IMAGES).glob("*/"))]
        named = [name for name in inner if (root / _LABELS / name).is_dir()]
        # Images that are in none of them belong to no split.
        is_split = named == inner and not any(
            path.suffix.lower() in IMAGE_EXTENSIONS for path in (root / _IMAGES).iterdir()
        )
        if named and is_split:
            return {name: [f"{_IMAGES}/{name}"] for name in named}
        return {"train": [_IMAGES]}
    names = [path.parent.name for path in sorted(root.glob(f"*/{_IMAGES}/"))]
    return {name: [f"{name}/{_IMAGES}"] for name in names if (root / name / _LABELS).is_dir()}


def _load(file: Path) -> dict[str, Any]:
    try:
        content = load_plain_yaml(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} has no KEY: VALUE entries at its top level.")
    return content


def _find_config(root: Path) -> Path | None:
    """data.yaml or classes.txt in a folder; None: neither."""
    found = []
    for file in sorted((*root.glob("*.yaml"), *root.glob("*.yml"))):
        try:
            content = _load(file)
        except ValueError:
            if file.stem == "data":
                raise
            continue  # of another program
        if ("names" in content or "nc" in content) and any(key in content for key in _SPLITS):
            found.append(file)
    if len(found) > 1:
        named = [file for file in found if file.stem in ("data", "dataset")]
        if len(named) != 1:
            listed = ", ".join(str(file) for file in found)
            raise ValueError(
                f"{root} has several files that describe YOLO data ({listed}): name one."
            )
        found = named
    if found:
        return found[0]
    if _folder_splits(root):
        for file in (root / "classes.txt", root / _LABELS / "classes.txt"):
            if file.is_file():
                return file
    return None


def _classes(content: dict[str, Any], file: Path, given: Sequence[str] | None) -> list[str]:
    names, number = content.get("names"), content.get("nc")
    if isinstance(names, dict):
        keys = sorted(int(key) if str(key).isdigit() else -1 for key in names)
        if keys != list(range(len(keys))):
            raise ValueError(f"{file}: the keys of names must be 0 to {len(keys) - 1}.")
        names = [value for _, value in sorted(names.items(), key=lambda item: int(item[0]))]
    if names is None and given is not None:
        names = list(given)
    if names is None and isinstance(number, int):
        names = [f"class_{i}" for i in range(number)]
    if not isinstance(names, list):
        raise ValueError(f"{file} has no list of class names 'names'.")
    if number is not None and number != len(names):
        raise ValueError(f"{file}: nc is {number}, but there are {len(names)} names.")
    return _class_names(names, file)


def _class_names(names: Sequence[Any], file: Path) -> list[str]:
    for name in names:
        if not isinstance(name, str | int | float) or isinstance(name, bool) or name == "":
            raise ValueError(
                f"{file}: a class is named {name!r}. YAML reads words such as yes, no, on and off "
                "as true or false: quote them."
            )
    texts = [str(name) for name in names]
    repeated = [name for name in texts if texts.count(name) > 1]
    if repeated or not texts:
        what = f"names the class {repeated[0]!r} more than once" if repeated else "names no class"
        raise ValueError(f"{file} {what}.")
    return texts


def _resolve(entry: str, config: _Config) -> Path:
    """The folder or file of a split."""
    stated = entry.replace("\\", "/")
    tried: list[Path] = []
    for text in _shortened(stated):
        for base in config.bases:
            path = Path(os.path.normpath(base / os.path.expanduser(text)))
            if path.exists():
                return path
            tried.append(path)
    listed = ", ".join(map(str, dict.fromkeys(tried[:3])))
    raise FileNotFoundError(f"{config.file} names {entry!r}, which does not exist; tried {listed}.")


def _shortened(stated: str) -> list[str]:
    """A path, and what remains of it in another place; never one folder alone."""
    parts = [part for part in stated.split("/") if part not in ("", ".", "..")]
    rest = ["/".join(parts[i:]) for i in range(max(len(parts) - 1, 1))]
    # Roboflow writes ../train/images for the folder train beside data.yaml.
    first = [rest[0]] if stated.startswith("..") else []
    return list(dict.fromkeys((*first, stated, *rest)))


def _listed_images(file: Path, config: _Config) -> list[tuple[Path, str]]:
    images = []
    lines = file.read_text(encoding="utf-8-sig").splitlines()
    bases = list(dict.fromkeys((file.parent, *config.bases)))
    for number, line in enumerate(lines, 1):
        stated = line.strip().replace("\\", "/")
        if not stated:
            continue
        candidates = [Path(os.path.normpath(b / t)) for t in _shortened(stated) for b in bases]
        path = next((path for path in candidates if path.is_file()), candidates[0])
        images.append((path, f"{file}, line {number}"))
    return images


# ---- labels ----


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == _IMAGES:
            parts[i] = _LABELS
            break
    return Path(*parts).with_suffix(".txt")


def _read_labels(
    file: Path,
    image: AnnotatedImage,
    classes: Sequence[str],
    drawings: Drawings,
    boxes_as_masks: bool,
) -> None:
    name = str(file)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        drawings.findings.problem(name, None, f"cannot be read: {error}")
        return
    width, height = image.width, image.height
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        where = f"line {number}"
        try:
            label, *values = map(float, words)
        except ValueError:
            why = f"{line[:60]!r} is no list of numbers"
            drawings.findings.problem(name, where, why)
            continue
        if not 0 <= label < len(classes) or label != int(label):
            why = f"the class {words[0]} is not one of the {len(classes)}, which count from 0"
            drawings.findings.problem(name, where, why)
        elif len(values) == 4 and boxes_as_masks:
            x, y, box_width, box_height = values
            left, right = (x - box_width / 2) * width, (x + box_width / 2) * width
            top, bottom = (y - box_height / 2) * height, (y + box_height / 2) * height
            corners = rectangle(left, top, right, bottom)
            drawings.add_polygon(image, classes[int(label)], corners, name, where, is_box=True)
        elif len(values) in (4, 5):
            why = (
                f"{len(values)} numbers after the class are a box, which has no mask; export "
                "polygons (YOLO segmentation), which have at least 6"
            )
            if len(values) == 4:
                why += ". If each box is to be the mask of its object, set BOXES_AS_MASKS: True"
            drawings.findings.problem(name, where, why)
        elif not is_polygon(values):
            why = f"{len(values)} numbers after the class; a polygon is x1 y1 x2 y2 x3 y3 ..."
            drawings.findings.problem(name, where, why)
        else:
            values[::2] = [value * width for value in values[::2]]
            values[1::2] = [value * height for value in values[1::2]]
            drawings.add_polygon(image, classes[int(label)], values, name, where)


def _find_orphans(folders: Sequence[Path], used: set[Path], drawings: Drawings) -> None:
    """Label files without image, which are objects that would be lost."""
    for folder in folders:
        labels = _label_file(folder / "x").parent
        if labels == folder or not labels.is_dir():
            continue
        for file in files_below(labels, ".txt"):
            if file not in used and file.name.lower() not in _NO_LABELS and file.stat().st_size:
                why = f"has no image of its name in {folder}"
                drawings.findings.problem(str(file), None, why, is_missing=True)


def _recognise(root: Path) -> str | None:
    if root.is_file():
        if root.suffix.lower() not in (".yaml", ".yml"):
            return None
        try:
            content = _load(root)
        except ValueError:
            return None
        is_yolo = "names" in content and any(key in content for key in _SPLITS)
        return f"{root.name} with names and images" if is_yolo else None
    file = _find_config(root)
    if file is not None:
        return f"{file.name} of YOLO"
    for (entry,) in _folder_splits(root).values():
        labels = _label_file(root / entry / "x").parent
        for label in files_below(labels, ".txt")[:_NUM_TRIED]:
            with label.open("rb") as stream:
                if is_yolo_label(stream.read(_HEAD)):
                    return "labels of YOLO without data.yaml"
    return None


YOLO = AnnotationFormat("yolo", "YOLO polygons with data.yaml", read_yolo, _recognise)
