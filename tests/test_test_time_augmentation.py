"""Test-time augmentation: hand-computed means, the original sum, records without an image."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.evaluation import inference_context
from detectron2.modeling import DatasetMapperTTA, build_model
from PIL import Image
from torch import nn

from mask2former.config import check_config
from mask2former.test_time_augmentation import SemanticSegmentorWithTTA

_EXIF_ORIENTATION = 0x0112


class Scores(nn.Module):
    """Returns the image at the output size as scores; records the sizes of its inputs."""

    def __init__(self, key: str = "sem_seg"):
        super().__init__()
        self.key = key
        self.batches: list[list[tuple[int, ...]]] = []
        self.alive: list[weakref.ref] = []
        self.max_alive = 0

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        self.batches.append([tuple(x["image"].shape[1:]) for x in batched_inputs])
        outputs = []
        for x in batched_inputs:
            size = (x["height"], x["width"])
            outputs.append({self.key: F.interpolate(x["image"][None].float(), size=size)[0]})
            self.alive.append(weakref.ref(outputs[-1][self.key]))
        self.max_alive = max(self.max_alive, sum(ref() is not None for ref in self.alive))
        return outputs


class ShortSide(Scores):
    """Every score is the height of the image that the model saw."""

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        outputs = super().forward(batched_inputs)
        for x, output in zip(batched_inputs, outputs, strict=True):
            output["sem_seg"].fill_(x["image"].shape[1])
        return outputs


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.INPUT.FORMAT = "RGB"
    tiny_cfg.TEST.AUG.MIN_SIZES = (4, 8)
    tiny_cfg.TEST.AUG.MAX_SIZE = 100
    tiny_cfg.TEST.AUG.FLIP = True
    return tiny_cfg


@pytest.fixture
def image() -> torch.Tensor:
    """4 × 6 pixels, brighter to the right, different in each channel."""
    row = torch.tensor([0, 10, 20, 30, 40, 50], dtype=torch.uint8)
    return torch.stack([row, row + 100, row + 200]).unsqueeze(1).repeat(1, 4, 1)


def test_mean_over_sizes_and_flips(cfg, image):
    model = ShortSide()
    (output,) = SemanticSegmentorWithTTA(cfg, model)([{"image": image, "height": 5, "width": 7}])
    assert list(output) == ["sem_seg"]
    # Heights 4, 4, 8, 8.
    assert torch.equal(output["sem_seg"], torch.full((3, 5, 7), 6.0))
    assert model.batches == [[(4, 6)], [(4, 6)], [(8, 12)], [(8, 12)]]


def test_flips_are_undone(cfg, image):
    cfg.TEST.AUG.MIN_SIZES = (4,)
    (output,) = SemanticSegmentorWithTTA(cfg, Scores())([{"image": image}])
    # Otherwise the mean of a row and its mirror image would be 25 everywhere.
    assert torch.equal(output["sem_seg"], image.float())
    cfg.TEST.AUG.FLIP = False
    model = Scores()
    SemanticSegmentorWithTTA(cfg, model)([{"image": image}])
    assert len(model.batches) == 1


def test_same_as_the_original_sum(cfg, make_input):
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = False
    cfg.TEST.AUG.MIN_SIZES = (32, 48, 72)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    record = {"image": make_input(40, 56, [])["image"], "height": 50, "width": 70}
    total = 0
    with torch.no_grad():
        for i, augmented in enumerate(DatasetMapperTTA(cfg)(record)):
            scores = model([augmented])[0]["sem_seg"]
            total = total + (scores.flip(dims=[2]) if i % 2 else scores)
    for batch_size in (1, 2, 5):
        (output,) = SemanticSegmentorWithTTA(cfg, model, batch_size=batch_size)([record])
        torch.testing.assert_close(output["sem_seg"], total / 6, atol=1e-6, rtol=1e-5)


def test_images_of_one_size_share_a_batch(cfg, image):
    model = Scores()
    (output,) = SemanticSegmentorWithTTA(cfg, model, batch_size=3)([{"image": image}])
    assert model.batches == [[(4, 6), (4, 6)], [(8, 12), (8, 12)]]
    assert output["sem_seg"].shape == (3, 4, 6)


def test_memory_does_not_grow_with_augmentations(cfg, image):
    cfg.TEST.AUG.MIN_SIZES = tuple(range(4, 14))
    model = Scores()
    SemanticSegmentorWithTTA(cfg, model)([{"image": image}, {"image": image}])
    assert len(model.alive) == 40
    # The current scores, and the previous ones, to which a loop variable still refers.
    assert model.max_alive <= 2


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_image_is_read_upright_in_the_models_format(cfg, image, tmp_path, image_format):
    cfg.INPUT.FORMAT = image_format
    cfg.TEST.AUG.MIN_SIZES = (4,)
    pixels = image.permute(1, 2, 0).numpy()  # (4, 6, 3) upright
    exif = Image.Exif()
    exif[_EXIF_ORIENTATION] = 6  # stored rotated: to be turned clockwise
    path = tmp_path / "a.png"
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(path, exif=exif)
    (output,) = SemanticSegmentorWithTTA(cfg, Scores())([{"file_name": str(path)}])
    expected = image if image_format == "RGB" else image.flip(0)
    assert torch.equal(output["sem_seg"], expected.float())


def test_panoptic_and_instance_inference_are_skipped(cfg, image, monkeypatch):
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        record = {"image": image.repeat(1, 8, 8)}
        cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = (32,), False
        expected = model([record])[0]["sem_seg"]

    def refuse(*args):
        raise AssertionError("must not run")

    monkeypatch.setattr(model, "panoptic_inference", refuse)
    monkeypatch.setattr(model, "instance_inference", refuse)
    tta = SemanticSegmentorWithTTA(cfg, model)
    (output,) = tta([record])
    torch.testing.assert_close(output["sem_seg"], expected)
    assert model.panoptic_on and model.instance_on
    monkeypatch.setattr(model, "semantic_inference", refuse)
    with pytest.raises(AssertionError, match="must not run"):
        tta([record])
    assert model.panoptic_on and model.instance_on


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_restores_the_mode_of_the_model(cfg, training):
    model = Scores().train(training)
    tta = SemanticSegmentorWithTTA(cfg, model)
    with inference_context(tta):
        assert not model.training
    assert model.training is training


def test_model_wrapped_for_distributed_training(cfg, image, monkeypatch):
    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    name = "mask2former.test_time_augmentation.DistributedDataParallel"
    monkeypatch.setattr(name, Wrapped)
    model = Scores()
    assert SemanticSegmentorWithTTA(cfg, Wrapped(model)).model is model


def test_bad_arguments(cfg, image):
    with pytest.raises(ValueError, match="batch_size is 0"):
        SemanticSegmentorWithTTA(cfg, Scores(), batch_size=0)
    with pytest.raises(ValueError, match=r"'image' or 'file_name', got \['height'\]"):
        SemanticSegmentorWithTTA(cfg, Scores())([{"height": 3}])
    with pytest.raises(ValueError, match=r"returns \['instances'\] but no 'sem_seg'"):
        SemanticSegmentorWithTTA(cfg, Scores("instances"))([{"image": image}])
    with pytest.raises(ValueError, match="returned no images for a.jpg"):
        SemanticSegmentorWithTTA(cfg, Scores(), tta_mapper=lambda record: [])(
            [{"image": image, "file_name": "a.jpg"}]
        )
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = False
    with pytest.raises(ValueError, match=r"SEMANTIC_ON to True"):
        SemanticSegmentorWithTTA(cfg, build_model(cfg))


def test_config_is_checked(cfg):
    cfg.TEST.AUG.ENABLED = True
    check_config(cfg)
    cfg.TEST.AUG.MIN_SIZES = ()
    with pytest.raises(ValueError, match=r"TEST\.AUG\.MIN_SIZES is \(\)"):
        check_config(cfg)
    cfg.TEST.AUG.MIN_SIZES = (4, 0)
    with pytest.raises(ValueError, match=r"TEST\.AUG\.MIN_SIZES is \(4, 0\)"):
        check_config(cfg)
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (4,), 0
    with pytest.raises(ValueError, match=r"TEST\.AUG\.MAX_SIZE is 0"):
        check_config(cfg)
    cfg.TEST.AUG.MAX_SIZE = 10
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = False
    with pytest.raises(ValueError, match=r"SEMANTIC_ON is False"):
        check_config(cfg)
    cfg.TEST.AUG.ENABLED = False
    check_config(cfg)
