"""LabelMe: shapes, groups, images that were moved, and what is refused."""

import base64
import io
import json

import annotation_samples as samples
import numpy as np
import pycocotools.mask as mask_utils
import pytest
from annotation_samples import CUP, PLATE, labelme_json, labelme_shape
from dataset_trees import photograph
from PIL import Image

from mask2former.data.formats.annotated_images import encode
from mask2former.data.formats.annotation_formats import FORMATS, ReadOptions

SQUARE = [[1, 1], [3, 1], [3, 3], [1, 3]]


def read(root, split=None, **options):
    return FORMATS["labelme"].read(root, ReadOptions(split=split, **options))


def mask_png(values) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.array(values, np.uint8)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def objects(root, *shapes, **keys):
    """Class and pixels of the objects of one image with these shapes."""
    photograph(root / "a.jpg")
    labelme_json(root / "a.json", list(shapes), **keys)
    (image,) = read(root).images
    return [
        (item.class_name, mask_utils.decode(encode(item.segmentation, 8, 12)).astype(int))
        for item in image.objects
    ]


def test_shapes(tmp_path):
    found = objects(
        tmp_path,
        labelme_shape("polygon", SQUARE),
        labelme_shape("rectangle", [[4, 5], [2, 1]], "rectangle"),
        labelme_shape("corners", SQUARE, "rectangle"),
        labelme_shape("turned", [[2, 0], [4, 2], [2, 4], [0, 2]], "oriented_rectangle"),
        labelme_shape("old", SQUARE, None),
    )
    square = np.zeros((8, 12), int)
    square[1:3, 1:3] = 1
    rectangle = np.zeros((8, 12), int)
    rectangle[1:5, 2:4] = 1
    names = ["polygon", "rectangle", "corners", "turned", "old"]
    assert [name for name, _ in found] == names
    for i, expected in ((0, square), (1, rectangle), (2, square), (4, square)):
        assert (found[i][1] == expected).all(), names[i]
    assert 7 <= found[3][1].sum() <= 9


def test_circle(tmp_path):
    """Centre and a point on it, here of a circle of radius 20."""
    photograph(tmp_path / "a.jpg", 60, 50)
    shape = labelme_shape("cup", [[30, 25], [42, 41]], "circle")
    labelme_json(tmp_path / "a.json", [shape], imageHeight=50, imageWidth=60)
    (item,) = read(tmp_path).images[0].objects
    mask = mask_utils.decode(encode(item.segmentation, 50, 60))
    y, x = np.mgrid[:50, :60] + 0.5
    assert (mask != ((x - 30) ** 2 + (y - 25) ** 2 < 400)).sum() < 30


def test_mask(tmp_path):
    """A picture of the part of the image from the first point on, cut off at the border."""
    shape = labelme_shape("cup", [[2, 3], [4, 4]], "mask", mask=mask_png([[0, 1, 1], [1, 0, 1]]))
    beyond = labelme_shape("cup", [[10, -1], [12, 0]], "mask", mask=mask_png([[1] * 3] * 2))
    (_, first), (_, second) = objects(tmp_path, shape, beyond)
    expected = np.zeros((8, 12), int)
    expected[3, 3:5] = expected[4, [2, 4]] = 1
    assert (first == expected).all()
    assert second.sum() == 2
    assert second[0, 10:].all()


def test_groups(tmp_path):
    """Shapes of one label and group are one object, polygons and masks together."""
    part = labelme_shape("cup", [[9, 6], [9, 6]], "mask", mask=mask_png([[1]]), group_id=7)
    found = objects(
        tmp_path,
        labelme_shape("cup", SQUARE, group_id=0),
        labelme_shape("plate", PLATE, group_id=0),
        labelme_shape("cup", [[5, 5], [8, 5], [8, 7], [5, 7]], group_id=0),
        labelme_shape("cup", CUP, group_id=7),
        part,
        labelme_shape("cup", SQUARE),
        labelme_shape("cup", SQUARE),
    )
    assert [(name, mask.sum()) for name, mask in found] == [
        ("cup", 4 + 6),
        ("plate", 16),
        ("cup", 32 + 1),
        ("cup", 4),
        ("cup", 4),
    ]
    assert len(read(tmp_path).images[0].objects[0].segmentation) == 2


@pytest.mark.parametrize(
    ("image", "stated"),
    [
        ("images/a.jpg", "..\\images\\a.jpg"),
        ("labels/a.jpg", "../images/a.jpg"),  # moved beside the JSON
        ("labels/a.jpg", "C:\\Users\\me\\a.jpg"),
        ("labels/a.png", "/home/me/b.jpg"),  # renamed with the JSON
        ("labels/a.jpg", "images/a.jpg"),
        ("other/a.jpg", "a.jpg"),  # in image_root
    ],
)
def test_image_path(tmp_path, image, stated):
    photograph(tmp_path / image)
    labelme_json(tmp_path / "labels" / "a.json", [labelme_shape("cup", CUP)], imagePath=stated)
    content = read(tmp_path / "labels", image_root=tmp_path / "other")
    assert content.images[0].path == tmp_path / image


def test_another_image_is_not_taken(tmp_path):
    photograph(tmp_path / "b.jpg")
    labelme_json(tmp_path / "a.json", [labelme_shape("cup", CUP)], imagePath="images/b.jpg")
    with pytest.raises(FileNotFoundError, match=r"a\.json: the image 'images/b\.jpg' does not ex"):
        read(tmp_path)


def test_embedded_image_and_no_size(tmp_path):
    """imageData is a copy; old versions state no size, type or group."""
    shape = {"label": "cup", "line_color": None, "fill_color": None, "points": CUP}
    keys = {"imageHeight": None, "imageWidth": None, "imageData": mask_png([[1]])}
    ((name, mask),) = objects(tmp_path, shape, lineColor=[0, 255, 0, 128], **keys)
    assert (name, mask.sum()) == ("cup", 32)


def test_splits(tmp_path):
    """Folders; the classes are those of all, so that training and evaluation agree."""
    for split, label in (("train", "plate"), ("val", "cup")):
        photograph(tmp_path / split / f"{split}.jpg")
        labelme_json(tmp_path / split / f"{split}.json", [labelme_shape(label, CUP)])
    for split in ("train", "val", "valid"):
        content = read(tmp_path, split)
        assert content.classes == ["cup", "plate"]
        assert [image.path.stem for image in content.images] == [split.removesuffix("id")]
    with pytest.raises(ValueError, match="has the splits train, val; state which to read"):
        read(tmp_path)
    with pytest.raises(ValueError, match="has no folder of the split 'test'; its folders are tr"):
        read(tmp_path, "test")


def test_other_files_are_left_out(tmp_path, caplog):
    samples.labelme(tmp_path)
    (tmp_path / "settings.json").write_text('{"a": 1}')
    photograph(tmp_path / "c.jpg")
    content = read(tmp_path)
    assert [image.path.name for image in content.images] == ["a.jpg", "b.jpg"]
    assert "settings.json: is no JSON of LabelMe and not read" in caplog.text
    assert "c.jpg: has no JSON of LabelMe" in caplog.text


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            labelme_shape("cup", [[1, 1], [2, 2]], "line"),
            r"\[0\]: the shape 'line' of 'cup' has no",
        ),
        (labelme_shape("cup", [[1, 1]], "point"), "the shape 'point' of 'cup' has no area; draw a"),
        (labelme_shape("cup", SQUARE, "linestrip"), "'linestrip' of 'cup' has no area"),
        (labelme_shape("cup", SQUARE, "star"), "the shape 'star' is unknown"),
        (labelme_shape("cup", SQUARE[:2]), "a polygon of 2 points; it needs at least 3"),
        (labelme_shape("cup", []), "a polygon of 0 points"),
        (labelme_shape("cup", SQUARE[:1], "rectangle"), "'rectangle' has 1 points, not 2"),
        (labelme_shape("cup", SQUARE, "circle"), "'circle' has 4 points, not 2"),
        (labelme_shape("", SQUARE), "a shape has no label"),
        (labelme_shape(3, SQUARE), r"\$\.shapes\[0\]\.label: expected 'str', got 'int'"),
        (labelme_shape("cup", [[1, 2, 3]] * 3), r"\.points\[0\]: expected 'array' of length <= 2"),
        (labelme_shape("cup", [[1, 1], [900, 1], [9, 9]]), "by more than its longest side"),
        (labelme_shape("cup", [[1, 1], [float("nan"), 1], [9, 9]]), "that are not finite"),
        (labelme_shape("cup", [[-5, 1], [-3, 1], [-4, 9]]), "it is outside of it; correct or r"),
        (labelme_shape("cup", SQUARE[:2], "mask"), "a shape of type 'mask' has no mask"),
        (labelme_shape("cup", SQUARE[:2], "mask", mask="%"), "its mask cannot be read as base64"),
        (labelme_shape("cup", SQUARE[:2], "mask", mask="AAAA"), "its mask cannot be read as an im"),
        (
            labelme_shape("cup", SQUARE[:2], "mask", mask=mask_png([[0]])),
            "a mask without any pixel",
        ),
        (
            labelme_shape("cup", [[12, 0], [13, 0]], "mask", mask=mask_png([[1]])),
            r"a mask of 1 x 1 pixels at \(12, 0\) is outside the 12 x 8 pixels",
        ),
    ],
)
def test_bad_shapes(tmp_path, shape, message):
    with pytest.raises(ValueError, match=rf"^{tmp_path}/a\.json.*{message}"):
        objects(tmp_path, shape)


def test_rectangles_only(tmp_path):
    """Data made for detection."""
    samples.labelme(tmp_path)
    labelme_json(tmp_path / "a.json", [labelme_shape("cup", [[0, 0], [4, 8]], "rectangle")])
    with pytest.raises(ValueError, match=r"a\.json, \$.*: all 1 shapes are rectangles: data made"):
        read(tmp_path)
    content = read(tmp_path, boxes_as_masks=True)
    assert content.images[0].objects[0].segmentation == [[0, 0, 4, 0, 4, 8, 0, 8]]


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="The LabelMe annotations list no images"):
        read(tmp_path)
    samples.labelme(tmp_path)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read(tmp_path)
    labelme_json(tmp_path / "a.json", [], imagePath="b.jpg")
    with pytest.raises(ValueError, match=r"b\.json: the image .*b\.jpg occurs more than once, bef"):
        read(tmp_path)
    content = json.loads((tmp_path / "a.json").read_text()) | {"shapes": None}
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a\.json: \$\.shapes: expected 'array', got 'null'"):
        read(tmp_path)


def test_ignored_shapes(tmp_path, caplog):
    """The label for regions without a class is none."""
    photograph(tmp_path / "a.jpg")
    shapes = [labelme_shape("__ignore__", PLATE), labelme_shape("cup", CUP)]
    labelme_json(tmp_path / "a.json", shapes)
    content = read(tmp_path)
    assert content.classes == ["cup"]
    assert [item.class_name for item in content.images[0].objects] == ["cup"]
    assert "$.shapes[0]: a shape labelled __ignore__ is left out" in caplog.text
