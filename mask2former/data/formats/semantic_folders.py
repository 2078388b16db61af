"""Reads folders of images and label maps of the same names.

Files are paired by their names without extension. A stated extension comes first; files of other
image formats complete it, so that a folder of .jpg and .png is read whole. Folders that have no
image themselves are read with all below them. An image without label
map and a label map without image are problems: the data is not what its owner thinks.
"""

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from detectron2.utils.file_io import PathManager

from ...utils.files import list_names
from .findings import Findings
from .images import read_image

IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp")

# Label maps read before training, to notice what all of them have in common.
_NUM_SAMPLES = 16


# File name extensions, with or without dot, or whole ends of names such as "_mask.png".
Extensions = Sequence[str]


def read_semantic_folders(
    image_root: str,
    label_root: str,
    findings: Findings,
    image_ext: str | Extensions | None = None,
    label_ext: str | Extensions | None = None,
) -> list[tuple[str, str]]:
    """List the pairs of images and label maps, in the order of their names.

    Args:
        image_root, label_root: the folders.
        findings: gets files without partner, and doubtful ones.
        image_ext, label_ext: extensions of the files, with or without dot; None: any image format.

    Returns:
        (image, label map) of each pair.
    """
    stated = [_listed(image_ext), _listed(label_ext)]
    # In one folder, extensions alone tell labels from images.
    labels_only = stated[1] if _is_same_folder(image_root, label_root) else []
    images = _files_by_stem(image_root, stated[0], "images", findings, leave_out=labels_only)
    labels = _files_by_stem(
        label_root, stated[1], "label maps", findings, read_others=not labels_only
    )
    if images is None or labels is None:
        return []
    for files, others, extensions, lacks in (
        (images, labels, stated[0], f"the image has no label map in {label_root}"),
        (labels, images, stated[1], f"the label map has no image in {image_root}"),
    ):
        for stem in sorted(files.keys() - others.keys()):
            if extensions and not _has_extension(files[stem], extensions):
                why = f"{lacks}, and not the extension {' or '.join(extensions)}: not used"
                findings.warn(files[stem], None, why)
            else:
                findings.problem(files[stem], None, lacks, is_missing=True)
    common = sorted(images.keys() & labels.keys())
    for files, extensions in ((images, stated[0]), (labels, stated[1])):
        unstated = [files[s] for s in common if not _has_extension(files[s], extensions)]
        if unstated and extensions:
            why = (
                f"is read, but has not the extension {' or '.join(extensions)} ({len(unstated)} "
                "such files)"
            )
            findings.warn(unstated[0], None, why)
    return [(images[stem], labels[stem]) for stem in common]


def _is_same_folder(one: str, other: str) -> bool:
    return os.path.isdir(one) and os.path.isdir(other) and os.path.samefile(one, other)


def list_files(folder: str) -> list[str]:
    """The files of a folder, or if no image is among them, of all folders below it.

    Returns:
        Paths relative to the folder, sorted. Links to nothing are left out.
    """
    names = sorted(list_names(folder))
    if any(name.lower().endswith(IMAGE_EXTENSIONS) for name in names) or not os.path.isdir(folder):
        return names
    return [
        os.path.relpath(os.path.join(path, name), folder)
        for path, name in _walk(folder)
        if os.path.isfile(os.path.join(path, name))
    ] or names


def _walk(folder: str) -> Iterator[tuple[str, str]]:
    """Yield folder and name of all files below a folder, in a fixed order."""
    seen: set[str] = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(names):
            yield path, name


def _listed(extensions: str | Extensions | None) -> list[str]:
    if extensions is None:
        return []
    return [extensions] if isinstance(extensions, str) else list(extensions)


def _files_by_stem(
    folder: str,
    extensions: Extensions,
    what: str,
    findings: Findings,
    *,
    leave_out: Extensions = (),
    read_others: bool = True,
) -> dict[str, str] | None:
    """Name without extension → path; those with a stated extension win.

    Args:
        folder, extensions, what, findings: see `read_semantic_folders`.
        leave_out: extensions of files that are something else.
        read_others: whether images that have no stated extension are read, too.
    """
    if not PathManager.isdir(folder):
        why = f"the folder of the {what} does not exist"
        findings.problem(folder, None, why, is_missing=True)
        return None
    # macOS writes ._NAME beside files on other disks; such a file is no image.
    names = [n for n in list_files(folder) if not os.path.basename(n).startswith("._")]
    names = [name for name in names if not _has_extension(name, leave_out)]
    for name in sorted(_links_to_nothing(folder, names)):
        why = "is a link to a file that does not exist, or no file"
        findings.problem(os.path.join(folder, name), None, why, is_missing=True)
    stated = {name for name in names if _has_extension(name, extensions)}
    others = [name for name in names if read_others and name.lower().endswith(IMAGE_EXTENSIONS)]
    files: dict[str, str] = {}
    for group in (sorted(stated), [name for name in others if name not in stated]):
        found: dict[str, str] = {}
        for name in group:
            stem = _stem(name, extensions) if name in stated else os.path.splitext(name)[0]
            first = found.setdefault(stem, name)
            if first != name and stem not in files:
                why = f"has the same name without extension as {first}: remove or rename one"
                findings.problem(os.path.join(folder, name), None, why)
        for stem, name in found.items():
            files.setdefault(stem, os.path.join(folder, name))
    return files


def _links_to_nothing(folder: str, names: Iterable[str]) -> set[str]:
    present = {*names}
    is_flat = not any(os.sep in name for name in present)
    listed = (
        set(PathManager.ls(folder))
        if is_flat
        else {os.path.relpath(os.path.join(path, name), folder) for path, name in _walk(folder)}
    )
    return {
        name
        for name in listed - present
        if name.lower().endswith(IMAGE_EXTENSIONS)
        and not os.path.isfile(os.path.join(folder, name))
    }


def _has_extension(name: str, extensions: Extensions) -> bool:
    return name.lower().endswith(tuple(name_end(e).lower() for e in extensions))


def name_end(extension: str) -> str:
    """What names of files with an extension end with: a dot and it, or "_mask.png" as it is."""
    return extension if extension.startswith(("_", "-", " ")) else f".{extension.lstrip('.')}"


def _stem(name: str, extensions: Extensions) -> str:
    """A file name without its stated extension, of which the longest counts."""
    longest = max(len(name_end(e)) for e in extensions if _has_extension(name, [e]))
    return name[:-longest]


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
