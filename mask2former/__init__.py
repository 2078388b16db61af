"""Mask2Former: one architecture for panoptic, instance and semantic segmentation, on Detectron2.

Importing the package registers its models, backbones and data sets with Detectron2.
"""

from . import modeling
from .config import add_maskformer2_config
from .maskformer_model import MaskFormer

__version__ = "0.1.0"

__all__ = ["MaskFormer", "add_maskformer2_config", "modeling"]
