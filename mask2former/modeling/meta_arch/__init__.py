"""The head that joins pixel and transformer decoder."""

from .mask_former_head import MaskFormerHead

__all__ = ["MaskFormerHead"]
