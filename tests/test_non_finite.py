"""Iterations that are not finite: captured, then the end of the run or skipped."""

import json
import sys
from pathlib import Path

import broken_training
import forked
import numpy as np
import pytest
import torch
import toy_training as toy
from broken_training import BAD_IMAGE, BrokenToy, KeepWeights, NoUpdateOfBadImage, train

from mask2former.capture import read_capture
from mask2former.ema import WeightAverage
from mask2former.modeling.matcher import NonFiniteCosts, assign, tolerate_non_finite_costs
from mask2former.non_finite import NonFiniteWatch

# Iterations with the bad image, with SEED 3.
BAD_ITERATIONS = (3, 8, 13)
SHORT = ("SOLVER.MAX_ITER", "16", "SOLVER.CHECKPOINT_PERIOD", "5")
GRADIENTS = ("MODEL.META_ARCHITECTURE", "BrokenGradients")
SKIPS = "SOLVER.NON_FINITE.MAX_SKIPPED"


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def weights(trainer):
    return trainer._trainer.model.state_dict()


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("delay", [False, True])
def test_the_first_bad_iteration_is_captured(tmp_path, monkeypatch, delay):
    """With the weights before its update, also when its loss is read one iteration late."""
    bad = BAD_ITERATIONS[0]
    with pytest.raises(FloatingPointError, match=f"iteration={bad}!") as error:
        train(tmp_path / "bad", *SHORT, delay=delay)
    path = tmp_path / "bad" / f"non_finite_{bad}_rank0.pth"
    assert f"Captured in {path}." in str(error.value)
    assert f"python tools/replay.py {path}" in str(error.value)
    capture = read_capture(path)
    assert (capture.iteration, capture.rank, capture.world_size, capture.seed) == (bad, 0, 1, 3)
    assert BAD_IMAGE in [sample["image_id"] for sample in capture.batch]
    assert all(np.isnan(list(capture.losses.values())))
    assert "ToyArchitecture" not in capture.config and "BrokenToy" in capture.config
    monkeypatch.setattr(BrokenToy, "breaks", False)
    kept = KeepWeights(bad)
    train(tmp_path / "good", *SHORT, hooks=[kept])
    for name in ("backbone.weight", "backbone.bias", "head.weight", "head.bias"):
        assert torch.equal(capture.weights[name], kept.weights[name]), name


def test_an_optimiser_that_cannot_leave_out_an_update(tmp_path):
    """The file says that its weights are those after it, and the error which are NaN."""
    options = ("SOLVER.OPTIMIZER", "SGD", *SHORT)
    with pytest.raises(FloatingPointError, match=r"The weights hold NaN.*backbone") as error:
        train(tmp_path, *options, delay=True)
    assert "iteration=3!" in str(error.value)
    capture = read_capture(tmp_path / "non_finite_3_rank0.pth")
    assert capture.weights_are.startswith("those after the update")
    assert capture.weights["head.weight"].isnan().all()


@pytest.mark.parametrize("delay", [False, True])
@pytest.mark.parametrize("clips", ["True", "False"])
def test_gradients_that_are_nan_though_losses_are_finite(tmp_path, delay, clips):
    """Their own iteration is captured, before weights are NaN."""
    options = ("SOLVER.CLIP_GRADIENTS.ENABLED", clips, "LOGGING.GRADIENT_NORM", "True")
    options += (*GRADIENTS, "SOLVER.CHECKPOINT_PERIOD", "4")
    with pytest.raises(FloatingPointError, match="Norm of gradients .* at iteration=3!"):
        train(tmp_path, *options, "SOLVER.MAX_ITER", "16", delay=delay)
    capture = read_capture(tmp_path / "non_finite_3_rank0.pth")
    assert BAD_IMAGE in [sample["image_id"] for sample in capture.batch]
    assert capture.weights_are == "those before the update"
    assert all(np.isfinite([*capture.losses.values()])) and "loss_root" in capture.losses
    assert all(value.isfinite().all() for value in capture.weights.values())
    assert not (tmp_path / "model_0000003.pth").exists()


def test_skipping_gradients_that_are_nan(tmp_path):
    trainer = train(tmp_path, *SHORT, *GRADIENTS, SKIPS, "3")
    assert rows(tmp_path)[-1]["num_skipped"] == len(BAD_ITERATIONS)
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_skipping_is_training_without_these_updates(tmp_path, monkeypatch, caplog):
    skipping = train(tmp_path / "skips", *SHORT, SKIPS, "3")
    assert rows(tmp_path / "skips")[-1]["num_skipped"] == len(BAD_ITERATIONS)
    skipped = [record.message for record in caplog.records if "Skipped" in record.message]
    assert len(skipped) == 3
    for message, iteration in zip(skipped, BAD_ITERATIONS, strict=True):
        assert f"Skipped iteration {iteration}," in message and f"image {BAD_IMAGE}" in message
    # Of the skipped iterations only the first is captured.
    assert [path.name for path in (tmp_path / "skips").glob("non_finite*")] == [
        "non_finite_3_rank0.pth"
    ]
    monkeypatch.setattr(BrokenToy, "breaks", False)
    reference = train(tmp_path / "reference", *SHORT, hooks=[NoUpdateOfBadImage()])
    assert_same(weights(skipping), weights(reference))
    states = [t._trainer.optimizer.state_dict()["state"] for t in (skipping, reference)]
    for number, state in states[1].items():
        assert_same(states[0][number], state)
    unhindered = train(tmp_path / "all", *SHORT)
    assert not torch.equal(weights(unhindered)["head.weight"], weights(reference)["head.weight"])


def test_the_average_of_weights_skips_too(tmp_path):
    trainer = train(tmp_path, *SHORT, SKIPS, "3", "SOLVER.EMA.ENABLED", "True")
    (average,) = [hook for hook in trainer._hooks if isinstance(hook, WeightAverage)]
    assert average.num_updates == 16 - len(BAD_ITERATIONS)


def test_one_more_than_may_be_skipped_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="iteration=13, and 2 iterations") as error:
        train(tmp_path, *SHORT, SKIPS, "2")
    assert f"image {BAD_IMAGE}" in str(error.value)
    names = sorted(path.name for path in tmp_path.glob("non_finite*"))
    assert names == ["non_finite_13_rank0.pth", "non_finite_3_rank0.pth"]
    for name in names:
        capture = read_capture(tmp_path / name)
        # BatchNorm's statistics too.
        assert all(value.isfinite().all() for value in capture.weights.values())


def test_the_number_of_skipped_iterations_survives_a_resume(tmp_path):
    with pytest.raises(FloatingPointError, match="2 iterations were skipped"):
        train(tmp_path, *SHORT, SKIPS, "2")
    # The last checkpoint is that of iteration 9, after two skipped ones.
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000009.pth"
    with pytest.raises(FloatingPointError, match="iteration=13, and 2 iterations"):
        train(tmp_path, *SHORT, SKIPS, "2", resume=True)
    resumed = train(tmp_path, *SHORT, SKIPS, "3", resume=True)
    whole = train(tmp_path / "whole", *SHORT, SKIPS, "3")
    assert_same(weights(resumed), weights(whole))
    assert rows(tmp_path)[-1]["num_skipped"] == 3


@pytest.mark.parametrize("value", [None, -1, 1.5, True, "3"])
def test_a_saved_number_that_is_none(value):
    with pytest.raises(ValueError, match="NonFiniteWatch.num_skipped is"):
        NonFiniteWatch(1).load_state_dict({"num_skipped": value})


@pytest.mark.parametrize(("skips", "delay"), [("0", False), ("0", True), ("5", False)])
def test_finite_trainings_are_as_before(tmp_path, monkeypatch, skips, delay):
    monkeypatch.setattr(BrokenToy, "breaks", False)
    watched = train(tmp_path / "watched", *SHORT, SKIPS, skips, delay=delay)
    monkeypatch.setattr(NonFiniteWatch, "before_train", lambda self: None)
    plain = train(tmp_path / "plain", *SHORT)
    assert_same(weights(watched), weights(plain))
    assert not list((tmp_path / "watched").glob("non_finite*"))


def test_a_full_disk_does_not_hide_the_loss(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(FloatingPointError, match="iteration=3!(.|\n)*not captured: .*No space"):
        train(tmp_path, "SOLVER.MAX_ITER", "5")


def run_two(folder, *options, late=()):
    program = Path(broken_training.__file__)
    command = [sys.executable, program, *late, folder, "SOLVER.IMS_PER_BATCH", "4", *options]
    return forked.run_ranks(2, command)


def test_two_processes_skip_together(tmp_path):
    """The rank without the bad image leaves out its update as well, or weights would part."""
    result = run_two(tmp_path, *SHORT, SKIPS, "9")
    assert result.returncode == 0, result.stderr
    number = max(row.get("num_skipped", 0) for row in rows(tmp_path))
    assert number >= 2
    assert (result.stdout + result.stderr).count("Skipped iteration") == number
    # Of one rank only: the other one's loss was finite.
    captured = [read_capture(path) for path in tmp_path.glob("non_finite*")]
    assert captured and all(capture.world_size == 2 for capture in captured)
    for capture in captured:
        assert BAD_IMAGE in [sample["image_id"] for sample in capture.batch]
        assert len(capture.batch) == 2
    model = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in model.values())


@pytest.mark.parametrize("late", [(), ("--delayed",)])
def test_two_processes_stop_together(tmp_path, late):
    """No rank updates its weights, or matching fails first, on a rank whose batch is good."""
    options = ("MODEL.META_ARCHITECTURE", "MatchingToy", "SOLVER.CHECKPOINT_PERIOD", "50")
    result = run_two(tmp_path, *SHORT, *options, late=late)
    assert result.returncode != 0
    (path,) = tmp_path.glob("non_finite*")
    assert f"python tools/replay.py {path}" in result.stderr
    assert BAD_IMAGE in [sample["image_id"] for sample in read_capture(path).batch]
    assert not list(tmp_path.glob("model_*.pth"))


def test_costs_that_are_not_finite():
    cost = torch.tensor([[1.0, float("nan")], [0.0, 2.0], [3.0, float("inf")]])
    with pytest.raises(NonFiniteCosts, match="image 4 of the batch"):
        assign(cost, 4)
    with tolerate_non_finite_costs() as images:
        queries, targets = assign(cost, 4)
        assert assign(torch.eye(2), 0)[0].tolist() == [0, 1]
    # They count as 0.
    assert (queries.tolist(), targets.tolist()) == ([0, 1], [1, 0]) and images == [4]
    with pytest.raises(NonFiniteCosts):
        assign(cost, 4)


@pytest.mark.parametrize("skips", ["0", "2"])
def test_micro_batches_name_the_image_of_the_batch(tmp_path, skips):
    options = ("MODEL.META_ARCHITECTURE", "BrokenCosts", SKIPS, skips, "SOLVER.IMS_PER_BATCH", "4")
    with pytest.raises((NonFiniteCosts, FloatingPointError)) as error:
        train(tmp_path, *options, "SOLVER.NUM_ACCUMULATION_STEPS", "4")
    path = sorted(tmp_path.glob("non_finite*"), key=lambda path: path.stat().st_mtime)[-1]
    index = [sample["image_id"] for sample in read_capture(path).batch].index(BAD_IMAGE)
    assert index > 0
    expected = f"costs are not finite of images [{index}] of" if skips == "2" else f"image {index} "
    assert expected in str(error.value)


def test_without_output_folder(tmp_path, monkeypatch):
    """Nothing is written, and the error says so."""
    watch = NonFiniteWatch()
    watch.trainer = type("T", (), {"cfg": toy.toy_config("")})()
    assert "not captured" in watch.capture(1, [{}], {}, "reason")
