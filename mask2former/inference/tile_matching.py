"""Finds the segments of two neighbouring tiles that are one object.

Both tiles predict the strip that they share. Two segments of one class are joined if they agree
there: IoU of at least 0.5. A segment that the border of its tile cuts down to a part of the strip
is a fragment: the other tile sees the whole object, so the fragment belongs to the segment that
contains it.
"""

from typing import NamedTuple

import numpy as np

MIN_IOU = 0.5
# Share of a fragment that the other tile's segment must contain.
_MIN_CONTAINED = 0.5


class Side(NamedTuple):
    """N segments of one tile, seen in the strip.

    Attributes:
        classes: (N,) contiguous class ids.
        areas: (N,) pixels in the strip.
        is_fragment: (N,) bool, the segment lies in the strip only and ends at the tile's border.
        scores: (N,) confidences, by which pairs are chosen where segments of a tile overlap.
    """

    classes: np.ndarray
    areas: np.ndarray
    is_fragment: np.ndarray
    scores: np.ndarray


class Matches(NamedTuple):
    """Pairs (index of the first side, index of the second).

    Attributes:
        joined: the two are parts of one object.
        in_second: the first is a fragment of the second.
        in_first: the second is a fragment of the first.
    """

    joined: list[tuple[int, int]]
    in_second: list[tuple[int, int]]
    in_first: list[tuple[int, int]]


def match_sides(first: Side, second: Side, overlaps: np.ndarray) -> Matches:
    """Match the N segments of one tile with the M of its neighbour.

    Each segment is joined with one other at most.

    Args:
        first, second: both tiles.
        overlaps: (N, M) pixels that two segments share.
    """
    same_class = first.classes[:, None] == second.classes
    overlaps = np.where(same_class, overlaps, 0).astype(np.float64)
    unions = first.areas[:, None] + second.areas - overlaps
    ious = overlaps / np.maximum(unions, 1)
    rows, columns = np.nonzero(ious >= MIN_IOU)
    worth = np.minimum(first.scores[rows], second.scores[columns]) * ious[rows, columns]
    joined: list[tuple[int, int]] = []
    free = [np.ones(len(side.classes), dtype=bool) for side in (first, second)]
    for k in np.argsort(-worth, kind="stable"):
        i, j = int(rows[k]), int(columns[k])
        if free[0][i] and free[1][j]:
            joined.append((i, j))
            free[0][i] = free[1][j] = False
    in_second = _containing(first, free[0], overlaps)
    in_first = [(i, j) for j, i in _containing(second, free[1], overlaps.T)]
    return Matches(joined, in_second, in_first)


def _containing(side: Side, is_free: np.ndarray, overlaps: np.ndarray) -> list[tuple[int, int]]:
    """Each fragment of a side that was not joined, and the other side's segment it belongs to."""
    if not overlaps.size:
        return []
    pairs = []
    for i in np.flatnonzero(is_free & side.is_fragment & (side.areas > 0)):
        j = int(overlaps[i].argmax())
        if overlaps[i, j] >= _MIN_CONTAINED * side.areas[i]:
            pairs.append((int(i), j))
    return pairs
