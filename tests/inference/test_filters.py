import numpy as np
import pytest

from mask2former.inference import (
    InstanceMasks,
    InstanceResult,
    PanopticResult,
    PredictionFilter,
    Result,
    Segment,
)
from mask2former.inference.overlaps import fill_fragments, mask_nms

NAMES = ("cup", "plate", "table", "cup 2")


def instances(*pictures, scores, labels=None):
    """Of pictures in which x is foreground."""
    masks = np.array([[[c == "x" for c in row] for row in p.split()] for p in pictures])
    labels = [0] * len(scores) if labels is None else labels
    result = InstanceResult(InstanceMasks.from_full(masks), scores, labels)
    return Result(masks.shape[1:], NAMES, instances=result)


def panoptic(rows, **scores):
    ids = np.array([[int(c) for c in row] for row in rows.split()], np.int32)
    segments = [
        Segment(i, label, True, score, int((ids == i).sum()))
        for i, (label, score) in enumerate(((NAMES.index(k), v) for k, v in scores.items()), 1)
    ]
    return Result(ids.shape, NAMES, panoptic=PanopticResult(ids, segments))


def semantic(rows):
    labels = np.array([[int(c) for c in row] for row in rows.split()], np.uint8)
    return Result(labels.shape, NAMES, semantic=labels)


def rows_of(array):
    return " ".join("".join(map(str, row)) for row in array.tolist())


SCORES = instances("x..", ".x.", "..x", "xxx", scores=[0.9, 0.3, 0.5, 0.1], labels=[0, 1, 2, 1])


def test_all_off_by_default():
    scene = SCORES.filter(PredictionFilter())
    assert scene.scores.tolist() == SCORES.scores.tolist()
    labels = semantic("0102 3333")
    assert labels.filter(PredictionFilter()).semantic is labels.semantic
    ids = panoptic("120 000", cup=None, plate=None)
    assert ids.filter(PredictionFilter()).panoptic.segment_ids is ids.panoptic.segment_ids


def test_min_score_keeps_what_reaches_it():
    kept = SCORES.filter(PredictionFilter(min_score=0.3))
    assert kept.labels.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(kept.masks.full(), SCORES.masks.full()[:3])
    assert len(SCORES.filter(PredictionFilter(min_score=0.31)).instances) == 2
    assert len(SCORES.instances) == 4  # unchanged


def test_min_score_per_class():
    per_class = {"plate": 0.05, 0: 0.95}
    kept = SCORES.filter(PredictionFilter(min_score=0.6, min_score_per_class=per_class))
    assert kept.scores.tolist() == pytest.approx([0.3, 0.1])
    kept = SCORES.filter(PredictionFilter(min_score_per_class={"cup": 1.0}))
    assert kept.labels.tolist() == [1, 2, 1]


def test_top_k_keeps_the_order():
    scene = instances("x..", ".x.", "..x", scores=[0.2, 0.9, 0.5])
    assert scene.filter(PredictionFilter(top_k=2)).scores.tolist() == pytest.approx([0.9, 0.5])
    assert len(scene.filter(PredictionFilter(top_k=0)).instances) == 0
    assert len(scene.filter(PredictionFilter(top_k=9)).instances) == 3


def test_mask_nms():
    # The second shares 3 of 5 pixels with the first: an intersection over union of 0.6.
    pictures = "xxxx.. ......", "xxx... x.....", "...... ..xxxx"
    scene = instances(*pictures, scores=[0.8, 0.9, 0.1])
    assert scene.filter(PredictionFilter(mask_nms=0.59)).scores.tolist() == pytest.approx(
        [0.9, 0.1]
    )
    assert len(scene.filter(PredictionFilter(mask_nms=0.6)).instances) == 3
    other = instances(*pictures, scores=[0.8, 0.9, 0.1], labels=[0, 1, 0])
    assert len(other.filter(PredictionFilter(mask_nms=0.5)).instances) == 3
    agnostic = PredictionFilter(mask_nms=0.5, class_agnostic_nms=True)
    assert len(other.filter(agnostic).instances) == 2


def test_a_removed_duplicate_removes_nothing():
    # Each is a duplicate of the one before only.
    scene = instances("xxxx..", ".xxxx.", "..xxxx", scores=[0.9, 0.8, 0.7])
    assert scene.filter(PredictionFilter(mask_nms=0.5)).scores.tolist() == pytest.approx([0.9, 0.7])


@pytest.mark.parametrize("max_iou", [0.0, 0.2, 0.4])
def test_mask_nms_as_on_full_masks(max_iou):
    random = np.random.default_rng(0)
    full = np.zeros((40, 20, 20), bool)
    for mask in full:
        y, x, height, width = random.integers(0, 10, 4)
        mask[y : y + height, x : x + width] = random.random((20, 20))[:height, :width] < 0.9
    scores, labels = random.random(40).round(1), random.integers(0, 2, 40)
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable").tolist():
        unions = [(full[i] | full[j]).sum() for j in kept]
        shared = [(full[i] & full[j]).sum() for j in kept]
        if not any(
            labels[i] == labels[j] and s > max_iou * u
            for j, s, u in zip(kept, shared, unions, strict=True)
        ):
            kept.append(i)
    found = mask_nms(InstanceMasks.from_full(full), scores, max_iou, labels)
    assert 5 < len(kept) < 39
    assert found.tolist() == sorted(kept)


def test_fragments_of_instances():
    scene = instances("xx..x xx... ....x", "x.x.x ..... .....", scores=[0.9, 0.8])
    kept = scene.filter(PredictionFilter(min_fragment=2))
    # The second mask has no pixel left.
    np.testing.assert_array_equal(
        kept.masks.full().astype(int), [[[1, 1, 0, 0, 0]] * 2 + [[0] * 5]]
    )
    assert kept.boxes.tolist() == [[0, 0, 2, 2]]
    assert scene.masks.areas().tolist() == [6, 3]
    assert len(scene.filter(PredictionFilter(min_fragment=1)).instances) == 2


def test_pixels_that_touch_at_a_corner_are_connected():
    scene = instances("x.. .x. ..x", scores=[1])
    assert scene.filter(PredictionFilter(min_fragment=3)).masks.areas().tolist() == [3]


def test_min_area_after_fragments():
    scene = instances("xx.x ....", "xxxx ....", scores=[0.9, 0.8])
    assert len(scene.filter(PredictionFilter(min_area=3)).instances) == 2
    assert len(scene.filter(PredictionFilter(min_area=3, min_fragment=2)).instances) == 1


def test_panoptic_segments():
    scene = panoptic("1122 1320", cup=0.9, plate=0.4, table=0.8)
    kept = scene.filter(PredictionFilter(min_score=0.5))
    assert rows_of(kept.panoptic.segment_ids) == "1100 1300"
    assert [(s.id, s.label, s.area) for s in kept.panoptic.segments] == [(1, 0, 3), (3, 2, 1)]
    kept = scene.filter(PredictionFilter(min_area=2))
    assert rows_of(kept.panoptic.segment_ids) == "1122 1020"
    kept = scene.filter(PredictionFilter(min_score_per_class={"cup": 1}))
    assert [s.id for s in kept.panoptic.segments] == [2, 3]
    assert rows_of(scene.panoptic.segment_ids) == "1122 1320"


def test_fragments_of_panoptic_segments():
    scene = panoptic("11001 22000 20002", cup=0.9, plate=0.4)
    kept = scene.filter(PredictionFilter(min_fragment=2))
    assert rows_of(kept.panoptic.segment_ids) == "11000 22000 20000"
    assert [s.area for s in kept.panoptic.segments] == [2, 3]
    kept = scene.filter(PredictionFilter(min_fragment=3))
    assert [s.id for s in kept.panoptic.segments] == [2]


def test_panoptic_segments_without_scores():
    scene = panoptic("1", cup=None)
    with pytest.raises(ValueError, match="does not give any: its class overrides"):
        scene.filter(PredictionFilter(min_score=0.5))
    assert len(scene.filter(PredictionFilter(min_area=1)).panoptic.segments) == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("000 010 000", "000 000 000"),
        # Three neighbours of 2 and two of 0.
        ("2200 2100 2200", "2200 2200 2200"),
        # Four of each: the smaller label.
        ("0022 0122 0022", "0022 0022 0022"),
        # A fragment within fragments follows them.
        ("000000 011200 012100 000000", "000000 000000 000000 000000"),
        # Only fragments: nothing to take a label from.
        ("01 23", "01 23"),
    ],
)
def test_fragments_of_a_semantic_map(before, after):
    size = 5 if len(before) > 20 else 3
    if before == "01 23":
        size = 2
    kept = semantic(before).filter(PredictionFilter(min_fragment=size))
    assert rows_of(kept.semantic) == after
    assert kept.semantic.dtype == np.uint8


def test_nested_fragments():
    labels = np.zeros((7, 7), np.uint16)
    labels[2:5, 2:5], labels[3, 3] = 1, 2
    filled = fill_fragments(labels, 9)
    assert not filled.any() and filled.dtype == np.uint16
    # 8 pixels of 1 around one of 2.
    expected = labels.copy()
    expected[3, 3] = 1
    np.testing.assert_array_equal(fill_fragments(labels, 8), expected)


def test_nothing_predicted():
    everything = PredictionFilter(0.5, {"cup": 0.1}, 2, 2, 0.5, False, 3)
    scene = Result(
        (2, 2),
        NAMES,
        InstanceResult(InstanceMasks.empty((2, 2)), [], []),
        PanopticResult(np.zeros((2, 2), np.int32), []),
        np.zeros((2, 2), np.uint8),
    )
    kept = scene.filter(everything)
    assert len(kept.instances) == 0 and kept.panoptic.segments == []
    assert not kept.panoptic.segment_ids.any() and not kept.semantic.any()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"min_score": 1.5}, "min_score is 1.5; allowed: 0 to 1"),
        ({"min_score": float("nan")}, "min_score is nan"),
        ({"min_score": "0.5"}, "min_score is '0.5'"),
        ({"min_score_per_class": {"cup": -1}}, r"min_score_per_class\['cup'\] is -1"),
        ({"mask_nms": 50}, "mask_nms is 50"),
        ({"min_area": -1}, "min_area is -1; allowed: whole numbers from 0 on"),
        ({"min_fragment": 2.5}, "min_fragment is 2.5"),
        ({"top_k": True}, "top_k is True"),
        ({"class_agnostic_nms": True}, "class_agnostic_nms is for mask_nms"),
    ],
)
def test_wrong_values(values, problem):
    with pytest.raises(ValueError, match=problem):
        PredictionFilter(**values)


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("plat", "there is no class 'plat'; did you mean 'plate'"),
        ("zebra", "no class 'zebra'; known: 'cup', 'plate', 'table', 'cup 2'"),
        (4, "there is no class 4; labels are 0 to 3"),
        (-1, "there is no class -1"),
    ],
)
def test_unknown_classes(key, problem):
    with pytest.raises(ValueError, match=problem):
        SCORES.filter(PredictionFilter(min_score_per_class={key: 0.5}))


def test_name_of_two_classes():
    scene = Result((1, 1), ("cup", "cup"), InstanceResult(InstanceMasks.empty((1, 1)), [], []))
    with pytest.raises(
        ValueError, match=r"classes \[0, 1\] are all named 'cup': name them by label"
    ):
        scene.filter(PredictionFilter(min_score_per_class={"cup": 0.5}))
