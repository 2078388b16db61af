"""The subcommand soak: what a long training holds stays flat."""

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from process_tree import measure
from scipy.stats import theilslopes
from tabulate import tabulate
from tqdm import tqdm
from training_runs import Training

from mask2former.utils.files import atomic_write

# With checkpoints and evaluations.
TOY = {"SOLVER.CHECKPOINT_PERIOD": 250, "TEST.EVAL_PERIOD": 250}
MEMORY = ("private", "rss")
# How much the judged part may grow: memory in parts of its median, and counts.
MEMORY_TOLERANCE, COUNT_TOLERANCE = 0.02, 0.5
MIN_SAMPLES = 10
_MAX_FITTED = 1000  # the fit takes time and memory with the square of it


class Trend(NamedTuple):
    """How a series develops in its second half.

    Attributes:
        median: of the values.
        growth: over the half, by the Theil-Sen slope: the median of the slopes between all pairs,
            which single peaks do not change.
        tolerance: the largest growth that counts as flat.
    """

    median: float
    growth: float
    tolerance: float

    @property
    def grows(self) -> bool:
        return self.growth > self.tolerance


def judge(name: str, seconds: Sequence[float], values: Sequence[float]) -> Trend:
    """Judge a series after its warm-up, which is at most its first half.

    Args:
        name: of the series; those in MEMORY have a relative tolerance.
        seconds: when each value was measured, in ascending order.
        values: as many.

    Raises:
        ValueError: too few samples, or one is not finite.
    """
    if len(seconds) < MIN_SAMPLES or len(seconds) != len(values):
        raise ValueError(
            f"{name} has {len(values)} samples at {len(seconds)} times; {MIN_SAMPLES} are needed: "
            "train longer or sample more often"
        )
    x, y = np.asarray(seconds, float), np.asarray(values, float)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError(f"{name} has samples that are not finite")
    half = x >= (x[0] + x[-1]) / 2
    x, y = x[half], y[half]
    step = -(-len(x) // _MAX_FITTED)
    slope = theilslopes(y[::step], x[::step]).slope
    median = float(np.median(y))
    tolerance = MEMORY_TOLERANCE * median if name in MEMORY else COUNT_TOLERANCE
    return Trend(median, float(slope * (x[-1] - x[0])), tolerance)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--iterations", type=int, default=2000, help="to train [2000]")
    parser.add_argument("--every", type=float, default=0.5, help="seconds between samples [0.5]")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.iterations < 1:
        parser.error(f"--iterations must be at least 1, got {options.iterations}")
    if options.every <= 0:
        parser.error(f"--every must be above 0, got {options.every}")


def sample(training: Training, iterations: int, every: float) -> tuple[list[dict], str]:
    """Train, and measure from the first iteration to the last.

    Returns:
        the samples, and what went wrong, if anything.
    """
    samples: list[dict] = []
    with (
        training.start("run", opts=["SOLVER.MAX_ITER", str(iterations)]) as run,
        tqdm(total=iterations, desc="soak", unit="iteration", file=sys.stderr) as progress,
    ):
        while (status := run.poll()) is None:
            kinds = {event.kind for event in run.events}
            if "train" in kinds and "end" not in kinds:
                seconds = time.time() - run.started
                held = measure(run.process.pid)
                # A run that has just ended holds nothing.
                if run.poll() is None and any(held.get(name) for name in MEMORY):
                    samples.append({"seconds": seconds, "iteration": run.iteration} | held)
            progress.update(run.iteration - progress.n)
            time.sleep(every)
        progress.update(iterations - progress.n if status == 0 else 0)
    problem = "" if status == 0 else f"the run ended with status {status}:\n{run.last_lines()}"
    return samples, problem


def write_samples(samples: list[dict], path: Path) -> None:
    with atomic_write(str(path)) as file:
        writer = csv.DictWriter(file, samples[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: round(value, 3) for name, value in sample.items()} for sample in samples
        )


def draw(samples: list[dict], trends: dict[str, Trend], path: Path) -> None:
    """One panel for each series, with the half that is judged shaded."""
    figure = Figure(figsize=(8, 2 * len(trends)), layout="constrained")
    seconds = [sample["seconds"] for sample in samples]
    middle = (seconds[0] + seconds[-1]) / 2
    for axes, (name, trend) in zip(
        figure.subplots(len(trends), sharex=True), trends.items(), strict=True
    ):
        axes.plot(seconds, [sample[name] for sample in samples], linewidth=0.8)
        axes.axvspan(middle, seconds[-1], alpha=0.1)
        verdict = "grows" if trend.grows else "flat"
        unit = " MiB" if name in MEMORY else ""
        axes.set_title(f"{name}{unit}: {verdict}, {trend.growth:+.3g} in the shaded half")
        axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    with atomic_write(str(path), "wb") as file:
        figure.savefig(file, format="png", dpi=100)


def run(options: argparse.Namespace) -> int:
    """Run the test, write soak.csv and soak.png, and print a table.

    Returns:
        the exit status: 1 if anything grows or the run failed.
    """
    training = Training(options, TOY)
    try:
        samples, problem = sample(training, options.iterations, options.every)
    finally:
        training.close()
    if samples:
        write_samples(samples, training.folder / "soak.csv")
    if problem:
        print(f"FAILED: {problem}")
        return 1
    seconds = [sample["seconds"] for sample in samples]
    if not samples:
        raise ValueError("no sample was taken: train longer or sample more often")
    names = [name for name in samples[0] if name not in ("seconds", "iteration")]
    trends = {name: judge(name, seconds, [s[name] for s in samples]) for name in names}
    draw(samples, trends, training.folder / "soak.png")
    rows = [
        {
            "series": f"{name}, MiB" if name in MEMORY else name,
            "median": f"{trend.median:.1f}",
            "growth": f"{trend.growth:+.2f}",
            "tolerance": f"{trend.tolerance:.2f}",
            "verdict": "GROWS" if trend.grows else "flat",
        }
        for name, trend in trends.items()
    ]
    print(
        f"\n{tabulate(rows, headers='keys', tablefmt='pipe', disable_numparse=True)}\n\n"
        f"{options.iterations} iterations, {len(samples)} samples in "
        f"{seconds[-1] - seconds[0]:.0f} s; growth is over the second half.\n"
        f"{training.folder / 'soak.csv'}, {training.folder / 'soak.png'}"
    )
    return int(any(trend.grows for trend in trends.values()))
