"""Scalars that a training writes besides its losses."""

import logging

import pytest
import torch
import toy_training as toy
from detectron2.utils.events import EventStorage
from test_trainer import metrics, rows_of, run
from torch import nn

from mask2former.optimizer import build_optimizer
from mask2former.train_step import Step, unweighted_losses
from mask2former.utils.memory import peak_resident_bytes


@pytest.fixture(autouse=True)
def show_logs(caplog):
    caplog.set_level(logging.INFO)


class Norm(nn.Module):
    """Its gradient is its parameter, (3, 4), whose norm is 5."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, batch):
        half = (self.weight * self.weight).sum() / 2
        return {"loss_a": half, "loss_a_0": 2 * half}


def step_of(tmp_path, *options, learning_rate=1e-9):
    cfg = toy.toy_config(tmp_path, "SOLVER.WEIGHT_DECAY", "0.0", *options)
    cfg.SOLVER.BASE_LR = learning_rate
    model = Norm()
    step = Step(model, [[]] * 9, build_optimizer(cfg, model))
    step.logs_gradient_norm = cfg.LOGGING.GRADIENT_NORM
    return step


def run_steps(step, number, delay):
    if delay:
        step.delay_metrics(lambda iteration: False)
    with EventStorage() as storage:
        for step.iter in range(number):
            storage.iter = step.iter
            step.run_step()
        step.flush()
    return storage


@pytest.mark.parametrize("delay", [False, True])
@pytest.mark.parametrize(
    ("clip", "logged"), [("full_model", False), ("value", True), ("norm", True)]
)
def test_norm_of_the_gradient_before_clipping(tmp_path, clip, logged, delay):
    """The losses' gradients are (3, 4) and twice that."""
    options = "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip, "LOGGING.GRADIENT_NORM", str(logged)
    storage = run_steps(step_of(tmp_path, *options), 3, delay)
    values = storage.history("grad_norm").values()
    assert [iteration for _, iteration in values] == [0, 1, 2]
    assert [value for value, _ in values] == pytest.approx([15] * 3)


def test_norm_is_not_computed_unasked(tmp_path):
    storage = run_steps(step_of(tmp_path, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value"), 2, False)
    assert "grad_norm" not in storage.histories()


def test_norm_that_is_not_finite_ends_the_run(tmp_path):
    step = step_of(tmp_path)
    step.model.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match="Norm of gradients became infinite or NaN"):
        run_steps(step, 1, True)


def test_norm_of_a_skipped_step(tmp_path):
    """The gradient scaler may not call `step`: the norm of an earlier one must not return."""
    step = step_of(tmp_path)
    run_steps(step, 1, False)
    step.optimizer.step = lambda: None
    assert "grad_norm" not in run_steps(step, 1, False).histories()


@pytest.mark.parametrize("delay", [False, True])
def test_unweighted_losses(tmp_path, delay):
    """Of the last layer only; a loss of weight 0 cannot be recovered."""
    step = step_of(tmp_path)
    step.weights = {"loss_a": 5.0, "loss_a_0": 5.0}
    storage = run_steps(step, 2, delay)
    assert storage.history("loss_a").values()[0] == (12.5, 0)
    assert storage.history("unweighted/a").values()[0] == (2.5, 0)
    assert storage.history("total_loss").values()[0] == (37.5, 0)
    assert [name for name in storage.histories() if "unweighted" in name] == ["unweighted/a"]
    with storage:
        assert unweighted_losses(["loss_a"], {"loss_a": 0.0}, "", 1) == {}
        assert unweighted_losses(["loss_a"], {"loss_a": 1.0}, "", 0) == {}  # of another iteration
        assert unweighted_losses(["loss_b"], {"loss_b": 1.0}, "", 1) == {}


def test_rows(tmp_path):
    """Every row has the peak memory and the norm; earlier names stay."""
    run(tmp_path, "SEED", "3", "SOLVER.MAX_ITER", "25")
    rows = rows_of(tmp_path)
    assert rows.keys() == {19, 24}
    for row in rows.values():
        assert row.keys() >= {"total_loss", "loss_mean", "loss_size", "lr", "data_time"}
        assert 10 < row["max_mem"] <= peak_resident_bytes() / 2**20
        assert 0 < row["grad_norm"] < 1000


def test_observers_change_no_loss(tmp_path):
    """Losses with everything on and everything off, in full precision."""
    off = "LOGGING.PICTURES", "0", "LOGGING.HARD_EXAMPLES", "0"
    run(tmp_path / "off", "SEED", "3", *off)
    run(tmp_path / "on", "SEED", "3", "LOGGING.GRADIENT_NORM", "True")
    assert toy.read_losses(tmp_path / "on") == toy.read_losses(tmp_path / "off")
    assert metrics(tmp_path / "on") == metrics(tmp_path / "off")
