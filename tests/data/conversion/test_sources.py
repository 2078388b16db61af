"""Sources of every format as COCO instance JSON."""

import json
from pathlib import Path

import annotation_samples as samples
import pytest
from dataset_trees import photograph, write_json

from mask2former.data.conversion.sources import (
    as_instances,
    find_images,
    folder_of_images,
    is_coco_json,
    read_annotations,
)
from mask2former.data.formats.annotated_images import ReadOptions
from mask2former.data.formats.annotation_formats import FORMATS
from mask2former.data.formats.coco_instances import read_instances
from mask2former.data.formats.findings import Findings


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("is_stated", [True, False])
def test_every_format(tmp_path, name, is_stated):
    samples.SAMPLES[name](tmp_path / "data")
    source = as_instances(tmp_path / "data", tmp_path, name if is_stated else "auto")
    findings = Findings()
    data = read_instances(str(source.json_file), str(source.image_root), findings)
    assert findings == Findings()
    assert [c.name for c in data.categories] == samples.CLASSES
    assert all(Path(data.path(image)).is_file() for image in data.images)
    areas = [a.area for annotations in data.annotations.values() for a in annotations]
    assert areas == [32, 16]
    assert FORMATS[name].title in source.found


def test_coco_json_is_used_as_it_is(source):
    """Its ids stay, so that results fit other files of the same data."""
    json_file = source / "instances.json"
    found = as_instances(json_file, source / "unused")
    assert found.json_file == json_file and found.image_root == source / "images"
    assert not (source / "unused").exists()


def test_exports_with_masks_as_crowds(tmp_path):
    """CVAT marks every mask of the brush as a crowd, though it is one object."""
    samples.coco(tmp_path)
    json_file = tmp_path / "annotations/instances_default.json"
    rle = {"size": [8, 12], "counts": [0, 32, 64]}
    samples.change_json(
        json_file, lambda c: c["annotations"][0].update(segmentation=rle, iscrowd=1)
    )
    found = as_instances(json_file, tmp_path)
    content = json.loads(found.json_file.read_text())
    assert [a["iscrowd"] for a in content["annotations"]] == [0, 0]
    assert [a["area"] for a in content["annotations"]] == [32, 16]


def test_coco_json_is_told_from_others(tmp_path, source):
    assert is_coco_json(source / "instances.json")
    assert not is_coco_json(source)
    samples.labelme(tmp_path / "labelme")
    assert not is_coco_json(tmp_path / "labelme/a.json")
    (tmp_path / "broken.json").write_text("{")
    assert not is_coco_json(tmp_path / "broken.json")


def test_folder_of_images(tmp_path):
    samples.yolo(tmp_path)
    content, _ = read_annotations(tmp_path, "yolo")
    folder = tmp_path / "images" / "train"
    assert folder_of_images(content) == folder
    # Paths in the JSON are relative to what the user names, if the images are there.
    assert folder_of_images(content, tmp_path) == tmp_path
    assert folder_of_images(content, tmp_path / "labels") == folder


def test_missing_images(tmp_path, source):
    json_file = tmp_path / "sub" / "instances.json"
    write_json(json_file, {"images": [{"id": 1, "file_name": "z.jpg"}], "categories": []})
    with pytest.raises(FileNotFoundError, match=r"images of .*json are not in .*sub, .*--image-ro"):
        find_images(json_file)
    photograph(tmp_path / "sub/images/z.jpg")
    assert find_images(json_file) == tmp_path / "sub/images"
    with pytest.raises(FileNotFoundError, match="folder of the images .*none does not exist"):
        find_images(json_file, tmp_path / "none")


def test_refused_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        read_annotations(tmp_path / "none")
    with pytest.raises(ValueError, match="format 'yolov9' is unknown. Allowed: auto, yolo"):
        read_annotations(tmp_path, "yolov9")
    with pytest.raises(ValueError, match="no annotations of a known format"):
        as_instances(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_attribute": "type"}, "CLASS_ATTRIBUTE is for TYPE via, but this is yolo"),
        ({"mask_root": Path("masks")}, "MASK_ROOT is for TYPE mask_files, but this is yolo"),
    ],
)
def test_options_of_another_format(tmp_path, options, message):
    samples.SAMPLES["yolo"](tmp_path)
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path, "yolo", ReadOptions(split="train", **options))


def test_options(tmp_path):
    """They reach the reader."""
    samples.yolo(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match="nights"):
        read_annotations(tmp_path, "yolo", ReadOptions(split="nights"))


def test_options_of_a_coco_json_are_read(source):
    """Or refused, as for any other source."""
    json_file = source / "instances.json"
    with pytest.raises(ValueError, match="CLASS_ATTRIBUTE is for TYPE via, but this is coco"):
        as_instances(json_file, source, options=ReadOptions(class_attribute="kind"))
