"""Work in several processes."""

import os

import pytest
import torch

from mask2former.utils.parallel import map_tasks, worker_pool


def test_workers_use_one_thread():
    """Workers are forked from a process with several threads, which they do not inherit."""
    torch.rand(1 << 20).exp_()
    with worker_pool(2) as pool:
        assert pool.submit(torch.get_num_threads).result(timeout=60) == 1


def _square(number):
    return number**2, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_order(workers, number):
    results = map_tasks(_square, range(number), workers, "test")
    assert [square for square, _ in results] == [i**2 for i in range(number)]
    # One task does not need a process of its own.
    assert (os.getpid() in {pid for _, pid in results}) == (number == 1 or (workers == 1 < number))
