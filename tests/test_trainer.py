"""Training: exact resuming, several processes, and the checks before a run."""

import errno
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
import toy_training as toy
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.engine import AMPTrainer
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from mask2former import MaskFormer
from mask2former.config import load_config
from mask2former.data.dataset_mappers import COCOPanopticNewBaselineDatasetMapper, build_mapper
from mask2former.data.loader import SeededSamples, has_fixed_size
from mask2former.evaluation import write_results
from mask2former.hooks import READING_PERIODS, AmpleMemory
from mask2former.optimizer import scale_learning_rate
from mask2former.preflight import check_precision
from mask2former.train_step import MixedPrecisionStep, Step
from mask2former.trainer import Trainer, chooses_cudnn_benchmark, needs_uploads
from mask2former.utils.output_lock import lock_output

TOY = Path(__file__).parent / "toy_training.py"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(TOY.parents[1]), "OMP_NUM_THREADS": "1"}
# Metrics that depend on the clock.
TIMES = {"time", "data_time", "rank_data_time", "eta_seconds", "max_mem"}


@pytest.fixture(autouse=True)
def show_logs(caplog):
    """Without a level the trainer would set up Detectron2's loggers, which bypass caplog."""
    caplog.set_level(logging.INFO)


class Stop(HookBase):
    """Interrupts a run in this process, before the given iteration."""

    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


def run(output_dir, *options, resume=False, stop_before=None):
    torch.manual_seed(100 if resume else 0)
    trainer = toy.ToyTrainer(toy.toy_config(output_dir, *options))
    trainer.resume_or_load(resume=resume)
    if stop_before is None:
        trainer.train()
    else:
        trainer.register_hooks([Stop(stop_before)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return trainer


def start_program(*arguments, ranks=1):
    """Runs the toy training as a separate program, as a user would, or one for each rank."""
    command = [sys.executable, str(TOY), *map(str, arguments)]
    if ranks == 1:
        return forked.run(command, env=ENVIRONMENT)
    return forked.run_ranks(ranks, command, env=ENVIRONMENT)


def rows_of(output_dir):
    """Iteration → its last row of metrics.json."""
    rows = map(json.loads, (Path(output_dir) / "metrics.json").read_text().splitlines())
    return {row["iteration"]: row for row in rows}


def metrics(output_dir):
    """Iteration → its last row of metrics.json, without TIMES."""
    rows = rows_of(output_dir)
    return {i: {k: v for k, v in row.items() if k not in TIMES} for i, row in rows.items()}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("DATALOADER.NUM_WORKERS", "2", "DATALOADER.ASPECT_RATIO_GROUPING", "True"),
        ("SOLVER.OPTIMIZER", "SGD", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"),
        ("SOLVER.IMS_PER_BATCH", "6", "SOLVER.NUM_ACCUMULATION_STEPS", "3"),
    ],
)
def test_resume_is_exact(tmp_path, options):
    """Interrupted at iteration 27; the last checkpoint is of 14. The seed is random."""
    interrupted = run(tmp_path / "resumed", *options, stop_before=27)
    resumed = run(tmp_path / "resumed", *options, resume=True)
    assert resumed.start_iter == 15
    assert resumed.seed == interrupted.seed
    run(tmp_path / "whole", *options, "SEED", str(interrupted.seed))

    expected = toy.read_losses(tmp_path / "whole")
    assert len(expected) == len(set(expected.values())) == 45
    # Iterations 15 to 26 ran twice; read_losses compares them.
    assert toy.read_losses(tmp_path / "resumed") == expected
    rows = metrics(tmp_path / "whole")
    assert list(rows) == [19, 39, 44]
    # The interrupt wrote one more row. Row 19 needs values from before the checkpoint.
    assert {i: row for i, row in metrics(tmp_path / "resumed").items() if i in rows} == rows


@pytest.mark.parametrize("scheduler", ["WarmupPolyLR", "WarmupMultiStepLR"])
def test_checkpoint_with_a_group_for_each_parameter(tmp_path, scheduler):
    """The layout of the original release's training checkpoints; the losses are the same."""
    options = ("SOLVER.LR_SCHEDULER_NAME", scheduler, "SEED", "7")
    run(tmp_path, *options, stop_before=27)
    path = tmp_path / (tmp_path / "last_checkpoint").read_text().strip()
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["trainer"]
    optimizer, rates = state["_trainer"]["optimizer"], state["hooks"]["LRScheduler"]
    groups = optimizer["param_groups"]
    assert max(len(group["params"]) for group in groups) > 1
    optimizer["param_groups"] = [g | {"params": [i]} for g in groups for i in g["params"]]
    for key in {"base_lrs", "_last_lr"} & rates.keys():
        pairs = zip(rates[key], groups, strict=True)
        rates[key] = [rate for rate, group in pairs for _ in group["params"]]
    torch.save(checkpoint, path)
    resumed = run(tmp_path, *options, resume=True)
    assert resumed.start_iter == 15
    assert len(resumed.scheduler.base_lrs) == len(groups)
    run(tmp_path / "whole", *options)
    expected = toy.read_losses(tmp_path / "whole")
    assert toy.read_losses(tmp_path) == expected


CHANGES = [
    ({"SOLVER.BASE_LR": (0.01, 0.003)}, ()),
    ({"SOLVER.BASE_LR": (0.01, 0.003)}, ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR")),
    ({"SOLVER.BASE_LR": (0.01, 0.003)}, ("SOLVER.OPTIMIZER", "SGD")),
    ({"SOLVER.BACKBONE_MULTIPLIER": (0.1, 0.2)}, ()),
    # All parameters are then of one group.
    ({"SOLVER.BACKBONE_MULTIPLIER": (0.1, 1.0)}, ()),
    ({"SOLVER.POLY_LR_POWER": (0.9, 0.5), "SOLVER.MAX_ITER": (45, 40)}, ()),
    ({"SOLVER.WARMUP_ITERS": (5, 30)}, ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR")),
    ({"SOLVER.WEIGHT_DECAY": (0.0001, 0.3)}, ()),
    ({"SOLVER.MOMENTUM": (0.9, 0.5)}, ("SOLVER.OPTIMIZER", "SGD")),
]


@pytest.mark.parametrize(("changes", "options"), CHANGES)
@pytest.mark.parametrize("settings_saved", [True, False])
def test_resume_with_other_settings(tmp_path, caplog, changes, options, settings_saved):
    """As the config says, with one line each, and the state of each parameter unchanged."""
    options = ("SEED", "7", *options)
    run(tmp_path, *options, stop_before=15)
    (path,) = tmp_path.glob("*.pth")
    checkpoint = torch.load(path)
    state = checkpoint["trainer"]
    groups = state["_trainer"]["optimizer"]["param_groups"]
    if not settings_saved:
        del state["solver"]
        for group in groups:
            del group["param_names"]
        torch.save(checkpoint, path)
    new = (x for key, (_, value) in changes.items() for x in (key, str(value)))
    cfg = toy.toy_config(tmp_path, *options, *new)
    trainer, other = toy.ToyTrainer(cfg), toy.ToyTrainer(cfg)
    fresh = [dict(group) for group in trainer.optimizer.param_groups]
    if len(fresh) != len(groups) and not settings_saved:
        with pytest.raises(ValueError, match="different number of parameter groups"):
            trainer.resume_or_load()
        return
    # The rate that a run with these settings has at this iteration.
    for _ in range(15):
        other.optimizer.step()
        other.scheduler.step()
    expected = [group["lr"] for group in other.optimizer.param_groups]
    caplog.clear()
    trainer.resume_or_load()
    assert trainer.start_iter == 15
    if settings_saved:
        lines = [
            f"{key}: checkpoint {old}, config {value}: the config's value is used"
            for key, (old, value) in changes.items()
        ]
        said = [r.message for r in caplog.records if "config's value" in r.message]
        assert sorted(said) == sorted(lines)
    elif "SOLVER.WARMUP_ITERS" in changes:
        return  # not in that state
    assert "the config's value is used" in caplog.text
    assert [group["lr"] for group in trainer.optimizer.param_groups] == expected
    assert trainer.scheduler.get_last_lr() == expected
    for group, built in zip(trainer.optimizer.param_groups, fresh, strict=True):
        assert {k: v for k, v in group.items() if k != "lr"} == {
            k: v for k, v in built.items() if k != "lr"
        }
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    saved = state["_trainer"]["optimizer"]["state"]
    ours = {names[p]: value for p, value in trainer.optimizer.state.items()}
    order = ["backbone.weight", "backbone.bias", "head.weight", "head.bias"]
    for index, name in enumerate(order):
        for key, value in saved[index].items():
            torch.testing.assert_close(ours[name][key], value, rtol=0, atol=0)


@pytest.mark.parametrize("saved_before_the_key", [False, True])
def test_resume_with_layer_decay(tmp_path, caplog, monkeypatch, saved_before_the_key):
    monkeypatch.setattr(nn.Linear, "num_depths", 1, raising=False)
    monkeypatch.setattr(nn.Linear, "parameter_depth", lambda self, name: 0, raising=False)
    run(tmp_path, "SEED", "7", stop_before=15)
    if saved_before_the_key:
        (path,) = tmp_path.glob("*.pth")
        checkpoint = torch.load(path)
        del checkpoint["trainer"]["solver"]["SOLVER.LAYER_DECAY"]
        torch.save(checkpoint, path)
    trainer = toy.ToyTrainer(toy.toy_config(tmp_path, "SEED", "7", "SOLVER.LAYER_DECAY", "0.5"))
    trainer.resume_or_load()
    assert "SOLVER.LAYER_DECAY: checkpoint 1.0, config 0.5: the config's value" in caplog.text
    backbone, head = (group["lr"] for group in trainer.optimizer.param_groups)
    assert backbone == pytest.approx(0.1 * 0.5 * head)


def test_resume_with_the_same_settings_says_nothing(tmp_path, caplog):
    run(tmp_path, "SEED", "7", stop_before=15)
    caplog.clear()
    run(tmp_path, "SEED", "7", resume=True)
    assert "config's value" not in caplog.text


def test_seed_order_and_noise_change_the_losses(tmp_path):
    """Otherwise the test above could pass because nothing is random."""
    curves = [
        toy.read_losses(run(tmp_path / name, *options, "SOLVER.MAX_ITER", "6").cfg.OUTPUT_DIR)
        for name, options in {
            "a": ("SEED", "1"),
            "same": ("SEED", "1"),
            "other seed": ("SEED", "2"),
            "grouped": ("SEED", "1", "DATALOADER.ASPECT_RATIO_GROUPING", "True"),
            "no noise": ("SEED", "1", "MODEL.MASK_FORMER.DROPOUT", "0.0"),
        }.items()
    ]
    assert curves[0] == curves[1]
    assert len({str(curve) for curve in curves}) == 4


def test_resume_after_kill(tmp_path):
    """`kill -9` while writing the checkpoint of iteration 29, with loader processes."""
    options = ("SEED", "3", "DATALOADER.NUM_WORKERS", "2")
    killed = start_program("--kill-at", 29, tmp_path, *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000014.pth"
    run(tmp_path, *options, resume=True)
    # Iterations 15 to 28 ran before the kill and again after it; read_losses compares them.
    assert sorted(toy.read_losses(tmp_path)) == list(range(45))


@pytest.mark.parametrize("num_steps", [1, 2])
def test_two_processes_train_like_one(tmp_path, num_steps):
    """The same losses as one process with the same total batch, within 1e-5.

    Rounding differs, because the mean of two workers' means has another order of summation.
    """
    options = ("SEED", "3", "SOLVER.IMS_PER_BATCH", "4", "MODEL.MASK_FORMER.DROPOUT", "0.0")
    options += ("SOLVER.MAX_ITER", "20")
    steps = ("SOLVER.NUM_ACCUMULATION_STEPS", num_steps)
    both = start_program(tmp_path / "both", *options, *steps, ranks=2)
    assert both.returncode == 0, both.stderr
    run(tmp_path / "one", *options)
    expected, actual = toy.read_losses(tmp_path / "one"), toy.read_losses(tmp_path / "both")
    assert len(expected) == len(actual) == 20
    for iteration, line in expected.items():
        for (name, value), (_, other) in zip(eval(line), eval(actual[iteration]), strict=True):
            assert other == pytest.approx(value, rel=1e-5, abs=1e-6), (iteration, name)
    size = "2 images" if num_steps == 1 else "2 micro-batches x 1 images"
    assert f"Effective batch size 4 = 2 process(es) x {size}" in (both.stdout + both.stderr)


@pytest.mark.parametrize("num_steps", [2, 6])
def test_accumulated_batches_train_like_whole_ones(tmp_path, num_steps):
    """The same samples, losses, clipped updates and weights, up to rounding."""
    options = ("SEED", "3", "SOLVER.IMS_PER_BATCH", "6", "MODEL.MASK_FORMER.DROPOUT", "0.0")
    options += ("SOLVER.MAX_ITER", "20")
    whole = run(tmp_path / "whole", *options)
    steps = ("SOLVER.NUM_ACCUMULATION_STEPS", str(num_steps))
    parts = run(tmp_path / "parts", *options, *steps)
    expected, actual = toy.read_losses(tmp_path / "whole"), toy.read_losses(tmp_path / "parts")
    assert len(expected) == len(actual) == 20
    for iteration, line in expected.items():
        for (name, value), (_, other) in zip(eval(line), eval(actual[iteration]), strict=True):
            assert other == pytest.approx(value, rel=1e-5, abs=1e-6), (iteration, name)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_resume_with_other_micro_batches(tmp_path, caplog):
    """On a machine with less memory a run goes on as it would have."""
    options = ("SEED", "3", "SOLVER.IMS_PER_BATCH", "4", "MODEL.MASK_FORMER.DROPOUT", "0.0")
    run(tmp_path / "whole", *options)
    run(tmp_path / "resumed", *options, stop_before=27)
    resumed = ("SOLVER.NUM_ACCUMULATION_STEPS", "4", "SOLVER.MAX_ITER", "45")
    (tmp_path / "resumed/losses.txt").unlink()
    run(tmp_path / "resumed", *options, *resumed, resume=True)
    assert "SOLVER.NUM_ACCUMULATION_STEPS: checkpoint 1, config 4" in caplog.text
    expected, actual = toy.read_losses(tmp_path / "whole"), toy.read_losses(tmp_path / "resumed")
    assert sorted(actual) == list(range(15, 45))
    for iteration, line in actual.items():
        for (name, value), (_, other) in zip(eval(line), eval(expected[iteration]), strict=True):
            assert other == pytest.approx(value, rel=1e-4, abs=1e-6), (iteration, name)


def test_accumulated_loss_that_is_not_finite(tmp_path):
    """Whichever micro-batch it is in, the error names the iteration."""

    class Broken(toy.ToyTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            values = (1.0, 1.0), (1.0, 1.0), (1e30, 1.0)
            return [[{"image": torch.full((4,), value)} for value in pair] for pair in values]

    options = ("SOLVER.NUM_ACCUMULATION_STEPS", "2", "SOLVER.MAX_ITER", "9")
    trainer = Broken(toy.toy_config(tmp_path, *options))
    with pytest.raises(FloatingPointError, match=r"(?s)NaN at iteration=2!.*loss_mean"):
        trainer.train()


def test_loader_whose_batches_cannot_be_split(tmp_path):
    class Odd(toy.ToyTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return itertools.repeat([{"image": torch.zeros(4)}] * 3)

    trainer = Odd(toy.toy_config(tmp_path, "SOLVER.NUM_ACCUMULATION_STEPS", "2"))
    with pytest.raises(
        ValueError, match="gave 3 images, which cannot be split into .*_STEPS, 2, e"
    ):
        trainer.train()


@pytest.mark.parametrize("scheduler", ["WarmupPolyLR", "WarmupCosineLR"])
def test_learning_rate_for_a_reference_batch(tmp_path, caplog, scheduler):
    """As if BASE_LR were written that way, also after a resume and from the saved config."""
    options = ("SEED", "3", "SOLVER.LR_SCHEDULER_NAME", scheduler, "SOLVER.IMS_PER_BATCH", "4")
    rates = ("SOLVER.BASE_LR", "0.01", "SOLVER.BASE_LR_END", "0.001")
    run(tmp_path / "written", *options, *rates)
    reference = ("SOLVER.REFERENCE_BATCH_SIZE", "16", "SOLVER.BASE_LR", "0.04")
    reference += ("SOLVER.BASE_LR_END", "0.004")
    run(tmp_path / "scaled", *options, *reference, stop_before=27)
    assert "SOLVER.BASE_LR 0.04 is for a batch of SOLVER.REFERENCE_BATCH_SIZE 16" in caplog.text
    assert "4 images, base learning rate 0.01, 45 iterations" in caplog.text
    caplog.clear()
    resumed = run(tmp_path / "scaled", *options, *reference, resume=True)
    assert resumed.start_iter == 15 and "config's value" not in caplog.text
    assert toy.read_losses(tmp_path / "scaled") == toy.read_losses(tmp_path / "written")
    assert scale_learning_rate(resumed.cfg) is resumed.cfg
    assert toy.ToyTrainer(resumed.cfg).cfg.SOLVER.BASE_LR == 0.01


def test_seed_of_the_config_takes_precedence(tmp_path, caplog):
    options = ("SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "3")
    run(tmp_path, "SEED", "1", *options, stop_before=2)
    trainer = run(tmp_path, "SEED", "2", *options, resume=True)
    assert trainer.seed == 2
    assert "had seed 1, but SEED is 2" in caplog.text


def test_resume_without_a_checkpoint_starts_over(tmp_path):
    trainer = run(tmp_path, "SOLVER.MAX_ITER", "2", resume=True)
    assert trainer.start_iter == 0


@pytest.mark.parametrize("extra", [{}, {"iteration": 7, "optimizer": {}}])
def test_resume_from_weights_only(tmp_path, caplog, extra):
    first = run(tmp_path, "SOLVER.MAX_ITER", "2")
    weights = {name: value + 1 for name, value in first.model.state_dict().items()}
    torch.save({"model": weights, **extra}, tmp_path / "weights.pth")
    (tmp_path / "last_checkpoint").write_text("weights.pth")
    caplog.clear()
    resumed = toy.ToyTrainer(toy.toy_config(tmp_path, "SOLVER.MAX_ITER", "2"))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 0
    assert torch.equal(resumed.model.state_dict()["head.bias"], weights["head.bias"])
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "weights.pth holds no state of training, only weights: training starts at" in warning
    (tmp_path / "losses.txt").unlink()
    resumed.train()
    assert sorted(toy.read_losses(tmp_path)) == [0, 1]


def test_resume_after_one_iteration(tmp_path, caplog):
    run(tmp_path, "SOLVER.CHECKPOINT_PERIOD", "1", stop_before=1)
    resumed = run(tmp_path, "SOLVER.MAX_ITER", "3", resume=True)
    assert resumed.start_iter == 1
    assert "holds no state of training" not in caplog.text


def test_killed_before_the_final_checkpoint(tmp_path):
    """The same file, bit by bit, and the same rows of the evaluation."""
    options = ("SOLVER.CHECKPOINT_PERIOD", "5", "SOLVER.MAX_ITER", "10")
    options += ("DATASETS.TEST", "('toy_train',)")
    run_quietly(tmp_path, *options, delay=False)
    final = tmp_path / "model_final.pth"
    rows, expected = metrics(tmp_path), torch.load(final)
    results = (tmp_path / "evaluation.json").read_text()
    final.unlink()
    (tmp_path / "evaluation.json").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    for _ in range(2):  # the second time the last checkpoint is the final one
        run_quietly(tmp_path, *options, delay=False, resume=True)
        actual = torch.load(final)
        assert str(actual) == str(expected)
        for name, value in expected["model"].items():
            assert torch.equal(actual["model"][name], value)
        assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
        assert (tmp_path / "evaluation.json").read_text() == results
        assert {key: value for key, value in metrics(tmp_path).items() if key in rows} == rows
        assert set(metrics(tmp_path)) == set(rows)


def test_resume_with_fewer_iterations_than_done(tmp_path, caplog):
    run(tmp_path, "SOLVER.CHECKPOINT_PERIOD", "5", stop_before=7)
    resumed = run(tmp_path, "SOLVER.MAX_ITER", "3", resume=True)
    assert "trained for 5 iterations, more than SOLVER.MAX_ITER, 3" in caplog.text
    assert torch.load(tmp_path / "model_final.pth")["trainer"]["iteration"] == 4
    assert resumed.start_iter == 5


def test_resume_with_more_iterations(tmp_path):
    """The schedule continues to the new end; Detectron2's fails beyond the old one."""
    run(tmp_path, "SOLVER.MAX_ITER", "2", "SOLVER.WARMUP_ITERS", "0")
    run(tmp_path, "SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "0", resume=True)
    assert sorted(toy.read_losses(tmp_path)) == [0, 1, 2, 3]
    # The learning rate written is the backbone's, a tenth of SOLVER.BASE_LR.
    assert metrics(tmp_path)[3]["lr"] == pytest.approx(0.001 * (1 - 3 / 4) ** 0.9)


def test_foreign_loader(tmp_path, caplog):
    """Subclasses may use Detectron2's loader: they train, with a warning when resuming."""

    class Foreign(toy.ToyTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return build_detection_train_loader(cfg, mapper=toy.augment)

    cfg = toy.toy_config(tmp_path, "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "4")
    interrupted = Foreign(cfg)
    interrupted.register_hooks([Stop(2)])
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert "samples come in another order" not in caplog.text
    resumed = Foreign(cfg)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert "samples come in another order" in caplog.text
    assert sorted(toy.read_losses(tmp_path)) == [0, 1, 2, 3]


def test_start_is_logged(tmp_path, caplog):
    toy.ToyTrainer(toy.toy_config(tmp_path, "SEED", "4"))
    line = "Effective batch size 2 = 1 process(es) x 2 images, base learning rate 0.01, 45 iterat"
    assert line in caplog.text
    assert "seed 4" in caplog.text


def test_mixed_precision_on_a_cpu(tmp_path, caplog):
    run(tmp_path, "SOLVER.AMP.ENABLED", "True", "SOLVER.MAX_ITER", "2")
    warnings = [r.getMessage() for r in caplog.records if "AMP" in r.getMessage()]
    assert len(warnings) == 1
    assert "Training in float32" in warnings[0]


@pytest.mark.gpu
@pytest.mark.parametrize("num_steps", [1, 2])
def test_resume_is_exact_in_mixed_precision(tmp_path, num_steps):
    """The toy model has no operator that adds in any order on a GPU."""
    options = ("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", "True", "SEED", "3")
    options += ("SOLVER.NUM_ACCUMULATION_STEPS", str(num_steps))
    run(tmp_path / "whole", *options)
    run(tmp_path / "resumed", *options, stop_before=27)
    run(tmp_path / "resumed", *options, resume=True)
    assert toy.read_losses(tmp_path / "resumed") == toy.read_losses(tmp_path / "whole")


def test_batch_that_does_not_divide(tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 4)

    class NoModel(toy.ToyTrainer):
        @classmethod
        def build_model(cls, cfg):
            raise AssertionError("checked too late")

    with pytest.raises(ValueError, match=r"SOLVER.IMS_PER_BATCH is 6, .* number of workers, 4"):
        NoModel(toy.toy_config(tmp_path, "SOLVER.IMS_PER_BATCH", "6"))
    options = ("SOLVER.IMS_PER_BATCH", "8", "SOLVER.NUM_ACCUMULATION_STEPS", "4")
    message = "_STEPS is 4, .* divide the 2 image.*IMS_PER_BATCH 8, 4 workers"
    with pytest.raises(ValueError, match=message):
        NoModel(toy.toy_config(tmp_path, *options))


def test_model_whose_losses_do_not_add_up(tmp_path, monkeypatch):
    monkeypatch.delattr(toy.ToyArchitecture, "accumulating")
    with pytest.raises(ValueError, match="ToyArchitecture has no method `accumulating`"):
        toy.ToyTrainer(toy.toy_config(tmp_path, "SOLVER.NUM_ACCUMULATION_STEPS", "2"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(tmp_path):
    with pytest.raises(ValueError, match="MODEL.DEVICE is 'cuda'.* add `MODEL.DEVICE cpu`"):
        toy.ToyTrainer(toy.toy_config(tmp_path, "MODEL.DEVICE", "cuda"))


class CountImages(DatasetEvaluator):
    def reset(self):
        self.images, self.without_autograd = 0, 0

    def process(self, inputs, outputs):
        self.images += len(outputs)
        self.without_autograd += sum(x["sem_seg"].is_inference() for x in outputs)

    def evaluate(self):
        counts = {"images": self.images, "without_autograd": self.without_autograd}
        return {"sem_seg": counts | {"mIoU": float("nan")}}


class Evaluating(toy.ToyTrainer):
    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return [[toy.augment(record)] for record in toy.load_toy_dataset()]

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return CountImages()


def test_periodic_evaluation_is_written(tmp_path):
    options = ("DATASETS.TEST", "('toy_train',)", "TEST.EVAL_PERIOD", "2", "SOLVER.MAX_ITER", "3")
    trainer = Evaluating(toy.toy_config(tmp_path, *options))
    trainer.resume_or_load(resume=False)
    trainer.train()
    written = json.loads((tmp_path / "evaluation.json").read_text())
    counts = {"images": 11.0, "without_autograd": 11.0}
    assert written == {"toy_train": {"sem_seg": counts | {"mIoU": None}}}


class StopInEvaluation(Evaluating):
    """Stops like a kill in the evaluation at an iteration: nothing more is written."""

    stop_at = -1
    is_ready = False

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        assert cls.is_ready
        if cls.stop_at == get_event_storage().iter:
            raise SystemExit
        return CountImages()

    def after_train(self):
        if self.stop_at < 0:
            super().after_train()


class GetReady(HookBase):
    """Sets up what the evaluation needs."""

    def before_train(self):
        StopInEvaluation.is_ready = True


@pytest.mark.parametrize(
    ("stop_at", "period"),
    [
        (19, "20"),  # with a row of metrics due in the same iteration
        (13, "14"),  # without one
        (27, "14"),  # behind rows of metrics
    ],
)
def test_evaluation_that_was_cut_off(tmp_path, monkeypatch, stop_at, period):
    """It is run again after resuming, and no row of metrics is lost."""
    options = ("DATASETS.TEST", "('toy_train',)", "TEST.EVAL_PERIOD", period, "SEED", "1")
    options += ("SOLVER.MAX_ITER", "40", "SOLVER.CHECKPOINT_PERIOD")
    for folder, stop in (("whole", -1), ("resumed", stop_at), ("resumed", -1)):
        monkeypatch.setattr(StopInEvaluation, "stop_at", stop)
        monkeypatch.setattr(StopInEvaluation, "is_ready", False)
        checkpoint_period = str(stop_at + 1)
        torch.manual_seed(0)
        trainer = StopInEvaluation(
            toy.toy_config(tmp_path / folder, *options, checkpoint_period), delay_metrics=False
        )
        trainer.register_hooks([GetReady()])
        trainer.resume_or_load(resume=True)
        if stop >= 0:
            with pytest.raises(SystemExit):
                trainer.train()
        else:
            trainer.train()
    assert trainer.start_iter == stop_at + 1
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "whole")
    assert "sem_seg/images" in metrics(tmp_path / "resumed")[stop_at]


def test_evaluation_before_the_last_checkpoint_is_written(tmp_path):
    """Killed behind the last checkpoint, with an evaluation that waits for the last row."""
    options = ("DATASETS.TEST", "('toy_train',)", "TEST.EVAL_PERIOD", "14", "SEED", "1")
    options += ("SOLVER.MAX_ITER", "40", "SOLVER.CHECKPOINT_PERIOD", "20")
    path = tmp_path / "metrics.json"
    for resume in (False, True):
        trainer = Evaluating(toy.toy_config(tmp_path, *options), delay_metrics=False)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        if not resume:
            whole = metrics(tmp_path)
            rows = path.read_text().splitlines(keepends=True)
            path.write_text("".join(r for r in rows if json.loads(r)["iteration"] < 20))
            (tmp_path / "last_checkpoint").write_text("model_0000039.pth")
    assert trainer.start_iter == 40
    assert "sem_seg/images" in whole[27]
    assert metrics(tmp_path) == whole


def test_finished_iteration_is_not_repeated(tmp_path, monkeypatch):
    """Killed behind the row of metrics: the evaluation before it was done."""
    options = ("DATASETS.TEST", "('toy_train',)", "TEST.EVAL_PERIOD", "20", "SEED", "1")
    options += ("SOLVER.MAX_ITER", "40", "SOLVER.CHECKPOINT_PERIOD", "20")
    evaluated, saved = [], []
    original = Evaluating.build_evaluator.__func__

    def build_evaluator(cls, *args):
        evaluated.append(get_event_storage().iter)
        return original(cls, *args)

    monkeypatch.setattr(Evaluating, "build_evaluator", classmethod(build_evaluator))
    for resume in (False, True):
        trainer = Evaluating(toy.toy_config(tmp_path, *options), delay_metrics=False)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=True)
        saved.append(checkpoint["trainer"]["hooks"])
        (tmp_path / "last_checkpoint").write_text("model_0000019.pth")
    assert trainer.start_iter == 20
    assert evaluated == [19, 40, 40]
    # The resumed run does not know of the first evaluation, so it may not be in later checkpoints.
    unwritten = [hooks["UnwrittenMetrics"].keys() - TIMES for hooks in saved]
    assert unwritten == [{"lr"}, {"lr"}]


def test_results_of_several_datasets(tmp_path):
    results = {"a": {"segm": {"AP": 1}}, "b": {}}
    write_results(str(tmp_path), results)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {
        "a": {"segm": {"AP": 1.0}},
        "b": {},
    }


def test_unknown_test_set_is_noticed_before_training(tmp_path):
    with pytest.raises(ValueError, match="'toy_trian' is not registered; did you mean toy_train"):
        toy.ToyTrainer(toy.toy_config(tmp_path, "DATASETS.TEST", "('toy_trian',)"))


def test_empty_test_set(tmp_path):
    MetadataCatalog.get("toy_empty").image_root = "/images"
    toy.DatasetCatalog.register("toy_empty", lambda: [])
    try:
        with pytest.raises(ValueError, match="toy_empty.*is empty.*image_root=/images"):
            Trainer.build_test_loader(toy.toy_config(tmp_path), "toy_empty")
    finally:
        toy.DatasetCatalog.remove("toy_empty")
        MetadataCatalog.remove("toy_empty")


# ---- two runs in one folder ----


HOLD = """
import sys, time
from mask2former.utils.output_lock import lock_output
with lock_output(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


def hold(folder):
    command = [sys.executable, "-c", HOLD, str(folder)]
    return forked.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_trainings_in_one_folder(tmp_path):
    """The second is refused, until the first has ended, by a kill too."""
    trainer = toy.ToyTrainer(toy.toy_config(tmp_path, "SOLVER.MAX_ITER", "2"))
    with hold(tmp_path) as first:
        assert first.stdout.readline() == "locked\n"
        message = rf"OUTPUT_DIR is .* another training writes there \(process {first.pid} on "
        with pytest.raises(RuntimeError, match=message):
            trainer.train()
        first.kill()
    assert not (tmp_path / "losses.txt").exists()
    trainer.train()
    assert sorted(toy.read_losses(tmp_path)) == [0, 1]
    with hold(tmp_path) as third:
        assert third.stdout.readline() == "locked\n"
        third.kill()


def test_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def lockf(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("mask2former.utils.output_lock.fcntl.lockf", lockf)
    run(tmp_path, "SOLVER.MAX_ITER", "2")
    assert "has no locks ([Errno" in caplog.text


def test_lock_is_held_once(tmp_path):
    """Inner locks of this process change nothing."""
    with lock_output(str(tmp_path)):
        with lock_output(str(tmp_path / ".." / tmp_path.name)):
            pass
        _, errors = hold(tmp_path).communicate()
        assert f"(process {os.getpid()} on" in errors


# ---- losses written one iteration late ----


class QuietTrainer(Evaluating):
    """Without the hook that reads the losses of every iteration."""

    def build_hooks(self):
        return [hook for hook in super().build_hooks() if type(hook) is not toy.WriteLosses]


EVALUATES = ("DATASETS.TEST", "('toy_train',)", "TEST.EVAL_PERIOD", "12", "SEED", "3")


def run_quietly(output_dir, *options, delay, resume=False, hooks=()):
    torch.manual_seed(0)
    trainer = QuietTrainer(toy.toy_config(output_dir, *options), delay_metrics=delay)
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks(list(hooks))
    trainer.train()
    return trainer


def count_late(monkeypatch):
    """Iterations whose losses were written in a later one."""
    late = []
    write = Step._write_now

    def write_now(self, losses, metrics, data_time, prefix, iteration):
        if iteration != self.iter:
            late.append(iteration)
        write(self, losses, metrics, data_time, prefix, iteration)

    monkeypatch.setattr(Step, "_write_now", write_now)
    return late


def test_delayed_losses_change_no_row(tmp_path, monkeypatch):
    """Rows, values saved in checkpoints, and all values in the storage at the end."""
    late = count_late(monkeypatch)
    at_once = run_quietly(tmp_path / "at once", *EVALUATES, delay=False)
    assert late == []
    delayed = run_quietly(tmp_path / "delayed", *EVALUATES, delay=True)
    # A checkpoint every 15, an evaluation every 12, a row every 20 iterations, and the last two.
    read = {14, 29, 43, 44, 11, 23, 35, 19, 39}
    assert late == [i for i in range(45) if i not in read]
    rows = metrics(tmp_path / "at once")
    assert metrics(tmp_path / "delayed") == rows and {19, 39, 44} <= rows.keys()
    for name, history in at_once.storage.histories().items():
        if name not in TIMES:
            values = delayed.storage.histories()[name].values()
            assert str(values) == str(history.values()), name  # NaN is not equal to NaN
    for number in ("0000014", "0000029", "final"):
        windows = [
            torch.load(tmp_path / run / f"model_{number}.pth", weights_only=True)["trainer"][
                "hooks"
            ]
            for run in ("at once", "delayed")
        ]
        expected, actual = (
            {k: v for k, v in w["MetricWindow"].items() if k not in TIMES} for w in windows
        )
        assert actual == expected and len(expected["total_loss"]) > 10


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_delayed_losses_on_a_gpu(tmp_path, precision):
    options = (*EVALUATES, "MODEL.DEVICE", "cuda")
    if precision != "float32":
        options += ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", precision)
    run_quietly(tmp_path / "at once", *options, delay=False)
    run_quietly(tmp_path / "delayed", *options, delay=None)
    rows = metrics(tmp_path / "at once")
    assert metrics(tmp_path / "delayed") == rows
    assert ("[metric]grad_scaler" in rows[19]) == (precision == "float16")


@pytest.mark.parametrize("stop", [16, 27, 30])
def test_interrupted_with_delayed_losses(tmp_path, stop):
    """The row written on interrupt has the last losses; the resumed run is exact."""
    for name, delay in (("at once", False), ("delayed", True)):
        with pytest.raises(KeyboardInterrupt):
            run_quietly(tmp_path / name, *EVALUATES, delay=delay, hooks=[IdleStop(stop)])
    assert metrics(tmp_path / "delayed") == metrics(tmp_path / "at once")
    assert stop - 1 in metrics(tmp_path / "delayed")
    run_quietly(tmp_path / "delayed", *EVALUATES, delay=True, resume=True)
    run_quietly(tmp_path / "whole", *EVALUATES, delay=False)
    rows = metrics(tmp_path / "whole")
    assert {i: row for i, row in metrics(tmp_path / "delayed").items() if i in rows} == rows


class IdleStop(Stop):
    """Known to read no losses."""


@pytest.fixture(autouse=True)
def idle_hook(monkeypatch):
    monkeypatch.setitem(READING_PERIODS, IdleStop, None)


@pytest.mark.parametrize("bad", [2, 3])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(tmp_path, monkeypatch, bad, fails, value):
    """The error names its iteration, even if the next one fails, and comes before a checkpoint."""
    forward = toy.ToyArchitecture.forward
    iteration = itertools.count()

    def broken(self, batch):
        i = next(iteration)
        if fails and i > bad:
            raise ValueError("cost matrix is not finite")
        losses = forward(self, batch)
        return {name: loss * value if i == bad else loss for name, loss in losses.items()}

    monkeypatch.setattr(toy.ToyArchitecture, "forward", broken)
    options = ("SOLVER.CHECKPOINT_PERIOD", "4", "SOLVER.MAX_ITER", "8")
    with pytest.raises(FloatingPointError, match=f"NaN at iteration={bad}!\nloss_dict = .*mean"):
        run_quietly(tmp_path, *options, delay=True)
    assert not list(tmp_path.glob("model_*.pth"))
    # Iteration 3 is read by the checkpoint, and so written at once.
    assert next(iteration) == 4


@pytest.mark.parametrize("delay", [False, True])
def test_training_that_diverges_in_the_end_is_not_evaluated(tmp_path, monkeypatch, delay):
    forward = toy.ToyArchitecture.forward
    iteration = itertools.count()
    evaluated = []

    def broken(self, batch):
        if not self.training:
            evaluated.append(batch)
            return []
        factor = float("nan") if next(iteration) == 3 else 1.0
        return {name: loss * factor for name, loss in forward(self, batch).items()}

    monkeypatch.setattr(toy.ToyArchitecture, "forward", broken)
    options = ("DATASETS.TEST", "('toy_train',)", "SOLVER.MAX_ITER", "5")
    with pytest.raises(FloatingPointError, match="NaN at iteration=3"):
        run_quietly(tmp_path, *options, delay=delay)
    assert not evaluated


def test_an_error_after_finite_losses_stays(tmp_path, monkeypatch):
    forward = toy.ToyArchitecture.forward
    for delay in (False, True):
        iteration = itertools.count()

        def broken(self, batch, iteration=iteration):
            if next(iteration) == 3:
                raise RuntimeError("out of memory")
            return forward(self, batch)

        monkeypatch.setattr(toy.ToyArchitecture, "forward", broken)
        options = ("SOLVER.MAX_ITER", "8", "SEED", "1")
        with pytest.raises(RuntimeError, match="^out of memory$"):
            run_quietly(tmp_path / str(delay), *options, delay=delay)
    assert "total_loss" in metrics(tmp_path / "True")[2]
    assert metrics(tmp_path / "True") == metrics(tmp_path / "False")


class ReadsLosses(HookBase):
    def __init__(self):
        self.seen = []

    def after_step(self):
        value, iteration = self.trainer.storage.latest()["total_loss"]
        self.seen.append(iteration)


def test_losses_are_written_at_once_for_other_hooks(tmp_path, caplog):
    hook = ReadsLosses()
    run_quietly(tmp_path, "SOLVER.MAX_ITER", "5", delay=True, hooks=[hook])
    assert hook.seen == list(range(5))
    assert "Losses are written at once, because they may be read by ['ReadsLosses']" in caplog.text


def test_losses_are_written_at_once_for_overridden_steps(tmp_path, monkeypatch, caplog):
    late = count_late(monkeypatch)

    class Own(QuietTrainer):
        def after_step(self):
            super().after_step()
            assert self.storage.latest()["total_loss"][1] == self.iter

    trainer = Own(toy.toy_config(tmp_path, "SOLVER.MAX_ITER", "5"), delay_metrics=True)
    trainer.train()
    assert late == [] and "Own.after_step" in caplog.text


@pytest.mark.parametrize(
    "losses",
    [
        {"loss_a": torch.ones(1), "loss_b": torch.ones(())},
        {"loss_a": torch.ones((), dtype=torch.int64)},
    ],
)
def test_losses_that_cannot_be_copied_together(losses):
    step = Step(nn.Linear(1, 1), [], None)
    step.delay_metrics(lambda iteration: False)
    written = []
    step._write_now = lambda losses, *rest: written.append(losses)
    step._write_metrics(losses, 0.0)
    assert written == [losses]


class Scaled(Step):
    """Writes a scale on the device, as steps in float16 do."""

    scale = 1.0

    def _device_metrics(self):
        self.scale *= 2
        return {"[metric]grad_scaler": torch.tensor(self.scale)}


@pytest.mark.parametrize("delay", [False, True])
def test_metrics_on_the_device(delay):
    step = Scaled(nn.Linear(1, 1), [], None)
    if delay:
        step.delay_metrics(lambda iteration: False)
    with EventStorage() as storage:
        for step.iter in range(3):
            storage.iter = step.iter
            step._write_metrics({"loss_a": torch.tensor(1.5)}, 0.0)
        assert len(storage.history("total_loss").values()) == 3 - delay
        step.flush()
    scales = [(2.0, 0), (4.0, 1), (8.0, 2)]
    assert storage.history("[metric]grad_scaler").values() == scales
    assert storage.history("total_loss").values() == [(1.5, i) for i in range(3)]


def test_two_processes_write_the_same_rows_late(tmp_path):
    options = ("SEED", "3", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "23")
    for name in ("delayed", "at-once"):
        both = start_program(f"--{name}", tmp_path / name, *options, ranks=2)
        assert both.returncode == 0, both.stderr
    rows = metrics(tmp_path / "at-once")
    assert list(rows) == [19, 22]
    assert metrics(tmp_path / "delayed") == rows


# ---- precision, memory, cuDNN ----


NO_GPU = pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled:UserWarning")


@NO_GPU
def test_precision_of_a_step(tmp_path):
    cfg = toy.toy_config(tmp_path, "MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", "True")
    model = nn.Linear(1, 1)
    for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16)):
        cfg.SOLVER.AMP.DTYPE = name
        step = Trainer._build_step(cfg, model, [], torch.optim.SGD(model.parameters()))
        assert isinstance(step, AMPTrainer) and step.precision == dtype
    assert not step.grad_scaler.is_enabled()
    del cfg.SOLVER.AMP["DTYPE"]  # as in configs of other projects
    assert Trainer._build_step(cfg, model, [], None).precision == torch.float16
    cfg.SOLVER.AMP.ENABLED = False
    assert type(Trainer._build_step(cfg, model, [], None)) is Step


@NO_GPU
@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning")
@pytest.mark.parametrize("overflows", [False, True])
def test_scaled_gradients_of_micro_batches(tmp_path, monkeypatch, overflows):
    """Unscaled once; one that overflows skips the update of the whole batch."""
    torch.manual_seed(0)
    cfg = toy.toy_config(tmp_path, "MODEL.MASK_FORMER.DROPOUT", "0.0")
    models = [toy.ToyArchitecture(cfg) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    before = {name: value.clone() for name, value in models[0].state_dict().items()}
    images = [{"image": torch.rand(4)} for _ in range(4)]
    if overflows:
        images[1] = {"image": torch.full((4,), 1e30)}
    monkeypatch.setattr(Step, "_write_metrics", lambda *args: None)
    monkeypatch.setattr(MixedPrecisionStep, "_write_metrics", lambda *args: None)
    steps = [
        Step(models[0], iter([images]), torch.optim.SGD(models[0].parameters(), lr=0.1)),
        MixedPrecisionStep(
            models[1],
            iter([images]),
            torch.optim.SGD(models[1].parameters(), lr=0.1),
            dtype=torch.float16,
        ),
    ]
    scaler = steps[1].grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in steps:
        step.num_accumulation_steps = 2
        step.run_step()
    expected = before if overflows else models[0].state_dict()
    for name, value in models[1].state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert scaler.get_scale() == (512.0 if overflows else 1024.0)


@NO_GPU
def test_resume_in_another_precision(tmp_path):
    """A checkpoint has the scale of float16, none of bfloat16, and no entry of float32."""
    model = nn.Linear(1, 1)

    def build(dtype, init_scale=1.0):
        optimizer = torch.optim.SGD(model.parameters())
        step = MixedPrecisionStep(model, [], optimizer, dtype=dtype)
        enabled = dtype == torch.float16
        step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, enabled=enabled)
        return step

    half, brain = build(torch.float16, 512.0), build(torch.bfloat16)
    single = Step(model, [], torch.optim.SGD(model.parameters()))
    for source, scale in ((half, 512.0), (brain, 8.0), (single, 8.0)):
        resumed = build(torch.float16, 8.0)
        resumed.load_state_dict(source.state_dict())
        assert resumed.grad_scaler.get_scale() == scale
        build(torch.bfloat16).load_state_dict(source.state_dict())
        single.load_state_dict(source.state_dict())


def test_bfloat16_on_a_gpu_without_it(tmp_path, monkeypatch):
    cfg = toy.toy_config(tmp_path, "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16")
    check_precision(cfg)  # ignored on a CPU
    cfg.MODEL.DEVICE = "cuda"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ValueError, match="DTYPE is 'bfloat16', which Old does not compute in"):
        check_precision(cfg)
    cfg.SOLVER.AMP.DTYPE = "float16"
    check_precision(cfg)


@pytest.mark.parametrize(
    ("peaks", "others", "turns_off"),
    [
        ([10, 30, 20], True, True),
        ([10, 90, 20], True, False),  # the largest counts, also if another hook has reset it
        ([10, 30, 20], False, False),  # another rank has no room
    ],
)
def test_checkpointing_is_turned_off_if_memory_is_ample(
    tmp_path, monkeypatch, caplog, peaks, others, turns_off
):
    monkeypatch.setattr(AmpleMemory, "_NUM_ITERATIONS", 3)
    memory = iter(peaks)
    monkeypatch.setattr(AmpleMemory, "_memory", lambda self: (next(memory), 100))
    monkeypatch.setattr(
        "mask2former.hooks.comm",
        SimpleNamespace(**vars(comm) | {"all_gather": lambda x: [x, others]}),
    )
    policies = []
    monkeypatch.setattr(
        "mask2former.hooks.set_checkpointing", lambda model, policy: policies.append(policy)
    )
    trainer = QuietTrainer(toy.toy_config(tmp_path, "SOLVER.MAX_ITER", "5"))
    trainer.register_hooks([AmpleMemory()])
    trainer.train()
    assert policies == ["none"] * turns_off
    assert ("Activation checkpointing is off" in caplog.text) == turns_off


def test_memory_of_the_model_s_gpu(monkeypatch):
    """MODEL.DEVICE may be "cuda:1" while the current device is the first."""
    sizes = {"mem_get_info": (5, 9), "memory_reserved": 2, "max_memory_allocated": 1}
    devices = []
    for name, size in sizes.items():
        function = lambda device=None, size=size: devices.append(device) or size  # noqa: E731
        monkeypatch.setattr(torch.cuda, name, function)
    model = nn.Linear(1, 1, device="meta")
    hook = AmpleMemory()
    hook.trainer = SimpleNamespace(model=model)
    assert hook._memory() == (1, 7)
    assert devices == [torch.device("meta")] * 3


@NO_GPU
def test_scale_is_written_from_the_model_s_device():
    step = MixedPrecisionStep(nn.Linear(1, 1), [], None, dtype=torch.float16)
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert step._device_metrics()["[metric]grad_scaler"].item() == 8.0


def test_checkpointing_is_chosen_on_a_gpu_only(tmp_path):
    trainer = toy.ToyTrainer(toy.toy_config(tmp_path))
    for device, policy, chooses in (
        ("cpu", "auto", False),
        ("cuda", "auto", True),
        ("cuda", "selective", False),
    ):
        trainer.cfg = toy.toy_config(
            tmp_path, "MODEL.DEVICE", device, "MODEL.CHECKPOINTING", policy
        )
        hooks = trainer.build_hooks()
        assert any(isinstance(hook, AmpleMemory) for hook in hooks) == chooses


def test_models_that_upload_their_inputs():
    class Other(MaskFormer):
        pass

    class Own(MaskFormer):
        def forward(self, batched_inputs):
            return {}

    def make(kind):
        model = kind.__new__(kind)
        nn.Module.__init__(model)
        return model

    models = [make(kind) for kind in (MaskFormer, Other, Own, toy.ToyArchitecture)]
    assert [needs_uploads(model) for model in models] == [False, False, True, True]
    models[0].forward = lambda batched_inputs: {}
    models[1].register_forward_pre_hook(lambda module, args: None)
    assert needs_uploads(models[0]) and needs_uploads(models[1])


CONFIGS = Path(__file__).parents[1] / "configs"
FIXED_SIZE = {
    "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml": True,
    "coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml": True,
    "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml": True,
    "ade20k/panoptic-segmentation/maskformer2_R50_bs16_160k.yaml": True,
    "cityscapes/instance-segmentation/maskformer2_R50_bs16_90k.yaml": True,
    "mapillary-vistas/panoptic-segmentation/maskformer_R50_bs16_300k.yaml": True,
}


def with_mapper(mapper):
    return SimpleNamespace(dataset=SeededSamples([], mapper))


@pytest.mark.parametrize("path", FIXED_SIZE)
def test_recipes_have_images_of_one_size(path):
    cfg = load_config(str(CONFIGS / path))
    loader = with_mapper(build_mapper(cfg))
    assert has_fixed_size(cfg, loader) and chooses_cudnn_benchmark(cfg, loader)


def test_images_of_many_sizes(monkeypatch):
    cfg = load_config(
        str(CONFIGS / "cityscapes/instance-segmentation/maskformer2_R50_bs16_90k.yaml")
    )
    loader = with_mapper(build_mapper(cfg))
    assert has_fixed_size(cfg, loader)
    for key, value in (
        ("INPUT.CROP.ENABLED", False),
        ("INPUT.CROP.TYPE", "relative"),
        ("INPUT.CROP.SIZE", [520, 1024]),
        ("INPUT.MIN_SIZE_TRAIN", (400, 800)),
        ("INPUT.MAX_SIZE_TRAIN", 1000),
        ("DATASETS.TRAIN", ("cityscapes_fine_instance_seg_train", "another")),
    ):
        other = cfg.clone()
        other.merge_from_list([key, value])
        assert not has_fixed_size(other, loader), key

    class Own(COCOPanopticNewBaselineDatasetMapper):
        pass

    coco = load_config(str(CONFIGS / "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"))
    assert not has_fixed_size(coco, with_mapper(Own(coco)))
    mapper = build_mapper(coco)
    mapper.tfm_gens = mapper.tfm_gens[:-1]
    assert not has_fixed_size(coco, with_mapper(mapper))
    assert not has_fixed_size(coco, [])


def test_cudnn_benchmark_of_the_user_stays(tmp_path):
    path = str(CONFIGS / "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml")
    cfg = load_config(path)
    loader = with_mapper(build_mapper(cfg))
    assert chooses_cudnn_benchmark(cfg.clone(), loader)
    assert not chooses_cudnn_benchmark(load_config(path, ["CUDNN_BENCHMARK", "False"]), loader)
    (tmp_path / "config.yaml").write_text(f"_BASE_: {path}\nCUDNN_BENCHMARK: False\n")
    (tmp_path / "derived.yaml").write_text("_BASE_: config.yaml\n")
    derived = load_config(str(tmp_path / "derived.yaml"))
    assert not chooses_cudnn_benchmark(derived, loader)
    # Of a config made in another way nobody knows.
    assert not chooses_cudnn_benchmark(toy.toy_config(tmp_path), loader)
    torch.use_deterministic_algorithms(True)
    try:
        assert not chooses_cudnn_benchmark(cfg, loader)
    finally:
        torch.use_deterministic_algorithms(False)


def test_cudnn_times_algorithms_in_steps_only(tmp_path, monkeypatch):
    """Not in evaluation, whose images have many sizes."""
    seen = []
    forward = toy.ToyArchitecture.forward

    def record(self, batch):
        seen.append((self.training, torch.backends.cudnn.benchmark))
        return forward(self, batch)

    monkeypatch.setattr(toy.ToyArchitecture, "forward", record)
    options = ("DATASETS.TEST", "('toy_train',)", "TEST.EVAL_PERIOD", "1", "SOLVER.MAX_ITER", "2")
    trainer = QuietTrainer(toy.toy_config(tmp_path, *options))
    assert not trainer._trainer.cudnn_benchmark  # on a CPU
    trainer._trainer.cudnn_benchmark = True
    trainer.train()
    assert set(seen) == {(True, True), (False, False)}
    assert not torch.backends.cudnn.benchmark
