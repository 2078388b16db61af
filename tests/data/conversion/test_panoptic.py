"""Instances and label maps → COCO panoptic, read back by the readers of training."""

import json
import shutil

import numpy as np
import own_data
import pytest
from dataset_trees import HEIGHT, WIDTH, photograph, save, write_json
from PIL import Image

from mask2former.data.conversion.label_files import LabelMaps, read_label_classes
from mask2former.data.conversion.panoptic import PanopticOptions, convert_panoptic
from mask2former.data.formats.coco_panoptic import read_panoptic
from mask2former.data.formats.findings import Findings
from mask2former.data.formats.images import read_panoptic_png

CLASSES = {0: "table", 1: "wall", 2: "cup"}


@pytest.fixture
def convert(source):
    """Function that converts the source, and returns the summary and the panoptic JSON."""

    def run(overwrite=False, workers=1, **options):
        json_file, output = source / "instances.json", source / "out"
        summary = convert_panoptic(
            json_file,
            source / "images",
            output,
            PanopticOptions(**options),
            workers=workers,
            overwrite=overwrite,
        )
        assert not list(output.glob(".*"))  # nothing temporary is left
        findings = Findings()
        data = read_panoptic(str(output / "panoptic.json"), findings)
        assert findings == Findings()
        for annotation in data.annotations:
            assert read_panoptic_png(str(output / "panoptic" / annotation["file_name"])).any()
        return summary, data.content

    return run


def segments(content, index=0):
    names = {category["id"]: category["name"] for category in content["categories"]}
    return [
        (names[s["category_id"]], s["area"], s["bbox"], s["iscrowd"])
        for s in content["annotations"][index]["segments_info"]
    ]


CUP, PLATE = ("cup", 32, [0, 0, 4, 8], 0), ("plate", 16, [4, 0, 4, 4], 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_label_maps(source, convert, workers):
    summary, content = convert(label_root=source / "labels", classes=CLASSES, workers=workers)
    assert [(c["id"], c["name"], c["isthing"]) for c in content["categories"]] == [
        (3, "cup", 1),
        (7, "plate", 1),
        (8, "table", 0),
        (9, "wall", 0),
    ]
    assert all(len(category["color"]) == 3 for category in content["categories"])
    # 8 x 7 pixels of table less 4 x 7 of the cup and 16 of the plate.
    expected = [("table", 12, [4, 4, 4, 3], 0), ("wall", 31, [8, 0, 4, 8], 0), CUP, PLATE]
    for i, name in enumerate("abc"):
        assert segments(content, i) == expected
        assert content["annotations"][i]["file_name"] == f"{name}.png"
    assert content["images"] == json.loads((source / "instances.json").read_text())["images"]
    assert summary.num_images == 3 and summary.num_segments == 12
    assert summary.things == ["cup", "plate"] and summary.stuff == ["table", "wall"]
    # The bottom row is cup in 8 columns, of which the object covers 4.
    assert summary.unassigned == content["info"]["thing_pixels_without_object"] == {"cup": 12}
    ids = np.array(Image.open(source / "out/panoptic/a.png")).reshape(HEIGHT, WIDTH, 3)
    assert not ids[7, 4:8].any() and not ids[7, 11].any() and ids[7, 8:11].any(axis=1).all()


def test_thing_pixels_become_crowds(source, convert):
    _, content = convert(label_root=source / "labels", classes=CLASSES, unassigned="crowd")
    assert ("cup", 4, [4, 7, 4, 1], 1) in segments(content)


def test_background(convert):
    _, content = convert(background="table")
    assert segments(content) == [("table", 48, [4, 0, 8, 8], 0), CUP, PLATE]


def test_without_stuff(convert):
    summary, content = convert()
    assert segments(content) == [CUP, PLATE] and summary.stuff == []


def test_stuff_among_the_objects(source, convert):
    """By name or by `isthing`; the instance JSON for AP has only things."""
    _, content = convert(stuff=("plate",))
    assert [c["isthing"] for c in content["categories"]] == [1, 0]
    assert segments(content) == [CUP, PLATE] or segments(content) == [PLATE, CUP]
    instances = json.loads((source / "out/instances.json").read_text())
    assert [c["name"] for c in instances["categories"]] == ["cup"]
    assert [a["category_id"] for a in instances["annotations"]] == [3, 3, 3]


def test_category_that_is_no_thing(edit, convert):
    def change(content):
        content["categories"][1] |= {"isthing": 0, "color": [1, 2, 3]}

    edit(change)
    _, content = convert()
    assert [c["isthing"] for c in content["categories"]] == [1, 0]
    assert content["categories"][1]["color"] == [1, 2, 3]


def test_background_of_a_stuff_class(convert):
    """What is drawn of it, and the rest, are one segment."""
    _, content = convert(stuff=("plate",), background="plate")
    assert sorted(segments(content)) == [CUP, ("plate", 64, [4, 0, 8, 8], 0)]


def test_hidden_objects_are_listed(edit, convert):
    def change(content):
        small = content["annotations"][0] | {"id": 50, "segmentation": [[1, 1, 2, 1, 2, 2, 1, 2]]}
        content["annotations"].insert(0, small)

    edit(change)
    summary, content = convert(overlap="order")
    assert summary.hidden == [50] and summary.num_segments == 6
    assert content["info"]["annotations_without_segment"] == {
        "empty": [],
        "hidden": [50],
        "small": [],
    }
    summary, content = convert(overlap="area", overwrite=True)
    assert summary.hidden == [] and summary.num_segments == 7
    assert segments(content)[2] == ("cup", 1, [1, 1, 1, 1], 0)


def test_image_without_objects(edit, convert):
    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]

    edit(change)
    _, content = convert(background="table")
    assert segments(content) == [("table", 96, [0, 0, 12, 8], 0)]


def test_ids_that_are_texts(edit, convert):
    def change(content):
        for key, entries in (
            ("id", content["categories"]),
            ("category_id", content["annotations"]),
        ):
            for entry in entries:
                entry[key] = {3: "table", 7: "p"}[entry[key]]

    edit(change)
    _, content = convert(background="table")
    assert [c["id"] for c in content["categories"]] == ["table", "p", "table_stuff"]
    assert segments(content)[0] == ("table", 48, [4, 0, 8, 8], 0)


def test_images_in_folders(source, edit, convert):
    """PNGs keep the folders below that of the images, and leave no folder above the output."""
    names = ["x/a.jpg", "y/a.jpg", "../other/c.jpg"]
    for old, new in zip("abc", names, strict=True):
        (source / "images" / new).parent.mkdir(exist_ok=True)
        shutil.move(source / "images" / f"{old}.jpg", source / "images" / new)
    labels = source / "labels"
    for old, new in (("a", "x/a"), ("b", "y/a")):
        (labels / new).parent.mkdir()
        shutil.move(labels / f"{old}.png", labels / f"{new}.png")

    def change(content):
        for image, name in zip(content["images"], names, strict=True):
            image["file_name"] = name

    edit(change)
    _, content = convert(label_root=labels, classes=CLASSES)
    assert [a["file_name"] for a in content["annotations"]] == ["x/a.png", "y/a.png", "c.png"]
    assert [i["file_name"] for i in content["images"]] == names
    edit(lambda content: content["images"][1].update(file_name="z/a.jpg"))
    with pytest.raises(ValueError, match=r"image z/a\.jpg has several label maps .*: x/a, y/a\."):
        convert(label_root=labels, classes=CLASSES, overwrite=True)


def test_label_maps_beside_images(source, convert):
    """A photograph of the same name is no label map."""
    for name in "abc":
        shutil.move(source / "labels" / f"{name}.png", source / "images" / f"{name}.png")
    photograph(source / "images/spare.jpg")
    summary, content = convert(label_root=source / "images", classes=CLASSES)
    assert segments(content)[1] == ("wall", 31, [8, 0, 4, 8], 0)
    assert summary.unused_label_maps == 1


@pytest.mark.parametrize(
    "classes, num", [({0: "table", 1: "wall", 255: "wall"}, 32), (CLASSES, 31)]
)
def test_label_255(source, convert, classes, num):
    """It is ignored, unless it is the label of a class."""
    _, content = convert(label_root=source / "labels", classes=classes | {2: "cup"})
    assert segments(content)[1][:2] == ("wall", num)


def test_stated_ignore_labels(source, convert):
    """They go before classes."""
    _, content = convert(
        label_root=source / "labels", classes=CLASSES, ignore_labels=frozenset({1, 255})
    )
    assert "wall" not in [c["name"] for c in content["categories"]]
    assert [name for name, *_ in segments(content)] == ["table", "cup", "plate"]


# ---- refused sources ----


def test_refused_label_maps(source, convert):
    labels = source / "labels"
    options = {"label_root": labels, "classes": CLASSES}
    path = labels / "b.png"
    save(path, np.zeros((HEIGHT + 1, WIDTH), np.uint8))
    with pytest.raises(
        ValueError, match=r"b\.png of b\.jpg is 12 x 9 pixels, but its image 12 x 8"
    ):
        convert(**options)
    save(path, np.full((HEIGHT, WIDTH), 7, np.uint8))
    with pytest.raises(ValueError, match=r"b\.png of b\.jpg has labels that are neither .*: 7\."):
        convert(**options, workers=2)
    save(path, np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    with pytest.raises(ValueError, match=r"b\.png has 3 channels; a label map has one"):
        convert(**options)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"b\.png cannot be read as an image"):
        convert(**options)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jpg has no label map in .*labels \(1 of 3 im"):
        convert(**options)
    # Nothing is left of them.
    assert not (source / "out").exists()


@pytest.mark.parametrize(
    "options, why",
    [
        ({"stuff": ("road",)}, "stuff class 'road' is not one of the classes .*: cup, plate"),
        ({"background": "cup"}, "background class 'cup' is a class of the objects"),
        ({"background": "Plate"}, "'plate' of the objects and the stuff class 'Plate' differ in"),
        ({"classes": CLASSES}, "must be given together"),
    ],
)
def test_refused_options(convert, options, why):
    with pytest.raises(ValueError, match=why):
        convert(**options)


def test_labels_and_background_together(source, convert):
    with pytest.raises(ValueError, match="with them, all stuff is in the label maps"):
        convert(label_root=source / "labels", classes=CLASSES, background="rest")


def test_refused_instances(source, edit, convert):
    edit(lambda content: content["images"][1].update(file_name="a.png"))
    with pytest.raises(
        ValueError, match=r"images a\.jpg and a\.png would have the same PNG a\.png"
    ):
        convert()
    edit(lambda content: content["annotations"][0].update(category_id=99))
    with pytest.raises(ValueError, match="category_id 99, which is not one of the categories"):
        convert()
    own_data.panoptic(source, "instances.json")
    with pytest.raises(ValueError, match="is COCO panoptic JSON, not instance JSON"):
        convert()
    write_json(source / "instances.json", {"images": []})
    with pytest.raises(ValueError, match=r"instances\.json"):
        convert()


def test_existing_output(source, convert):
    convert()
    before = {p: p.stat().st_mtime_ns for p in (source / "out").rglob("*")}
    with pytest.raises(FileExistsError, match=r"out/panoptic exists already.*--overwrite"):
        convert()
    # An error leaves what was there.
    (source / "labels/b.png").unlink()
    with pytest.raises(FileNotFoundError):
        convert(label_root=source / "labels", classes=CLASSES, overwrite=True)
    assert before == {p: p.stat().st_mtime_ns for p in (source / "out").rglob("*")}
    (source / "out/panoptic/old.png").touch()
    convert(background="table", overwrite=True)
    assert not (source / "out/panoptic/old.png").exists()


# ---- label maps and their classes ----


def test_label_classes(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("\ufefftable\n wall, brick \n\n", encoding="utf-8")
    assert read_label_classes(file) == {0: "table", 1: "wall, brick"}
    for text, why in (("a\n\nb", "an empty line"), ("a\nb\na\n", "a name twice")):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"has {why}; it must list one class a line"):
            read_label_classes(file)
    for name, text in (
        ("c.yaml", "0: table\n255: object\n"),
        ("c.json", '{"0": "table", "255": "object"}'),
    ):
        (tmp_path / name).write_text(text)
        assert read_label_classes(tmp_path / name) == {0: "table", 255: "object"}
    for text in ("", "[table]", "{table: 0}", "{0: no}", "{true: table}", "{0: ''}"):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"c\.yaml must map labels to names"):
            read_label_classes(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("{0: ")
    with pytest.raises(ValueError, match=r"c\.yaml cannot be read: "):
        read_label_classes(tmp_path / "c.yaml")
    with pytest.raises(FileNotFoundError):
        read_label_classes(tmp_path / "none.txt")


def test_folder_of_label_maps(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder of the label maps .*none does not exist"):
        LabelMaps(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no images"):
        LabelMaps(tmp_path)
