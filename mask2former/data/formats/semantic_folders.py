"""Reads folders of images and label maps of the same names.

Files are paired by their names without extension. The stated extension comes first; files of other
image formats complete it, so that a folder of .jpg and .png is read whole. An image without label
map and a label map without image are problems: the data is not what its owner thinks.
"""

import os
from collections.abc import Iterable, Sequence

import numpy as np
from detectron2.utils.file_io import PathManager

from ...utils.files import list_names
from .findings import Findings
from .images import read_image

IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp")

# Label maps read before training, to notice what all of them have in common.
_NUM_SAMPLES = 16


def read_semantic_folders(
    image_root: str,
    label_root: str,
    findings: Findings,
    image_ext: str | None = None,
    label_ext: str | None = None,
) -> list[tuple[str, str]]:
    """List the pairs of images and label maps, in the order of their names.

    Args:
        image_root, label_root: the folders.
        findings: gets files without partner, and doubtful ones.
        image_ext, label_ext: extension of the files, with or without dot; None: any image format.

    Returns:
        (image, label map) of each pair.
    """
    images = _files_by_stem(image_root, image_ext, "images", findings)
    labels = _files_by_stem(label_root, label_ext, "label maps", findings)
    if images is None or labels is None:
        return []
    for stem in sorted(images.keys() - labels.keys()):
        why = f"the image has no label map in {label_root}"
        if image_ext is not None and not _has_extension(images[stem], image_ext):
            findings.warn(images[stem], None, f"{why}, and not the extension {image_ext}: not used")
        else:
            findings.problem(images[stem], None, why, is_missing=True)
    for stem in sorted(labels.keys() - images.keys()):
        why = f"the label map has no image in {image_root}"
        if label_ext is not None and not _has_extension(labels[stem], label_ext):
            findings.warn(labels[stem], None, f"{why}, and not the extension {label_ext}: not used")
        else:
            findings.problem(labels[stem], None, why, is_missing=True)
    pairs = [(images[stem], labels[stem]) for stem in sorted(images.keys() & labels.keys())]
    for files, extension in ((images, image_ext), (labels, label_ext)):
        used = [files[stem] for stem in sorted(images.keys() & labels.keys())]
        others = [f for f in used if extension is not None and not _has_extension(f, extension)]
        if others:
            why = f"is read, but has not the extension {extension} ({len(others)} such files)"
            findings.warn(others[0], None, why)
    return pairs


def _files_by_stem(
    folder: str, extension: str | None, what: str, findings: Findings
) -> dict[str, str] | None:
    """Name without extension → path; those with the stated extension win."""
    if not PathManager.isdir(folder):
        why = f"the folder of the {what} does not exist"
        findings.problem(folder, None, why, is_missing=True)
        return None
    present = list_names(folder)
    for name in sorted(set(PathManager.ls(folder)) - present):
        if name.lower().endswith(IMAGE_EXTENSIONS):
            why = "is a link to a file that does not exist, or no file"
            findings.problem(os.path.join(folder, name), None, why, is_missing=True)
    names = sorted(present)
    stated = [n for n in names if extension is not None and _has_extension(n, extension)]
    others = [n for n in names if n.lower().endswith(IMAGE_EXTENSIONS)]
    files: dict[str, str] = {}
    for name in (*stated, *others):
        stem = _stem(name, extension) if name in stated else os.path.splitext(name)[0]
        files.setdefault(stem, os.path.join(folder, name))
    return files


def _has_extension(name: str, extension: str) -> bool:
    return name.lower().endswith(f".{extension.lstrip('.').lower()}")


def _stem(name: str, extension: str) -> str:
    return name[: -len(extension.lstrip(".")) - 1]


def warn_of_one_class(
    label_maps: Sequence[str], classes: Sequence[str], ignore_label: int, findings: Findings
) -> None:
    """Warn if the label maps seem to use the ignore label for a class, such as masks of 0 and 255.

    Reads a few maps, spread over the data set.
    """
    step = max(1, len(label_maps) // _NUM_SAMPLES)
    sample = label_maps[::step][:_NUM_SAMPLES]
    values: set[int] = set()
    for file in sample:
        try:
            values |= set(np.unique(read_image(file)).tolist())
        except (OSError, ValueError):
            return  # the mapper names it
    if len(classes) > 1 and ignore_label in values and len(values) <= 2:
        hidden = [name for i, name in enumerate(classes) if i not in values]
        findings.warn(sample[0], None, hidden_classes(hidden, ignore_label))


def has_labelled_pixel(label_maps: Iterable[str], ignore_label: int | None) -> bool:
    """Whether a label map has another label than the ignore label.

    Reads label maps up to the first that has; one that cannot be read counts, and is named later.
    """
    for file in label_maps:
        try:
            if (read_image(file) != ignore_label).any():
                return True
        except (OSError, ValueError):
            return True
    return False


def hidden_classes(names: Iterable[str], ignore_label: int) -> str:
    """What to do about classes without a pixel, where others have the ignore label."""
    listed = ", ".join(map(repr, names))
    return (
        f"no pixel has the class {listed}, but some have the ignore label {ignore_label} and are "
        f"neither trained nor evaluated. If {ignore_label} is the label of a class, change the "
        "label maps, or IGNORE_LABEL and the order of CLASSES"
    )
