"""Tiles against the whole image, with a "model" that returns the exact gt of each tile."""

import numpy as np
import pytest
import torch
from tile_scenes import GRASS, SIZE, SKY, ExactModel, make_scene

from mask2former.data.formats.windows import from_array
from mask2former.inference.tiled_model import LabelScores
from mask2former.inference.tiles import predict_tiles


def run(numbers, classes, tile_size, overlap, model=None, **options):
    image = from_array(np.stack([numbers, classes.astype(np.int32)], axis=2))
    return predict_tiles(model or ExactModel(), image, tile_size, overlap, **options)


def check_equal(found, numbers, classes):
    """Panoptic segments, instances and labels are those of the gt."""
    assert np.array_equal(found.semantic, classes)
    ids, segments = found.panoptic
    assert [s["id"] for s in segments] == [*range(1, len(segments) + 1)]
    gt = {}
    for number in np.unique(numbers[numbers > 0]):
        gt[f"thing {number}"] = numbers == number
    for label in (SKY, GRASS):
        if ((numbers == 0) & (classes == label)).any():
            gt[f"stuff {label}"] = (numbers == 0) & (classes == label)
    assert len(segments) == len(gt)
    for name, mask in gt.items():
        inside = np.unique(ids[mask])
        assert len(inside) == 1 and inside[0] > 0, name
        assert np.array_equal(ids == inside[0], mask), name
        segment = segments[inside[0] - 1]
        assert segment["category_id"] == classes[mask][0]
        assert segment["isthing"] == name.startswith("thing")
        assert segment["area"] == mask.sum()
        assert segment["score"] == pytest.approx(0.5)
    masks = {mask.tobytes() for mask in found.instances.masks.full()}
    assert masks == {mask.tobytes() for name, mask in gt.items() if name.startswith("thing")}
    assert len(found.instances) == len(masks)


@pytest.mark.parametrize(("tile_size", "overlap"), [(96, 32), (96, 16), (64, 32), (255, 100)])
def test_tiles_give_the_objects_of_the_whole_scene(tile_size, overlap):
    numbers, classes = make_scene()
    check_equal(run(numbers, classes, tile_size, overlap), numbers, classes)


def test_batches_of_tiles_give_the_same():
    numbers, classes = make_scene()
    model = ExactModel()
    check_equal(run(numbers, classes, 96, 32, model, batch_size=5), numbers, classes)
    assert [len(sizes) for sizes in model.sizes] == [5, 5, 5, 1]
    assert {size for sizes in model.sizes for size in sizes} == {(96, 96)}


def test_image_smaller_than_a_tile_is_one_tile():
    numbers, classes = make_scene()
    model = ExactModel()
    check_equal(run(numbers, classes, 1024, 256, model), numbers, classes)
    assert model.sizes == [[(SIZE, SIZE)]]


def test_one_row_left_over():
    numbers, classes = make_scene()
    model = ExactModel()
    check_equal(run(numbers[:129], classes[:129], 128, 32, model), numbers[:129], classes[:129])
    assert {size for sizes in model.sizes for size in sizes} == {(128, 128)}


def test_one_pixel():
    numbers, classes = np.ones((1, 1), np.int32), np.zeros((1, 1), np.uint8)
    check_equal(run(numbers, classes, 64, 16), numbers, classes)


def test_without_overlap_objects_are_not_joined():
    numbers, classes = make_scene([(0, slice(10, 20), slice(100, 150))])
    found = run(numbers, classes, 128, 0)
    assert [s["category_id"] for s in found.panoptic[1] if s["isthing"]] == [0, 0]
    assert len(found.instances) == 2
    assert np.array_equal(found.semantic, classes)


@pytest.mark.parametrize("overlap", [96, 49, -1])
def test_overlap_of_more_than_half_a_tile_is_refused(overlap):
    numbers, classes = make_scene()
    with pytest.raises(ValueError, match=f"tile_size and overlap are 96 and {overlap}: .*half"):
        run(numbers, classes, 96, overlap)


def test_nothing_predicted():
    def nothing(numbers, classes):
        return numbers * 0, classes * 0  # class 0 is a thing: no stuff, no object

    numbers, classes = make_scene()
    found = run(numbers, classes, 96, 32, ExactModel(nothing))
    assert found.panoptic[1] == [] and not found.panoptic[0].any()
    assert len(found.instances) == 0 and found.instances.masks.full().shape == (0, SIZE, SIZE)


def test_tiles_without_objects_beside_others():
    numbers, classes = make_scene([(0, slice(0, 3), slice(0, 3))])
    check_equal(run(numbers, classes, 64, 16), numbers, classes)


def test_more_objects_than_queries():
    objects = [
        (i % 4, slice(y, y + 5), slice(x, x + 5))
        for i, (y, x) in enumerate((y, x) for y in range(0, 250, 7) for x in range(0, 250, 7))
    ]
    assert len(objects) == 1296
    numbers, classes = make_scene(objects)
    found = run(numbers, classes, 64, 16)
    ids, segments = found.panoptic
    assert sorted(s["area"] for s in segments if s["isthing"]) == [25] * 1296
    # Each object has one id, and each id is of one object.
    pairs = np.unique(np.stack([ids[numbers > 0], numbers[numbers > 0]]), axis=1)
    assert pairs.shape == (2, 1296) and len(np.unique(pairs[0])) == 1296
    assert found.instances.masks.areas().tolist() == [25] * 1296
    assert len(np.unique(found.instances.masks.boxes(), axis=0)) == 1296


def test_only_the_best_instances():
    numbers, classes = make_scene()
    found = run(numbers, classes, 96, 32, max_instances=3)
    assert len(found.instances) == 3


def test_an_object_that_its_own_tile_misses_comes_from_the_other():
    """Both tiles see the object from column 100 on; the first decides up to 128, and misses it."""
    numbers, classes = make_scene([(0, slice(10, 20), slice(110, 140))])

    def miss(numbers, classes):
        if not numbers[:, :60].any():  # the first tile sees it at its right border
            numbers[...], classes[classes == 0] = 0, 0
        return numbers, classes

    # Columns 0 to 159 and 96 to 255.
    found = run(numbers, classes, 160, 64, ExactModel(miss))
    (thing,) = [s for s in found.panoptic[1] if s["isthing"]]
    assert np.array_equal(found.panoptic[0] == thing["id"], numbers == 1)
    assert np.array_equal(found.instances.masks.full(), numbers[None] == 1)


def test_a_fragment_at_a_border_is_not_an_object_of_its_own():
    """The first tile sees 8 columns of an object, and finds 3 of them: IoU 3/8 with the second."""
    numbers, classes = make_scene([(0, slice(10, 30), slice(152, 200))], 256)

    def shrink(numbers, classes):
        # The object touches the right border of the first tile, columns 0 to 159.
        if numbers[:, -1].any() and not numbers[:, 64:100].any():
            gone = numbers > 0
            gone[:, -3:] = False
            numbers[gone] = 0
            classes[gone] = 0
        return numbers, classes

    found = run(numbers, classes, 160, 64, ExactModel(shrink))
    things = [s for s in found.panoptic[1] if s["isthing"]]
    assert len(things) == 1
    assert np.array_equal(found.panoptic[0] == things[0]["id"], numbers == 1)
    assert np.array_equal(found.instances.masks.full(), numbers[None] == 1)


def test_scores_of_instances_are_means_over_their_pixels():
    numbers, classes = make_scene([(0, slice(0, 10), slice(100, 200))])

    class Unsure(ExactModel):
        def predict(self, numbers, classes):
            output = super().predict(numbers, classes)
            # The first tile, columns 0 to 159, sees 60 columns, the second, from 96, all 100.
            output["instances"].scores[:] = 0.9 if numbers[0, -1] else 0.1
            return output

    found = run(numbers, classes, 160, 64, Unsure())
    assert found.instances.scores.tolist() == pytest.approx([0.4])  # (60 * 0.9 + 100 * 0.1) / 160
    assert len(run(numbers, classes, 160, 64, Unsure(), min_score=0.39).instances) == 1
    assert len(run(numbers, classes, 160, 64, Unsure(), min_score=0.41).instances) == 0


def test_semantic_scores_fade_into_each_other():
    """Two tiles that contradict each other: the border is where both weights are one half."""

    def one_class(tiles):
        scores = torch.zeros(2, 1, tiles[0].shape[0], tiles[0].shape[1])
        # Tiles say class 0 with 0.75 and class 1 with 1, depending on where they start.
        label = int(tiles[0][0, 0, 0] > 0)
        scores[label] = (0.75, 1.0)[label]
        return [{"sem_seg": scores[:, 0]}]

    columns = np.broadcast_to(np.arange(24, dtype=np.uint8)[:, None], (4, 24, 1))
    found = predict_tiles(one_class, from_array(columns), 16, 8)
    # Tiles 0 to 15 and 8 to 23 fade within columns 8 to 15: the weight of the second at column
    # 8 + i is (i + 0.5) / 8 = w, and 1 * w > 0.75 * (1 - w) from i = 3 on (w > 3 / 7).
    assert found.semantic.tolist() == [[0] * 11 + [1] * 13] * 4


def test_label_scores_are_read_as_scores():
    labels = np.array([[0, 2]], np.uint8)
    scores = LabelScores(labels, 3)
    assert scores.shape == (3, 1, 2) and len(scores.shape) == 3
    assert scores.argmax(dim=0).tolist() == [[0, 2]]
    with pytest.raises(ValueError, match="dim 1"):
        scores.argmax(dim=1)
