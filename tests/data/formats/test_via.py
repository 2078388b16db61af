"""VIA: projects and exports, the attribute with the class, shapes, and what is refused."""

import math

import annotation_samples as samples
import numpy as np
import pycocotools.mask as mask_utils
import pytest
from annotation_samples import CUP, PLATE, via_image, via_project, via_region
from dataset_trees import photograph, write_json

from mask2former.data.formats.annotated_images import encode
from mask2former.data.formats.annotation_formats import FORMATS, ReadOptions, recognise_format


def read(root, split=None, **options):
    return FORMATS["via"].read(root, ReadOptions(split=split, **options))


def written(root, regions, *, export=False, size=(12, 8), **keys):
    photograph(root / "a.jpg", *size)
    content = via_project([via_image("a.jpg", regions)]) | keys
    write_json(root / "via.json", content["_via_img_metadata"] if export else content)
    return root


def found(content):
    return [
        (item.class_name, int(mask_utils.area(encode(item.segmentation, 8, 12))))
        for item in content.images[0].objects
    ]


@pytest.mark.parametrize("regions", [list, lambda r: {str(i): item for i, item in enumerate(r)}])
@pytest.mark.parametrize("export", [False, True])
def test_project_and_export(tmp_path, export, regions):
    """VIA 1 numbers the regions, VIA 2 lists them."""
    written(tmp_path, regions([via_region("cup", CUP), via_region("plate", PLATE)]), export=export)
    assert recognise_format(tmp_path)[0].name == "via"
    content = read(tmp_path)
    assert found(content) == [("cup", 32), ("plate", 16)]
    assert content.classes == ["cup", "plate"]


def test_shapes(tmp_path):
    shapes = [
        {"name": "rect", "x": 1, "y": 2, "width": 3, "height": 4},
        {"name": "circle", "cx": 30, "cy": 20, "r": 15},
        {"name": "ellipse", "cx": 30, "cy": 20, "rx": 18, "ry": 6, "theta": math.pi / 2},
        {"name": "ellipse", "cx": 30, "cy": 20, "rx": 25, "ry": 10},
    ]
    written(tmp_path, [via_region("cup", shape) for shape in shapes], size=(60, 40))
    masks = [
        mask_utils.decode(encode(item.segmentation, 40, 60)).astype(bool)
        for item in read(tmp_path).images[0].objects
    ]
    expected = np.zeros((40, 60), bool)
    expected[2:6, 1:4] = True
    assert (masks[0] == expected).all()
    y, x = np.mgrid[:40, :60] + 0.5
    for mask, radius_x, radius_y in ((masks[1], 15, 15), (masks[2], 6, 18), (masks[3], 25, 10)):
        inside = ((x - 30) / radius_x) ** 2 + ((y - 20) / radius_y) ** 2 < 1
        assert (mask != inside).sum() < 0.05 * inside.sum()


def test_order_of_classes(tmp_path):
    """The options of the project first, also those that no region has."""
    option = {"type": "radio", "options": {"plate": "", "bowl": ""}, "default_options": {}}
    attributes = {"region": {"kind": option}, "file": {}}
    regions = [via_region("spoon", CUP), via_region(" cup ", CUP), via_region("plate", CUP)]
    written(tmp_path, regions, _via_attributes=attributes)
    assert read(tmp_path).classes == ["plate", "bowl", "cup", "spoon"]


def test_class_attribute(tmp_path):
    regions = [via_region("cup", CUP, colour="red"), via_region("plate", PLATE, colour="")]
    written(tmp_path, regions)
    with pytest.raises(ValueError, match=r"via\.json: regions have the attributes colour, kind; s"):
        read(tmp_path)
    content = read(tmp_path, class_attribute="kind")
    assert found(content) == [("cup", 32), ("plate", 16)]
    with pytest.raises(ValueError, match=r"region 1: has the value '', not one class, of the att"):
        read(tmp_path, class_attribute="colour")
    with pytest.raises(ValueError, match="No region has the CLASS_ATTRIBUTE 'size'; the attr"):
        read(tmp_path, class_attribute="size")


def test_check_boxes(tmp_path):
    regions = [via_region({"cup": True, "plate": False}, CUP)]
    written(tmp_path, regions)
    assert found(read(tmp_path)) == [("cup", 32)]
    written(tmp_path, [*regions, via_region({"cup": True, "plate": True}, CUP)])
    with pytest.raises(ValueError, match=r"a\.jpg, region 1: has the value \{'cup': True, 'plate'"):
        read(tmp_path)


def test_without_attributes(tmp_path):
    """Data of one class, whose regions have no attribute."""
    written(tmp_path, [via_region(None, CUP), via_region(None, PLATE)], export=True)
    assert found(read(tmp_path)) == [("object", 32), ("object", 16)]
    assert read(tmp_path, classes=("balloon",)).classes == ["balloon"]
    with pytest.raises(ValueError, match="CLASSES has a, b, but no region has an attribute that"):
        read(tmp_path, classes=("a", "b"))
    written(tmp_path, [via_region(None, CUP), via_region("cup", PLATE)])
    with pytest.raises(ValueError, match="region 0: has the value None, not one class"):
        read(tmp_path)


@pytest.mark.parametrize("folder", [".", "images", "photos", "elsewhere"])
def test_images(tmp_path, folder):
    written(tmp_path, [via_region("cup", CUP)])
    photograph(tmp_path / folder / "b.jpg")
    project = via_project([via_image("b.jpg", [via_region("cup", CUP)])])
    project["_via_settings"]["core"]["default_filepath"] = "photos\\"
    write_json(tmp_path / "via.json", project)
    content = read(tmp_path, image_root=tmp_path / "elsewhere")
    assert content.images[0].path == tmp_path / folder / "b.jpg"


def test_splits(tmp_path):
    for split, name in (("train", "plate"), ("val", "cup")):
        written(tmp_path / split, [via_region(name, CUP)], export=True)
    for split, name in (("train", "plate"), ("val", "cup")):
        content = read(tmp_path, split)
        assert found(content) == [(name, 32)]
        assert content.classes == ["cup", "plate"]
    with pytest.raises(ValueError, match="has the splits train, val; state which"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"name": "point", "cx": 1, "cy": 1}, "the shape 'point' has no area; draw a polygon"),
        (
            {"name": "polyline", "all_points_x": [1, 2, 3], "all_points_y": [1, 2, 3]},
            "'polyline' has no area",
        ),
        ({"name": "star"}, "the shape 'star' is unknown"),
        ({}, "the shape None is unknown"),
        ({"name": "rect", "x": 1, "y": 1, "width": 3}, "'rect' needs the numbers x, y, width, he"),
        ({"name": "circle", "cx": "1", "cy": 1, "r": 1}, "'circle' needs the numbers cx, cy, r"),
        (
            {"name": "polygon", "all_points_x": [1, 2], "all_points_y": [1, 2, 3]},
            "as many numbers in all_points_x as",
        ),
        ({"name": "polygon", "all_points_x": [1, 2], "all_points_y": [1, 2]}, "of 2 points"),
        ({"name": "circle", "cx": 500, "cy": 1, "r": 1}, "by more than its longest side"),
    ],
)
def test_bad_shapes(tmp_path, shape, message):
    written(tmp_path, [via_region("cup", shape)])
    with pytest.raises(ValueError, match=rf"via\.json, a\.jpg, region 0: .*{message}"):
        read(tmp_path)


def test_rectangles_only(tmp_path):
    shape = {"name": "rect", "x": 1, "y": 2, "width": 3, "height": 4}
    written(tmp_path, [via_region("cup", shape)])
    with pytest.raises(ValueError, match="all 1 shapes are rectangles"):
        read(tmp_path)
    assert found(read(tmp_path, boxes_as_masks=True)) == [("cup", 12)]


def test_other_files(tmp_path, caplog):
    samples.via(tmp_path)
    write_json(tmp_path / "notes.json", {"a": 1})
    assert len(read(tmp_path).images) == 2
    assert "notes.json: is no JSON of VIA and not read" in caplog.text
    write_json(tmp_path / "via3.json", {"project": {}, "config": {}, "metadata": {}, "view": {}})
    with pytest.raises(ValueError, match=r"via3\.json is a project of VIA 3; export its annotatio"):
        read(tmp_path)


def test_bad_json(tmp_path):
    written(tmp_path, [{"region_attributes": {}}])
    with pytest.raises(ValueError, match=r"an image or region has no 'shape_attributes'"):
        read(tmp_path)
    entry = via_image("a.jpg", [])
    write_json(tmp_path / "via.json", {"a.jpg9": entry, "a.jpg10": entry})
    with pytest.raises(ValueError, match=r"via\.json, a\.jpg: the image .* occurs more than once"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"name": ["x"]}, r"the shape \['x'\] is unknown"),
        ({"name": "circle", "cx": 1, "cy": 1, "r": 10**400}, "'circle' needs the numbers"),
        ({"name": "circle", "cx": 1, "cy": 1, "r": 1e308}, "'circle' needs the numbers"),
    ],
)
def test_values_that_overflow(tmp_path, shape, message):
    written(tmp_path, [via_region("cup", shape)])
    with pytest.raises(ValueError, match=rf"via\.json, a\.jpg, region 0: .*{message}"):
        read(tmp_path)
