"""COCO panoptic → label maps."""

import json

import numpy as np
import own_data
import pytest
from dataset_trees import save, write_json
from PIL import Image

from mask2former.data.conversion.semantic import convert_semantic


def convert(root, **options):
    return convert_semantic(root / "panoptic.json", root / "panoptic", root / "out", **options)


@pytest.fixture
def content(tmp_path):
    return own_data.panoptic(tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_labels(content, tmp_path, workers):
    """In the order of training: things, then stuff."""
    classes, ignore_label = convert(tmp_path, workers=workers)
    assert (classes, ignore_label) == (own_data.CLASSES, 255)
    assert (tmp_path / "out/classes.txt").read_text() == "cup\nplate\ntable\n"
    for stem in own_data.STEMS:
        labels = np.array(Image.open(tmp_path / "out/labels" / f"{stem}.png"))
        assert labels.dtype == np.uint8 and (labels == own_data.labels()).all()


def test_void_and_crowds(content, tmp_path):
    """Void is 255; crowds have the label of their class."""
    content["annotations"][0]["segments_info"][1]["iscrowd"] = 1  # the images share the list
    write_json(tmp_path / "panoptic.json", content)
    png = tmp_path / "panoptic/a.png"
    colours = np.array(Image.open(png))
    colours[0, :6] = 0
    save(png, colours)
    convert(tmp_path)
    expected = own_data.labels()
    expected[0, :6] = 255
    assert (np.array(Image.open(tmp_path / "out/labels/a.png")) == expected).all()


def test_many_classes(content, tmp_path):
    """256 classes need 16 bits."""
    more = [{"id": 100 + i, "name": f"class {i}", "isthing": 0} for i in range(253)]
    write_json(
        tmp_path / "panoptic.json", content | {"categories": [*content["categories"], *more]}
    )
    classes, ignore_label = convert(tmp_path)
    assert (len(classes), ignore_label) == (256, 65535)
    labels = np.array(Image.open(tmp_path / "out/labels/a.png"))
    assert labels.dtype == np.uint16 and (labels == own_data.labels()).all()


def test_refused(content, tmp_path):
    segments = content["annotations"][1]["segments_info"]
    content["annotations"][1]["segments_info"] = segments[:-1]
    write_json(tmp_path / "panoptic.json", content)
    with pytest.raises(ValueError, match=r"b\.png has the segment id 300 \(1 unknown ids\)"):
        convert(tmp_path)
    for categories in ([], [{"id": i, "name": "x"} for i in (3, 7, 9)]):
        write_json(tmp_path / "panoptic.json", content | {"categories": categories})
        with pytest.raises(ValueError, match=r"panoptic\.json"):
            convert(tmp_path)
    own_data.instances(tmp_path, "panoptic.json")
    with pytest.raises(ValueError, match="is COCO instance JSON, not panoptic JSON"):
        convert(tmp_path)
    assert not (tmp_path / "out").exists()


def test_existing_output(content, tmp_path):
    convert(tmp_path)
    with pytest.raises(FileExistsError, match=r"out/labels exists already.*--overwrite"):
        convert(tmp_path)
    convert(tmp_path, overwrite=True)
    assert json.loads((tmp_path / "panoptic.json").read_text()) == content
