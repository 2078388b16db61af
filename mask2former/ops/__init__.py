"""Operators with compiled kernels: multi-scale deformable attention.

``python -m mask2former.ops`` prints what was built and runs a self-test.
"""

from .ms_deform_attn import MSDeformAttn, backend, ms_deform_attn, ms_deform_attn_fused

__all__ = ["MSDeformAttn", "backend", "ms_deform_attn", "ms_deform_attn_fused"]
