"""Operators with their own kernels: multi-scale deformable attention."""

from .ms_deform_attn import MSDeformAttn, ms_deform_attn, ms_deform_attn_fused

__all__ = ["MSDeformAttn", "ms_deform_attn", "ms_deform_attn_fused"]
