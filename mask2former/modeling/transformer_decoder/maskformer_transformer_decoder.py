"""The transformer decoder of MaskFormer, the predecessor.

It attends to one feature map, without masks. Other projects import the registry and its builder
from here; they are defined in `build.py`.

Shape letters: B batch, Q queries, C hidden channels, E mask embedding channels, K classes without
"no object", L layers, H W size of the per-pixel mask embeddings, h w size of the attended map.
"""

from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d
from torch import Tensor, nn

from ..layers import MLP, PositionEmbeddingSine
from .build import TRANSFORMER_DECODER_REGISTRY, build_transformer_decoder
from .transformer import Transformer

__all__ = [
    "MLP",
    "TRANSFORMER_DECODER_REGISTRY",
    "StandardTransformerDecoder",
    "build_transformer_decoder",
]


@TRANSFORMER_DECODER_REGISTRY.register()
class StandardTransformerDecoder(nn.Module):
    """A DETR-style transformer whose queries predict a class and a mask embedding each.

    Args:
        in_channels: channels of the feature map it attends to.
        mask_classification: predict classes as well as masks.
        num_classes: K.
        hidden_dim: C.
        num_queries: Q.
        nheads: number of attention heads; divides C.
        dropout: dropout probability, 0 to 1.
        dim_feedforward: hidden width of the feed-forward blocks.
        enc_layers: encoder layers before the decoder; 0 for none.
        dec_layers: L.
        pre_norm: normalise before each block, not after.
        deep_supervision: predict from every layer, not from the last only.
        mask_dim: E.
        enforce_input_project: project the features even where they already are C wide.
    """

    @configurable
    def __init__(
        self,
        in_channels: int,
        mask_classification: bool = True,
        *,
        num_classes: int,
        hidden_dim: int,
        num_queries: int,
        nheads: int,
        dropout: float,
        dim_feedforward: int,
        enc_layers: int,
        dec_layers: int,
        pre_norm: bool,
        deep_supervision: bool,
        mask_dim: int,
        enforce_input_project: bool,
    ):
        super().__init__()
        self.mask_classification = mask_classification
        self.pe_layer = PositionEmbeddingSine(hidden_dim // 2, normalize=True)
        self.transformer = Transformer(
            d_model=hidden_dim,
            dropout=dropout,
            nhead=nheads,
            dim_feedforward=dim_feedforward,
            num_encoder_layers=enc_layers,
            num_decoder_layers=dec_layers,
            normalize_before=pre_norm,
            return_intermediate_dec=deep_supervision,
        )
        self.num_queries = num_queries
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        if in_channels != hidden_dim or enforce_input_project:
            self.input_proj = Conv2d(in_channels, hidden_dim, kernel_size=1)
            weight_init.c2_xavier_fill(self.input_proj)
        else:
            self.input_proj = nn.Sequential()
        self.aux_loss = deep_supervision

        if mask_classification:
            self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim, hidden_dim, mask_dim, 3)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, mask_classification: bool = True) -> dict:
        mask_former = cfg.MODEL.MASK_FORMER
        return {
            "in_channels": in_channels,
            "mask_classification": mask_classification,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "hidden_dim": mask_former.HIDDEN_DIM,
            "num_queries": mask_former.NUM_OBJECT_QUERIES,
            "nheads": mask_former.NHEADS,
            "dropout": mask_former.DROPOUT,
            "dim_feedforward": mask_former.DIM_FEEDFORWARD,
            "enc_layers": mask_former.ENC_LAYERS,
            "dec_layers": mask_former.DEC_LAYERS,
            "pre_norm": mask_former.PRE_NORM,
            "deep_supervision": mask_former.DEEP_SUPERVISION,
            "mask_dim": cfg.MODEL.SEM_SEG_HEAD.MASK_DIM,
            "enforce_input_project": mask_former.ENFORCE_INPUT_PROJ,
        }

    def forward(
        self, x: Tensor, mask_features: Tensor, mask: Tensor | None = None
    ) -> dict[str, Any]:
        """Predict classes and masks.

        Args:
            x: (B, in_channels, h, w) the feature map to attend to.
            mask_features: (B, E, H, W) per-pixel mask embeddings.
            mask: (B, height, width) bool of any size, True at padding; or None.

        Returns:
            `pred_logits` (B, Q, K + 1), only with mask classification; `pred_masks` (B, Q, H, W)
            logits; and with deep supervision `aux_outputs`, the same of each earlier layer.
        """
        if mask is not None:
            mask = F.interpolate(mask[None].float(), size=x.shape[-2:]).to(torch.bool)[0]
        pos = self.pe_layer(x, mask)
        queries, _ = self.transformer(self.input_proj(x), mask, self.query_embed.weight, pos)

        outputs: dict[str, Any] = {}
        outputs_class = None
        if self.mask_classification:
            outputs_class = self.class_embed(queries)  # (L, B, Q, K+1)
            outputs["pred_logits"] = outputs_class[-1]
        mask_embed = self.mask_embed(queries)  # (L, B, Q, E)
        outputs_masks = torch.einsum("lbqc,bchw->lbqhw", mask_embed, mask_features)
        outputs["pred_masks"] = outputs_masks[-1]
        if self.aux_loss:
            outputs["aux_outputs"] = self._set_aux_loss(outputs_class, outputs_masks)
        return outputs

    def _set_aux_loss(
        self, outputs_class: Tensor | None, outputs_seg_masks: Tensor
    ) -> list[dict[str, Tensor]]:
        """The predictions of every layer but the last, one dict per layer."""
        if outputs_class is None:
            return [{"pred_masks": masks} for masks in outputs_seg_masks[:-1]]
        return [
            {"pred_logits": logits, "pred_masks": masks}
            for logits, masks in zip(outputs_class[:-1], outputs_seg_masks[:-1], strict=True)
        ]
