"""Joins the instances of overlapping tiles into those of the image.

Masks are stored compressed, so that memory grows with the number of objects, not with the number of
masks that all tiles predict.

Shape letters: N instances of a tile, H W pixels of the image, h w pixels of a tile.
"""

import zlib
from typing import NamedTuple

import cv2
import numpy as np

from ..utils.tile_grid import Tile
from ..utils.windows import Window, intersection, shifted
from .tile_matching import Side, match_sides
from .tile_merging import Grid, group_of


class ImageInstance(NamedTuple):
    """An object of the image.

    Attributes:
        label: contiguous class id.
        score: confidence, of an object of several tiles the mean over its pixels.
        offset: (x, y) of the crop in the image.
        crop: bool mask of its bounding box.
    """

    label: int
    score: float
    offset: tuple[int, int]
    crop: np.ndarray


class _Piece(NamedTuple):
    """An instance of a tile: its box in the image and the compressed mask in it."""

    tile: Tile
    label: int
    score: float
    area: int
    y: int
    x: int
    size: tuple[int, int]
    bits: bytes

    @property
    def window(self) -> Window:
        """Rows and columns of the image."""
        return slice(self.y, self.y + self.size[0]), slice(self.x, self.x + self.size[1])

    def mask(self) -> np.ndarray:
        height, width = self.size
        bits = np.frombuffer(zlib.decompress(self.bits), dtype=np.uint8)
        return np.unpackbits(bits, count=height * width).reshape(self.size).view(bool)


class _Strip(NamedTuple):
    """Instances of a tile in the part that a later tile covers too.

    Attributes:
        pieces: (N,) indices.
        masks: (N, ceil(h * w / 8)) bits of the strip.
        shape: (h, w) of the strip.
        is_fragment: (N,), see `Side`.
    """

    pieces: np.ndarray
    masks: np.ndarray
    shape: tuple[int, int]
    is_fragment: np.ndarray

    def unpacked(self) -> np.ndarray:
        """(N, h * w) float32, 0 or 1."""
        bits = np.unpackbits(self.masks, axis=1, count=self.shape[0] * self.shape[1])
        return bits.astype(np.float32)


class InstanceMerger:
    """Joins instances that agree where their tiles overlap, one to one.

    Fragments that the border of a tile leaves of an object which the next tile sees are dropped.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._pieces: list[_Piece] = []
        self._pairs: list[tuple[int, int]] = []
        self._dropped: set[int] = set()
        self._left: _Strip | None = None
        self._above: dict[int, _Strip] = {}

    def add(self, tile: Tile, masks: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> None:
        """Add the next tile.

        Args:
            tile: of the grid, in row order.
            masks: (N, h, w) bool.
            labels: (N,) contiguous class ids.
            scores: (N,) confidences.
        """
        boxes = [cv2.boundingRect(mask.view(np.uint8)) for mask in masks]
        kept = np.array([i for i, box in enumerate(boxes) if box[2]], dtype=np.int64)
        masks, first = masks[kept], len(self._pieces)
        for mask, i in zip(masks, kept.tolist(), strict=True):
            x, y, width, height = boxes[i]
            crop = mask[y : y + height, x : x + width]
            self._pieces.append(
                _Piece(
                    tile,
                    int(labels[i]),
                    float(scores[i]),
                    int(np.count_nonzero(crop)),
                    tile.y.start + y,
                    tile.x.start + x,
                    (height, width),
                    zlib.compress(np.packbits(crop).tobytes(), 1),
                )
            )
        if tile.column and self._left is not None:
            window = slice(None), slice(self._left.shape[1])
            self._join(self._left, self._strip(masks, first, window, "left"))
        above = self._above.get(tile.column)
        if above is not None:
            window = slice(above.shape[0]), slice(None)
            self._join(above, self._strip(masks, first, window, "top"))
        self._left = None
        if tile.column + 1 < len(self._grid[0]):
            start = self._grid[tile.row][tile.column + 1].x.start - tile.x.start
            self._left = self._strip(masks, first, (slice(None), slice(start, None)), "right")
        if tile.row + 1 < len(self._grid):
            start = self._grid[tile.row + 1][tile.column].y.start - tile.y.start
            self._above[tile.column] = self._strip(
                masks, first, (slice(start, None), slice(None)), "bottom"
            )

    def _strip(self, masks: np.ndarray, first: int, window: Window, border: str) -> _Strip:
        """The instances `first`, `first` + 1, … of a tile within a window of it, those with pixels.

        Args:
            masks: (N, h, w) of the tile.
            first: index of its first piece.
            window: the strip in the tile.
            border: of the tile that is the border of the strip too.
        """
        strip = masks[:, window[0], window[1]]
        # Without a shared pixel there is no strip either.
        present = np.flatnonzero(strip.any(axis=(1, 2))) if strip.size else np.zeros(0, np.int64)
        strip = strip[present]
        edges = {
            "left": strip[:, :, :1],
            "right": strip[:, :, -1:],
            "top": strip[:, :1],
            "bottom": strip[:, -1:],
        }
        inside = np.count_nonzero(strip, axis=(1, 2))
        areas = np.array([self._pieces[first + i].area for i in present], dtype=np.int64)
        return _Strip(
            first + present,
            np.packbits(strip.reshape(len(strip), strip.shape[1] * strip.shape[2]), axis=1),
            (strip.shape[1], strip.shape[2]),
            edges[border].any(axis=(1, 2)) & (inside == areas),
        )

    def _join(self, first: _Strip, second: _Strip) -> None:
        masks = first.unpacked(), second.unpacked()
        overlaps = masks[0] @ masks[1].T
        sides = []
        for strip, bits in zip((first, second), masks, strict=True):
            pieces = [self._pieces[i] for i in strip.pieces]
            sides.append(
                Side(
                    np.array([piece.label for piece in pieces], dtype=np.int64),
                    bits.sum(axis=1),
                    strip.is_fragment,
                    np.array([piece.score for piece in pieces]),
                )
            )
        matches = match_sides(sides[0], sides[1], overlaps)
        self._pairs += [(int(first.pieces[i]), int(second.pieces[j])) for i, j in matches.joined]
        self._dropped |= {int(first.pieces[i]) for i, _ in matches.in_second}
        self._dropped |= {int(second.pieces[j]) for _, j in matches.in_first}

    def finish(
        self, max_instances: int | None = None, min_score: float = 0.0
    ) -> list[ImageInstance]:
        """The objects in descending score order.

        Args:
            max_instances: keep those of the highest scores; None: all.
            min_score: drop those of a lower score.
        """
        groups = group_of(len(self._pieces), self._pairs) if self._pieces else np.zeros(0, int)
        sizes = np.bincount(groups)
        pieces_per_object: dict[int, list[_Piece]] = {}
        for i, (piece, group) in enumerate(zip(self._pieces, groups.tolist(), strict=True)):
            # What was joined with another tile's instance is a part of an object after all.
            if i not in self._dropped or sizes[group] > 1:
                pieces_per_object.setdefault(group, []).append(piece)
        scored = [
            (sum(p.score * p.area for p in pieces) / sum(p.area for p in pieces), pieces)
            for pieces in pieces_per_object.values()
        ]
        # Scores of results are float32: one of 0.3 must reach a threshold of 0.3.
        scored = [item for item in scored if np.float32(item[0]) >= np.float32(min_score)]
        scored.sort(key=lambda item: -item[0])
        return [_assembled(score, pieces) for score, pieces in scored[:max_instances]]


def _assembled(score: float, pieces: list[_Piece]) -> ImageInstance:
    """The object of some pieces: a tile decides its core, and others where it has no piece."""
    label, top, left = pieces[0].label, min(p.y for p in pieces), min(p.x for p in pieces)
    if len(pieces) == 1:
        return ImageInstance(label, score, (left, top), pieces[0].mask())
    bottom = max(p.y + p.size[0] for p in pieces)
    right = max(p.x + p.size[1] for p in pieces)
    whole = slice(top, bottom), slice(left, right)
    crop = np.zeros((bottom - top, right - left), dtype=bool)
    tiles: dict[Tile, np.ndarray] = {}
    for piece in pieces:
        box = shifted(piece.window, piece.tile.window)
        tiles.setdefault(piece.tile, np.zeros(piece.tile.size, dtype=bool))[box] |= piece.mask()
        crop[shifted(piece.window, whole)] |= piece.mask()
    for tile, mask in tiles.items():
        decided = intersection(tile.core, whole)
        crop[shifted(decided, whole)] = mask[shifted(decided, tile.window)]
    x, y, width, height = cv2.boundingRect(crop.view(np.uint8))
    tight = crop[y : y + height, x : x + width].copy()
    return ImageInstance(label, score, (left + x, top + y), tight)
