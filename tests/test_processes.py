"""How jobs of several processes end: interrupts, killed launchers, ranks that fail or hang."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Toy training that writes the ids of its processes in iteration 5, and goes on slowly.
PROGRAM = """
import multiprocessing, os, signal, time
import torch.multiprocessing
import toy_training as toy
from detectron2.engine import default_argument_parser
from detectron2.engine.train_loop import HookBase
from detectron2.utils import comm
from mask2former.launch import launch

class Announce(HookBase):
    def after_step(self):
        if self.trainer.iter < 5:
            return
        if os.environ.get("FAILS") and comm.get_rank() == 1:
            raise ValueError("broken on rank 1")
        ids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        name = f"{self.trainer.cfg.OUTPUT_DIR}/rank{comm.get_rank()}"
        if self.trainer.iter == 5:
            with open(f"{name}.tmp", "w") as file:
                file.write(" ".join(map(str, ids)))
            os.rename(f"{name}.tmp", name)
        time.sleep(0.02)

def main(args):
    trainer = toy.ToyTrainer(toy.toy_config(args.checked.cfg.OUTPUT_DIR, *args.opts))
    trainer.resume_or_load(resume=args.resume)
    trainer.register_hooks([Announce()])
    trainer.train()

start_processes = torch.multiprocessing.start_processes

def fork_processes(function, args, **options):
    def run(*args):
        # Processes forked from one that is interruptible ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        function(*args)
    start_processes(run, args, start_method="fork", **options)

if __name__ == "__main__":
    # Tests may run in the background, where shells ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("FORKS"):
        torch.multiprocessing.start_processes = fork_processes
    launch(main, default_argument_parser().parse_args())
"""
# torchrun whose ranks are its children as ever, but forked.
FORKING_TORCHRUN = """
import multiprocessing
import forked
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

def start(args, **options):
    return forked.Popen(args, context=multiprocessing.get_context("fork"), **options)

subprocess_handler.Popen = start
run.main()
"""
SPAWNED = ("--num-gpus", "2", "--dist-url", "auto")
TORCHRUN = ("--standalone", "--nproc-per-node", "2")
# Of everything that should happen in a second or so, on a machine that does other things too.
LIMIT = 300.0

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="spawns CPU processes, without a GPU only"
)


def wait_until(condition):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def is_running(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


class Job:
    """The program with two ranks, in a process group of its own.

    Args:
        folder: of its output.
        launcher: SPAWNED or TORCHRUN.
        options: of the config.
        forks: whether to fork the processes, which saves the time of their imports, most of it all.
        environment: added to that of this process.
    """

    def __init__(self, folder, launcher, *options, forks=True, **environment):
        self.folder = folder
        (folder / "program.py").write_text(PROGRAM)
        (folder / "config.yml").write_text(
            "MODEL: {DEVICE: cpu, META_ARCHITECTURE: ToyArchitecture}\nVERSION: 2\n"
        )
        by_torchrun = launcher is TORCHRUN
        torchrun = ("-c", FORKING_TORCHRUN) if forks else ("-m", "torch.distributed.run")
        self.command = [
            *(sys.executable, *((*torchrun, *launcher) if by_torchrun else ())),
            *(str(folder / "program.py"), "--config-file", str(folder / "config.yml")),
            *(() if by_torchrun else launcher),
        ]
        self.options = [
            *("OUTPUT_DIR", str(folder), "DATALOADER.NUM_WORKERS", "1", "SOLVER.MAX_ITER", "9999"),
            *("SOLVER.CHECKPOINT_PERIOD", "3", *options),
        ]
        path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FORKS": "1" if forks else ""}
        self.process = (forked if forks else subprocess).Popen(
            [*self.command, *self.options],
            env=os.environ | environment,
            stdout=(folder / "stdout").open("w"),
            stderr=(folder / "stderr").open("w"),
            start_new_session=True,
        )
        self.ranks = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in (self.process.pid, *(pid for rank in self.ranks for pid in rank)):
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def wait_until_it_trains(self):
        """Returns the process ids of each rank, its own first."""
        files = [self.folder / "rank0", self.folder / "rank1"]

        def trains():
            assert self.process.poll() is None, self.stderr()
            return all(file.exists() for file in files)

        wait_until(trains)
        self.ranks = [list(map(int, file.read_text().split())) for file in files]
        assert [len(pids) for pids in self.ranks] == [2, 2]

    def stderr(self):
        return (self.folder / "stderr").read_text()

    def has_ended(self):
        return not any(is_running(pid) for rank in self.ranks for pid in rank)


@pytest.mark.parametrize(
    ("signum", "whole_group", "status", "forks"),
    [(signal.SIGINT, True, 130, False), (signal.SIGTERM, False, 143, True)],
)
def test_interrupting_spawned_ranks(tmp_path, signum, whole_group, status, forks):
    """Ctrl-C reaches all processes, `kill` only the one that started them."""
    with Job(tmp_path, SPAWNED, forks=forks) as job:
        job.wait_until_it_trains()
        (os.killpg if whole_group else os.kill)(job.process.pid, signum)
        assert job.process.wait(LIMIT) == status
        assert "Traceback" not in job.stderr()
        (line,) = [text for text in job.stderr().splitlines() if "Interrupted" in text]
        assert line.startswith(f"Interrupted by {signum.name} in iteration ")
        assert " of 9999; the last checkpoint is " in line
        assert job.stderr().splitlines()[-1] == line
        assert shlex.split(line.partition("To resume: ")[2]) == [
            *job.command,
            "--resume",
            *job.options,
        ]
        wait_until(job.has_ended)


@pytest.mark.parametrize(
    ("launcher", "forks"), [(SPAWNED, True), (TORCHRUN, False)], ids=["spawned", "torchrun"]
)
def test_ranks_end_when_their_launcher_is_killed(tmp_path, launcher, forks):
    with Job(tmp_path, launcher, forks=forks) as job:
        job.wait_until_it_trains()
        job.process.kill()
        wait_until(job.has_ended)
        assert f"Process {job.process.pid}, which started process" in job.stderr()


def test_rank_that_stops_answering(tmp_path):
    """The others name it, and the setting."""
    with Job(tmp_path, TORCHRUN, "DISTRIBUTED_TIMEOUT", "0.05") as job:
        job.wait_until_it_trains()
        (first, _), (stopped, _) = job.ranks
        os.kill(stopped, signal.SIGSTOP)
        wait_until(lambda: not is_running(first))
        # torchrun does so after 30 seconds.
        os.kill(stopped, signal.SIGKILL)
        assert job.process.wait(LIMIT) == 1
        cause = job.stderr().rpartition("Root Cause")[2]
        assert (
            f"RuntimeError: Rank 0 lost its connection to other ranks: rank 1 (process {stopped}) "
            "is stopped. A rank that does not answer for 0.05 minutes (DISTRIBUTED_TIMEOUT) ends "
            "the job."
        ) in cause
        wait_until(job.has_ended)


@pytest.mark.parametrize("launcher", [SPAWNED, TORCHRUN], ids=["spawned", "torchrun"])
def test_error_on_one_rank(tmp_path, launcher):
    """It is the last that is printed, and the other rank does not hang."""
    with Job(tmp_path, launcher, FAILS="1") as job:
        assert job.process.wait(LIMIT) == 1
        assert "Interrupted" not in job.stderr()
        mark = "Root Cause" if launcher is TORCHRUN else "terminated with the following error"
        assert "ValueError: broken on rank 1" in job.stderr().rpartition(mark)[2]
