"""Variants of the decoder's cross-attention (paper, table 4c), and the registry for one's own.

    masked         softmax attention within the previous prediction's mask (paper, equation 2)
    full           softmax attention to all locations (equation 1)
    smca           softmax attention weighted by a Gaussian around a predicted centre
    mask_pooling   mean of the features within the previous prediction's mask

Shape letters: B batch, Q queries, C channels, M heads, L locations of the maps attended to.
"""

import torch
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ...utils.registry import look_up, register_unless_taken
from .attention import CrossAttentionLayer, _ResidualLayer
from .mlp import MLP

CROSS_ATTENTION_REGISTRY = Registry("CROSS_ATTENTION")
CROSS_ATTENTION_REGISTRY.__doc__ = """
Registry of cross-attention layers, named by `MODEL.MASK_FORMER.DECODER.CROSS_ATTENTION`.

A registered class (or function) is called as `layer(d_model, nhead, dropout=…, normalize_before=…)`
for each decoder layer and returns a module, which is called as

    layer(tgt, memory, pos=…, query_pos=…, **inputs) → new queries (Q, B, C)

with queries `tgt` (Q, B, C), their positional embeddings `query_pos` (Q, B, C), image features
`memory` (L, B, C) and their position encoding `pos` (L, B, C). Residual connection, norm and
dropout are the layer's own. Its attribute `reads` names the further inputs, any of

    memory_mask    (B·M, Q, L) bool, True in the background of the mask that the previous layer
                   predicted for the query. All False where the mask is empty.
    locations      (L, 2) x and y of the centres of the locations, relative to the image's sides.

If it does not name memory_mask, inference skips the masks of all predictions but the last.
"""

INPUTS = ("memory_mask", "locations")


def build_cross_attention(
    name: str, d_model: int, nhead: int, dropout: float = 0.0, normalize_before: bool = False
) -> nn.Module:
    """Build the cross-attention of one decoder layer.

    Args:
        name: registered name.
        d_model: C.
        nhead: M.
        dropout: probability, on attention weights and on the residual branch.
        normalize_before: layer norm before attention instead of after.

    Raises:
        ValueError: the name is not registered, or the layer's `reads` is missing or wrong.
    """
    key = "MODEL.MASK_FORMER.DECODER.CROSS_ATTENTION"
    build = look_up(CROSS_ATTENTION_REGISTRY, name, key)
    layer = build(d_model, nhead, dropout=dropout, normalize_before=normalize_before)
    reads = getattr(layer, "reads", None)
    if not isinstance(reads, tuple) or not set(reads) <= set(INPUTS):
        raise ValueError(
            f"{key} is {name!r}, whose layer {type(layer).__name__} has `reads` {reads!r}; "
            f"allowed: a tuple of {', '.join(map(repr, INPUTS))}, or ()"
        )
    return layer


register_unless_taken(CROSS_ATTENTION_REGISTRY, "masked")(CrossAttentionLayer)


@register_unless_taken(CROSS_ATTENTION_REGISTRY, "full")
def full_attention(
    d_model: int, nhead: int, dropout: float = 0.0, normalize_before: bool = False
) -> CrossAttentionLayer:
    """Cross-attention without a mask; arguments of `CrossAttentionLayer`."""
    layer = CrossAttentionLayer(d_model, nhead, dropout, normalize_before=normalize_before)
    layer.reads = ()
    return layer


@register_unless_taken(CROSS_ATTENTION_REGISTRY, "smca")
class SMCALayer(CrossAttentionLayer):
    """Spatially modulated co-attention (Gao et al., Fast Convergence of DETR with SMCA, ICCV 2021).

    A query predicts a centre c shared by all heads, and for each head an offset Δ from it and a
    width and a height s. The logarithm of a Gaussian weight is added to the attention logits:

        log G(x, y) = -(x - c_x - Δ_x)² / (β s_x²) - (y - c_y - Δ_y)² / (β s_y²)

    As in that paper: the centre is the sigmoid of an MLP, relative to the image; offsets and widths
    come from linear layers; β is fixed. Our choices, which that paper leaves open or which several
    scales need:

    - all are predicted in every layer, from query features plus positional embeddings;
    - x and y count cells of a 32x32 grid over the image, whatever the scale, which are the cells of
      the coarsest map for training images of 1024x1024;
    - the linear layer predicts log s, so that s is positive; offsets and log s start at 0;
    - β = 8, so that at first the standard deviation is two cells.

    Args: as for `CrossAttentionLayer`.
    """

    reads = ("locations",)
    bandwidth = 8.0
    cells = 32

    def __init__(
        self, d_model: int, nhead: int, dropout: float = 0.0, normalize_before: bool = False
    ):
        super().__init__(d_model, nhead, dropout, normalize_before=normalize_before)
        self.center = MLP(d_model, d_model, 2, 2)
        self.offset = nn.Linear(d_model, nhead * 2)
        self.log_scale = nn.Linear(d_model, nhead * 2)
        for parameter in (*self.offset.parameters(), *self.log_scale.parameters()):
            nn.init.zeros_(parameter)

    def log_gaussian(self, query: Tensor, locations: Tensor) -> Tensor:
        """The logarithm of the weights of all locations.

        Args:
            query: (Q, B, C).
            locations: (L, 2) x and y relative to the image's sides.

        Returns:
            (B, M, Q, L), at least float32, not above 0.
        """
        heads = (self.multihead_attn.num_heads, 2)
        dtype = torch.promote_types(query.dtype, torch.float32)
        center = self.center(query).to(dtype).sigmoid().unsqueeze(-2) * self.cells  # (Q, B, 1, 2)
        center = center + self.offset(query).to(dtype).unflatten(-1, heads)  # (Q, B, M, 2)
        inverse = (-self.log_scale(query).to(dtype)).exp().unflatten(-1, heads)
        center, inverse = (x.permute(1, 2, 0, 3).unsqueeze(-2) for x in (center, inverse))
        grid = locations.to(dtype) * self.cells
        # By axis: the largest tensors stay (B, M, Q, L).
        x, y = (((grid[:, i] - center[..., i]) * inverse[..., i]).square() for i in range(2))
        return -(x + y) / self.bandwidth

    def forward(  # type: ignore[override]
        self,
        tgt: Tensor,
        memory: Tensor,
        locations: Tensor,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """Attend from queries (Q, B, C) to memory (L, B, C) at locations (L, 2)."""
        query = self.with_pos_embed(self.norm(tgt) if self.normalize_before else tgt, query_pos)
        bias = self.log_gaussian(query, locations)
        # Softmax is invariant to it, and a centre far away must not make all weights 0.
        bias = bias - bias.detach().amax(-1, keepdim=True)
        bias = bias.flatten(0, 1).to(memory.dtype)
        return super().forward(tgt, memory, memory_mask=bias, pos=pos, query_pos=query_pos)


@register_unless_taken(CROSS_ATTENTION_REGISTRY, "mask_pooling")
class MaskPoolingLayer(_ResidualLayer):
    """Mask pooling (Zhang et al., K-Net, NeurIPS 2021) instead of attention.

    The features within the query's binary mask are averaged, as Mask2Former's paper describes it
    (K-Net sums them), and projected; residual connection and norm are those of the other layers.
    K-Net also gates the update by the query, which we leave out, to replace cross-attention alone.
    Our addition: the query's positional embedding is added to the mean. Without it, queries that
    start from zero would stay equal: their masks are, and so are the values of self-attention.

    Args:
        d_model: C.
        nhead: M; the heads have one mask in common.
        dropout: probability, on the residual branch.
        normalize_before: layer norm of the mean, instead of the sum.
    """

    reads = ("memory_mask",)

    def __init__(
        self, d_model: int, nhead: int, dropout: float = 0.0, normalize_before: bool = False
    ):
        super().__init__()
        del nhead
        self.out_proj = nn.Linear(d_model, d_model)
        self._add_residual_parts(d_model, dropout, normalize_before)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_mask: Tensor,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """Pool memory (L, B, C) where memory_mask (B·M, Q, L) is False: (Q, B, C)."""
        del pos  # a mean position says little about a mask
        foreground = ~memory_mask.unflatten(0, (tgt.shape[1], -1))[:, 0]  # (B, Q, L)
        weights = foreground / foreground.sum(-1, keepdim=True)
        pooled = weights.to(memory.dtype) @ memory.transpose(0, 1)  # (B, Q, C)
        pooled = self.with_pos_embed(pooled.transpose(0, 1), query_pos)
        if self.normalize_before:
            return tgt + self.dropout(self.out_proj(self.norm(pooled)))
        return self.norm(tgt + self.dropout(self.out_proj(pooled)))
