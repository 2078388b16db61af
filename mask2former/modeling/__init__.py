"""The plain model: its parts in the order in which data flows through them.

B batch, Q queries, K classes, C channels, H W padded image size:

    images (B, 3, H, W)
      → backbone/                 res2 … res5, strides 4, 8, 16, 32
      → pixel_decoder/            per-pixel embedding (B, C, H/4, W/4) and three scales
                                  (B, C, H/32, W/32), (B, C, H/16, W/16), (B, C, H/8, W/8)
      → transformer_decoder/      class logits (B, Q, K+1) and mask logits (B, Q, H/4, W/4), from
                                  the queries and after every layer
      → matcher.py, criterion.py  training: losses on sampled points (mask_losses.py), or on whole
                                  masks (full_mask_losses.py)
      → postprocessing.py         inference: semantic, panoptic, instances

layers/ has the building blocks that several parts share. meta_arch/mask_former_head.py joins pixel
and transformer decoder; ../maskformer_model.py is the full model. Importing this package registers
the parts, with Detectron2 and in the registries of build.py, matcher.py and criterion.py. The code
here reads as the paper's steps; a part with a twin in ../fast/ runs that instead, with the same
numbers for the same random points.

Under autocast, in float16 or bfloat16, these stay in float32: the residual streams of both
transformers and their layer norms; locations, weights and sums of deformable attention; deformable
convolutions; class probabilities and all matching costs; features, masks and targets once they are
sampled at points; the losses. Other convolutions, linear layers, attention and the products that
predict masks are in half precision.
"""

from . import backbone, meta_arch, pixel_decoder, transformer_decoder
from .backbone import D2SwinTransformer
from .criterion import SetCriterion
from .full_mask_losses import (
    FullMaskCriterion,
    FullMaskMatcher,
    MaskFormerCriterion,
    MaskFormerMatcher,
)
from .matcher import HungarianMatcher
from .meta_arch import MaskFormerHead, PerPixelBaselineHead, PerPixelBaselinePlusHead
from .pixel_decoder import (
    BasePixelDecoder,
    BiFPNPixelDecoder,
    FaPNPixelDecoder,
    MSDeformAttnPixelDecoder,
    SemanticFPNPixelDecoder,
)

__all__ = [
    "BasePixelDecoder",
    "BiFPNPixelDecoder",
    "D2SwinTransformer",
    "FullMaskCriterion",
    "FullMaskMatcher",
    "FaPNPixelDecoder",
    "HungarianMatcher",
    "MSDeformAttnPixelDecoder",
    "MaskFormerCriterion",
    "MaskFormerHead",
    "MaskFormerMatcher",
    "PerPixelBaselineHead",
    "PerPixelBaselinePlusHead",
    "SemanticFPNPixelDecoder",
    "SetCriterion",
    "backbone",
    "meta_arch",
    "pixel_decoder",
    "transformer_decoder",
]
