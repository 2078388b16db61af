import numpy as np

from mask2former.utils.instance_masks import InstanceMasks
from mask2former.utils.windows import intersection, shifted


def window(top, bottom, left, right):
    return slice(top, bottom), slice(left, right)


def test_what_two_windows_share_and_where_it_is_in_them():
    first, second = window(2, 6, 1, 9), window(4, 8, 3, 5)
    shared = intersection(first, second)
    assert shared == intersection(second, first) == window(4, 6, 3, 5)
    assert shifted(shared, first) == window(2, 4, 2, 4)
    assert shifted(shared, second) == window(0, 2, 0, 2)


def test_every_pair_of_windows_of_a_small_image():
    spans = [(start, stop) for start in range(4) for stop in range(start, 4)]
    windows = [window(*rows, *columns) for rows in spans for columns in spans]
    pixels = np.arange(9).reshape(3, 3)
    for first in windows:
        for second in windows:
            shared = intersection(first, second)
            expected = np.intersect1d(pixels[first], pixels[second])
            assert pixels[shared].reshape(-1).tolist() == expected.tolist()
            for own in (first, second):
                assert np.array_equal(pixels[own][shifted(shared, own)], pixels[shared])


def test_windows_of_crops():
    mask = np.zeros((2, 6, 8), bool)
    mask[0, 2:5, 3:7] = True
    masks = InstanceMasks.from_full(mask)
    assert masks.window(0) == masks.window(-2) == window(2, 5, 3, 7)
    assert mask[1][masks.window(1)].size == 0  # without pixels
