"""tools/endurance: six real SIGKILLs of a small training, and the judgement of both subcommands."""

import contextlib
import copy
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from load_script import load_script

endurance = load_script("tools/endurance")
kill_test, soak = endurance.kill_test, endurance.soak
training_runs = sys.modules["training_runs"]
compare_states = kill_test.differences.__globals__["compare_states"]

# Checkpoints, evaluations and rows of metrics fall on the same and on different iterations.
KILL_OPTIONS = (
    "SOLVER.MAX_ITER 22 SOLVER.CHECKPOINT_PERIOD 4 TEST.EVAL_PERIOD 10 "
    "MODEL.MASK_FORMER.TEST.INSTANCE_ON False MODEL.MASK_FORMER.TEST.PANOPTIC_ON False "
    "LOGGING.PICTURES 0 LOGGING.HARD_EXAMPLES 0"
).split()
NUM_KILLS = 6


@pytest.fixture(scope="module", autouse=True)
def forks():
    """Programs are forked, which saves the time of their imports."""
    programs = SimpleNamespace(**vars(subprocess) | {"run": forked.run, "Popen": forked.Popen})
    with pytest.MonkeyPatch.context() as patch:
        for module in (training_runs, sys.modules["fork_server"]):
            patch.setattr(module, "subprocess", programs)
        yield


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Output folder of the kill test."""
    output = tmp_path_factory.mktemp("kill")
    argv = ["kill", "--kills", str(NUM_KILLS), "--seed", "125", "--preload"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        status = endurance.main([*argv, "--output", str(output), *KILL_OPTIONS])
    return status, output


def test_kills_change_no_bit(killed):
    status, output = killed
    assert status == 0
    log = (output / "killed.txt").read_text()
    # The trainings were real, and several did some of the iterations.
    assert len(set(re.findall(r"Starting training from iteration (\d+)", log))) >= 3
    assert (output / "killed/model_final.pth").is_file()


@pytest.fixture(scope="module")
def soaked(killed, tmp_path_factory):
    """Exit status, output folder and printed output of a soak test with another seed."""
    output = tmp_path_factory.mktemp("soak")
    config = killed[1] / "undisturbed/config.yaml"
    argv = ["soak", "--iterations", "22", "--every", "0.01", "--config-file", str(config)]
    opts = ["SEED", "77", "DATASETS.TEST", "()"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DETECTRON2_DATASETS", str(killed[1] / "datasets"))
        # A fast machine takes few samples of so short a run.
        patch.setattr(soak, "MIN_SAMPLES", 3)
        status = endurance.main([*argv, "--output", str(output), *opts])
    return status, output, printed.getvalue()


def test_another_seed_is_another_training(killed, soaked):
    lines = kill_test.differences(killed[1] / "undisturbed", soaked[1] / "run")
    assert any(line.startswith("model_0000019.pth: model.") for line in lines), lines
    assert any(line.startswith("metrics.json: not the same: ") for line in lines)


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


@pytest.fixture
def copied(killed, tmp_path):
    """An undisturbed run, with its last checkpoint, and a copy of it."""
    folders = tmp_path / "whole", tmp_path / "copied"
    for folder in folders:
        ignored = shutil.ignore_patterns("model_0*.pth", "log.txt")
        shutil.copytree(killed[1] / "undisturbed", folder, ignore=ignored)
    return folders


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: edit_checkpoint(folder, other_weight), "model_final.pth: model."),
        (lambda folder: edit_checkpoint(folder, other_moment), "exp_avg differs by up to 1"),
        (
            lambda folder: edit_checkpoint(folder, lambda state: state.update(iteration=3)),
            "model_final.pth: iteration is 21 and 3",
        ),
        (
            lambda folder: shutil.copy(folder / "model_final.pth", folder / "model_0000003.pth"),
            "files in one run only: model_0000003.pth",
        ),
        (lambda folder: (folder / "last_checkpoint").write_text("x"), "last_checkpoint: "),
        (lambda folder: (folder / "evaluation.json").write_text("{}"), "evaluation.json: "),
        (lambda folder: (folder / "a.tmp").touch(), "files in one run only: a.tmp"),
        (lambda folder: edit_rows(folder, lambda rows: rows.pop(0)), "metrics.json: not written"),
        (lambda folder: edit_rows(folder, change_loss), "not the same: total_loss of iteration"),
        (
            lambda folder: edit_rows(folder, repeat_with_another_loss),
            "metrics.json: total_loss of iteration ",
        ),
    ],
)
def test_any_difference_is_found(copied, change, message):
    change(copied[1])
    (line,) = kill_test.differences(*copied)
    assert message in line


def test_what_may_differ(copied):
    """Times, and rows that are there twice or cut off."""
    whole, other = copied
    with (other / "metrics.json").open("a") as file:
        first = (whole / "metrics.json").read_text().splitlines()[0]
        file.write(json.dumps(json.loads(first) | {"time": 9.0}) + "\n" + first[:20])
    assert kill_test.differences(whole, other) == []


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


def test_failing_run_is_reported(tmp_path, capsys, monkeypatch):
    """The kill test ends with the last lines of the run, not in an endless loop."""
    program = tmp_path / "program.py"
    program.write_text("raise SystemExit('no weights')")
    monkeypatch.setattr(training_runs, "PROGRAM", program)
    argv = ["kill", "--kills", "1", "--config-file", training_runs.CONFIG]
    assert endurance.main([*map(str, argv), "--output", str(tmp_path / "output")]) == 1
    output = capsys.readouterr().out
    assert "FAILED: a run ended with status 1" in output and "no weights" in output


class Script:
    """Stands for a `Training`: each run is a small script, the last one again and again."""

    def __init__(self, folder: Path, *scripts: str) -> None:
        self.folder, self._scripts = folder, list(scripts)

    @contextlib.contextmanager
    def start(self, name, *, resume):
        log = self.folder / "log.txt"
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", script], stdout=file, start_new_session=True
            )
        run = training_runs.Run(process, self.folder, log, 0)
        try:
            yield run
        finally:
            run.kill()


def test_only_living_runs_are_killed(tmp_path):
    """A run that ends too early is no kill, and another one takes its place."""
    runs = Script(tmp_path, "", "import time; time.sleep(60)", "")
    kills = [kill_test.Kill("save", 3, 0.5)]
    first, second = kill_test.run_killed(runs, "a", kills, {"start": 1.0}, 60)
    assert first["kill"] == "" and first["what happened"] == "ended before"
    assert second["kill"] == 1 and second["moment"] == kill_test.MOMENTS["start"]


def test_runs_that_are_never_killed(tmp_path):
    kills = [kill_test.Kill("save", 0, 1.0)] * 2
    with pytest.raises(Exception, match="3 runs ended before they were killed"):
        kill_test.run_killed(Script(tmp_path, ""), "a", kills, {"start": 1e3}, 60)


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


LEAK = """
import os, sys
held = []
for line in sys.stdin:
    if sys.argv[1] == "leak":
        held += [bytearray(b"x" * 2**20), os.open(os.devnull, os.O_RDONLY)]
    print(flush=True)
"""


@pytest.mark.parametrize("leaks", [False, True])
def test_leak_of_a_process(leaks):
    """Memory that is private, and descriptors."""
    argv = [sys.executable, "-c", LEAK, "leak" if leaks else "hold"]
    samples = []
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for _ in range(20):
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
            samples.append(soak.measure(process.pid))
        process.stdin.close()
    trends = {
        name: soak.judge(name, range(20), [sample[name] for sample in samples])
        for name in samples[0]
    }
    grows = {name for name, trend in trends.items() if trend.grows}
    memory = samples[0].keys() & set(soak.MEMORY)
    assert len(memory) == 1
    assert grows == (memory | {"descriptors"} if leaks else set())
    assert trends["processes"].median == 1


def test_soak(soaked):
    status, output, printed = soaked
    # So short a run is still warming up, so that either verdict may come.
    assert status == int("GROWS" in printed)
    assert all(f"\n| {name}" in printed for name in ("private", "descriptors", "threads"))
    with (output / "soak.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 3
    # The training and its loader.
    assert max(float(row["processes"]) for row in rows) >= 2
    assert all(float(row["private"]) > 10 for row in rows)
    assert (output / "soak.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("argv", [["kill", "--kills", "0"], ["soak", "--every", "0"]])
def test_bad_options(argv):
    with pytest.raises(SystemExit):
        endurance.main(argv)


def test_used_output_is_refused(tmp_path, capsys):
    (tmp_path / "precious.txt").touch()
    assert endurance.main(["soak", "--output", str(tmp_path)]) == 2
    assert "is not empty: choose another --output" in capsys.readouterr().err
