"""Data loaders: Detectron2's samples and batches, in an order that can be resumed exactly.

Training draws an endless sequence of samples. The sample at a position and its augmentation depend
only on the seed of the run and the position. So a run can resume at any iteration without loading
the earlier samples, with any number of loader processes. W workers with B / W images each see the
same B samples per iteration as a single worker (except with aspect ratio grouping, which groups
the samples of each worker separately, as in Detectron2).

    Detectron2's sampler (seed) → index at each position → batches of `Draw` → mapper → samples
"""

import copy
import difflib
import itertools
import logging
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from json import JSONDecodeError
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    detection_utils,
)
from detectron2.data import transforms as T
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import DatasetFromList
from detectron2.data.transforms import FixedSizeCrop
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..utils.seeding import DATA, SAMPLER, isolated_rng
from .augmentations import ResizeShortestEdge
from .dataset_mappers import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    MaskFormerInstanceDatasetMapper,
    MaskFormerPanopticDatasetMapper,
    MaskFormerSemanticDatasetMapper,
)
from .datasets.checks import check_builtin, drop_unusable_objects
from .formats.bands import image_format_of
from .formats.findings import NOTHING_TO_TRAIN_ON, Findings
from .formats.images import read_header, read_image
from .formats.windows import more_pixels
from .label_maps import check_whole
from .packed_masks import pin
from .records import check_labels, check_records, with_whole_numbers
from .tiles import split_records

Mapper = Callable[[dict], dict | None]

# What loaders raise when files or records lack something or have another type.
_LOADER_ERRORS = (AttributeError, KeyError, IndexError, TypeError, UnicodeError, JSONDecodeError)

# Modules of loaders that check what they read.
_OWN_LOADERS = re.compile(r"(mask2former|detectron2)\.|functools$")

# The mappers that read records as `records.py` checks them.
_MAPPERS = (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    MaskFormerInstanceDatasetMapper,
    MaskFormerPanopticDatasetMapper,
    MaskFormerSemanticDatasetMapper,
)

# Batches whose draws are kept: more than loader processes load ahead.
_NUM_RECENT = 1024

# How many samples in a row a mapper may reject (return None) before it is an error.
_MAX_REJECTIONS = 100


class Draw(NamedTuple):
    """One sample to load: the index of its record, and the seed and position of its RNG."""

    seed: int
    position: int
    record: int


class SeededSamples(Dataset):
    """Loads the training sample of a `Draw`; equal draws give equal samples."""

    def __init__(self, records: Sequence[dict], mapper: Mapper) -> None:
        self._records = records
        self._mapper = PicklableWrapper(mapper)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def mapper(self) -> Mapper:
        return self._mapper._obj

    def __getitem__(self, draw: Draw) -> dict:
        """Load and augment; a sample that the mapper rejects is replaced by a random one.

        Raises:
            ValueError: the mapper rejected too many samples in a row.
        """
        index = draw.record
        with isolated_rng(draw.seed, DATA, draw.position):
            for _ in range(_MAX_REJECTIONS):
                record = self._records[index]
                with _named_record(record):
                    sample = self._mapper(record)
                if sample is not None:
                    return sample
                index = random.randrange(len(self))
        raise ValueError(
            f"The dataset mapper returned None for {_MAX_REJECTIONS} samples in a row, from "
            f"{self._records[draw.record].get('file_name', draw.record)}."
        )


@contextmanager
def _named_record(record: dict) -> Iterator[None]:
    """Add the image to errors that name no file of the record."""
    try:
        yield
    except (AssertionError, ValueError) as error:
        files = [value for value in record.values() if isinstance(value, str)]
        if not files or any(file in str(error) for file in files):
            raise
        raise ValueError(f"{record.get('file_name', files[0])}: {error}") from error


# What a model uploads of a sample.
_UPLOADED = ("image", "instances", "ignored")


class _Batch:
    """A batch on its way to the thread that pins memory, which calls `pin_memory`.

    Pins what a model uploads. torch would pin every tensor of a sample.
    """

    def __init__(self, samples: list) -> None:
        self._samples = samples

    def pin_memory(self) -> list:
        return [
            self._pin(sample) if isinstance(sample, dict) else sample for sample in self._samples
        ]

    @staticmethod
    def _pin(sample: dict) -> dict:
        pinned = copy.copy(sample)
        pinned.update((key, pin(sample[key])) for key in _UPLOADED if key in sample)
        return pinned


class ResumableBatchSampler(Sampler):
    """The endless batches of draws of this worker, from any iteration on."""

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
            indices: Detectron2's sampler: the endless indices of this worker, the same each time
                it is iterated.
            batch_size: images per batch of this worker.
            seed: seed of `indices`.
            reseed: returns such a sampler for another seed.
            is_wide: whether the image at an index is wider than high; if given, wide and other
                images are batched separately.
        """
        self._indices = indices
        self._batch_size = batch_size
        self._seed = seed
        self._reseed = reseed
        self._is_wide = is_wide
        self._start_iteration = 0
        self._recent: dict[int, list[Draw]] = {}

    def seek(self, seed: int, iteration: int) -> None:
        """Start the next iterator at `iteration` of the run with this `seed`."""
        if seed != self._seed:
            self._indices = self._reseed(seed)
        self._seed, self._start_iteration = seed, iteration

    def __iter__(self) -> Iterator[list[Draw]]:
        # Detectron2's samplers assign positions to workers round-robin.
        positions = itertools.count(comm.get_rank(), comm.get_world_size())
        draws = (
            Draw(self._seed, position, index)
            for position, index in zip(positions, self._indices, strict=False)
        )
        batches = self._batches(draws) if self._is_wide is None else self._grouped_batches(draws)
        numbered = enumerate(batches)
        for iteration, batch in itertools.islice(numbered, self._start_iteration, None):
            self._recent[iteration] = batch
            self._recent.pop(iteration - _NUM_RECENT, None)
            yield batch

    def draws(self, iteration: int) -> list[Draw]:
        """The draws of this worker's batch in a recent iteration.

        Raises:
            KeyError: it has not been drawn, or too long ago.
        """
        return self._recent[iteration]

    def _batches(self, draws: Iterator[Draw]) -> Iterator[list[Draw]]:
        while batch := list(itertools.islice(draws, self._batch_size)):
            yield batch

    def _grouped_batches(self, draws: Iterator[Draw]) -> Iterator[list[Draw]]:
        """The same batches as Detectron2's `AspectRatioGroupedDataset`."""
        groups: dict[bool, list[Draw]] = {True: [], False: []}
        for draw in draws:
            wide = self._is_wide(draw.record)
            groups[wide].append(draw)
            if len(groups[wide]) == self._batch_size:
                yield groups[wide]
                groups[wide] = []


def _known_shapes(records: Iterable[dict]) -> list[bool | None]:
    """Whether the image of each record is wider than high; None if the record has no size."""
    return [r["width"] > r["height"] if "width" in r and "height" in r else None for r in records]


class _AspectRatios:
    """Tells which images are wider than high, from the records or else the image headers."""

    def __init__(self, wide: list[bool | None], records: Sequence[dict]) -> None:
        self._wide = wide
        self._records = records

    def is_wide(self, index: int) -> bool:
        if self._wide[index] is None:
            # Records of semantic data sets have no size. Read headers only when needed.
            self._wide[index] = _image_is_wide(self._records[index]["file_name"])
        return self._wide[index]


def _image_is_wide(file_name: str) -> bool:
    height, width = read_header(file_name).size
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
    """Turn errors of loaders into errors that name the data set and its paths.

    Args:
        names: the data sets loaded in the block.

    Raises:
        FileNotFoundError: a file of a data set registered by Detectron2 is missing.
        ModuleNotFoundError: the package that reads such a data set is missing.
        ValueError: a data set is not registered, has no usable image, or its loader fails.
    """
    check_dataset_names(names)
    for name in names:
        check_builtin(name)
    try:
        yield
    except (AssertionError, *_LOADER_ERRORS) as original:
        for name in names:
            _raise_record_problem(name)
        error = str(original)
        if "No valid data" in error:
            error += f" The data {NOTHING_TO_TRAIN_ON}"
        if not isinstance(original, AssertionError):
            error = f"reading it ended with {type(original).__name__}: {error}"
        raise ValueError(
            f"Data set {', '.join(names)} cannot be used: {error} (looked for {_places(names)})"
        ) from original
    except ValueError:
        # Loaders raise it with a message of their own; Detectron2 also for records, without name.
        for name in names:
            if not _OWN_LOADERS.match(getattr(DatasetCatalog[name], "__module__", None) or ""):
                _raise_record_problem(name)
        raise


def _raise_record_problem(name: str) -> None:
    """Raise the first problem of the records of a data set, if its loader returns them.

    Raises:
        ValueError: a record is malformed.
    """
    try:
        records = DatasetCatalog.get(name)
    except (AssertionError, ValueError, *_LOADER_ERRORS):
        return
    if isinstance(records, list):
        findings = Findings()
        check_records(records, name, findings)
        findings.raise_first(name)


def _places(names: Sequence[str]) -> str:
    keys = ("image_root", "json_file", "panoptic_json", "panoptic_root", "sem_seg_root")
    places = [
        f"{name}: " + (", ".join(f"{k}={v}" for k in keys if (v := meta.get(k))) or "no paths")
        for name, meta in ((name, MetadataCatalog.get(name)) for name in names)
    ]
    return "; ".join(places)


def _load(cfg: CfgNode, mapper: Mapper, seed: int, dataset: Any = None) -> dict:
    """Detectron2's arguments of a training loader, with samplers seeded by `seed`."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    # A sampler that does not read cfg.SEED draws its seed from NumPy.
    with explained_dataset_errors(cfg.DATASETS.TRAIN), isolated_rng(seed, SAMPLER):
        return build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=dataset)


def build_train_loader(cfg: CfgNode, mapper: Mapper) -> DataLoader:
    """Build the endless training loader of this worker.

    Reads `DATASETS.TRAIN`, `DATALOADER.*`, `SOLVER.IMS_PER_BATCH` and `SEED` as Detectron2's
    `build_detection_train_loader` does.

    Args:
        cfg: the config. With a negative SEED the order is random.
        mapper: maps a record of the data set to a training sample, or to None to skip it.

    Returns:
        A loader of lists of samples; its `batch_sampler` is a `ResumableBatchSampler`. If the model
        trains on a GPU, images and targets are in pinned memory.

    Raises:
        ValueError: no data set is given, one is unknown, empty or not indexable, none has anything
            to learn, or the batch size is not a multiple of the number of workers.
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
    if isinstance(records, list):
        if any(type(mapper).__call__ is kind.__call__ for kind in _MAPPERS):
            findings, names = Findings(), ", ".join(cfg.DATASETS.TRAIN)
            check_records(records, names, findings)
            if not findings.problems:
                ignore_label = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("ignore_label")
                with more_pixels() if _tile_size(cfg) else nullcontext():
                    check_labels(records, ignore_label, findings)
            findings.raise_first(names)
        drop_unusable_objects(cfg.DATASETS.TRAIN, records)
        _check_targets(cfg.DATASETS.TRAIN, records)
    grouping = loaded["aspect_ratio_grouping"]
    wide = _known_shapes(records[i] for i in range(len(records))) if grouping else []
    if isinstance(records, list) and _tile_size(cfg):
        records = _tiles(cfg, records)
        loaded = _load(cfg, mapper, seed, records)
        wide = _known_shapes(records) if grouping else []
    if isinstance(records, list):
        # Serialise once, so that loader processes share the memory.
        records = DatasetFromList(records, copy=False)
    batch_sampler = ResumableBatchSampler(
        loaded["sampler"],
        loaded["total_batch_size"] // comm.get_world_size(),
        seed=seed,
        reseed=lambda seed: _load(cfg, mapper, seed, records)["sampler"],
        is_wide=_AspectRatios(wide, records).is_wide if grouping else None,
    )
    # Otherwise no memory can be pinned, and batches would stay `_Batch`.
    pins = torch.device(cfg.MODEL.DEVICE).type == "cuda" and torch.cuda.is_available()
    return DataLoader(
        SeededSamples(records, mapper),
        batch_sampler=batch_sampler,
        num_workers=loaded["num_workers"],
        collate_fn=_Batch if pins else trivial_batch_collator,
        pin_memory=pins,
        # With its own generator, creating the iterator does not draw from the global one.
        generator=torch.Generator().manual_seed(seed),
    )


def _tile_size(cfg: CfgNode) -> int:
    # Configs made by another project's copy of `add_maskformer2_config` lack the key.
    return cfg.INPUT.TILES.SIZE if "TILES" in cfg.INPUT else 0


def _tiles(cfg: CfgNode, records: list[dict]) -> list[dict]:
    """The records of INPUT.TILES.

    Raises:
        ValueError: no tile has an object, or the sampler counts images.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN.startswith("Weighted"):
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN}, which weights images, "
            "not tiles: choose another one, or set INPUT.TILES.SIZE to 0."
        )
    tiles = split_records(
        records,
        cfg.INPUT.TILES.SIZE,
        cfg.INPUT.TILES.OVERLAP,
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
    )
    if not tiles:
        raise ValueError(
            f"No tile of {', '.join(cfg.DATASETS.TRAIN)} has an object; set "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS to False to train on tiles without."
        )
    logging.getLogger(__name__).info(
        f"Training on {len(tiles)} tiles of {len(records)} images (INPUT.TILES)"
    )
    return tiles


def _check_targets(names: Sequence[str], records: Iterable[dict]) -> None:
    """Check that training data has an object or segment that is no crowd.

    Raises:
        ValueError: it has none, so that a model would learn to predict nothing.
    """
    for record in records:
        objects = record.get("annotations", record.get("segments_info"))
        if objects is None or any(not one.get("iscrowd", 0) for one in objects):
            return
    raise ValueError(
        f"Data set {', '.join(names)} {NOTHING_TO_TRAIN_ON} (looked for {_places(names)})"
    )


def has_fixed_size(cfg: CfgNode, loader: Any) -> bool:
    """Whether all training images have one size, as far as the config and the mapper tell.

    Args:
        cfg: the config.
        loader: of training.
    """
    samples = getattr(loader, "dataset", None)
    mapper: Any = samples.mapper if isinstance(samples, SeededSamples) else None
    if type(mapper) in (COCOInstanceNewBaselineDatasetMapper, COCOPanopticNewBaselineDatasetMapper):
        last = mapper.tfm_gens[-1]
        return type(last) is FixedSizeCrop and last.pad
    if type(mapper) in (
        MaskFormerInstanceDatasetMapper,
        MaskFormerPanopticDatasetMapper,
        MaskFormerSemanticDatasetMapper,
    ):
        return mapper.size_divisibility > 0 or _crops_fit_cityscapes(cfg)
    return False


def _crops_fit_cityscapes(cfg: CfgNode) -> bool:
    """Whether training crops have a fixed size because all images are of Cityscapes, 1024x2048."""
    crop, sizes = cfg.INPUT.CROP, cfg.INPUT.MIN_SIZE_TRAIN
    smallest = min(sizes if isinstance(sizes, tuple | list) else [sizes])
    height = min(smallest, cfg.INPUT.MAX_SIZE_TRAIN // 2)
    return (
        all(name.startswith("cityscapes_fine_") for name in cfg.DATASETS.TRAIN)
        and crop.ENABLED
        and crop.TYPE == "absolute"
        and crop.SIZE[0] <= height
        and crop.SIZE[1] <= 2 * height
    )


def check_batch_size(cfg: CfgNode, num_workers: int | None = None) -> None:
    """Check that the total batch can be split evenly: between the workers, and into micro-batches.

    Raises:
        ValueError: SOLVER.IMS_PER_BATCH is not a positive multiple of the number of workers, or the
            share of one is not a multiple of SOLVER.NUM_ACCUMULATION_STEPS.
    """
    batch_size, num_workers = cfg.SOLVER.IMS_PER_BATCH, num_workers or comm.get_world_size()
    if batch_size <= 0 or batch_size % num_workers:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}, which is not a positive multiple of the number "
            f"of workers, {num_workers}. It is the total batch size of all workers."
        )
    # Configs made by another project's copy of `add_maskformer2_config` lack the key.
    num_steps, share = cfg.SOLVER.get("NUM_ACCUMULATION_STEPS", 1), batch_size // num_workers
    if share % num_steps:
        raise ValueError(
            f"SOLVER.NUM_ACCUMULATION_STEPS is {num_steps}, which does not divide the {share} "
            f"image(s) of each worker (SOLVER.IMS_PER_BATCH {batch_size}, {num_workers} workers)."
        )


class InferenceMapper(DatasetMapper):
    """Detectron2's mapper for inference, reading images as in training."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg, is_train=False)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = False) -> dict[str, Any]:
        sizes = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        return super().from_config(cfg, is_train) | {
            "augmentations": [ResizeShortestEdge(*sizes, "choice")],
            "image_format": image_format_of(cfg),
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises:
            FileNotFoundError: the image or its label map does not exist.
            ValueError: one of them cannot be read, the image has another size than the record, or
                labels are not whole numbers.
        """
        sample = copy.deepcopy({k: v for k, v in dataset_dict.items() if k != "annotations"})
        sample = with_whole_numbers(sample)
        image = read_image(sample["file_name"], self.image_format)
        detection_utils.check_image_size(sample, image)
        file = sample.pop("sem_seg_file_name", None)
        labels = None if file is None else read_image(file)
        if labels is not None and labels.dtype != np.uint8:
            check_whole(labels, file)
            labels = labels.astype(np.float64)  # which Detectron2 can resize
        augmented = T.AugInput(image, sem_seg=labels)
        self.augmentations(augmented)
        sample["image"] = torch.as_tensor(augmented.image.transpose(2, 0, 1).copy())
        if labels is not None:
            sample["sem_seg"] = torch.as_tensor(augmented.sem_seg.astype("long"))
        return sample


def _without_pixels(record: dict) -> dict:
    """The input of a model that reads the image itself, in tiles."""
    return with_whole_numbers({k: v for k, v in record.items() if k != "annotations"})


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Build the inference loader of this worker, which yields each image once.

    With TEST.TILES its records have no `image`: `inference.tiled_model.TiledModel` reads them.

    Raises:
        ValueError: the data set is unknown or has no images.
    """
    mapper = _without_pixels if evaluates_tiles(cfg) else InferenceMapper(cfg)
    with explained_dataset_errors([dataset_name]):
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)


def evaluates_tiles(cfg: CfgNode) -> bool:
    """Whether evaluation predicts in tiles: TEST.TILES."""
    # Configs made by another project's copy of `add_maskformer2_config` lack the key.
    return "TILES" in cfg.TEST and cfg.TEST.TILES.SIZE > 0
