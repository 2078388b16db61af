"""Layers that several parts share: attention, feed-forward, MLP, position encoding, sampling."""

from .attention import CrossAttentionLayer, FFNLayer, SelfAttentionLayer
from .cross_attention_variants import CROSS_ATTENTION_REGISTRY, MaskPoolingLayer, SMCALayer
from .mlp import MLP
from .point_sampling import point_sample
from .position_encoding import PositionEmbeddingSine

__all__ = [
    "CROSS_ATTENTION_REGISTRY",
    "MLP",
    "CrossAttentionLayer",
    "FFNLayer",
    "MaskPoolingLayer",
    "PositionEmbeddingSine",
    "SMCALayer",
    "SelfAttentionLayer",
    "point_sample",
]
