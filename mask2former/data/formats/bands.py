"""Images of any number of channels, as their files store them: INPUT.FORMAT "BANDS".

    .npy                 (h, w) or (h, w, C) arrays
    TIFF                 bands in the pixels, as planes, or as pages; needs the package tifffile
    any other file       the channels that Pillow reads, such as the 4 of a PNG of mode RGBA

Bands have 8 bits; those of 16 bits are scaled to 8 by their range, as images of colours are.

h w pixels of the image as shown, C bands.
"""

import os
from typing import IO, Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from PIL import Image

BANDS = "BANDS"
# Modes whose numbers are not values of bands: indices into a palette, single bits.
_NO_BANDS = ("P", "PA", "1")
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 274


def image_format_of(cfg: CfgNode) -> str:
    """INPUT.FORMAT as `read_image` takes it: "BANDS" with the number of MODEL.PIXEL_MEAN."""
    image_format = cfg.INPUT.FORMAT
    return f"{BANDS}:{len(cfg.MODEL.PIXEL_MEAN)}" if image_format == BANDS else image_format


def is_bands(image_format: str | None) -> bool:
    """Whether a format of `read_image` asks for bands: "BANDS", or "BANDS:" and their number."""
    return image_format is not None and image_format.partition(":")[0] == BANDS


def is_array(file_name: str) -> bool:
    """Whether a file is an array of NumPy."""
    return os.fspath(file_name).lower().endswith(".npy")


def is_tiff(stream: IO[bytes]) -> bool:
    """Whether a file is a TIFF; leaves the stream at its beginning."""
    start = stream.read(4)
    stream.seek(0)
    return start in _TIFF_STARTS


def read_bands(stream: IO[bytes], file_name: str, image_format: str) -> np.ndarray:
    """Read all bands of an image.

    Args:
        stream: the file, open.
        file_name: its name.
        image_format: "BANDS", or "BANDS:" and the number that the image must have.

    Returns:
        (h, w, C) uint8.

    Raises:
        ValueError: the image has another number of bands, or values other than 8 or 16 bits.
    """
    if is_array(file_name):
        bands = np.load(stream, allow_pickle=False)
    elif is_tiff(stream):
        bands = _read_tiff(stream)
    else:
        with Image.open(stream) as stored:
            bands = bands_of(stored)
    return checked_bands(bands, image_format)


def bands_of(stored: Image.Image) -> np.ndarray:
    """The channels of an image as Pillow opened it, (h, w) or (h, w, C), turned as EXIF says.

    Raises:
        ValueError: its numbers are no values of bands.
    """
    if stored.mode in _NO_BANDS:
        raise ValueError(f"its pixels are of mode {stored.mode}, which are no bands")
    image = detection_utils._apply_exif_orientation(stored)
    bands = np.asarray(image)
    is_sixteen_bit = image.mode == "I" and stored.format in ("PNG", "PPM")
    return bands.astype(np.uint16) if is_sixteen_bit else bands


def checked_bands(bands: np.ndarray, image_format: str) -> np.ndarray:
    """Bands (h, w) or (h, w, C) as a model takes them: (h, w, C) uint8.

    Args:
        bands: uint8, or uint16, which is scaled by its range.
        image_format: see `read_bands`.

    Raises:
        ValueError: see `read_bands`.
    """
    if bands.ndim not in (2, 3) or 0 in bands.shape:
        raise ValueError(f"it has the shape {bands.shape}; allowed: (height, width, bands)")
    bands = eight_bits(bands.reshape(*bands.shape[:2], -1))
    _, _, expected = image_format.partition(":")
    if expected and bands.shape[2] != int(expected):
        raise ValueError(
            f"it has {bands.shape[2]} bands, but MODEL.PIXEL_MEAN has {expected} values; all "
            "images need one band for each value"
        )
    return np.ascontiguousarray(bands)


def eight_bits(bands: np.ndarray) -> np.ndarray:
    """Values of 16 bits scaled to 8 by their range; those of 8 bits as they are.

    Raises:
        ValueError: values of another type.
    """
    if bands.dtype == np.uint16:
        return ((bands.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if bands.dtype != np.uint8:
        raise ValueError(
            f"its values are {bands.dtype} of unknown range; save it as uint8, or as uint16, which "
            "is scaled by its range"
        )
    return bands


def size_of_array(stream: IO[bytes]) -> tuple[int, int]:
    """(h, w) of an array of NumPy, without its values."""
    version = np.lib.format.read_magic(stream)
    is_first = version == (1, 0)
    formats = np.lib.format
    read = formats.read_array_header_1_0 if is_first else formats.read_array_header_2_0
    shape, _, _ = read(stream)
    if len(shape) not in (2, 3):
        raise ValueError(f"it has the shape {shape}; allowed: (height, width, bands)")
    return shape[0], shape[1]


def size_of_tiff(stream: IO[bytes]) -> tuple[tuple[int, int], int]:
    """(h, w) of a TIFF that Pillow cannot read, as stored, and its orientation."""
    with _tifffile().TiffFile(stream) as file:
        page = file.pages[0]
        return (page.imagelength, page.imagewidth), _orientation(page)


def _read_tiff(stream: IO[bytes]) -> np.ndarray:
    with _tifffile().TiffFile(stream) as file:
        series, orientation = file.series[0], _orientation(file.pages[0])
        values, axes = series.asarray(), series.axes
    rows, columns = axes.index("Y"), axes.index("X")
    others = [i for i in range(values.ndim) if i not in (rows, columns)]
    if sum(values.shape[i] > 1 for i in others) > 1:
        raise ValueError(f"it has the axes {axes} of lengths {values.shape}; allowed: one of bands")
    values = values.transpose(rows, columns, *others)
    return _turn(values.reshape(*values.shape[:2], -1), orientation)


def _orientation(page: Any) -> int:
    tag = page.tags.get(_ORIENTATION)
    return 1 if tag is None else int(tag.value)


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation; values that are not defined have no effect."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    # After the transposition of 5 to 8.
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(
            "the bands of a TIFF are read with the package tifffile, which is not installed: "
            "pip install tifffile (and imagecodecs for compressed files), or save the image as .npy"
        ) from error
    return tifffile


def as_colours(image: np.ndarray, image_format: str) -> np.ndarray:
    """What to draw of an image: its colours, or its first three bands as red, green and blue.

    Args:
        image: (h, w, C) uint8, as `read_image` returned it.
        image_format: of `read_image`.

    Returns:
        (h, w, 3) RGB; grey if there are less than three bands.
    """
    if image.shape[2] < 3:
        return np.repeat(image[:, :, :1], 3, axis=2)
    image = image[:, :, :3]
    return image[:, :, ::-1] if image_format == "BGR" else image
