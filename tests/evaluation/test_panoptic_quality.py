"""Panoptic quality counted here is that of panopticapi, digit for digit, errors included."""

import contextlib
import copy
import io
import json
import multiprocessing

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from panopticapi.evaluation import pq_compute_multi_core, pq_compute_single_core
from panopticapi.utils import id2rgb, rgb2id
from PIL import Image

from mask2former.evaluation import PanopticEvaluator
from mask2former.evaluation.panoptic_quality import (
    add_up,
    as_segment_ids,
    count_segments,
    read_segment_ids,
)

CATEGORIES = {k: {"id": k, "isthing": int(k > 20)} for k in (7, 13, 21, 40, 90)}


def write(folder, image_id, ids):
    Image.fromarray(id2rgb(ids)).save(folder / f"{image_id}.png")


def describe(ids, random, numbers):
    """Segments of a map of numbers, each with an id and a class; true ones also with an area."""
    segments, new_ids = [], np.zeros(ids.shape, dtype=np.int64)
    for number in numbers:
        segment_id = int(random.integers(1, 2**24))
        new_ids[ids == number] = segment_id
        category = int(random.choice([*CATEGORIES]))
        segments.append({"id": segment_id, "category_id": category})
    return new_ids, segments


def random_scene(random, image_id):
    """Maps and segments of truth and prediction.

    The truth has void, crowds (also several of a class), pixels whose id is no segment, a segment
    without pixels, and a segment whose area is not that of its pixels.
    """
    height, width = random.integers(30, 90, size=2)
    numbers = np.zeros((height, width), dtype=np.int64)
    for number in range(1, 10):
        top, left = random.integers(height - 9), random.integers(width - 9)
        numbers[top : top + random.integers(9, 50), left : left + random.integers(9, 50)] = number
    true_ids, truth = describe(numbers, random, np.unique(numbers[numbers > 0]))
    found_ids = np.roll(true_ids, random.integers(-2, 3, size=2), axis=(0, 1))
    found = []
    for segment in truth:
        if random.random() < 0.2 or not (found_ids == segment["id"]).any():
            found_ids[found_ids == segment["id"]] = 0
            continue
        wrong = random.random() < 0.15
        category = int(random.choice([*CATEGORIES])) if wrong else segment["category_id"]
        found.append({"id": segment["id"], "category_id": category})
    for segment in truth:
        segment["iscrowd"] = int(random.random() < 0.25)
        segment["area"] = int((true_ids == segment["id"]).sum())
    if random.random() < 0.3 and len(truth) > 1:
        truth.pop()
    if random.random() < 0.3:
        truth.append({"id": 5, "category_id": 7, "iscrowd": 0, "area": 20})
    if random.random() < 0.2:
        truth[0]["area"] //= 2
    annotation = {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": truth}
    return true_ids, annotation, found_ids, found


def official(function, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*args)


@pytest.mark.parametrize("cores", [1, 3, 40])
def test_random_scenes(tmp_path, monkeypatch, cores):
    """Sums of floats depend on their order, so for the official code on the number of cores."""
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: cores)
    random = np.random.default_rng(cores)
    folders = tmp_path / "truth", tmp_path / "found"
    for folder in folders:
        folder.mkdir()
    pairs, counts = [], []
    for image_id in range(37):
        true_ids, truth, found_ids, found = random_scene(random, image_id)
        write(folders[0], image_id, true_ids)
        write(folders[1], image_id, found_ids)
        pairs.append((truth, {"file_name": f"{image_id}.png", "segments_info": found}))
        read = read_segment_ids(str(folders[0] / f"{image_id}.png"))
        np.testing.assert_array_equal(read, true_ids)
        counts.append(count_segments(read, as_segment_ids(found_ids), truth, found, CATEGORIES))
    if cores > 4:
        # As many processes as that would only take time: what each of them does, one by one.
        expected = [
            official(pq_compute_single_core, 0, part, *folders, CATEGORIES)
            for part in np.array_split(np.array(pairs), cores)
        ]
        for of_part in expected[1:]:
            expected[0] += of_part
        expected = expected[0]
    else:
        expected = official(pq_compute_multi_core, pairs, *folders, CATEGORIES)
    found = add_up(counts)
    for category in CATEGORIES:
        assert vars(found[category]) == vars(expected[category])
    assert all(vars(found[7]).values()), "each kind of result occurs"


def example():
    """Two segments and void, in truth and prediction."""
    ids = np.zeros((6, 8), dtype=np.uint32)
    ids[:3], ids[3:5] = 70000, 3
    found = [{"id": 70000, "category_id": 7}, {"id": 3, "category_id": 40}]
    segments = [s | {"iscrowd": 0, "area": int((ids == s["id"]).sum())} for s in found]
    truth = {"image_id": 12, "file_name": "12.png", "segments_info": segments}
    return ids, truth, ids.copy(), found


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
    true_ids, truth, found_ids, found = example()
    if case in ("not in JSON", "two"):
        found_ids[0, 0] = 9
    if case == "not in PNG":
        found.append({"id": 44, "category_id": 7})
    if case == "category":
        found[1]["category_id"] = 8
    if case == "two":
        # The one of the lower id is reported.
        found_ids[found_ids == 3] = 2
        found[1] |= {"id": 2, "category_id": 8}
    for name, ids in (("truth", true_ids), ("found", found_ids)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, 12, ids)
    with pytest.raises(KeyError) as expected:
        prediction = {"file_name": "12.png", "segments_info": copy.deepcopy(found)}
        folders = tmp_path / "truth", tmp_path / "found"
        official(pq_compute_single_core, 0, [(truth, prediction)], *folders, CATEGORIES)
    with pytest.raises(KeyError) as error:
        count_segments(true_ids, found_ids, truth, found, CATEGORIES)
    assert error.value.args == expected.value.args
    assert message in error.value.args[0]


def test_other_size():
    true_ids, truth, found_ids, found = example()
    with pytest.raises(ValueError, match=r"image 12 has \(6, 7\) .* 12.png has \(6, 8\)"):
        count_segments(true_ids, found_ids[:, 1:], truth, found, CATEGORIES)


def test_wrong_area_in_the_truth():
    """An area of zero makes the union zero, which the official code calls an infinite IoU."""
    true_ids, truth, found_ids, found = example()
    truth["segments_info"][0]["area"] = 0
    counts = count_segments(true_ids, found_ids, truth, found, CATEGORIES)
    assert counts.matched == [(40, 1.0), (7, float("inf"))]


def test_kinds_of_png(tmp_path):
    ids = np.random.default_rng(0).integers(2**24, size=(9, 11))
    path = str(tmp_path / "1.png")
    Image.fromarray(id2rgb(ids)).convert("RGBA").save(path)
    np.testing.assert_array_equal(read_segment_ids(path), ids)
    Image.new("L", (4, 4)).save(path)
    with pytest.raises(ValueError, match="1.png is an image of mode L"):
        read_segment_ids(path)


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ids_that_a_png_cannot_hold(dtype):
    ids = np.array([[-1, 2**24 + 7], [0, 255]]).astype(dtype)
    np.testing.assert_array_equal(as_segment_ids(ids), rgb2id(id2rgb(ids)))


@pytest.fixture
def dataset(tmp_path):
    """Fourteen random images; yields what a model says of each."""
    random = np.random.default_rng(5)
    annotations, outputs = [], {}
    contiguous = {k: i for i, k in enumerate(CATEGORIES)}
    for image_id in range(14):
        true_ids, truth, found_ids, found = random_scene(random, image_id)
        write(tmp_path, image_id, true_ids)
        annotations.append(truth)
        infos = [
            {
                "id": segment["id"],
                "isthing": segment["category_id"] > 20,
                "category_id": contiguous[segment["category_id"]],
                "score": 0.25,
            }
            for segment in found
        ]
        outputs[image_id] = torch.from_numpy(found_ids.astype(np.int32)), infos
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


def test_both_ways_give_the_same(dataset, tmp_path):
    # Images that the truth does not list are written, but do not count.
    dataset[99] = (torch.zeros(5, 6, dtype=torch.int32), [])
    fast, official = (evaluate(dataset, tmp_path / str(k), k) for k in (True, False))
    assert fast == official
    assert 20 < fast[0]["PQ"] < 90
    assert '"file_name": "99.png"' in fast[1]


def test_maps_of_labels(dataset, tmp_path):
    """Class × divisor + number, and -1 where there is none, as some models of Detectron2 do."""
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


def test_outputs_are_not_changed(dataset):
    evaluator = PanopticEvaluator("pq_scenes")
    evaluator.reset()
    before = copy.deepcopy(dataset[3])
    evaluator.process([{"image_id": 3, "file_name": "3.jpg"}], [{"panoptic_seg": dataset[3]}])
    assert dataset[3][1] == before[1]
    assert torch.equal(dataset[3][0], before[0])


def test_image_listed_twice(dataset):
    path = MetadataCatalog.get("pq_scenes").panoptic_json
    with open(path) as file:
        truth = json.load(file)
    truth["annotations"].append(truth["annotations"][0])
    with open(path, "w") as file:
        json.dump(truth, file)
    with pytest.raises(ValueError, match=r"panoptic.json lists an image more than once"):
        PanopticEvaluator("pq_scenes").reset()
