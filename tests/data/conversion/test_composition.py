"""What is on top of what, with areas and boxes worked by hand.

Images are 8 x 6 pixels (width x height).
"""

import numpy as np
import pytest

from mask2former.data.conversion.composition import PlacedObject, Rules, compose
from mask2former.data.formats.annotated_images import rle_of_mask

SIZE = (6, 8)
CAR, CUP, ROAD, SKY = 3, 7, 10, 11
# Left half sky, right half road.
LABELS = np.repeat([[0, 0, 0, 0, 1, 1, 1, 1]], 6, axis=0).astype(np.uint8)
STUFF = {0: SKY, 1: ROAD}


def square(x, y, side):
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def car(key, x, y, side, **others):
    return PlacedObject(key, CAR, square(x, y, side), **others)


def shown(image):
    """(category, area, box, crowd) of each segment, after checking them against the ids."""
    present = set(np.unique(image.ids).tolist()) - {0}
    assert [s["id"] for s in image.segments] == list(dict.fromkeys(s["id"] for s in image.segments))
    assert {s["id"] for s in image.segments} == present
    for segment in image.segments:
        rows, columns = np.nonzero(image.ids == segment["id"])
        x, y, width, height = segment["bbox"]
        assert segment["area"] == len(rows)
        assert (x, y) == (columns.min(), rows.min())
        assert (width, height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)
        assert 0 < segment["id"] < 1 << 24
    return [(s["category_id"], s["area"], s["bbox"], s["iscrowd"]) for s in image.segments]


# 16 pixels, and 9 pixels of which 4 are in both.
LARGE, SMALL = car("large", 0, 0, 4), car("small", 2, 2, 3)
SMALL_ON_TOP = [(CAR, 12, [0, 0, 4, 4], 0), (CAR, 9, [2, 2, 3, 3], 0)]
LARGE_ON_TOP = [(CAR, 5, [2, 2, 3, 3], 0), (CAR, 16, [0, 0, 4, 4], 0)]


@pytest.mark.parametrize(
    "overlap, objects, expected",
    [
        ("area", [LARGE, SMALL], SMALL_ON_TOP),
        ("area", [SMALL, LARGE], SMALL_ON_TOP),
        ("order", [LARGE, SMALL], SMALL_ON_TOP),
        ("order", [SMALL, LARGE], LARGE_ON_TOP),
    ],
)
def test_overlap(overlap, objects, expected):
    image = compose(SIZE, objects, Rules(overlap))
    assert shown(image) == expected
    assert image.ids.dtype == np.int32 and image.ids[5, 7] == 0
    assert image.hidden == image.empty == image.small == []


def test_later_of_equal_area_is_on_top():
    image = compose(SIZE, [car(1, 0, 0, 2), car(2, 1, 0, 2)], Rules("area"))
    assert shown(image) == [(CAR, 2, [0, 0, 1, 2], 0), (CAR, 4, [1, 0, 2, 2], 0)]


def test_area_is_that_of_the_mask():
    """A frame is smaller than what it surrounds, though its box is larger."""
    frame = np.zeros(SIZE, bool)
    frame[0, :6] = frame[:5, 0] = True  # 10 pixels
    inside = car("inside", 0, 0, 4)  # 16, of which the frame covers 7
    image = compose(SIZE, [PlacedObject("frame", CUP, rle_of_mask(frame)), inside], Rules("area"))
    assert shown(image) == [(CAR, 9, [1, 1, 3, 3], 0), (CUP, 10, [0, 0, 6, 5], 0)]


@pytest.mark.parametrize("overlap", ["area", "order"])
def test_crowds_are_below_objects_and_one_segment(overlap):
    objects = [
        car("object", 0, 0, 2),
        car("crowd", 1, 0, 1, is_crowd=True),  # smaller and later, but below
        car("other crowd", 6, 4, 2, is_crowd=True),
        PlacedObject("crowd of cups", CUP, square(2, 0, 2), True),
    ]
    image = compose(SIZE, objects, Rules(overlap))
    assert sorted(shown(image)) == [
        (CAR, 4, [0, 0, 2, 2], 0),
        (CAR, 4, [6, 4, 2, 2], 1),
        (CUP, 4, [2, 0, 2, 2], 1),
    ]
    # The crowd as a whole is visible.
    assert image.hidden == []


def test_stuff_is_below_things():
    labels = LABELS.copy()
    labels[5, 7] = 255
    image = compose(SIZE, [LARGE], Rules(stuff=STUFF, void=frozenset({255})), labels)
    assert shown(image) == [
        (SKY, 8, [0, 4, 4, 2], 0),
        (ROAD, 23, [4, 0, 4, 6], 0),
        (CAR, 16, [0, 0, 4, 4], 0),
    ]
    assert image.ids[5, 7] == 0


def test_objects_of_stuff():
    """A road drawn as polygons is one segment, with that of the label map, below crowds."""
    objects = [
        PlacedObject(1, ROAD, square(0, 0, 2)),
        PlacedObject(2, ROAD, square(1, 0, 2)),
        car(3, 0, 0, 1, is_crowd=True),
    ]
    rules = Rules(stuff_ids=frozenset({ROAD, SKY}))
    road = (ROAD, 5, [0, 0, 3, 2], 0)
    assert shown(compose(SIZE, objects, rules)) == [road, (CAR, 1, [0, 0, 1, 1], 1)]
    rules = Rules(stuff_ids=frozenset({ROAD, SKY}), stuff=STUFF)
    assert shown(compose(SIZE, objects, rules, LABELS)) == [
        (SKY, 18, [0, 0, 4, 6], 0),
        (ROAD, 29, [0, 0, 8, 6], 0),
        (CAR, 1, [0, 0, 1, 1], 1),
    ]


def test_things_without_object():
    """Label 1 is a car: 24 pixels, of which an object covers 4."""
    rules = {"stuff": {0: SKY}, "things": {1: CAR}}
    image = compose(SIZE, [car(1, 3, 0, 2)], Rules(**rules), LABELS)
    assert shown(image) == [(SKY, 22, [0, 0, 4, 6], 0), (CAR, 4, [3, 0, 2, 2], 0)]
    assert image.unassigned == {CAR: 22}
    objects = [car(1, 3, 0, 2), car(2, 6, 4, 2, is_crowd=True)]
    image = compose(SIZE, objects, Rules(**rules, unassigned="crowd"), LABELS)
    assert shown(image) == [
        (SKY, 22, [0, 0, 4, 6], 0),
        (CAR, 22, [4, 0, 4, 6], 1),
        (CAR, 4, [3, 0, 2, 2], 0),
    ]
    assert image.unassigned == {CAR: 18}
    assert compose(SIZE, [], Rules(stuff=STUFF), LABELS).unassigned == {}


def test_background():
    image = compose(SIZE, [LARGE], Rules(background=SKY))
    assert shown(image) == [(SKY, 32, [0, 0, 8, 6], 0), (CAR, 16, [0, 0, 4, 4], 0)]


def test_hidden_and_empty_objects():
    """They have no segment, and are listed."""
    outside = PlacedObject("outside", CAR, square(20, 20, 2))
    objects = [SMALL, car("hidden", 3, 3, 1), LARGE, outside]
    image = compose(SIZE, objects, Rules("order"))
    assert shown(image) == LARGE_ON_TOP
    assert image.hidden == ["hidden"] and image.empty == ["outside"] and image.small == []
    everything = PlacedObject("all", CUP, square(0, 0, 9))
    image = compose(SIZE, [LARGE, car("crowd", 0, 0, 2, is_crowd=True), everything], Rules("order"))
    assert shown(image) == [(CUP, 48, [0, 0, 8, 6], 0)]
    assert image.hidden == ["crowd", "large"]


def test_smallest_visible_area():
    objects = [SMALL, car("one pixel", 7, 5, 1), LARGE]
    assert shown(compose(SIZE, objects, Rules("order"))) == [
        LARGE_ON_TOP[0],
        (CAR, 1, [7, 5, 1, 1], 0),
        LARGE_ON_TOP[1],
    ]
    image = compose(SIZE, objects, Rules("order", min_area=5))
    assert shown(image) == LARGE_ON_TOP and image.small == ["one pixel"]
    image = compose(SIZE, objects, Rules("order", min_area=6))
    assert shown(image) == LARGE_ON_TOP[1:]
    assert image.small == ["small", "one pixel"] and image.ids[4, 4] == 0


def test_image_of_one_pixel():
    image = compose((1, 1), [car(1, 0, 0, 1)], Rules())
    assert shown(image) == [(CAR, 1, [0, 0, 1, 1], 0)]


def test_image_without_objects():
    image = compose(SIZE, [], Rules())
    assert image.segments == [] and not image.ids.any()


def test_many_segments_have_distinct_ids():
    size = (20, 30)
    objects = [PlacedObject(i, CAR, square(i % 30, i // 30, 1)) for i in range(size[0] * size[1])]
    image = compose(size, objects, Rules())
    assert len(np.unique(image.ids)) == len(image.segments) == 600


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32])
def test_refused_label_maps(kind):
    with pytest.raises(ValueError, match="is 8 x 5 pixels, but its image 8 x 6"):
        compose(SIZE, [], Rules(stuff=STUFF), LABELS[:5].astype(kind))
    labels = LABELS.astype(kind)
    labels[0, :2] = 9, 200
    with pytest.raises(ValueError, match="has labels that are .* nor ignored: 9, 200$"):
        compose(SIZE, [], Rules(stuff=STUFF), labels)
