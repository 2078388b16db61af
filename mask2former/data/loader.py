"""Loaders: Detectron2's samples and batches, for training in an order that can be resumed exactly.

A training run draws an endless sequence of samples. Which sample stands at a position, and how it
is augmented, depends only on the run's seed and the position. So a resumed run starts at any
iteration without loading what came before, for any number of loading processes; and W workers with
B / W images each see in every iteration the same B samples as one worker (without aspect ratio
grouping, which sorts the samples of each worker on its own, as in Detectron2).

    Detectron2's sampler (seed) → index at each position → batches of `Draw` → mapper → samples
"""

import difflib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import DatasetFromList
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.serialize import PicklableWrapper
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..utils.seeding import DATA, SAMPLER, isolated_rng
from .datasets.checks import check_builtin

Mapper = Callable[[dict], dict | None]

# How many samples in a row a mapper may refuse (by returning None) before that is an error.
_MAX_REFUSALS = 100

_EXIF_ORIENTATION = 0x0112


class Draw(NamedTuple):
    """One sample to load: its index in the data set, and what its augmentation depends on."""

    seed: int
    position: int
    index: int


class SeededSamples(Dataset):
    """Turns a `Draw` into a training sample; the same draw always gives the same sample."""

    def __init__(self, records: Sequence[dict], mapper: Mapper) -> None:
        self._records = records
        self._mapper = PicklableWrapper(mapper)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, draw: Draw) -> dict:
        """Load and augment. A sample that the mapper refuses is replaced by a random other one.

        Raises:
            ValueError: the mapper refused too many samples in a row.
        """
        index = draw.index
        with isolated_rng(draw.seed, DATA, draw.position):
            for _ in range(_MAX_REFUSALS):
                sample = self._mapper(self._records[index])
                if sample is not None:
                    return sample
                index = random.randrange(len(self))
        raise ValueError(
            f"The dataset mapper returned None for {_MAX_REFUSALS} samples in a row, the first of "
            f"them {self._records[draw.index].get('file_name', draw.index)}."
        )


class ResumableBatchSampler(Sampler):
    """This worker's batches of draws, endless, from any iteration on."""

    def __init__(
        self,
        indices: Iterable[int],
        batch_size: int,
        *,
        seed: int,
        reseed: Callable[[int], Iterable[int]],
        is_wide: Callable[[int], bool] | None = None,
    ) -> None:
        """
        Args:
            indices: Detectron2's sampler: this worker's indices, endless, the same in every pass.
            batch_size: images of one batch of this worker.
            seed: what `indices` was made from.
            reseed: makes such a sampler from another seed.
            is_wide: says of an index whether its image is wider than high; then a batch holds
                either only such images or none. Without it batches are as the samples come.
        """
        self._indices = indices
        self._batch_size = batch_size
        self._seed = seed
        self._reseed = reseed
        self._is_wide = is_wide
        self._start_iteration = 0

    def seek(self, seed: int, iteration: int) -> None:
        """Start the next pass at `iteration` of the run that has this `seed`."""
        if seed != self._seed:
            self._indices = self._reseed(seed)
        self._seed, self._start_iteration = seed, iteration

    def __iter__(self) -> Iterator[list[Draw]]:
        # Detectron2's samplers deal the positions out to the workers in turn.
        positions = itertools.count(comm.get_rank(), comm.get_world_size())
        draws = (
            Draw(self._seed, position, index)
            for position, index in zip(positions, self._indices, strict=False)
        )
        batches = self._batches(draws) if self._is_wide is None else self._grouped_batches(draws)
        yield from itertools.islice(batches, self._start_iteration, None)

    def _batches(self, draws: Iterator[Draw]) -> Iterator[list[Draw]]:
        while batch := list(itertools.islice(draws, self._batch_size)):
            yield batch

    def _grouped_batches(self, draws: Iterator[Draw]) -> Iterator[list[Draw]]:
        """The batches that Detectron2's `AspectRatioGroupedDataset` makes of the samples."""
        groups: dict[bool, list[Draw]] = {True: [], False: []}
        for draw in draws:
            wide = self._is_wide(draw.index)
            groups[wide].append(draw)
            if len(groups[wide]) == self._batch_size:
                yield groups[wide]
                groups[wide] = []


def _known_shapes(records: Iterable[dict]) -> list[bool | None]:
    """Of each record whether its image is wider than high; None where it does not say."""
    return [r["width"] > r["height"] if "width" in r and "height" in r else None for r in records]


class _AspectRatios:
    """Says which images are wider than high, from the records or else from the image headers."""

    def __init__(self, wide: list[bool | None], records: Sequence[dict]) -> None:
        self._wide = wide
        self._records = records

    def is_wide(self, index: int) -> bool:
        if self._wide[index] is None:
            # Records of semantic data sets carry no size. Headers are read as they are needed.
            self._wide[index] = _image_is_wide(self._records[index]["file_name"])
        return self._wide[index]


def _image_is_wide(file_name: str) -> bool:
    with PathManager.open(file_name, "rb") as file, Image.open(file) as image:
        width, height = image.size
        # Detectron2 loads images upright: orientations 5 to 8 lie on their side.
        if image.getexif().get(_EXIF_ORIENTATION) in (5, 6, 7, 8):
            width, height = height, width
    return width > height


def check_dataset_names(names: Sequence[str]) -> None:
    """Check that data sets are registered.

    Raises:
        ValueError: one is not; the message offers similar names.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            close = difflib.get_close_matches(name, DatasetCatalog.list())
            hint = f"; did you mean {' or '.join(close)}?" if close else "."
            raise ValueError(f"Data set {name!r} is not registered{hint}")


@contextmanager
def explained_dataset_errors(names: Sequence[str]) -> Iterator[None]:
    """Turn what Detectron2 asserts about data sets into errors that say what was looked for.

    Args:
        names: the data sets that the block loads.

    Raises:
        FileNotFoundError: a file of a data set that Detectron2 registers is missing.
        ModuleNotFoundError: the package that reads it is missing.
        ValueError: a data set is not registered or has no usable image.
    """
    check_dataset_names(names)
    for name in names:
        check_builtin(name)
    try:
        yield
    except AssertionError as error:
        keys = ("image_root", "json_file", "panoptic_json", "panoptic_root", "sem_seg_root")
        places = [
            f"{name}: " + (", ".join(f"{k}={v}" for k in keys if (v := meta.get(k))) or "no paths")
            for name, meta in ((name, MetadataCatalog.get(name)) for name in names)
        ]
        raise ValueError(
            f"Data set {', '.join(names)} cannot be used: {error} (looked for {'; '.join(places)})"
        ) from error


def _load(cfg: CfgNode, mapper: Mapper, seed: int, dataset: Any = None) -> dict:
    """Detectron2's arguments of a training loader; its samplers get their seeds from `seed`."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    # Where a sampler does not read cfg.SEED it draws its seed from NumPy.
    with explained_dataset_errors(cfg.DATASETS.TRAIN), isolated_rng(seed, SAMPLER):
        return build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=dataset)


def build_train_loader(cfg: CfgNode, mapper: Mapper) -> DataLoader:
    """Build this worker's training loader, endless.

    Reads `DATASETS.TRAIN`, `DATALOADER.*`, `SOLVER.IMS_PER_BATCH` and `SEED` as Detectron2's
    `build_detection_train_loader` does.

    Args:
        cfg: the config. With a negative SEED the order is random.
        mapper: turns a record of the data set into a training sample, or returns None to skip it.

    Returns:
        A loader of lists of samples; its `batch_sampler` is a `ResumableBatchSampler`.

    Raises:
        ValueError: no data set, one that is unknown, empty or not indexable, or a batch size that
            does not divide by the number of workers.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty: name at least one data set to train on.")
    check_batch_size(cfg)
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    loaded = _load(cfg, mapper, seed)
    records = loaded["dataset"]
    if isinstance(records, IterableDataset):
        raise ValueError(
            f"Data set {cfg.DATASETS.TRAIN} is an IterableDataset, which cannot be resumed; "
            "register a list of dicts, or override Trainer.build_train_loader."
        )
    grouping = loaded["aspect_ratio_grouping"]
    wide = _known_shapes(records[i] for i in range(len(records))) if grouping else []
    if isinstance(records, list):
        # Serialised once, so that loading processes share the memory.
        records = DatasetFromList(records, copy=False)
    batch_sampler = ResumableBatchSampler(
        loaded["sampler"],
        loaded["total_batch_size"] // comm.get_world_size(),
        seed=seed,
        reseed=lambda seed: _load(cfg, mapper, seed, records)["sampler"],
        is_wide=_AspectRatios(wide, records).is_wide if grouping else None,
    )
    return DataLoader(
        SeededSamples(records, mapper),
        batch_sampler=batch_sampler,
        num_workers=loaded["num_workers"],
        collate_fn=trivial_batch_collator,
        # A generator of its own: else creating the iterator would draw from the model's.
        generator=torch.Generator().manual_seed(seed),
    )


def check_batch_size(cfg: CfgNode, num_workers: int | None = None) -> None:
    """Check that the total batch can be dealt out to the workers.

    Raises:
        ValueError: SOLVER.IMS_PER_BATCH is not a positive multiple of the number of workers.
    """
    batch_size, num_workers = cfg.SOLVER.IMS_PER_BATCH, num_workers or comm.get_world_size()
    if batch_size <= 0 or batch_size % num_workers:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}, which is not a positive multiple of the number "
            f"of workers, {num_workers}. It is the batch size of all workers together."
        )


class InferenceMapper(DatasetMapper):
    """Detectron2's mapper for inference; an unreadable image is an error that names it."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg, is_train=False)

    def __call__(self, dataset_dict: dict) -> dict:
        try:
            return super().__call__(dataset_dict)
        except OSError as error:
            # The operating system's errors carry the file name, those of PIL do not.
            if error.filename is not None:
                raise
            raise ValueError(
                f"{dataset_dict['file_name']} or its label map cannot be read as an image: {error}"
            ) from error


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Build this worker's loader of one data set, each image once.

    Raises:
        ValueError: the data set is unknown or has no image.
    """
    with explained_dataset_errors([dataset_name]):
        return build_detection_test_loader(cfg, dataset_name, mapper=InferenceMapper(cfg))
