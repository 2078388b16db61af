"""Merges the predictions of overlapping tiles into those of the image, tile by tile, row by row.

    SemanticMerger    scores fade into those of the next tile within the overlap
    PanopticMerger    each tile decides its core; segments that agree in the overlap are one
    InstanceMerger    (tile_instances.py)

Besides the result, only what the next tiles share with earlier ones stays in memory: a strip as
wide as the image and as high as the overlap.

Shape letters: K classes, H W pixels of the image, h w pixels of a tile.
"""

from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..data.label_maps import count_ids, count_values
from ..evaluation.semantic_evaluation import best_labels
from ..utils.tile_grid import Span, Tile
from ..utils.windows import shifted
from .tile_matching import Side, match_sides

Grid = list[list[Tile]]

# Pixels of the image that are relabelled at a time.
_CHUNK = 2**24


def image_size_of(grid: Grid) -> tuple[int, int]:
    """(H, W) of the image that a grid covers."""
    return grid[-1][-1].y.stop, grid[-1][-1].x.stop


def group_of(num_items: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """The group (num_items,) of each item; the items of a pair are in one group."""
    ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(num_items, num_items))
    return connected_components(graph, directed=False)[1]


class _Axis:
    """How the scores of neighbouring tiles fade into each other along one axis.

    Around the border between two cores, over at most the overlap, the weight of one tile falls
    evenly from 1 to 0 and that of the other rises.
    """

    def __init__(self, spans: list[Span], overlap: int) -> None:
        self.half = min(overlap, *(span.core_stop - span.core_start for span in spans)) // 2

    def used(self, span: Span, is_first: bool, is_last: bool) -> slice:
        """What is used of a tile, in pixels of the image."""
        return slice(
            span.core_start - self.half * (not is_first), span.core_stop + self.half * (not is_last)
        )

    def weights(self, device: torch.device) -> Tensor:
        """Rising weights within the fade, (2 * half,)."""
        length = 2 * self.half
        return (torch.arange(length, dtype=torch.float32, device=device) + 0.5) / max(length, 1)


class SemanticMerger:
    """Averages the scores of tiles where they overlap, and keeps the best class of each pixel.

    Attributes:
        labels: (H, W) contiguous class ids, of the smallest unsigned type.
    """

    def __init__(self, grid: Grid, num_classes: int, overlap: int) -> None:
        self._grid = grid
        height, width = image_size_of(grid)
        self.labels = np.zeros((height, width), dtype=np.min_scalar_type(num_classes - 1))
        self._down = _Axis([row[0].y for row in grid], overlap)
        self._across = _Axis([tile.x for tile in grid[0]], overlap)
        # What the tile above and the tile to the left add to the next ones. The first is as wide
        # as the image, so it has half precision.
        self._above: Tensor | None = None
        if len(grid) > 1 and self._down.half:
            shape = num_classes, 2 * self._down.half, width
            self._above = torch.zeros(shape, dtype=torch.float16)
        self._left: Tensor | None = None

    def add(self, tile: Tile, scores: Tensor) -> None:
        """Add the scores (K, h, w) of the next tile."""
        is_first, is_last = tile.row == 0, tile.row == len(self._grid) - 1
        rows = self._down.used(tile.y, is_first, is_last)
        scores, columns = self._blended_across(tile, scores.float(), rows)
        fade = 2 * self._down.half
        weights = self._down.weights(scores.device)[:, None]
        if not is_first and self._above is not None:
            above = self._above[:, :, columns].to(scores)
            scores[:, :fade] = scores[:, :fade] * weights + above
        if not is_last and self._above is not None:
            self._above[:, :, columns] = (scores[:, -fade:] * (1 - weights)).to(self._above)
            scores, rows = scores[:, :-fade], slice(rows.start, rows.stop - fade)
        self.labels[rows, columns] = best_labels(scores.contiguous())

    def _blended_across(self, tile: Tile, scores: Tensor, rows: slice) -> tuple[Tensor, slice]:
        """The scores of the columns that no later tile of the row changes, and these columns."""
        is_first, is_last = tile.column == 0, tile.column == len(self._grid[0]) - 1
        columns = self._across.used(tile.x, is_first, is_last)
        in_tile = shifted((rows, columns), tile.window)
        scores = scores[:, in_tile[0], in_tile[1]].clone()
        fade = 2 * self._across.half
        weights = self._across.weights(scores.device)
        if not is_first and fade:
            assert self._left is not None
            scores[:, :, :fade] = scores[:, :, :fade] * weights + self._left
        if not is_last and fade:
            self._left = scores[:, :, -fade:] * (1 - weights)
            scores, columns = scores[:, :, :-fade], slice(columns.start, columns.stop - fade)
        return scores, columns


class _Strip:
    """A part of a tile that a later tile covers too.

    Attributes:
        ids: of segments in the image, 0 for none; an array (h, w) that is cut to the strip.
        areas: of each id in the whole tile.
        at_border: ids of segments that end at the tile's border in this direction.
    """

    def __init__(self, ids: np.ndarray, areas: dict[int, int], border: np.ndarray) -> None:
        self.ids = ids.copy()
        self.areas = areas
        self.at_border = {*np.unique(border).tolist()} - {0}


class PanopticMerger:
    """Joins the segments of tiles. All stuff of a class is one segment.

    A pixel without segment in its own tile takes that of another tile that covers it.

    Attributes:
        segment_ids: (H, W) int32, 0 for none. Final after `finish`.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.segment_ids = np.zeros(image_size_of(grid), dtype=np.int32)
        # Of each id: the segment as its tile predicted it. Id 0 is no segment.
        self._segments: list[dict[str, Any]] = [{}]
        self._stuff_ids: dict[int, int] = {}
        self._pairs: list[tuple[int, int]] = []
        self._left: _Strip | None = None
        self._above: dict[int, _Strip] = {}

    def add(self, tile: Tile, ids: np.ndarray, segments: list[dict[str, Any]]) -> None:
        """Add the next tile.

        Args:
            tile: of the grid, in row order.
            ids: (h, w) of segments, 0 for none.
            segments: with `id`, `category_id` and `isthing`, see `panoptic_inference`.
        """
        lookup = np.zeros(max([0, *(segment["id"] for segment in segments)]) + 1, dtype=np.int32)
        for segment in segments:
            lookup[segment["id"]] = self._new_id(segment)
        ids = lookup[ids]
        present, counts = count_values(ids)
        areas = dict(zip(present.tolist(), counts.tolist(), strict=True))
        row = self._grid[tile.row]
        if tile.column and self._left is not None:
            shared = self._left.ids.shape[1]
            self._join(self._left, _Strip(ids[:, :shared], areas, ids[:, 0]))
        above = self._above.get(tile.column)
        if above is not None:
            self._join(above, _Strip(ids[: len(above.ids)], areas, ids[0]))
        self._left = None
        if tile.column + 1 < len(row):
            start = row[tile.column + 1].x.start - tile.x.start
            self._left = _Strip(ids[:, start:], areas, ids[:, -1])
        if tile.row + 1 < len(self._grid):
            start = self._grid[tile.row + 1][tile.column].y.start - tile.y.start
            self._above[tile.column] = _Strip(ids[start:], areas, ids[-1])
        self._write(tile, ids)

    def _new_id(self, segment: dict[str, Any]) -> int:
        category = segment["category_id"]
        if not segment["isthing"] and category in self._stuff_ids:
            known = self._segments[self._stuff_ids[category]]
            if "score" in segment:
                # Of the most probable query, as where several make a segment.
                known["score"] = max(known["score"], segment["score"])
            return self._stuff_ids[category]
        self._segments.append(dict(segment))
        if not segment["isthing"]:
            self._stuff_ids[category] = len(self._segments) - 1
        return len(self._segments) - 1

    def _write(self, tile: Tile, ids: np.ndarray) -> None:
        covered = self.segment_ids[tile.window]
        np.copyto(covered, ids, where=covered == 0)
        core = self.segment_ids[tile.core]
        own = ids[shifted(tile.core, tile.window)]
        np.copyto(core, own, where=own != 0)

    def _join(self, first: _Strip, second: _Strip) -> None:
        if not first.ids.size:
            return  # the tiles do not overlap
        pairs, counts = count_values(first.ids.astype(np.int64) << 32 | second.ids)
        ids, places, sides = [], [], []
        for strip, column in ((first, pairs >> 32), (second, pairs & 0xFFFFFFFF)):
            present, place = np.unique(column, return_inverse=True)
            ids.append(present)
            places.append(place)
            sides.append(self._side(strip, present, np.bincount(place, counts)))
        overlaps = np.zeros([len(present) for present in ids])
        overlaps[places[0], places[1]] = counts
        # Stuff is one segment already, and 0 is none.
        is_thing = [
            np.array([self._segments[i].get("isthing", False) for i in present]) for present in ids
        ]
        overlaps[~is_thing[0]] = overlaps[:, ~is_thing[1]] = 0
        for matches in match_sides(sides[0], sides[1], overlaps):
            self._pairs += [(int(ids[0][i]), int(ids[1][j])) for i, j in matches]

    def _side(self, strip: _Strip, ids: np.ndarray, areas: np.ndarray) -> Side:
        classes = [self._segments[i].get("category_id", -1) for i in ids]
        is_fragment = [
            i in strip.at_border and strip.areas[i] == area
            for i, area in zip(ids.tolist(), areas.tolist(), strict=True)
        ]
        return Side(np.array(classes), areas, np.array(is_fragment), np.ones(len(ids)))

    def finish(self) -> list[dict[str, Any]]:
        """Give joined segments one id, from 1, in `segment_ids`.

        Returns:
            The segments, with `id`, `category_id`, `isthing`, `area` in pixels, and `score` if all
            their parts have one: its mean, for things over pixels.
        """
        groups = group_of(len(self._segments), self._pairs)
        counts = count_ids(self.segment_ids, len(groups) - 1)
        areas = np.zeros(groups.max() + 1, dtype=np.int64)
        # A group has many ids, which += would count once.
        np.add.at(areas, groups, counts)
        new_ids = np.zeros(len(areas), dtype=np.int32)
        ids_per_group: dict[int, list[int]] = {}
        for i, group in enumerate(groups.tolist()):
            if i and areas[group]:
                ids_per_group.setdefault(group, []).append(i)
        segments: list[dict[str, Any]] = []
        for group, ids in ids_per_group.items():
            new_ids[group] = len(segments) + 1
            merged = {**self._segments[ids[0]], "id": len(segments) + 1, "area": int(areas[group])}
            scores = [self._segments[i].get("score") for i in ids]
            if None not in scores:
                weights = counts[ids] if merged["isthing"] else None
                merged["score"] = float(np.average(scores, weights=weights))
            segments.append(merged)
        lookup = new_ids[groups]
        flat = self.segment_ids.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            flat[chunk] = lookup[flat[chunk]]
        return segments
