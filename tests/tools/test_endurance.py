"""tools/endurance: ten real SIGKILLs of a small training, and the judgement of both subcommands."""

import copy
import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from load_script import load_script

endurance = load_script("tools/endurance")
kill_test, soak = endurance.kill_test, endurance.soak
compare_states = kill_test.differences.__globals__["compare_states"]

# Checkpoints, evaluations and rows of metrics fall on the same and on different iterations.
KILL_OPTIONS = (
    "SOLVER.MAX_ITER 28 SOLVER.CHECKPOINT_PERIOD 4 TEST.EVAL_PERIOD 10 "
    "MODEL.MASK_FORMER.TEST.INSTANCE_ON False"
).split()
NUM_KILLS = 10


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Output folder of the kill test."""
    output = tmp_path_factory.mktemp("kill")
    argv = ["kill", "--kills", str(NUM_KILLS), "--preload", "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        status = endurance.main([*argv, *KILL_OPTIONS])
    return status, output


def test_kills_change_no_bit(killed):
    status, output = killed
    assert status == 0
    log = (output / "killed.txt").read_text()
    # The trainings were real: they started again and again, and saved.
    assert log.count("Starting training from iteration") >= NUM_KILLS // 2
    assert "Starting training from iteration 0" in log
    assert (output / "killed/model_final.pth").is_file()


def edit_checkpoint(folder: Path, change) -> None:
    path = folder / "model_final.pth"
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def other_weight(state):
    weight = next(iter(state["model"].values()))
    weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))


def other_moment(state):
    state["trainer"]["_trainer"]["optimizer"]["state"][0]["exp_avg"].view(-1)[0] += 1


def edit_rows(folder: Path, change) -> None:
    path = folder / "metrics.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_loss(rows):
    rows[-2]["total_loss"] += 1e-9


def repeat_with_another_loss(rows):
    rows.append(rows[0] | {"total_loss": 1.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: edit_checkpoint(folder, other_weight), "model_final.pth: model."),
        (lambda folder: edit_checkpoint(folder, other_moment), "exp_avg differs by up to 1"),
        (
            lambda folder: edit_checkpoint(folder, lambda state: state.update(iteration=3)),
            "model_final.pth: iteration is 27 and 3",
        ),
        (lambda folder: (folder / "model_0000003.pth").unlink(), "checkpoints in one run only"),
        (lambda folder: (folder / "last_checkpoint").write_text("x"), "last_checkpoint: "),
        (lambda folder: (folder / "evaluation.json").unlink(), "evaluation.json: "),
        (lambda folder: (folder / "a.tmp").touch(), "a.tmp is left"),
        (lambda folder: edit_rows(folder, lambda rows: rows.pop(0)), "metrics.json: not written"),
        (lambda folder: edit_rows(folder, change_loss), "not the same: total_loss of iteration"),
        (
            lambda folder: edit_rows(folder, repeat_with_another_loss),
            "metrics.json: total_loss of iteration ",
        ),
    ],
)
def test_any_difference_is_found(killed, tmp_path, change, message):
    whole = killed[1] / "undisturbed"
    copied = tmp_path / "copied"
    shutil.copytree(whole, copied)
    assert kill_test.differences(whole, copied) == []
    change(copied)
    (line,) = kill_test.differences(whole, copied)
    assert message in line


def test_what_may_differ(killed, tmp_path):
    """Times, and rows that are there twice or cut off."""
    whole = killed[1] / "undisturbed"
    shutil.copytree(whole, tmp_path / "copied")
    with (tmp_path / "copied/metrics.json").open("a") as file:
        first = (whole / "metrics.json").read_text().splitlines()[0]
        file.write(json.dumps(json.loads(first) | {"time": 9.0}) + "\n" + first[:20])
    assert kill_test.differences(whole, tmp_path / "copied") == []


def test_states_are_compared_to_the_bit():
    state = {"a": [torch.zeros(2), float("nan")], "time": 1.0}
    assert list(compare_states(state, copy.deepcopy(state) | {"time": 2.0})) == []
    for other in ([-torch.zeros(2)], [torch.zeros(2, 1)], [torch.zeros(2).double()], (0,)):
        assert list(compare_states({"a": [torch.zeros(2)]}, {"a": other}))


def test_plan():
    settings = {"count": 40, "max_iter": 20, "period": 4, "evaluates": True}
    kills = kill_test.plan(3, eval_period=0, **settings)
    assert kills == kill_test.plan(3, eval_period=0, **settings)
    assert kills != kill_test.plan(4, eval_period=0, **settings)
    assert {kill.moment for kill in kills} == set(kill_test.MOMENTS)
    assert [kill.iteration for kill in kills] == sorted(kill.iteration for kill in kills)
    assert all(kill.iteration == 19 for kill in kills if kill.moment == "evaluate")
    assert all(kill.iteration < 16 for kill in kills if kill.moment != "evaluate")
    during = kill_test.plan(3, eval_period=5, **settings)
    assert any(kill.iteration < 15 for kill in during if kill.moment == "evaluate")
    without = kill_test.plan(3, eval_period=0, **(settings | {"evaluates": False}))
    assert "evaluate" not in {kill.moment for kill in without}


def test_failing_run_is_reported(tmp_path, capsys):
    """The kill test ends with the last lines of the run, not in an endless loop."""
    argv = ["kill", "--kills", "1", "--preload", "--output", str(tmp_path)]
    assert endurance.main([*argv, "MODEL.WEIGHTS", "missing.pth"]) == 1
    output = capsys.readouterr().out
    assert "FAILED: a run ended with status 1" in output and "missing.pth" in output


SECONDS = np.arange(200.0)
NOISE = np.random.default_rng(0).normal(size=200)


@pytest.mark.parametrize(
    ("name", "values", "grows"),
    [
        ("rss", 1000 + 5 * NOISE, False),
        ("rss", np.minimum(10 * SECONDS, 1000), False),  # only during warm-up
        ("rss", 1000 - SECONDS, False),
        ("rss", 1000 + 200 * (SECONDS % 50 == 0), False),  # peaks
        ("rss", 1000 + 0.15 * SECONDS + NOISE, False),  # 1.5 % of the median
        ("rss", 1000 + 0.3 * SECONDS + 5 * NOISE, True),
        ("rss", 1000 + 50 * (SECONDS // 25), True),  # in steps
        ("descriptors", np.full(200, 30), False),
        ("descriptors", 30 + 5 * (SECONDS % 40 < 4), False),
        ("descriptors", 30 + SECONDS // 20, True),
    ],
)
def test_judgement(name, values, grows):
    assert soak.judge(name, SECONDS, values).grows == grows


def test_growth_by_hand():
    trend = soak.judge("threads", range(11), [0, 0, 0, 0, 0, 5, 7, 9, 11, 13, 15])
    assert trend == (10, 10, soak.COUNT_TOLERANCE)


@pytest.mark.parametrize("values", [[1.0] * 9, [float("nan")] * 10])
def test_too_little_to_judge(values):
    with pytest.raises(ValueError, match=r"rss has 9 samples|rss has samples that are not finite"):
        soak.judge("rss", range(len(values)), values)


def test_soak(tmp_path):
    argv = ["soak", "--iterations", "20", "--every", "0.02", "--preload"]
    # So short a run is still warming up, so that either verdict may come.
    assert endurance.main([*argv, "--output", str(tmp_path), "DATASETS.TEST", "()"]) in (0, 1)
    with (tmp_path / "soak.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= soak.MIN_SAMPLES
    # The training and its loader.
    assert max(float(row["processes"]) for row in rows) >= 2
    assert all(float(row["rss"]) >= float(row["pss"]) > 10 for row in rows)
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("argv", [["kill", "--kills", "0"], ["soak", "--every", "0"]])
def test_bad_options(argv):
    with pytest.raises(SystemExit):
        endurance.main(argv)


def test_used_output_is_refused(tmp_path, capsys):
    (tmp_path / "precious.txt").touch()
    assert endurance.main(["soak", "--output", str(tmp_path)]) == 2
    assert "is not empty: choose another --output" in capsys.readouterr().err
