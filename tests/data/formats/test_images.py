"""Pixels of unusual images, and what headers say."""

import os

import numpy as np
import pytest
from PIL import Image

from mask2former.data.formats.images import (
    Header,
    read_header,
    read_image,
    read_panoptic_png,
    read_size,
)

RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_16_bits_are_scaled_by_their_range(tmp_path, extension):
    file = tmp_path / f"ramp.{extension}"
    Image.fromarray(RAMP.astype(np.uint16)).save(file)
    image = read_image(str(file), "BGR")
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image[..., 0], np.round(RAMP.astype(np.uint16) / 257))
    # A label map keeps its values.
    np.testing.assert_array_equal(read_image(str(file)), RAMP.astype(np.uint16))


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit integers"), (np.float32, "floats")])
def test_pixels_of_unknown_range_are_refused(tmp_path, dtype, kind):
    file = tmp_path / "a.tif"
    Image.fromarray(RAMP.astype(dtype)).save(file)
    with pytest.raises(
        ValueError, match=rf"a\.tif cannot be read as an image: its pixels are {kind}"
    ):
        read_image(str(file), "RGB")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes_are_converted(tmp_path, mode):
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("L", (3, 2), 255).convert(mode).save(file)
    assert read_image(str(file), "RGB").tolist() == [[[255] * 3] * 3] * 2


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipes_and_folders(tmp_path, make):
    """A pipe would be waited for without end."""
    path = str(tmp_path / "a.png")
    make(path)
    for read in (read_image, read_header):
        with pytest.raises(ValueError, match=rf"{path} is not a file"):
            read(path)


def test_more_pixels_than_the_limit(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for read in (read_image, read_header):
        with pytest.raises(ValueError, match=r"bomb\.png has more pixels than the limit of 200"):
            read(str(tmp_path / "bomb.png"))
    assert read_size(str(tmp_path / "bomb.png")) is None


@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 8, 9, 300])
@pytest.mark.parametrize("extension", ["jpg", "png", "tif"])
def test_header_agrees_with_the_pixels(tmp_path, orientation, extension):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = str(tmp_path / f"a.{extension}")
    Image.new("RGB", (5, 3)).save(file, exif=exif.tobytes())
    header = read_header(file)
    assert header.size == read_image(file, "RGB").shape[:2] == read_size(file)
    assert header == Header(header.size, "RGB", orientation if orientation in range(1, 9) else 1)


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_orientation_is_applied_once(tmp_path, extension):
    stored = np.arange(15, dtype=np.uint8).reshape(3, 5)
    shown = {3: stored[::-1, ::-1], 4: stored[::-1], 6: np.rot90(stored, -1), 8: np.rot90(stored)}
    for orientation, expected in shown.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(tmp_path / f"a.{extension}", exif=exif.tobytes())
        np.testing.assert_array_equal(read_image(str(tmp_path / f"a.{extension}")), expected)


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA"])
def test_panoptic_png_without_colours(tmp_path, mode):
    file = str(tmp_path / "a.png")
    Image.new(mode, (5, 3)).save(file)
    with pytest.raises(ValueError, match=rf"a\.png is an image of mode {mode}: a panoptic PNG"):
        read_panoptic_png(file)
