"""Operators with their own kernels: multi-scale deformable attention.

``python -m mask2former.ops`` prints what was built and tries it out.
"""

from .ms_deform_attn import MSDeformAttn, backend, ms_deform_attn, ms_deform_attn_fused

__all__ = ["MSDeformAttn", "backend", "ms_deform_attn", "ms_deform_attn_fused"]
