"""Finds the images that a program is given, and names the files that it writes for them."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".npy", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageFile:
    """An image to predict.

    Attributes:
        path: of the file.
        name: relative to the folder that was named; for a file that was named itself, its own name.
    """

    path: Path
    name: Path


def find_images(
    patterns: Sequence[str], *, recursive: bool = True, leave_out: Sequence[Path] = ()
) -> list[ImageFile]:
    """Find the images that patterns match, in order and without duplicates.

    Hidden files and folders in a folder are left out. Links to folders are followed, each folder is
    visited once.

    Args:
        patterns: files, folders or glob patterns (`**` for any folders); `~` is the home folder.
        recursive: whether to search subfolders of folders.
        leave_out: folders not to search, such as that of the outputs.

    Raises:
        FileNotFoundError: a pattern matches nothing.
    """
    excluded = {os.path.realpath(folder) for folder in leave_out}
    images: dict[str, ImageFile] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            # The folder itself may be the one of the outputs.
            others = excluded - {os.path.realpath(path)}
            files = list(_walk(path, recursive, others))
        elif path.is_file():
            files = [ImageFile(path, Path(path.name))]
        else:
            matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
            files = [ImageFile(match, Path(match.name)) for match in matches if match.is_file()]
            files = _with_folders(files)
        if not files:
            raise FileNotFoundError(f"--input {pattern}: no image file there")
        for image in files:
            images.setdefault(os.path.abspath(image.path), image)
    return list(images.values())


def _walk(root: Path, recursive: bool, excluded: set[str]) -> Iterator[ImageFile]:
    visited = set(excluded)
    folders = [root]
    while folders:
        folder = folders.pop()
        real = os.path.realpath(folder)
        if real in visited:  # a link to a folder above, or the outputs
            continue
        visited.add(real)
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
        for path in entries:
            if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
                yield ImageFile(path, path.relative_to(root))
        if recursive:
            folders += reversed([path for path in entries if path.is_dir()])


def _with_folders(images: list[ImageFile]) -> list[ImageFile]:
    """Name the matches of a glob pattern relative to their common folder, if they have several."""
    parents = {image.path.parent for image in images}
    if len(parents) < 2:
        return images
    common = Path(os.path.commonpath([os.path.abspath(parent) for parent in parents]))
    return [
        ImageFile(image.path, Path(os.path.abspath(image.path)).relative_to(common))
        for image in images
    ]


def stems_of(images: Sequence[ImageFile]) -> list[Path]:
    """The names of images without suffix, or with it where two would be the same.

    Raises:
        ValueError: two images have the same name, because they are of different folders.
    """
    counts = Counter(image.name.with_suffix("") for image in images)
    stems = [
        image.name if counts[image.name.with_suffix("")] > 1 else image.name.with_suffix("")
        for image in images
    ]
    sources: dict[Path, Path] = {}
    for stem, image in zip(stems, images, strict=True):
        if stem in sources:
            raise ValueError(
                f"{sources[stem]} and {image.path} would both be written as {stem}: name a folder "
                "that holds both, whose subfolders are kept, or start twice with two outputs"
            )
        sources[stem] = image.path
    return stems
