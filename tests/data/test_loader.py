"""The training loader: Detectron2's order, a pure function of seed and position."""

import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
)
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import IterableDataset

from mask2former.data import MaskFormerSemanticDatasetMapper
from mask2former.data import loader as loader_module
from mask2former.data.loader import build_test_loader, build_train_loader
from mask2former.data.packed_masks import TargetInstances
from mask2former.utils.seeding import SAMPLER, isolated_rng

# Wide images have even indices, except that 8 is square, which Detectron2 counts as not wide.
SIZES = [(10, 20) if i % 2 == 0 else (20, 10) for i in range(8)] + [(10, 10)]


def draw_numbers(record):
    """A mapper that returns the record with the numbers its augmentation would draw."""
    numbers = (random.random(), np.random.rand(), torch.rand(()).item())
    return {**record, "numbers": numbers}


@pytest.fixture
def register():
    names = []

    def register(name, records):
        DatasetCatalog.register(name, lambda: records)
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def dataset(register):
    categories = [[0], [0], [1], [0], [], [0, 1], [0], [2], [0]]
    return register(
        "loader_test",
        [
            {
                "file_name": f"{i}.png",
                "image_id": i,
                "height": height,
                "width": width,
                "annotations": [{"category_id": c, "iscrowd": 0} for c in categories[i]],
            }
            for i, (height, width) in enumerate(SIZES)
        ],
    )


def config(dataset, **options):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (dataset,)
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.SEED = 7
    for key, value in options.items():
        setattr(cfg if key == "SEED" else cfg.DATALOADER, key, value)
    return cfg


def batches(loader, count):
    return [
        [(sample["image_id"], sample["numbers"]) for sample in batch]
        for batch in itertools.islice(loader, count)
    ]


def ids(loader, count):
    return [[image_id for image_id, _ in batch] for batch in batches(loader, count)]


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"SAMPLER_TRAIN": "TrainingSampler"},
        {"SAMPLER_TRAIN": "TrainingSampler", "FILTER_EMPTY_ANNOTATIONS": True},
        {"SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "REPEAT_THRESHOLD": 0.9},
        {
            "SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
            "REPEAT_THRESHOLD": 0.9,
            "REPEAT_SQRT": False,
        },
        {"SAMPLER_TRAIN": "RandomSubsetTrainingSampler", "RANDOM_SUBSET_RATIO": 0.5},
    ],
)
def test_same_batches_as_detectron2(dataset, options, grouping):
    cfg = config(dataset, ASPECT_RATIO_GROUPING=grouping, **options)
    with isolated_rng(cfg.SEED, SAMPLER):
        theirs = build_detection_train_loader(cfg, mapper=draw_numbers)
    ours = build_train_loader(cfg, draw_numbers)
    assert ids(ours, 30) == ids(theirs, 30)


def test_options_change_the_order(dataset):
    """Otherwise the test above could pass with an option that both loaders ignore."""
    variants = [
        config(dataset),
        config(dataset, SEED=8),
        config(dataset, ASPECT_RATIO_GROUPING=True),
        config(dataset, FILTER_EMPTY_ANNOTATIONS=True),
        config(dataset, SAMPLER_TRAIN="RepeatFactorTrainingSampler", REPEAT_THRESHOLD=0.9),
        config(dataset, SAMPLER_TRAIN="RandomSubsetTrainingSampler", RANDOM_SUBSET_RATIO=0.5),
    ]
    orders = [str(ids(build_train_loader(cfg, draw_numbers), 20)) for cfg in variants]
    assert len(set(orders)) == len(variants)


def test_one_epoch_has_each_image_once(dataset):
    batches = ids(build_train_loader(config(dataset), draw_numbers), 9)
    flat = list(itertools.chain(*batches))
    assert sorted(flat[:9]) == sorted(flat[9:]) == list(range(9))


def test_groups_by_aspect_ratio(dataset):
    cfg = config(dataset, ASPECT_RATIO_GROUPING=True)
    for batch in ids(build_train_loader(cfg, draw_numbers), 20):
        assert len({i % 2 == 0 and i != 8 for i in batch}) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("grouping", [False, True])
def test_seek_continues_as_if_never_stopped(dataset, num_workers, grouping):
    """Same samples and augmentations across an epoch boundary, for any number of processes."""
    cfg = config(dataset, ASPECT_RATIO_GROUPING=grouping)
    expected = batches(build_train_loader(cfg, draw_numbers), 12)
    numbers = [numbers for batch in expected for _, numbers in batch]
    assert len(set(numbers)) == len(numbers), "two samples have the same augmentation"

    cfg.DATALOADER.NUM_WORKERS = num_workers
    resumed = build_train_loader(cfg, draw_numbers)
    resumed.batch_sampler.seek(7, 5)
    assert batches(resumed, 7) == expected[5:]


def test_seek_to_another_seed(dataset):
    expected = batches(build_train_loader(config(dataset, SEED=3), draw_numbers), 6)
    random_order = build_train_loader(config(dataset, SEED=-1), draw_numbers)
    random_order.batch_sampler.seek(3, 2)
    assert batches(random_order, 4) == expected[2:]


def test_workers_share_the_batch_of_one(dataset, monkeypatch):
    cfg = config(dataset)
    cfg.SOLVER.IMS_PER_BATCH = 4
    alone = batches(build_train_loader(cfg, draw_numbers), 6)

    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    # There is no second worker to exchange the shared seed with.
    monkeypatch.setattr(comm, "shared_random_seed", lambda: int(np.random.randint(2**31)))
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(batches(build_train_loader(cfg, draw_numbers), 6))
    for whole, first, second in zip(alone, *shares, strict=True):
        assert len(first) == len(second) == 2
        assert sorted(first + second) == sorted(whole)


def test_global_random_state_is_unchanged(dataset):
    loader = build_train_loader(config(dataset), draw_numbers)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    batches(loader, 3)
    drawn = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], expected[0])
    assert (drawn[1] == expected[1]).all()
    assert drawn[2] == expected[2]


def test_rejected_samples_are_replaced_reproducibly(dataset):
    def only_even(record):
        return draw_numbers(record) if record["image_id"] % 2 == 0 else None

    first = batches(build_train_loader(config(dataset), only_even), 9)
    assert {i % 2 for batch in first for i, _ in batch} == {0}
    resumed = build_train_loader(config(dataset), only_even)
    resumed.batch_sampler.seek(7, 4)
    assert batches(resumed, 5) == first[4:]


def test_mapper_that_rejects_everything(dataset):
    with pytest.raises(ValueError, match=r"returned None for 100 samples .* \d.png"):
        next(iter(build_train_loader(config(dataset), lambda record: None)))


def test_sizes_of_records_without_size_are_read_from_images(register, tmp_path, monkeypatch):
    """As in semantic data sets. The EXIF orientation counts."""
    records = []
    for i, (height, width) in enumerate(SIZES):
        exif = Image.Exif()
        if i == 0:
            exif[0x0112], (height, width) = 6, (width, height)
        path = tmp_path / f"{i}.jpg"
        Image.new("RGB", (width, height)).save(path, exif=exif)
        records.append({"file_name": str(path), "image_id": i, "sem_seg_file_name": "none"})
    with_sizes = [
        {"file_name": f"{i}.jpg", "image_id": i, "height": height, "width": width}
        for i, (height, width) in enumerate(SIZES)
    ]
    opened = []
    read_header = loader_module._image_is_wide
    monkeypatch.setattr(
        loader_module, "_image_is_wide", lambda path: opened.append(path) or read_header(path)
    )
    cfg = config(register("no_sizes", records), ASPECT_RATIO_GROUPING=True)
    expected = config(register("sizes", with_sizes), ASPECT_RATIO_GROUPING=True)
    assert ids(build_train_loader(cfg, draw_numbers), 20) == ids(
        build_train_loader(expected, draw_numbers), 20
    )
    assert len(opened) == len(SIZES), "a header was read twice"


def test_bad_batch_size(dataset, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH is 2, .* of workers, 4"):
        build_train_loader(config(dataset), draw_numbers)


def test_bad_datasets(register, dataset, tmp_path):
    with pytest.raises(
        ValueError, match="'loader_tset' is not registered; did you mean loader_test"
    ):
        build_train_loader(config("loader_tset"), draw_numbers)

    empty = register("loader_empty", [])
    with pytest.raises(
        ValueError, match="loader_empty.*is empty.*looked for loader_empty: no paths"
    ):
        build_train_loader(config(empty), draw_numbers)

    crowd = {"file_name": "x", "annotations": [{"iscrowd": 1, "category_id": 0}]}
    crowds = register("loader_crowds", [crowd])
    with pytest.raises(ValueError, match="No valid data found in loader_crowds"):
        build_train_loader(config(crowds, FILTER_EMPTY_ANNOTATIONS=True), draw_numbers)

    cfg = config(dataset)
    cfg.DATASETS.TRAIN = ()
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty"):
        build_train_loader(cfg, draw_numbers)

    with pytest.raises(ValueError, match="Unknown training sampler: Best"):
        build_train_loader(config(dataset, SAMPLER_TRAIN="Best"), draw_numbers)


def test_error_of_a_mapper_names_the_image(dataset):
    def fail(record):
        raise ValueError("height and width must be > 0")

    with pytest.raises(ValueError, match=r"\d\.png: height and width must be > 0"):
        next(iter(build_train_loader(config(dataset), fail)))


@pytest.mark.parametrize(
    "record",
    [
        {"file_name": "x", "annotations": []},
        {"file_name": "x", "annotations": [{"iscrowd": 1, "category_id": 0}]},
        {"file_name": "x", "segments_info": [{"id": 1, "iscrowd": 1, "category_id": 0}]},
    ],
)
def test_nothing_to_train_on(register, record):
    name = register("loader_bare", [record])
    with pytest.raises(ValueError, match="loader_bare has nothing to train on: .*'annotations'"):
        build_train_loader(config(name), draw_numbers)


def test_label_maps_without_class(register, tmp_path):
    """A single labelled pixel in the last of 20 label maps is something to learn."""
    records = []
    for i in range(20):
        record = {"file_name": f"{tmp_path}/{i}.jpg", "sem_seg_file_name": f"{tmp_path}/{i}.png"}
        Image.fromarray(np.full((8, 12), 7, np.uint8)).save(record["sem_seg_file_name"])
        records.append(record)
    name = register("loader_ignored", records)
    MetadataCatalog.get(name).ignore_label = 7
    mapper = MaskFormerSemanticDatasetMapper(
        True, augmentations=[], image_format="RGB", ignore_label=7, size_divisibility=-1
    )
    message = r"'loader_ignored' cannot be used: /.* nothing to train on: .* the ignore label 7; "
    with pytest.raises(ValueError, match=message):
        build_train_loader(config(name), mapper)
    # A mapper of another project may read them otherwise.
    build_train_loader(config(name), draw_numbers)
    labels = np.full((8, 12), 7, np.uint8)
    labels[3, 4] = 0
    Image.fromarray(labels).save(tmp_path / "19.png")
    build_train_loader(config(name), mapper)
    # The mapper names what cannot be read.
    (tmp_path / "0.png").write_bytes(b"no image")
    build_train_loader(config(name), mapper)


def test_inference_mapper_equals_detectron2(tmp_path):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (9, 14, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "labels.png")
    record = {"file_name": str(tmp_path / "a.png"), "image_id": 3, "annotations": []}
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 20, 30
    for extra in ({}, {"sem_seg_file_name": str(tmp_path / "labels.png")}):
        theirs = DatasetMapper(cfg, is_train=False)(record | extra)
        ours = loader_module.InferenceMapper(cfg)(record | extra)
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert torch.equal(ours[key], value) if torch.is_tensor(value) else ours[key] == value


def test_very_long_image_in_inference(tmp_path):
    Image.new("RGB", (3000, 3)).save(tmp_path / "a.png")
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    sample = loader_module.InferenceMapper(cfg)({"file_name": str(tmp_path / "a.png")})
    assert sample["image"].shape == (3, 1, 96) and sample["height"] == 3


def test_iterable_dataset_raises(register):
    class Stream(IterableDataset):
        def __iter__(self):
            yield {}

    with pytest.raises(ValueError, match="loader_stream.*IterableDataset"):
        build_train_loader(config(register("loader_stream", Stream())), draw_numbers)


def test_test_loader(register, tmp_path):
    """Yields each image once, in order; an error names an unreadable image."""
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), np.uint8)).save(
            tmp_path / name
        )
    records = [{"file_name": str(path)} for path in sorted(tmp_path.iterdir())]
    name = register("loader_images", records)
    loader = build_test_loader(config(name), name)
    assert [[sample["file_name"] for sample in batch] for batch in loader] == [
        [record["file_name"]] for record in records
    ]

    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b\.png cannot be read as an image: .*truncated"):
        list(loader)
    (tmp_path / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        list(loader)


def with_image(record):
    """A mapper whose samples have what a model uploads, and other tensors."""
    return {
        **record,
        "image": torch.full((3, 2, 2), record["image_id"], dtype=torch.uint8),
        "instances": TargetInstances((2, 2), gt_classes=torch.tensor([record["image_id"]])),
        "padding_mask": torch.zeros(2, 2),
    }


def test_batches_for_a_gpu_are_pinned(dataset, monkeypatch):
    """Only images and targets; lists and dicts stay what they are."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loader = build_train_loader(config(dataset), with_image)
    assert loader.pin_memory
    samples = [with_image({"image_id": 7, "size": (1, 2)}), "a sample of another kind"]
    batch = loader.collate_fn(samples).pin_memory()
    assert type(batch) is list and type(batch[0]) is dict and batch[1] == samples[1]
    assert batch[0]["image"].unique().tolist() == [107]
    assert batch[0]["instances"].gt_classes.tolist() == [107]
    assert batch[0]["padding_mask"].sum() == 0 and batch[0]["size"] == (1, 2)
    assert samples[0]["image"].unique().tolist() == [7]

    cfg = config(dataset)
    cfg.MODEL.DEVICE = "cpu"
    assert not build_train_loader(cfg, with_image).pin_memory


@pytest.mark.gpu
@pytest.mark.parametrize("num_workers", [0, 1])
def test_memory_is_pinned(dataset, num_workers):
    loader = build_train_loader(config(dataset, NUM_WORKERS=num_workers), with_image)
    (sample, _) = next(iter(loader))
    assert sample["image"].is_pinned() and sample["instances"].gt_classes.is_pinned()
    assert not sample["padding_mask"].is_pinned()
