"""Whether two models differ on a test set: a paired bootstrap over images, and over runs.

I images, K classes, R resamples.

All runs are evaluated on the same resampled images, so that what is hard for both cancels out. With
several runs per side (seeds), the variance between the runs of a side is added: the interval then
also covers a new training. With one run per side it covers a new choice of images only.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from .image_statistics import ImageStatistics

_CONFIDENCE = 0.95
# Bounds of the bootstrap are rough below so many images, and a class needs more than a few.
_FEW_IMAGES = 30
_MIN_CLASS_IMAGES = 5
# Share of false discoveries among the classes reported.
_FALSE_DISCOVERIES = 0.05
# Resamples evaluated at once.
_BATCH = 50


class Interval(NamedTuple):
    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """In percent points. A and B: mean over the runs of the side."""

    metrics: dict[str, dict[str, Any]]  # {metric: {"a", "b", "difference": Interval, "verdict"}}
    classes: list[dict[str, Any]]
    notes: list[str]


def check_same_test_set(runs: Sequence[ImageStatistics], names: Sequence[str]) -> None:
    """Check that runs were evaluated on the same images, classes and ground truth.

    Raises:
        ValueError: naming the first run that differs from the first one.
    """
    first = runs[0]
    for run, name in zip(runs[1:], names[1:], strict=True):
        if run.class_names != first.class_names:
            raise ValueError(
                f"{names[0]} and {name} have different classes: {first.class_names[:5]}... and "
                f"{run.class_names[:5]}...: compare runs on the same test set."
            )
        if run.image_ids != first.image_ids:
            differ = [*set(first.image_ids).symmetric_difference(run.image_ids)]
            raise ValueError(
                f"{names[0]} has {len(first.image_ids)} images and {name} has "
                f"{len(run.image_ids)}, or in another order; in one only: {differ[:5]}. Evaluate "
                "both on the same test set."
            )
        wrong = np.flatnonzero((run.gt_counts() != first.gt_counts()).any(1))
        if len(wrong):
            raise ValueError(
                f"{names[0]} and {name} have different ground truth in {len(wrong)} images, the "
                f"first is {first.image_ids[wrong[0]]}: evaluate both on the same annotations."
            )


def draw_weights(num_images: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield batches (r, I) of how often each image is drawn, R rows in all."""
    generator = np.random.default_rng(seed)
    share = np.full(num_images, 1 / num_images)
    for start in range(0, num_resamples, _BATCH):
        yield generator.multinomial(num_images, share, min(_BATCH, num_resamples - start))


def compare(
    side_a: Sequence[ImageStatistics],
    side_b: Sequence[ImageStatistics],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
    progress: Callable[[Iterator, int], Iterator] = lambda batches, total: batches,
) -> Comparison:
    """Compare two sides of one or more runs on the same images.

    Args:
        side_a, side_b: runs, checked by `check_same_test_set`.
        num_resamples: of the images, at least 100.
        seed: of the resampling.
        progress: wraps the batches of resamples, given their number.

    Returns:
        Metrics with 95 % intervals of each side and of B - A, classes, and notes for the reader.

    Raises:
        ValueError: no images, or too few resamples.
    """
    runs = [*side_a, *side_b]
    num_images, num_a = len(runs[0].image_ids), len(side_a)
    if num_images < 2:
        raise ValueError(f"a bootstrap needs at least 2 images, the test set has {num_images}")
    if num_resamples < 100:
        raise ValueError(f"intervals need at least 100 resamples, not {num_resamples}")
    names = runs[0].metric_names
    once = np.ones((1, num_images), dtype=np.int64)
    value, class_value = _evaluate(runs, once, names)  # (runs, metrics, 1), (runs, 1, K)
    drawn, class_drawn = [], []
    num_batches = -(-num_resamples // _BATCH)
    for weights in progress(draw_weights(num_images, num_resamples, seed), num_batches):
        metrics, classes = _evaluate(runs, weights, names)
        drawn.append(metrics)
        # Runs are averaged at once: R × K for each would be large.
        class_drawn.append(classes[num_a:].mean(0) - classes[:num_a].mean(0))
    draws = np.concatenate(drawn, axis=2)  # (runs, metrics, R)
    result = {}
    for m, name in enumerate(names):
        if np.isnan(value[:, m]).any():  # no thing, or no stuff
            continue
        result[name] = _compare_metric(name, value[:, m, 0], draws[:, m], num_a)
    rows = _compare_classes(runs, class_value[:, 0], np.concatenate(class_drawn), num_a)
    return Comparison(result, rows, _notes(num_images, num_a, len(side_b)))


def _evaluate(
    runs: Sequence[ImageStatistics], weights: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    scores = [run.scores(weights) for run in runs]
    metrics = np.stack([np.stack([metrics[name] for name in names]) for metrics, _ in scores])
    return metrics, np.stack([classes for _, classes in scores])


def _compare_metric(name: str, value: np.ndarray, draws: np.ndarray, num_a: int) -> dict[str, Any]:
    """
    Args:
        name: of the metric.
        value: (runs,).
        draws: (runs, R).
        num_a: the first runs are those of side A.
    """
    sides = [(value[:num_a], draws[:num_a]), (value[num_a:], draws[num_a:])]
    variances = _variances_between_runs([values for values, _ in sides])
    means = [float(values.mean()) for values, _ in sides]
    intervals = [
        _interval(mean, side_draws.mean(0), [variance] if len(values) > 1 else [])
        for mean, (values, side_draws), variance in zip(means, sides, variances, strict=True)
    ]
    difference = _interval(
        means[1] - means[0],
        sides[1][1].mean(0) - sides[0][1].mean(0),
        [variance for variance in variances if variance is not None],
    )
    return {
        "a": intervals[0],
        "b": intervals[1],
        "difference": difference,
        "runs_a": value[:num_a].tolist(),
        "runs_b": value[num_a:].tolist(),
        "verdict": verdict(name, difference),
    }


def _variances_between_runs(sides: Sequence[np.ndarray]) -> list[tuple[float, int] | None]:
    """Variance of each side's mean and its degrees of freedom; None if no side has several runs.

    A side of one run borrows the variance of the other.
    """
    spreads = [(float(v.var(ddof=1)), len(v) - 1) for v in sides if len(v) > 1]
    if not spreads:
        return [None, None]
    return [
        (float(v.var(ddof=1)) / len(v), len(v) - 1) if len(v) > 1 else spreads[0] for v in sides
    ]


def _interval(value: float, draws: np.ndarray, variances: Sequence[tuple[float, int]]) -> Interval:
    """95 % interval: percentiles of the draws, or Welch's t with the variance between runs."""
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return Interval(value, float("nan"), float("nan"))
    between = sum(variance for variance, _ in variances)
    tail = (1 - _CONFIDENCE) / 2
    if between == 0:
        low, high = np.quantile(draws, [tail, 1 - tail])
        return Interval(value, float(low), float(high))
    total = draws.var(ddof=1) + between
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in variances)
    reach = float(stats.t.ppf(1 - tail, freedom) * np.sqrt(total))
    return Interval(value, value - reach, value + reach)


def verdict(name: str, difference: Interval) -> str:
    """Say in words what an interval of B - A shows."""
    value, low, high = difference
    span = f"95 % interval {low:+.2f} to {high:+.2f}"
    if low > 0 or high < 0:
        side = "B" if low > 0 else "A"
        return f"{side} is better in {name} by {abs(value):.2f} (B - A: {value:+.2f}, {span})"
    return f"no difference in {name} shown (B - A: {value:+.2f}, {span})"


def _compare_classes(
    runs: Sequence[ImageStatistics], value: np.ndarray, draws: np.ndarray, num_a: int
) -> list[dict[str, Any]]:
    """
    Args:
        runs: of both sides.
        value: (runs, K).
        draws: (R, K) differences.
        num_a: the first runs are those of side A.
    """
    images = (runs[0].gt_counts() > 0).sum(0)
    spreads = [_variances_between_runs([v[:num_a], v[num_a:]]) for v in value.T]
    rows: list[dict[str, Any]] = []
    p_values = []
    for k, name in enumerate(runs[0].class_names):
        a, b = float(value[:num_a, k].mean()), float(value[num_a:, k].mean())
        known = draws[:, k][~np.isnan(draws[:, k])]
        variances = [v for v in spreads[k] if v is not None and not np.isnan(v[0])]
        interval = _interval(b - a, known, variances)
        p_value = 1.0
        if images[k] >= _MIN_CLASS_IMAGES and len(known) and not np.isnan(b - a):
            error = np.sqrt(known.var(ddof=1) + sum(v for v, _ in variances))
            if error > 0:
                p_value = float(2 * stats.norm.sf(abs(b - a) / error))
            elif a != b:  # without any noise, such as of a class that one side never finds
                p_value = 0.0
            p_values.append(p_value)
        rows.append(
            {
                "class": name,
                "images": int(images[k]),
                "A": a,
                "B": b,
                "difference": b - a,
                "low": interval.low,
                "high": interval.high,
                "p": p_value,
            }
        )
    limit = _discovery_limit(p_values)
    for row in rows:
        outside = row["low"] > 0 or row["high"] < 0
        enough = row["images"] >= _MIN_CLASS_IMAGES
        row["beyond_noise"] = bool(enough and outside and row["p"] <= limit)
    return rows


def _discovery_limit(p_values: Sequence[float]) -> float:
    """Largest p that Benjamini and Hochberg's procedure accepts; negative if none."""
    ordered = np.sort(p_values)
    accepted = ordered <= _FALSE_DISCOVERIES * np.arange(1, len(ordered) + 1) / max(1, len(ordered))
    return float(ordered[accepted].max()) if accepted.any() else -1.0


def _notes(num_images: int, num_a: int, num_b: int) -> list[str]:
    notes = []
    if max(num_a, num_b) == 1:
        notes.append(
            "One run per side: the intervals cover another choice of test images, not another "
            "training seed. Give several runs per side to cover both."
        )
    elif min(num_a, num_b) == 1:
        notes.append("One side has a single run: the other side's variance between runs is used.")
    if num_images < _FEW_IMAGES:
        notes.append(f"Only {num_images} images: the intervals are rough, rather too narrow.")
    return notes
