"""Layers shared by several parts: attention, feed-forward, MLP, position encoding."""

from .attention import CrossAttentionLayer, FFNLayer, SelfAttentionLayer
from .mlp import MLP
from .position_encoding import PositionEmbeddingSine

__all__ = [
    "MLP",
    "CrossAttentionLayer",
    "FFNLayer",
    "PositionEmbeddingSine",
    "SelfAttentionLayer",
]
