"""Folders of images and label images of your own: pairs, those of the split, labels as trained.

image_root ┐                            ┌ labels as they are
label_root ┴ pairs ─ SHARE, IMAGE_LIST ─┴ VALUE_MAP ─→ label PNGs in the cache
"""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from PIL import Image
from tqdm import tqdm

from ...utils.files import explained_write_errors
from ..formats.findings import Findings
from ..formats.images import read_size
from ..formats.semantic_folders import read_semantic_folders, warn_of_one_class
from .annotation_cache import cached, stamp
from .label_values import Labels
from .selection import Selection

_logger = logging.getLogger(__name__)
# What a data set has is said before the loggers of a run are set up.
_logger.setLevel(logging.INFO)
# Threads that map label images: most of the time is spent in zlib.
_NUM_THREADS = 8

Pair = tuple[str, str]


@dataclass(frozen=True)
class SemanticSource:
    """Where a data set of `register_semantic` comes from.

    Attributes:
        name: of the data set, for messages.
        image_root, label_root, image_ext, label_ext: see `read_semantic_folders`.
        labels: what the label images mean.
        selection: the images that the data set has.
    """

    name: str
    image_root: str
    label_root: str
    image_ext: tuple[str, ...]
    label_ext: tuple[str, ...]
    labels: Labels
    selection: Selection = field(default_factory=Selection)

    def pairs(self, findings: Findings) -> list[Pair]:
        """The images and their label maps, which are mapped first if that has not been done.

        Args:
            findings: gets all problems of the folders and of the label images.

        Returns:
            Pairs (image, label map) in the order of the names. The label maps have the labels of
            `labels.classes` and the ignore label.

        Raises:
            WriteError: the cache cannot be written.
        """
        pairs = read_semantic_folders(
            self.image_root, self.label_root, findings, self.image_ext, self.label_ext
        )
        if not self.selection.is_all and pairs:
            pairs = self._selected(pairs, findings)
        if self.labels.table is None or findings.problems or not pairs:
            return pairs
        return self._mapped(pairs, findings)

    def _selected(self, pairs: list[Pair], findings: Findings) -> list[Pair]:
        names = [os.path.relpath(image, self.image_root).replace(os.sep, "/") for image, _ in pairs]
        where = f"Data set {self.name!r}: {self.image_root}"
        try:
            chosen = self.selection.choose(names, where)
        except (FileNotFoundError, ValueError) as error:
            is_missing = isinstance(error, FileNotFoundError)
            why = str(error).removeprefix(f"{where}: ").removesuffix(".")
            findings.problem(self.image_root, None, why, is_missing=is_missing)
            return []
        selected = [pair for pair, name in zip(pairs, names, strict=True) if name in chosen]
        _log_once(
            f"Data set {self.name!r}: {self.selection.text()}: {len(selected)} of {len(pairs)} "
            "images"
        )
        return selected

    def _mapped(self, pairs: list[Pair], findings: Findings) -> list[Pair]:
        key = [
            "labels",
            list((self.labels.table or {}).items()),
            self.labels.is_colour,
            os.path.realpath(self.label_root),
            # The images, too, because their sizes are compared.
            [[stamp(image), stamp(label)] for image, label in pairs],
        ]
        folder = os.path.abspath(self.label_root)
        source = f"{os.path.basename(os.path.dirname(folder))}_{os.path.basename(folder)}"
        try:
            root = cached(source, "", key, partial(self._write, pairs, findings))
        except _HasProblems:
            return []
        return [(image, os.path.join(root, self._target(label))) for image, label in pairs]

    def _target(self, label: str) -> str:
        """The name of a mapped label map in its folder."""
        return f"{os.path.splitext(os.path.relpath(label, self.label_root))[0]}.png"

    def _write(self, pairs: Sequence[Pair], findings: Findings, root: str) -> None:
        """Map label images into a folder.

        Raises:
            _HasProblems: some cannot be mapped; `findings` has them.
        """
        with explained_write_errors(root):
            for folder in {os.path.dirname(self._target(label)) for _, label in pairs}:
                os.makedirs(os.path.join(root, folder), exist_ok=True)

        def problems() -> Iterator[tuple[str, BaseException | None]]:
            with ThreadPoolExecutor(_NUM_THREADS) as pool:
                errors = pool.map(lambda pair: self._map(pair[0], pair[1], root), pairs)
                for (_, label), error in zip(pairs, errors, strict=True):
                    yield label, error

        title = f"{self.name}: mapping label images"
        for label, error in tqdm(problems(), total=len(pairs), desc=title, unit="image"):
            if error is not None:
                is_missing = isinstance(error, FileNotFoundError)
                why = str(error).removeprefix(f"{label} ").removesuffix(".")
                findings.problem(label, None, why, is_missing=is_missing)
        if findings.problems:
            raise _HasProblems

    def _map(self, image: str, label: str, root: str) -> Exception | None:
        """Map one label image; returns what is wrong with it."""
        target = os.path.join(root, self._target(label))
        try:
            labels = self.labels.map_file(label)
            size = read_size(image)
            # An image that cannot be read is named when it is needed.
            if size is not None and labels.shape != size:
                return ValueError(
                    f"{label} has (height, width) {labels.shape}, but its image {image} has {size}"
                )
        except (FileNotFoundError, ValueError) as error:
            return error
        with explained_write_errors(target):
            Image.fromarray(labels).save(target, compress_level=1)
        return None


@cache
def _log_once(message: str) -> None:
    """Log what a data set has; each evaluation loads it again."""
    _logger.info(message)


class _HasProblems(Exception):
    """Label images cannot be mapped."""


def load_source(source: SemanticSource) -> list[dict[str, Any]]:
    """Load the records of a data set of `register_semantic`.

    Raises:
        FileNotFoundError: a folder, an image or a label image is missing.
        ValueError: label images have other values, sizes or types than they should.
        WriteError: the cache cannot be written.
    """
    findings = Findings()
    pairs = source.pairs(findings)
    findings.raise_first(source.name)
    labels = source.labels
    label_maps = [label for _, label in pairs]
    warn_of_one_class(label_maps, labels.classes, labels.ignore_label, findings)
    findings.log(source.name)
    return [{"file_name": image, "sem_seg_file_name": label} for image, label in pairs]
