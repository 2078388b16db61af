import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from mask2former.inference import InstanceMasks

# A corner of three pixels, nothing, and the pixel at column 3, row 1.
FULL = np.zeros((3, 3, 4), bool)
FULL[0, :2, 0] = FULL[0, 0, 1] = FULL[2, 1, 3] = True


def random_masks(size, density, number=4):
    return np.random.default_rng(0).random((number, *size)) < density


def official_rle(masks):
    return [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]


@pytest.mark.parametrize(
    "kind",
    [
        np.asarray,
        torch.from_numpy,
        lambda x: torch.tensor(x).float(),
        # Cut as on a GPU.
        lambda x: torch.tensor(x).bfloat16(),
    ],
)
def test_crops_are_tight(kind):
    masks = InstanceMasks.from_full(kind(FULL))
    assert masks.image_size == (3, 4)
    assert [crop.tolist() for crop in masks.crops] == [[[True, True], [True, False]], [], [[True]]]
    assert masks.offsets.tolist() == [[0, 0], [0, 0], [3, 1]]
    assert masks.areas().tolist() == [3, 0, 1]
    assert masks.boxes().tolist() == [[0, 0, 2, 2], [0, 0, 0, 0], [3, 1, 4, 2]]
    assert masks.boxes().dtype == np.float32
    np.testing.assert_array_equal(masks.full(), FULL)


def test_boxes_are_those_of_masks_in_crops_that_are_not_tight():
    crop = np.zeros((4, 5), bool)
    crop[1, 2] = True
    assert InstanceMasks([crop], [(10, 20)], (50, 60)).boxes().tolist() == [[12, 21, 13, 22]]


def test_selection():
    masks = InstanceMasks.from_full(FULL)
    np.testing.assert_array_equal(masks[2], FULL[2])
    np.testing.assert_array_equal(masks[-1], FULL[2])
    for index in ([2, 0], np.array([2, 0]), slice(None, None, -2)):
        np.testing.assert_array_equal(masks[index].full(), FULL[[2, 0]])
    np.testing.assert_array_equal(masks[np.array([True, False, True])].full(), FULL[[0, 2]])
    assert len(masks[[]]) == 0 and masks[[]].full().shape == (0, 3, 4)
    assert [mask.sum() for mask in masks] == [3, 0, 1]
    with pytest.raises(IndexError):
        masks[3]


def test_no_masks():
    masks = InstanceMasks.from_full(np.zeros((0, 3, 4), bool))
    assert len(masks) == 0 and masks.boxes().shape == (0, 4) and masks.areas().shape == (0,)
    assert masks.to_rle() == []
    assert InstanceMasks.from_rle([], (3, 4)).image_size == (3, 4)


def test_run_lengths_by_hand():
    # Columns: 2 of foreground and 1 not, 1 of foreground; then nothing.
    counts = [0, 2, 1, 1, 8]
    (rle,) = InstanceMasks.from_full(FULL[:1]).to_rle()
    assert rle["size"] == [3, 4]
    assert (
        rle["counts"]
        == coco_mask.frPyObjects({"size": [3, 4], "counts": counts}, 3, 4)["counts"].decode()
    )
    uncompressed = InstanceMasks.from_rle([{"size": [3, 4], "counts": counts}])
    np.testing.assert_array_equal(uncompressed.full(), FULL[:1])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 5), (60, 40)])
@pytest.mark.parametrize("density", [0, 0.02, 0.5, 0.98, 1])
def test_run_lengths_are_the_official_ones(size, density):
    full = random_masks(size, density)
    encoded = InstanceMasks.from_full(full).to_rle()
    official = official_rle(full)
    assert [x["counts"] for x in encoded] == [x["counts"].decode() for x in official]
    for rles in (encoded, official):
        np.testing.assert_array_equal(InstanceMasks.from_rle(rles).full(), full)


def test_large_image():
    """A full-size mask would take 400 MB."""
    crops = [np.ones((3, 2), bool), np.ones((1, 1), bool)]
    masks = InstanceMasks(crops, [(19_998, 19_997), (0, 0)], (20_000, 20_000))
    decoded = InstanceMasks.from_rle(masks.to_rle())
    assert decoded.offsets.tolist() == masks.offsets.tolist()
    assert [crop.shape for crop in decoded.crops] == [(3, 2), (1, 1)]
    assert decoded.areas().tolist() == coco_mask.area(masks.to_rle()).tolist() == [6, 1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (([np.ones((2, 2), bool)], [(3, 0)], (3, 4)), "is not inside the image of \\(3, 4\\)"),
        (([np.ones((2, 2))], [(0, 0)], (3, 4)), "crop 0 is float64 \\(2, 2\\); allowed: boolean"),
        (([np.ones((2, 2), bool)], [], (3, 4)), "1 crops need as many offsets"),
    ],
)
def test_wrong_crops(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        InstanceMasks(*arguments)


@pytest.mark.parametrize(
    ("encoded", "problem"),
    [
        ([{"size": [3, 4], "counts": [1, 2]}], "add up to 3, not to 3 x 4"),
        ([{"size": [3, 4], "counts": "~"}], "no COCO run lengths"),
        ([{"size": [3, 4], "counts": [12]}, {"size": [4, 3], "counts": [12]}], "one image size"),
        ([], "one image size"),
    ],
)
def test_wrong_run_lengths(encoded, problem):
    with pytest.raises(ValueError, match=problem):
        InstanceMasks.from_rle(encoded)


def test_masks_of_wrong_shape():
    with pytest.raises(ValueError, match=r"\(3, 4\); allowed: \(N, H, W\)"):
        InstanceMasks.from_full(FULL[0])
