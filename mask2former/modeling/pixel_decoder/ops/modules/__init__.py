"""Original import path of the deformable attention module."""

from .ms_deform_attn import MSDeformAttn

__all__ = ["MSDeformAttn"]
