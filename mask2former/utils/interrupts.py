"""How a program ends when it is told to: one line, no traceback, no process left behind.

Ctrl-C (SIGINT) and SIGTERM, which job schedulers send, raise `Interrupted` in the main thread. It
may be in a call that never returns, such as waiting for a rank that is gone: a guard thread ends
the process if the main thread has not done so after some seconds. The guard also ends a process
whose parent is gone, because nobody would stop it.

Nothing is saved at that moment: an iteration may be half done, and files are replaced as a whole
(`files.py`), so the last checkpoint is what a run continues from.
"""

import concurrent.futures
import contextlib
import logging
import multiprocessing
import os
import select
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch.multiprocessing

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds that the main thread gets to end by itself, and how often the guard looks for the parent.
_GRACE = 10.0
_PERIOD = 1.0
# Exit status of a process whose parent is gone.
_STATUS_OF_ORPHANS = 1


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM. Like its base it is no `Exception`, so that `except Exception` passes it.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Progress(NamedTuple):
    """Where a training stands.

    Attributes:
        where: such as "iteration 7 of 90".
        checkpoint: file that the run can resume from, if it has written or read one.
    """

    where: str
    checkpoint: str | None


# What the innermost training of this process says.
_progress: list[Callable[[], Progress]] = []
# Guards of this process, the outermost first. Forked children have none.
_guards: list["_Guard"] = []


@contextlib.contextmanager
def reports_progress(describe: Callable[[], Progress]) -> Iterator[None]:
    """Let `interrupt_message` say where this training was interrupted."""
    _progress.append(describe)
    try:
        yield
    finally:
        _progress.remove(describe)


def interrupt_message(signum: int, command: list[str], opts: list[str]) -> str:
    """The line that an interrupted program ends with.

    Args:
        signum: the signal.
        command: the command line that started the program, or its first words.
        opts: what `command` ends with after its options, if it names them all.

    Returns:
        What was interrupted, the last checkpoint, and the command to continue.
    """
    cause = f"Interrupted by {signal.Signals(signum).name}"
    if not _progress:
        return f"{cause}. To run it again: {shlex.join(command)}"
    where, checkpoint = _progress[-1]()
    if checkpoint is None:
        return (
            f"{cause} in {where}, before the first checkpoint. To start again: "
            f"{shlex.join(command)}"
        )
    return (
        f"{cause} in {where}; the last checkpoint is {checkpoint}. To resume: "
        f"{shlex.join(add_resume(command, opts))}"
    )


def add_resume(command: list[str], opts: list[str]) -> list[str]:
    """Add --resume, unless the command has it, before the config overrides it ends with."""
    if "--resume" in command:
        return command
    position = len(command) - len(opts)
    if command[position:] != opts:
        position = len(command)
    if position and command[position - 1] == "--":
        position -= 1
    return [*command[:position], "--resume", *command[position:]]


def own_command() -> list[str]:
    """The command line of this process as it was typed."""
    return list(sys.orig_argv)


def torchrun_command() -> list[str]:
    """The command line of the torchrun that started this process.

    Where the system does not tell, or something else started this process, a placeholder for its
    options.
    """
    file = Path(f"/proc/{os.getppid()}/cmdline")
    if file.is_file():
        command = [os.fsdecode(word) for word in file.read_bytes().split(b"\0")[:-1]]
        arguments = sys.argv[1:]
        is_launcher = any("torchrun" in word or "torch.distributed" in word for word in command)
        if is_launcher and command[len(command) - len(arguments) :] == arguments:
            return command
    return ["torchrun", "...", *sys.argv]


@contextlib.contextmanager
def interruptible(
    message: Callable[[int], str | None],
    *,
    parent: int | None = None,
    at_once: bool = False,
    grace: float = _GRACE,
) -> Iterator[None]:
    """End the process with one line on stderr if SIGINT or SIGTERM comes in this context.

    Processes that are forked in it, such as those of data loaders, ignore SIGINT, because their
    parent stops them, and die with their parent. Outside the main thread, where Python receives no
    signals, only the parent is watched.

    Args:
        message: (signal) → the line, or None for none. Runs in any thread, as soon as the signal
            has come.
        parent: id of the process without which this one has no purpose.
        at_once: leave without Python's clean-up, which may wait for other ranks; children are
            ended.
        grace: seconds that the main thread gets to leave the context.

    Raises:
        SystemExit: status 128 + signal: 130 after Ctrl-C, 143 after SIGTERM.
    """
    guard = _Guard(message, parent, grace)
    guard.start()
    try:
        yield
    except BaseException:
        # Whatever it is, such as a broken connection to another interrupted rank.
        if guard.signum is not None:
            guard.report()
            if at_once:
                guard.wait_for_observers()
                _leave(128 + guard.signum)
            raise SystemExit(128 + guard.signum) from None
        raise
    finally:
        guard.stop()


def run_program(main: Callable[[], Any]) -> NoReturn:
    """Run the main function of a program and exit.

    Ctrl-C and SIGTERM end it with one line and status 130 or 143.

    Args:
        main: what it returns is the exit status, as in `sys.exit`.
    """

    def message(signum: int) -> str:
        return interrupt_message(signum, own_command(), [])

    with interruptible(message):
        sys.exit(main())


def wait_for_spawned(start: Callable[[], None], message: Callable[[int], str]) -> None:
    """Run `start`, which spawns processes and waits for them; pass interrupts on to them.

    The processes inherit blocked signals and must call `unblock_signals`: an interrupt while they
    import modules would print a traceback each.

    Args:
        start: runs in another thread.
        message: (signal) → the line to end with, if no process has come so far as to print its own.

    Raises:
        SystemExit: after an interrupt, when the processes have ended; see `interruptible`.
    """
    outcome: concurrent.futures.Future[None] = concurrent.futures.Future()

    def target() -> None:
        try:
            start()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    # Otherwise the first spawned process starts it, which unblocks the signals.
    resource_tracker.ensure_running()
    with interruptible(lambda signum: None, grace=3 * _GRACE):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            threading.Thread(target=target, daemon=True).start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            outcome.result()
        except Interrupted as interrupt:
            if not _pass_on(interrupt.signum, outcome):
                _print(message(interrupt.signum))
            raise


def _pass_on(signum: int, outcome: concurrent.futures.Future) -> bool:
    """End the spawned processes; return whether one has reported the interrupt."""
    # It warns of every process that has to be stopped.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    told: dict[int, BaseProcess] = {}
    deadline = time.monotonic() + 2 * _GRACE
    while not outcome.done() and time.monotonic() < deadline:
        # Some may be starting.
        for child in multiprocessing.active_children():
            if child.pid is not None and child.pid not in told:
                told[child.pid] = child
                _send(child.pid, signum)
        concurrent.futures.wait([outcome], timeout=0.1)
    _end_children()
    return any(child.exitcode == 128 + signum for child in told.values())


def ignore_interrupts() -> None:
    """Ignore Ctrl-C in a program that is about to start, whose parent ends it then.

    For the `preexec_fn` of `subprocess`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def unblock_signals() -> None:
    """Receive the signals that this process has inherited as blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


class _Guard:
    """Receives signals, watches the parent, and ends the process if the main thread does not.

    Attributes:
        signum: the first signal received.
    """

    def __init__(
        self, message: Callable[[int], str | None], parent: int | None, grace: float
    ) -> None:
        self.signum: int | None = None
        self._grace = grace
        self._message = message
        self._parent = parent
        self._line: str | None = None
        self._received_at = 0.0
        self._noticed = threading.Event()
        self._done = threading.Event()
        self._reporting = threading.Lock()
        self._is_reported = False
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._thread = threading.Thread(target=self._run, name="interrupts", daemon=True)

    def start(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        _guards.append(self)
        if self._in_main_thread:
            self._old_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            # Shells let jobs in the background ignore SIGINT.
            heeded = [one for one in _SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
            self._old = {one: signal.signal(one, self._receive) for one in heeded}
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._in_main_thread:
            for one, handler in self._old.items():
                signal.signal(one, handler)
            signal.set_wakeup_fd(self._old_writer)
        _guards.remove(self)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def report(self) -> None:
        """Print the line, once."""
        # The main thread may be here before the guard has made it.
        self._noticed.wait(_GRACE)
        with self._reporting:
            if self._line is not None and not self._is_reported:
                _print(self._line)
            self._is_reported = True

    def wait_for_observers(self) -> None:
        """Let other ranks see that this one was alive when the signal came to all of them."""
        time.sleep(max(0.0, self._received_at + _PERIOD / 2 - time.monotonic()))

    def _receive(self, signum: int, _: Any) -> None:
        # Terminals and launchers both send it; the first is enough.
        if self.signum is None:
            self.signum = signum
            # Processes of data loaders may end first, which their loader makes an error.
            self._old[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise Interrupted(signum)

    def _run(self) -> None:
        while not self._done.is_set():
            ready, _, _ = select.select([self._reader], [], [], _PERIOD)
            received = (
                [one for one in os.read(self._reader, 512) if one in _SIGNALS] if ready else []
            )
            if received:
                self._end_after_grace(received[0])
                return
            orphaned = self._orphaned()
            if orphaned is not None:
                _print(orphaned)
                _leave(_STATUS_OF_ORPHANS)

    def _orphaned(self) -> str | None:
        """The line to end with if the parent is gone."""
        if self._parent is None or os.getppid() == self._parent:
            return None
        return (
            f"Process {self._parent}, which started process {os.getpid()}, has ended: this one "
            "ends too."
        )

    def _end_after_grace(self, signum: int) -> None:
        self._received_at = time.monotonic()
        try:
            self._line = self._message(signum)
            if self._parent is not None:
                # Spawned processes get SIGINT when the first thread of their parent ends, a while
                # before the parent has ended on a busy machine.
                for _ in range(3):
                    time.sleep(_PERIOD / 4)
                    if orphaned := self._orphaned():
                        self._line = orphaned
                        break
        finally:
            self._noticed.set()
        if not self._done.wait(self._grace):
            self.report()
            _leave(128 + signum)


def _print(line: str) -> None:
    # The reader of a pipe may have ended as well.
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _leave(status: int) -> NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    _end_children()
    os._exit(status)


def _end_children() -> None:
    """End the child processes of `multiprocessing`; those of data loaders belong to them."""
    children = multiprocessing.active_children()
    for child in children:
        if child.pid is not None:
            _send(child.pid, signal.SIGKILL)


def _send(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def _before_fork() -> None:
    global _forked_by_main_thread
    _forked_by_main_thread = threading.current_thread() is threading.main_thread()


def _after_fork_in_child() -> None:
    if not _guards:
        return
    is_main = _guards[-1]._in_main_thread
    _guards.clear()
    if is_main:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # On Linux. It is tied to the thread that forks, and only the main one lasts.
    if _forked_by_main_thread:
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]


_forked_by_main_thread = False
os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
