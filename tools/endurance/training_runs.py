"""Trainings as processes of their own, and what their output says about their progress."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from fork_server import Forked, ForkServer
from process_tree import group_members

from mask2former.config import load_config

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tools/train_net.py"
CONFIG = ROOT / "configs/shapes/panoptic-segmentation/maskformer2_R18_quickstart.yaml"
# A model of tenths of a second per iteration, with all parts and with random numbers in its steps.
TOY_OPTIONS = {
    "MODEL.BACKBONE.NAME": "D2SwinTransformer",
    "MODEL.SWIN.EMBED_DIM": 8,
    "MODEL.SWIN.DEPTHS": [1, 1, 2, 1],
    "MODEL.SWIN.NUM_HEADS": [1, 2, 2, 4],
    "MODEL.SWIN.WINDOW_SIZE": 4,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NHEADS": 2,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.DEC_LAYERS": 2,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 10,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 128,
    "INPUT.IMAGE_SIZE": 64,
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.WARMUP_ITERS": 10,
}
_TOY_IMAGES = {"--size": 64, "--num-train": 24, "--num-val": 4}

_EVENTS = (
    ("train", re.compile(r"Starting training from iteration (\d+)")),
    ("train", re.compile(r"\biter: (\d+)  ")),
    ("save", re.compile(r"Saving checkpoint to .*_(\d+|final)\.pth")),
    ("evaluate", re.compile(r"Start inference on \d+")),
    ("end", re.compile(r"Overall training speed|Nothing is left to train")),
)


class Event(NamedTuple):
    """Something that a line of output tells.

    Attributes:
        time: when the line was read, in seconds since the epoch.
        kind: "train" (begins or goes on), "save" (begins), "evaluate" (begins) or "end" (of
            training, before the last evaluation).
        iteration: how many are done; as before if the line does not say.
    """

    time: float
    kind: str
    iteration: int


class Training:
    """A config to train from, any number of times.

    Args:
        options: `config_file` (None: the toy), `opts`, `num_gpus`, `output`, `preload`.
        toy: further overrides for the toy.

    Attributes:
        cfg: the config of all runs.

    Raises:
        ValueError: a bad config, or `output` is in use.
    """

    def __init__(self, options: argparse.Namespace, toy: dict[str, object]) -> None:
        self.folder: Path = options.output.absolute()
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{options.output} is not empty: choose another --output")
        self._environment = dict(os.environ)
        overrides = {} if torch.cuda.is_available() else {"MODEL.DEVICE": "cpu"}
        is_toy = options.config_file is None
        if is_toy:
            overrides |= TOY_OPTIONS | toy
            self._environment["DETECTRON2_DATASETS"] = str(self.folder / "datasets")
        self._config_file = str(CONFIG if is_toy else options.config_file)
        self._opts = [str(item) for pair in overrides.items() for item in pair] + options.opts
        self.cfg: CfgNode = load_config(self._config_file, self._opts)
        if self.cfg.SEED < 0:
            # Two runs would not be comparable.
            self._opts += ["SEED", "0"]
        self._num_gpus: int = options.num_gpus
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_toy:
            command = [sys.executable, str(ROOT / "datasets/prepare_shapes.py")]
            command += ["--output", str(self.folder / "datasets/shapes")]
            command += [str(item) for pair in _TOY_IMAGES.items() for item in pair]
            subprocess.run(command, check=True, capture_output=True)
        self._server = ForkServer(PROGRAM, self._environment) if options.preload else None

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    @contextmanager
    def start(self, name: str, *, resume: bool = False, opts: list[str] | None = None) -> Iterator:
        """Start a run; it ends with the block at the latest.

        Args:
            name: of its output folder; the output is appended to NAME.txt beside that.
            resume: continue from its last checkpoint, if any.
            opts: further config overrides.

        Yields:
            The `Run`.
        """
        arguments = ["--config-file", self._config_file, "--num-gpus", str(self._num_gpus)]
        arguments += ["--resume"] * resume
        arguments += [*self._opts, *(opts or []), "OUTPUT_DIR", str(self.folder / name)]
        log = self.folder / f"{name}.txt"
        log.touch()
        start = log.stat().st_size
        if self._server is not None:
            process: subprocess.Popen | Forked = self._server.start(arguments, log)
        else:
            with log.open("a") as file:
                process = subprocess.Popen(
                    [sys.executable, "-u", str(PROGRAM), *arguments],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        run = Run(process, self.folder / name, log, start)
        try:
            yield run
        finally:
            run.kill()


class Run:
    """A process of a training, with its children.

    Attributes:
        events: what its output has told so far.
        iteration: how many it has done, as far as known.
    """

    def __init__(
        self, process: subprocess.Popen | Forked, folder: Path, log: Path, position: int
    ) -> None:
        self.process = process
        self.folder = folder
        self.started = time.time()
        self.events: list[Event] = []
        self.iteration = 0
        self._log = log
        self._position = position
        self._rest = ""

    def poll(self) -> int | None:
        """Read its new output. Returns the exit status once it has ended."""
        status = self.process.poll()
        with self._log.open(errors="replace") as file:
            file.seek(self._position)
            text = self._rest + file.read()
            self._position = file.tell()
        *lines, self._rest = text.split("\n")
        for line in lines:
            self._read(line)
        return status

    def _read(self, line: str) -> None:
        for kind, pattern in _EVENTS:
            match = pattern.search(line)
            if match is None:
                continue
            number = match[1] if match.groups() else ""
            if number.isdecimal():
                # The start is a number of iterations, the others are the index of the last one.
                is_start = line.find("Starting training") >= 0
                self.iteration = int(number) + (not is_start)
            self.events.append(Event(time.time(), kind, self.iteration))

    def last_lines(self, count: int = 5) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-count:])

    def kill(self) -> int:
        """SIGKILL for the whole group, and wait until none of it is left.

        Returns:
            the exit status.

        Raises:
            RuntimeError: a process is left after some seconds.
        """
        if group_members(self.process.pid):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        limit = time.monotonic() + 10
        while members := group_members(self.process.pid):
            if time.monotonic() > limit:
                raise RuntimeError(f"processes {members} are left after SIGKILL")
            time.sleep(0.002)
        return status
