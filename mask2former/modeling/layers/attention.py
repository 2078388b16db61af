"""The sub-layers of a decoder layer: self-attention, cross-attention, feed-forward network.

Each has dropout, a residual connection and a layer norm, after the sum ("post", the default) or
before the sub-layer ("pre"). Sequences come first, as nn.MultiheadAttention expects by default.

Shape letters: B batch, C channels, M heads, T length of the target sequence (queries), S length of
the memory sequence (pixels of a scale).
"""

from torch import Tensor, nn

from ...utils.twins import has_fast_twin
from .mlp import _get_activation_fn


class _ResidualLayer(nn.Module):
    """Common parts of the three sub-layers."""

    def _add_residual_parts(self, d_model: int, dropout: float, normalize_before: bool) -> None:
        """Create norm and dropout and initialise.

        Called last in the constructor: optimiser states of checkpoints number parameters in the
        original's order, in which the norm follows the sub-layer.
        """
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.normalize_before = normalize_before
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def with_pos_embed(self, tensor: Tensor, pos: Tensor | None) -> Tensor:
        return tensor if pos is None else tensor + pos


class SelfAttentionLayer(_ResidualLayer):
    """Self-attention among the queries.

    Args:
        d_model: channels C.
        nhead: heads M.
        dropout: probability, on attention weights and on the residual branch.
        activation: name of an activation; checked, but not used.
        normalize_before: layer norm before attention instead of after.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dropout: float = 0.0,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.activation = _get_activation_fn(activation)
        self._add_residual_parts(d_model, dropout, normalize_before)

    @has_fast_twin
    def forward(
        self,
        tgt: Tensor,
        tgt_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            tgt: (T, B, C).
            tgt_mask: (T, T) or (B·M, T, T), as in nn.MultiheadAttention.
            tgt_key_padding_mask: (B, T) bool, True at padding.
            query_pos: (T, B, C), added to queries and keys.

        Returns:
            (T, B, C).
        """
        forward = self.forward_pre if self.normalize_before else self.forward_post
        return forward(tgt, tgt_mask, tgt_key_padding_mask, query_pos)

    def forward_post(
        self,
        tgt: Tensor,
        tgt_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """`forward`, normalising after the sum."""
        q = k = self.with_pos_embed(tgt, query_pos)
        attended = self.self_attn(
            q, k, value=tgt, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask
        )[0]
        return self.norm(tgt + self.dropout(attended))

    def forward_pre(
        self,
        tgt: Tensor,
        tgt_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """`forward`, normalising first."""
        x = self.norm(tgt)
        q = k = self.with_pos_embed(x, query_pos)
        attended = self.self_attn(
            q, k, value=x, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask
        )[0]
        return tgt + self.dropout(attended)


class CrossAttentionLayer(_ResidualLayer):
    """Attention of the queries to the pixels; masked attention if a mask is given (equation 2).

    Args: as for `SelfAttentionLayer`.
    """

    # Inputs besides queries and memory, see CROSS_ATTENTION_REGISTRY.
    reads: tuple[str, ...] = ("memory_mask",)

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dropout: float = 0.0,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.activation = _get_activation_fn(activation)
        self._add_residual_parts(d_model, dropout, normalize_before)

    @has_fast_twin
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """Attend from queries to memory.

        Args:
            tgt: (T, B, C).
            memory: (S, B, C).
            memory_mask: (T, S) or (B·M, T, S) bool, True where attention is blocked, or float,
                added to the attention logits. A row must not be blocked completely.
            memory_key_padding_mask: (B, S) bool, True at padding.
            pos: (S, B, C), added to the keys.
            query_pos: (T, B, C), added to the queries.

        Returns:
            (T, B, C).
        """
        forward = self.forward_pre if self.normalize_before else self.forward_post
        return forward(tgt, memory, memory_mask, memory_key_padding_mask, pos, query_pos)

    def forward_post(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """`forward`, normalising after the sum."""
        attended = self.multihead_attn(
            query=self.with_pos_embed(tgt, query_pos),
            key=self.with_pos_embed(memory, pos),
            value=memory,
            attn_mask=memory_mask,
            key_padding_mask=memory_key_padding_mask,
        )[0]
        return self.norm(tgt + self.dropout(attended))

    def forward_pre(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """`forward`, normalising first."""
        attended = self.multihead_attn(
            query=self.with_pos_embed(self.norm(tgt), query_pos),
            key=self.with_pos_embed(memory, pos),
            value=memory,
            attn_mask=memory_mask,
            key_padding_mask=memory_key_padding_mask,
        )[0]
        return tgt + self.dropout(attended)


class FFNLayer(_ResidualLayer):
    """Two-layer feed-forward network.

    Args:
        d_model: channels C.
        dim_feedforward: hidden width.
        dropout: probability, after the activation and on the residual branch.
        activation: "relu", "gelu" or "glu".
        normalize_before: layer norm before the network instead of after.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.0,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.activation = _get_activation_fn(activation)
        self._add_residual_parts(d_model, dropout, normalize_before)

    def forward(self, tgt: Tensor) -> Tensor:
        """(T, B, C) → (T, B, C)."""
        return self.forward_pre(tgt) if self.normalize_before else self.forward_post(tgt)

    def forward_post(self, tgt: Tensor) -> Tensor:
        """`forward`, normalising after the sum."""
        hidden = self.dropout(self.activation(self.linear1(tgt)))
        return self.norm(tgt + self.dropout(self.linear2(hidden)))

    def forward_pre(self, tgt: Tensor) -> Tensor:
        """`forward`, normalising first."""
        hidden = self.dropout(self.activation(self.linear1(self.norm(tgt))))
        return tgt + self.dropout(self.linear2(hidden))
