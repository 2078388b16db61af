"""COCO JSON in the folders of Roboflow, CVAT and Label Studio."""

import annotation_samples as samples
import pycocotools.mask as mask_utils
import pytest
from annotation_samples import CUP, PLATE, coco_annotation, coco_content, flat
from dataset_trees import photograph, write_json

from mask2former.data.formats.annotated_images import encode
from mask2former.data.formats.annotation_formats import FORMATS, ReadOptions, recognise_format

# 12 x 8 pixels, column by column: the last pixel of column 0 and the first of column 1.
RLE = {"size": [8, 12], "counts": [7, 2, 87]}


def read(root, split=None, **options):
    return FORMATS["coco"].read(root, ReadOptions(split=split, **options))


def found(content):
    return [
        (item.class_name, int(mask_utils.area(encode(item.segmentation, 8, 12))), item.is_crowd)
        for item in content.images[0].objects
    ]


def roboflow(root, *splits):
    for split in splits:
        samples.images(root / split)
        categories = [
            {"id": 0, "name": "dishes", "supercategory": "none"},
            {"id": 1, "name": "cup", "supercategory": "dishes"},
            {"id": 2, "name": "plate", "supercategory": "dishes"},
        ]
        annotations = [
            coco_annotation(0, 1, [flat(CUP)]),
            coco_annotation(1, 2, [flat(PLATE)]),
        ]
        for annotation in annotations:
            del annotation["attributes"]
        content = coco_content(annotations) | {"categories": categories}
        content |= {"info": {"year": "2024", "version": "1"}, "licenses": [{"id": 1, "url": "x"}]}
        write_json(root / split / "_annotations.coco.json", content)


def test_roboflow(tmp_path):
    roboflow(tmp_path, "train", "valid", "test")
    assert recognise_format(tmp_path)[0].name == "coco"
    for split, folder in (("train", "train"), ("val", "valid"), ("valid", "valid")):
        content = read(tmp_path, split)
        assert content.classes == ["cup", "plate"]
        assert found(content) == [("cup", 32, False), ("plate", 16, False)]
        assert content.images[0].path == tmp_path / folder / "a.jpg"
    with pytest.raises(ValueError, match="has the splits test, train, valid; state which"):
        read(tmp_path)
    assert len(read(tmp_path / "train").images) == 2
    assert len(read(tmp_path / "train" / "_annotations.coco.json").images) == 2


@pytest.mark.parametrize("segmentation", [[], None, [[]]])
def test_boxes_of_mixed_projects(tmp_path, segmentation):
    annotations = [coco_annotation(1, 1, [flat(CUP)]), coco_annotation(2, 2, [flat(PLATE)])]
    annotations[1] |= {"segmentation": segmentation, "bbox": [4, 0, 4, 4]}
    samples.images(tmp_path)
    content = coco_content(annotations)
    # A class that looks like the supercategory of the others, but has objects.
    content["categories"][0]["supercategory"] = "none"
    content["categories"][1]["supercategory"] = "cup"
    write_json(tmp_path / "_annotations.coco.json", content)
    with pytest.raises(ValueError, match="1 objects have a box and no mask; .*BOXES_AS_MASKS"):
        read(tmp_path)
    content = read(tmp_path, boxes_as_masks=True)
    assert found(content) == [("cup", 32, False), ("plate", 16, False)]


def test_supercategory_with_the_name_of_a_class(tmp_path):
    """Roboflow names both alike for projects of one class."""
    roboflow(tmp_path, "train")
    file = tmp_path / "train" / "_annotations.coco.json"
    categories = [
        {"id": 0, "name": "cup", "supercategory": "none"},
        {"id": 1, "name": "cup", "supercategory": "cup"},
    ]
    samples.change_json(file, lambda c: c.update(categories=categories))
    samples.change_json(file, lambda c: c["annotations"].pop())
    content = read(tmp_path)
    assert content.classes == ["cup"]
    assert found(content) == [("cup", 32, False)]


@pytest.mark.parametrize("change", ["used", "nested"])
def test_categories_that_stay(tmp_path, change):
    """Category 0 with objects, and one that is not the supercategory of all."""
    roboflow(tmp_path, "train")
    file = tmp_path / "train" / "_annotations.coco.json"
    if change == "used":
        samples.change_json(file, lambda c: c["annotations"][0].update(category_id=0))
    else:
        samples.change_json(file, lambda c: c["categories"][2].update(supercategory="none"))
    assert read(tmp_path).classes == ["dishes", "cup", "plate"]


def test_brush_masks_of_cvat(tmp_path, caplog):
    """CVAT marks every mask as a crowd; each is one object."""
    samples.coco(tmp_path)
    file = tmp_path / "annotations" / "instances_default.json"
    mask = coco_annotation(3, 1, RLE, iscrowd=1, bbox=[0, 0, 2, 8], area=2)
    samples.change_json(file, lambda c: c["annotations"].append(mask))
    expected = [("cup", 32, False), ("plate", 16, False), ("cup", 2, False)]
    assert found(read(tmp_path)) == expected
    assert "1 masks are marked as crowds" in caplog.text
    # Without the attributes, and without the head, each says that it is of CVAT.
    samples.change_json(file, lambda c: [a.pop("attributes") for a in c["annotations"]])
    assert found(read(tmp_path)) == expected


def test_crowds_of_others_stay(tmp_path):
    roboflow(tmp_path, "train")
    file = tmp_path / "train" / "_annotations.coco.json"
    crowd = coco_annotation(3, 1, RLE, iscrowd=1, bbox=[0, 0, 2, 8], area=2)
    del crowd["attributes"]
    samples.change_json(file, lambda c: c["annotations"].append(crowd))
    assert found(read(tmp_path))[2] == ("cup", 2, True)


def test_head_or_attributes_tell_cvat(tmp_path):
    samples.coco(tmp_path)
    file = tmp_path / "annotations" / "instances_default.json"
    mask = coco_annotation(3, 1, RLE, iscrowd=1, bbox=[0, 0, 2, 8], area=2)
    samples.change_json(file, lambda c: c.update(annotations=[mask], licenses=[], info={}))
    assert found(read(tmp_path)) == [("cup", 2, False)]


@pytest.mark.parametrize(
    ("json", "image", "stated"),
    [
        ("result.json", "images/a.jpg", "images/a.jpg"),  # Label Studio
        ("result.json", "images/a.jpg", "images\\a.jpg"),
        ("result.json", "images/a.jpg", "../../label-studio/data/media/upload/1/a.jpg"),
        ("result.json", "a.jpg", "/data/upload/a.jpg"),
        ("annotations/instances_train.json", "images/train/a.jpg", "a.jpg"),  # CVAT
        ("annotations/instances_train.json", "images/train/set/a.jpg", "set/a.jpg"),
        ("annotations/instances_train.json", "train/a.jpg", "a.jpg"),  # COCO
        ("annotations/instances_train.json", "images/a.jpg", "a.jpg"),
        ("annotations/instances_train.json", "photos/a.jpg", "a.jpg"),
        ("annotations/instances_train.json", "a.jpg", "a.jpg"),
    ],
)
def test_layouts(tmp_path, json, image, stated):
    photograph(tmp_path / image)
    write_json(tmp_path / json, coco_content([coco_annotation(1, 1, [flat(CUP)])], names=(stated,)))
    content = read(tmp_path)
    assert content.images[0].path == tmp_path / image
    assert found(content) == [("cup", 32, False)]


def test_other_tasks_of_cvat(tmp_path):
    """The export may hold keypoints of the same images."""
    samples.coco(tmp_path)
    write_json(tmp_path / "annotations" / "person_keypoints_default.json", coco_content([]))
    assert len(found(read(tmp_path))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": []}, "has no segmentation; it must be a list of polygons or an RLE"),
        ({"segmentation": [[1, 1, 2, 2]]}, "has a polygon of 4 coordinates"),
        ({"category_id": 9}, "has category_id 9, which is not one of the categories"),
        ({"segmentation": {"size": [8, 12], "counts": [5]}}, "it counts 5 of 96 pixels"),
    ],
)
def test_bad_annotations(tmp_path, change, message):
    samples.coco(tmp_path)
    file = tmp_path / "annotations" / "instances_default.json"
    samples.change_json(file, lambda c: c["annotations"][0].update(change))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no COCO JSON with images and categories"):
        read(tmp_path)
    write_json(tmp_path / "a.json", {"images": [], "categories": []})
    with pytest.raises(ValueError, match=r"a\.json lists no categories"):
        read(tmp_path)
    write_json(tmp_path / "a.json", {"images": 3, "categories": 4})
    with pytest.raises(ValueError, match=r"a\.json has no list 'images', but a number"):
        read(tmp_path)
