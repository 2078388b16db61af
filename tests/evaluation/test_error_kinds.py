"""Kinds of errors on scenes small enough to work out by hand."""

import numpy as np
import pytest
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from mask2former.evaluation.mask_errors import analyze_masks, confused_pairs
from mask2former.evaluation.panoptic_errors import error_table, find_errors
from mask2former.evaluation.panoptic_quality import match_segments, segment_overlaps

CAT, DOG = 1, 2


def panoptic_kinds(gt_row, pred_row, gt_classes, pred_classes, crowds=()):
    """Kinds of the FN and FP of an image of one row, by segment id."""
    gt_ids, pred_ids = (np.array([row], dtype=np.uint32) for row in (gt_row, pred_row))
    annotation = {
        "image_id": 1,
        "file_name": "1.png",
        "segments_info": [
            {"id": i, "category_id": c, "iscrowd": int(i in crowds), "area": gt_row.count(i)}
            for i, c in gt_classes.items()
        ],
    }
    segments = [{"id": i, "category_id": c} for i, c in pred_classes.items()]
    overlaps = segment_overlaps(gt_ids, pred_ids, annotation)
    matches = match_segments(overlaps, annotation, segments, {CAT, DOG})
    errors = find_errors(overlaps, matches, annotation, segments)
    missed = {e.gt_id: e.kind for e in errors if not e.is_fp}
    wrong = [e.kind for e in errors if e.is_fp]
    assert len(errors) == len(matches.missed) + len(matches.wrong)
    return missed, wrong, errors


def test_right_segments_have_no_error():
    assert panoptic_kinds([1] * 4, [1] * 4, {1: CAT}, {1: CAT})[:2] == ({}, [])


@pytest.mark.parametrize(
    "gt, pred, gt_classes, pred_classes, missed, wrong",
    [
        ([1] * 4, [1] * 4, {1: CAT}, {1: DOG}, {1: "wrong class"}, ["wrong class"]),
        # One prediction on two cats: IoU 4/8 with each.
        (
            [1] * 4 + [2] * 4,
            [1] * 8,
            {1: CAT, 2: CAT},
            {1: CAT},
            {1: "merged", 2: "merged"},
            ["merged"],
        ),
        ([1] * 8, [1] * 4 + [2] * 4, {1: CAT}, {1: CAT, 2: CAT}, {1: "split"}, ["split"] * 2),
        # IoU 2 / 6.
        (
            [1] * 4 + [2] * 2,
            [0] * 2 + [1] * 4,
            {1: CAT, 2: DOG},
            {1: CAT},
            {1: "poor overlap", 2: "both"},
            ["poor overlap"],
        ),
        # 1 pixel of 19.
        (
            [1] * 10 + [2] * 9,
            [0] * 9 + [1] * 10,
            {1: CAT, 2: CAT},
            {1: CAT},
            {1: "missed"},
            [],
        ),
        ([1] * 4, [0] * 4, {1: CAT}, {}, {1: "missed"}, []),
    ],
)
def test_kinds_of_segments(gt, pred, gt_classes, pred_classes, missed, wrong):
    assert panoptic_kinds(gt, pred, gt_classes, pred_classes)[:2] == (missed, wrong)


def test_crowds_and_void_are_no_background():
    # Void, or a crowd of its class, takes the prediction out of the counts.
    assert panoptic_kinds([0] * 4, [1] * 4, {}, {1: CAT})[:2] == ({}, [])
    assert panoptic_kinds([5] * 4, [1] * 4, {5: CAT}, {1: CAT}, crowds=[5])[:2] == ({}, [])
    assert panoptic_kinds([5] * 4, [1] * 4, {5: DOG}, {1: CAT}, crowds=[5])[1] == ["background"]


def test_gain_of_each_kind():
    *_, errors = panoptic_kinds([1] * 4, [1] * 4, {1: CAT}, {1: DOG})
    classes = [
        {"id": CAT, "TP": 3, "FP": 0, "FN": 1, "SQ": 70.0},  # PQ 60, without the FN 70
        {"id": DOG, "TP": 0, "FP": 1, "FN": 0, "SQ": 0.0},  # PQ 0
    ]
    gains = {row["kind"]: row for row in error_table(classes, errors)}
    assert gains["wrong class"]["dPQ"] == pytest.approx(5)
    assert (gains["wrong class"]["FP"], gains["wrong class"]["FN"]) == (1, 1)
    assert gains["missed"]["dPQ"] == 0


def square(left, width=10):
    mask = np.zeros((20, 100), dtype=np.uint8, order="F")
    mask[5:15, left : left + width] = 1
    rle = mask_util.encode(mask)
    return rle | {"counts": rle["counts"].decode()}


def scene(objects, predictions):
    """Objects (left, class, is crowd); predictions (left, class, score)."""
    gt = COCO()
    gt.dataset = {
        "images": [{"id": "x", "height": 20, "width": 100}],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": [
            {
                "id": number,
                "image_id": "x",
                "category_id": category,
                "segmentation": square(left),
                "area": 100,
                "bbox": [left, 5, 10, 10],
                "iscrowd": crowd,
            }
            for number, (left, category, crowd) in enumerate(objects, start=1)
        ],
    }
    gt.createIndex()
    results = [
        {"image_id": "x", "category_id": c, "segmentation": square(left), "score": score}
        for left, c, score in predictions
    ]
    return analyze_masks(gt, results, min_score=0.5)


def test_label_error_candidates():
    objects = [(0, CAT, 0), (20, CAT, 0), (40, CAT, 0), (60, DOG, 1)]
    predictions = [
        (0, CAT, 0.99),  # right
        (20, DOG, 0.9),  # another class
        (43, CAT, 0.8),  # IoU 7 / 13
        (60, DOG, 0.95),  # in a crowd
        (80, DOG, 0.7),  # nothing there
        (90, DOG, 0.4),  # not confident
    ]
    errors = scene(objects, predictions)
    found = [(c["kind"], c["gt_class"], c["predicted_class"]) for c in errors.candidates]
    assert found == [
        ("wrong class", "cat", "dog"),
        ("missing label", None, "dog"),
        ("poor mask", "cat", "cat"),
    ]
    assert errors.candidates[2]["iou"] == pytest.approx(7 / 13)
    assert errors.candidates[2]["rank"] == pytest.approx(0.8 * 6 / 13)
    assert [row["objects"] for row in errors.sizes] == [3, 0, 0]
    assert [row["found"] for row in errors.sizes] == [2, 0, 0]
    counts = {row["kind"]: row["count"] for row in errors.kinds}
    assert counts["classification"] == 1 and counts["background"] == 2
    assert errors.confusions == [
        {"gt": "cat", "predicted": "dog", "count": 1, "percent of gt": pytest.approx(100 / 3)}
    ]


def test_no_predictions_and_no_objects():
    assert scene([(0, CAT, 0)], []).kinds[-1]["count"] == 1
    errors = scene([], [(0, CAT, 0.9)])
    assert [c["kind"] for c in errors.candidates] == ["missing label"]


def test_confused_pairs_are_sorted():
    pairs = confused_pairs(np.array([[5, 1, 0], [3, 0, 0], [0, 0, 2]]), ["a", "b", "c"])
    assert [(p["gt"], p["predicted"], p["count"]) for p in pairs] == [("b", "a", 3), ("a", "b", 1)]
    assert pairs[0]["percent of gt"] == 100
