"""What the readers of drawn shapes share: patches of masks, clipping, curves, order."""

import math

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from dataset_trees import photograph

from mask2former.data.formats.drawings import (
    Drawings,
    clip_polygon,
    ellipse,
    rectangle,
    rle_of_patch,
    rotate,
)


def pixels(polygon, height=8, width=12):
    return mask_utils.decode(mask_utils.frPyObjects([polygon], height, width))[..., 0]


def test_rle_of_patch_is_the_encoding_of_the_whole_mask():
    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width, patch_height, patch_width = rng.integers(1, 9, 4).tolist()
        left, top = int(rng.integers(-7, width)), int(rng.integers(-7, height))
        if left + patch_width <= 0 or top + patch_height <= 0:
            continue
        patch = rng.random((patch_height, patch_width)) < rng.choice([0.2, 0.5, 0.9, 1])
        canvas = np.zeros((40, 40), bool)
        canvas[top + 10 : top + 10 + patch_height, left + 10 : left + 10 + patch_width] = patch
        mask = canvas[10 : 10 + height, 10 : 10 + width]
        rle = rle_of_patch(patch, (left, top), (height, width))
        expected = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert rle == {"size": [height, width], "counts": expected["counts"].decode()}


@pytest.mark.parametrize(
    ("polygon", "clipped"),
    [
        ([1, 1, 5, 1, 5, 5], [1, 1, 5, 1, 5, 5]),
        (rectangle(-5, -5, 4, 4), rectangle(0, 0, 4, 4)),
        (rectangle(-5, -5, 50, 50), rectangle(0, 0, 12, 8)),
        # The edge meets the border at y 4, where moving the corner to the border would not.
        ([0, 0, 24, 8, 0, 8], [0, 0, 12, 4, 12, 8, 0, 8]),
        (rectangle(-5, 1, -1, 3), []),
        (rectangle(12, 1, 14, 3), []),
        (rectangle(13, 9, 14, 10), []),
    ],
)
def test_clip_polygon(polygon, clipped):
    result = clip_polygon(polygon, (8, 12))
    if clipped:
        assert (pixels(result) == pixels(clipped)).all()
        assert min(result) >= 0
        assert max(result[::2]) <= 12
        assert max(result[1::2]) <= 8
    else:
        assert result == []


def test_ellipse_and_rotate():
    points = np.array(ellipse(50, 40, 30, 10, math.pi / 6)).reshape(-1, 2) - (50, 40)
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    along, across = points @ (cos, sin), points @ (-sin, cos)
    np.testing.assert_allclose((along / 30) ** 2 + (across / 10) ** 2, 1, rtol=1e-9)
    assert len(ellipse(0, 0, 1000, 1000)) > len(ellipse(0, 0, 1, 1)) >= 24
    np.testing.assert_allclose(
        rotate(rectangle(0, 0, 4, 2), math.pi / 2), [3, -1, 3, 3, 1, 3, 1, -1], atol=1e-9
    )


def test_order_and_polygons_of_an_object(tmp_path):
    """Objects are ordered within their image; parts of polygons stay polygons."""
    drawings = Drawings("test")
    images = []
    for name in ("a", "b"):
        photograph(tmp_path / f"{name}.jpg")
        images.append(drawings.add_image(tmp_path / f"{name}.jpg", name))
    for i, (image, order, group) in enumerate(
        ((0, 2, None), (1, 0, 5), (0, 1, 5), (1, 0, 5), (0, 1, 5), (0, 0, None))
    ):
        drawings.add_polygon(
            images[image], "cup", rectangle(i, 0, i + 1, 1), "f", i, group=group, order=order
        )
    first, second = drawings.finish(["cup"]).images
    lefts = [[part[0] for part in item.segmentation] for item in first.objects]
    assert lefts == [[5], [2, 4], [0]]
    assert [[part[0] for part in item.segmentation] for item in second.objects] == [[1, 3]]


def test_all_problems_are_collected(tmp_path):
    drawings = Drawings("test")
    assert drawings.add_image(tmp_path / "absent.jpg", "list.txt", "line 1") is None
    photograph(tmp_path / "a.jpg")
    image = drawings.add_image(tmp_path / "a.jpg", "list.txt", "line 2")
    drawings.add_polygon(image, "cup", [1, 1, math.inf, 1, 5, 5], "a.txt", "line 1")
    with pytest.raises(
        FileNotFoundError,
        match=r"absent\.jpg does not exist \(an image of list\.txt, line 1\)\. There are 2 prob",
    ):
        drawings.finish(["cup"])


def test_image_can_be_used(tmp_path):
    """Rectangles among other shapes are masks; alone they are boxes of detection data."""
    photograph(tmp_path / "a.jpg")
    for others, boxes_as_masks in ((True, False), (False, True)):
        drawings = Drawings("test")
        image = drawings.add_image(tmp_path / "a.jpg", "f")
        drawings.add_polygon(image, "cup", rectangle(0, 0, 2, 2), "f", 0, is_box=True)
        if others:
            drawings.add_polygon(image, "cup", [0, 0, 4, 0, 4, 4], "f", 1)
        (result,) = drawings.finish(["cup"], boxes_as_masks=boxes_as_masks).images
        assert len(result.objects) == 1 + others
