"""Problems and counts of single images and their annotations."""

import dataclasses

import numpy as np
import own_data
import pycocotools.mask as mask_util
import pytest
from dataset_trees import photograph, save
from PIL import Image

from mask2former.data.check.images import ItemChecker
from mask2former.data.check.index import Index, Item

INDEX = Index("test", own_data.CLASSES, {0, 1}, {3: 0, 7: 1, 9: 2})


@pytest.fixture
def instance_item(tmp_path):
    content = own_data.instances(tmp_path)
    annotations = [a for a in content["annotations"] if a["image_id"] == 1]
    return Item(str(tmp_path / "images/a.jpg"), 1, (8, 12), annotations)


@pytest.fixture
def panoptic_item(tmp_path):
    segments = own_data.panoptic(tmp_path)["annotations"][0]["segments_info"]
    png = str(tmp_path / "panoptic/a.png")
    return Item(str(tmp_path / "images/a.jpg"), 1, (8, 12), None, png, segments)


@pytest.fixture
def semantic_item(tmp_path):
    own_data.semantic(tmp_path)
    labels = str(tmp_path / "labels/a.png")
    return Item(str(tmp_path / "images/a.jpg"), sem_seg_file_name=labels)


def check(item):
    return ItemChecker(INDEX)(item)


def whys(findings):
    return [(finding.id, finding.why) for finding in findings]


def test_valid(instance_item, panoptic_item, semantic_item):
    for item in (instance_item, panoptic_item, semantic_item):
        report = check(item)
        assert report.problems == report.warnings == []
        assert report.size == (8, 12)
        assert (report.pixels[0], report.pixels[1]) == (32, 16)
    assert check(instance_item).objects == {0: 1, 1: 1}
    assert check(panoptic_item).objects == {0: 1, 1: 1, 2: 1}
    assert check(panoptic_item).areas == check(instance_item).areas == [32, 16]
    assert check(semantic_item).pixels[2] == 48


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda data: data[: len(data) // 2], "cannot be read as an image: image file is trunc"),
        (lambda data: b"", "is empty; cannot be read as an image"),
        (lambda data: b"no image", "cannot be read as an image: cannot identify image file"),
    ],
)
def test_broken_image(instance_item, tmp_path, damage, why):
    path = tmp_path / "images/a.jpg"
    photograph(path, 120, 80)
    path.write_bytes(damage(path.read_bytes()))
    report = check(instance_item)
    ((image_id, reported),) = whys(report.problems)
    assert image_id == 1 and reported.startswith(why)
    # Its annotations are still checked.
    assert report.objects == {0: 1, 1: 1} and report.size is None


def test_missing_image_and_wrong_size(instance_item, tmp_path):
    (tmp_path / "images/a.jpg").unlink()
    assert whys(check(instance_item).problems) == [(1, "does not exist")]
    photograph(tmp_path / "images/a.jpg", 16, 8)
    why = "is 16 x 8 pixels, but the annotation says 12 x 8"
    assert whys(check(instance_item).problems) == [(1, why)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"category_id": 4}, "category_id 4 is not one of the categories"),
        ({"segmentation": []}, "annotation id 10 has the segmentation '[]'"),
        ({"segmentation": [[1, 2, 3]]}, "annotation id 10 has a polygon of 3 coordinates"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "coordinates that are not finite"),
        ({"segmentation": [[0, 0, 1e9, 0, 1e9, 1e9]]}, "coordinates far outside the image"),
        ({"segmentation": {"size": [8, 12], "counts": [5]}}, "counts 5 of 96 pixels"),
        ({"segmentation": {"size": [4, 4], "counts": [16]}}, "(height, width) (4, 4)"),
        ({"bbox": [0, 0, 4]}, "bbox is [0, 0, 4], not four numbers"),
        ({"bbox": None}, "bbox is None, not four numbers"),
    ],
)
def test_broken_annotation(instance_item, change, why):
    instance_item.annotations[0] |= change
    ((annotation, reported),) = whys(check(instance_item).problems)
    assert annotation == "annotation 10"
    assert why in reported
    # The other annotation counts.
    assert check(instance_item).objects[1] == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"segmentation": [[0, 0, 15, 0, 15, 8, 0, 8]], "bbox": [0, 0, 15, 8]},
            "a polygon spans x 0 to 15, y 0 to 8, beyond the 12 x 8 pixels of the image",
        ),
        (
            {"segmentation": [[2, 2, 2, 2, 2, 2]], "bbox": [2, 2, 0, 0]},
            "the mask covers no pixel",
        ),
        (
            {"bbox": [0, 0, 8, 8]},
            "bbox spans x 0 to 8, y 0 to 8, but the segmentation x 0 to 4, y 0 to 8",
        ),
    ],
)
def test_doubtful_annotation(instance_item, change, why):
    """Training uses it, so it is no problem."""
    instance_item.annotations[0] |= change
    report = check(instance_item)
    assert whys(report.warnings) == [("annotation 10", why)] and report.problems == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(instance_item, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = (8, 12) if orientation > 4 else (12, 8)
    Image.new("RGB", size).save(tmp_path / "images/a.jpg", exif=exif.tobytes())
    report = check(instance_item)
    assert report.problems == [] and len(report.warnings) == (orientation > 1)
    if orientation > 1:
        assert f"EXIF orientation {orientation} turns" in report.warnings[0].why
    Image.new("RGB", (12, 8)).save(tmp_path / "images/a.jpg", exif=exif.tobytes())
    problems = [] if orientation < 5 else ["(the EXIF orientation swaps them)"]
    assert [why[-33:] for _, why in whys(check(instance_item).problems)] == problems


def test_crowds_are_checked_but_do_not_count(instance_item):
    mask = np.zeros((8, 12), np.uint8, order="F")
    mask[:, :4] = 1
    rle = mask_util.encode(mask)
    instance_item.annotations[0] |= {"iscrowd": 1, "segmentation": rle}
    report = check(instance_item)
    assert report.problems == []
    assert (report.num_crowds, report.objects) == (1, {1: 1})


def test_polygons_slightly_outside_are_accepted(instance_item):
    instance_item.annotations[0]["segmentation"] = [[-1, -0.5, 4, -0.5, 4, 8, -1, 8]]
    assert check(instance_item).problems == []


def test_ids_of_png_and_json(panoptic_item):
    first, second, third = (dict(segment) for segment in panoptic_item.segments_info)
    segments = [first | {"id": 4}, second | {"category_id": 5}, third, third]
    report = check(dataclasses.replace(panoptic_item, segments_info=segments))
    assert whys(report.problems) == [
        ("segment 4", "the JSON lists the segment, but no pixel of the PNG has its id"),
        ("segment 2", "category_id 5 is not one of the categories"),
        ("segment 300", "the JSON lists the segment more than once"),
        ("segment 1", "32 pixels have this id, which the JSON does not list"),
    ]
    assert {finding.file for finding in report.problems} == {panoptic_item.pan_seg_file_name}
    segments = [first | {"area": 33}, second, {"id": 300}]
    report = check(dataclasses.replace(panoptic_item, segments_info=segments))
    assert whys(report.warnings) == [("segment 1", "has 32 pixels, but the JSON says area 33")]
    assert whys(report.problems)[0] == (1, "a segment of the JSON has no 'category_id'")


def test_png_of_another_size(panoptic_item, tmp_path):
    photograph(tmp_path / "images/a.jpg", 24, 16)
    panoptic_item.size = None
    why = f"is 12 x 8 pixels, but its image {panoptic_item.file_name} 24 x 16"
    assert whys(check(panoptic_item).problems) == [(1, why)]


def test_label_maps(semantic_item, tmp_path):
    path = tmp_path / "labels/a.png"
    labels = own_data.labels()
    labels[0, 0], labels[0, 1], labels[0, 2] = 3, 200, 255
    save(path, labels)
    why = "has labels that are neither in [0, 3) nor the ignore label 255: 3, 200"
    report = check(semantic_item)
    assert whys(report.problems) == [(None, why)]
    assert report.pixels == {0: 29, 1: 16, 2: 48}
    save(path, np.stack([labels] * 3, -1))
    why = (
        "has 3 channels; a label map has one, the class of each pixel (VALUE_MAP in "
        "DATASETS.CUSTOM maps colours)"
    )
    assert whys(check(semantic_item).problems) == [(None, why)]
    save(path, labels[:4])
    assert "is 12 x 4 pixels, but its image" in check(semantic_item).problems[0].why
    save(path, np.full_like(labels, 255))
    assert whys(check(semantic_item).warnings) == [(None, "has no labelled pixel")]
    Image.fromarray(np.full((8, 12), np.nan, np.float32)).save(path, format="TIFF")
    (problem,) = check(semantic_item).problems
    assert problem.file == str(path) and "not whole numbers: nan; a label map" in problem.why
    path.unlink()
    assert whys(check(semantic_item).problems) == [(None, "does not exist")]


def test_unexpected_error_becomes_a_problem(instance_item):
    instance_item.annotations[0]["category_id"] = [3]
    ((image_id, why),) = whys(check(instance_item).problems)
    assert image_id == 1 and why.startswith("cannot be checked: TypeError")
