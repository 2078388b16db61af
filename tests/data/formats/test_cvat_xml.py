"""CVAT for images 1.1: shapes, order, groups, where images are, and what is refused."""

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from annotation_samples import (
    CUP,
    PLATE,
    cvat,
    cvat_image,
    cvat_polygon,
    cvat_shape,
    cvat_xml,
    write_text,
)
from dataset_trees import photograph

from mask2former.data.formats.annotated_images import encode
from mask2former.data.formats.annotation_formats import FORMATS, ReadOptions, recognise_format

RLE = "0, 1, 2, 1"  # row by row, background first
MASK = {"rle": RLE, "left": 4, "top": 5, "width": 2, "height": 2}


def read(root, split=None, **options):
    return FORMATS["cvat"].read(root, ReadOptions(split=split, **options))


def written(root, shapes, **attributes):
    photograph(root / "images" / "a.jpg")
    write_text(root / "annotations.xml", cvat_xml(cvat_image("a.jpg", shapes, **attributes)))
    return root


def masks(root):
    (image,) = read(root).images
    return [
        mask_utils.decode(encode(item.segmentation, 8, 12)).astype(int) for item in image.objects
    ]


def test_shapes(tmp_path):
    shapes = (
        cvat_polygon("cup", CUP)
        + cvat_shape("mask", "cup", rle="1, 3, 2", left=4, top=5, width=3, height=2)
        + cvat_shape("box", "cup", xtl="1.00", ytl="2.00", xbr="4.00", ybr="6.00")
        + cvat_shape("box", "cup", xtl=2, ytl=3, xbr=6, ybr=5, rotation="90.00")
    )
    polygon, mask, box, turned = masks(written(tmp_path, shapes))
    assert polygon.sum() == 32
    expected = np.zeros((8, 12), int)
    expected[5, 5:7] = expected[6, 4] = 1
    assert (mask == expected).all()
    expected[:] = 0
    expected[2:6, 1:4] = 1
    assert (box == expected).all()
    expected[:] = 0
    expected[2:6, 3:5] = 1
    assert (turned == expected).all()


def test_ellipse(tmp_path):
    photograph(tmp_path / "a.jpg", 60, 40)
    shapes = cvat_shape("ellipse", "cup", cx=30, cy=20, rx=18, ry=6, rotation=90, z_order=0)
    text = cvat_xml(cvat_image("a.jpg", shapes))
    write_text(tmp_path / "annotations.xml", text.replace('"12" height="8"', '"60" height="40"'))
    (item,) = read(tmp_path).images[0].objects
    y, x = np.mgrid[:40, :60] + 0.5
    inside = ((x - 30) / 6) ** 2 + ((y - 20) / 18) ** 2 < 1
    mask = mask_utils.decode(encode(item.segmentation, 40, 60))
    assert (mask != inside).sum() < 0.05 * inside.sum()


def test_z_order_and_groups(tmp_path):
    """From back to front; shapes of one group and label are one object."""
    shapes = (
        cvat_polygon("plate", PLATE, z_order=2, group_id=3)
        + cvat_polygon("cup", CUP, z_order=1, group_id=3)
        + cvat_polygon("cup", [[5, 5], [7, 5], [7, 8], [5, 8]], z_order=1, group_id=3)
        + cvat_polygon("cup", PLATE, z_order=-1)
        + cvat_polygon("cup", PLATE, z_order=0, outside=1)
    )
    (image,) = read(written(tmp_path, shapes)).images
    areas = [int(mask_utils.area(encode(item.segmentation, 8, 12))) for item in image.objects]
    assert [item.class_name for item in image.objects] == ["cup", "cup", "plate"]
    assert areas == [16, 38, 16]
    assert len(image.objects[1].segmentation) == 2


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("images/a.jpg", "a.jpg"),
        ("images/default/a.jpg", "a.jpg"),
        ("images/set/a.jpg", "set/a.jpg"),
        ("images/Train/a.jpg", "a.jpg"),
        ("a.jpg", "a.jpg"),
        ("images/frame_000001.PNG", "frame_000001"),
        ("elsewhere/a.jpg", "a.jpg"),
        ("photos/x/a.jpg", "a.jpg"),
    ],
)
def test_images(tmp_path, file, name):
    photograph(tmp_path / "data" / file)
    text = cvat_xml(cvat_image(name, cvat_polygon("cup", CUP), subset="Train"))
    write_text(tmp_path / "data" / "annotations.xml", text)
    content = read(tmp_path / "data", image_root=tmp_path / "data" / "elsewhere")
    assert content.images[0].path == tmp_path / "data" / file


def test_ambiguous_image(tmp_path):
    written(tmp_path, cvat_polygon("cup", CUP))
    (tmp_path / "images" / "a.jpg").unlink()
    for folder in ("x", "y"):
        photograph(tmp_path / folder / "a.jpg")
    with pytest.raises(ValueError, match=r"annotations\.xml: the image 'a\.jpg' is not unique"):
        read(tmp_path)


def test_subsets(tmp_path):
    """Of a project; classes are those of all."""
    entries = []
    for subset, label in (("Train", "plate"), ("Validation", "cup")):
        photograph(tmp_path / "images" / subset / "a.jpg")
        entries.append(cvat_image("a.jpg", cvat_polygon(label, CUP), subset=subset))
    write_text(tmp_path / "annotations.xml", cvat_xml(*entries))
    for split, label in (("train", "plate"), ("val", "cup")):
        content = read(tmp_path, split)
        assert [item.class_name for item in content.images[0].objects] == [label]
        assert content.classes == ["cup", "plate"]
    with pytest.raises(ValueError, match="has the splits Train, Validation; state which"):
        read(tmp_path)
    with pytest.raises(ValueError, match="has no split 'test', only Train, Validation"):
        read(tmp_path, "test")


def test_folders_of_splits(tmp_path):
    for split in ("train", "val"):
        written(tmp_path / split, cvat_polygon("cup", CUP))
    assert read(tmp_path, "valid").images[0].path == tmp_path / "val" / "images" / "a.jpg"
    with pytest.raises(ValueError, match="has the splits train, val; state which"):
        read(tmp_path)


def test_labels_of_skeletons_and_attributes(tmp_path):
    """The points of a skeleton are no classes; a label may have attributes with names."""
    labels = (
        "<label><name>cup</name><attributes><attribute><name>colour</name></attribute>"
        "</attributes></label><label><name>hand</name></label>"
        "<label><name>thumb</name><parent>hand</parent></label>"
    )
    text = cvat_xml(cvat_image("a.jpg", cvat_polygon("cup", CUP)), labels=())
    write_text(tmp_path / "annotations.xml", text.replace("<labels>", f"<labels>{labels}"))
    photograph(tmp_path / "images" / "a.jpg")
    assert read(tmp_path).classes == ["cup", "hand"]


def test_without_labels(tmp_path):
    text = cvat_xml(cvat_image("a.jpg", cvat_polygon("cup", CUP)), labels=())
    write_text(tmp_path / "annotations.xml", text)
    photograph(tmp_path / "images" / "a.jpg")
    assert read(tmp_path).classes == ["cup"]


def test_tags_are_left_out(tmp_path, caplog):
    attribute = '<attribute name="colour">red</attribute>'
    shapes = cvat_shape("tag", "cup") + cvat_polygon("cup", CUP).replace("\n", attribute, 1)
    assert len(read(written(tmp_path, shapes)).images[0].objects) == 1
    assert "a.jpg, tag 0: a tag of the whole image is left out" in caplog.text


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (cvat_shape("polyline", "cup", points="1,1;2,2"), "the shape 'polyline' of 'cup' has no"),
        (cvat_shape("points", "cup", points="1,1;2,2"), "the shape 'points' of 'cup' has no mask"),
        (cvat_shape("cuboid", "cup"), "the shape 'cuboid' of 'cup' has no mask"),
        (cvat_shape("skeleton", "cup"), "the shape 'skeleton'"),
        (cvat_shape("star", "cup"), "the shape 'star' is unknown"),
        (cvat_polygon("spoon", CUP), "the label 'spoon' is not one of those in the head"),
        (cvat_polygon("cup", CUP[:2]), "a polygon of 2 points"),
        (cvat_shape("polygon", "cup", points="1,1;2,x;3,3"), "a polygon that cannot be read: .*x"),
        (cvat_shape("polygon", "cup"), "a polygon has no 'points'"),
        (cvat_shape("polygon", "cup", points="1,1;nan,2;3,3"), "coordinates that are not finite"),
        (cvat_shape("mask", "cup", **MASK | {"rle": "1,2"}), "its rle counts 3 of 2 x 2 pixels"),
        (cvat_shape("mask", "cup", **MASK | {"rle": "5,-1"}), "its rle counts 4 of 2 x 2"),
        (cvat_shape("mask", "cup", **MASK | {"rle": "4"}), "a mask without any pixel"),
        (cvat_shape("mask", "cup", **MASK | {"left": 50}), "is outside the 12 x 8 pixels"),
        (cvat_shape("mask", "cup", rle=RLE, left=1, top=1, width=2), "a mask has no 'height'"),
        (cvat_polygon("cup", CUP, z_order="top"), "a polygon that cannot be read"),
    ],
)
def test_bad_shapes(tmp_path, shapes, message):
    written(tmp_path, shapes)
    with pytest.raises(ValueError, match=rf"annotations\.xml, a\.jpg, \w+ 0: .*{message}"):
        read(tmp_path)


def test_boxes_only(tmp_path):
    written(tmp_path, cvat_shape("box", "cup", xtl=1, ytl=2, xbr=4, ybr=6))
    with pytest.raises(ValueError, match=r"a\.jpg, box 0: all 1 shapes are rectangles: data made"):
        read(tmp_path)
    assert len(read(tmp_path, boxes_as_masks=True).images[0].objects) == 1


def test_video(tmp_path):
    track = '<track id="0" label="cup"><polygon frame="0" points="0,0;1,0;1,1"/></track>'
    write_text(tmp_path / "annotations.xml", cvat_xml(track))
    assert recognise_format(tmp_path)[0].name == "cvat"
    with pytest.raises(ValueError, match=r"holds tracks \(CVAT for video\): export .* images 1\.1"):
        read(tmp_path)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no XML of CVAT"):
        read(tmp_path)
    cvat(tmp_path)
    file = tmp_path / "annotations.xml"
    text = file.read_text()
    file.write_text(text[:-30])
    with pytest.raises(ValueError, match=r"annotations\.xml is not valid XML"):
        read(tmp_path)
    bomb = '<!DOCTYPE a [<!ENTITY a "aa">]>\n<annotations><meta>&a;</meta></annotations>'
    file.write_text(bomb)
    with pytest.raises(ValueError, match=r"annotations\.xml is not valid XML: EntitiesForbidden"):
        read(tmp_path)
    file.write_text("<annotation><folder/></annotation>")
    with pytest.raises(ValueError, match=r"is not XML of CVAT: it begins with 'annotation'"):
        read(file)
    write_text(file, cvat_xml())
    with pytest.raises(ValueError, match="The CVAT annotations list no images"):
        read(tmp_path)
    write_text(file, cvat_xml(cvat_image("a.jpg"), cvat_image("a.jpg")))
    with pytest.raises(ValueError, match=r"a\.jpg: the image .* occurs more than once"):
        read(tmp_path)
    write_text(tmp_path / "other.xml", text)
    with pytest.raises(ValueError, match=r"holds 2 XMLs of CVAT .*: name one"):
        read(tmp_path)


def test_infinite_place(tmp_path):
    mask = '<mask label="cup" rle="0, 4" left="inf" top="0" width="2" height="2"/>'
    written(tmp_path, mask)
    with pytest.raises(ValueError, match=r"annotations\.xml, .*a mask that cannot be read: .*inf"):
        read(tmp_path)
