"""The parts of tools/quickstart.py that need no training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from load_script import load_script

from mask2former.config import load_config

ROOT = Path(__file__).resolve().parents[2]


quickstart = load_script("tools/quickstart.py")


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """Record commands instead of running them."""
    recorded: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: recorded.append(command))
    return recorded


def small_config(output: Path, *opts: str):
    device = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(output)]
    return load_config(str(quickstart.CONFIG), [*device, *opts])


def write_config(output: Path, *opts: str) -> None:
    output.mkdir(exist_ok=True)
    (output / "config.yaml").write_text(small_config(output, *opts).dump())


def test_results_table():
    results = {
        "panoptic_seg": {"PQ": 61.23, "SQ": 80.0},
        "segm": {"AP": 7.0},
        "sem_seg": {"mIoU": 100.0},
    }
    assert quickstart.results_table(results, ["panoptic", "instance", "semantic"]).split() == [
        "task", "metric", "value",
        "panoptic", "PQ", "61.2",
        "instance", "AP", "7.0",
        "semantic", "mIoU", "100.0",
    ]  # fmt: skip
    assert "PQ" not in quickstart.results_table(results, ["semantic"])


def test_new_and_interrupted_runs_train(commands, tmp_path):
    quickstart.train(tmp_path, ["SOLVER.MAX_ITER", "3"])
    (command,) = commands
    assert command[0] == sys.executable and command[2].endswith("tools/train_net.py")
    assert command[-3:] == ["--resume", "SOLVER.MAX_ITER", "3"]


def test_run_without_evaluation_is_only_evaluated(commands, tmp_path):
    (tmp_path / "model_final.pth").touch()
    quickstart.train(tmp_path, [])
    (command,) = commands
    assert command[-2:] == ["--eval-only", "--resume"]


def test_finished_run_is_reused(commands, tmp_path, capsys):
    (tmp_path / "model_final.pth").touch()
    (tmp_path / "evaluation.json").write_text(json.dumps({}))
    quickstart.train(tmp_path, [])
    assert commands == [] and "finished run" in capsys.readouterr().out


def test_run_with_another_config_is_rejected(tmp_path):
    quickstart.check_same_config(tmp_path / "new", small_config(tmp_path / "new"))
    write_config(tmp_path)
    elsewhere = small_config(tmp_path / "moved", "MODEL.DEVICE", "cuda")
    quickstart.check_same_config(tmp_path, elsewhere)
    with pytest.raises(ValueError, match=r"a run with different SOLVER\.MAX_ITER: add --fresh"):
        quickstart.check_same_config(tmp_path, small_config(tmp_path, "SOLVER.MAX_ITER", "3"))


def test_fresh_deletes_only_runs(tmp_path):
    quickstart.clear_run(tmp_path / "new")
    run = tmp_path / "run"
    write_config(run)
    quickstart.clear_run(run)
    assert not run.exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").touch()
    with pytest.raises(ValueError, match="not a training run"):
        quickstart.clear_run(other)
    assert (other / "precious.txt").exists()


def test_missing_data_is_prepared(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    quickstart.prepare_data()
    (command,) = commands
    assert command[1].endswith("datasets/prepare_shapes.py")
    assert command[2:] == ["--output", str(tmp_path / "shapes")]
    (tmp_path / "shapes/annotations").mkdir(parents=True)
    quickstart.prepare_data()
    assert len(commands) == 1


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_recipes(task):
    file = ROOT / f"configs/shapes/{task}-segmentation/maskformer2_R18_quickstart.yaml"
    cfg = load_config(str(file))
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == (6 if task == "instance" else 10)
    assert cfg.DATASETS.TRAIN[0].startswith("shapes_train")
    assert cfg.DATASETS.TEST[0].startswith("shapes_val")
    assert cfg.MODEL.MASK_FORMER.TEST[f"{task.upper()}_ON"]
    assert cfg.MODEL.WEIGHTS == ""
