"""The function that builds the configured pixel decoder."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

from ...utils.registry import look_up


def build_pixel_decoder(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the pixel decoder named by `MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME`.

    Args:
        cfg: the full config.
        input_shape: channels and stride of each backbone feature.

    Raises:
        ValueError: the name is not registered, or its module has no `forward_features`.
    """
    name, key = cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME, "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME"
    pixel_decoder = look_up(SEM_SEG_HEADS_REGISTRY, name, key)(cfg, input_shape)
    if not callable(getattr(pixel_decoder, "forward_features", None)):
        raise ValueError(
            f"{key} is {name!r}, which has no method "
            "forward_features(features), so it cannot serve as a pixel decoder."
        )
    return pixel_decoder
