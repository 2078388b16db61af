"""A lock on an output folder, so that two trainings do not write the same files."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator

from detectron2.utils import comm

from .files import WriteError, explained_write_errors

LOCK_FILE = "training.lock"
# What file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

# Folder and process that holds its lock: forked children inherit the variable, not the lock.
_held: set[tuple[str, int]] = set()

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_output(output_dir: str) -> Iterator[None]:
    """Hold the lock of a folder; a collective call, though the main process alone holds it.

    The system releases it when that process ends, however it ends. `flock` would not do: loader
    processes inherit such locks and may outlive a killed run by seconds.

    Args:
        output_dir: created if missing; empty: nothing is locked.

    Raises:
        RuntimeError: another process holds it.
        WriteError: the folder cannot be made or written.
    """
    folder = os.path.realpath(output_dir)
    holder = (folder, os.getpid())
    # Locking twice would release at the end of the inner one.
    is_mine = not output_dir or holder in _held
    with contextlib.ExitStack() as stack:
        problem: Exception | None = None
        if comm.is_main_process() and not is_mine:
            try:
                stack.enter_context(_locked_file(folder, output_dir))
            except (RuntimeError, WriteError) as error:
                problem = error
            else:
                _held.add(holder)
                stack.callback(_held.discard, holder)
        # All stop, instead of waiting for the main process.
        for found in comm.all_gather(problem):
            if found is not None:
                raise found
        yield


@contextlib.contextmanager
def _locked_file(folder: str, output_dir: str) -> Iterator[None]:
    path = os.path.join(folder, LOCK_FILE)
    with contextlib.ExitStack() as stack:
        with explained_write_errors(path):
            os.makedirs(folder, exist_ok=True)
            file = stack.enter_context(open(path, "a+"))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.seek(0)
                raise RuntimeError(
                    f"OUTPUT_DIR is {output_dir}, but another training writes there "
                    f"({file.read(200).strip()}). Wait for its end, or set another OUTPUT_DIR."
                ) from error
            _logger.warning(
                f"The file system of OUTPUT_DIR {output_dir} has no locks ({error}): "
                "nothing keeps a second training from writing there."
            )
        else:
            with explained_write_errors(path):
                file.truncate(0)
                holder = f"process {os.getpid()} on {socket.gethostname()}\n"
                os.write(file.fileno(), holder.encode())
        yield
