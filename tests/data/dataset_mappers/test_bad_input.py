"""Invalid input: the mappers raise one error that names the file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RESIZE_CROP = ["mask_former_instance", "mask_former_panoptic", "mask_former_semantic"]
NAMES = ["coco_instance_lsj", "coco_panoptic_lsj", *RESIZE_CROP]


@pytest.mark.parametrize("name", NAMES)
def test_missing_image(name, records, build):
    record = records[name] | {"file_name": "/nowhere/a.jpg"}
    with pytest.raises(FileNotFoundError, match=r"/nowhere/a\.jpg"):
        build(name, [])(record)


@pytest.mark.parametrize("key", ["image", "semantic", "panoptic"])
@pytest.mark.parametrize("share", [0, 0.4, 0.7])
def test_truncated_file(key, share, records, files, build):
    path = Path(files[key])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"{key}\.png cannot be read as an image"):
        build("mask_former_panoptic", [])(records["mask_former_panoptic"])


def test_truncated_jpeg(records, tmp_path, build):
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    record = {"file_name": str(path), "annotations": []}
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as an image: .*truncated"):
        build("coco_instance_lsj", [])(record)


@pytest.mark.parametrize("name", NAMES)
def test_image_of_another_size_than_the_record(name, records, build):
    with pytest.raises(ValueError, match=r"image\.png, got \(6, 4\), expect \(7, 4\)"):
        build(name, [])(records[name] | {"width": 7})


@pytest.mark.parametrize(
    "name, key",
    [
        ("mask_former_semantic", "semantic"),
        ("mask_former_panoptic", "semantic"),
        ("mask_former_panoptic", "panoptic"),
        ("coco_panoptic_lsj", "panoptic"),
    ],
)
def test_label_map_of_another_size(name, key, records, files, build):
    image = Image.open(files[key])
    image.resize((6, 5)).save(files[key])
    match = rf"{key}\.png has .*\(5, 6\), but its image .*image\.png has \(4, 6\)"
    with pytest.raises(ValueError, match=match):
        build(name, [])(records[name])


def test_semantic_map_in_colour(records, files, build, gt):
    Image.fromarray(gt.pixels).save(files["semantic"])
    with pytest.raises(ValueError, match=r"semantic\.png has 3 channels"):
        build("mask_former_semantic", [])(records["mask_former_semantic"])


def test_semantic_label_out_of_range(records, build):
    mapper = build("mask_former_semantic", [], num_classes=2)
    with pytest.raises(ValueError, match=r"semantic\.png .*\[0, 2\).*255: 2\."):
        mapper(records["mask_former_semantic"])


@pytest.mark.parametrize("num_classes", [None, 3])
def test_semantic_labels_that_are_not_whole(num_classes, records, files, build):
    labels = np.zeros((4, 6), np.float32)
    labels[0, :2] = np.nan, 0.5
    Image.fromarray(labels).save(files["semantic"], format="TIFF")
    mapper = build("mask_former_semantic", [])
    mapper.num_classes = num_classes
    message = r"semantic\.png has labels that are not whole numbers: 0\.5, nan; .* integers$"
    with pytest.raises(ValueError, match=message):
        mapper(records["mask_former_semantic"])
    Image.fromarray(np.floor(np.nan_to_num(labels))).save(files["semantic"], format="TIFF")
    mapper(records["mask_former_semantic"])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "mask_former_semantic"])
def test_category_out_of_range(name, records, build):
    with pytest.raises(ValueError, match=r"\.png.* has category_id [12], .*\[0, 1\)"):
        build(name, [], num_classes=1)(records[name])


@pytest.mark.parametrize("name", ["mask_former_panoptic", "coco_panoptic_lsj"])
def test_png_and_json_disagree(name, records, build, gt):
    record = records[name]
    with pytest.raises(ValueError, match=r"panoptic\.png contains the segment id 500 "):
        build(name, [])(record | {"segments_info": gt.segments[1:]})
    extra = [*gt.segments, {"id": 8, "category_id": 0, "iscrowd": 0}]
    with pytest.raises(ValueError, match=r"panoptic\.png has no pixel of the segment id 8 "):
        build(name, [])(record | {"segments_info": extra})


@pytest.mark.parametrize(
    "name, key",
    [
        ("mask_former_semantic", "sem_seg_file_name"),
        ("mask_former_panoptic", "pan_seg_file_name"),
        ("coco_panoptic_lsj", "segments_info"),
        ("mask_former_instance", "annotations"),
    ],
)
def test_record_of_another_task(name, key, records, build):
    record = {k: v for k, v in records[name].items() if k != key}
    mapper = build(name, [])
    match = rf"image\.png has no '{key}', which {type(mapper).__name__} needs"
    with pytest.raises(ValueError, match=match):
        mapper(record)


@pytest.mark.parametrize("name", ["mask_former_semantic", "mask_former_panoptic"])
def test_annotations_that_would_be_ignored(name, records, build):
    with pytest.raises(ValueError, match=r"image\.png has 'annotations'"):
        build(name, [])(records[name] | {"annotations": []})
