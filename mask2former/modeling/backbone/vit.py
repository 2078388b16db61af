"""Plain vision transformers of timm with a simple feature pyramid ("Exploring Plain Vision
Transformer Backbones for Object Detection", Li et al., ECCV 2022): DINOv2, DINOv3, EVA-02, MAE.

    image (B, C, H, W) → padded to multiples of 32 → scaled by patch / 16 → model of timm
                       → last tokens as one map of stride 16 → simple feature pyramid → res2 … res5

The pyramid's strides, 4 to 32, rest on a map of stride 16. For patches of another size, 14 pixels
mostly, the image is scaled so that one patch covers 16 × 16 pixels of it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, SimpleFeaturePyramid
from torch import Tensor

from ...utils.registry import register_unless_taken
from .freezing import freeze_at_of
from .timm import STRIDES
from .timm_models import (
    TimmParts,
    crop_to_stride,
    import_timm,
    layer_depths,
    on_meta,
    options_for,
    pad_to_multiple,
)

_STRIDE = 16  # of the map of tokens
_SCALE_FACTORS = tuple(_STRIDE / stride for stride in STRIDES.values())
_LARGEST_STRIDE = 32


class TokenMap(Backbone):
    """A plain transformer of timm that returns its last tokens, normalised, as a map of stride 16.

    Args:
        body: the model.
        patch_size: side of its patches in pixels.
    """

    def __init__(self, body: Any, patch_size: int):
        super().__init__()
        self.body: Any = body
        self.patch_size = patch_size
        self._out_features = ["tokens"]
        self._out_feature_strides = {"tokens": _STRIDE}
        self._out_feature_channels = {"tokens": body.feature_info[-1]["num_chs"]}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, C_in, H, W), multiples of 16 → "tokens": (B, C, H/16, W/16)."""
        if self.patch_size != _STRIDE:
            size = [side // _STRIDE * self.patch_size for side in x.shape[-2:]]
            x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
        (tokens,) = self.body.forward_intermediates(
            x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return {"tokens": tokens}


@register_unless_taken(BACKBONE_REGISTRY)
class TimmViTBackbone(TimmParts, SimpleFeaturePyramid):
    """A plain vision transformer of timm with a simple feature pyramid, as a Detectron2 backbone.

    All blocks attend globally. Class and register tokens take part and are not returned. Position
    embeddings are interpolated to the map.

    Args:
        name: of the model, such as "vit_base_patch14_dinov2.lvd142m".
        in_channels: of the images.
        out_channels: of each map of the pyramid.
        drop_path_rate: largest probability of stochastic depth, in [0, 1).
        freeze_at: what is not trained: 1 the embeddings, n also the first n - 1 blocks.

    Raises:
        ValueError: timm has no such model, or it is no plain transformer for images of any size.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        in_channels: int = 3,
        out_channels: int = 256,
        drop_path_rate: float = 0.0,
        freeze_at: int = 0,
    ):
        options = options_for(name, "MODEL.VIT", in_channels, drop_path_rate)
        patch_size = _patch_size(name, on_meta(name, **options), options)
        body = import_timm().create_model(name, **options)
        body.prune_intermediate_layers(1, prune_norm=False)
        super().__init__(
            TokenMap(body, patch_size), "tokens", out_channels, _SCALE_FACTORS, norm="LN"
        )
        # The names of the stages, which Detectron2's pyramid calls p2 to p5.
        self._out_features = list(STRIDES)
        self._out_feature_strides = dict(STRIDES)
        self._out_feature_channels = dict.fromkeys(STRIDES, out_channels)
        depths = layer_depths(body)
        self._set_up(name, "net.body.", depths, range(max(depths.values()) + 1))
        self.freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """Arguments from `MODEL.VIT`; the channels are those of MODEL.PIXEL_MEAN."""
        options = cfg.MODEL.VIT
        return {
            "name": options.NAME,
            "in_channels": len(cfg.MODEL.PIXEL_MEAN),
            "out_channels": options.OUT_CHANNELS,
            "drop_path_rate": options.DROP_PATH_RATE,
            "freeze_at": freeze_at_of(cfg),
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps of a batch of images.

        Args:
            x: (B, in_channels, H, W), normalised; any height and width.

        Returns:
            "res2" to "res5": (B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉).
        """
        features = super().forward(pad_to_multiple(x, _LARGEST_STRIDE))
        return {
            name: crop_to_stride(features[name], x.shape[-2:], stride)
            for name, stride in STRIDES.items()
        }

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of this, the largest stride."""
        return _LARGEST_STRIDE


def _patch_size(name: str, model: Any, options: dict[str, Any]) -> int:
    """The side of a patch, after a trial of two image shapes on the meta device.

    Raises:
        ValueError: the model is no plain transformer, or takes images of one size only.
    """
    strides = {info["reduction"] for info in model.feature_info}
    if len(strides) != 1:
        raise ValueError(
            f"MODEL.VIT.NAME is {name!r}, whose feature maps have strides {sorted(strides)}; "
            "allowed: plain vision transformers, such as vit_base_patch14_dinov2. For a "
            "hierarchical model set MODEL.BACKBONE.NAME to TimmBackbone and MODEL.TIMM.NAME."
        )
    (patch_size,) = strides
    tokens = TokenMap(model, patch_size)
    channels = tokens.output_shape()["tokens"].channels
    try:
        for height, width in ((64, 96), (160, 64)):
            images = torch.empty(2, options["in_chans"], height, width, device="meta")
            (map_,) = tokens(images).values()
            expected = (2, channels, height // _STRIDE, width // _STRIDE)
            assert map_.shape == expected, f"{tuple(map_.shape)}, not {expected}"
    # What a model raises for a size that it does not take is its own affair.
    except (AssertionError, RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"MODEL.VIT.NAME is {name!r}, which does not take images of any size ({error}). Choose "
            "another model."
        ) from error
    return patch_size
