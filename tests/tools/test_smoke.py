"""`tools/train_net.py --smoke`: each step on small data of each kind, and what fails by name."""

import importlib.util
import json
import sys
from pathlib import Path

import own_data
import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from small_resnet import SMALL_RESNET

from mask2former import launch, smoke_test
from mask2former.config import load_config
from mask2former.experiment_trackers import build_trackers
from mask2former.modeling.criterion import LOSS_REGISTRY

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs/shapes"
TINY = SMALL_RESNET | {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NHEADS": 4,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 5,
    "TEST.DETECTIONS_PER_IMAGE": 5,
    "INPUT.IMAGE_SIZE": 64,
    "INPUT.MIN_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
}
KINDS = {
    "panoptic": "panoptic-segmentation/maskformer2_R18_quickstart.yaml",
    "instance": "instance-segmentation",
    "semantic": "semantic-segmentation",
}

pytestmark = pytest.mark.usefixtures("restore_loggers", "forget_own_data")


@pytest.fixture
def forget_own_data():
    yield
    for name in [name for name in DatasetCatalog.list() if name.startswith("own_")]:
        DatasetCatalog.remove(name)
    for name in [name for name in MetadataCatalog.list() if name.startswith("own_")]:
        MetadataCatalog.remove(name)


def write_config(root, kind, num_test_sets=1):
    """A config file for data of one kind that it writes; returns its path."""
    {"instance": own_data.instances, "panoptic": own_data.panoptic, "semantic": own_data.semantic}[
        kind
    ](root)
    test_sets = [f"own_val{i}" for i in range(num_test_sets)]
    path = CONFIGS / KINDS[kind]
    content = {
        "_BASE_": str(path if path.is_file() else min(path.glob("*.yaml"))),
        "DATASETS": {
            "CUSTOM": [own_data.entry(kind, root, name) for name in ("own_train", *test_sets)],
            "TRAIN": ["own_train"],
            "TEST": test_sets,
        },
    }
    (root / "config.yaml").write_text(yaml.safe_dump(content))
    return root / "config.yaml"


def smoke(monkeypatch, config, output_dir, *flags, **options):
    options = (
        TINY | {"OUTPUT_DIR": output_dir} | {k.replace("__", "."): v for k, v in options.items()}
    )
    pairs = [str(item) for pair in options.items() for item in pair]
    arguments = ["train_net.py", "--config-file", str(config), "--smoke", *flags, *pairs]
    monkeypatch.setattr(sys, "argv", arguments)
    launch.run()


def test_panoptic_data(tmp_path, monkeypatch):
    """With an average of the weights, and the files of a training, which stay as they were."""
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    for name in ("last_checkpoint", "config.yaml", "log.txt", "metrics.json"):
        (output_dir / name).write_text("of a training")
    config = write_config(tmp_path / "data", "panoptic")
    options = {"SOLVER__EMA__ENABLED": True, "TEST__EVAL_PERIOD": 1}
    options["TEST__BEST_METRIC"] = "panoptic_seg/PQ"
    options["TEST__EXPECTED_RESULTS"] = "[['panoptic_seg', 'PQ', 50.0, 1.0]]"
    folder = output_dir / "smoke"
    folder.mkdir()
    (folder / "model_0000014.pth").write_text("of an earlier smoke test")
    smoke(monkeypatch, config, output_dir, **options)
    assert {path.name for path in folder.glob("*.pth")} == {
        "model_final.pth",
        "model_final_ema.pth",
    }
    assert {path.name for path in output_dir.iterdir()} == {
        "smoke",
        *("last_checkpoint", "config.yaml", "log.txt", "metrics.json"),
    }
    for path in output_dir.iterdir():
        assert path.is_dir() or path.read_text() == "of a training"
    log = (folder / "log.txt").read_text()
    steps = ["test data", "training data and model", "weights", "training", "checkpoint"]
    for step in [*steps, "evaluation", "drawing"]:
        assert f"\n{step} " in log and "✗" not in log
    assert "3 images of own_val0: panoptic_seg/PQ," in log
    assert "Everything is in place" in log
    (results,) = json.loads((folder / "evaluation.json").read_text()).values()
    assert {"panoptic_seg", "sem_seg"} <= results.keys()
    with Image.open(folder / "drawings" / "own_val0.png") as drawing:
        assert drawing.width > 5 * 640


@pytest.mark.parametrize("kind", ["instance", "semantic"])
def test_other_data(tmp_path, monkeypatch, kind):
    config = write_config(tmp_path / "data", kind, num_test_sets=2)
    smoke(monkeypatch, config, tmp_path / "out")
    folder = tmp_path / "out" / "smoke"
    assert sorted(path.name for path in (folder / "drawings").iterdir()) == [
        "own_val0.png",
        "own_val1.png",
    ]
    results = json.loads((folder / "evaluation.json").read_text())
    task = {"instance": "segm", "semantic": "sem_seg"}[kind]
    assert all(task in tasks for tasks in results.values()) and len(results) == 2


def test_failing_step_is_named(tmp_path, monkeypatch):
    config = write_config(tmp_path / "data", "semantic")
    with pytest.raises(RuntimeError, match="failed in the step 'weights': .*nowhere.pth"):
        smoke(monkeypatch, config, tmp_path / "out", MODEL__WEIGHTS=tmp_path / "nowhere.pth")
    assert "✗" in (tmp_path / "out" / "smoke" / "log.txt").read_text()


def test_losses_that_are_nan(tmp_path, monkeypatch):
    """Fail, also if a training may skip them; the next smoke test removes the captures."""
    monkeypatch.setitem(
        LOSS_REGISTRY._obj_map, "broken", lambda matched: matched.labels * torch.nan
    )
    config = write_config(tmp_path / "data", "instance")
    options = {"SOLVER__NON_FINITE__MAX_SKIPPED": 5}
    options["MODEL__MASK_FORMER__EXTRA_LOSSES"] = "[['broken', 1.0]]"
    folder = tmp_path / "out" / "smoke"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the step 'training': Loss became infinite"):
            smoke(monkeypatch, config, tmp_path / "out", **options)
        assert [path.name for path in folder.glob("non_finite*")] == ["non_finite_0_rank0.pth"]
        (folder / "evaluation.json.tmp").write_text("half of a")


def test_trackers_get_nothing(tmp_path, monkeypatch):
    """But their packages must be there."""
    config = write_config(tmp_path / "data", "semantic")
    broken = {"MODEL__WEIGHTS": tmp_path / "nowhere.pth", "LOGGING__WANDB": True}
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name)
    )
    with pytest.raises(ValueError, match="the package wandb is not installed"):
        smoke(monkeypatch, config, tmp_path / "out", **broken)
    cfg = load_config(str(config), ["LOGGING.WANDB", "True", "LOGGING.MLFLOW", "True"])
    assert build_trackers(smoke_test.training_config(cfg), lambda: False) == []


def test_metric_that_no_evaluation_gives(tmp_path, monkeypatch):
    """A training would end at its first evaluation. With timm, accumulation and an average."""
    config = write_config(tmp_path / "data", "semantic")
    options = {"MODEL__BACKBONE__NAME": "TimmBackbone", "MODEL__TIMM__NAME": "test_convnext"}
    options |= {"SOLVER__NUM_ACCUMULATION_STEPS": 2, "SOLVER__EMA__ENABLED": True}
    options |= {"TEST__EVAL_PERIOD": 1, "TEST__BEST_METRIC": "ema/sem_seg/mIou"}
    problem = "'evaluation': TEST.BEST_METRIC is 'ema/sem_seg/mIou', .*'ema/sem_seg/mIoU'"
    with pytest.raises(RuntimeError, match=problem):
        smoke(monkeypatch, config, tmp_path / "out", **options)


@pytest.mark.parametrize("flag", ["--resume", "--eval-only"])
def test_other_purposes(tmp_path, monkeypatch, flag):
    config = write_config(tmp_path / "data", "semantic")
    with pytest.raises(ValueError, match="leave out --resume and --eval-only"):
        smoke(monkeypatch, config, tmp_path / "out", flag)
    assert not (tmp_path / "out").exists()


def test_folder_of_somebody_else(tmp_path, monkeypatch):
    """Is not emptied."""
    config = write_config(tmp_path / "data", "semantic")
    (tmp_path / "out" / "smoke").mkdir(parents=True)
    (tmp_path / "out" / "smoke" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds thesis.tex, which none has written"):
        smoke(monkeypatch, config, tmp_path / "out")
    assert (tmp_path / "out" / "smoke" / "thesis.tex").exists()
