import json
import re

import numpy as np
import pytest
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from small_models import randomise, small_config

from mask2former.best_checkpoint import WeightsWriter
from mask2former.config import without_added_defaults
from mask2former.inference import InstanceMasks, PredictionFilter
from mask2former.inference.model_file import save_model_folder
from mask2former.model_folder_checkpoint import ModelFolderCheckpointer
from mask2former.predictor import Predictor
from mask2former.weights.transformers import save_transformers_folder

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


def test_results_come_as_soon_as_they_are_known(predictor):
    """An image of a rare size waits, but not for the last of the others."""
    read = []

    def images():
        for i in range(12):
            read.append(i)
            yield rgb(30, 60, seed=i) if i == 0 else rgb(seed=i)

    (single,) = predictor.stream(rgb())
    assert single.image_size == (HEIGHT, WIDTH)
    stream = predictor.stream(images(), batch_size=2)
    sizes = [next(stream).image_size for _ in range(3)]
    assert sizes == [(30, 60), (HEIGHT, WIDTH), (HEIGHT, WIDTH)]
    assert len(read) < 12


def test_filter_and_scores_of_segments(predictor):
    image = rgb()
    everything = predictor.predict(image)
    scores = [segment.score for segment in everything.panoptic.segments]
    assert len(scores) > 0 and all(0 < score < 1 for score in scores)
    threshold = float(np.median(everything.scores))
    result = predictor.predict(image, filter=PredictionFilter(min_score=threshold))
    assert 0 < len(result.instances) < len(everything.instances)
    assert (result.scores >= np.float32(threshold)).all()
    assert all(s.score >= threshold for s in result.panoptic.segments)
    # As a drop-in, the model returns what the original release does.
    _, segments = predictor(image)["panoptic_seg"]
    assert all(segment.keys() == {"id", "isthing", "category_id"} for segment in segments)


def test_filter_of_tiles(predictor):
    """Segments of tiles have scores too."""
    image = rgb(60, 80)
    everything = predictor.predict(image, tile_size=32, overlap=8)
    scores = sorted(segment.score for segment in everything.panoptic.segments)
    least = PredictionFilter(min_score=(scores[0] + scores[-1]) / 2)
    result = predictor.predict(image, tile_size=32, overlap=8, filter=least)
    kept = [s for s in everything.panoptic.segments if s.score >= least.min_score]
    assert 0 < len(result.panoptic.segments) == len(kept) < len(scores)
    per_class = PredictionFilter(min_score=1.0, min_score_per_class={"cup": 0.25})
    assert per_class.least_score(predictor.class_names) == 0.25


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (rgb(), {"batch_size": 0}, "batch_size is 0; allowed: whole numbers from 1"),
        ([rgb()], {"tile_size": 32, "batch_size": 0}, "batch_size is 0"),
        (rgb(), {"overlap": 4}, "overlap and progress are of tiles: set tile_size too"),
        (rgb(), {"tile_size": 32.0}, "are 32.0 and .*; allowed: whole numbers"),
        (rgb(), {"tile_size": True}, "are True and .*; allowed: whole numbers"),
        (rgb(), {"tile_size": 32, "overlap": 17}, "the overlap from 0 to half of the size"),
        (5, {"tile_size": 32}, "int is no image"),
        ([rgb(), "missing.png"], {"tile_size": 32}, "Image 1: .*missing.png"),
        (rgb(), {"filter": {"min_score": 0.5}}, "allowed: a PredictionFilter"),
    ],
)
def test_wrong_arguments(predictor, source, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        predictor.predict(source, **options)


def test_boxes_of_instances(predictor, cfg):
    image = rgb()
    assert not predictor(image)["instances"].pred_boxes.tensor.any()
    cfg.TEST.BOXES = True
    model = build_model(cfg)
    model.load_state_dict(predictor.model.state_dict())
    with_boxes = Predictor.from_model(model, cfg, METADATA)
    instances = with_boxes(image)["instances"]
    masks = InstanceMasks.from_full(instances.pred_masks)
    np.testing.assert_array_equal(instances.pred_boxes.tensor.numpy(), masks.boxes())
    assert instances.pred_boxes.tensor.any()


def test_images_that_cannot_be_read(predictor, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    good = rgb()
    with pytest.raises(ValueError, match=r"Image 1 .*text\.jpg.* cannot be read as an image"):
        predictor.predict([good, tmp_path / "text.jpg"])
    with pytest.raises(FileNotFoundError, match=r"Image 2: .*missing\.jpg"):
        predictor.predict([good, good, str(tmp_path / "missing.jpg")])
    with pytest.raises(ValueError, match="Image 0: its values are float64"):
        predictor.predict(good / 255)
    with pytest.raises(ValueError, match="int is no image; allowed: .*, or several"):
        predictor.predict(3)
    broken = PredictionFilter(min_score_per_class={"saucer": 0.5})
    with pytest.raises(ValueError, match="no class 'saucer'"):
        # Before an image is read.
        predictor.stream([tmp_path / "missing.jpg"], filter=broken)
    with pytest.raises(ValueError, match="batch_size is 0; allowed: whole numbers from 1"):
        predictor.predict([good], batch_size=0)


@pytest.mark.parametrize(("image_format", "channels"), [("L", 1), ("BANDS", 5)])
def test_other_channels(cfg, image_format, channels, tmp_path):
    cfg.INPUT.FORMAT = image_format
    cfg.MODEL.PIXEL_MEAN = [100.0] * channels
    cfg.MODEL.PIXEL_STD = [50.0] * channels
    predictor = Predictor.from_model(build_model(cfg), cfg, METADATA)
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, channels), np.uint8)
    np.save(tmp_path / "image.npy", image)
    result = predictor.predict(image)
    assert result.image_size == (HEIGHT, WIDTH) and result.image.shape == (HEIGHT, WIDTH, 3)
    if image_format == "BANDS":
        assert_same(predictor.predict(tmp_path / "image.npy"), result)
    assert_same(predictor.predict(torch.from_numpy(image).permute(2, 0, 1)), result)


def test_class_names_of_a_test_set_of_things_only(cfg):
    """A panoptic model may be tested on the instances of its things."""
    names = {"tests_only_things": ["cup", "plate"], "tests_all_classes": ["cup", "plate", "table"]}
    for name, classes in names.items():
        MetadataCatalog.get(name).set(thing_classes=classes, stuff_classes=classes)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("tests_all_classes",), ("tests_only_things",)
    metadata = MetadataCatalog.get("tests_only_things")
    predictor = Predictor.from_model(torch.nn.Identity(), cfg, metadata)
    assert predictor.class_names == ("cup", "plate", "table")


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


def test_from_pretrained_finds_what_a_training_wrote(predictor, cfg, tmp_path, capsys, caplog):
    """The best model before the last; before the end the last checkpoint with config.yaml."""
    cfg.OUTPUT_DIR = str(tmp_path)
    MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).set(
        thing_classes=["cup", "plate"], stuff_classes=["cup", "plate", "table"]
    )
    (tmp_path / "config.yaml").write_text(without_added_defaults(cfg).dump())
    checkpointer = ModelFolderCheckpointer(predictor.model, str(tmp_path), cfg, "_final")
    checkpointer.save("model_0000001")
    assert not (tmp_path / "model_0000001").exists()
    image = rgb()
    expected = predictor.predict(image)
    for path in (tmp_path, tmp_path / "model_0000001.pth"):
        loaded = Predictor.from_pretrained(path, device="cpu")
        assert_same(loaded.predict(image), expected)
        assert loaded.class_names == ("cup", "plate", "table")
    checkpointer.save("model_final")
    assert (tmp_path / "model_final.pth").is_file()
    (tmp_path / "config.yaml").unlink()
    assert_same(Predictor.from_pretrained(tmp_path, device="cpu").predict(image), expected)
    cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = False
    WeightsWriter(predictor.model, str(tmp_path), cfg).save("model_best")
    best = Predictor.from_pretrained(tmp_path, device="cpu")
    assert best.predict(image).panoptic is None
    with pytest.raises(FileNotFoundError, match=r"model_final\.pth has no config\.yaml beside it"):
        Predictor.from_pretrained(tmp_path / "model_final.pth")
    # Each load says what it filled.
    printed = capsys.readouterr().err + caplog.text
    coverage = re.findall(r"backbone (\d+) of (\d+), pixel decoder (\d+) of (\d+), ", printed)
    assert len(coverage) == 4
    assert all(x[0] == x[1] and x[2] == x[3] for x in coverage)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.onnx", r"a\.onnx is an exported model: load it by mask2former\.export\.load_exported"),
        ("model.json", r"model\.json describes a model: name its folder"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, name, message):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=message):
        Predictor.from_pretrained(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"model_type": "bert"}', "model_type 'bert', not mask2former"), ("{", "cannot be read as")],
)
def test_other_folders_of_transformers(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
        Predictor.from_pretrained(tmp_path)


def test_device_of_the_overrides(predictor, cfg, tmp_path):
    save_model_folder(predictor.model, cfg, METADATA, tmp_path / "model")
    with pytest.raises(ValueError, match="MODEL.DEVICE .*cuda:99"):
        Predictor.from_pretrained(tmp_path / "model", opts=("MODEL.DEVICE", "cuda:99"))
    cpu = Predictor.from_pretrained(
        tmp_path / "model", device="cpu", opts=("MODEL.DEVICE", "cuda:99")
    )
    assert cpu.cfg.MODEL.DEVICE == "cpu"


def test_from_pretrained_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        Predictor.from_pretrained(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="holds no model: neither model.safetensors, "):
        Predictor.from_pretrained(tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(FileNotFoundError, match="names 'model_0000001.pth', which is no file"):
        Predictor.from_pretrained(tmp_path)


def test_from_pretrained_does_not_fit(predictor, cfg, tmp_path):
    cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD = 64
    save_model_folder(predictor.model, cfg, METADATA, str(tmp_path))
    with pytest.raises(ValueError, match="does not fit the model of this config"):
        Predictor.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="MODEL.DEVICE is 'nonsense"):
        Predictor.from_pretrained(tmp_path, device="nonsense")


def test_from_pretrained_of_transformers(tmp_path):
    """A folder of that package, with class names, task and sizes."""
    cfg = small_config("resnet", False, INPUT__MIN_SIZE_TEST=64, INPUT__MAX_SIZE_TEST=96)
    name = "tests_predictor_transformers"
    names = [f"class {i}" for i in range(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)]
    MetadataCatalog.get(name).set(
        stuff_classes=names,
        thing_classes=names[:2],
        thing_dataset_id_to_contiguous_id={0: 0, 1: 1},
    )
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    # Random weights are never sure.
    thresholds = "OBJECT_MASK_THRESHOLD", "OVERLAP_THRESHOLD"
    opts = [x for key in thresholds for x in (f"MODEL.MASK_FORMER.TEST.{key}", 0.0)]
    cfg.merge_from_list(opts)
    model = build_model(cfg)
    randomise(model, 0)
    expected = Predictor.from_model(model, cfg, MetadataCatalog.get(name)).predict(rgb())
    assert len(expected.panoptic.segments) > 1
    save_transformers_folder(model.state_dict(), cfg, str(tmp_path / "folder"))
    loaded = Predictor.from_pretrained(tmp_path / "folder", device="cpu", opts=opts)
    assert loaded.class_names == tuple(names)
    assert (loaded.cfg.INPUT.MIN_SIZE_TEST, loaded.cfg.INPUT.MAX_SIZE_TEST) == (64, 96)
    result = loaded.predict(rgb())
    np.testing.assert_array_equal(result.panoptic.segment_ids, expected.panoptic.segment_ids)
    assert [s.label for s in result.panoptic.segments] == [
        s.label for s in expected.panoptic.segments
    ]
