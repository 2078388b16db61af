"""Finds the images that a program is given, and names the files that it writes for them."""

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
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
    """The names of images without suffix, or with it where two outputs would be the same.

    Names that differ in upper and lower case only count as the same, as some file systems have it;
    so does `a` beside a folder a.png, in whose place a.png would be written. Where the suffix does
    not tell them apart, a number follows.

    Raises:
        ValueError: two images have the same name, because they are of different folders.
    """
    names = [image.name for image in images]
    sources: dict[Path, Path] = {}
    for name, image in zip(names, images, strict=True):
        if name in sources:
            raise ValueError(
                f"{sources[name]} and {image.path} would both be written as {name}: name a folder "
                "that holds both, whose subfolders are kept, or start twice with two outputs"
            )
        sources[name] = image.path
    folders = {_key(parent) for name in names for parent in name.parents}
    in_place_of_folders = {x.removesuffix(".png") for x in folders if x.endswith(".png")}
    stems = [name.with_suffix("") for name in names]
    while True:
        counts = Counter(map(_key, stems))
        clashing = [
            i
            for i, stem in enumerate(stems)
            if counts[_key(stem)] > 1 or _key(stem) in in_place_of_folders
        ]
        # A name with suffix may be that of another image without it.
        without_suffix = [i for i in clashing if stems[i] != names[i]]
        if not without_suffix:
            break
        for i in without_suffix:
            stems[i] = names[i]
    taken = in_place_of_folders | {_key(s) for i, s in enumerate(stems) if i not in clashing}
    for i in clashing:
        numbered = (names[i].with_name(f"{names[i].name}_{number}") for number in count(2))
        stems[i] = next(x for x in chain([names[i]], numbered) if _key(x) not in taken)
        taken.add(_key(stems[i]))
    return stems


def _key(path: Path) -> str:
    """The same for paths that a file system may take for the same."""
    return path.as_posix().casefold()
