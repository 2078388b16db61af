"""Seeds that depend on the position in a run, not on the random numbers drawn before.

A resumed run has the random numbers of an uninterrupted one only if it needs no saved random state.
So each use of random numbers is seeded from the run's seed and a key that identifies it, such as
(DATA, position of the sample) or (MODEL, iteration, rank).
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# First element of a key: the purpose of the random numbers.
DATA, MODEL, SAMPLER = range(3)


def _derive(seed: int, key: tuple[int, ...]) -> list[int]:
    """Three independent 64-bit seeds; any change of `seed` or `key` changes all of them."""
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    return [int(word) for word in sequence.generate_state(3, np.uint64)]


def seed_all(seed: int, *key: int) -> None:
    """Seed `random`, NumPy and torch on all devices.

    Args:
        seed: the run's seed, at least 0.
        key: identifies the use, each element at least 0.
    """
    python_seed, numpy_seed, torch_seed = _derive(seed, key)
    random.seed(python_seed)
    np.random.seed(numpy_seed % 2**32)
    torch.manual_seed(torch_seed)


@contextmanager
def isolated_rng(seed: int, *key: int) -> Iterator[None]:
    """Seed `random`, NumPy and torch (CPU) for the block, and restore their states afterwards.

    Args:
        seed: the run's seed, at least 0.
        key: identifies the use, each element at least 0.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    python_seed, numpy_seed, torch_seed = _derive(seed, key)
    random.seed(python_seed)
    np.random.seed(numpy_seed % 2**32)
    # Not torch.manual_seed, which also seeds the accelerator, whose state is not restored.
    torch.default_generator.manual_seed(torch_seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
