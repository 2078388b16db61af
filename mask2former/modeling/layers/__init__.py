"""Layers that several parts share: attention, feed-forward, MLP, position encoding, sampling."""

from .attention import CrossAttentionLayer, FFNLayer, SelfAttentionLayer
from .mlp import MLP
from .point_sampling import point_sample
from .position_encoding import PositionEmbeddingSine

__all__ = [
    "MLP",
    "CrossAttentionLayer",
    "FFNLayer",
    "PositionEmbeddingSine",
    "SelfAttentionLayer",
    "point_sample",
]
