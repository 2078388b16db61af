"""Published import path of the deformable attention function."""

from .....ops.ms_deform_attn import MSDeformAttnFunction

__all__ = ["MSDeformAttnFunction"]
