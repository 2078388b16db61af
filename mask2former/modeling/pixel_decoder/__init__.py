"""From backbone features to per-pixel embeddings and the scales the decoder attends to."""

from .bifpn import BiFPNPixelDecoder
from .build import build_pixel_decoder
from .fapn import FaPNPixelDecoder
from .fpn import BasePixelDecoder, TransformerEncoderPixelDecoder
from .msdeformattn import MSDeformAttnPixelDecoder
from .semantic_fpn import SemanticFPNPixelDecoder

__all__ = [
    "BasePixelDecoder",
    "BiFPNPixelDecoder",
    "FaPNPixelDecoder",
    "MSDeformAttnPixelDecoder",
    "SemanticFPNPixelDecoder",
    "TransformerEncoderPixelDecoder",
    "build_pixel_decoder",
]
