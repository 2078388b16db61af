"""The layers of the masked-attention decoder: self-attention, cross-attention, feed-forward, MLP.

They work on sequences first, as nn.MultiheadAttention does by default.

Shape letters: B batch, C channels, M heads, T length of a target sequence (queries), S length of a
memory sequence (pixels of a scale).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "glu": F.glu}


def _get_activation_fn(activation: str) -> Callable[[Tensor], Tensor]:
    """The activation function of that name."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {sorted(_ACTIVATIONS)}")
    return _ACTIVATIONS[activation]


def _blocked_to_bias(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, num_heads: int
) -> Tensor | None:
    """Bring masks in nn.MultiheadAttention's conventions to the one SDPA expects.

    Args:
        attn_mask: (T, S), (B·M, T, S) or broadcastable to (B, M, T, S); bool, True where
            attention is blocked, or float, added to the scores.
        key_padding_mask: (B, S), bool or float in the same sense.

    Returns:
        Broadcastable to (B, M, T, S); bool, True where attention is allowed, or float.
    """

    def allowed(mask: Tensor) -> Tensor:
        return ~mask if mask.dtype == torch.bool else mask

    if attn_mask is not None:
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.view(batch, num_heads, *attn_mask.shape[1:])
        attn_mask = allowed(attn_mask)
    if key_padding_mask is None:
        return attn_mask
    key_padding_mask = allowed(key_padding_mask)[:, None, None, :]
    if attn_mask is None:
        return key_padding_mask
    if attn_mask.dtype == torch.bool and key_padding_mask.dtype == torch.bool:
        return attn_mask & key_padding_mask
    as_float = [
        m.new_zeros(m.shape, dtype=torch.float32).masked_fill(~m, float("-inf"))
        if m.dtype == torch.bool
        else m
        for m in (attn_mask, key_padding_mask)
    ]
    return as_float[0] + as_float[1]


def _attend(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """``attention(query, key, value)`` with a mask that may be broadcast over heads.

    nn.MultiheadAttention wants one mask per head; the mask of masked attention is the same for
    all, so the module serves as the holder of the parameters only.

    Args:
        query: (T, B, C).
        key, value: (S, B, C).
        attn_mask, key_padding_mask: see `_blocked_to_bias`.

    Returns:
        (T, B, C).
    """
    num_heads = attention.num_heads
    weights = attention.in_proj_weight.chunk(3)
    biases = attention.in_proj_bias.chunk(3)

    def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = F.linear(x, weight, bias)
        return x.unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3)  # (B, M, T or S, C/M)

    q, k, v = (project(*args) for args in zip((query, key, value), weights, biases, strict=True))
    mask = _blocked_to_bias(attn_mask, key_padding_mask, query.shape[1], num_heads)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    dropout = attention.dropout if attention.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return attention.out_proj(out.permute(2, 0, 1, 3).flatten(2))


class _ResidualLayer(nn.Module):
    """A sub-layer with dropout, residual connection and layer norm, before or after it."""

    def _finish(self, d_model: int, dropout: float, normalize_before: bool) -> None:
        """Add the common parts and initialise.

        Called last: optimiser states of checkpoints number parameters in the published order,
        in which the norm follows the sub-layer.
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

    def forward(self, tgt: Tensor, *args, **kwargs) -> Tensor:
        """Dispatch to ``forward_pre`` or ``forward_post``; same arguments, returns (T, B, C)."""
        forward = self.forward_pre if self.normalize_before else self.forward_post
        return forward(tgt, *args, **kwargs)


class SelfAttentionLayer(_ResidualLayer):
    """Self-attention among the queries.

    Args:
        d_model: channels C.
        nhead: heads M.
        dropout: probability, on attention weights and on the residual branch.
        activation: name of an activation; published argument, checked.
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
        self._finish(d_model, dropout, normalize_before)

    def _attention(
        self,
        x: Tensor,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        query_pos: Tensor | None,
    ) -> Tensor:
        q = k = self.with_pos_embed(x, query_pos)
        return self.dropout(_attend(self.self_attn, q, k, x, mask, key_padding_mask))

    def forward_post(
        self,
        tgt: Tensor,
        tgt_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """``tgt`` and ``query_pos`` (T, B, C); masks as in nn.MultiheadAttention → (T, B, C)."""
        return self.norm(tgt + self._attention(tgt, tgt_mask, tgt_key_padding_mask, query_pos))

    def forward_pre(
        self,
        tgt: Tensor,
        tgt_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """As `forward_post`, normalising first."""
        x = self.norm(tgt)
        return tgt + self._attention(x, tgt_mask, tgt_key_padding_mask, query_pos)


class CrossAttentionLayer(_ResidualLayer):
    """Attention of the queries to the pixels; masked attention when given a mask (equation 2).

    Args: as for `SelfAttentionLayer`.
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
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.activation = _get_activation_fn(activation)
        self._finish(d_model, dropout, normalize_before)

    def _attention(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        key_padding_mask: Tensor | None,
        pos: Tensor | None,
        query_pos: Tensor | None,
    ) -> Tensor:
        query = self.with_pos_embed(x, query_pos)
        key = self.with_pos_embed(memory, pos)
        return self.dropout(
            _attend(self.multihead_attn, query, key, memory, mask, key_padding_mask)
        )

    def forward_post(
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
            tgt: (T, B, C); ``query_pos`` likewise.
            memory: (S, B, C); ``pos`` likewise.
            memory_mask: bool, True where attention is blocked: (T, S), (B·M, T, S) or
                (B, 1, T, S), which is one mask for all heads. Rows must not be blocked whole.
            memory_key_padding_mask: (B, S) bool.

        Returns:
            (T, B, C).
        """
        return self.norm(
            tgt + self._attention(tgt, memory, memory_mask, memory_key_padding_mask, pos, query_pos)
        )

    def forward_pre(
        self,
        tgt: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """As `forward_post`, normalising first."""
        x = self.norm(tgt)
        return tgt + self._attention(
            x, memory, memory_mask, memory_key_padding_mask, pos, query_pos
        )


class FFNLayer(_ResidualLayer):
    """Two-layer feed-forward network with residual connection.

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
        self._finish(d_model, dropout, normalize_before)

    def _network(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))

    def forward_post(self, tgt: Tensor) -> Tensor:
        """(T, B, C) → (T, B, C)."""
        return self.norm(tgt + self._network(tgt))

    def forward_pre(self, tgt: Tensor) -> Tensor:
        """As `forward_post`, normalising first."""
        return tgt + self._network(self.norm(tgt))


class MLP(nn.Module):
    """Linear layers with ReLU between them; all but the last are hidden_dim wide."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        self.num_layers = num_layers
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(
            nn.Linear(n, m) for n, m in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_dim) → (..., output_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)
