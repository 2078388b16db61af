"""Comparing runs by resampling images, with numbers worked out by hand."""

import math

import numpy as np
import pytest
from panopticapi.evaluation import PQStat
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from mask2former.evaluation.image_statistics import (
    PanopticStatistics,
    SemanticStatistics,
    confusion_of,
    read_statistics,
    write_panoptic_statistics,
    write_semantic_statistics,
)
from mask2former.evaluation.mask_ap import evaluate_masks
from mask2former.evaluation.mask_statistics import match_masks
from mask2former.evaluation.run_comparison import check_same_test_set, compare, draw_weights

CATEGORIES = {7: {"name": "cat", "isthing": 1}, 9: {"name": "sky", "isthing": 0}}


def panoptic(tp, fp, fn, iou=0.8):
    """One thing class; arguments are lists per image."""
    counts = np.array([tp, fp, fn], dtype=float)[:, :, None]
    return PanopticStatistics(
        list(range(len(tp))), ["cat"], np.array([True]), iou * counts[0], *counts
    )


def stat(**counts):
    result = PQStat()
    for name, (category, iou, tp, fp, fn) in counts.items():
        del name
        result[category].iou, result[category].tp = iou, tp
        result[category].fp, result[category].fn = fp, fn
    return result


def test_panoptic_statistics_of_two_images(tmp_path):
    images = [stat(a=(7, 1.5, 2, 0, 1), b=(9, 0.9, 1, 0, 0)), stat(a=(7, 0.0, 0, 1, 0))]
    write_panoptic_statistics(str(tmp_path), "two/images", CATEGORIES, [5, 6], images)
    (file,) = tmp_path.iterdir()
    dataset, task, statistics = read_statistics(str(file))
    assert (dataset, task, statistics.image_ids) == ("two/images", "panoptic_seg", [5, 6])
    # All: cat 1.5 / (2 + 1), sky 0.9. First image twice: cat 3 / (4 + 1). Second twice: cat 0.
    metrics, classes = statistics.scores(np.array([[1, 1], [2, 0], [0, 2]]))
    np.testing.assert_allclose(classes[:, 0], [50, 60, 0])
    np.testing.assert_allclose(classes[:2, 1], [90, 90])
    assert math.isnan(classes[2, 1])
    np.testing.assert_allclose(metrics["PQ"], [70, 75, 0])
    np.testing.assert_allclose(metrics["SQ"][:2], [(75 + 90) / 2] * 2)
    np.testing.assert_allclose(metrics["PQ_th"], [50, 60, 0])


def test_semantic_statistics_of_two_images(tmp_path):
    images = {"/data/x/1.png": [[0, 0, 30], [1, 0, 10]], "/data/y/1.png": [[1, 1, 20]]}
    write_semantic_statistics(str(tmp_path), "two", ["wall", "sky"], images)
    (file,) = tmp_path.iterdir()
    _, _, statistics = read_statistics(str(file))
    assert statistics.image_ids == ["x/1.png", "y/1.png"]
    metrics, iou = statistics.scores(np.array([[1, 1], [1, 3]]))
    np.testing.assert_allclose(iou, [[75, 100 * 20 / 30], [75, 100 * 60 / 70]])
    np.testing.assert_allclose(metrics["mIoU"], iou.mean(1))
    np.testing.assert_allclose(metrics["pACC"], [100 * 50 / 60, 100 * 90 / 100])
    names, confusion = confusion_of(str(file))
    assert names == ["wall", "sky"] and confusion.tolist() == [[30, 0], [10, 20]]


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}', '{"version": 99}'])
def test_damaged_file_is_named(tmp_path, content):
    (tmp_path / "per_image.json").write_text(content)
    with pytest.raises(ValueError, match="per_image.json"):
        read_statistics(str(tmp_path / "per_image.json"))


def _square(top, left, size):
    mask = np.zeros((40, 40), dtype=np.uint8, order="F")
    mask[top : top + size, left : left + size] = 1
    rle = mask_util.encode(mask)
    return rle | {"counts": rle["counts"].decode()}


def _random_masks(seed, num_images=12):
    random = np.random.default_rng(seed)
    annotations, results = [], []
    for image_id in range(1, num_images + 1):
        for _ in range(random.integers(0, 5)):
            top, left, size = random.integers(0, 15, size=3) + (0, 0, 6)
            gt = _square(top, left, size)
            category = int(random.integers(1, 4))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "segmentation": gt,
                    "area": float(mask_util.area(gt)),
                    "bbox": mask_util.toBbox(gt).tolist(),
                    "iscrowd": int(random.random() < 0.1),
                }
            )
            for _ in range(random.integers(0, 3)):
                shift = random.integers(0, 4, size=2)
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": category if random.random() < 0.8 else 1,
                        "segmentation": _square(top + shift[0], left + shift[1], size),
                        "score": float(random.random()),
                    }
                )
    gt = COCO()
    gt.dataset = {
        "images": [{"id": i, "height": 40, "width": 40} for i in range(1, num_images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 5)],
    }
    gt.createIndex()
    return gt, results


def _copies(gt, results, weights):
    """The data set with each image copied as often as it counts."""
    images, annotations, copied = [], [], []
    for image, times in zip(gt.dataset["images"], weights, strict=True):
        for _ in range(times):
            new = {"image_id": len(images) + 1}
            images.append(image | {"id": new["image_id"]})
            for annotation in gt.imgToAnns[image["id"]]:
                annotations.append(annotation | new | {"id": len(annotations) + 1})
            copied += [r | new for r in results if r["image_id"] == image["id"]]
    copies = COCO()
    copies.dataset = gt.dataset | {"images": images, "annotations": annotations}
    copies.createIndex()
    return copies, copied


@pytest.mark.parametrize("seed", range(3))
def test_weighted_ap_is_that_of_copied_images(seed):
    gt, results = _random_masks(seed)
    statistics = match_masks(gt, results)
    weights = next(draw_weights(len(gt.imgs), 2, seed))
    weights[0] = 1
    metrics, _ = statistics.scores(weights)
    for row, images in enumerate(weights):
        official = evaluate_masks(*_copies(gt, results, images), use_fast_impl=False)
        official.summarize()
        actual = [metrics[name][row] for name in statistics.metric_names]
        np.testing.assert_allclose(actual, 100 * official.stats[:3], atol=1e-9)


def test_no_detection():
    gt, _ = _random_masks(0)
    metrics, classes = match_masks(gt, []).scores(np.ones((1, len(gt.imgs)), dtype=int))
    assert metrics["AP"] == 0 and np.isnan(classes[0, 3]), "class 4 has no object"


def test_identical_runs_do_not_differ():
    run = panoptic([1, 0, 2, 1], [0, 1, 0, 0], [0, 1, 1, 0])
    comparison = compare([run], [run], num_resamples=100)
    assert tuple(comparison.metrics["PQ"]["difference"]) == (0, 0, 0)
    assert comparison.metrics["PQ"]["verdict"].startswith("no difference in PQ shown")
    assert not any(row["beyond_noise"] for row in comparison.classes)
    assert "PQ_st" not in comparison.metrics, "there is no stuff"


def test_class_that_one_run_never_finds():
    """Its difference is the same in every resample, so that there is no noise at all."""
    never, always = panoptic([0] * 8, [0] * 8, [1] * 8), panoptic([1] * 8, [0] * 8, [0] * 8)
    (row,) = compare([never], [always], num_resamples=100).classes
    assert (row["low"], row["high"]) == pytest.approx((80, 80))
    assert row["p"] == 0 and row["beyond_noise"]
    (row,) = compare([always], [always], num_resamples=100).classes
    assert row["p"] == 1 and not row["beyond_noise"]


def _random_run(random, scenes, quality):
    """Each scene has one to four objects, found with a probability."""
    tp = random.binomial(scenes, quality)
    return panoptic(tp, random.poisson(0.2, len(scenes)), scenes - tp)


def test_better_run_is_found_in_either_order():
    random = np.random.default_rng(0)
    scenes = random.integers(1, 5, size=200)
    low, high = (_random_run(random, scenes, q) for q in (0.5, 0.8))
    comparison = compare([low], [high])
    difference = comparison.metrics["PQ"]["difference"]
    assert difference.low > 0 and comparison.classes[0]["beyond_noise"]
    assert comparison.metrics["PQ"]["verdict"].startswith("B is better in PQ by")
    reverse = compare([high], [low]).metrics["PQ"]
    assert reverse["verdict"].startswith("A is better in PQ by")
    np.testing.assert_allclose(reverse["difference"].low, -difference.high, atol=0.2)


def test_intervals_cover_the_true_difference():
    random = np.random.default_rng(1)
    # PQ of endless data: IoU × tp / (tp + (fp + fn) / 2), per object; 0.2 fp per image of 2.5.
    expected = [80 * q / (q + 0.5 * (0.08 + 1 - q)) for q in (0.6, 0.65)]
    covered = 0
    for seed in range(100):
        scenes = random.integers(1, 5, size=100)
        runs = [_random_run(random, scenes, q) for q in (0.6, 0.65)]
        _, low, high = compare([runs[0]], [runs[1]], num_resamples=200, seed=seed).metrics["PQ"][
            "difference"
        ]
        covered += low <= expected[1] - expected[0] <= high
    assert 88 <= covered <= 99


def test_variance_between_seeds_widens_the_interval():
    random = np.random.default_rng(2)
    scenes = random.integers(1, 5, size=300)
    a = [_random_run(random, scenes, q) for q in (0.60, 0.70)]
    b = [_random_run(random, scenes, q) for q in (0.66, 0.76)]
    one, several = (compare(*sides).metrics["PQ"] for sides in (([a[0]], [b[0]]), (a, b)))
    widths = [m["difference"].high - m["difference"].low for m in (one, several)]
    assert one["verdict"].startswith("B is better")
    assert several["verdict"].startswith("no difference") and widths[1] > 2 * widths[0]
    assert len(several["runs_a"]) == 2
    borrowed = compare([a[0]], b)
    assert "single run" in borrowed.notes[0]


def test_other_test_sets_are_refused():
    run = panoptic([1, 0], [0, 1], [0, 1])
    others = [panoptic([1], [0], [0]), panoptic([1, 0], [0, 1], [0, 2])]
    classes = SemanticStatistics([0, 1], ["dog"], *np.zeros((3, 2, 1)))
    for other, message in zip(
        [*others, classes], ["images", "ground truth", "classes"], strict=True
    ):
        with pytest.raises(ValueError, match=message):
            check_same_test_set([run, other], ["a", "b"])
    with pytest.raises(ValueError, match="at least 2 images"):
        compare([others[0]], [others[0]])
    with pytest.raises(ValueError, match="100 resamples"):
        compare([run], [run], num_resamples=10)
