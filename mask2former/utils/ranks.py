"""Ranks that fail: what became of the others, and an error that names them.

The ranks of one machine know each other's process ids. Of those on other machines nothing is known.
"""

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from detectron2.utils import comm

# Seconds in which a launcher ends the other ranks when one has failed.
_PATIENCE = 5.0


class Peers:
    """The other ranks. The constructor is a collective call."""

    def __init__(self) -> None:
        ranks = comm.all_gather((socket.gethostname(), os.getpid()))
        self._own_rank = comm.get_rank()
        host = socket.gethostname()
        self._local = {
            rank: pid
            for rank, (name, pid) in enumerate(ranks)
            if name == host and rank != self._own_rank
        }

    def ended(self) -> list[int]:
        """Ranks on this machine whose process has ended."""
        return [rank for rank, pid in self._local.items() if _state(pid) in "ZX"]

    def stopped(self) -> list[int]:
        """Ranks on this machine whose process is stopped, as by SIGSTOP."""
        return [rank for rank, pid in self._local.items() if _state(pid) in "Tt"]

    def describe(self, ranks: list[int]) -> str:
        return ", ".join(f"rank {rank} (process {self._local[rank]})" for rank in ranks)


def _state(pid: int) -> str:
    """The state of a process: a letter of proc(5), Z if it does not exist, R where unknown."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "Z"
    except PermissionError:  # another process has the id by now
        return "Z"
    try:
        # The name before it, in brackets, may contain anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "R"


def set_timeout(minutes: float) -> None:
    """Use the timeout in the group in which Detectron2 exchanges objects; a collective call."""
    if dist.get_backend() == dist.Backend.NCCL:
        # Not the default group, and new groups do not inherit its timeout.
        dist.distributed_c10d._set_pg_timeout(
            datetime.timedelta(minutes=minutes), comm._get_global_gloo_group()
        )


@contextlib.contextmanager
def explained_failures(peers: Peers, minutes: float) -> Iterator[None]:
    """Name the ranks that are missing when communication fails.

    If a rank has ended, its own error is the cause: wait for the launcher, which reports that one
    and ends this process.

    Args:
        peers: the other ranks.
        minutes: the timeout, for the message.

    Raises:
        RuntimeError: the error, with its cause.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_of_communication(error):
            raise
        deadline = time.monotonic() + _PATIENCE
        stopped = peers.stopped()
        while not stopped and time.monotonic() < deadline:
            time.sleep(0.1)
        ended = peers.ended()
        if ended:
            what = f"{peers.describe(ended)} has ended"
        elif stopped:
            what = f"{peers.describe(stopped)} is stopped"
        else:
            what = "a rank on another machine has ended or does not answer, or one on this hangs"
        raise RuntimeError(
            f"Rank {comm.get_rank()} lost its connection to other ranks: {what}. A rank that does "
            f"not answer for {minutes:g} minutes (DISTRIBUTED_TIMEOUT) ends the job."
        ) from error


def _is_of_communication(error: RuntimeError) -> bool:
    # Gloo has no type of its own.
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
