"""Contenders take turns, ratios are formed within rounds, and reports are complete."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mask2former.utils import benchmark


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def measure_with(clock: Clock, seconds: dict[str, float], order: list[str]):
    """Function that measures a contender: `seconds` of it pass, twice as many every round."""

    def measure(name: str) -> dict[str, float]:
        taken = seconds[name] * 2 ** order.count(name)
        order.append(name)
        clock.now += taken
        return {"wall": taken}

    return measure


def test_rounds_begin_with_another_contender():
    order: list[str] = []
    measure = measure_with(Clock(), {"a": 1.0, "b": 2.0, "c": 3.0}, order)
    rounds: list[int] = []
    samples = benchmark.interleave(
        ["a", "b", "c"], measure, 4, on_round=lambda: rounds.append(len(order))
    )
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert rounds == [3, 6, 9, 12]
    assert [times["wall"] for times in samples["b"]] == [2.0, 4.0, 8.0, 16.0]


@pytest.mark.parametrize("max_seconds, rounds", [(0.0, 1), (3.0, 1), (3.5, 2), (9.0, 2), (1e9, 5)])
def test_no_round_starts_when_the_time_is_up(max_seconds, rounds):
    clock = Clock()
    # Rounds end at 3, 9, 21 ... seconds.
    measure = measure_with(clock, {"a": 1.0, "b": 2.0}, [])
    samples = benchmark.interleave(["a", "b"], measure, 5, max_seconds, clock)
    assert len(samples["a"]) == len(samples["b"]) == rounds


def test_ratio_is_of_rounds_and_not_of_medians():
    # The machine slows down tenfold in the third round; medians would give 8 / 2.
    ratio = benchmark.ratios([6.0, 8.0, 90.0, 9.0, 8.0], [2.0, 2.0, 30.0, 1.0, 4.0])
    # By round: 3, 4, 3, 9, 2.
    assert ratio == {"median": 3.0, "q1": 3.0, "q3": 4.0}
    assert benchmark.ratios([3.0], [2.0]) == {"median": 1.5, "q1": 1.5, "q3": 1.5}


def test_summary():
    assert benchmark.summarize([3.0, 1.0, 2.0, 10.0]) == {
        "median": 2.5,
        "min": 1.0,
        "samples": [3.0, 1.0, 2.0, 10.0],
    }


@pytest.mark.parametrize("seconds, repeats", [(0.0, 10), (1e-4, 10), (1e-3, 5), (1.0, 1)])
def test_short_calls_are_repeated(seconds, repeats):
    assert benchmark.repeats_for(seconds) == repeats


def test_call_is_repeated_and_timed():
    calls: list[int] = []
    times = benchmark.time_call(lambda: calls.append(1), "cpu", repeats=7)
    assert len(calls) == 7
    assert times.keys() == {"wall", "cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_is_timed_and_its_memory_counted():
    x = torch.ones(1 << 20, device="cuda")
    times = benchmark.time_call(lambda: x * 2, "cuda", repeats=3)
    assert times["wall"] > 0 and times["device"] > 0
    assert benchmark.peak_cuda_bytes(lambda: x * 2) == 4 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_peak_resident_memory():
    script = """
import torch
from mask2former.utils.benchmark import peak_resident_bytes
torch.ones(1 << 25)  # 128 MiB that are free again
def run():
    x = torch.ones(1 << 24)  # 64 MiB
    y = x + x
    del x
    return y * y  # no more than two at a time
print(peak_resident_bytes(run) / 2**20)
"""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert float(result.stdout) == pytest.approx(128, abs=8)


def test_constant_columns_stand_above_the_table():
    rows = [
        {"size": "64x96", "backend": "a", "ms": "1", "GB/s": ""},
        {"size": "64x96", "backend": "b", "ms": "2", "GB/s": ""},
    ]
    assert benchmark.markdown_table(rows).splitlines() == [
        "Everywhere: size 64x96.",
        "",
        "| backend | ms |",
        "|---|---|",
        "| a | 1 |",
        "| b | 2 |",
    ]
    assert benchmark.markdown_table(rows[:1]).splitlines()[0] == "| size | backend | ms | GB/s |"
    assert benchmark.markdown_table([]) == "No results."


def test_machine_is_described():
    machine = benchmark.describe_machine(["cpu"], ["torch", "no-such-distribution"])
    assert machine["cores"] >= 1 and machine["cpu"]
    assert machine["torch"].startswith(torch.__version__.split("+")[0])
    assert machine["no-such-distribution"] == "not installed"
    assert "gpu" not in machine


@pytest.mark.parametrize("seconds, text", [(0.00012345, "0.123"), (0.0995, "99.5"), (1.5, "1500")])
def test_milliseconds(seconds, text):
    assert benchmark.milliseconds(seconds) == text


def test_processor_time_includes_processes_that_ended():
    before = benchmark.cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert benchmark.cpu_seconds() > before + 0.05


@pytest.mark.parametrize(
    "bars",
    [
        [],
        [("one", "a", 1e-3, "")],
        [("one", "a", 1e-3, "2 times b"), ("one", "b", 2e-3, ""), ("two", "a", 5.0, "")],
    ],
)
def test_chart_is_a_png(bars):
    assert benchmark.bar_chart("title", bars).startswith(b"\x89PNG\r\n")


def test_report_is_written_whole(tmp_path):
    folder = tmp_path / "new" / "folder"
    benchmark.write_report(folder, "op", {"x": 1}, "text\n\n", b"chart")
    assert json.loads((folder / "op.json").read_text()) == {"x": 1}
    assert (folder / "op.md").read_text() == "text\n"
    assert (folder / "op.png").read_bytes() == b"chart"
    assert sorted(path.name for path in folder.iterdir()) == ["op.json", "op.md", "op.png"]
    with pytest.raises(TypeError):
        benchmark.write_report(folder, "op", {"x": object()}, "", b"")
    assert json.loads((folder / "op.json").read_text()) == {"x": 1}
