"""Original import path of the deformable attention functions."""

from .....ops.ms_deform_attn import MSDeformAttnFunction, ms_deform_attn_core_pytorch

__all__ = ["MSDeformAttnFunction", "ms_deform_attn_core_pytorch"]
