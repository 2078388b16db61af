"""Starts programs without importing their packages each time, which takes most of their time.

They run in processes that a server forks, which has imported the packages that Mask2Former needs.
Such a process is as real as one that was started, but those packages have read the environment of
the server on import: use `subprocess` for programs with data sets of Detectron2's below a
DETECTRON2_DATASETS of their own, or with an allocator of their own.
"""

import io
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing import reduction
from pathlib import Path
from tempfile import TemporaryFile

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
# The server starts with the first process and ends with the tests. Those that are slow to import,
# without Mask2Former itself: importing it is part of what programs do.
_CONTEXT.set_forkserver_preload(
    [
        *("torch", "torchvision.ops", "torch.distributed.elastic.multiprocessing.errors"),
        *("detectron2.engine", "detectron2.evaluation", "detectron2.utils.visualizer"),
        *("detectron2.projects.deeplab", "detectron2.projects.point_rend"),
        *("scipy.ndimage", "scipy.optimize", "shapely", "hotcoco", "panopticapi.evaluation"),
        *("msgspec", "torch.utils.tensorboard"),
    ]
)
# For a rank to notice that another one has failed.
_GRACE_SECONDS = 5.0


class _Stream:
    """A file descriptor that can be sent to the server."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple:
        return _received, (reduction.DupFd(self.descriptor),)


def _received(descriptor) -> _Stream:
    return _Stream(descriptor.detach())


class Popen:
    """The part of `subprocess.Popen` that tests need, for Python programs.

    Args:
        command: sys.executable, options (-W, -u), and a program, `-m MODULE` or `-c CODE` with its
            arguments.
        env, cwd, stdin, stdout, stderr, start_new_session: as there.
        text, bufsize: as there; text must be true, the default here.
        context: the way of `multiprocessing` to start it; "fork" makes it a child of this process,
            which must have imported the packages.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: int | io.IOBase | None = None,
        stdout: int | io.IOBase | None = None,
        stderr: int | io.IOBase | None = None,
        text: bool = True,
        bufsize: int = -1,
        start_new_session: bool = False,
        context: multiprocessing.context.BaseContext = _CONTEXT,
    ) -> None:
        assert command[0] == sys.executable and text
        self.args = command
        self.stdin: io.TextIOWrapper | None = None
        self.stdout: io.TextIOWrapper | None = None
        self.stderr: io.TextIOWrapper | None = None
        with ExitStack() as childs:
            streams = []
            for default, (name, stream) in enumerate(
                {"stdin": stdin, "stdout": stdout, "stderr": stderr}.items()
            ):
                if stream == subprocess.PIPE:
                    pipe = os.pipe()
                    ours, descriptor = pipe[::-1] if name == "stdin" else pipe
                    childs.callback(os.close, descriptor)
                    setattr(self, name, open(ours, "w" if name == "stdin" else "r", bufsize))
                elif stream is None:
                    descriptor = default
                elif stream == subprocess.STDOUT:
                    descriptor = streams[1].descriptor
                elif stream == subprocess.DEVNULL:
                    descriptor = os.open(os.devnull, os.O_RDWR)
                    childs.callback(os.close, descriptor)
                else:
                    descriptor = stream if isinstance(stream, int) else stream.fileno()
                streams.append(_Stream(descriptor))
            arguments = list(map(str, command[1:])), dict(env or os.environ), str(cwd or Path.cwd())
            self._process = context.Process(
                target=_become, args=(*arguments, streams, start_new_session)
            )
            self._process.start()
        self.pid, self.sentinel = self._process.pid, self._process.sentinel

    def __enter__(self) -> "Popen":
        return self

    def __exit__(self, *_: object) -> None:
        self.communicate()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def communicate(self) -> tuple[str | None, str | None]:
        """Close the input, read the rest of the output, and wait."""
        if self.stdin:
            self.stdin.close()
        output = []
        for stream in (self.stdout, self.stderr):
            output.append(stream.read() if stream and not stream.closed else None)
            if stream:
                stream.close()
        self.wait()
        return output[0], output[1]

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    input: str = "",
    timeout: float | None = 600,
    check: bool = False,
    capture_output: bool = True,
    text: bool = True,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run(..., capture_output=True, text=True)` for the commands of `Popen`."""
    assert capture_output and text
    (done,) = run_all([command], env=[env], cwd=cwd, input=input, timeout=timeout)
    if check:
        done.check_returncode()
    return done


def run_ranks(
    number: int, command: Sequence[str | Path], *, env: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Run a program in processes that find each other as those of torchrun do.

    If one fails, the others, which may wait for it, are killed.

    Returns:
        a status that is not 0 if there is one, and the output of all ranks together.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    job = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    job |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [{**env, **job, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(number)]
    done = run_all([command] * number, env=ranks)
    status = max((rank.returncode for rank in done), key=abs)
    stdout, stderr = ("".join(getattr(r, name) for r in done) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(list(command), status, stdout, stderr)


def run_all(
    commands: Sequence[Sequence[str | Path]],
    *,
    env: Sequence[Mapping[str, str] | None],
    cwd: str | Path | None = None,
    input: str = "",
    timeout: float | None = 600,
) -> list[subprocess.CompletedProcess[str]]:
    """`run` for several commands at the same time, each with its environment; see `run_ranks`."""
    with ExitStack() as stack:
        started = []
        for command, environment in zip(commands, env, strict=True):
            files = [stack.enter_context(TemporaryFile("w+")) for _ in range(3)]
            files[0].write(input)
            files[0].seek(0)
            streams = dict(zip(("stdin", "stdout", "stderr"), files, strict=True))
            process = Popen(command, env=environment, cwd=cwd, **streams)
            stack.callback(process.kill)  # does nothing to one that has ended
            started.append((process, files[1:]))
        waiting, done = [process for process, _ in started], []
        while waiting:
            multiprocessing.connection.wait([x.sentinel for x in waiting], timeout)
            ended = [x for x in waiting if x.poll() is not None]
            if not ended:
                raise subprocess.TimeoutExpired(str(commands), timeout)
            waiting = [x for x in waiting if x not in ended]
            if any(x.returncode for x in ended):
                for process in waiting:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_GRACE_SECONDS)
                    process.kill()
        for process, files in started:
            for file in files:
                file.seek(0)
            output = (file.read() for file in files)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, *output))
        return done


def _become(
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    streams: list[_Stream],
    is_leader: bool,
) -> None:
    """Make this forked process the one that the command describes."""
    if is_leader:
        os.setsid()
    # As without this server, also for the workers of a loader.
    multiprocessing.set_start_method(None, force=True)
    for target, stream in enumerate(streams):
        os.dup2(stream.descriptor, target)
        if stream.descriptor > 2:
            os.close(stream.descriptor)
    sys.stdin = open(0, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    path = [x for x in environment.get("PYTHONPATH", "").split(os.pathsep) if x]
    sys.orig_argv = [sys.executable, *arguments]
    while arguments[0] in ("-u", "-W"):
        if arguments.pop(0) == "-W":
            warnings.simplefilter(arguments.pop(0))
    kind = arguments.pop(0) if arguments[0] in ("-c", "-m") else ""
    sys.argv = [kind or arguments[0], *arguments[1:]]
    if kind == "-c":
        sys.path[:0] = ["", *path]
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(arguments[0], "<string>", "exec"), module.__dict__)
    elif kind == "-m":
        sys.path[:0] = [folder, *path]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[:0] = [os.path.dirname(os.path.abspath(arguments[0])), *path]
        runpy.run_path(arguments[0], run_name="__main__")
