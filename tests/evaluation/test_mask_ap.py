"""The compiled evaluation gives pycocotools' arrays bit by bit, on random annotation.

Truth has polygons, compressed and plain run lengths, crowds, `ignore` flags, images without
objects, a class without objects, and areas on the boundaries of the size ranges. Predictions have
equal scores, wrong classes, empty masks and images without any.
"""

import contextlib
import copy
import io
import logging

import numpy as np
import pytest
from detectron2.evaluation.coco_evaluation import COCOevalMaxDets
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mask2former.evaluation.mask_ap import evaluate_masks

CLASS_IDS = [3, 4, 11, 17, 90]
ABSENT = 17


def encode(mask):
    rle = mask_util.encode(np.asfortranarray(mask))
    return rle | {"counts": rle["counts"].decode()}


def rectangle(random, height, width):
    mask = np.zeros((height, width), dtype=np.uint8)
    top, left = random.integers(height - 4), random.integers(width - 4)
    mask[top : top + random.integers(1, height), left : left + random.integers(1, width)] = 1
    return mask


def random_object(random, height, width):
    """A true mask and how its annotation writes it."""
    kind = random.choice(["polygons", "compressed", "plain"])
    if kind == "polygons":
        # Corners also lie outside of the image.
        corners = (random.random((random.integers(1, 3), 6, 2)) * 1.2 - 0.1) * [width, height]
        polygons = corners.round(random.integers(3)).reshape(len(corners), -1).tolist()
        merged = mask_util.merge(mask_util.frPyObjects(polygons, height, width))
        return mask_util.decode(merged), polygons
    mask = rectangle(random, height, width)
    if random.random() < 0.4:
        # 32 x 32 and 96 x 96 pixels are the limits of the size ranges.
        side = random.choice([32, 96])
        mask[:] = 0
        mask[:side, :side] = 1
    if kind == "compressed":
        return mask, encode(mask)
    column_by_column = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(column_by_column, prepend=0))
    counts = np.diff(changes, prepend=0, append=mask.size).tolist()
    return mask, {"size": [height, width], "counts": counts}


def random_annotation(seed, num_images=5, most_results=30):
    """Truth in COCO's format and results."""
    random = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    for image_id in random.permutation(1000)[:num_images].tolist():
        height, width = random.integers(20, 140, size=2).tolist()
        images.append({"id": image_id, "height": height, "width": width})
        objects = []
        for _ in range(random.integers(7)):
            mask, segmentation = random_object(random, height, width)
            class_id = int(random.choice([c for c in CLASS_IDS if c != ABSENT]))
            area = int(mask.sum())
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": class_id,
                "segmentation": segmentation,
                "area": random.choice([1024.0, 9216.0]) if random.random() < 0.1 else area,
                "iscrowd": int(random.random() < 0.2),
                "bbox": mask_util.toBbox(encode(mask)).tolist(),
            }
            annotations.append(annotation | ({"ignore": 1} if random.random() < 0.1 else {}))
            objects.append((class_id, mask))
        for _ in range(random.integers(most_results) if random.random() < 0.85 else 0):
            class_id, mask = int(random.choice(CLASS_IDS)), rectangle(random, height, width)
            if objects and random.random() < 0.7:
                true_class, mask = objects[random.integers(len(objects))]
                mask = np.roll(mask, random.integers(-3, 4, size=2), axis=(0, 1))
                mask = mask * np.uint8(random.random() < 0.95)
                class_id = true_class if random.random() < 0.8 else class_id
            results.append(
                {
                    "image_id": image_id,
                    "category_id": class_id,
                    "score": random.integers(1, 9) / 8,
                    "segmentation": encode(mask),
                }
            )
    random.shuffle(results)
    categories = [{"id": class_id, "name": str(class_id)} for class_id in CLASS_IDS]
    truth = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    return truth, results


def load(truth):
    coco = COCO()
    coco.dataset = copy.deepcopy(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def official(truth, results, kind=COCOeval, **params):
    """What a direct call of pycocotools gives."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = load(truth)
        evaluation = kind(truth, truth.loadRes(copy.deepcopy(results)), "segm")
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def assert_equal(found, expected):
    for name in ("precision", "recall", "scores"):
        assert found.eval[name].dtype == expected.eval[name].dtype == np.float64
        np.testing.assert_array_equal(found.eval[name], expected.eval[name], strict=True)


def summary(evaluation):
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("seed", range(8))
def test_random_annotation(seed):
    truth, results = random_annotation(seed)
    found, expected = evaluate_masks(load(truth), results), official(truth, results)
    assert_equal(found, expected)
    np.testing.assert_array_equal(summary(found), summary(expected))
    assert 0 < found.stats[0] < 1
    assert list(found.params.catIds) == list(expected.params.catIds) == CLASS_IDS
    absent = found.eval["precision"][:, :, CLASS_IDS.index(ABSENT)]
    assert (absent == -1).all()


@pytest.mark.parametrize("seed", range(2))
def test_more_results_than_count(seed):
    truth, results = random_annotation(seed, num_images=2, most_results=600)
    found, expected = evaluate_masks(load(truth), results), official(truth, results)
    assert_equal(found, expected)
    np.testing.assert_array_equal(summary(found), summary(expected))


@pytest.mark.parametrize("seed", range(2))
def test_other_limit_of_results(seed):
    truth, results = random_annotation(seed, num_images=2, most_results=150)
    found = evaluate_masks(load(truth), results, max_dets=[1, 10, 40])
    expected = official(truth, results, COCOevalMaxDets, maxDets=[1, 10, 40])
    assert_equal(found, expected)
    np.testing.assert_array_equal(summary(found), summary(expected))
    assert found.stats[0] > 0


@pytest.mark.parametrize("seed", range(4))
def test_classes_that_do_not_count(seed):
    truth, results = random_annotation(seed)
    found = evaluate_masks(load(truth), results, use_cats=False, max_dets=[20])
    expected = official(truth, results, useCats=0, maxDets=[20])
    assert_equal(found, expected)
    assert found.params.catIds == expected.params.catIds == [-1]


def test_some_of_the_images():
    truth, results = random_annotation(0)
    image_ids = [image["id"] for image in truth["images"]][1:4]
    found = evaluate_masks(load(truth), results, img_ids=[*image_ids, image_ids[0]])
    assert_equal(found, official(truth, results, imgIds=image_ids))
    whole = evaluate_masks(load(truth), results)
    assert (whole.eval["precision"] != found.eval["precision"]).any()


def test_ids_of_any_kind():
    truth, results = random_annotation(1)
    for image in truth["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in [*truth["annotations"], *results]:
        annotation["image_id"] = f"image {annotation['image_id']}"
    for category in truth["categories"]:
        category["id"] -= 50
    for annotation in [*truth["annotations"], *results]:
        annotation["category_id"] -= 50
    for annotation in truth["annotations"]:
        annotation["id"] *= -1
    assert_equal(evaluate_masks(load(truth), results), official(truth, results))


def test_results_of_unknown_classes():
    truth, results = random_annotation(2)
    for result in results[::3]:
        result["category_id"] = 1000
    assert_equal(evaluate_masks(load(truth), results), official(truth, results))
    for result in results:
        result["category_id"] = 1000
    assert_equal(evaluate_masks(load(truth), results), official(truth, results))


@pytest.mark.parametrize("use_fast_impl", [True, False])
def test_input_is_not_changed(use_fast_impl):
    truth, results = random_annotation(3)
    expected = official(truth, results)
    # Boxes must not give the areas.
    results = [result | {"bbox": [0, 0, 0, 0]} for result in results]
    before = copy.deepcopy(results)
    loaded = load(truth)
    for _ in range(2):
        found = evaluate_masks(loaded, results, use_fast_impl=use_fast_impl)
        assert_equal(found, expected)
    assert results == before


def test_truth_that_pycocotools_has_used():
    """It writes run lengths over polygons."""
    truth, results = random_annotation(4)
    loaded = load(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = evaluate_masks(loaded, results, use_fast_impl=False)
    assert_equal(evaluate_masks(loaded, results), expected)


@pytest.mark.parametrize("case", ["id 0", "NaN"])
def test_input_left_to_pycocotools(case, caplog):
    truth, results = random_annotation(5)
    if case == "id 0":
        for annotation in truth["annotations"]:
            annotation["id"] -= 1
        reason = "an annotation has the id 0"
    else:
        results[0]["score"] = float("nan")
        reason = "a score is not a number"
    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluate_masks(load(truth), results)
    assert_equal(found, official(truth, results))
    assert f"evaluated by pycocotools, which takes longer: {reason}" in caplog.text


def test_polygon_that_pycocotools_refuses():
    truth, results = random_annotation(6)
    truth["annotations"][0]["segmentation"] = [[1.0, 2.0, 3.0, 4.0]]
    for evaluate in (official, lambda truth, results: evaluate_masks(load(truth), results)):
        with pytest.raises(TypeError):
            evaluate(truth, results)


def test_which_one_is_logged(caplog):
    truth, results = random_annotation(7)
    with caplog.at_level(logging.INFO, logger="mask2former.evaluation.mask_ap"):
        evaluate_masks(load(truth), results)
    assert "by hotcoco" in caplog.text


@pytest.mark.parametrize("use_fast_impl", [True, False])
def test_image_that_the_truth_does_not_list(use_fast_impl):
    truth, results = random_annotation(8)
    results[0]["image_id"] = 4000
    with pytest.raises(ValueError, match=r"1 images that the truth does not list: \[4000\]"):
        evaluate_masks(load(truth), results, use_fast_impl=use_fast_impl)
