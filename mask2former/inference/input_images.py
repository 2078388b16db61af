"""What a predictor takes for an image: a file, an image of Pillow, an array, a tensor.

H W pixels, C channels. Colours of arrays and tensors are RGB unless said otherwise; what a model
takes is BGR, as Detectron2's predictor does, or the channels of INPUT.FORMAT L or BANDS.
"""

import os
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from PIL import Image
from torch import Tensor

from ..data.formats.bands import checked_bands, eight_bits, is_bands
from ..data.formats.images import convert_image, read_image

ChannelOrder = Literal["RGB", "BGR"]
KINDS = "a path, an image of Pillow, an array or a tensor"


class InputImage(NamedTuple):
    """An image to predict for.

    Attributes:
        pixels: uint8 (H, W, C), as `Predictor.__call__` takes it.
        file_name: where it was read from.
    """

    pixels: np.ndarray
    file_name: str | None


def is_single(source: Any) -> bool:
    """Whether this is one image, and not several."""
    return isinstance(source, str | os.PathLike | Image.Image | np.ndarray | Tensor)


def read_input(source: Any, image_format: str, order: ChannelOrder = "RGB") -> InputImage:
    """Read an image.

    Args:
        source: path of a file; image of Pillow of any mode, turned as its EXIF orientation says;
            array (H, W, 3), or (H, W) for a grey image; tensor (3, H, W) or (1, H, W). Arrays and
            tensors are uint8, or uint16, which is scaled by its range. With bands they have C
            channels instead of 3.
        image_format: of `read_image`: "BGR", "L" or "BANDS:C".
        order: of the colours in arrays and tensors.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the source is none of these, or its values or shape have no meaning.
    """
    if order not in get_args(ChannelOrder):
        raise ValueError(f"order is {order!r}; allowed: {', '.join(get_args(ChannelOrder))}")
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if os.path.isdir(name):
            raise ValueError(f"{name} is a folder; give the images in it as a list")
        return InputImage(read_image(name, image_format), name)
    if isinstance(source, Image.Image):
        name = getattr(source, "filename", "") or None
        try:
            return InputImage(convert_image(source, image_format), name)
        # A damaged file, of which only the header was read, can raise anything in a decoder.
        except Exception as error:
            raise ValueError(f"the image of Pillow cannot be read: {error}") from error
    if isinstance(source, Tensor):
        return InputImage(_pixels(_array(source), image_format, order), None)
    if isinstance(source, np.ndarray):
        return InputImage(_pixels(source, image_format, order), None)
    raise ValueError(f"{type(source).__name__} is no image; allowed: {KINDS}")


def _array(tensor: Tensor) -> np.ndarray:
    """(C, H, W) → (H, W, C)."""
    if tensor.ndim != 3:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} is no image; allowed: (3, H, W)"
            + ("; give a batch as a list of its images" if tensor.ndim == 4 else "")
        )
    return tensor.detach().cpu().permute(1, 2, 0).numpy()


def _pixels(array: np.ndarray, image_format: str, order: ChannelOrder) -> np.ndarray:
    """An array (H, W) or (H, W, C) as a model takes it."""
    if array.dtype not in (np.uint8, np.uint16):
        hint = "; multiply by 255 if they are 0 to 1" if array.dtype.kind == "f" else ""
        raise ValueError(
            f"its values are {array.dtype}, of unknown range; convert them to uint8 from 0 to 255, "
            f"or to uint16 from 0 to 65535{hint}"
        )
    if is_bands(image_format):
        return checked_bands(array, image_format)
    is_grey = array.ndim == 2 or array.shape[2:] == (1,)
    if not (is_grey or array.shape[2:] == (3,)) or 0 in array.shape:
        raise ValueError(f"its shape is {array.shape}, of no image{_shape_hint(array)}")
    array = eight_bits(array.reshape(*array.shape[:2], -1))
    if image_format == "L":
        if is_grey:
            return np.ascontiguousarray(array)
        rgb = array if order == "RGB" else array[:, :, ::-1]
        return np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).convert("L"))[:, :, None]
    if is_grey:
        return np.repeat(array, 3, axis=2)
    return np.ascontiguousarray(array if order == "BGR" else array[:, :, ::-1])


def _shape_hint(array: np.ndarray) -> str:
    allowed = "; allowed: arrays (H, W, 3) or (H, W), tensors (3, H, W) or (1, H, W)"
    if array.ndim == 4:
        return f"{allowed}. Give a batch as a list of its images"
    if array.ndim == 3 and array.shape[2] == 4:
        return f"{allowed}. Leave out the opacity: image[:, :, :3]"
    return allowed
