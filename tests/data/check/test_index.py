"""Indexing of JSON and folders, with their mistakes."""

import os

import own_data
import pytest
from dataset_trees import photograph, write_json
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from mask2former.data.check.index import build_index, find_unlisted
from mask2former.data.datasets.custom_entries import register_entries


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


def make_index(kind, root, content=None, name="own_train", **others):
    """Register own data, optionally overwrite its JSON with `content`, and index it."""
    register_entries([own_data.entry(kind, root, name, **others)])
    if content is not None:
        file = {"instance": "instances.json", "panoptic": "panoptic.json"}[kind]
        write_json(root / file, content)
    return build_index(name)


def shorten(findings):
    return [(os.path.basename(f.file), f.id, f.why) for f in findings]


@pytest.mark.parametrize("kind", ["instance", "panoptic", "semantic"])
def test_valid(tmp_path, kind):
    {
        "instance": own_data.instances,
        "panoptic": own_data.panoptic,
        "semantic": own_data.semantic,
    }[kind](tmp_path)
    index = make_index(kind, tmp_path)
    assert index.problems == index.warnings == find_unlisted([index]) == []
    assert index.classes == own_data.CLASSES[: 2 if kind == "instance" else 3]
    assert [os.path.basename(item.file_name) for item in index.items] == ["a.jpg", "b.jpg", "c.jpg"]
    assert index.thing_ids == (set() if kind == "semantic" else {0, 1})
    item = index.items[0]
    assert item.size == (None if kind == "semantic" else (8, 12))
    assert len(item.annotations or []) == (2 if kind == "instance" else 0)
    assert len(item.segments_info) == (3 if kind == "panoptic" else 0)


def test_instance_json_with_many_mistakes(tmp_path):
    content = own_data.instances(tmp_path)
    images, annotations = content["images"], content["annotations"]
    images.append(images[0])
    images.append({"id": 4, "file_name": "a.jpg"})
    images.append({"id": 5})
    annotations[0]["image_id"] = 77
    annotations[1]["id"] = 12
    del annotations[3]["area"]
    del annotations[4]["category_id"]
    index = make_index("instance", tmp_path, content)
    assert shorten(index.problems) == [
        ("instances.json", 14, "an annotation has no 'category_id' ($.annotations[4])"),
        ("instances.json", 1, "images: id 1 occurs more than once"),
        (
            *("instances.json", 4),
            f"image 1 has the same file {tmp_path}/images/a.jpg",
        ),
        ("instances.json", 5, "an image has no 'file_name'"),
        (
            *("instances.json", 10),
            "the annotation belongs to image 77, which the JSON does not list",
        ),
        ("instances.json", 12, "annotations: id 12 occurs more than once"),
    ]
    assert [len(item.annotations) for item in index.items] == [1, 1, 1, 0]


def test_panoptic_json_with_many_mistakes(tmp_path):
    content = own_data.panoptic(tmp_path)
    annotations = content["annotations"]
    annotations[0]["image_id"] = 2
    annotations[2]["image_id"] = 9
    content["categories"].pop()
    index = make_index("panoptic", tmp_path, content)
    assert shorten(index.problems) == [
        (
            *("panoptic.json", None),
            "lists 2 categories, but 3 are registered; 1 are missing, such as id 7",
        ),
        ("panoptic.json", 2, "annotations: image_id 2 occurs more than once"),
        ("panoptic.json", 9, "the JSON does not list the image of this annotation"),
    ]
    why = "the image has no annotation and is not used"
    assert shorten(index.warnings) == [("panoptic.json", 1, why), ("panoptic.json", 3, why)]


def test_renamed_category(tmp_path):
    content = own_data.instances(tmp_path)
    content["categories"][0]["name"] = "mug"
    index = make_index("instance", tmp_path, content)
    why = "the category is 'mug' here, but registered as 'cup'"
    assert shorten(index.problems) == [("instances.json", 3, why)]
    with pytest.raises(ValueError, match=f"{why}"):
        DatasetCatalog.get("own_train")


def test_unpaired_images_and_label_maps(tmp_path):
    own_data.semantic(tmp_path)
    (tmp_path / "labels" / "a.png").unlink()
    (tmp_path / "images" / "c.jpg").unlink()
    photograph(tmp_path / "images" / "b.png")
    index = make_index("semantic", tmp_path)
    labels, images = tmp_path / "labels", tmp_path / "images"
    assert shorten(index.problems) == [
        ("a.jpg", None, f"the image has no label map in {labels}"),
        ("c.png", None, f"the label map has no image in {images}"),
    ]
    assert len(index.items) == 1
    why = "no record of the data set lists this file"
    assert shorten(find_unlisted([index])) == [("b.png", None, why)]


def test_files_of_another_split_count_as_listed(tmp_path):
    content = own_data.instances(tmp_path)
    for name, image in (("first.json", 0), ("second.json", 1)):
        images = [content["images"][image]]
        write_json(tmp_path / name, content | {"images": images, "annotations": []})
    indices = [
        make_index("instance", tmp_path, name=name, INSTANCES_JSON=str(tmp_path / f"{name}.json"))
        for name in ("first", "second")
    ]
    why = "no record of the data set lists this file"
    assert shorten(find_unlisted(indices)) == [("c.jpg", None, why)]


@pytest.mark.parametrize("text", ["{", "[1]", '{"images": 3}'])
def test_damaged_json(tmp_path, text):
    own_data.instances(tmp_path)
    make_index("instance", tmp_path)
    (tmp_path / "instances.json").write_text(text)
    problem, *_ = build_index("own_train").problems
    assert problem.file == str(tmp_path / "instances.json")
    texts = ("is not valid JSON", "has no list 'images'", "is a list; COCO JSON is an object")
    assert any(text in problem.why for text in texts)


def test_missing_folders(tmp_path):
    own_data.panoptic(tmp_path)
    make_index("panoptic", tmp_path)
    (tmp_path / "panoptic").rename(tmp_path / "elsewhere")
    (tmp_path / "panoptic.json").unlink()
    assert shorten(build_index("own_train").problems) == [
        ("panoptic", None, "the folder of the panoptic PNGs does not exist"),
        ("panoptic.json", None, "cannot be read: No such file or directory"),
    ]


def test_class_list_shorter_than_the_ids(tmp_path):
    own_data.instances(tmp_path)
    metadata = {"thing_classes": ["cup"], "thing_dataset_id_to_contiguous_id": {3: 0, 7: 1}}
    DatasetCatalog.register("short", list)
    MetadataCatalog.get("short").set(
        evaluator_type="coco",
        image_root=str(tmp_path / "images"),
        json_file=str(tmp_path / "instances.json"),
        **metadata,
    )
    why = "the metadata has 1 class names, but ids of 2 categories"
    assert ("short", None, why) in shorten(build_index("short").problems)


def test_data_set_of_another_project(tmp_path):
    """It can only be read with its loader."""
    annotation = {"bbox": [1, 2, 4, 8], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    record = {"file_name": "x.jpg", "height": 8, "width": 12, "annotations": [annotation]}
    DatasetCatalog.register("foreign", lambda: [record])
    MetadataCatalog.get("foreign").thing_classes = ["cup"]
    index = build_index("foreign")
    assert index.problems == []
    assert index.classes == ["cup"] and index.thing_ids == {0}
    assert index.items[0].annotations[0]["bbox"] == [1, 2, 3, 6]

    def fail():
        raise RuntimeError("the disk is on fire")

    DatasetCatalog.register("burning", fail)
    why = "cannot be loaded: RuntimeError: the disk is on fire"
    assert shorten(build_index("burning").problems) == [("burning", None, why)]
    DatasetCatalog.register("empty", list)
    assert shorten(build_index("empty").problems) == [("empty", None, "the data set has no images")]


def test_lvis_images_have_only_a_url(tmp_path):
    content = own_data.instances(tmp_path)
    for image in content["images"]:
        name = image.pop("file_name")
        image["coco_url"] = f"http://images.cocodataset.org/images/{name}"
    write_json(tmp_path / "lvis.json", content)
    DatasetCatalog.register("tiny_lvis", list)
    MetadataCatalog.get("tiny_lvis").set(
        evaluator_type="lvis",
        image_root=str(tmp_path),
        json_file=str(tmp_path / "lvis.json"),
        thing_classes=["cup", "plate"],
    )
    index = build_index("tiny_lvis")
    assert index.problems == find_unlisted([index]) == []
    assert index.contiguous_ids == {3: 0, 7: 1}
    assert index.items[0].file_name == str(tmp_path / "images/a.jpg")
