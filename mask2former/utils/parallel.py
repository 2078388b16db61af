"""Work on many files in several processes."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import cv2
import torch
from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")

# Tasks sent to a process at once.
_MAX_CHUNK = 32


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of single-threaded processes: a fork would deadlock on its parent's threads."""
    return ProcessPoolExecutor(workers, initializer=_use_one_thread)


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def map_tasks(
    function: Callable[[T], R], tasks: Sequence[T], workers: int, title: str, unit: str = "image"
) -> list[R]:
    """Call a function for each task, in parallel and with a progress bar.

    Args:
        function: can be pickled; sent with every few tasks, so it should be small.
        tasks: one argument per call.
        workers: number of processes.
        title: of the progress bar.
        unit: what a task is, for the progress bar.

    Returns:
        The results in the order of the tasks.
    """

    def results() -> Iterator[R]:
        if workers == 1 or len(tasks) < 2:
            yield from map(function, tasks)
            return
        with worker_pool(min(workers, len(tasks))) as pool:
            chunk = max(1, min(_MAX_CHUNK, len(tasks) // (4 * workers)))
            yield from pool.map(function, tasks, chunksize=chunk)

    return list(tqdm(results(), total=len(tasks), desc=title, unit=unit))
