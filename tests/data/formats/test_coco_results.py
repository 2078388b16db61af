"""Mistakes in files of predictions; each error names its place in the JSON."""

import json
import math

import numpy as np
import pycocotools.mask as mask_util
import pytest

from mask2former.data.formats.coco_results import read_instance_results, read_semantic_results

ABSENT = object()


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros((8, 12), np.uint8)
    mask[2:5, 3:9] = 1
    return mask


@pytest.fixture
def rle(mask) -> dict:
    encoded = mask_util.encode(np.asfortranarray(mask))
    return {"size": [8, 12], "counts": encoded["counts"].decode()}


def read_instances(tmp_path, content):
    file = tmp_path / "results.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_instance_results(str(file), {1: (8, 12), "b": (8, 12)}, {3, 7}, "gt.json")


def read_semantic(tmp_path, content):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content))
    return read_semantic_results(str(file), ["a", "b"], {3, 7}, "my_val")


def test_sound_instances(tmp_path, rle, mask):
    runs = {"size": [8, 12], "counts": [26, 3] + [5, 3] * 5 + [27]}
    results = [
        {"image_id": 1, "category_id": 3, "segmentation": rle, "score": 1, "bbox": [0] * 4},
        {"image_id": "b", "category_id": 7, "segmentation": runs, "score": 0.5, "id": 3},
    ]
    read = read_instances(tmp_path, results)
    assert [sorted(result) for result in read] == [
        ["category_id", "image_id", "score", "segmentation"]
    ] * 2
    assert [r["image_id"] for r in read] == [1, "b"] and [r["score"] for r in read] == [1, 0.5]
    for result in read:
        np.testing.assert_array_equal(mask_util.decode(result["segmentation"]), mask)
    assert read_instances(tmp_path, []) == []


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_id", ABSENT, r"\$\[1\]: a mask has no 'image_id' \(\$\[1\]\)"),
        ("image_id", 9, r"\$\[1\]\.image_id: image 9 is not one of the images that gt\.json lists"),
        ("image_id", None, r"\$\[1\]\.image_id: expected"),
        ("image_id", "1", r"\$\[1\]\.image_id: image '1' is not one of"),
        ("category_id", 4, r"\$\[1\]\.category_id: category 4 is not one of the categories that"),
        ("score", math.nan, r"\$\[1\]\.score: the score is nan"),
        ("score", math.inf, r"\$\[1\]\.score: the score is inf"),
        ("score", "1", r"\$\[1\]\.score: expected"),
        ("segmentation", [[0, 0, 4, 0, 4, 4]], r"\$\[1\]\.segmentation: expected 'object'"),
        (
            "segmentation",
            {"size": [8, 12], "counts": [95]},
            r"\$\[1\]\.segmentation: is an RLE that",
        ),
        (
            "segmentation",
            {"size": [8, 12], "counts": "P4"},
            r"\$\[1\]\.segmentation: is an RLE that",
        ),
        ("segmentation", {"size": [12, 8], "counts": [96]}, r"segmentation: the mask has \(height"),
        ("segmentation", {"size": [-8, -12], "counts": [96]}, r"segmentation: has the size"),
        ("segmentation", {"size": [8], "counts": [8]}, r"\$\[1\]\.segmentation\.size: expected"),
    ],
)
def test_broken_instances(tmp_path, rle, key, value, message):
    sound = {"image_id": 1, "category_id": 3, "segmentation": rle, "score": 1.0}
    results = [dict(sound) for _ in range(3)]
    results[1][key] = value
    if value is ABSENT:
        del results[1][key]
    with pytest.raises(ValueError, match=rf"results\.json, {message}|results\.json, .*{message}"):
        read_instances(tmp_path, results)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [], "annotations": []}, "COCO result format, .*; it is COCO ground truth"),
        ("[1", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[1]", r"\$\[0\]: expected 'object', got 'int'"),
        ("null", "is not a list of masks"),
    ],
)
def test_other_content(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"results\.json.* {message}"):
        read_instances(tmp_path, content)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json cannot be read: No such file"):
        read_instance_results(str(tmp_path / "absent.json"), {}, set(), "gt.json")


def test_semantic_results(tmp_path, rle):
    sound = [
        {"file_name": f"/x/{stem}.jpg", "category_id": 3, "segmentation": rle} for stem in "ab"
    ]
    assert {image: len(masks) for image, masks in read_semantic(tmp_path, sound).items()} == {
        "a": 1,
        "b": 1,
    }
    other_size = {"size": [12, 8], "counts": [96]}
    for changes, message in (
        ({"file_name": "c.jpg"}, r"\$\[2\]\.file_name: image c\.jpg is not one of my_val"),
        ({"category_id": 5}, r"\$\[2\]\.category_id: category_id 5 is not one of"),
        ({"segmentation": other_size}, r"\$\[2\]\.segmentation: the mask has .* but another of"),
        ({"segmentation": {"size": [8, 12], "counts": [1]}}, r"\$\[2\]\.segmentation: is an RLE"),
        ({"segmentation": None}, r"\$\[2\]\.segmentation: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            read_semantic(tmp_path, [*sound, sound[0] | changes])
    with pytest.raises(ValueError, match="no prediction for 2 of 2 images of my_val"):
        read_semantic(tmp_path, [])
