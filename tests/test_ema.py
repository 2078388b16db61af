"""SOLVER.EMA: the average of the weights, its evaluation, its files, and resuming."""

import json
import logging
import math

import pytest
import torch
import toy_training as toy
from detectron2.evaluation import DatasetEvaluator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.ema import WeightAverage
from mask2former.hooks import READING_PERIODS
from mask2former.trainer import Trainer

EMA = ("SOLVER.EMA.ENABLED", "True", "SEED", "3")
EVALUATES = ("DATASETS.TEST", "('toy_train',)", "TEST.EVAL_PERIOD", "10")


@pytest.fixture(autouse=True)
def show_logs(caplog):
    caplog.set_level(logging.INFO)


class Interrupt(toy.HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


class ReadBias(DatasetEvaluator):
    """The metric of a model: the bias of its head, which its outputs carry."""

    def reset(self):
        self.values = set()

    def process(self, inputs, outputs):
        self.values |= {x["bias"] for x in outputs}

    def evaluate(self):
        (value,) = self.values
        return {"sem_seg": {"bias": value}}


class Evaluating(toy.ToyTrainer):
    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return [[toy.augment(record)] for record in toy.load_toy_dataset()[:2]]

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return ReadBias()


@pytest.fixture(autouse=True)
def biased_outputs(monkeypatch):
    forward = toy.ToyArchitecture.forward

    def with_bias(self, batch):
        result = forward(self, batch)
        if not self.training:
            result = [{**x, "bias": self.head.bias.item()} for x in result]
        return result

    monkeypatch.setattr(toy.ToyArchitecture, "forward", with_bias)


def run(output_dir, *options, resume=False, stop_before=None, kind=toy.ToyTrainer):
    torch.manual_seed(0)
    trainer = kind(toy.toy_config(output_dir, *options))
    trainer.resume_or_load(resume=resume)
    if stop_before is not None:
        trainer.register_hooks([Interrupt(stop_before)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()
    return trainer


def average_of(trainer):
    (hook,) = [hook for hook in trainer._hooks if isinstance(hook, WeightAverage)]
    return hook


def test_average_of_numbers_worked_by_hand():
    model = nn.BatchNorm1d(1)
    hook = WeightAverage(model, 0.75, warmup=False)
    for value, expected in ((5.0, 0.75 * 1 + 0.25 * 5), (1.0, 0.75 * 2 + 0.25 * 1)):
        model.weight.data.fill_(value)
        model.running_mean.fill_(value)
        model.num_batches_tracked.fill_(int(value))
        hook.update(model)
        assert hook.model.weight.item() == expected
        assert not hook.model.weight.requires_grad and not hook.model.training
        # Statistics are copied.
        assert hook.model.running_mean.item() == value
        assert hook.model.num_batches_tracked.item() == int(value)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_update_does_not_wait_for_a_gpu():
    """Nothing is read or uploaded, and the number of operators does not grow with the model."""
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(9)))
    hook = WeightAverage(model, 0.9)
    with Operators() as operators:
        hook.update(model)
    assert operators.names - {"detach"} == {"_foreach_lerp_", "_foreach_copy_"}


def test_warm_up():
    hook = WeightAverage(nn.Linear(1, 1), 0.9998)
    decays = []
    for hook.num_updates in (0, 90, 10**6):
        decays.append(hook.decay())
    assert decays == [0.1, 0.91, 0.9998]
    assert WeightAverage(nn.Linear(1, 1), 0.9998, warmup=False).decay() == 0.9998


def test_training_is_the_same_bit_by_bit(tmp_path):
    plain = run(tmp_path / "plain", "SEED", "3", "SOLVER.MAX_ITER", "12")
    averaged = run(tmp_path / "averaged", *EMA, "SOLVER.MAX_ITER", "12")
    assert toy.read_losses(tmp_path / "plain") == toy.read_losses(tmp_path / "averaged")
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, averaged.model.state_dict()[name])
        assert not torch.equal(value, average_of(averaged).model.state_dict()[name])
    assert not any(isinstance(hook, WeightAverage) for hook in plain._hooks)


def test_resume_is_exact(tmp_path):
    whole = run(tmp_path / "whole", *EMA)
    run(tmp_path / "killed", *EMA, stop_before=27)
    resumed = run(tmp_path / "killed", *EMA, resume=True)
    assert resumed.start_iter == 15
    assert average_of(resumed).num_updates == average_of(whole).num_updates == 45
    files = [torch.load(tmp_path / name / "model_final_ema.pth") for name in ("whole", "killed")]
    for name, value in average_of(whole).model.state_dict().items():
        assert torch.equal(value, files[0]["model"][name])
        assert torch.equal(value, files[1]["model"][name])


def test_file_loads_like_any_other(tmp_path):
    trainer = run(tmp_path, *EMA, "SOLVER.MAX_ITER", "3")
    (tmp_path / "model_final_ema.pth").unlink()
    # Killed before it was written.
    run(tmp_path, *EMA, "SOLVER.MAX_ITER", "3", resume=True)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    model = Trainer.build_model(trainer.cfg)
    Mask2FormerCheckpointer(model).load(str(tmp_path / "model_final_ema.pth"))
    assert torch.equal(model.head.bias, average_of(trainer).model.head.bias)


def test_results_beside_those_of_the_weights(tmp_path):
    trainer = run(tmp_path, *EMA, *EVALUATES, kind=Evaluating)
    live, average = trainer.model.head.bias.item(), average_of(trainer).model.head.bias.item()
    assert live != average
    results = {"sem_seg": {"bias": live}, "ema/sem_seg": {"bias": average}}
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"toy_train": results}
    assert trainer._last_eval_results == results
    rows = list(map(json.loads, (tmp_path / "metrics.json").read_text().splitlines()))
    evaluated = [row for row in rows if "ema/sem_seg/bias" in row]
    # Of several evaluations since the last row, Detectron2 writes the last.
    assert [row["iteration"] for row in evaluated] == [19, 39, 45]
    assert evaluated[-1]["ema/sem_seg/bias"] == average
    assert evaluated[-1]["sem_seg/bias"] == live
    own = json.loads((tmp_path / "ema" / "evaluation.json").read_text())
    assert own == {"toy_train": {"sem_seg": {"bias": average}}}


def test_results_of_several_test_sets(tmp_path):
    options = ("DATASETS.TEST", "('toy_train', 'toy_other')", "SOLVER.MAX_ITER", "3")
    toy.DatasetCatalog.register("toy_other", toy.load_toy_dataset)
    try:
        run(tmp_path, *EMA, *options, kind=Evaluating)
    finally:
        toy.DatasetCatalog.remove("toy_other")
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert {name: list(tasks) for name, tasks in results.items()} == {
        name: ["sem_seg", "ema/sem_seg"] for name in ("toy_train", "toy_other")
    }


def test_checkpoint_without_an_average(tmp_path, caplog):
    run(tmp_path, "SEED", "3", stop_before=20)
    weights = torch.load(tmp_path / "model_0000014.pth")["model"]
    caplog.clear()
    trainer = run(tmp_path, *EMA, "SOLVER.MAX_ITER", "15", resume=True)
    assert "starts from the weights of iteration 14, because the checkpoint has no" in caplog.text
    assert torch.equal(average_of(trainer).model.head.bias, weights["head.bias"])


def test_average_of_an_earlier_run_is_not_used(tmp_path, caplog):
    run(tmp_path, *EMA, stop_before=20)
    caplog.clear()
    run(tmp_path, "SEED", "3", "SOLVER.MAX_ITER", "16", resume=True)
    assert "has state for SOLVER.EMA.ENABLED, which is off: it is not used" in caplog.text
    assert "Cannot find the hook" not in caplog.text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.update(num_updates=-1), "num_updates is -1"),
        (lambda state: state.update(model=[]), "model is a list"),
        (lambda state: state["model"].pop("head.bias"), "head.bias is in one only"),
        (lambda state: state["model"].update({"head.bias": torch.ones(3)}), "head.bias does not"),
        (lambda state: state["model"].update({"head.bias": torch.ones(1).int()}), "torch.int32"),
    ],
)
def test_state_that_does_not_fit(tmp_path, change, text):
    run(tmp_path, *EMA, stop_before=20)
    path = tmp_path / "model_0000014.pth"
    checkpoint = torch.load(path)
    change(checkpoint["trainer"]["hooks"]["WeightAverage"])
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=text):
        run(tmp_path, *EMA, resume=True)


def test_losses_are_not_read():
    assert READING_PERIODS[WeightAverage] is None


def test_average_of_a_whole_model(tiny_cfg, make_input):
    """A copy with caches and fast parts: its outputs are those of a new model with its weights."""
    model = Trainer.build_model(tiny_cfg)
    hook = WeightAverage(model, 0.5, warmup=False)
    batch = [{**make_input(40, 64, [0, 2]), "height": 40, "width": 64}]
    with torch.inference_mode():
        hook.model(batch)  # fills caches
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    hook.update(model)
    other = Trainer.build_model(tiny_cfg)
    other.load_state_dict(hook.model.state_dict())
    with torch.inference_mode():
        expected, actual = (m.eval()(batch)[0]["sem_seg"] for m in (other, hook.model))
    assert torch.equal(actual, expected) and math.isfinite(actual.sum())
