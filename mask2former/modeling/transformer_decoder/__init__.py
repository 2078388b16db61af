"""From pixel decoder features to query predictions."""

from .build import TRANSFORMER_DECODER_REGISTRY, build_transformer_decoder
from .configurable_transformer_decoder import ConfigurableTransformerDecoder
from .mask2former_transformer_decoder import MultiScaleMaskedTransformerDecoder
from .maskformer_transformer_decoder import StandardTransformerDecoder

__all__ = [
    "TRANSFORMER_DECODER_REGISTRY",
    "ConfigurableTransformerDecoder",
    "MultiScaleMaskedTransformerDecoder",
    "StandardTransformerDecoder",
    "build_transformer_decoder",
]
