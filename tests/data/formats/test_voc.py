"""Pascal VOC: palettes, colours, void pixels, lists, label maps, and what is refused."""

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from annotation_samples import array, save_palette, voc, write_text
from dataset_trees import photograph, save

from mask2former.data.formats.annotation_formats import FORMATS, ReadOptions, recognise_format
from mask2former.data.formats.voc import VOC_CLASSES

# Labels 0 to 4 of the palette of VOC, written out.
PALETTE = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]


def read(root, split=None, **options):
    return FORMATS["voc"].read(root, ReadOptions(split=split, **options))


def written(root, classes, objects, palette=PALETTE):
    """An image with PNGs that have a palette."""
    photograph(root / "JPEGImages" / "a.jpg")
    for folder, values in (("SegmentationClass", classes), ("SegmentationObject", objects)):
        save_palette(root / folder / "a.png", values, palette)
    return root


def found(content):
    return [
        (item.class_name, int(mask_utils.area(item.segmentation)))
        for item in content.images[0].objects
    ]


def test_original(tmp_path):
    """Palette PNGs, borders of 255, three lists, the folder VOCdevkit above."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    classes, objects = array(1, 1), array(1, 2)
    for values in (classes, objects):
        values[:, 3] = 255
    written(root, classes, objects)
    for name, lines in (("train", "a\n"), ("val", "b\n"), ("trainval", "a\nb\n")):
        write_text(root / "ImageSets" / "Segmentation" / f"{name}.txt", lines)
    for place in (root, root.parent, tmp_path):
        assert recognise_format(place)[0].name == "voc"
        content = read(place, "train")
        assert content.classes == list(VOC_CLASSES)
        assert found(content) == [("aeroplane", 24), ("aeroplane", 16)]
    with pytest.raises(ValueError, match="has the splits train, trainval, val; state which"):
        read(root)
    with pytest.raises(FileNotFoundError, match=r"val\.txt, b: the image 'b' does not exist"):
        read(root, "val")


def test_given_classes(tmp_path):
    content = read(written(tmp_path, array(2, 1), array(1, 2)), classes=("cup", "plate"))
    assert found(content) == [("plate", 32), ("cup", 16)]
    assert content.classes == ["cup", "plate"]


def test_labelmap(tmp_path):
    """Colours of the label map, for three channels and for a palette; background anywhere."""
    colours = [(10, 20, 30), (0, 0, 0), (40, 50, 60)]
    write_text(
        tmp_path / "labelmap.txt",
        "# label:color_rgb:parts:actions\nplate:10,20,30::\nbackground:0,0,0::\na:b:40,50,60::\n",
    )
    values = array(2, 0)
    values[array(0, 1) == 0] = 1
    values[array(1, 0) == 1] = 2
    written(tmp_path, values, array(1, 2), colours)
    save_palette(tmp_path / "SegmentationObject" / "a.png", array(1, 2), PALETTE)
    content = read(tmp_path)
    assert content.classes == ["plate", "a:b"]
    assert found(content) == [("a:b", 32), ("plate", 16)]
    save(tmp_path / "SegmentationClass" / "a.png", np.array(colours, np.uint8)[values])
    assert found(read(tmp_path)) == [("a:b", 32), ("plate", 16)]
    # One channel: the number of the line.
    save(tmp_path / "SegmentationClass" / "a.png", values)
    assert found(read(tmp_path)) == [("a:b", 32), ("plate", 16)]


def test_labelmap_without_colours(tmp_path):
    """The palette of VOC."""
    voc(tmp_path)
    write_text(tmp_path / "labelmap.txt", "background:::\ncup:::\nplate:::\n")
    save(tmp_path / "SegmentationClass" / "a.png", np.array(PALETTE, np.uint8)[array(1, 2)])
    assert found(read(tmp_path)) == [("cup", 32), ("plate", 16)]


def test_colours_of_objects(tmp_path):
    """Of the palette, void, and any others."""
    voc(tmp_path)
    objects = np.zeros((8, 12, 3), np.uint8)
    objects[:, :4], objects[:4, 4:8] = (1, 2, 3), (224, 224, 192)
    objects[:2, 4:8] = (128, 0, 0)
    save(tmp_path / "SegmentationObject" / "a.png", objects)
    assert found(read(tmp_path)) == [("plate", 8), ("cup", 32)]


def test_many_objects(tmp_path):
    """16-bit PNGs number more than 255 objects; 255 is then one of them."""
    photograph(tmp_path / "JPEGImages" / "a.jpg", 30, 20)
    objects = np.arange(600, dtype=np.uint16).reshape(20, 30)
    save(tmp_path / "SegmentationObject" / "a.png", objects)
    save(tmp_path / "SegmentationClass" / "a.png", (objects > 0).astype(np.uint8))
    assert found(read(tmp_path)) == [("aeroplane", 1)] * 599


def test_images_elsewhere(tmp_path):
    written(tmp_path / "data", array(1, 2), array(1, 2))
    (tmp_path / "data" / "JPEGImages" / "a.jpg").rename(tmp_path / "a.jpg")
    content = read(tmp_path / "data", image_root=tmp_path)
    assert content.images[0].path == tmp_path / "a.jpg"


@pytest.mark.parametrize(
    ("classes", "objects", "message"),
    [
        (array(1, 30), array(1, 2), r"SegmentationClass/a\.png has the label 30, which is that of"),
        (array(1, 2), array(1, 1), r"SegmentationObject/a\.png, object 1: its pixels have the cl"),
        (array(1, 0), array(1, 2), "object 2: its pixels have the classes background in Segm"),
        (array(1, 2)[:4], array(1, 2), "the PNGs of SegmentationClass and SegmentationObject di"),
    ],
)
def test_bad_pngs(tmp_path, classes, objects, message):
    written(tmp_path, classes, objects)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_stray_pixel_of_another_class(tmp_path, caplog):
    classes, objects = array(1, 1), array(1, 2)
    row, column = np.argwhere(objects == 1)[0]
    classes[row, column] = 2
    assert found(read(written(tmp_path, classes, objects))) == [
        ("aeroplane", 32),
        ("aeroplane", 16),
    ]
    assert "object 1: its pixels have the classes aeroplane, bicycle" in caplog.text
    assert "it is taken for aeroplane" in caplog.text


def test_unknown_colour(tmp_path):
    voc(tmp_path)
    save(tmp_path / "SegmentationClass" / "a.png", np.full((8, 12, 3), 7, np.uint8))
    with pytest.raises(ValueError, match=r"default\.txt, a: .* has the colour #070707, which is"):
        read(tmp_path)


def test_missing_files(tmp_path):
    voc(tmp_path)
    (tmp_path / "SegmentationObject" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"default\.txt, a: .*Object/a\.png does not ex"):
        read(tmp_path)
    (tmp_path / "SegmentationObject" / "b.png").unlink()
    (tmp_path / "SegmentationObject").rmdir()
    with pytest.raises(FileNotFoundError, match=r"has SegmentationClass, but no SegmentationObj"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no folder SegmentationObject"):
        read(tmp_path / "JPEGImages")


def test_split_without_lists(tmp_path):
    written(tmp_path, array(1, 2), array(1, 2))
    with pytest.raises(FileNotFoundError, match=r"ImageSets/Segmentation has no train\.txt"):
        read(tmp_path, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("background:0,0,0::\ncup:1,2::\n", "line 2: 'cup:1,2::' is not `name:red,green,blue::`"),
        ("cup:1,2,3::\nplate:1,2,3::\n", "line 2: the colour 1,2,3 is that of another line"),
        ("cup:1,2,3::\ncup:1,2,4::\n", "line 2: 'cup:1,2,4::' repeats a class"),
        ("cup:1,2,x::\n", "line 1: '1,2,x' is not a colour"),
        ("background:0,0,0::\n", "names no class"),
    ],
)
def test_bad_labelmap(tmp_path, text, message):
    voc(tmp_path)
    write_text(tmp_path / "labelmap.txt", text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("suffix", ["", "PNG"])
def test_class_names_of_labelme(tmp_path, suffix):
    """As labelme2voc writes it: no lists, class_names.txt, arrays where older versions put them."""
    written(tmp_path, array(1, 2), array(1, 2))
    for folder in ("SegmentationClass", "SegmentationObject"):
        (tmp_path / folder).rename(tmp_path / f"{folder}{suffix}")
        photograph(tmp_path / f"{folder}Visualization" / "a.jpg")
        arrays = tmp_path / (folder if suffix else f"{folder}Npy")
        arrays.mkdir()
        np.save(arrays / "a.npy", array(1, 2).astype(np.int32))
    write_text(tmp_path / "class_names.txt", "_background_\nfig\nplum\n")
    assert recognise_format(tmp_path)[0].name == "voc"
    content = read(tmp_path)
    assert content.classes == ["fig", "plum"]
    assert found(content) == [("fig", 32), ("plum", 16)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fig\nplum\n", "class_names.txt must name _background_ first"),
        ("_background_\n", "class_names.txt must name _background_ first"),
        ("_background_\nfig\nfig\n", "class_names.txt names 'fig' more than once"),
    ],
)
def test_bad_class_names(tmp_path, text, message):
    written(tmp_path, array(1, 2), array(1, 2))
    write_text(tmp_path / "class_names.txt", text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_classes_of_voc_in_another_order(tmp_path, caplog):
    """All 20 select, in any order and under new names; others name the labels."""
    root = written(tmp_path, array(1, 2), array(1, 2))
    reverse = tuple(reversed(VOC_CLASSES))
    assert found(read(root, classes=reverse)) == [("aeroplane", 32), ("bicycle", 16)]
    renamed = {"aeroplane": "plane", "bird": None}
    given = ("plane", *(name for name in reverse if name not in renamed))
    assert found(read(root, classes=given, rename=renamed))[0][0] == "aeroplane"
    only = read(root, classes=("bicycle",), rename={"*": None})
    assert found(only) == [("aeroplane", 32), ("bicycle", 16)]
    # Two of the names do not select: they would leave out 18.
    caplog.set_level("INFO")
    assert found(read(root, classes=("person", "cat")))[0][0] == "person"
    assert "those of CLASSES: 1 person, 2 cat" in caplog.text
    with pytest.raises(ValueError, match="'thing' is a new name of RENAME: list the old names"):
        read(root, classes=("thing", "cup"), rename={"plate": "thing"})


def test_pixels_of_no_object(tmp_path, caplog):
    classes, objects = array(1, 1), array(1, 2)
    objects[objects == 2] = 0
    content = read(written(tmp_path, classes, objects))
    assert found(content) == [("aeroplane", 32)]
    assert "has no object number in 16 pixels that have a class in SegmentationClass" in caplog.text


@pytest.mark.parametrize("value", [0, 255])
def test_no_object_numbers(tmp_path, value):
    objects = np.where(array(1, 1) > 0, value, 0).astype(np.uint8)
    root = written(tmp_path, array(1, 1), objects)
    with pytest.raises(ValueError, match=r"a\.png has no object number in 48 pixels .* are all"):
        read(root)


def test_images_without_pngs(tmp_path, caplog):
    """CVAT lists images without objects, but writes no PNGs of them."""
    root = written(tmp_path, array(1, 2), array(1, 2))
    photograph(root / "JPEGImages" / "b.jpg")
    assert len(read(root).images) == 1
    assert "b.jpg: has no PNG in SegmentationObject, like 0 more images: not read" in caplog.text
    write_text(root / "ImageSets" / "Segmentation" / "default.txt", "a\nb\n")
    with pytest.raises(FileNotFoundError, match=r"SegmentationClass/b\.png does not exist"):
        read(root)
    write_text(root / "labelmap.txt", "background:0,0,0::\ncup:128,0,0::\nplate:0,128,0::\n")
    content = read(root)
    assert [len(image.objects) for image in content.images] == [2, 0]
    assert "b.jpg: has no PNGs, like 0 more listed images: no objects" in caplog.text
