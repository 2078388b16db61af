"""Reads images, label maps and panoptic PNGs, in one way for training, evaluation, check and demo.

- The EXIF orientation is applied to every file that has one, so annotations belong to the image as
  it is shown.
- 16-bit images are scaled to 8 bits by their range. Images of 32-bit integers or floats have no
  known range and are refused.
- Images of more pixels than Pillow's limit for decompression bombs are refused: twice
  `PIL.Image.MAX_IMAGE_PIXELS`, 179 million unless a program changes it.
- All errors name the file.

h w pixels of the image as shown.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO, NamedTuple

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from .bands import (
    BANDS,
    as_colours,
    bands_of,
    checked_bands,
    is_array,
    is_bands,
    is_tiff,
    read_bands,
    size_of_array,
    size_of_tiff,
)

_EXIF_ORIENTATION = 0x0112
_TIFF_SIZE_TAGS = (256, 257)  # width, height
# Formats whose integers of mode "I" have 16 bits.
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
# What a panoptic PNG may be; the colours of others are not ids.
_COLOUR_MODES = ("RGB", "RGBA")


class Header(NamedTuple):
    """What an image file says before its pixels.

    Attributes:
        size: (h, w), with the EXIF orientation applied.
        mode: Pillow's mode, such as "RGB", "L" or "P"; "BANDS" for files that only `bands.py`
            reads.
        orientation: EXIF orientation, 1 for none.
    """

    size: tuple[int, int]
    mode: str
    orientation: int


@contextmanager
def _named_errors(file_name: str) -> Iterator[None]:
    """Turn errors of decoders into ValueErrors that name the file."""
    if os.path.exists(file_name) and not os.path.isfile(file_name):  # a pipe may never end
        raise ValueError(f"{file_name} is not a file")
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{file_name} has more pixels than the limit of {2 * Image.MAX_IMAGE_PIXELS}: {error} "
            "Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if it is not an attack."
        ) from error
    # A damaged file can raise anything in a decoder.
    except Exception as error:
        # Errors of the operating system name the file.
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{file_name} cannot be read as an image: {error}") from error


def read_image(file_name: str, image_format: str | None = None) -> np.ndarray:
    """Read an image as Detectron2's `read_image` does, but 16-bit images by their range.

    Args:
        file_name: path of the image.
        image_format: a PIL mode or "BGR"; "BANDS" for all channels as stored, "BANDS:6" if they
            must be 6, see `bands.py`; None keeps the pixels as stored.

    Returns:
        (h, w, C), or (h, w) for a label map read without a format.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is truncated, not an image (unless PIL's `LOAD_TRUNCATED_IMAGES` is set), too
            large, or of 32 bits per pixel and channel.
    """
    with _named_errors(file_name), PathManager.open(file_name, "rb") as stream:
        if is_bands(image_format):
            return read_bands(stream, file_name, image_format)
        return convert_image(Image.open(stream), image_format)


def convert_image(stored: Image.Image, image_format: str | None = None) -> np.ndarray:
    """The pixels of an image that Pillow has opened, as `read_image` returns those of its file.

    Raises:
        ValueError: see `read_image`; other errors of a decoder, if it has not decoded it yet.
    """
    if is_bands(image_format):
        return checked_bands(bands_of(stored), image_format)
    orientation = stored.getexif().get(_EXIF_ORIENTATION, 1)
    if orientation in range(2, 9):
        _log_orientation(orientation)
    if stored.format == "TIFF":
        # Pillow 10 and later turn TIFFs when they decode them, and drop the orientation.
        stored.load()
    image = detection_utils._apply_exif_orientation(stored)
    if image_format is not None:
        image = _as_eight_bits(image, stored.format)
    return detection_utils.convert_PIL_to_numpy(image, image_format)


@cache
def _log_orientation(orientation: int) -> None:
    logging.getLogger(__name__).warning(f"In some images {orientation_warning(orientation)}.")


def _as_eight_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    has_sixteen_bits = image.mode.startswith("I;16")
    has_sixteen_bits |= image.mode == "I" and file_format in _SIXTEEN_BIT_FORMATS
    if has_sixteen_bits:
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {kind} of unknown range; save it with 8 or 16 bits")
    return image


def read_header(file_name: str) -> Header:
    """Read what a file says about its image, without decoding the pixels.

    Raises:
        FileNotFoundError, ValueError: see `read_image`.
    """
    with _named_errors(file_name), PathManager.open(file_name, "rb") as stream:
        if is_array(file_name):
            return Header(size_of_array(stream), BANDS, 1)
        try:
            return _read_header(stream)
        except UnidentifiedImageError:
            stream.seek(0)
            if not is_tiff(stream):
                raise
            size, orientation = size_of_tiff(stream)
            return _header(size, BANDS, orientation)


def _read_header(stream: IO[bytes]) -> Header:
    with Image.open(stream) as image:
        width, height = image.size
        if image.format == "TIFF":
            # Depending on its version, Pillow turns the size of a TIFF, too.
            width, height = (image.tag_v2[tag] for tag in _TIFF_SIZE_TAGS)
        # For a PNG that says nothing before its pixels, Pillow would decode all of them.
        is_unknown = image.format == "PNG" and "exif" not in image.info
        orientation = 1 if is_unknown else image.getexif().get(_EXIF_ORIENTATION, 1)
        return _header((height, width), image.mode, orientation)


def _header(size: tuple[int, int], mode: str, orientation: int) -> Header:
    """Of a size as stored: orientations 5 to 8 swap it, values not defined have no effect."""
    size = size[::-1] if orientation in (5, 6, 7, 8) else size
    return Header(size, mode, orientation if orientation in range(1, 9) else 1)


def read_colours(file_name: str) -> np.ndarray:
    """Read an image to look at: (h, w, 3) RGB, of bands the first three, see `as_colours`.

    Raises:
        FileNotFoundError, ValueError: see `read_image`.
    """
    if read_header(file_name).mode != BANDS:
        try:
            return read_image(file_name, "RGB")
        except ValueError:
            # Pillow knows the headers of more TIFFs than it can decode.
            with PathManager.open(file_name, "rb") as stream:
                if not is_tiff(stream):
                    raise
    return as_colours(read_image(file_name, BANDS), BANDS)


def read_size(file_name: str) -> tuple[int, int] | None:
    """(h, w) of an image, or None if it cannot be read."""
    try:
        return read_header(file_name).size
    except (OSError, ValueError):
        return None


def read_panoptic_png(file_name: str) -> np.ndarray:
    """Read the colours (h, w, 3) of a panoptic PNG, which encode segment ids.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be read, or does not have three colour channels.
    """
    mode = read_header(file_name).mode
    if mode not in _COLOUR_MODES:
        raise ValueError(wrong_panoptic_mode(file_name, mode))
    return read_image(file_name, "RGB")


def orientation_warning(orientation: int) -> str:
    """What to know about an image with an EXIF orientation."""
    return (
        f"the EXIF orientation {orientation} turns or mirrors the image, in training, evaluation, "
        "check and demo; its annotations must be drawn on the turned image. If they are not, "
        "save the image without the orientation"
    )


def wrong_panoptic_mode(file_name: str, mode: str) -> str:
    """The error of a panoptic PNG that does not store ids as colours."""
    return (
        f"{file_name} is an image of mode {mode}: a panoptic PNG stores segment ids in three "
        "colour channels"
    )


def is_panoptic_mode(mode: str) -> bool:
    return mode in _COLOUR_MODES
