"""One line, no traceback: how a program of one process ends when it is interrupted."""

import os
import signal
import sys

import pytest
import toy_training as toy
from detectron2.engine import default_argument_parser
from detectron2.engine.train_loop import HookBase
from load_script import ROOT

from mask2former.launch import launch
from mask2former.utils import interrupts
from mask2former.utils.interrupts import (
    Interrupted,
    add_resume,
    interrupt_message,
    interruptible,
    run_program,
    torchrun_command,
)


def send(signum):
    os.kill(os.getpid(), signum)
    # A signal is received between two instructions.
    signal.pause()


@pytest.fixture(autouse=True)
def command(monkeypatch):
    """Of a test run it may be anything; and in the background SIGINT may be ignored."""
    typed = ["python", "tools/my program.py", "--config-file", "a.yaml"]
    monkeypatch.setattr(sys, "orig_argv", typed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield typed
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("command", "opts", "expected"),
    [
        (["python", "a.py"], [], ["python", "a.py", "--resume"]),
        (["python", "a.py", "K", "V"], ["K", "V"], ["python", "a.py", "--resume", "K", "V"]),
        (["a.py", "--", "K", "V"], ["K", "V"], ["a.py", "--resume", "--", "K", "V"]),
        (["a.py", "--resume", "K", "V"], ["K", "V"], ["a.py", "--resume", "K", "V"]),
        # Not what the program was started with.
        (["pytest", "-q"], ["K", "V"], ["pytest", "-q", "--resume"]),
    ],
)
def test_add_resume(command, opts, expected):
    assert add_resume(command, opts) == expected


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_program(capsys, signum, status):
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as ended:
        run_program(lambda: send(signum))
    assert ended.value.code == status
    assert capsys.readouterr().err == (
        f"Interrupted by {signum.name}. To run it again: "
        "python 'tools/my program.py' --config-file a.yaml\n"
    )
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before


def test_program_that_ends_by_itself():
    for result in (None, 3):
        with pytest.raises(SystemExit) as ended:
            run_program(lambda result=result: result)
        assert ended.value.code == result


def test_errors_after_an_interrupt_are_not_reported(capsys):
    """Such as those of connections to ranks that are interrupted as well."""
    with pytest.raises(SystemExit) as ended, interruptible(lambda signum: "line"):
        try:
            send(signal.SIGINT)
        except Interrupted:
            raise RuntimeError("connection closed") from None
    assert (ended.value.code, capsys.readouterr().err) == (130, "line\n")


def test_only_the_first_signal_counts(capsys):
    with pytest.raises(SystemExit) as ended, interruptible(lambda signum: "line"):
        try:
            send(signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
    assert (ended.value.code, capsys.readouterr().err) == (143, "line\n")


def test_ignored_signals_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible(lambda signum: "line"):
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_main_thread_that_does_not_end(capfd):
    """The guard ends the process; here a forked one."""
    child = os.fork()
    if child == 0:
        with interruptible(lambda signum: "line", grace=0.1):
            while True:
                try:
                    send(signal.SIGINT)
                except Interrupted:
                    signal.pause()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert capfd.readouterr().err == "line\n"


def test_forked_processes_ignore_ctrl_c():
    with interruptible(lambda signum: None):
        child = os.fork()
        if child == 0:
            kept = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os._exit(0 if kept and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else 1)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


class Interrupt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_step(self):
        if self.trainer.iter == self.iteration:
            send(signal.SIGINT)


class EvaluatingTrainer(toy.ToyTrainer):
    evaluated = 0

    @classmethod
    def test(cls, cfg, model):
        cls.evaluated += 1
        return {}


def interrupted_line(capsys, tmp_path, iteration, *, resume=False):
    """What a toy training prints that is interrupted in an iteration."""
    trainer = EvaluatingTrainer(toy.toy_config(tmp_path, "SOLVER.MAX_ITER", "35"))
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks([Interrupt(iteration)])
    EvaluatingTrainer.evaluated = 0
    command = ["train.py", "--num-gpus", "1"]
    capsys.readouterr()
    with (
        pytest.raises(SystemExit),
        interruptible(lambda signum: interrupt_message(signum, command, [])),
    ):
        trainer.train()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_training(capsys, tmp_path):
    again, resume = "train.py --num-gpus 1", "train.py --num-gpus 1 --resume"
    assert interrupted_line(capsys, tmp_path, 7) == (
        "Interrupted by SIGINT in iteration 7 of 35, before the first checkpoint. To start again: "
        f"{again}"
    )
    # The last iteration: no evaluation is started.
    assert interrupted_line(capsys, tmp_path, 34) == (
        f"Interrupted by SIGINT in iteration 34 of 35; the last checkpoint is {tmp_path}/"
        f"model_0000029.pth. To resume: {resume}"
    )
    assert EvaluatingTrainer.evaluated == 0
    # Checkpoints of an earlier run are not this one's.
    assert "before the first checkpoint" in interrupted_line(capsys, tmp_path, 3)
    assert interrupted_line(capsys, tmp_path, 31, resume=True) == (
        f"Interrupted by SIGINT in iteration 31 of 35; the last checkpoint is {tmp_path}/"
        f"model_0000029.pth. To resume: {resume}"
    )


def test_launch(capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("MODEL: {DEVICE: cpu, META_ARCHITECTURE: Toy}\nVERSION: 2\n")
    args = default_argument_parser().parse_args(["--config-file", str(path)])
    with pytest.raises(SystemExit) as ended:
        launch(lambda args: send(signal.SIGTERM), args)
    assert ended.value.code == 143
    assert capsys.readouterr().err.startswith("Interrupted by SIGTERM. To run it again: python")


@pytest.mark.parametrize(
    ("variables", "signum", "line"),
    [
        ({}, signal.SIGINT, "Interrupted by SIGINT. To run it again: python"),
        ({"LOCAL_RANK": "0"}, signal.SIGINT, "Interrupted by SIGINT. To run it again: torchrun"),
        ({"LOCAL_RANK": "1"}, signal.SIGINT, ""),
        ({"LOCAL_RANK": "0"}, signal.SIGTERM, ""),
    ],
)
def test_launch_while_the_config_is_checked(capsys, monkeypatch, variables, signum, line):
    """Which takes a while if data sets are large."""
    shared = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for name, value in (shared | variables if variables else {}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("mask2former.launch.load_and_check", lambda *_, **__: send(signum))
    with pytest.raises(SystemExit) as ended:
        launch(lambda args: None, default_argument_parser().parse_args([]))
    assert ended.value.code == 128 + signum
    printed = capsys.readouterr().err
    assert printed.startswith(line) if line else not printed


def test_torchrun_command_where_another_program_started_this_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--an-option"])
    assert torchrun_command() == ["torchrun", "...", "train.py", "--an-option"]


def test_progress_ends_with_the_training(tmp_path):
    trainer = toy.ToyTrainer(toy.toy_config(tmp_path, "SOLVER.MAX_ITER", "2"))
    trainer.train()
    assert interrupts._progress == []


def test_all_programs_end_with_one_line():
    # The first needs no package of this project; the second stops processes of its own.
    others = {"setup_env.py", "gpu_check.py"}
    for program in set((ROOT / "tools").glob("*.py")) - {ROOT / "tools" / name for name in others}:
        text = program.read_text()
        if "__main__" not in text:  # a module of another program
            continue
        assert "    run_program(main)" in text or "launch" in text, program
