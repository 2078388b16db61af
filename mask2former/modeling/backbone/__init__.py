"""Backbones. Importing this package registers them with Detectron2."""

from .swin import D2SwinTransformer, SwinTransformer

__all__ = ["D2SwinTransformer", "SwinTransformer"]
