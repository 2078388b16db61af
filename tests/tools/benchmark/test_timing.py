"""Contenders take turns, ratios are formed within rounds, memory is measured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from load_script import load_script

timing = load_script("tools/benchmark/timing.py")


class Clock:
    """Seconds that pass only when a test advances them."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def measure_with(clock: Clock, seconds: dict[str, float], order: list[str]):
    """A function that measures a contender: its `seconds` pass, doubled every round."""

    def measure(name: str) -> dict[str, float]:
        taken = seconds[name] * 2 ** order.count(name)
        order.append(name)
        clock.now += taken
        return {"wall": taken}

    return measure


def test_contenders_rotate():
    order: list[str] = []
    measure = measure_with(Clock(), {"a": 1.0, "b": 2.0, "c": 3.0}, order)
    rounds: list[int] = []
    samples = timing.interleave(
        ["a", "b", "c"], measure, 4, on_round=lambda: rounds.append(len(order))
    )
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert rounds == [3, 6, 9, 12]
    assert [times["wall"] for times in samples["b"]] == [2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize("max_seconds, rounds", [(0.0, 1), (3.0, 1), (3.5, 2), (9.0, 2), (1e9, 5)])
def test_no_round_starts_after_max_seconds(max_seconds, rounds):
    clock = Clock()
    # Rounds end at 3, 9, 21 ... seconds.
    measure = measure_with(clock, {"a": 1.0, "b": 2.0}, [])
    samples = timing.interleave(["a", "b"], measure, 5, max_seconds, clock)
    assert len(samples["a"]) == len(samples["b"]) == rounds


def test_ratios_are_formed_within_rounds():
    # The machine slows down tenfold in the third round; medians would give 8 / 2.
    ratio = timing.ratios([6.0, 8.0, 90.0, 9.0, 8.0], [2.0, 2.0, 30.0, 1.0, 4.0])
    # By round: 3, 4, 3, 9, 2.
    assert ratio == {"median": 3.0, "q1": 3.0, "q3": 4.0}
    assert timing.ratios([3.0], [2.0]) == {"median": 1.5, "q1": 1.5, "q3": 1.5}


def test_summary():
    assert timing.summarize([3.0, 1.0, 2.0, 10.0]) == {
        "median": 2.5,
        "min": 1.0,
        "samples": [3.0, 1.0, 2.0, 10.0],
    }


@pytest.mark.parametrize("seconds, repeats", [(0.0, 10), (1e-4, 10), (1e-3, 5), (1.0, 1)])
def test_short_calls_are_repeated(seconds, repeats):
    assert timing.repeats_for(seconds) == repeats


def test_call_is_repeated_and_timed():
    calls: list[int] = []
    times = timing.time_call(lambda: calls.append(1), "cpu", repeats=7)
    assert len(calls) == 7
    assert times.keys() == {"wall", "cpu"}


@pytest.mark.gpu
def test_device_time_and_memory():
    x = torch.ones(1 << 20, device="cuda")
    times = timing.time_call(lambda: x * 2, "cuda", repeats=3)
    assert times["wall"] > 0 and times["device"] > 0
    assert timing.peak_cuda_bytes(lambda: x * 2) == 4 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_peak_resident_memory():
    script = """
import torch
from timing import peak_resident_bytes
torch.ones(1 << 25)  # 128 MiB, freed at once
def run():
    x = torch.ones(1 << 24)  # 64 MiB
    y = x + x
    del x
    return y * y  # at most two at a time
print(peak_resident_bytes(run) / 2**20)
"""
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(timing.__file__).parent),
    }
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert float(result.stdout) == pytest.approx(128, abs=8)


def test_cpu_time_includes_finished_processes():
    before = timing.cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert timing.cpu_seconds() > before + 0.05
