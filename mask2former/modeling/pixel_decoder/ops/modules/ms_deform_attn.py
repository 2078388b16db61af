"""Original import path of the deformable attention module."""

from .....ops import MSDeformAttn

__all__ = ["MSDeformAttn"]
