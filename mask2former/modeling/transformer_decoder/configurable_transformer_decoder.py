"""The decoder's ablations (paper, tables 4a to 4d): attention, scales, optimisation switches.

With its default arguments this decoder is `MultiScaleMaskedTransformerDecoder`, with the same
outputs, state dict and initial weights by seed.

Shape letters: B batch, Q queries, C hidden channels, M heads, L locations of what a layer attends
to.
"""

import functools
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...utils.shape_cache import cached_by_shape
from ...utils.twins import has_fast_twin
from ..layers.cross_attention_variants import build_cross_attention
from .build import TRANSFORMER_DECODER_REGISTRY
from .mask2former_transformer_decoder import MultiScaleMaskedTransformerDecoder, Scale

# Strides of the feature maps that a pixel decoder returns, in order.
STRIDES = (32, 16, 8)


class ZeroQueryFeatures(nn.Module):
    """Stands for the embedding `query_feat`: zeros that are not trained and not saved.

    Attributes:
        weight: (Q, C).
    """

    weight: Tensor

    def __init__(self, num_queries: int, hidden_dim: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_queries, hidden_dim), persistent=False)


@TRANSFORMER_DECODER_REGISTRY.register()
class ConfigurableTransformerDecoder(MultiScaleMaskedTransformerDecoder):
    """Mask2Former's decoder with every choice of its ablations.

    Without learnable query features the first prediction, before the first layer, is the same for
    all queries: what the prediction heads make of zeros. It is supervised, and masks the first
    layer's attention, as any other; the paper leaves that open. If self-attention comes first too,
    the values of the first layer's are all equal: without dropout its output is constant, and the
    weight of its input projection has a gradient of 0, as in DETR.

    Args:
        in_channels: channels of the pixel decoder's multi-scale features.
        mask_classification: must be True.
        cross_attention: a name in `CROSS_ATTENTION_REGISTRY`: "masked", "full", "smca",
            "mask_pooling" or another project's.
        scales: strides to which the layers attend round robin, of `STRIDES`; repetitions are
            allowed. The embeddings and projections of the scales used are ordered coarse to fine.
        concatenate_scales: let every layer attend to all scales at once; `scales` has no
            repetitions then.
        learnable_query_features: train the query features; otherwise they start from zero.
        cross_attention_first: cross-attention before self-attention in each layer.
        dropout: probability, on attention weights and residual branches.
        kwargs: the other keywords of `MultiScaleMaskedTransformerDecoder`.

    Raises:
        ValueError: a scale that pixel decoders do not return, or an unknown attention.
    """

    @configurable
    def __init__(
        self,
        in_channels: int,
        mask_classification: bool = True,
        *,
        cross_attention: str = "masked",
        scales: Sequence[int] = STRIDES,
        concatenate_scales: bool = False,
        learnable_query_features: bool = True,
        cross_attention_first: bool = True,
        dropout: float = 0.0,
        **kwargs: Any,
    ):
        if not scales or not set(scales) <= set(STRIDES):
            raise ValueError(f"scales are {list(scales)}; allowed: one or more of {list(STRIDES)}")
        if concatenate_scales and len(set(scales)) < len(scales):
            raise ValueError(f"scales to concatenate, {list(scales)}, repeat one")
        strides = sorted(set(scales), reverse=True)
        super().__init__(
            in_channels,
            mask_classification,
            num_feature_levels=len(strides),
            dropout=dropout,
            cross_attention=functools.partial(build_cross_attention, cross_attention),
            **kwargs,
        )
        self.strides = strides  # of the levels that have parameters
        self.scales = list(scales)
        self.concatenate_scales = concatenate_scales
        self.cross_attention_first = cross_attention_first
        if not learnable_query_features:
            zeros = ZeroQueryFeatures(self.num_queries, self.query_feat.embedding_dim)
            self.query_feat = zeros  # type: ignore[assignment]
        # The layers are of one kind.
        layers: Iterable[Any] = self.transformer_cross_attention_layers
        self.reads: tuple[str, ...] = next((layer.reads for layer in layers), ())

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int, mask_classification: bool) -> dict:
        decoder = cfg.MODEL.MASK_FORMER.DECODER
        return super().from_config(cfg, in_channels, mask_classification) | {
            "cross_attention": decoder.CROSS_ATTENTION,
            "scales": decoder.SCALES,
            "concatenate_scales": decoder.CONCATENATE_SCALES,
            "learnable_query_features": decoder.LEARNABLE_QUERY_FEATURES,
            "cross_attention_first": decoder.CROSS_ATTENTION_FIRST,
            "dropout": decoder.DROPOUT,
        }

    @property
    def reads_masks(self) -> bool:  # type: ignore[override]
        """Whether a layer reads the masks of the previous prediction."""
        return "memory_mask" in self.reads

    @has_fast_twin
    def forward(
        self, x: list[Tensor], mask_features: Tensor, mask: Tensor | None = None
    ) -> dict[str, Any]:
        """See `MultiScaleMaskedTransformerDecoder.forward`."""
        return super().forward(x, mask_features, mask)

    def project_features(self, x: list[Tensor]) -> list[Scale]:
        """The scales in the order in which layers attend to them, or all as one."""
        if len(x) != len(STRIDES):
            raise ValueError(f"expected {len(STRIDES)} feature scales, got {len(x)}")
        used = [
            features for features, stride in zip(x, STRIDES, strict=True) if stride in self.strides
        ]
        projected = dict(zip(self.strides, super().project_features(used), strict=True))
        scales = [projected[stride] for stride in self.scales]
        if not self.concatenate_scales:
            return scales
        memory, pos, sizes = zip(*scales, strict=True)
        return [Scale(torch.cat(memory), torch.cat(pos), tuple(chain.from_iterable(sizes)))]

    def forward_layer(
        self,
        i: int,
        output: Tensor,
        query_embed: Tensor,
        scale: Scale,
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Run one layer, see `MultiScaleMaskedTransformerDecoder.forward_layer`."""
        inputs = {}
        if "memory_mask" in self.reads:
            inputs["memory_mask"] = attn_mask
        if "locations" in self.reads:
            inputs["locations"] = locations(scale.sizes, output.device)

        def attend_to_image(output: Tensor) -> Tensor:
            layer = self.transformer_cross_attention_layers[i]
            return layer(output, scale.memory, pos=scale.pos, query_pos=query_embed, **inputs)

        if self.cross_attention_first:
            output = attend_to_image(output)
        output = self.transformer_self_attention_layers[i](output, query_pos=query_embed)
        if not self.cross_attention_first:
            output = attend_to_image(output)
        return self.transformer_ffn_layers[i](output)

    def attention_mask(self, mask_logits: Tensor, size: tuple[Any, ...]) -> Tensor:
        """Block the background, in one map (H, W) or in several ((H, W), …), concatenated."""
        sizes = size if isinstance(size[0], tuple) else (size,)
        block = super().attention_mask
        masks = [block(mask_logits, one) for one in sizes]
        return masks[0] if len(masks) == 1 else torch.cat(masks, -1)


@cached_by_shape(maxsize=16)
def locations(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Centres of all locations of maps of sizes (H, W): (L, 2) x and y in (0, 1)."""
    maps = []
    for height, width in sizes:
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        maps.append(torch.cartesian_prod(y, x).flip(-1))
    return torch.cat(maps)
