"""The compiled evaluation equals pycocotools bit by bit on random annotations.

The ground truth has polygons, compressed and plain run lengths, crowds, `ignore` flags, images
without objects, a class without objects, and areas on the limits of the size ranges. Predictions
have equal scores, wrong classes, empty masks and images without any.
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
    """A gt mask and its `segmentation` entry."""
    kind = random.choice(["polygons", "compressed", "plain"])
    if kind == "polygons":
        # Some corners lie outside the image.
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
    columns = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(columns, prepend=0))
    counts = np.diff(changes, prepend=0, append=mask.size).tolist()
    return mask, {"size": [height, width], "counts": counts}


def random_annotation(seed, num_images=5, max_results=30):
    """Ground gt and results in the COCO formats."""
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
        for _ in range(random.integers(max_results) if random.random() < 0.85 else 0):
            class_id, mask = int(random.choice(CLASS_IDS)), rectangle(random, height, width)
            if objects and random.random() < 0.7:
                gt_class, mask = objects[random.integers(len(objects))]
                mask = np.roll(mask, random.integers(-3, 4, size=2), axis=(0, 1))
                mask = mask * np.uint8(random.random() < 0.95)
                class_id = gt_class if random.random() < 0.8 else class_id
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
    gt = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    return gt, results


def load(gt):
    coco = COCO()
    coco.dataset = copy.deepcopy(gt)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def official(gt, results, kind=COCOeval, **params):
    """Call pycocotools directly."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = load(gt)
        evaluation = kind(gt, gt.loadRes(copy.deepcopy(results)), "segm")
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def assert_equal(ours, expected):
    for name in ("precision", "recall", "scores"):
        assert ours.eval[name].dtype == expected.eval[name].dtype == np.float64
        np.testing.assert_array_equal(ours.eval[name], expected.eval[name], strict=True)


def summary(evaluation):
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("seed", range(8))
def test_random_annotation(seed):
    gt, results = random_annotation(seed)
    ours, expected = evaluate_masks(load(gt), results), official(gt, results)
    assert_equal(ours, expected)
    np.testing.assert_array_equal(summary(ours), summary(expected))
    assert 0 < ours.stats[0] < 1
    assert list(ours.params.catIds) == list(expected.params.catIds) == CLASS_IDS
    absent = ours.eval["precision"][:, :, CLASS_IDS.index(ABSENT)]
    assert (absent == -1).all()


@pytest.mark.parametrize("seed", range(2))
def test_more_results_than_max_dets(seed):
    gt, results = random_annotation(seed, num_images=2, max_results=600)
    ours, expected = evaluate_masks(load(gt), results), official(gt, results)
    assert_equal(ours, expected)
    np.testing.assert_array_equal(summary(ours), summary(expected))


@pytest.mark.parametrize("seed", range(2))
def test_other_max_dets(seed):
    gt, results = random_annotation(seed, num_images=2, max_results=150)
    ours = evaluate_masks(load(gt), results, max_dets=[1, 10, 40])
    expected = official(gt, results, COCOevalMaxDets, maxDets=[1, 10, 40])
    assert_equal(ours, expected)
    np.testing.assert_array_equal(summary(ours), summary(expected))
    assert ours.stats[0] > 0


@pytest.mark.parametrize("seed", range(4))
def test_pooled_classes(seed):
    gt, results = random_annotation(seed)
    ours = evaluate_masks(load(gt), results, use_cats=False, max_dets=[20])
    expected = official(gt, results, useCats=0, maxDets=[20])
    assert_equal(ours, expected)
    assert ours.params.catIds == expected.params.catIds == [-1]


def test_subset_of_images():
    gt, results = random_annotation(0)
    image_ids = [image["id"] for image in gt["images"]][1:4]
    ours = evaluate_masks(load(gt), results, img_ids=[*image_ids, image_ids[0]])
    assert_equal(ours, official(gt, results, imgIds=image_ids))
    whole = evaluate_masks(load(gt), results)
    assert (whole.eval["precision"] != ours.eval["precision"]).any()


def test_string_and_negative_ids():
    gt, results = random_annotation(1)
    for image in gt["images"]:
        image["id"] = f"image {image['id']}"
    for annotation in [*gt["annotations"], *results]:
        annotation["image_id"] = f"image {annotation['image_id']}"
    for category in gt["categories"]:
        category["id"] -= 50
    for annotation in [*gt["annotations"], *results]:
        annotation["category_id"] -= 50
    for annotation in gt["annotations"]:
        annotation["id"] *= -1
    assert_equal(evaluate_masks(load(gt), results), official(gt, results))


def test_results_of_unknown_classes():
    gt, results = random_annotation(2)
    for result in results[::3]:
        result["category_id"] = 1000
    assert_equal(evaluate_masks(load(gt), results), official(gt, results))
    for result in results:
        result["category_id"] = 1000
    assert_equal(evaluate_masks(load(gt), results), official(gt, results))


@pytest.mark.parametrize("use_fast_impl", [True, False])
def test_input_is_not_modified(use_fast_impl):
    gt, results = random_annotation(3)
    expected = official(gt, results)
    # Areas must come from the masks, not from the boxes.
    results = [result | {"bbox": [0, 0, 0, 0]} for result in results]
    before = copy.deepcopy(results)
    loaded = load(gt)
    for _ in range(2):
        ours = evaluate_masks(loaded, results, use_fast_impl=use_fast_impl)
        assert_equal(ours, expected)
    assert results == before


def test_gt_reused_after_pycocotools():
    """pycocotools replaces polygons by run lengths in place."""
    gt, results = random_annotation(4)
    loaded = load(gt)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = evaluate_masks(loaded, results, use_fast_impl=False)
    assert_equal(evaluate_masks(loaded, results), expected)


@pytest.mark.parametrize("case", ["id 0", "NaN"])
def test_input_left_to_pycocotools(case, caplog):
    gt, results = random_annotation(5)
    if case == "id 0":
        for annotation in gt["annotations"]:
            annotation["id"] -= 1
        reason = "an annotation has id 0"
    else:
        results[0]["score"] = float("nan")
        reason = "a score is NaN"
    with contextlib.redirect_stdout(io.StringIO()):
        ours = evaluate_masks(load(gt), results)
    assert_equal(ours, official(gt, results))
    assert f"Evaluating masks by pycocotools, which is slower: {reason}" in caplog.text


def test_invalid_polygon_raises_like_pycocotools():
    gt, results = random_annotation(6)
    gt["annotations"][0]["segmentation"] = [[1.0, 2.0, 3.0, 4.0]]
    for evaluate in (official, lambda gt, results: evaluate_masks(load(gt), results)):
        with pytest.raises(TypeError):
            evaluate(gt, results)


def test_implementation_is_logged(caplog):
    gt, results = random_annotation(7)
    with caplog.at_level(logging.INFO, logger="mask2former.evaluation.mask_ap"):
        evaluate_masks(load(gt), results)
    assert "by hotcoco" in caplog.text


@pytest.mark.parametrize("use_fast_impl", [True, False])
def test_unlisted_image(use_fast_impl):
    gt, results = random_annotation(8)
    results[0]["image_id"] = 4000
    with pytest.raises(ValueError, match=r"1 images that the ground truth does not list: \[4000\]"):
        evaluate_masks(load(gt), results, use_fast_impl=use_fast_impl)
