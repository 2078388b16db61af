"""tools/convert_weights.py: models to and from the transformers package, as a user runs it."""

import logging

import pytest
import torch
import yaml
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from load_script import load_script
from safetensors.torch import load_file
from small_models import randomise, small_config

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.config import load_config
from mask2former.inference.model_file import save_model_folder
from mask2former.weights.transformers import load_transformers_folder

tool = load_script("tools/convert_weights.py")
COCO = "coco_2017_val_panoptic_with_sem_seg"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint, its config file, and the model."""
    folder = tmp_path_factory.mktemp("run")
    cfg = small_config("swin", False)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 133
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (COCO,)
    model = build_model(cfg)
    randomise(model, 0)
    torch.save({"model": model.state_dict(), "iteration": 3}, folder / "model_final.pth")
    (folder / "model.yaml").write_text(cfg.dump())
    save_model_folder(model, cfg, MetadataCatalog.get(COCO), str(folder / "model_best"))
    return folder / "model_final.pth", folder / "model.yaml", model


def test_to_transformers_and_back(checkpoint, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    source, config_file, model = checkpoint
    folder, target = tmp_path / "model", tmp_path / "back.pth"
    tool.main(
        [str(source), str(folder), "--to", "transformers", "--config-file", str(config_file)]
        + ["--opts", "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", "0.7"]
    )
    number = sum(name.startswith("sem_seg_head.pixel_decoder.") for name in model.state_dict())
    assert f"pixel decoder {number} of {number}, transformer decoder " in caplog.text
    cfg, weights, _ = load_transformers_folder(str(folder))
    assert cfg.MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD == 0.7

    tool.main([str(folder), str(target)])
    out = capsys.readouterr().out
    assert "is a Mask2Former of the transformers package (Swin, 133 classes" in caplog.text
    assert f"wrote {len(weights)} tensors to {target} and their config to" in out
    written = yaml.safe_load((tmp_path / "back.yaml").read_text())
    assert written["DATASETS"]["TEST"] == [COCO]
    # The config and the checkpoint are all that is needed.
    read = load_config(str(tmp_path / "back.yaml"), ["MODEL.DEVICE", "cpu"])
    again = build_model(read)
    Mask2FormerCheckpointer(again).load(read.MODEL.WEIGHTS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name

    # A folder is its own config; also one file of it.
    tool.main([str(folder), str(tmp_path / "copy"), "--to", "transformers"])
    tool.main([str(folder / "model.safetensors"), str(tmp_path / "file.pth")])
    assert (tmp_path / "copy/preprocessor_config.json").read_text() == (
        folder / "preprocessor_config.json"
    ).read_text()
    assert (tmp_path / "file.yaml").is_file()


def test_folder_of_a_training(checkpoint, tmp_path):
    """Which needs no config file."""
    source, config_file, model = checkpoint
    to = ["--to", "transformers"]
    tool.main([str(source.parent / "model_best"), str(tmp_path / "a"), *to])
    tool.main([str(source), str(tmp_path / "b"), *to, "--config-file", str(config_file)])
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    one, other = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_what_is_refused(checkpoint, tmp_path, capsys):
    source, config_file, _ = checkpoint
    to = ["--to", "transformers"]
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(SystemExit, match="no config.yaml beside it.*--config-file names the conf"):
        tool.main([str(source), str(folder), *to])
    with pytest.raises(SystemExit, match="model exists: name another, or set --overwrite"):
        tool.main([str(source), str(folder), *to, "--config-file", str(config_file)])
    with pytest.raises(SystemExit, match="is not a model of transformers: it is not replaced"):
        tool.main([str(source), str(folder), *to, "--overwrite", "--config-file", str(config_file)])
    with pytest.raises(SystemExit, match="other number of classes: 133"):
        tool.main(
            [str(source), str(tmp_path / "x"), *to, "--config-file", str(config_file)]
            + ["--opts", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7"]
        )
    with pytest.raises(SystemExit, match="add --to transformers"):
        tool.main([str(source), str(tmp_path / "x")])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(SystemExit):
        tool.main([str(source), "x.pkl", "--config-file", str(config_file)])
    assert "are for --to transformers" in capsys.readouterr().err


def test_existing_checkpoints_are_kept(checkpoint, tmp_path):
    source, config_file, _ = checkpoint
    folder = tmp_path / "model"
    tool.main([str(source), str(folder), "--to", "transformers", "--config-file", str(config_file)])
    (tmp_path / "out.yaml").write_text("mine")
    with pytest.raises(SystemExit, match=r"out\.yaml exists: name another, or set --overwrite"):
        tool.main([str(folder), str(tmp_path / "out.pth")])
    assert not (tmp_path / "out.pth").exists()
    with pytest.raises(SystemExit, match=r"out\.pkl: the output must end in \.pth"):
        tool.main([str(folder), str(tmp_path / "out.pkl")])
    tool.main([str(folder), str(tmp_path / "out.pth"), "--overwrite"])
    assert (tmp_path / "out.yaml").read_text() != "mine"
