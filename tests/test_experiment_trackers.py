"""Weights & Biases and MLflow: stand-ins that record calls, and MLflow itself if installed."""

import importlib.util
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import toy_training as toy
from detectron2.engine.train_loop import HookBase
from test_best_checkpoint import OPTIONS as EVALUATED
from test_best_checkpoint import Evaluating
from test_trainer import rows_of, run

from mask2former.experiment_trackers import check_trackers, flat
from mask2former.preflight import check_run


@pytest.fixture(autouse=True)
def show_logs(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


class Calls(list):
    """Calls of a package: (name, positional arguments, keyword arguments)."""

    def of(self, name):
        return [(args, options) for called, args, options in self if called == name]

    def record(self, name, result=None):
        def call(*args, **options):
            self.append((name, args, options))
            return result(*args, **options) if callable(result) else result

        return call


def install(monkeypatch, name, **content):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin="stand-in")
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def wandb(monkeypatch):
    calls = Calls()

    def init(**options):
        run = SimpleNamespace(id=options["id"] or "run1", dir="/runs/run1/files")
        for method in ("log", "finish", "define_metric"):
            setattr(run, method, lambda *args, _m=method, **kw: calls.record(_m)(*args, **kw))
        return run

    install(
        monkeypatch,
        "wandb",
        init=calls.record("init", init),
        Settings=dict,
        Image=lambda image: ("image", image.shape),
    )
    return calls


@pytest.fixture
def mlflow(monkeypatch):
    calls = Calls()

    class Client:
        def __init__(self, tracking_uri):
            calls.append(("uri", (tracking_uri,), {}))

        def __getattr__(self, name):
            results = {
                "create_run": SimpleNamespace(info=SimpleNamespace(run_id="run1")),
                "create_experiment": "7",
            }
            return calls.record(name, results.get(name))

    install(monkeypatch, "mlflow")
    install(
        monkeypatch, "mlflow.entities", Metric=lambda *x: x, Param=lambda key, value: (key, value)
    )
    install(monkeypatch, "mlflow.tracking", MlflowClient=Client)
    return calls


class Draw(HookBase):
    """Puts a picture into the storage in iteration 5."""

    def after_step(self):
        if self.trainer.iter == 5:
            self.trainer.storage.put_image("pictures/a b", np.zeros((3, 4, 6), np.uint8))


BOTH = "SEED", "3", "LOGGING.WANDB", "True", "LOGGING.MLFLOW", "True", "LOGGING.PROJECT", "mine"


def train(output_dir, *options, hooks=(), resume=False):
    trainer = toy.ToyTrainer(toy.toy_config(output_dir, *BOTH, *options))
    trainer.resume_or_load(resume)
    trainer.register_hooks(hooks)
    trainer.train()


def test_whole_run(tmp_path, wandb, mlflow):
    """Both get the rows of metrics.json, the config and the picture."""
    train(tmp_path / "name", hooks=[Draw()])
    rows = rows_of(tmp_path / "name")
    assert rows.keys() == {19, 39, 44}

    ((_, options),) = wandb.of("init")
    assert (options["project"], options["name"], options["id"]) == ("mine", "name", None)
    assert options["mode"] == "offline" and options["dir"] == str(tmp_path / "name")
    assert options["config"]["SOLVER"]["MAX_ITER"] == 45 and options["config"]["SEED"] == 3
    logged = [args[0] for args, _ in wandb.of("log")]
    pictures = [entry for entry in logged if "pictures/a b" in entry]
    assert pictures == [{"pictures/a b": ("image", (4, 6, 3)), "iteration": 5}]
    scalars = {entry["iteration"]: entry for entry in logged if "total_loss" in entry}
    assert scalars.keys() == rows.keys()
    for iteration, row in rows.items():
        # The terminal's writer, which comes later, puts the remaining time.
        expected = {name: value for name, value in row.items() if name != "eta_seconds"}
        assert expected.items() <= scalars[iteration].items()
    assert wandb.of("finish") == [((), {"exit_code": 0})]

    assert mlflow.of("uri") == [((f"file:{tmp_path}/name/mlruns",), {})]
    batches = mlflow.of("log_batch")
    params = dict(p for _, options in batches for p in options.get("params", ()))
    assert params["SOLVER.MAX_ITER"] == "45" and len(params) > 100
    assert all(len(options.get("params", ())) <= 100 for _, options in batches)
    values = {m[::3]: m[1] for _, options in batches for m in options.get("metrics", ())}
    assert values["total_loss", 39] == rows[39]["total_loss"]
    ((args, options),) = mlflow.of("log_image")
    assert args[1].shape == (4, 6, 3) and options == {"artifact_file": "pictures/0000005/a_b.png"}
    assert mlflow.of("set_terminated") == [(("run1",), {"status": "FINISHED"})]


def test_resumed_run_continues(tmp_path, wandb, mlflow):
    """An interrupt ends the run; a resumed training has its number, a new one another."""
    run(tmp_path, *BOTH, stop_before=27)
    assert wandb.of("finish") == [((), {"exit_code": 1})]
    assert mlflow.of("set_terminated") == [(("run1",), {"status": "KILLED"})]
    run(tmp_path, *BOTH, resume=True)
    assert [options["id"] for _, options in wandb.of("init")] == [None, "run1"]
    assert wandb.of("init")[1][1]["resume"] == "allow"
    assert len(mlflow.of("create_run")) == 1
    assert mlflow.of("update_run") == [(("run1",), {"status": "RUNNING"})]
    assert wandb.of("finish")[1] == ((), {"exit_code": 0})
    run(tmp_path, *BOTH)
    assert wandb.of("init")[2][1]["id"] is None and len(mlflow.of("create_run")) == 2


def test_error_ends_the_run(tmp_path, wandb, mlflow):
    class Fail(HookBase):
        def after_step(self):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        train(tmp_path, hooks=[Fail()])
    assert wandb.of("finish") == [((), {"exit_code": 1})]
    assert mlflow.of("set_terminated") == [(("run1",), {"status": "FAILED"})]


def test_early_stopping_is_an_ordinary_end(tmp_path, wandb, mlflow):
    options = (*EVALUATED, *BOTH, "TEST.EARLY_STOPPING_PATIENCE", "2")
    Evaluating(toy.toy_config(tmp_path, *options)).train()
    assert wandb.of("finish") == [((), {"exit_code": 0})]
    assert mlflow.of("set_terminated") == [(("run1",), {"status": "FINISHED"})]


@pytest.mark.parametrize("method", ["create_run", "log_batch", "set_terminated"])
def test_failing_tracker_does_not_stop_training(
    tmp_path, wandb, mlflow, monkeypatch, caplog, method
):
    def fail(self, *args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(sys.modules["mlflow.tracking"].MlflowClient, method, fail, raising=False)
    train(tmp_path)
    assert rows_of(tmp_path).keys() == {19, 39, 44}
    (warning,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
    assert "MLflow" in warning.getMessage() and "LOGGING.MLFLOW" in warning.getMessage()
    assert "no network" in str(warning.exc_info[1])
    assert wandb.of("finish") == [((), {"exit_code": 0})]


def test_environment_is_respected(tmp_path, wandb, mlflow, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker")
    train(tmp_path)
    assert wandb.of("init")[0][1]["mode"] == "disabled"
    assert mlflow.of("uri") == [(("http://tracker",), {})]
    assert not (tmp_path / "mlruns").exists()


def test_off_by_default(tmp_path, wandb, mlflow):
    run(tmp_path, "SOLVER.MAX_ITER", "2")
    assert not wandb and not mlflow


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize(("key", "package"), [("WANDB", "wandb"), ("MLFLOW", "mlflow-skinny")])
def test_missing_package(tmp_path, monkeypatch, key, package, is_folder):
    """Also if the working directory has a folder of that name, as W&B makes for its runs."""
    spec = ModuleSpec(package, None, is_package=True) if is_folder else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    cfg = toy.toy_config(tmp_path, f"LOGGING.{key}", "True")
    with pytest.raises(ValueError, match=rf"LOGGING\.{key} is True, but .*`pip install {package}`"):
        check_run(cfg, "train")
    check_run(cfg, "predict")
    check_trackers(toy.toy_config(tmp_path))


def test_project_without_trackers_is_unread(tmp_path):
    from mask2former.config_schema import unread_keys

    cfg = toy.toy_config(tmp_path)
    assert "LOGGING.PROJECT" in unread_keys(cfg)
    cfg.LOGGING.MLFLOW = True
    assert "LOGGING.PROJECT" not in unread_keys(cfg)


def test_flat():
    assert dict(flat({"a": {"b": 1, "c": [2]}, "d": None})) == {"a.b": 1, "a.c": [2], "d": None}


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs mlflow")
def test_mlflow_itself(tmp_path):
    """Two trainings of one run, read back from its folder."""
    options = "SEED", "3", "LOGGING.MLFLOW", "True"
    run(tmp_path, *options, stop_before=27)
    run(tmp_path, *options, resume=True)
    (run_id,) = (tmp_path / "mlflow_run_id.txt").read_text().split()
    (folder,) = (tmp_path / "mlruns").glob(f"*/{run_id}")
    assert (folder / "params" / "SOLVER.MAX_ITER").read_text() == "45"
    lines = (folder / "metrics" / "total_loss").read_text().splitlines()
    values = {int(step): float(value) for _, value, step in map(str.split, lines)}
    assert values.keys() == {19, 26, 39, 44}
    assert values[44] == rows_of(tmp_path)[44]["total_loss"]
    assert "status: 3" in (folder / "meta.yaml").read_text()
    assert "MAX_ITER: 45" in (folder / "artifacts" / "config.yaml").read_text()


@pytest.mark.skipif(
    getattr(importlib.util.find_spec("wandb"), "origin", None) is None, reason="needs wandb"
)
def test_wandb_itself(tmp_path):
    """Offline, both parts of the run have one number."""
    options = "SEED", "3", "LOGGING.WANDB", "True"
    run(tmp_path, *options, stop_before=27)
    run(tmp_path, *options, resume=True)
    (run_id,) = (tmp_path / "wandb_run_id.txt").read_text().split()
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert files and {file.name for file in files} == {f"run-{run_id}.wandb"}
