"""Seeds depend on the run's seed and the key only."""

import random

import numpy as np
import torch

from mask2former.utils.seeding import isolated_rng, seed_all


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_depends_on_seed_and_key_only():
    drawn = {}
    for key in [(1,), (1, 0), (1, 0, 0), (2, 0), (1, 1), (1, 2**31), (2**31 - 1, 0)]:
        seed_all(*key)
        drawn[key] = draw()
        seed_all(*key)
        assert draw() == drawn[key]
    assert len(set(drawn.values())) == len(drawn)


def test_isolated_rng_restores_the_state_even_after_an_error():
    seed_all(5)
    expected = [draw(), draw()]
    seed_all(5)
    first = draw()
    try:
        with isolated_rng(5):
            inside = draw()
            raise KeyError
    except KeyError:
        pass
    assert [first, draw()] == expected
    assert inside == expected[0]
