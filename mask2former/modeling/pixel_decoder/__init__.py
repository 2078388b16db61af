"""From backbone features to per-pixel embeddings and the scales the decoder attends to."""

from .build import build_pixel_decoder
from .fpn import BasePixelDecoder, TransformerEncoderPixelDecoder
from .msdeformattn import MSDeformAttnPixelDecoder

__all__ = [
    "BasePixelDecoder",
    "MSDeformAttnPixelDecoder",
    "TransformerEncoderPixelDecoder",
    "build_pixel_decoder",
]
