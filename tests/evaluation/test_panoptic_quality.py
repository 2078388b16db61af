"""Our panoptic quality equals that of panopticapi, errors included."""

import contextlib
import copy
import io
import itertools
import json
import multiprocessing
import os

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from panopticapi.evaluation import PQStat, pq_compute_single_core
from panopticapi.utils import id2rgb, rgb2id
from PIL import Image

from mask2former.evaluation import PanopticEvaluator
from mask2former.evaluation.panoptic_quality import (
    SegmentCounts,
    add_up,
    as_segment_ids,
    count_segments,
    image_stat,
    official_image_stats,
    read_segment_ids,
)

CATEGORIES = {k: {"id": k, "isthing": int(k > 20)} for k in (7, 13, 21, 40, 90)}


def write(folder, image_id, ids):
    Image.fromarray(id2rgb(ids)).save(folder / f"{image_id}.png")


def describe(ids, random, numbers):
    """Give each number of a map a random segment id and class."""
    segments, new_ids = [], np.zeros(ids.shape, dtype=np.int64)
    for number in numbers:
        segment_id = int(random.integers(1, 2**24))
        new_ids[ids == number] = segment_id
        category = int(random.choice([*CATEGORIES]))
        segments.append({"id": segment_id, "category_id": category})
    return new_ids, segments


def random_scene(random, image_id):
    """Maps and segments of ground truth and prediction.

    The ground truth has void, crowds (also several of one class), pixels with an unlisted id, a
    segment without pixels, and a segment with a wrong area.
    """
    height, width = random.integers(30, 90, size=2)
    numbers = np.zeros((height, width), dtype=np.int64)
    for number in range(1, 10):
        top, left = random.integers(height - 9), random.integers(width - 9)
        numbers[top : top + random.integers(9, 50), left : left + random.integers(9, 50)] = number
    gt_ids, gt = describe(numbers, random, np.unique(numbers[numbers > 0]))
    pred_ids = np.roll(gt_ids, random.integers(-2, 3, size=2), axis=(0, 1))
    pred = []
    for segment in gt:
        if random.random() < 0.2 or not (pred_ids == segment["id"]).any():
            pred_ids[pred_ids == segment["id"]] = 0
            continue
        wrong = random.random() < 0.15
        category = int(random.choice([*CATEGORIES])) if wrong else segment["category_id"]
        pred.append({"id": segment["id"], "category_id": category})
    for segment in gt:
        segment["iscrowd"] = int(random.random() < 0.25)
        segment["area"] = int((gt_ids == segment["id"]).sum())
    if random.random() < 0.3 and len(gt) > 1:
        gt.pop()
    if random.random() < 0.3:
        gt.append({"id": 5, "category_id": 7, "iscrowd": 0, "area": 20})
    if random.random() < 0.2:
        gt[0]["area"] //= 2
    annotation = {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": gt}
    return gt_ids, annotation, pred_ids, pred


def official(function, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Folders of gt and predicted PNGs, the pairs of annotations, and the counts per image."""
    random = np.random.default_rng(3)
    folders = [tmp_path_factory.mktemp(name) for name in ("gt", "pred")]
    pairs, counts = [], []
    for image_id in range(37):
        gt_ids, gt, pred_ids, pred = random_scene(random, image_id)
        write(folders[0], image_id, gt_ids)
        write(folders[1], image_id, pred_ids)
        pairs.append((gt, {"file_name": f"{image_id}.png", "segments_info": pred}))
        read = read_segment_ids(str(folders[0] / f"{image_id}.png"))
        np.testing.assert_array_equal(read, gt_ids)
        counts.append(count_segments(read, as_segment_ids(pred_ids), gt, pred, CATEGORIES))
    return folders, pairs, counts


def sums(stat):
    """{category: tp, fp, fn and the exact bits of the IoU sum}."""
    return {k: (stat[k].tp, stat[k].fp, stat[k].fn, float(stat[k].iou).hex()) for k in CATEGORIES}


@pytest.mark.parametrize("cores", [1, 3, 40])
def test_random_scenes(scenes, cores):
    """The official sum of IoUs depends on the number of cores in its last bits, ours does not."""
    folders, pairs, counts = scenes
    expected = PQStat()
    # The official code splits the images over the cores; here one process takes the parts in turn.
    for part in np.array_split(np.array(pairs), cores):
        expected += official(pq_compute_single_core, 0, part, *folders, CATEGORIES)
    stat = add_up([image_stat(image_counts) for image_counts in counts])
    for category in CATEGORIES:
        actual, target = vars(stat[category]), vars(expected[category])
        assert actual.pop("iou") == pytest.approx(target.pop("iou"), rel=1e-12, abs=0)
        assert actual == target
    assert all(vars(stat[7]).values()), "each kind of result occurs"


def test_iou_sums_are_exact():
    """1e16 + 1 is 1e16 in floating point, so a running sum would lose every 1."""
    values = [1e16, 1.0, 1.0, -1e16, 1.0]
    for order in itertools.permutations(values):
        stats = [image_stat(SegmentCounts([(7, value)], [], [])) for value in order]
        assert add_up(stats)[7].iou == 3.0


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_official_code_for_any_number_of_workers(scenes, num_workers):
    folders, pairs, counts = scenes
    stats = official(official_image_stats, pairs, *folders, CATEGORIES, num_workers)
    expected = add_up([image_stat(image_counts) for image_counts in counts])
    assert sums(add_up(stats)) == sums(expected)


def example():
    """Two segments and void, in ground truth and prediction."""
    ids = np.zeros((6, 8), dtype=np.uint32)
    ids[:3], ids[3:5] = 70000, 3
    pred = [{"id": 70000, "category_id": 7}, {"id": 3, "category_id": 40}]
    segments = [s | {"iscrowd": 0, "area": int((ids == s["id"]).sum())} for s in pred]
    gt = {"image_id": 12, "file_name": "12.png", "segments_info": segments}
    return ids, gt, ids.copy(), pred


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("not in JSON", "segment with ID 9 is presented in PNG and not presented in JSON"),
        ("not in PNG", "the following segment IDs [44] are presented in JSON"),
        ("category", "segment with ID 3 has unknown category_id 8"),
        ("two", "segment with ID 2 has unknown category_id 8"),
    ],
)
def test_errors_are_the_official_ones(tmp_path, case, message):
    gt_ids, gt, pred_ids, pred = example()
    if case in ("not in JSON", "two"):
        pred_ids[0, 0] = 9
    if case == "not in PNG":
        pred.append({"id": 44, "category_id": 7})
    if case == "category":
        pred[1]["category_id"] = 8
    if case == "two":
        # The lower id is reported.
        pred_ids[pred_ids == 3] = 2
        pred[1] |= {"id": 2, "category_id": 8}
    for name, ids in (("gt", gt_ids), ("pred", pred_ids)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, 12, ids)
    with pytest.raises(KeyError) as expected:
        prediction = {"file_name": "12.png", "segments_info": copy.deepcopy(pred)}
        folders = tmp_path / "gt", tmp_path / "pred"
        official(pq_compute_single_core, 0, [(gt, prediction)], *folders, CATEGORIES)
    with pytest.raises(KeyError) as error:
        count_segments(gt_ids, pred_ids, gt, pred, CATEGORIES)
    assert error.value.args == expected.value.args
    assert message in error.value.args[0]


def test_other_size():
    gt_ids, gt, pred_ids, pred = example()
    with pytest.raises(
        ValueError, match=r"image 12 has shape \(6, 7\), .* 12.png has shape \(6, 8\)"
    ):
        count_segments(gt_ids, pred_ids[:, 1:], gt, pred, CATEGORIES)


def test_wrong_gt_area():
    """An area of zero makes the union zero, which the official code calls an infinite IoU."""
    gt_ids, gt, pred_ids, pred = example()
    gt["segments_info"][0]["area"] = 0
    counts = count_segments(gt_ids, pred_ids, gt, pred, CATEGORIES)
    assert counts.matched == [(40, 1.0), (7, float("inf"))]


def test_png_modes(tmp_path):
    ids = np.random.default_rng(0).integers(2**24, size=(9, 11))
    path = str(tmp_path / "1.png")
    Image.fromarray(id2rgb(ids)).convert("RGBA").save(path)
    np.testing.assert_array_equal(read_segment_ids(path), ids)
    Image.new("L", (4, 4)).save(path)
    with pytest.raises(ValueError, match="1.png is an image of mode L"):
        read_segment_ids(path)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ids_beyond_24_bits(dtype):
    ids = np.array([[-1, 2**24 + 7], [0, 255]]).astype(dtype)
    np.testing.assert_array_equal(as_segment_ids(ids), rgb2id(id2rgb(ids)))


@pytest.fixture
def dataset(tmp_path):
    """Fourteen random images; yields the model outputs of each."""
    random = np.random.default_rng(5)
    annotations, outputs = [], {}
    contiguous = {k: i for i, k in enumerate(CATEGORIES)}
    for image_id in range(14):
        gt_ids, gt, pred_ids, pred = random_scene(random, image_id)
        write(tmp_path, image_id, gt_ids)
        annotations.append(gt)
        infos = [
            {
                "id": segment["id"],
                "isthing": segment["category_id"] > 20,
                "category_id": contiguous[segment["category_id"]],
                "score": 0.25,
            }
            for segment in pred
        ]
        outputs[image_id] = torch.from_numpy(pred_ids.astype(np.int32)), infos
    path = tmp_path / "panoptic.json"
    content = {"annotations": annotations, "categories": [*CATEGORIES.values()]}
    path.write_text(json.dumps(content))
    MetadataCatalog.get("pq_scenes").set(
        panoptic_json=str(path),
        panoptic_root=str(tmp_path),
        thing_dataset_id_to_contiguous_id={k: i for k, i in contiguous.items() if k > 20},
        stuff_dataset_id_to_contiguous_id={k: i for k, i in contiguous.items() if k < 20},
        label_divisor=1000,
    )
    yield outputs
    MetadataCatalog.remove("pq_scenes")


def evaluate(outputs, output_dir, use_fast_impl):
    evaluator = PanopticEvaluator("pq_scenes", str(output_dir), use_fast_impl=use_fast_impl)
    for _ in range(2):
        evaluator.reset()
        for image_id, panoptic in outputs.items():
            record = {"image_id": image_id, "file_name": f"images/{image_id}.jpg"}
            evaluator.process([record], [{"panoptic_seg": copy.deepcopy(panoptic)}])
        results = evaluator.evaluate()
    return results["panoptic_seg"], (output_dir / "predictions.json").read_text()


def test_fast_equals_official(dataset, tmp_path):
    # Images without ground truth are written but not counted.
    dataset[99] = (torch.zeros(5, 6, dtype=torch.int32), [])
    fast, official = (evaluate(dataset, tmp_path / str(k), k) for k in (True, False))
    assert fast == official
    assert 20 < fast[0]["PQ"] < 90
    assert '"file_name": "99.png"' in fast[1]


@pytest.mark.parametrize("use_fast_impl", [True, False])
def test_any_number_of_workers_and_cpus(dataset, tmp_path, monkeypatch, use_fast_impl):
    """Bit for bit the same, whichever worker evaluates an image and however many CPUs it has."""
    expected, _ = evaluate(dataset, tmp_path, use_fast_impl)
    for number in (1, 2, 3, 5):
        monkeypatch.setattr(os, "cpu_count", lambda number=number: number)
        monkeypatch.setattr(os, "process_cpu_count", os.cpu_count, raising=False)
        monkeypatch.setattr(multiprocessing, "cpu_count", os.cpu_count)
        monkeypatch.setattr(
            comm, "gather", lambda data, number=number: [data[k::number] for k in range(number)]
        )
        assert evaluate(dataset, tmp_path, use_fast_impl)[0] == expected


def test_label_maps(dataset, tmp_path):
    """Class × divisor + number, -1 for void, as some Detectron2 models return."""
    outputs = {}
    for image_id, (ids, infos) in dataset.items():
        labels = torch.full(ids.shape, -1, dtype=torch.int64)
        for number, info in enumerate(infos):
            labels[ids == info["id"]] = 1000 * info["category_id"] + number
        outputs[image_id] = labels, None
    fast, official = (evaluate(outputs, tmp_path / str(k), k) for k in (True, False))
    assert fast == official
    with_infos, _ = evaluate(dataset, tmp_path / "infos", True)
    for metric, value in with_infos.items():
        assert fast[0][metric] == pytest.approx(value)


def test_outputs_are_not_modified(dataset):
    evaluator = PanopticEvaluator("pq_scenes")
    evaluator.reset()
    before = copy.deepcopy(dataset[3])
    evaluator.process([{"image_id": 3, "file_name": "3.jpg"}], [{"panoptic_seg": dataset[3]}])
    assert dataset[3][1] == before[1]
    assert torch.equal(dataset[3][0], before[0])


def test_image_listed_twice(dataset):
    path = MetadataCatalog.get("pq_scenes").panoptic_json
    with open(path) as file:
        gt = json.load(file)
    gt["annotations"].append(gt["annotations"][0])
    with open(path, "w") as file:
        json.dump(gt, file)
    with pytest.raises(ValueError, match=r"panoptic.json, .*image_id .* occurs more than once"):
        PanopticEvaluator("pq_scenes").reset()
