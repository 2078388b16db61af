"""Files of an earlier run in OUTPUT_DIR, which a run that starts anew there must not take up.

start at iteration 0 → sizes and times of these files → checkpoints → resumed run
"""

import os
from collections.abc import Mapping
from typing import Any

from .utils.plain_values import describe

METRICS = "metrics.json"
_NAMES = (METRICS, "model_best.json", "model_best.pth")

# Name → size in bytes and time of the last change in nanoseconds.
EarlierFiles = dict[str, tuple[int, int]]


def find_earlier_files(folder: str) -> EarlierFiles:
    """The files that a resumed run would read, as they are before a run starts anew."""
    found: EarlierFiles = {}
    for name in _NAMES if folder else ():
        path = os.path.join(folder, name)
        # The writer of metrics has made its file already.
        if os.path.isfile(path) and (size := os.path.getsize(path)):
            found[name] = size, os.stat(path).st_mtime_ns
    return found


def earlier_files_of(trainer: Any) -> EarlierFiles:
    """Those that a trainer knows of; that of another project knows none."""
    return getattr(trainer, "earlier_files", {})


def is_of_this_run(path: str, earlier: Mapping[str, tuple[int, int]]) -> bool:
    """Whether a file exists, and was written after the run had started."""
    if not os.path.isfile(path):
        return False
    status = os.stat(path)
    return earlier.get(os.path.basename(path)) != (status.st_size, status.st_mtime_ns)


def first_byte_of_this_run(path: str, earlier: Mapping[str, tuple[int, int]]) -> int:
    """Where an existing file that runs append to begins to be of this run."""
    size, _ = earlier.get(os.path.basename(path), (0, 0))
    # Shorter than it was, it is another file.
    return size if size <= os.path.getsize(path) else 0


def check_earlier_files(state: Any) -> EarlierFiles:
    """Check what a checkpoint says of earlier files.

    Raises:
        ValueError: it is something else.
    """
    where = "trainer.earlier_files"
    if not isinstance(state, dict):
        raise ValueError(f"{where} is {describe(state)}, not a dict.")
    for name, numbers in state.items():
        is_pair = isinstance(numbers, tuple | list) and len(numbers) == 2
        if name not in _NAMES or not is_pair or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(
                f"{where} has {describe(name)}: {describe(numbers)}; allowed: size and time of "
                f"{', '.join(_NAMES)}."
            )
    return {name: (size, changed) for name, (size, changed) in state.items()}
