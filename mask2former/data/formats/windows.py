"""Reads parts of large images, if the format allows it without decoding the rest.

    TIFF    with the package rasterio, which also reads where on Earth a GeoTIFF lies
    .npy    bands, from the file as it is mapped into memory
    others  are decoded as a whole, once for all windows of an opened image

h w pixels of the image as shown, C channels.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image

from .bands import BANDS, checked_bands, eight_bits, is_array, is_bands, is_tiff
from .images import convert_image, named_errors, read_header, read_image

_logger = logging.getLogger(__name__)

# Pixels of an image that is decoded as a whole: 3 GiB of colours. Larger ones need windows.
MAX_PIXELS = 2**30


class Georeference(NamedTuple):
    """Where an image lies: coordinate reference system and affine transform of rasterio."""

    crs: Any
    transform: Any


class ImageWindows:
    """An open image.

    Attributes:
        size: (h, w).
        georeference: of a GeoTIFF that has one.
    """

    def __init__(
        self,
        size: tuple[int, int],
        read: Callable[[slice, slice], np.ndarray],
        georeference: Georeference | None = None,
    ) -> None:
        """
        Args:
            read: the pixels within rows and columns.
        """
        self.size = size
        self.georeference = georeference
        self._read = read

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """The pixels of a window inside the image: (rows, columns, C), or (rows, columns).

        Raises:
            ValueError: they cannot be decoded, or are of another kind than the format.
        """
        return self._read(rows, columns)


def from_array(pixels: np.ndarray) -> ImageWindows:
    """The windows of an image (h, w, C) or (h, w) in memory."""
    return ImageWindows(pixels.shape[:2], lambda rows, columns: pixels[rows, columns])


@contextmanager
def open_image(file_name: str, image_format: str | None) -> Iterator[ImageWindows]:
    """Open an image to read windows as `read_image` reads the whole.

    Args:
        file_name: path of the image.
        image_format: of `read_image`.

    Raises:
        FileNotFoundError, ValueError: see `read_image`; images of more pixels than Pillow's limit,
            but not more than `MAX_PIXELS`, can be read.
    """
    windows, close = _open(file_name, image_format)
    try:
        yield windows
    finally:
        close()


def _open(file_name: str, image_format: str | None) -> tuple[ImageWindows, Callable[[], None]]:
    """The windows of an image, and what ends reading it."""
    with more_pixels():
        header = read_header(file_name)
    if is_array(file_name):
        if image_format is None or not is_bands(image_format):
            raise ValueError(f"{file_name} is an array of bands: set INPUT.FORMAT to {BANDS}")
        with named_errors(file_name):
            array = np.load(PathManager.get_local_path(file_name), mmap_mode="r")
        return ImageWindows(header.size, _ArrayReader(file_name, array, image_format).read), _done
    with PathManager.open(file_name, "rb") as stream:
        reads_windows = is_tiff(stream) and header.orientation == 1 and header.mode != "P"
    rasterio = import_rasterio() if reads_windows else None
    if rasterio is not None:
        with named_errors(file_name), warnings.catch_warnings():
            # Images without georeference are read too.
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            dataset = rasterio.open(PathManager.get_local_path(file_name))
        # Several pages may be bands, which only `read_image` knows.
        if not dataset.subdatasets:
            reader = _TiffReader(file_name, dataset, image_format)
            reference = Georeference(dataset.crs, dataset.transform) if dataset.crs else None
            size = dataset.height, dataset.width
            return ImageWindows(size, reader.read, reference), dataset.close
        dataset.close()
    with more_pixels():
        return from_array(read_image(file_name, image_format)), _done


def _done() -> None:
    pass


def read_window(
    file_name: str, image_format: str | None, rows: slice, columns: slice
) -> np.ndarray:
    """Read a window of an image, see `open_image`."""
    with open_image(file_name, image_format) as image:
        return image.read(rows, columns)


@contextmanager
def more_pixels() -> Iterator[None]:
    """Within it, Pillow decodes images of up to `MAX_PIXELS`, or of its own limit if larger."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None:
        # Pillow refuses images of twice the limit.
        Image.MAX_IMAGE_PIXELS = max(limit, MAX_PIXELS // 2)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@cache
def import_rasterio() -> Any:
    """The package rasterio, or None, said once, if it is not installed."""
    try:
        import rasterio
        import rasterio.windows
    except ImportError:
        _logger.warning(
            "TIFF images are decoded as a whole. To read them by windows: pip install rasterio"
        )
        return None
    return rasterio


class _ArrayReader:
    def __init__(self, file_name: str, array: np.ndarray, image_format: str) -> None:
        self._file_name, self._array, self._format = file_name, array, image_format

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        with named_errors(self._file_name):
            return checked_bands(np.array(self._array[rows, columns]), self._format)


class _TiffReader:
    def __init__(self, file_name: str, dataset: Any, image_format: str | None) -> None:
        self._file_name, self._dataset, self._format = file_name, dataset, image_format

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        with named_errors(self._file_name):
            window = import_rasterio().windows.Window.from_slices(rows, columns)
            pixels = self._dataset.read(window=window).transpose(1, 2, 0)
            if is_bands(self._format):
                return checked_bands(pixels, self._format)
            if self._format is None:
                return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
            return self._colours(pixels)

    def _colours(self, pixels: np.ndarray) -> np.ndarray:
        num_bands = pixels.shape[2]
        has_opacity = self._dataset.colorinterp[-1].name == "alpha"
        if num_bands - has_opacity not in (1, 3):
            raise ValueError(
                f"it has {num_bands} bands, which are no colours; set INPUT.FORMAT to {BANDS}"
            )
        pixels = eight_bits(pixels[:, :, : num_bands - has_opacity])
        pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
        return convert_image(Image.fromarray(np.ascontiguousarray(pixels)), self._format)
