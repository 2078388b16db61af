"""`tools/train_net.py` on folders of labelling tools, with nothing but a config."""

import json
import logging
from pathlib import Path

import numpy as np
import own_data
import pytest
import yaml
from dataset_trees import save
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_argument_parser
from load_script import load_script

from mask2former.utils.log_file import _log_files

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs/shapes"
OPTIONS = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NHEADS": 4,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 256,
    "INPUT.MIN_SIZE_TEST": 32,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
}

train_net = load_script(ROOT / "tools" / "train_net.py")


@pytest.fixture(autouse=True)
def no_log_file(restore_loggers):
    """As a new process: an earlier test in this one may have left its log file open."""
    logger = logging.getLogger("mask2former")
    for handler in _log_files():
        logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


def run(config: Path, output: Path, *flags: str, **others) -> dict:
    """Run in this process; returns the results."""
    for name in ("own_train", "own_val"):
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    options = (
        OPTIONS | {"OUTPUT_DIR": output} | {k.replace("__", "."): v for k, v in others.items()}
    )
    pairs = [str(item) for pair in options.items() for item in pair]
    args = ["--config-file", str(config), *flags, *pairs]
    train_net.main(default_argument_parser().parse_args(args))
    return json.loads((output / "evaluation.json").read_text())["own_val"]


def write(path: Path, task: str, train: dict, val: dict) -> Path:
    entries = [{"NAME": "own_train"} | train, {"NAME": "own_val"} | val]
    base = CONFIGS / f"{task}-segmentation/maskformer2_R18_quickstart.yaml"
    content = {
        "_BASE_": str(base),
        "DATASETS": {"CUSTOM": entries, "TRAIN": ["own_train"], "TEST": ["own_val"]},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_yolo_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_data.yolo(tmp_path / "pets", train=3, val=2)
    entry = {"TYPE": "auto", "ROOT": "pets"}
    config = write(
        tmp_path / "pets.yaml",
        "instance",
        entry | {"SPLIT": "train"},
        entry | {"SPLIT": "val"},
    )
    size = {"INPUT__IMAGE_SIZE": 32}
    results = run(config, tmp_path / "output", **size)
    assert {"AP-cat", "AP-dog"} <= results["segm"].keys()
    log = (tmp_path / "output/log.txt").read_text()
    assert "split train: 3 images, 5 objects, 3 classes: cat, dog, bird" in log
    # The config that was saved repeats the run.
    weights = {"MODEL__WEIGHTS": tmp_path / "output/model_final.pth"}
    again = run(tmp_path / "output/config.yaml", tmp_path / "again", "--eval-only", **weights)
    assert again == results


def test_masks_of_other_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in own_data.many_images(tmp_path, 12):
        masks = np.uint8(255) * (own_data.labels() < 2)
        save(tmp_path / f"labels/{name[:2]}.png", masks)
    entry = {
        "TYPE": "semantic",
        "IMAGE_ROOT": "images",
        "LABEL_ROOT": "labels",
        "VALUE_MAP": {0: "background", 255: "object", 128: None},
    }
    config = write(
        tmp_path / "masks.yaml",
        "semantic",
        entry | {"SHARE": [0.0, 0.6]},
        entry | {"SHARE": [0.6, 1.0]},
    )
    size = {"INPUT__CROP__ENABLED": False, "INPUT__SIZE_DIVISIBILITY": -1}
    size |= {"INPUT__MIN_SIZE_TRAIN": "(32,)"}
    results = run(config, tmp_path / "output", **size)
    assert {"IoU-background", "IoU-object"} <= results["sem_seg"].keys()
    weights = {"MODEL__WEIGHTS": tmp_path / "output/model_final.pth"}
    again = run(tmp_path / "output/config.yaml", tmp_path / "again", "--eval-only", **weights)
    assert again == results


def test_mistakes_come_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_data.yolo(tmp_path / "pets")
    entry = {"TYPE": "auto", "ROOT": "pets"}
    config = write(
        tmp_path / "pets.yaml",
        "instance",
        entry | {"SPLIT": "train", "RENAME": {"bird": None}},
        entry | {"SPLIT": "val"},
    )
    message = r"'own_val' .* only 'own_val' has 'bird'\. CLASSES in each entry of DATASETS\.CUSTOM"
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / "output", INPUT__IMAGE_SIZE=32)
    assert not (tmp_path / "output/metrics.json").exists()
