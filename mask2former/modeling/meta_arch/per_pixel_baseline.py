"""The per-pixel classification baselines that MaskFormer is compared with (MaskFormer, table 4).

They share Mask2Former's backbones and pixel decoders but classify every pixel instead of predicting
masks. Use them with Detectron2's `SemanticSegmentor`, as configs/maskformer/ade20k-150 does:

    MODEL:
      META_ARCHITECTURE: SemanticSegmentor
      SEM_SEG_HEAD: {NAME: PerPixelBaselineHead}

`PerPixelBaselineHead` puts a 1x1 convolution on the per-pixel embedding.
`PerPixelBaselinePlusHead` puts a transformer decoder between the two, with one query per class: the
query's mask logits are the class's logits.

Shape letters: B batch, K classes, C mask embedding channels, H W padded image size in pixels.
"""

from typing import Any

import fvcore.nn.weight_init as weight_init
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ...utils.determinism import is_deterministic
from ...utils.registry import register_unless_taken
from ..pixel_decoder import build_pixel_decoder
from ..transformer_decoder import StandardTransformerDecoder
from .mask_former_head import move_to_pixel_decoder


@register_unless_taken(SEM_SEG_HEADS_REGISTRY)
class PerPixelBaselineHead(nn.Module):
    """Classifies every pixel: pixel decoder, then a 1x1 convolution.

    Args:
        input_shape: channels and stride of the backbone features that the pixel decoder uses.
        num_classes: K.
        pixel_decoder: has ``mask_dim`` (C) and ``forward_features``, see
            `MSDeformAttnPixelDecoder`.
        loss_weight: factor on the loss.
        ignore_value: label of pixels without a loss.
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
    ):
        super().__init__()
        by_stride = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in by_stride]
        self.ignore_value = ignore_value
        self.common_stride = 4
        self.loss_weight = loss_weight
        self.pixel_decoder = pixel_decoder
        self.predictor = Conv2d(
            pixel_decoder.mask_dim, num_classes, kernel_size=1, stride=1, padding=0
        )
        weight_init.c2_msra_fill(self.predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.SEM_SEG_HEAD
        return {
            "input_shape": {k: v for k, v in input_shape.items() if k in head.IN_FEATURES},
            "ignore_value": head.IGNORE_VALUE,
            "num_classes": head.NUM_CLASSES,
            "pixel_decoder": build_pixel_decoder(cfg, input_shape),
            "loss_weight": head.LOSS_WEIGHT,
        }

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        move_to_pixel_decoder(state_dict, prefix, local_metadata.get("version"))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Compute the losses in training, the logits in inference.

        Args:
            features: backbone features by name.
            targets: (B, H, W) class ids or `ignore_value`; training only.

        Returns:
            In training, None and the losses by name; in inference, logits (B, K, H, W) and {}.
        """
        x = self.layers(features)
        if self.training:
            return None, self.losses(x, targets)
        return self._upsample(x), {}

    def layers(self, features: dict[str, Tensor]) -> Any:
        """Class logits (B, K, H/4, W/4)."""
        x, _, _ = self.pixel_decoder.forward_features(features)
        return self.predictor(x)

    def losses(self, predictions: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """Mean cross entropy over the pixels that are not ignored; 0 if all are ignored.

        Args:
            predictions: (B, K, H/4, W/4) logits.
            targets: (B, H, W) class ids or `ignore_value`.
        """
        if targets is None:
            raise ValueError(
                f'{type(self).__name__} needs "sem_seg" label maps in training, but the inputs '
                "have none: choose a semantic mapper (INPUT.DATASET_MAPPER_NAME)."
            )
        height, width = targets.shape[-2:]
        # Larger than the image, if its size is no multiple of the stride.
        logits = self._upsample(predictions.float())[..., :height, :width]
        # The sum over a map would add in any order on a GPU.
        reduction = "none" if is_deterministic(logits) else "sum"
        loss = F.cross_entropy(logits, targets, reduction=reduction, ignore_index=self.ignore_value)
        num_pixels = (targets != self.ignore_value).sum().clamp(min=1)
        return {"loss_sem_seg": loss.sum() / num_pixels * self.loss_weight}

    def _upsample(self, logits: Tensor) -> Tensor:
        """(B, K, H/4, W/4) → (B, K, H, W)."""
        return F.interpolate(
            logits, scale_factor=self.common_stride, mode="bilinear", align_corners=False
        )


@register_unless_taken(SEM_SEG_HEADS_REGISTRY)
class PerPixelBaselinePlusHead(PerPixelBaselineHead):
    """Classifies every pixel with a transformer decoder that has one query per class.

    Args:
        input_shape, num_classes, pixel_decoder, loss_weight, ignore_value: see
            `PerPixelBaselineHead`.
        transformer_predictor: transformer decoder without mask classification, K queries.
        transformer_in_feature: what the decoder attends to: "transformer_encoder" or the name of a
            backbone feature.
        deep_supervision: add the loss of every earlier decoder layer.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        transformer_predictor: nn.Module,
        transformer_in_feature: str,
        deep_supervision: bool,
        num_classes: int,
        pixel_decoder: nn.Module,
        loss_weight: float = 1.0,
        ignore_value: int = -1,
    ):
        super().__init__(
            input_shape,
            num_classes=num_classes,
            pixel_decoder=pixel_decoder,
            loss_weight=loss_weight,
            ignore_value=ignore_value,
        )
        self.predictor = transformer_predictor
        self.transformer_in_feature = transformer_in_feature
        self.deep_supervision = deep_supervision

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head, mask_former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        if mask_former.NUM_OBJECT_QUERIES != head.NUM_CLASSES:
            raise ValueError(
                f"MODEL.MASK_FORMER.NUM_OBJECT_QUERIES is {mask_former.NUM_OBJECT_QUERIES}, but "
                f"{cls.__name__} has one query per class: set it to MODEL.SEM_SEG_HEAD.NUM_CLASSES "
                f"({head.NUM_CLASSES})."
            )
        in_feature = mask_former.TRANSFORMER_IN_FEATURE
        if in_feature == "transformer_encoder":
            in_channels = head.CONVS_DIM
        elif in_feature in input_shape:
            in_channels = input_shape[in_feature].channels
        else:
            raise ValueError(
                f"MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE is {in_feature!r}; {cls.__name__} takes "
                f"'transformer_encoder' or a feature of the backbone, {sorted(input_shape)}."
            )
        return super().from_config(cfg, input_shape) | {
            "transformer_in_feature": in_feature,
            "transformer_predictor": StandardTransformerDecoder(
                cfg, in_channels, mask_classification=False
            ),
            "deep_supervision": mask_former.DEEP_SUPERVISION,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """See `PerPixelBaselineHead.forward`; ``loss_sem_seg_i`` is the loss of decoder layer i."""
        x, aux_outputs = self.layers(features)
        if not self.training:
            return self._upsample(x), {}
        losses = self.losses(x, targets)
        for i, aux_output in enumerate(aux_outputs or ()):
            aux_losses = self.losses(aux_output["pred_masks"], targets)
            losses[f"loss_sem_seg_{i}"] = aux_losses["loss_sem_seg"]
        return None, losses

    def layers(self, features: dict[str, Tensor]) -> tuple[Tensor, list[dict[str, Tensor]] | None]:
        """Class logits (B, K, H/4, W/4), and with deep supervision those of the earlier layers."""
        mask_features, encoder_features, _ = self.pixel_decoder.forward_features(features)
        if self.transformer_in_feature == "transformer_encoder":
            if encoder_features is None:
                raise ValueError(
                    "TRANSFORMER_IN_FEATURE='transformer_encoder' needs a pixel decoder with a "
                    f"transformer encoder, but {type(self.pixel_decoder).__name__} has none"
                )
            x = encoder_features
        else:
            x = features[self.transformer_in_feature]
        outputs = self.predictor(x, mask_features)
        return outputs["pred_masks"], outputs["aux_outputs"] if self.deep_supervision else None
