"""The function that builds the configured pixel decoder."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn


def build_pixel_decoder(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the pixel decoder named by `MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME`.

    Args:
        cfg: the full config.
        input_shape: channels and stride of each backbone feature.

    Raises:
        ValueError: the name is not registered, or its module has no `forward_features`.
    """
    name = cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME
    if name not in SEM_SEG_HEADS_REGISTRY:
        known = ", ".join(sorted(key for key, _ in SEM_SEG_HEADS_REGISTRY))
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME is {name!r}, which is not registered. "
            f"Registered in SEM_SEG_HEADS: {known}."
        )
    pixel_decoder = SEM_SEG_HEADS_REGISTRY.get(name)(cfg, input_shape)
    if not callable(getattr(pixel_decoder, "forward_features", None)):
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME is {name!r}, which has no method "
            "forward_features(features), so it cannot serve as a pixel decoder."
        )
    return pixel_decoder
