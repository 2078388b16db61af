import json
import logging
import os

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from mask2former.inference import model_file
from mask2former.inference.model_file import (
    is_model_file,
    load_model_folder,
    save_model_folder,
)
from mask2former.utils.files import WriteError

METADATA = Metadata(
    name="tests_model_file",
    thing_classes=["cup", "plate"],
    stuff_classes=["cup", "plate", "table"],
    stuff_colors=np.array([[1, 2, 3]] * 3),
    thing_dataset_id_to_contiguous_id={5: 0, 9: 1},
    evaluator_type="coco_panoptic_seg",
    json_file="/secret/place/instances.json",
)


class Model(nn.Module):
    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        nn.init.constant_(self.layer.weight, value)
        self.tied = self.layer.weight
        self.register_buffer("brain", torch.full((), value, dtype=torch.bfloat16))
        self.criterion = nn.Module()
        self.criterion.register_buffer("empty_weight", torch.ones(4))


@pytest.fixture
def cfg(tiny_cfg) -> CfgNode:
    tiny_cfg.MODEL.WEIGHTS = "/secret/place/model.pkl"
    tiny_cfg.OUTPUT_DIR = "/secret/place"
    tiny_cfg.DATASETS.CUSTOM = [{"IMAGE_ROOT": "/secret/place/images"}]
    tiny_cfg.SOLVER.STEPS = (100, 200)
    tiny_cfg.MODEL.MASK_FORMER.EXTRA_LOSSES = [["boundary", 0.5]]
    return tiny_cfg


@pytest.fixture
def folder(cfg, tmp_path):
    save_model_folder(Model(), cfg, METADATA, str(tmp_path / "model"))
    return tmp_path / "model"


def edit(folder, change, *, tensors=None):
    """Rewrites the weights file with a changed description."""
    path = str(folder / "model.safetensors")
    with safe_open(path, "pt") as file:
        text = file.metadata()["mask2former"]
        tensors = tensors or {name: file.get_tensor(name) for name in file.keys()}
    description = json.loads(text)
    change(description)
    save_file(tensors, path, {"mask2former": json.dumps(description)})


def test_round_trip(folder, cfg):
    assert sorted(os.listdir(folder)) == ["model.json", "model.safetensors"]
    loaded = load_model_folder(str(folder))
    assert loaded.path == str(folder / "model.safetensors")
    assert loaded.class_names == ("cup", "plate", "table")
    assert loaded.metadata.thing_dataset_id_to_contiguous_id == {5: 0, 9: 1}
    assert loaded.metadata.stuff_colors == [[1, 2, 3]] * 3
    expected = cfg.clone()
    expected.MODEL.WEIGHTS, expected.OUTPUT_DIR = "", "./output"
    del expected.DATASETS["CUSTOM"]
    # Up to tuples within tuples, which JSON makes lists.
    assert json.loads(json.dumps(loaded.cfg)) == json.loads(json.dumps(expected))
    assert loaded.cfg.SOLVER.STEPS == (100, 200)
    with safe_open(loaded.path, "pt") as file:
        names = set(file.keys())
        assert file.get_tensor("brain").dtype == torch.bfloat16
    assert names == {"layer.weight", "layer.bias", "tied", "brain"}  # without the losses'


def test_the_weights_file_alone_is_complete(folder, tmp_path):
    alone = tmp_path / "renamed.safetensors"
    (folder / "model.safetensors").rename(alone)
    assert is_model_file(str(alone))
    assert load_model_folder(str(alone)).class_names == ("cup", "plate", "table")


def test_no_paths_of_the_machine(folder):
    for path in folder.iterdir():
        assert b"/secret/place" not in path.read_bytes()


def test_description_for_people(folder):
    description = json.loads((folder / "model.json").read_text())
    assert description["tasks"] == ["panoptic", "instance", "semantic"]
    assert description["input"] == {"FORMAT": "BGR", "MIN_SIZE_TEST": 800, "MAX_SIZE_TEST": 1333}
    assert description["thresholds"] == {"OBJECT_MASK_THRESHOLD": 0.0, "OVERLAP_THRESHOLD": 0.0}


def test_overrides(folder):
    opts = ("INPUT.MIN_SIZE_TEST", 640, "MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "False")
    loaded = load_model_folder(str(folder), opts).cfg
    assert loaded.INPUT.MIN_SIZE_TEST == 640
    assert loaded.MODEL.MASK_FORMER.TEST.PANOPTIC_ON is False
    for opts, problem in (
        (("INPUT.MIN_SIZE", 640), "Override INPUT.MIN_SIZE=640: Non-existent key"),
        (("INPUT.MIN_SIZE_TEST", "large"), "Override INPUT.MIN_SIZE_TEST='large'"),
        (("INPUT.MIN_SIZE_TEST",), "pairs KEY VALUE, but got 1"),
    ):
        with pytest.raises(ValueError, match=problem):
            load_model_folder(str(folder), opts)


def test_keys_of_another_project(cfg, tmp_path):
    cfg.MY_KEY = 3
    save_model_folder(Model(), cfg, METADATA, str(tmp_path))
    with pytest.raises(ValueError, match="does not fit this version and .*MY_KEY"):
        load_model_folder(str(tmp_path))

    def extend(cfg):
        cfg.MY_KEY = 0

    assert load_model_folder(str(tmp_path), extend_config=extend).cfg.MY_KEY == 3


def test_interrupted_before_the_json(folder, cfg, monkeypatch, caplog):
    """The folder holds the new model then, and says that model.json does not belong to it."""
    cfg.INPUT.MIN_SIZE_TEST = 123
    write = model_file.atomic_write

    def interrupted(path, *mode):
        if path.endswith(".json"):
            raise KeyboardInterrupt
        return write(path, *mode)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model_file, "atomic_write", interrupted)
        save_model_folder(Model(2.0), cfg, METADATA, str(folder))
    with caplog.at_level(logging.WARNING):
        loaded = load_model_folder(str(folder))
    assert loaded.cfg.INPUT.MIN_SIZE_TEST == 123
    with safe_open(loaded.path, "pt") as file:
        assert (file.get_tensor("layer.weight") == 2).all()
    assert "model.json is not what" in caplog.text and "which counts" in caplog.text
    save_model_folder(Model(2.0), cfg, METADATA, str(folder))
    caplog.clear()
    load_model_folder(str(folder))
    assert not caplog.records


def test_interrupted_in_the_weights(folder, cfg, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def half(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half of a file")
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(model_file, "save_file", half)
    with pytest.raises(WriteError, match=r"Cannot write \S*model\.safetensors: No space left"):
        save_model_folder(Model(2.0), cfg, METADATA, str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_weights(folder):
    edit(folder, lambda d: None, tensors={"layer.weight": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="is damaged: its weights do not have the checksum"):
        load_model_folder(str(folder))


def test_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="model.safetensors cannot be read: it is truncated"):
        load_model_folder(str(folder))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda d: d.update(format=2, mask2former="9.1"), "by Mask2Former 9.1 in format 2; .*up"),
        (lambda d: d.pop("config"), "description .* is damaged .*config"),
        (lambda d: d.update(class_names="cup"), "description .* is damaged"),
        (
            lambda d: d["class_names"].pop(),
            "names 2 classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is",
        ),
        (lambda d: d["config"].update(NEW_KEY=1), "its config does not fit this version .*NEW_KEY"),
    ],
)
def test_other_descriptions(folder, change, problem):
    edit(folder, change)
    with pytest.raises(ValueError, match=problem):
        load_model_folder(str(folder))


def test_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist"):
        load_model_folder(str(tmp_path))
    save_file({"weight": torch.zeros(2)}, str(tmp_path / "model.safetensors"))
    assert not is_model_file(str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match="holds weights only, without the config and the classes"):
        load_model_folder(str(tmp_path))
