"""Pictures at evaluations: ground truth beside prediction, and hard examples."""

import itertools
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import own_data
import pytest
import torch
import toy_training as toy
from dataset_trees import HEIGHT, WIDTH
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from mask2former.config import register_custom_datasets
from mask2former.data.loader import Draw, ResumableBatchSampler, build_test_loader
from mask2former.pictures import (
    HardExamples,
    NotDrawableError,
    choose_samples,
    described,
    predictions_row,
    sample_cell,
)
from mask2former.trainer import Trainer
from mask2former.utils.files import WriteError

NAMES = ("pictures_semantic", "pictures_panoptic", "pictures_instance")


@META_ARCH_REGISTRY.register()
class PictureArchitecture(nn.Module):
    """Predicts class 1 everywhere, for any number of classes above 1."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.sizes = []

    def forward(self, batch):
        if self.training:
            return {"loss_a": self.weight * len(batch), "loss_a_0": self.weight * 100}
        self.sizes += [(sample["height"], sample["width"]) for sample in batch]
        return [self.predict(sample["height"], sample["width"]) for sample in batch]

    @staticmethod
    def predict(height, width):
        logits = torch.zeros(3, height, width)
        logits[1] = 1
        instances = Instances((height, width))
        instances.scores = torch.ones(1)
        instances.pred_classes = torch.zeros(1, dtype=torch.int64)
        instances.pred_masks = torch.ones(1, height, width)
        segments = [{"id": 1, "category_id": 0, "isthing": True}]
        ids = torch.ones(height, width, dtype=torch.int32)
        return {"sem_seg": logits, "instances": instances, "panoptic_seg": (ids, segments)}


@pytest.fixture
def cfg(tmp_path):
    """Config of a training on three photographs, evaluated at 2 and after 3 iterations."""
    cfg = toy.toy_config(tmp_path / "output")
    root = tmp_path / "data"
    own_data.semantic(root)
    own_data.panoptic(root)
    own_data.instances(root)
    kinds = [name.partition("_")[2] for name in NAMES]
    cfg.DATASETS.CUSTOM = [
        own_data.entry(kind, root, name) for kind, name in zip(kinds, NAMES, strict=True)
    ]
    register_custom_datasets(cfg)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = NAMES[:1]
    cfg.MODEL.META_ARCHITECTURE = "PictureArchitecture"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN = (16,)
    cfg.INPUT.MIN_SIZE_TEST = 16
    cfg.INPUT.CROP.ENABLED = False
    cfg.SOLVER.MAX_ITER = 3
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    cfg.TEST.EVAL_PERIOD = 2
    cfg.SEED = 1
    yield cfg
    for name in NAMES:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class PictureTrainer(Trainer):
    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {"task": {"metric": 1.0}}


def train(cfg, resume=False):
    trainer = PictureTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


def found(cfg):
    folder = f"{cfg.OUTPUT_DIR}/pictures"
    return sorted(str(path.relative_to(folder)) for path in paths(cfg))


def paths(cfg):
    return list(Path(cfg.OUTPUT_DIR, "pictures").rglob("*"))


FILES = ["hard_examples.png", "pictures_semantic.png"]


def test_files_and_tensorboard(cfg):
    """After iteration 1 and after the last; a sheet has a row for each of two images."""
    cfg.LOGGING.PICTURES = 2
    trainer = train(cfg)
    folders = ["0000001", "0000003"]
    assert found(cfg) == sorted(folders + [f"{a}/{b}" for a in folders for b in FILES])
    sheets = [np.asarray(Image.open(path)) for path in paths(cfg) if path.name == FILES[1]]
    assert np.array_equal(*sheets)  # the same images each time; this model does not change
    assert sheets[0].shape[0] > 2 * 400 * HEIGHT / WIDTH and sheets[0].shape[1] > 3 * 400
    events = EventAccumulator(cfg.OUTPUT_DIR, size_guidance={"images": 0}).Reload()
    for name in ("pictures/pictures_semantic", "pictures/hard_examples"):
        assert [event.step for event in events.Images(name)] == [1, 3]
    # Two images at both evaluations, at the size of the drawing.
    assert trainer.model.sizes == [(round(400 * HEIGHT / WIDTH), 400)] * 4
    assert trainer.model.training


def test_off(cfg):
    cfg.LOGGING.PICTURES = cfg.LOGGING.HARD_EXAMPLES = 0
    assert train(cfg).model.sizes == [] and paths(cfg) == []


def test_each_on_its_own(cfg):
    cfg.LOGGING.PICTURES = 0
    train(cfg)
    assert {path.name for path in paths(cfg) if path.suffix} == {FILES[0]}


def test_evaluation_that_was_cut_off(cfg, monkeypatch):
    """Killed between checkpoint and pictures: the resumed run draws the same."""
    with monkeypatch.context() as patched:
        patched.setattr("mask2former.pictures.Pictures._draw", lambda self: kill())
        patched.setattr("mask2former.writers.MetricsWriter.write", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            train(cfg)
    assert paths(cfg) == []
    train(cfg, resume=True)
    resumed = {path.parent.name: path.read_bytes() for path in paths(cfg) if path.name == FILES[0]}
    cfg.OUTPUT_DIR += "_whole"
    train(cfg)
    whole = {path.parent.name: path.read_bytes() for path in paths(cfg) if path.name == FILES[0]}
    assert resumed == whole and whole.keys() == {"0000001", "0000003"}


def kill():
    raise KeyboardInterrupt


def test_model_that_cannot_be_drawn(cfg, monkeypatch, caplog):
    """Training goes on, with one message; what else can be drawn still is."""

    def fail(height, width):
        raise RuntimeError("no prediction")

    monkeypatch.setattr(PictureArchitecture, "predict", staticmethod(fail))
    trainer = train(cfg)
    assert trainer.iter == 3
    (record,) = (r for r in caplog.records if r.levelno >= logging.ERROR)
    assert "No pictures of pictures_semantic from here on" in record.getMessage()
    assert {path.name for path in paths(cfg) if path.suffix} == {FILES[0]}


def test_folder_that_cannot_be_written(cfg, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "pictures").write_text("in the way")
    with pytest.raises(WriteError, match="output/pictures"):
        train(cfg)


def test_choice_of_samples(cfg):
    loader = build_test_loader(cfg, NAMES[0])
    files = [
        [record["file_name"] for _, record in choose_samples(loader, NAMES[0], number)]
        for number in (2, 2, 9)
    ]
    assert files[0] == files[1] and len(set(files[0])) == 2
    assert files[2] == [record["file_name"] for record in DatasetCatalog.get(NAMES[0])]
    with pytest.raises(NotDrawableError, match=r"pictures_semantic has 1 of 3 images"):
        choose_samples(SimpleNamespace(dataset=[{}]), NAMES[0], 1)
    with pytest.raises(NotDrawableError, match=r"image 0 of .* and None in its loader"):
        choose_samples(SimpleNamespace(dataset=[{}] * 3), NAMES[0], 3)


@pytest.mark.parametrize("name", NAMES)
def test_row_of_an_image(cfg, name):
    """Image, then ground truth and prediction of three tasks, whichever of them it has."""
    ((sample, record),) = choose_samples(build_test_loader(cfg, name), name, 1)
    model = PictureArchitecture(cfg)
    tasks = ["panoptic", "instance", "semantic"]
    row = predictions_row(model, sample, record, described(name, 3), tasks)
    image, gts, predictions = row[0], row[1::2], row[2::2]
    assert len(row) == 7 and {cell.shape for cell in row} == {(267, 400, 3)}
    assert all((cell != image).any() for cell in gts + predictions)
    # The upper right of the photograph is no thing; the whole of it is one in the prediction.
    corner = np.s_[20:100, 300:380]
    changes = [np.abs(gt[corner].astype(int) - image[corner]).mean() for gt in gts]
    if name != "pictures_semantic":
        assert changes[1] < 3
    assert model.training


def test_record_without_ground_truth(cfg):
    ((sample, record),) = choose_samples(build_test_loader(cfg, NAMES[0]), NAMES[0], 1)
    record = {key: value for key, value in record.items() if key != "sem_seg_file_name"}
    row = predictions_row(
        PictureArchitecture(cfg), sample, record, described(NAMES[0], 3), ["semantic"]
    )
    assert [cell.shape for cell in row] == [(267, 400, 3), (1, 1, 3), (267, 400, 3)]


# ---- hard examples ----


def make_sample(labels, size=(10, 20)):
    instances = Instances(size)
    instances.gt_classes = torch.tensor(labels, dtype=torch.int64)
    instances.gt_masks = torch.zeros(len(labels), *size, dtype=torch.bool)
    instances.gt_masks[:, :, 10:] = True
    image = torch.full((3, *size), 100, dtype=torch.uint8)
    return {"image": image, "instances": instances, "file_name": "/data/a.jpg"}


def test_cell_of_a_sample():
    """The name, the image, and the image with a mask on its right half."""
    cell = sample_cell(make_sample([0]), described("none", 1), "RGB")
    assert cell.shape == (18 + 120, 480, 3)
    image, drawn = cell[18:, :240].astype(int), cell[18:, 240:].astype(int)
    assert (image == 100).all()
    assert (drawn[:, :100] == 100).all() and (drawn[:, 130:] != 100).any(-1).mean() > 0.9
    assert (cell[:18] != 255).any()


@pytest.mark.parametrize("size", [(10, 20), (1, 1)])
def test_cell_without_objects_and_of_unknown_classes(size):
    metadata = described("none", 1)
    cell = sample_cell(make_sample([], size), metadata, "BGR")
    assert (cell[18:] == 100).all()
    sample_cell(make_sample([7]), metadata, "RGB")


@pytest.mark.parametrize(
    "sample", [{}, {"image": torch.zeros(3, 4, 4)}, {"image": torch.zeros(4), "instances": []}]
)
def test_sample_that_is_no_image(sample):
    with pytest.raises(NotDrawableError, match="no image with instances"):
        sample_cell(sample, described("none", 1), "RGB")


def hard_examples(number, period, losses):
    """Observes one loss per iteration; the draws of iteration i are those of record i."""
    hook = HardExamples(number, period)
    hook._sampler = SimpleNamespace(draws=lambda iteration: [Draw(1, iteration, iteration)])
    for iteration, loss in losses:
        hook.observe(iteration, {"loss_a": torch.tensor(loss), "loss_a_0": torch.tensor(99.0)})
    return hook


def test_largest_losses_are_kept():
    """Of the last layer, the earlier one first if they are equal."""
    hook = hard_examples(2, 0, enumerate([1.0, 3.0, 2.0, 3.0, 0.0]))
    saved = hook.state_dict()
    assert saved == {"worst": [(3.0, 1, [(1, 1, 1)]), (3.0, 3, [(1, 3, 3)])]}
    resumed = HardExamples(1, 0)
    resumed.load_state_dict(saved)
    assert resumed.take() == [(3.0, 1, [Draw(1, 1, 1)])]
    assert [iteration for _, iteration, _ in hook.take()] == [1, 3] and hook.take() == []


def test_losses_before_an_evaluation_are_forgotten():
    """A checkpoint just before the evaluation after iteration 3 has them."""
    hook = hard_examples(3, 4, [(2, 9.0), (3, 8.0), (4, 1.0), (5, 2.0)])
    assert [iteration for _, iteration, _ in hook.take()] == [5, 4]


def test_draws_of_an_iteration():
    sampler = ResumableBatchSampler(itertools.count(), 2, seed=5, reseed=lambda seed: [])
    sampler.seek(5, 3)
    batches = list(itertools.islice(sampler, 2))
    assert [sampler.draws(3), sampler.draws(4)] == batches
    assert batches[0] == [Draw(5, 6, 6), Draw(5, 7, 7)]
    for iteration in (2, 5):
        with pytest.raises(KeyError):
            sampler.draws(iteration)
    next(itertools.islice(sampler, 3000, None))
    assert len(sampler._recent) <= 1024
