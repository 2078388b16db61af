import json

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.modeling import build_model
from PIL import Image

from mask2former.inference.model_file import save_model_folder
from mask2former.predictor import Predictor

HEIGHT, WIDTH = 40, 56
METADATA = Metadata(
    name="tests_predictor",
    thing_classes=["cup", "plate"],
    stuff_classes=["cup", "plate", "table"],
    thing_dataset_id_to_contiguous_id={5: 0, 9: 1},
    stuff_dataset_id_to_contiguous_id={5: 0, 9: 1, 11: 2},
    evaluator_type="coco_panoptic_seg",
)
_cache: dict[str, Predictor] = {}


def rgb(height=HEIGHT, width=WIDTH, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.INPUT.MIN_SIZE_TEST, tiny_cfg.INPUT.MAX_SIZE_TEST = 32, 64
    tiny_cfg.DATASETS.TEST = tiny_cfg.DATASETS.TRAIN
    # So that random weights predict panoptic segments too.
    tiny_cfg.MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD = 0.0
    tiny_cfg.MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD = 0.0
    return tiny_cfg


@pytest.fixture
def predictor(cfg) -> Predictor:
    if not _cache:
        torch.manual_seed(0)
        _cache["shared"] = Predictor.from_model(build_model(cfg), cfg, METADATA)
    return _cache["shared"]


def assert_same(result, expected):
    np.testing.assert_array_equal(result.masks.full(), expected.masks.full())
    np.testing.assert_allclose(result.scores, expected.scores, atol=1e-5)
    np.testing.assert_array_equal(result.labels, expected.labels)
    np.testing.assert_array_equal(result.panoptic.segment_ids, expected.panoptic.segment_ids)
    np.testing.assert_array_equal(result.semantic, expected.semantic)


def test_result_of_the_model(predictor):
    image = rgb()
    result = predictor.predict(image)
    outputs = predictor(image[:, :, ::-1])
    assert result.image_size == (HEIGHT, WIDTH)
    assert result.class_names == ("cup", "plate", "table")
    assert list(result.scores) == sorted(outputs["instances"].scores.tolist(), reverse=True)
    order = outputs["instances"].scores.argsort(descending=True, stable=True)
    expected = outputs["instances"].pred_masks[order]
    np.testing.assert_array_equal(result.masks.full(), expected.numpy().astype(bool))
    np.testing.assert_array_equal(result.semantic, outputs["sem_seg"].argmax(0).numpy())
    assert result.semantic.dtype == np.uint8
    ids, segments = outputs["panoptic_seg"]
    np.testing.assert_array_equal(result.panoptic.segment_ids, ids.numpy())
    assert [s.id for s in result.panoptic.segments] == [s["id"] for s in segments]
    assert sum(s.area for s in result.panoptic.segments) == (ids > 0).sum()
    np.testing.assert_array_equal(result.image, image)
    assert predictor.predict(image, keep_image=False).image is None


def test_kinds_of_images(predictor, tmp_path):
    image = rgb()
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    expected = predictor.predict(image)
    sources = {
        "path": str(path),
        "pathlib": path,
        "PIL": Image.fromarray(image),
        "opened": Image.open(path),
        "tensor": torch.from_numpy(image).permute(2, 0, 1),
        "16 bit": image.astype(np.uint16) * 257,
    }
    for source in sources.values():
        assert_same(predictor.predict(source), expected)
    assert predictor.predict(path).file_name == str(path)
    assert_same(predictor.predict(image[:, :, ::-1], order="BGR"), expected)


def test_batches_of_equal_sizes_in_the_order_of_the_images(predictor, monkeypatch):
    images = [rgb(seed=0), rgb(60, 30, seed=1), rgb(seed=2), rgb(60, 30, seed=3), rgb(seed=4)]
    expected = [predictor.predict(image) for image in images]
    batches = []
    forward = predictor.model.forward

    def counted(inputs):
        batches.append([tuple(x["image"].shape) for x in inputs])
        return forward(inputs)

    monkeypatch.setattr(predictor.model, "forward", counted)
    results = predictor.predict((image for image in images), batch_size=2)
    assert [len(sizes) for sizes in batches] == [2, 2, 1]
    assert all(len(set(sizes)) == 1 for sizes in batches)
    for result, single in zip(results, expected, strict=True):
        assert result.image_size == single.image_size
        np.testing.assert_allclose(result.scores, single.scores, atol=1e-4)
    assert predictor.predict([]) == []


def test_from_pretrained_needs_nothing_but_the_folder(predictor, cfg, tmp_path):
    folder = tmp_path / "model"
    save_model_folder(predictor.model, cfg, METADATA, str(folder))
    loaded = Predictor.from_pretrained(folder, device="cpu")
    image = rgb()
    assert_same(loaded.predict(image), predictor.predict(image))
    assert loaded.class_names == ("cup", "plate", "table")
    assert loaded.metadata.thing_dataset_id_to_contiguous_id == {5: 0, 9: 1}
    description = json.loads((folder / "model.json").read_text())
    assert description["tasks"] == ["panoptic", "instance", "semantic"]
    changed = Predictor.from_pretrained(
        str(folder), device="cpu", opts=("TEST.DETECTIONS_PER_IMAGE", 2)
    )
    assert len(changed.predict(image).instances) <= 2
