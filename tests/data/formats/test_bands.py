"""Images of any number of channels: what is stored is what is read."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from mask2former.data.formats.bands import as_colours, read_bands
from mask2former.data.formats.images import read_colours, read_header, read_image, read_size

HEIGHT, WIDTH = 5, 7


def values(channels: int, dtype=np.uint8) -> np.ndarray:
    largest = np.iinfo(dtype).max + 1
    return np.random.default_rng(channels).integers(0, largest, (HEIGHT, WIDTH, channels), dtype)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 13])
def test_arrays(tmp_path, channels):
    file = str(tmp_path / "a.npy")
    np.save(file, values(channels))
    for image_format in ("BANDS", f"BANDS:{channels}"):
        image = read_image(file, image_format)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, values(channels))
    assert read_size(file) == (HEIGHT, WIDTH)
    shown = read_colours(file)
    expected = values(channels)[:, :, [0, 1, 2] if channels > 2 else [0, 0, 0]]
    np.testing.assert_array_equal(shown, expected)


def test_grey_arrays_and_16_bits(tmp_path):
    file = str(tmp_path / "a.npy")
    np.save(file, values(1)[:, :, 0])
    np.testing.assert_array_equal(read_image(file, "BANDS:1"), values(1))
    wide = values(2, np.uint16)
    np.save(file, wide)
    np.testing.assert_array_equal(read_image(file, "BANDS:2"), np.round(wide / 257))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (values(6), "it has 6 bands, but MODEL.PIXEL_MEAN has 4 values"),
        (values(4).astype(np.float32), "its values are float32 of unknown range"),
        (values(4).astype(np.int16), "its values are int16 of unknown range"),
        (np.zeros((2, 2, 2, 4), np.uint8), r"it has the shape \(2, 2, 2, 4\)"),
        (np.zeros((0, 3, 4), np.uint8), r"it has the shape \(0, 3, 4\)"),
        (np.array([{}]), "cannot be read as an image: Object arrays"),
    ],
)
def test_arrays_that_are_no_such_images(tmp_path, array, message):
    file = str(tmp_path / "a.npy")
    np.save(file, array)
    with pytest.raises(ValueError, match=rf"a\.npy cannot be read as an image: .*|{message}") as e:
        read_image(file, "BANDS:4")
    assert file in str(e.value)
    with pytest.raises(ValueError, match=message):
        read_image(file, "BANDS:4")


def test_damaged_and_missing_files(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00")
    for read in (lambda f: read_image(f, "BANDS"), read_header):
        with pytest.raises(ValueError, match=r"a\.npy cannot be read as an image"):
            read(str(tmp_path / "a.npy"))
        with pytest.raises(FileNotFoundError, match=r"b\.npy"):
            read(str(tmp_path / "b.npy"))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 2), ("RGB", 3), ("RGBA", 4)])
def test_channels_of_a_png(tmp_path, mode, channels):
    """Also of transparent pixels."""
    array = values(channels)
    array[0, 0, -1] = 0
    Image.fromarray(array[:, :, 0] if channels == 1 else array, mode).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), "BANDS"), array)
    if channels != 4:
        with pytest.raises(ValueError, match=rf"a\.png .*it has {channels} bands, but .* 4 values"):
            read_image(str(tmp_path / "a.png"), "BANDS:4")


def test_16_bits_orientation_and_palettes_of_other_files(tmp_path):
    file = str(tmp_path / "a.png")
    wide = values(1, np.uint16)
    Image.fromarray(wide[:, :, 0]).save(file)
    np.testing.assert_array_equal(read_image(file, "BANDS:1"), np.round(wide / 257))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(values(4), "RGBA").save(file, exif=exif)
    turned = np.rot90(values(4), -1)
    np.testing.assert_array_equal(read_image(file, "BANDS"), turned)
    Image.fromarray(values(1)[:, :, 0]).convert("P").save(file)
    with pytest.raises(ValueError, match="of mode P, which are no bands"):
        read_image(file, "BANDS")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4, 6])
@pytest.mark.parametrize("layout", ["contig", "separate", "pages"])
def test_tiff(tmp_path, dtype, channels, layout):
    tifffile = pytest.importorskip("tifffile")
    file, array = str(tmp_path / "a.tif"), values(channels, dtype)
    stored = array if layout == "contig" else array.transpose(2, 0, 1)
    if channels == 1:
        stored = array[:, :, 0]
    options = {} if layout == "pages" or channels == 1 else {"planarconfig": layout}
    tifffile.imwrite(file, stored, photometric="minisblack", **options)
    expected = array if dtype == np.uint8 else np.round(array / 257)
    np.testing.assert_array_equal(read_image(file, f"BANDS:{channels}"), expected)
    assert read_size(file) == (HEIGHT, WIDTH)
    read_colours(file)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_tiff(tmp_path, orientation):
    """As Pillow turns images of colours."""
    tifffile = pytest.importorskip("tifffile")
    options = {"extratags": [(274, "H", 1, orientation, True)], "planarconfig": "contig"}
    tifffile.imwrite(str(tmp_path / "a.tif"), values(6), photometric="minisblack", **options)
    tifffile.imwrite(str(tmp_path / "b.tif"), values(6)[..., :3], photometric="rgb", **options)
    image = read_image(str(tmp_path / "a.tif"), "BANDS:6")
    np.testing.assert_array_equal(image[:, :, :3], read_image(str(tmp_path / "b.tif"), "RGB"))
    assert read_size(str(tmp_path / "a.tif")) == image.shape[:2]


def test_tiff_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match="pip install tifffile"):
        read_bands(io.BytesIO(b"II*\0 rest"), "a.tif", "BANDS")


def test_what_is_drawn():
    image = values(4)
    np.testing.assert_array_equal(as_colours(image, "BANDS:4"), image[:, :, :3])
    np.testing.assert_array_equal(as_colours(image[:, :, :3], "BGR"), image[:, :, 2::-1])
    np.testing.assert_array_equal(as_colours(image[:, :, :2], "BANDS:2"), image[:, :, [0, 0, 0]])
