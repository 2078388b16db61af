"""Splits an image into tiles of one size that overlap.

    tile_grid((H, W), tile_size, overlap) → rows of `Tile`

Along each axis the tiles are spread evenly, so that all have the same size and neighbours overlap
by at least `overlap` pixels. A tile decides the pixels up to the middle of its overlaps: these
parts, its core, cover the image without overlap.

H W pixels of the image.
"""

from itertools import pairwise
from typing import NamedTuple

from .windows import Window


class Span(NamedTuple):
    """A tile along one axis, in pixels.

    Attributes:
        start, stop: what the tile covers.
        core_start, core_stop: its core.
    """

    start: int
    stop: int
    core_start: int
    core_stop: int

    @property
    def window(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def core(self) -> slice:
        return slice(self.core_start, self.core_stop)


class Tile(NamedTuple):
    """A tile at a place of the grid.

    Attributes:
        row, column: of the grid.
        y, x: what it covers down and across.
    """

    row: int
    column: int
    y: Span
    x: Span

    @property
    def window(self) -> Window:
        """Rows and columns of the image that the tile covers."""
        return self.y.window, self.x.window

    @property
    def core(self) -> Window:
        """Rows and columns of the image that the tile decides."""
        return self.y.core, self.x.core

    @property
    def size(self) -> tuple[int, int]:
        return self.y.stop - self.y.start, self.x.stop - self.x.start


def check_tile_size(tile_size: int, overlap: int, names: str = "tile_size and overlap") -> None:
    """Check the size of tiles.

    Raises:
        ValueError: a value is no whole number, a tile is empty, or so is what the overlaps leave.
    """
    for value in (tile_size, overlap):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{names} are {tile_size!r} and {overlap!r}; allowed: whole numbers")
    if tile_size < 1 or overlap < 0 or 2 * overlap > tile_size:
        raise ValueError(
            f"{names} are {tile_size} and {overlap}: the size must be at least 1, and the overlap "
            "from 0 to half of the size"
        )


def tile_spans(length: int, tile_size: int, overlap: int) -> list[Span]:
    """The tiles along an axis of `length` pixels; a single one if a tile covers it.

    Raises:
        ValueError: see `check_tile_size`.
    """
    check_tile_size(tile_size, overlap)
    if length <= tile_size:
        return [Span(0, length, 0, length)]
    num_steps = -(-(length - tile_size) // (tile_size - overlap))
    starts = [i * (length - tile_size) // num_steps for i in range(num_steps + 1)]
    # The middle of what two neighbours share.
    cuts = [0, *((after + before + tile_size) // 2 for before, after in pairwise(starts)), length]
    return [
        Span(start, start + tile_size, first, last)
        for start, (first, last) in zip(starts, pairwise(cuts), strict=True)
    ]


def tile_grid(image_size: tuple[int, int], tile_size: int, overlap: int) -> list[list[Tile]]:
    """The tiles of an image, row by row.

    Args:
        image_size: (H, W).
        tile_size: height and width of a tile in pixels; an axis shorter than it has one tile.
        overlap: pixels that neighbours share at least.

    Raises:
        ValueError: see `check_tile_size`.
    """
    rows, columns = (tile_spans(length, tile_size, overlap) for length in image_size)
    return [[Tile(i, j, y, x) for j, x in enumerate(columns)] for i, y in enumerate(rows)]
