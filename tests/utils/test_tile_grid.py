import pytest

from mask2former.utils.tile_grid import Span, tile_grid, tile_spans


def test_tiles_are_spread_evenly_and_cores_meet_in_the_middle_of_overlaps():
    # Steps of at most 100 - 20 = 80 pixels: 3 steps of 200 / 3.
    assert tile_spans(300, 100, 20) == [
        Span(0, 100, 0, 83),
        Span(66, 166, 83, 149),
        Span(133, 233, 149, 216),
        Span(200, 300, 216, 300),
    ]


@pytest.mark.parametrize("length", [1, 99, 100])
def test_an_axis_within_a_tile_has_one(length):
    assert tile_spans(length, 100, 20) == [Span(0, length, 0, length)]


def test_one_pixel_left_over():
    assert tile_spans(101, 100, 0) == [Span(0, 100, 0, 50), Span(1, 101, 50, 101)]


@pytest.mark.parametrize("overlap", [0, 7, 32])
@pytest.mark.parametrize("length", [65, 127, 128, 129, 1000])
def test_cores_cover_the_axis_once_and_neighbours_overlap_enough(length, overlap):
    spans = tile_spans(length, 64, overlap)
    assert [x for span in spans for x in range(span.core_start, span.core_stop)] == list(
        range(length)
    )
    for before, after in zip(spans, spans[1:], strict=False):
        assert before.stop - after.start >= overlap
    assert all(span.start <= span.core_start < span.core_stop <= span.stop for span in spans)


def test_grid_in_row_order():
    grid = tile_grid((100, 250), 100, 50)
    assert [[(t.row, t.column) for t in row] for row in grid] == [[(0, j) for j in range(4)]]
    assert grid[0][3].window == (slice(0, 100), slice(150, 250))


@pytest.mark.parametrize(("size", "overlap"), [(64, 64), (64, 33), (0, 0), (64, -1)])
def test_overlaps_of_more_than_half_a_tile_are_refused(size, overlap):
    with pytest.raises(ValueError, match=f"tile_size and overlap are {size} and {overlap}"):
        tile_grid((300, 300), size, overlap)
