"""Backbones. Importing this package registers them with Detectron2."""

from .swin import D2SwinTransformer, SwinTransformer
from .timm import TimmBackbone, build_timm_backbone
from .vit import TimmViTBackbone

__all__ = [
    "D2SwinTransformer",
    "SwinTransformer",
    "TimmBackbone",
    "TimmViTBackbone",
    "build_timm_backbone",
]
