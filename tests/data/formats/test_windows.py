import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image
from rasterio.transform import from_origin

from mask2former.data.formats import windows
from mask2former.data.formats.images import read_image
from mask2former.data.formats.windows import MAX_PIXELS, more_pixels, open_image, read_window

ROWS, COLUMNS = slice(7, 40), slice(3, 61)
PIXELS = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
WIDE = np.random.default_rng(1).integers(0, 65536, (50, 70, 5), dtype=np.uint16)


@pytest.fixture
def files(tmp_path):
    """One file of each kind, and the formats it is read in."""
    tiles = {"tile": (16, 16), "photometric": "rgb"}
    tifffile.imwrite(tmp_path / "colours.tif", PIXELS, **tiles)
    tifffile.imwrite(tmp_path / "planes.tif", WIDE.transpose(2, 0, 1), planarconfig="separate")
    tifffile.imwrite(tmp_path / "pages.tif", WIDE.transpose(2, 0, 1), photometric="minisblack")
    tifffile.imwrite(tmp_path / "labels.tif", PIXELS[:, :, 0], rowsperstrip=8)
    tifffile.imwrite(tmp_path / "wide.tif", WIDE[:, :, 0])
    opaque = np.dstack([PIXELS, PIXELS[:, :, :1]])
    tifffile.imwrite(tmp_path / "opacity.tif", opaque, photometric="rgb", extrasamples=[2])
    Image.fromarray(PIXELS).save(tmp_path / "turned.tif", tiffinfo={274: 6})
    Image.fromarray(PIXELS).convert("P").save(tmp_path / "palette.tif")
    Image.fromarray(PIXELS).save(tmp_path / "colours.png")
    np.save(tmp_path / "bands.npy", WIDE)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "image_format"),
    [
        ("colours.tif", "RGB"),
        ("colours.tif", "BGR"),
        ("colours.tif", "L"),
        ("colours.tif", "BANDS:3"),
        ("planes.tif", "BANDS:5"),
        ("pages.tif", "BANDS:5"),
        ("labels.tif", None),
        ("labels.tif", "BGR"),
        ("wide.tif", None),
        ("wide.tif", "RGB"),
        ("opacity.tif", "BGR"),
        ("palette.tif", "RGB"),
        ("colours.png", "BGR"),
        ("bands.npy", "BANDS:5"),
    ],
)
def test_a_window_is_the_part_of_the_image(files, name, image_format):
    expected = read_image(str(files / name), image_format)
    with open_image(str(files / name), image_format) as image:
        assert image.size == (50, 70) and image.georeference is None
        window = image.read(ROWS, COLUMNS)
    assert window.dtype == expected.dtype
    assert np.array_equal(window, expected[ROWS, COLUMNS])


def test_orientation_is_applied(files):
    with open_image(str(files / "turned.tif"), "RGB") as image:
        assert image.size == (70, 50)
        window = image.read(slice(60, 70), slice(0, 5))
    assert np.array_equal(window, read_image(str(files / "turned.tif"), "RGB")[60:70, :5])


def test_a_tiff_is_not_decoded_as_a_whole(files, monkeypatch):
    monkeypatch.setattr(windows, "read_image", None)
    assert read_window(str(files / "colours.tif"), "RGB", ROWS, COLUMNS).shape == (33, 58, 3)


def test_without_rasterio_a_tiff_is_decoded_as_a_whole(files, monkeypatch):
    monkeypatch.setattr(windows, "import_rasterio", lambda: None)
    window = read_window(str(files / "colours.tif"), "RGB", ROWS, COLUMNS)
    assert np.array_equal(window, PIXELS[ROWS, COLUMNS])


def test_georeference(tmp_path):
    file = str(tmp_path / "map.tif")
    options = {"driver": "GTiff", "height": 50, "width": 70, "count": 3, "dtype": "uint8"}
    transform = from_origin(500000, 5000000, 0.5, 0.5)
    with rasterio.open(file, "w", crs="EPSG:32632", transform=transform, **options) as dataset:
        dataset.write(PIXELS.transpose(2, 0, 1))
    with open_image(file, "RGB") as image:
        assert image.georeference.crs.to_epsg() == 32632
        assert image.georeference.transform == transform


@pytest.mark.parametrize(
    ("name", "image_format", "error"),
    [
        (
            "planes.tif",
            "RGB",
            "planes.tif .*it has 5 bands, which are no colours",
        ),
        ("planes.tif", "BANDS:4", "planes.tif .*it has 5 bands, but MODEL.PIXEL_MEAN has 4"),
        ("bands.npy", "RGB", "bands.npy is an array of bands: set INPUT.FORMAT to BANDS"),
        ("broken.tif", "RGB", "broken.tif cannot be read as an image"),
    ],
)
def test_errors_name_the_file(files, name, image_format, error):
    (files / "broken.tif").write_bytes((files / "colours.tif").read_bytes()[:60])
    with pytest.raises(ValueError, match=error):
        read_window(str(files / name), image_format, ROWS, COLUMNS)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.tif"):
        read_window(str(tmp_path / "none.tif"), "RGB", ROWS, COLUMNS)


def test_images_beyond_the_limit_of_pillow(files, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # refuses 2,000; the image has 3,500
    file = str(files / "colours.png")
    with pytest.raises(ValueError, match="more pixels than the limit"):
        read_image(file, "RGB")
    assert np.array_equal(read_window(file, "RGB", ROWS, COLUMNS), PIXELS[ROWS, COLUMNS])
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setattr(windows, "MAX_PIXELS", 3000)
    with pytest.raises(ValueError, match="more pixels than the limit of 3000"):
        read_window(file, "RGB", ROWS, COLUMNS)


def test_no_limit_stays_no_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with more_pixels():
        assert Image.MAX_IMAGE_PIXELS is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2 * MAX_PIXELS)
    with more_pixels():
        assert Image.MAX_IMAGE_PIXELS == 2 * MAX_PIXELS
