"""One mask file an object: layouts, classes, pixels, and what is refused."""

import numpy as np
import pycocotools.mask as mask_utils
import pytest
from annotation_samples import array, mask_files
from dataset_trees import photograph, save
from PIL import Image

from mask2former.data.formats.annotation_formats import FORMATS, ReadOptions, recognise_format


def read(root, split=None, **options):
    return FORMATS["mask_files"].read(root, ReadOptions(split=split, **options))


def found(content):
    return [
        [(item.class_name, int(mask_utils.area(item.segmentation))) for item in image.objects]
        for image in content.images
    ]


def bowl(root, *stems):
    """As in the Data Science Bowl 2018."""
    for stem in stems:
        photograph(root / stem / "images" / f"{stem}.png")
        save(root / stem / "masks" / f"{stem}1.png", array(255, 0))
        save(root / stem / "masks" / f"{stem}2.png", array(0, 255))


def test_folder_an_image(tmp_path):
    bowl(tmp_path / "stage1_train", "x", "y")
    (tmp_path / "stage1_train" / "y" / "masks").rename(tmp_path / "unused")
    for root, split in ((tmp_path, "stage1_train"), (tmp_path / "stage1_train", None)):
        assert recognise_format(root)[0].name == "mask_files"
        content = read(root, split)
        assert found(content) == [[("object", 32), ("object", 16)], []]
        assert content.classes == ["object"]
    assert read(root, classes=("nucleus",)).classes == ["nucleus"]
    with pytest.raises(ValueError, match="CLASSES has a, b, but the masks are not in"):
        read(root, classes=("a", "b"))
    with pytest.raises(FileNotFoundError, match="Its folder stage1_train has: state it as SPL"):
        read(tmp_path)


def test_folder_of_images(tmp_path):
    """Without folders of classes; an image without folder has no objects."""
    photograph(tmp_path / "images" / "a.jpg")
    photograph(tmp_path / "images" / "b.png")
    photograph(tmp_path / "images" / "c.png")
    save(tmp_path / "masks" / "a" / "1.png", array(255, 0))
    save(tmp_path / "masks" / "a" / "2.png", array(0, 255))
    (tmp_path / "masks" / "b").mkdir()
    assert found(read(tmp_path)) == [[("object", 32), ("object", 16)], [], []]


def test_splits(tmp_path):
    """Classes are those of all parts."""
    for split, name in (("train", "plate"), ("val", "cup")):
        photograph(tmp_path / split / "images" / "a.jpg")
        photograph(tmp_path / split / "images" / "b.jpg")
        save(tmp_path / split / "masks" / "a" / name / "1.png", array(255, 0))
    for split, name in (("train", "plate"), ("val", "cup")):
        content = read(tmp_path, split)
        assert found(content) == [[(name, 32)], []]
        assert content.classes == ["cup", "plate"]
    with pytest.raises(ValueError, match="has the splits train, val; state which"):
        read(tmp_path)
    assert recognise_format(tmp_path)[0].name == "mask_files"


@pytest.mark.parametrize(
    "pixels",
    [
        array(1, 0),
        array(1, 0).astype(bool),
        array(255, 0).astype(np.uint16) * 257,
        np.stack([array(9, 0)] * 3, -1),
        np.stack([array(0, 0), array(255, 0), array(0, 0)], -1),
        np.stack([array(255, 0)] * 3 + [np.full((8, 12), 255, np.uint8)], -1),
        np.stack([array(255, 0)] * 2, -1),
    ],
)
def test_pixels(tmp_path, pixels):
    """All that is not black, in any kind of PNG."""
    mask_files(tmp_path)
    save(tmp_path / "masks" / "a" / "cup" / "1.png", pixels)
    assert found(read(tmp_path))[0][0] == ("cup", 32)


def test_jpeg(tmp_path):
    """Its values around edges are rounded."""
    photograph(tmp_path / "images" / "a.jpg", 64, 64)
    pixels = np.zeros((64, 64), np.uint8)
    pixels[10:30, 21:43] = 255
    file = tmp_path / "masks" / "a" / "1.jpg"
    save(file, pixels)
    assert len(np.unique(np.asarray(Image.open(file)))) > 2
    ((_, area),) = found(read(tmp_path))[0]
    assert area == 20 * 22


def test_bad_masks(tmp_path):
    mask_files(tmp_path)
    file = tmp_path / "masks" / "a" / "cup" / "1.png"
    for pixels, message in (
        (
            array(1, 2),
            r"has 3 values \(0, 1, 2, \.\.\.\): a mask of one object has 0 and one",
        ),
        (array(1, 0) + 1, r"has 2 values \(1, 2"),
        (array(255, 0)[:5], r"has 12 x 5 pixels, but its image .*a\.jpg has 12 x 8"),
        (array(0, 0), "a mask without any pixel"),
    ):
        save(file, pixels)
        with pytest.raises(ValueError, match=rf"cup/1\.png:? {message}"):
            read(tmp_path)
    file.write_text("no image")
    with pytest.raises(ValueError, match=r"cup/1\.png:? cannot be read as an image"):
        read(tmp_path)


def test_masks_without_image_or_class(tmp_path):
    mask_files(tmp_path)
    save(tmp_path / "masks" / "a" / "3.png", array(255, 0))
    with pytest.raises(ValueError, match=r"a/3\.png: the mask is in no folder of a class, but oth"):
        read(tmp_path)
    (tmp_path / "masks" / "a" / "3.png").unlink()
    save(tmp_path / "masks" / "z" / "cup" / "1.png", array(255, 0))
    with pytest.raises(FileNotFoundError, match="masks/z: masks of an image that is not in"):
        read(tmp_path)


def test_two_images_in_a_folder(tmp_path):
    bowl(tmp_path, "x", "y")
    photograph(tmp_path / "x" / "images" / "z.png")
    with pytest.raises(ValueError, match="x/images holds 2 images, not one"):
        read(tmp_path)


def test_label_maps_are_not_taken(tmp_path):
    """Images and label maps of the same names are semantic data."""
    photograph(tmp_path / "images" / "a.jpg")
    save(tmp_path / "masks" / "a.png", array(1, 2))
    with pytest.raises(ValueError, match="no annotations of a known format"):
        recognise_format(tmp_path)
    with pytest.raises(FileNotFoundError, match="has neither folders with an image in images and"):
        read(tmp_path)


# ---- masks with the numbers of objects ----


def test_penn_fudan(tmp_path):
    """One PNG an image, whose values number the objects; its folders are recognised."""
    for name in ("FudanPed1", "FudanPed10"):
        photograph(tmp_path / "PNGImages" / f"{name}.png")
    save(tmp_path / "PedMasks" / "FudanPed1_mask.png", array(1, 2))
    save(tmp_path / "PedMasks" / "FudanPed10_mask.png", array(7, 7))
    assert recognise_format(tmp_path)[0].name == "mask_files"
    content = read(tmp_path, classes=("person",))
    assert found(content) == [[("person", 32), ("person", 16)], [("person", 48)]]
    assert content.classes == ["person"]
    assert found(read(tmp_path)) == [[("object", 32), ("object", 16)], [("object", 48)]]


@pytest.mark.parametrize("names", [["a_1.png", "a_2.png"], ["a/x.png", "a/y.png"], ["a.png"]])
def test_names_that_begin_with_the_image(tmp_path, caplog, names):
    """One file an object or an image; the longest name counts; one has no objects."""
    for name in ("a.jpg", "a-b.jpg", "c.jpg"):
        photograph(tmp_path / "photos" / name)
    values = [array(1, 2)] if len(names) == 1 else [array(255, 0), array(0, 255)]
    for name, pixels in zip(names, values, strict=True):
        save(tmp_path / "truth" / name, pixels)
    save(tmp_path / "truth" / "a-b_mask.png", array(1, 0).astype(np.uint16) * 300)
    folders = {"image_root": tmp_path / "photos", "mask_root": tmp_path / "truth"}
    content = read(tmp_path, **folders)
    assert [image.path.stem for image in content.images] == ["a-b", "a", "c"]
    assert found(content) == [[("object", 32)], [("object", 32), ("object", 16)], []]
    assert "c.jpg: has no mask in" in caplog.text
    with pytest.raises(ValueError, match=r"photos, but masks are found by .*: state MASK_ROOT"):
        read(tmp_path, image_root=tmp_path / "photos")


def test_colours_number_objects(tmp_path):
    photograph(tmp_path / "images" / "a.jpg")
    pixels = np.stack([array(200, 0), array(0, 10), array(200, 10)], -1)
    save(tmp_path / "truth" / "a.png", pixels)
    content = read(tmp_path, mask_root=tmp_path / "truth")
    assert found(content) == [[("object", 16), ("object", 32)]]


def test_splits_of_masks(tmp_path):
    for split in ("train", "val"):
        photograph(tmp_path / "images" / split / f"{split}.jpg")
        save(tmp_path / "truth" / split / f"{split}_mask.png", array(1, 2))
    assert len(read(tmp_path, "train", mask_root=tmp_path / "truth").images) == 1
    with pytest.raises(ValueError, match="has the splits train, val; state which"):
        read(tmp_path, mask_root=tmp_path / "truth")


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        (
            "ab_mask.png",
            array(1, 2),
            r"ab_mask\.png is a mask, but its name begins with that of",
        ),
        ("a_mask.png", array(1, 255), "has 3 values, among them 255: borders or a smoothed mask"),
        ("a_mask.png", array(1, 2)[:5], "has 12 x 5 pixels, but its image"),
    ],
)
def test_bad_numbers(tmp_path, name, pixels, message):
    photograph(tmp_path / "images" / "a.jpg")
    save(tmp_path / "truth" / name, pixels)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read(tmp_path, mask_root=tmp_path / "truth")


def test_bad_folders_of_masks(tmp_path):
    photograph(tmp_path / "images" / "a.jpg")
    (tmp_path / "truth").mkdir()
    with pytest.raises(FileNotFoundError, match="images: no image has a mask in .*truth whose"):
        read(tmp_path, mask_root=tmp_path / "truth")
    with pytest.raises(ValueError, match="images is also the folder of the images: move the masks"):
        read(tmp_path, mask_root=tmp_path / "images")
    photograph(tmp_path / "images" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png has the same name without ext.* There are 2 "):
        read(tmp_path, mask_root=tmp_path / "truth")
    (tmp_path / "images").rename(tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match="does not exist: state the images as IMAGE_ROOT"):
        read(tmp_path, mask_root=tmp_path / "truth")


def test_images_without_masks_are_said(tmp_path, caplog):
    bowl(tmp_path, "a", "b")
    for stem in "cd":
        photograph(tmp_path / stem / "images" / f"{stem}.png")
    assert len(read(tmp_path).images) == 4
    assert "c.png: has no mask, like 1 more of the 4 images: no objects" in caplog.text
