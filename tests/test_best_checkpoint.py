"""The best checkpoint and early stopping: values, ties, NaN, kills, and several processes."""

import json
import logging
import math

import pytest
import torch
import toy_training as toy
from detectron2.data import MetadataCatalog
from detectron2.engine import hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.events import get_event_storage
from test_trainer import start_program

from mask2former.best_checkpoint import BestModel, EarlyStop, check_best_metric, is_of_average
from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.config_checks import check_config
from mask2former.hooks import READING_PERIODS

NAN = math.nan
OPTIONS = ("DATASETS.TEST", "('toy_train',)", "TEST.EVAL_PERIOD", "5", "SEED", "3")
OPTIONS += ("TEST.BEST_METRIC", "sem_seg/mIoU", "SOLVER.MAX_ITER", "30")
PATIENCE = ("TEST.EARLY_STOPPING_PATIENCE", "2")
# By the iteration of the evaluation; the one after training is stored under the number behind.
VALUES = {4: 1.0, 9: 3.0, 14: 3.0, 19: NAN, 24: 2.0, 30: 2.5}


@pytest.fixture(autouse=True)
def show_logs(caplog):
    caplog.set_level(logging.INFO)


class Planned(DatasetEvaluator):
    values = VALUES
    kill_at = None

    def reset(self):
        pass

    def process(self, inputs, outputs):
        pass

    def evaluate(self):
        iteration = get_event_storage().iter
        if iteration == self.kill_at:
            raise KeyboardInterrupt
        return {"sem_seg": {"mIoU": self.values[iteration], "fwIoU": 0.0}}


class Evaluating(toy.ToyTrainer):
    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return [[toy.augment(record)] for record in toy.load_toy_dataset()[:2]]

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return Planned()


class Kill(toy.HookBase):
    """Ends a run before an iteration, or in one behind all other hooks, like a kill."""

    def __init__(self, before=-1, after=-1):
        self.before, self.after = before, after

    def before_step(self):
        if self.trainer.iter == self.before:
            raise SystemExit

    def after_step(self):
        if self.trainer.iter == self.after:
            raise SystemExit


@pytest.fixture
def plan(monkeypatch):
    def set_plan(values=VALUES, kill_at=None):
        monkeypatch.setattr(Planned, "values", values)
        monkeypatch.setattr(Planned, "kill_at", kill_at)

    return set_plan


def train(output_dir, *options, resume=False, kill=None):
    torch.manual_seed(0)
    trainer = Evaluating(toy.toy_config(output_dir, *OPTIONS, *options))
    trainer.resume_or_load(resume=resume)
    if kill is None:
        trainer.train()
        return trainer
    trainer.register_hooks([kill])
    trainer.after_train = lambda: None
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer.train()
    return trainer


def best_of(trainer):
    (hook,) = [hook for hook in trainer._hooks if isinstance(hook, BestModel)]
    return hook


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Function (name of a plan, *options) → folder and final state of a run without kills."""
    runs = {}

    def get(name, *options):
        if (name, options) not in runs:
            folder = tmp_path_factory.mktemp("whole")
            runs[name, options] = folder, best_of(train(folder, *options)).state_dict()
        return runs[name, options]

    return get


def test_best_of_all(tmp_path):
    """The first of equal values; NaN is never the best."""
    trainer = train(tmp_path)
    best = torch.load(tmp_path / "model_best.pth")
    assert (best["iteration"], best["value"], best["metric"]) == (9, 3.0, "sem_seg/mIoU")
    assert best.keys() == {"model", "iteration", "value", "metric"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert best_of(trainer).num_without_improvement == 4


def test_weights_are_those_of_the_evaluation(tmp_path):
    train(tmp_path, "SOLVER.CHECKPOINT_PERIOD", "10")
    best, periodic = (torch.load(tmp_path / f"model_{n}.pth") for n in ("best", "0000009"))
    for name, value in periodic["model"].items():
        assert torch.equal(best["model"][name], value)
    # It loads like any other file.
    model = toy.ToyArchitecture(toy.toy_config(tmp_path))
    Mask2FormerCheckpointer(model).load(str(tmp_path / "model_best.pth"))
    assert torch.equal(model.head.bias, best["model"]["head.bias"])


def test_the_smallest(tmp_path):
    train(tmp_path, "TEST.BEST_MODE", "min")
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == 4


def test_the_last_evaluation(tmp_path, plan):
    plan({**VALUES, 30: 9.0})
    train(tmp_path)
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == 29


def test_nothing_but_nan(tmp_path, plan):
    plan(dict.fromkeys(VALUES, NAN))
    train(tmp_path)
    assert not (tmp_path / "model_best.pth").exists()


KILLS = {
    "after the checkpoint": Kill(before=16),
    "before the row is written": Kill(after=14),
    "long after": Kill(before=27),
    "in the first evaluation's iteration": Kill(after=4),
}


@pytest.mark.parametrize("name", KILLS)
@pytest.mark.parametrize(("period", "best"), [("5", 24), ("7", 24), ("15", 14)])
def test_kills_change_nothing(tmp_path, plan, whole_run, name, period, best):
    """With checkpoints in iterations of evaluations and in others; the best before or after."""
    plan({4: 1.0, 9: 3.0, 14: 4.0, 19: 2.0, 24: 5.0 if best == 24 else 3.5, 30: 4.0})
    options = ("SOLVER.CHECKPOINT_PERIOD", period)
    folder, whole = whole_run(f"best at {best}", *options)
    folders = folder, tmp_path
    train(tmp_path, *options, kill=KILLS[name])
    resumed = best_of(train(tmp_path, *options, resume=True)).state_dict()
    assert resumed == whole
    files = [torch.load(folder / "model_best.pth") for folder in folders]
    assert files[0]["iteration"] == files[1]["iteration"] == best
    assert all(torch.equal(v, files[1]["model"][k]) for k, v in files[0]["model"].items())
    records = [(folder / "model_best.json").read_text() for folder in folders]
    assert records[0] == records[1]


@pytest.mark.parametrize("kill_at", [9, 14, 30])
def test_kills_in_evaluations(tmp_path, plan, whole_run, kill_at):
    options = ("SOLVER.CHECKPOINT_PERIOD", "5")
    _, whole = whole_run("usual", *options)
    plan(kill_at=kill_at)
    if kill_at < 30:
        train(tmp_path / "killed", *options, kill=Kill())
    else:
        trainer = Evaluating(toy.toy_config(tmp_path / "killed", *OPTIONS, *options))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    plan()
    assert best_of(train(tmp_path / "killed", *options, resume=True)).state_dict() == whole


def test_kill_after_the_row_is_written(tmp_path, plan):
    """Row, checkpoint and evaluation are of iteration 19; the checkpoint comes first."""
    values = {9: 3.0, 19: 4.0, 30: 1.0}
    plan(values)
    options = ("SOLVER.CHECKPOINT_PERIOD", "20", "TEST.EVAL_PERIOD", "10", "SOLVER.MAX_ITER", "30")
    train(tmp_path, *options, kill=Kill(before=22))
    plan({30: 1.0, 29: 1.0})  # no other evaluation runs again
    best = best_of(train(tmp_path, *options, resume=True))
    assert (best.best_metric, best.best_iter, best.num_without_improvement) == (4.0, 19, 1)


def test_damaged_record(tmp_path):
    train(tmp_path, kill=Kill(before=16))
    (tmp_path / "model_best.json").write_text("{")
    with pytest.raises(ValueError, match="model_best.json is damaged"):
        train(tmp_path, resume=True)


def test_better_file_of_a_killed_run_stays(tmp_path, plan):
    """Iterations run again with other results, as on a GPU."""
    plan({4: 1.0, 9: 2.0, 14: 8.0})
    options = ("SOLVER.CHECKPOINT_PERIOD", "10")
    train(tmp_path, *options, kill=Kill(before=17))
    plan({**VALUES, 14: 7.0})
    train(tmp_path, *options, resume=True)
    file = torch.load(tmp_path / "model_best.pth")
    assert (file["iteration"], file["value"]) == (14, 8.0)


@pytest.mark.parametrize("resume", [False, True])
def test_file_of_another_run_is_replaced(tmp_path, plan, resume):
    train(tmp_path, kill=Kill(before=16))
    plan(dict.fromkeys(VALUES, 1.0))
    options = ("TEST.BEST_METRIC", "sem_seg/fwIoU") if resume else ()
    train(tmp_path, *options, resume=resume)
    file = torch.load(tmp_path / "model_best.pth")
    assert (file["iteration"], file["value"]) == ((14, 0.0) if resume else (4, 1.0))


@pytest.mark.parametrize(("kill", "period"), [("first evaluation", "5"), ("before it", "3")])
def test_resumed_run_takes_up_nothing_of_an_earlier_one(tmp_path, plan, kill, period):
    """Which has the same folder, and has finished: neither its rows, nor its best."""
    plan({4: 50.0, 9: 60.0, 14: 40.0, 19: 30.0, 24: 20.0, 30: 10.0})
    train(tmp_path)
    values = {4: 1.0, 9: 2.0, 14: 3.0, 19: 4.0, 24: 5.0, 30: 6.0}
    options = ("SOLVER.CHECKPOINT_PERIOD", period, *PATIENCE)
    plan(values, kill_at=4 if kill == "first evaluation" else None)
    train(tmp_path, *options, kill=Kill(before=4 if kill == "before it" else -1))
    plan(values)
    trainer = train(tmp_path, *options, resume=True)
    assert trainer.iter == 30 and best_of(trainer).best_iter == 29
    assert torch.load(tmp_path / "model_best.pth")["value"] == 6.0
    record = json.loads((tmp_path / "model_best.json").read_text())
    assert record["values"] == {"4": 1.0, "9": 2.0, "14": 3.0, "19": 4.0, "24": 5.0, "29": 6.0}


def test_a_new_run_names_the_best_model_of_an_earlier_one(tmp_path, caplog):
    said = f"{tmp_path / 'model_best'} is the best model of an earlier run"
    train(tmp_path, kill=Kill(before=16))
    (tmp_path / "model_best").mkdir(exist_ok=True)  # toy models have no folder
    train(tmp_path, resume=True)
    assert said not in caplog.text
    train(tmp_path, "TEST.BEST_METRIC", "")
    assert said in caplog.text


def test_unknown_metric(tmp_path):
    options = ("TEST.BEST_METRIC", "sem_seg/mIoO")
    with pytest.raises(ValueError, match=r"'sem_seg/mIoO', .* 'sem_seg/fwIoU', 'sem_seg/mIoU'"):
        train(tmp_path, *options)


def test_several_test_sets(tmp_path):
    toy.DatasetCatalog.register("toy_other", toy.load_toy_dataset)
    try:
        options = ("DATASETS.TEST", "('toy_train', 'toy_other')", "TEST.BEST_METRIC")
        train(tmp_path, *options, "toy_other/sem_seg/mIoU")
        with pytest.raises(ValueError, match="allowed: 'toy_other/sem_seg/fwIoU'"):
            train(tmp_path / "without its name", *options, "sem_seg/mIoU")
    finally:
        toy.DatasetCatalog.remove("toy_other")
    assert torch.load(tmp_path / "model_best.pth")["metric"] == "toy_other/sem_seg/mIoU"


def test_weights_of_the_average(tmp_path):
    options = ("SOLVER.EMA.ENABLED", "True", "SOLVER.CHECKPOINT_PERIOD", "10")
    train(tmp_path, *options, "TEST.BEST_METRIC", "ema/sem_seg/mIoU")
    best, periodic = (torch.load(tmp_path / f"model_{n}.pth") for n in ("best", "0000009"))
    for name, value in periodic["trainer"]["hooks"]["WeightAverage"]["model"].items():
        assert torch.equal(best["model"][name], value)
        assert not torch.equal(best["model"][name], periodic["model"][name])


# ---- early stopping ----


def evaluation(output_dir):
    return json.loads((output_dir / "evaluation.json").read_text())["toy_train"]["sem_seg"]["mIoU"]


def test_early_stopping(tmp_path, caplog):
    trainer = train(tmp_path, *PATIENCE)
    assert "Early stopping after iteration 19 of 30: sem_seg/mIoU has not improved in 2" in (
        caplog.text
    )
    assert sorted(toy.read_losses(tmp_path)) == list(range(20))
    final = torch.load(tmp_path / "model_final.pth")
    assert final["iteration"] == final["trainer"]["iteration"] == 19
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert trainer.iter == trainer.max_iter == 20
    assert evaluation(tmp_path) is None  # NaN, of iteration 19, was the last evaluation
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == 9
    assert "Exception during training" not in caplog.text


def test_early_stopping_evaluates_once(tmp_path):
    """Pictures are a hook of evaluation too; one with another period has its turn at the end."""
    done = []
    trainer = Evaluating(toy.toy_config(tmp_path, *OPTIONS, *PATIENCE))
    place = [isinstance(hook, EarlyStop) for hook in trainer._hooks].index(True)
    behind, trainer._hooks[place:] = trainer._hooks[place:], []

    def evaluating(name, period):
        return hooks.EvalHook(period, lambda: done.append((name, trainer.iter)))

    trainer.register_hooks([evaluating("before", 5), evaluating("other", 3)])
    trainer.register_hooks([*behind, evaluating("behind", 5)])
    trainer.train()
    assert [i for name, i in done if name == "before"] == [4, 9, 14, 19]
    assert [i for name, i in done if name == "behind"] == [4, 9, 14, 20]
    assert [i for name, i in done if name == "other"] == [2, 5, 8, 11, 14, 17, 20]


def test_finished_training_says_so(tmp_path, caplog, plan):
    train(tmp_path, *PATIENCE)
    plan({**VALUES, 20: 1.5})
    caplog.clear()
    trainer = train(tmp_path, *PATIENCE, resume=True)
    assert "Early stopping has ended this training after iteration 19: it is fini" in caplog.text
    assert trainer.start_iter == 20 and max(toy.read_losses(tmp_path)) == 19
    assert evaluation(tmp_path) == 1.5
    # With more patience it goes on.
    plan()
    train(tmp_path, "TEST.EARLY_STOPPING_PATIENCE", "5", resume=True)
    assert max(toy.read_losses(tmp_path)) == 29


@pytest.mark.parametrize("period", ["5", "7", "20"])
@pytest.mark.parametrize("kill", ["evaluation", "before final", "earlier"])
def test_early_stopping_after_a_kill(tmp_path, plan, monkeypatch, period, kill):
    options = (*PATIENCE, "SOLVER.CHECKPOINT_PERIOD", period)
    if kill == "evaluation":
        plan(kill_at=19)
        train(tmp_path, *options, kill=Kill())
    elif kill == "earlier":
        train(tmp_path, *options, kill=Kill(before=17))
    else:
        with monkeypatch.context() as context:
            context.setattr("mask2former.best_checkpoint.EarlyStop.after_step", stop_like_a_kill)
            train(tmp_path, *options, kill=Kill())
    plan({**VALUES, 20: NAN})
    trainer = train(tmp_path, *options, resume=True)
    assert max(toy.read_losses(tmp_path)) == 19
    final = torch.load(tmp_path / "model_final.pth")
    assert final["iteration"] == final["trainer"]["iteration"] == 19
    assert final["trainer"]["hooks"]["BestModel"]["num_without_improvement"] == 2
    assert trainer.max_iter == 20


def stop_like_a_kill(self):
    if self.is_over():
        raise SystemExit


def test_small_improvements_do_not_count(tmp_path, plan):
    """But the best is the best."""
    plan({4: 1.0, 9: 1.4, 14: 1.8, 19: 1.9, 24: 2.0})
    train(tmp_path, *PATIENCE, "TEST.EARLY_STOPPING_MIN_DELTA", "0.5")
    # 1.8 exceeds 1.0 by more than 0.5, 1.4 and 1.9 do not.
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == 24


def test_stop_in_the_last_evaluation_is_an_ordinary_end(tmp_path, caplog, plan):
    plan({4: 3.0, 9: 2.0, 15: 1.0})
    train(tmp_path, *PATIENCE, "SOLVER.MAX_ITER", "15")
    assert "Early stopping" not in caplog.text


def test_two_processes_stop_together(tmp_path):
    options = (*OPTIONS, *PATIENCE, "SOLVER.IMS_PER_BATCH", "4")
    done = start_program("--planned", tmp_path, *options, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "Early stopping after iteration 19" in done.stdout + done.stderr
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 19


# ---- checks before a run ----


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("TEST.BEST_METRIC", "a/b"), "TEST.EVAL_PERIOD is 0"),
        (("TEST.EARLY_STOPPING_PATIENCE", "3"), "TEST.BEST_METRIC is empty"),
        (("TEST.BEST_METRIC", "mIoU"), "a metric by its path"),
    ],
)
def test_contradictions(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        check_config(toy.toy_config(tmp_path, *options))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("ema/segm/AP", True),
        ("val/ema/segm/AP-car/truck", True),
        ("segm/AP", False),
        ("schema/segm/AP", False),
    ],
)
def test_metrics_of_the_average(metric, expected):
    assert is_of_average(metric) == expected


@pytest.mark.parametrize(
    ("metric", "problem"),
    [
        ("panoptic_seg/PQ", None),
        ("segm/AP", None),
        ("sem_seg/mIoU", "allowed: 'panoptic_seg/...', 'segm/...'."),
        ("ema/segm/AP", "ema/ needs SOLVER.EMA.ENABLED True"),
        ("segm/", "which is not evaluated"),
    ],
)
def test_task_is_known_before_the_run(tiny_cfg, panoptic_metadata, metric, problem):
    tiny_cfg.DATASETS.TEST = (panoptic_metadata,)
    tiny_cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON = True
    tiny_cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = True
    tiny_cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = False
    tiny_cfg.TEST.BEST_METRIC = metric
    if problem is None:
        check_best_metric(tiny_cfg)
        return
    with pytest.raises(ValueError, match=problem):
        check_best_metric(tiny_cfg)


@pytest.fixture
def panoptic_metadata():
    metadata = MetadataCatalog.get("toy_panoptic")
    metadata.evaluator_type = "coco_panoptic_seg"
    yield "toy_panoptic"
    MetadataCatalog.remove("toy_panoptic")


@pytest.mark.parametrize(
    ("change", "text"),
    [({"best_metric": "x"}, "best_metric is 'x'"), ({"last_iter": None}, "last_iter is None")],
)
def test_state_that_makes_no_sense(tmp_path, change, text):
    train(tmp_path, kill=Kill(before=16))
    path = tmp_path / "model_0000014.pth"
    checkpoint = torch.load(path)
    checkpoint["trainer"]["hooks"]["BestModel"].update(change)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=text):
        train(tmp_path, resume=True)


def test_losses_are_read_after_evaluations_only():
    assert READING_PERIODS[BestModel] == "_period"
