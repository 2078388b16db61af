"""Mask2Former's head: pixel decoder, then transformer decoder.

Shape letters: B batch, C channels, Q queries, K classes, H W padded image size in pixels.
"""

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ...utils.registry import register_unless_taken
from ..pixel_decoder import build_pixel_decoder
from ..transformer_decoder import build_transformer_decoder


def move_to_pixel_decoder(state_dict: dict[str, Tensor], prefix: str, version: int | None) -> None:
    """Rename, in place, the parameters of a head's checkpoint from before version 2.

    Those had the pixel decoder's parameters directly in the head.
    """
    if version is not None and version >= 2:
        return
    current = (prefix + "predictor.", prefix + "pixel_decoder.")
    for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(current)]:
        state_dict[prefix + "pixel_decoder." + key[len(prefix) :]] = state_dict.pop(key)


@register_unless_taken(SEM_SEG_HEADS_REGISTRY)
class MaskFormerHead(nn.Module):
    """Backbone features → query predictions.

    Args:
        input_shape: channels and stride of the backbone features that the pixel decoder uses.
        num_classes: K, without the no-object class.
        pixel_decoder: has ``forward_features``, see `MSDeformAttnPixelDecoder`.
        loss_weight: unused here, kept for subclasses of the original.
        ignore_value: label of pixels that semantic ground truth ignores.
        transformer_predictor: the transformer decoder.
        transformer_in_feature: what the decoder attends to: "multi_scale_pixel_decoder" (all three
            scales), "transformer_encoder", "pixel_embedding", or the name of a backbone feature.
    """

    _version = 2
    pixel_decoder: Any  # a module with `forward_features`

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        pixel_decoder: nn.Module,
        loss_weight: float = 1.0,
        ignore_value: int = -1,
        transformer_predictor: nn.Module,
        transformer_in_feature: str,
    ):
        super().__init__()
        by_stride = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in by_stride]
        self.ignore_value = ignore_value
        self.common_stride = 4
        self.loss_weight = loss_weight
        self.pixel_decoder = pixel_decoder
        self.predictor = transformer_predictor
        self.transformer_in_feature = transformer_in_feature
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        in_feature = cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE
        if in_feature in ("transformer_encoder", "multi_scale_pixel_decoder"):
            in_channels = head.CONVS_DIM
        elif in_feature == "pixel_embedding":
            in_channels = head.MASK_DIM
        elif in_feature in input_shape:
            in_channels = input_shape[in_feature].channels
        else:
            raise ValueError(
                f"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE={in_feature!r} is not one of "
                f"{['multi_scale_pixel_decoder', 'transformer_encoder', 'pixel_embedding']} nor a "
                f"feature of the backbone, {sorted(input_shape)}"
            )
        missing = sorted(set(head.IN_FEATURES) - set(input_shape))
        if missing:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES names {missing}, but the backbone returns "
                f"{sorted(input_shape)}"
            )
        return {
            "input_shape": {k: v for k, v in input_shape.items() if k in head.IN_FEATURES},
            "ignore_value": head.IGNORE_VALUE,
            "num_classes": head.NUM_CLASSES,
            "pixel_decoder": build_pixel_decoder(cfg, input_shape),
            "loss_weight": head.LOSS_WEIGHT,
            "transformer_in_feature": in_feature,
            "transformer_predictor": build_transformer_decoder(
                cfg, in_channels, mask_classification=True
            ),
        }

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        move_to_pixel_decoder(state_dict, prefix, local_metadata.get("version"))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def forward(self, features: dict[str, Tensor], mask: Tensor | None = None) -> dict[str, Any]:
        """Predict from backbone features ``{name: (B, C, H, W)}``; see `layers`."""
        return self.layers(features, mask)

    def layers(self, features: dict[str, Tensor], mask: Tensor | None = None) -> dict[str, Any]:
        """Run the pixel decoder, then the transformer decoder.

        Returns:
            the decoder's outputs: ``pred_logits`` (B, Q, K+1), ``pred_masks`` (B, Q, H/4, W/4)
            logits, ``aux_outputs``.
        """
        mask_features, encoder_features, multi_scale_features = self.pixel_decoder.forward_features(
            features
        )
        if self.transformer_in_feature == "multi_scale_pixel_decoder":
            return self.predictor(multi_scale_features, mask_features, mask)
        if self.transformer_in_feature == "transformer_encoder":
            if encoder_features is None:
                raise ValueError(
                    "TRANSFORMER_IN_FEATURE='transformer_encoder' needs a pixel decoder with a "
                    f"transformer encoder, but {type(self.pixel_decoder).__name__} has none"
                )
            return self.predictor(encoder_features, mask_features, mask)
        if self.transformer_in_feature == "pixel_embedding":
            return self.predictor(mask_features, mask_features, mask)
        return self.predictor(features[self.transformer_in_feature], mask_features, mask)
