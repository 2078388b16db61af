"""Checks of polygons and RLEs before they reach the C code of pycocotools, which trusts its input.

It reads and writes outside its buffers for coordinates of 1e9, and leaves pixels uninitialised that
no run of an RLE covers.

N shapes, P points or numbers of all shapes together, h w pixels of an image.
"""

from collections.abc import Sequence, Sized
from itertools import chain
from numbers import Integral
from typing import Any

import numpy as np

# A compressed RLE stores numbers in groups of 5 bits, least significant first, one per character
# from "0"; bit 5 says that more groups follow, bit 4 of the last one is the sign.
_FIRST, _MORE, _SIGN, _BITS = 48, 32, 16, 5
# Groups of one number: enough for 2^34 pixels; C shifts beyond its integers from 13 on.
_MAX_GROUPS = 7
# Pixels outside an image of any size that are not yet far.
_MIN_REACH = 16
# Shapes checked at once, which bounds the memory.
_CHUNK = 20_000


def farthest(image_size: tuple[int, int]) -> int:
    """How far outside an image of size (h, w) polygons may end, in pixels: one side of it."""
    return max(*image_size, _MIN_REACH)


def is_polygon(coordinates: Sized) -> bool:
    """Whether numbers x1, y1, x2, y2, ... are as many as those of a polygon: 3 points or more."""
    return len(coordinates) >= 6 and len(coordinates) % 2 == 0


def polygon_extents(polygons: Sequence[Sequence[float]]) -> np.ndarray:
    """The bounds (N, 4) of polygons: left, top, right, bottom; NaN if a coordinate is not finite.

    Args:
        polygons: x1, y1, x2, y2, ... with at least one point each.
    """
    extents = [np.empty((0, 4))]
    for start in range(0, len(polygons), _CHUNK):
        extents.append(_extents(polygons[start : start + _CHUNK]))
    return np.concatenate(extents)


def _extents(polygons: Sequence[Sequence[float]]) -> np.ndarray:
    lengths = np.fromiter(map(len, polygons), np.int64, len(polygons))
    values = chain.from_iterable(polygons)
    try:
        points = np.fromiter(values, np.float64, int(lengths.sum())).reshape(-1, 2)  # (P, 2)
    except OverflowError:  # an integer beyond float64
        huge = ([v if abs(v) < 1e300 else np.nan for v in polygon] for polygon in polygons)
        points = np.fromiter(chain.from_iterable(huge), np.float64).reshape(-1, 2)
    starts = (np.cumsum(lengths) - lengths) // 2
    # Both propagate NaN; infinite bounds become NaN.
    low = np.minimum.reduceat(points, starts)
    high = np.maximum.reduceat(points, starts)
    extents = np.concatenate((low, high), axis=1)  # (N, 4)
    extents[np.isinf(extents)] = np.nan
    return extents


def reach_outside(extents: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How far (N,) polygons reach outside their images in pixels; 0 or less: not at all.

    Args:
        extents: (N, 4), from `polygon_extents`.
        sizes: (N, 2), (h, w) of the image of each polygon.
    """
    right_bottom = extents[:, 2:] - sizes[:, ::-1]
    return np.maximum(-extents[:, :2], right_bottom).max(axis=1)


def rle_problems(rles: Sequence[Any], num_pixels: Sequence[int]) -> list[str | None]:
    """What is wrong with the runs of RLEs: one sentence each, None if nothing.

    Args:
        rles: `counts` of N RLEs: text or bytes if compressed, else a list of numbers.
        num_pixels: the h * w of each.
    """
    problems: list[str | None] = [None] * len(rles)
    compressed = []
    for i, counts in enumerate(rles):
        if isinstance(counts, str | bytes):
            compressed.append(i)
        else:
            problems[i] = _list_problem(counts, num_pixels[i])
    for start in range(0, len(compressed), _CHUNK):
        chunk = compressed[start : start + _CHUNK]
        data = [counts.encode() if isinstance(counts := rles[i], str) else counts for i in chunk]
        totals = _totals(data)
        for i, total in zip(chunk, totals, strict=True):
            if total != num_pixels[i]:
                problems[i] = _sum_problem(total, num_pixels[i])
    return problems


def _list_problem(counts: Any, num_pixels: int) -> str | None:
    if not isinstance(counts, list | tuple) or not all(isinstance(n, Integral) for n in counts):
        return f"its counts are {str(counts)[:40]!r}, not a text or a list of whole numbers"
    if counts and min(counts) < 0:
        return f"it has a run of {min(counts)} pixels"
    total = sum(counts)
    return None if total == num_pixels else _sum_problem(total, num_pixels)


def _sum_problem(total: int, num_pixels: int) -> str:
    if total < 0:
        return "its counts are not a compressed RLE, or are cut off"
    return f"it counts {total} of {num_pixels} pixels; its counts are cut off or of another image"


def _totals(data: Sequence[bytes]) -> list[int]:
    """The pixels that compressed RLEs count; -1 for one that cannot be decoded."""
    lengths = np.fromiter(map(len, data), np.int64, len(data))
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(data)), lengths)  # (P,) index of the RLE
    groups = np.frombuffer(b"".join(data), np.uint8).astype(np.int64) - _FIRST
    bad = np.zeros(len(data), bool)
    bad[owner[(groups < 0) | (groups > 63)]] = True

    is_last = (groups & _MORE) == 0  # of a number
    filled = lengths > 0
    bad[filled] |= ~is_last[ends[filled] - 1]
    # An RLE that is cut off must not run into the next one.
    is_last[ends[filled] - 1] = True
    stops = np.flatnonzero(is_last)
    starts = np.concatenate(([0], stops[:-1] + 1)) if len(stops) else stops
    place = np.arange(len(groups)) - np.repeat(starts, stops - starts + 1)
    bad[owner[place >= _MAX_GROUPS]] = True
    place = np.minimum(place, _MAX_GROUPS)
    shifted = (groups & 31) << (_BITS * place)
    numbers = np.add.reduceat(shifted, starts) if len(starts) else shifted
    negative = (groups[stops] & _SIGN) != 0
    numbers[negative] -= 1 << (_BITS * (place[stops][negative] + 1))

    # From the fourth number on, the difference to the run before the previous one is stored.
    number_owner = owner[stops]
    per_rle = np.bincount(number_owner, minlength=len(data))
    first = np.cumsum(per_rle) - per_rle
    order = np.arange(len(numbers)) - np.repeat(first, per_rle)
    runs = numbers.copy()
    for parity in (0, 1):
        chain_ = np.flatnonzero((order % 2 == parity) & (order > 0))
        sums = np.cumsum(numbers[chain_])
        chain_owner = number_owner[chain_]
        is_first = np.ones(len(chain_), bool)
        is_first[1:] = chain_owner[1:] != chain_owner[:-1]
        before = (sums - numbers[chain_])[is_first]
        runs[chain_] = sums - np.repeat(before, np.diff(np.flatnonzero(is_first), append=len(sums)))
    bad[number_owner[runs < 0]] = True
    totals = np.zeros(len(data), np.int64)
    np.add.at(totals, number_owner, runs)
    totals[bad] = -1
    return totals.tolist()
