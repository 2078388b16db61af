from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mask2former.data.formats.images import read_image
from mask2former.inference.input_images import is_single, read_input

# Red, green, blue; black, grey, white.
RGB = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [128, 128, 128], [255, 255, 255]]],
    np.uint8,
)
BGR = RGB[:, :, ::-1]
GREY = np.array([[0, 7, 255]], np.uint8)


def pixels(source, image_format="BGR", **options):
    result = read_input(source, image_format, **options).pixels
    assert result.dtype == np.uint8 and result.ndim == 3
    return result


def test_colours():
    for source in (RGB, RGB.astype(np.uint16) * 257, torch.from_numpy(RGB).permute(2, 0, 1)):
        np.testing.assert_array_equal(pixels(source), BGR)
    np.testing.assert_array_equal(pixels(Image.fromarray(RGB)), BGR)
    np.testing.assert_array_equal(pixels(BGR, order="BGR"), BGR)
    assert pixels(RGB).flags.c_contiguous


def test_grey_images():
    expected = GREY[:, :, None].repeat(3, 2)
    for source in (GREY, GREY[:, :, None], torch.from_numpy(GREY)[None], Image.fromarray(GREY)):
        np.testing.assert_array_equal(pixels(source), expected)
        np.testing.assert_array_equal(pixels(source, "L"), expected[:, :, :1])
    # (65535 + 128) // 257, and half a step of 257 rounds up.
    assert pixels(np.array([[65535, 129, 128]], np.uint16))[0, :, 0].tolist() == [255, 1, 0]


def test_colours_for_a_grey_model():
    expected = np.array(Image.fromarray(RGB).convert("L"))[:, :, None]
    np.testing.assert_array_equal(pixels(RGB, "L"), expected)
    np.testing.assert_array_equal(pixels(BGR, "L", order="BGR"), expected)


def test_bands():
    bands = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    np.testing.assert_array_equal(pixels(bands, "BANDS:5"), bands)
    np.testing.assert_array_equal(
        pixels(torch.from_numpy(bands).permute(2, 0, 1), "BANDS:5"), bands
    )
    rgba = np.dstack((RGB, RGB[:, :, :1]))
    np.testing.assert_array_equal(pixels(Image.fromarray(rgba), "BANDS:4"), rgba)
    with pytest.raises(ValueError, match="5 bands, but MODEL.PIXEL_MEAN has 4 values"):
        pixels(bands, "BANDS:4")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_of_pillow_are_read_as_from_files(mode, tmp_path):
    image = Image.fromarray(RGB).convert(mode)
    # PNG does not store the last three.
    suffix = ".png" if mode in ("1", "L", "LA", "P", "RGB", "RGBA") else None
    expected = image
    if suffix:
        path = tmp_path / f"image{suffix}"
        image.save(path)
        np.testing.assert_array_equal(pixels(image), read_image(str(path), "BGR"))
        expected = Image.open(path)
    np.testing.assert_array_equal(pixels(image), np.array(expected.convert("RGB"))[:, :, ::-1])


def test_sixteen_bits_of_pillow():
    image = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
    assert image.mode == "I;16"
    assert pixels(image)[0, :, 0].tolist() == [0, 1, 255]


def test_exif_orientation(tmp_path):
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(RGB).save(path, exif=exif)
    expected = np.rot90(BGR, -1)
    np.testing.assert_array_equal(pixels(str(path)), expected)
    opened = read_input(Image.open(path), "BGR")
    np.testing.assert_array_equal(opened.pixels, expected)
    assert opened.file_name == str(path)


def test_one_pixel():
    assert pixels(np.zeros((1, 1, 3), np.uint8)).shape == (1, 1, 3)
    assert pixels(torch.zeros(1, 1, 1, dtype=torch.uint8)).shape == (1, 1, 3)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (RGB / 255, "float64, of unknown range; .*uint8.* multiply by 255 if"),
        (torch.rand(3, 2, 2), "float32, of unknown range"),
        (RGB.astype(np.int64), "int64, of unknown range"),
        (GREY > 5, "bool, of unknown range"),
        (np.zeros((3, 2, 5), np.uint8), r"\(3, 2, 5\), of no image; allowed: arrays \(H, W, 3\)"),
        (np.zeros((2, 2, 4), np.uint8), r"opacity: image\[:, :, :3\]"),
        (np.zeros((2, 2, 2, 3), np.uint8), "batch as a list"),
        (torch.zeros(2, 3, 2, 2, dtype=torch.uint8), "batch as a list"),
        (torch.zeros(2, 2, dtype=torch.uint8), r"shape \(2, 2\) is no image; allowed: \(3, H, W\)"),
        (torch.zeros(2, 4, 3, dtype=torch.uint8), r"tensors \(3, H, W\)"),
        (np.zeros((0, 2, 3), np.uint8), "of no image"),
        (np.zeros(3, np.uint8), "of no image"),
        (Image.fromarray(np.ones((2, 2), np.float32)), "floats of unknown range"),
        (7, "int is no image; allowed: a path, an image of Pillow, an array or a tensor"),
    ],
)
def test_what_is_no_image(source, problem):
    with pytest.raises(ValueError, match=problem):
        read_input(source, "BGR")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.png"):
        read_input(tmp_path / "missing.png", "BGR")
    with pytest.raises(ValueError, match="is a folder; give the images in it as a list"):
        read_input(tmp_path, "BGR")
    broken = tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(broken)
    broken.write_bytes(broken.read_bytes()[:2000])
    with pytest.raises(ValueError, match="broken.png cannot be read as an image"):
        read_input(broken, "BGR")
    with pytest.raises(ValueError, match="image of Pillow cannot be read"):
        read_input(Image.open(broken), "BGR")
    with pytest.raises(ValueError, match="order is 'GBR'; allowed: RGB, BGR"):
        read_input(RGB, "BGR", order="GBR")


def test_one_or_several():
    for single in ("a.jpg", Path("a.jpg"), Image.fromarray(RGB), RGB, torch.zeros(3, 2, 2)):
        assert is_single(single)
    for several in ([], (RGB,), iter([RGB]), {"a.jpg"}):
        assert not is_single(several)
