"""Which images of your data a split has, and under which names their classes are learned.

SHARE [0.0, 0.8], SHARE_SEED    the images whose hash falls into the interval
IMAGE_LIST train.txt            the images that a text file names
CLASSES, RENAME                 the classes, their order and their new names
"""

import difflib
import hashlib
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The key of RENAME for all classes that neither it nor CLASSES names.
OTHERS = "*"
# Bits of a hash that a float holds exactly.
_HASH_BITS = 53


@dataclass(frozen=True)
class Selection:
    """The images of a split, out of those that the data lists.

    Attributes:
        share: [low, high) of the hashes of the file names, each in [0, 1); None: all.
        seed: of the hashes.
        list_file: where `names` come from, for messages.
        names: of the images; None: all. A path relative to the folder of the images, its end, or
            either without the extension.
    """

    share: tuple[float, float] | None = None
    seed: int = 0
    list_file: str | None = None
    names: tuple[str, ...] | None = None

    @property
    def is_all(self) -> bool:
        return self.share is None and self.names is None

    def key(self) -> list[Any]:
        """What the choice depends on."""
        return [self.share, self.seed if self.share else None, self.names]

    def choose(self, images: Sequence[str], where: str) -> set[str]:
        """The images of the split.

        Args:
            images: distinct paths relative to the folder of the images, with "/".
            where: names data set and files, for errors.

        Raises:
            FileNotFoundError: the list names an image that the data does not have.
            ValueError: the list is ambiguous, or no image is left.
        """
        chosen = set(images)
        if self.names is not None:
            chosen = _listed(self.names, images, f"{where}: IMAGE_LIST {self.list_file}")
        if self.share is not None:
            low, high = self.share
            listed = len(chosen)
            chosen = {name for name in chosen if low <= hash_of(name, self.seed) < high}
            if not chosen and listed:
                raise ValueError(
                    f"{where}: SHARE [{low:g}, {high:g}] holds none of the {listed} images. Each "
                    "falls into a share by the hash of its name: take a wider one, another "
                    f"SHARE_SEED (now {self.seed}), or name the images in an IMAGE_LIST."
                )
        return chosen

    def text(self) -> str:
        """What is chosen, in words."""
        parts = []
        if self.names is not None:
            parts.append(f"IMAGE_LIST {self.list_file}")
        if self.share is not None:
            parts.append(f"SHARE [{self.share[0]:g}, {self.share[1]:g}], SHARE_SEED {self.seed}")
        return ", ".join(parts)


def hash_of(name: str, seed: int) -> float:
    """A number in [0, 1) that depends on name and seed only, evenly distributed over names."""
    digest = hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()
    return (int.from_bytes(digest[:8], "big") >> (64 - _HASH_BITS)) / 2.0**_HASH_BITS


def make_selection(
    name: str,
    share: Sequence[float] | None,
    share_seed: int,
    image_list: str | None,
) -> Selection:
    """Check the arguments of a registration that say which images it has.

    Args:
        name: of the data set, for errors.
        share, share_seed, image_list: see `register_annotations`.

    Raises:
        FileNotFoundError: the list does not exist.
        ValueError: the share is no interval in [0, 1], or the list is empty or no text.
    """
    interval: tuple[float, float] | None = None
    if share is None and share_seed != 0:
        raise ValueError(
            f"Data set {name!r}: SHARE_SEED is {share_seed}, but there is no SHARE, such as "
            "[0.0, 0.8]: state one, or leave SHARE_SEED out."
        )
    if share is not None:
        if len(share) != 2 or not 0 <= share[0] < share[1] <= 1:
            raise ValueError(
                f"Data set {name!r}: SHARE is {list(share)}; it must be [low, high] with 0 <= low "
                "< high <= 1, such as [0.0, 0.8] for training and [0.8, 1.0] for validation."
            )
        interval = (float(share[0]), float(share[1]))
    if image_list is None:
        return Selection(interval, share_seed)
    file = Path(image_list).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"Data set {name!r}: IMAGE_LIST {image_list} does not exist (in {Path.cwd()})."
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"Data set {name!r}: IMAGE_LIST {image_list} is not a text file in UTF-8 ({error})."
        ) from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise ValueError(f"Data set {name!r}: IMAGE_LIST {image_list} names no image.")
    return Selection(interval, share_seed, image_list, names)


def _listed(names: Sequence[str], images: Sequence[str], where: str) -> set[str]:
    index: dict[str, list[str]] = {}
    for image in images:
        for name in _names_of(image):
            index.setdefault(name, []).append(image)
    chosen: set[str] = set()
    missing: list[str] = []
    for name in names:
        found = _find(name, index, set(images))
        if not found:  # the label, a class or a flag may follow, as in lists of CamVid and pets
            found = _find(name.split()[0], index, set(images))
        if not found:
            missing.append(name)
        elif len(found) > 1:
            raise ValueError(
                f"{where}: {name!r} may be {found[0]} or {found[1]}: write the path relative to "
                "the folder of the images."
            )
        chosen.update(found)
    if missing:
        close = difflib.get_close_matches(missing[0], list(index), n=2)
        hint = f" Close: {', '.join(close)}." if close else f" It has, for example, {images[0]}."
        raise FileNotFoundError(
            f"{where} names {missing[0]!r}, which is no image of the data ({len(missing)} of "
            f"{len(names)} names are not).{hint if images else ' It has no images.'}"
        )
    return chosen


def _names_of(image: str) -> Iterable[str]:
    """The ends of a path, with and without the extension."""
    parts = image.split("/")
    for i in range(len(parts)):
        end = "/".join(parts[i:])
        yield end
        without = posixpath.splitext(end)[0]
        if without != end:
            yield without


def _find(name: str, index: Mapping[str, list[str]], images: set[str]) -> list[str]:
    path = posixpath.normpath(name.replace("\\", "/"))
    if path in images:
        return [path]
    if path in index:
        whole = [image for image in index[path] if posixpath.splitext(image)[0] == path]
        return whole or index[path]
    # The list may begin further up than the folder of the images, but must name all below it.
    parts = path.split("/")
    for i in range(1, len(parts)):
        end = "/".join(parts[i:])
        found = [
            image for image in index.get(end, []) if end in (image, posixpath.splitext(image)[0])
        ]
        if found:
            return found
    return []


# ---- classes ----


def check_rename(name: str, rename: Mapping[Any, Any] | None) -> dict[str, str | None] | None:
    """Check a mapping of class names.

    Raises:
        ValueError: a name is no text.
    """
    if rename is None:
        return None
    for old, new in rename.items():
        if (
            not isinstance(old, str)
            or not old
            or not (new is None or (isinstance(new, str) and new))
        ):
            raise ValueError(
                f"Data set {name!r}: RENAME has {old!r}: {new!r}; it maps the name of a class to "
                "its new name, or to null to leave it out. YAML reads words such as yes, no, on "
                "and off as true or false, and digits as numbers: quote them."
            )
    return dict(rename)


def map_classes(
    where: str,
    present: Sequence[str],
    classes: Sequence[str] | None,
    rename: Mapping[str, str | None] | None,
) -> tuple[list[str], dict[str, str | None]]:
    """The classes to learn, and what becomes of those of the data.

    Args:
        where: names data set and file, for errors.
        present: classes that the data lists, in its order.
        classes: all classes in order, under their old or new names; None: those that are present.
        rename: old name → new name, or None to leave the class out. The key "*" stands for all
            that neither `rename` nor `classes` names.

    Returns:
        The new names in order, and old name → new name or None for each of `present`.

    Raises:
        ValueError: a class of the data is not among `classes`, `rename` names none of the data, or
            no class is left.
    """
    rename = rename or {}
    kept = {*rename.values(), *(classes or ())}

    def renamed(old: str) -> str | None:
        if old in rename:
            return rename[old]
        return rename[OTHERS] if OTHERS in rename and old not in kept else old

    for old in rename:
        # With CLASSES, another split may have it, and a wrong name shows in what follows.
        if old != OTHERS and old not in present and classes is None:
            close = difflib.get_close_matches(old, present, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
            raise ValueError(
                f"{where}: RENAME names the class {old!r}, which the data does not have. {hint}"
                f"It has {short_list(present)}. If other splits have it, state CLASSES in all."
            )
    result = {old: renamed(old) for old in present}
    listed = present if classes is None else classes
    names = [new for old in listed if (new := renamed(old)) is not None]
    others = rename.get(OTHERS)
    if classes is None and others is not None and others in names:
        # A class of all others comes last.
        names = [new for new in names if new != others] + [others]
    names = list(dict.fromkeys(names))
    unlisted = [old for old, new in result.items() if new is not None and new not in names]
    if unlisted:
        close = difflib.get_close_matches(unlisted[0], names, n=1, cutoff=0.5)
        target = close[0] if close else "null"
        raise ValueError(
            f"{where}: the data has the class {unlisted[0]!r}, which CLASSES does not list "
            f"({len(unlisted)} such classes; CLASSES: {short_list(names)}). Add it there, or rename"
            f" it, such as RENAME: {{{unlisted[0]!r}: {target}}}; null leaves a class out, and "
            f"{{{OTHERS!r}: null}} all that CLASSES does not list."
        )
    if not names:
        raise ValueError(
            f"{where}: RENAME leaves none of the classes {short_list(present)}: keep at least one."
        )
    return names, result


def short_list(names: Sequence[str]) -> str:
    """The first names, and how many there are if there are more."""
    text = ", ".join(names[:8])
    return f"{text}, ... ({len(names)})" if len(names) > 8 else text or "none"
