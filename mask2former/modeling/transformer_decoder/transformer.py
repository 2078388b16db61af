"""The plain transformer of DETR: positional encodings enter at every attention, not at the input.

Used by MaskFormer's decoder (`maskformer_transformer_decoder.py`) and by the encoder of
`TransformerEncoderPixelDecoder`. Sequences come first, as nn.MultiheadAttention has them by
default. Dropout follows every block; each block has a residual connection and a layer norm, either
after the sum ("post", the default) or before the block ("pre").

Shape letters: B batch, C channels, S source locations, Q queries (targets), L decoder layers,
H W height and width of the feature map.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..layers.mlp import _get_activation_fn


class Transformer(nn.Module):
    """Encoder over a feature map, and decoder of learned queries that attend to it.

    Args:
        d_model: C.
        nhead: number of attention heads; divides C.
        num_encoder_layers: layers of the encoder; 0 leaves the feature map as it is.
        num_decoder_layers: L.
        dim_feedforward: hidden width of the feed-forward blocks.
        dropout: probability, 0 to 1.
        activation: "relu", "gelu" or "glu".
        normalize_before: normalise before each block, not after.
        return_intermediate_dec: return the output of every decoder layer, not of the last only.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
        return_intermediate_dec: bool = False,
    ):
        super().__init__()
        layer_args = (d_model, nhead, dim_feedforward, dropout, activation, normalize_before)
        encoder_norm = nn.LayerNorm(d_model) if normalize_before else None
        self.encoder = TransformerEncoder(
            TransformerEncoderLayer(*layer_args), num_encoder_layers, encoder_norm
        )
        self.decoder = TransformerDecoder(
            TransformerDecoderLayer(*layer_args),
            num_decoder_layers,
            nn.LayerNorm(d_model),
            return_intermediate=return_intermediate_dec,
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.d_model = d_model
        self.nhead = nhead

    def forward(
        self, src: Tensor, mask: Tensor | None, query_embed: Tensor, pos_embed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode `src` and decode the queries.

        Args:
            src: (B, C, H, W).
            mask: (B, H, W) bool, True at padding; or None.
            query_embed: (Q, C) learned positional encoding of the queries, whose content starts
                at zero.
            pos_embed: (B, C, H, W) positional encoding of `src`.

        Returns:
            Queries (L or 1, B, Q, C), and the encoded feature map (B, C, H, W).
        """
        sequence = src.flatten(2).permute(2, 0, 1)  # (S, B, C)
        pos_embed = pos_embed.flatten(2).permute(2, 0, 1)  # (S, B, C)
        query_embed = query_embed.unsqueeze(1).expand(-1, src.shape[0], -1)  # (Q, B, C)
        if mask is not None:
            mask = mask.flatten(1)  # (B, S)

        memory = self.encoder(sequence, src_key_padding_mask=mask, pos=pos_embed)
        queries = self.decoder(
            torch.zeros_like(query_embed),
            memory,
            memory_key_padding_mask=mask,
            pos=pos_embed,
            query_pos=query_embed,
        )
        return queries.transpose(1, 2), memory.permute(1, 2, 0).reshape(src.shape)


class TransformerEncoder(nn.Module):
    """Copies of `encoder_layer` one after the other, and a last norm where one is given."""

    def __init__(self, encoder_layer: nn.Module, num_layers: int, norm: nn.Module | None = None):
        super().__init__()
        self.layers = _get_clones(encoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
    ) -> Tensor:
        """Encode; arguments as in `TransformerEncoderLayer.forward`. Returns (S, B, C)."""
        output = src
        for layer in self.layers:
            output = layer(
                output, src_mask=mask, src_key_padding_mask=src_key_padding_mask, pos=pos
            )
        return output if self.norm is None else self.norm(output)


class TransformerDecoder(nn.Module):
    """Copies of `decoder_layer` one after the other, each output normalised by the same `norm`.

    Args:
        decoder_layer: the layer to copy.
        num_layers: L, at least 1.
        norm: norm of what is returned; the next layer gets its input without it.
        return_intermediate: return every layer's output, not the last only.
    """

    def __init__(
        self,
        decoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        return_intermediate: bool = False,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"A transformer decoder needs at least one layer, got {num_layers}.")
        self.layers = _get_clones(decoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm
        self.return_intermediate = return_intermediate

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """Decode; arguments as in `TransformerDecoderLayer.forward`. Returns (L or 1, Q, B, C)."""
        output = tgt
        outputs = []
        for layer in self.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                pos=pos,
                query_pos=query_pos,
            )
            outputs.append(output)
        if not self.return_intermediate:
            outputs = outputs[-1:]
        stacked = torch.stack(outputs)
        return stacked if self.norm is None else self.norm(stacked)


class _Layer(nn.Module):
    """Common parts of encoder and decoder layers."""

    linear1: nn.Module
    linear2: nn.Module
    dropout: nn.Module
    activation: Callable[[Tensor], Tensor]
    normalize_before: bool
    forward_pre: Callable[..., Tensor]
    forward_post: Callable[..., Tensor]

    def with_pos_embed(self, tensor: Tensor, pos: Tensor | None) -> Tensor:
        return tensor if pos is None else tensor + pos

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(self.activation(self.linear1(x))))

    def forward(self, *args, **kwargs) -> Tensor:
        """Dispatch to `forward_pre` or `forward_post`, which take the same arguments."""
        forward = self.forward_pre if self.normalize_before else self.forward_post
        return forward(*args, **kwargs)


class TransformerEncoderLayer(_Layer):
    """Self-attention and feed-forward block. Arguments as in `Transformer`."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = _get_activation_fn(activation)
        self.normalize_before = normalize_before

    def _self_attention(
        self, x: Tensor, mask: Tensor | None, padding: Tensor | None, pos: Tensor | None
    ) -> Tensor:
        q = k = self.with_pos_embed(x, pos)
        return self.self_attn(
            q, k, x, attn_mask=mask, key_padding_mask=padding, need_weights=False
        )[0]

    def forward_post(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
    ) -> Tensor:
        """Apply the layer, normalising after each block.

        Args:
            src: (S, B, C).
            src_mask: (S, S) or (B * heads, S, S), True or -inf where attention is blocked.
            src_key_padding_mask: (B, S) bool, True at padding.
            pos: (S, B, C), added to queries and keys, not to values.

        Returns:
            (S, B, C).
        """
        attended = self._self_attention(src, src_mask, src_key_padding_mask, pos)
        src = self.norm1(src + self.dropout1(attended))
        return self.norm2(src + self.dropout2(self._feed_forward(src)))

    def forward_pre(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
    ) -> Tensor:
        """`forward_post`, normalising before each block instead."""
        attended = self._self_attention(self.norm1(src), src_mask, src_key_padding_mask, pos)
        src = src + self.dropout1(attended)
        return src + self.dropout2(self._feed_forward(self.norm2(src)))


class TransformerDecoderLayer(_Layer):
    """Self-attention, attention to the memory, feed-forward. Arguments as in `Transformer`."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.activation = _get_activation_fn(activation)
        self.normalize_before = normalize_before

    def _self_attention(
        self, x: Tensor, mask: Tensor | None, padding: Tensor | None, query_pos: Tensor | None
    ) -> Tensor:
        q = k = self.with_pos_embed(x, query_pos)
        return self.self_attn(
            q, k, x, attn_mask=mask, key_padding_mask=padding, need_weights=False
        )[0]

    def _cross_attention(
        self,
        x: Tensor,
        memory: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        pos: Tensor | None,
        query_pos: Tensor | None,
    ) -> Tensor:
        return self.multihead_attn(
            self.with_pos_embed(x, query_pos),
            self.with_pos_embed(memory, pos),
            memory,
            attn_mask=mask,
            key_padding_mask=padding,
            need_weights=False,
        )[0]

    def forward_post(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """Apply the layer, normalising after each block.

        Args:
            tgt: (Q, B, C).
            memory: (S, B, C).
            tgt_mask, memory_mask: (Q, Q) and (Q, S), or (B * heads, ..., ...); True or -inf where
                attention is blocked.
            tgt_key_padding_mask, memory_key_padding_mask: (B, Q) and (B, S) bool, True at padding.
            pos: (S, B, C), added to the memory as keys, not as values.
            query_pos: (Q, B, C), added to the targets as queries and keys, not as values.

        Returns:
            (Q, B, C).
        """
        attended = self._self_attention(tgt, tgt_mask, tgt_key_padding_mask, query_pos)
        tgt = self.norm1(tgt + self.dropout1(attended))
        attended = self._cross_attention(
            tgt, memory, memory_mask, memory_key_padding_mask, pos, query_pos
        )
        tgt = self.norm2(tgt + self.dropout2(attended))
        return self.norm3(tgt + self.dropout3(self._feed_forward(tgt)))

    def forward_pre(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """`forward_post`, normalising before each block instead."""
        attended = self._self_attention(self.norm1(tgt), tgt_mask, tgt_key_padding_mask, query_pos)
        tgt = tgt + self.dropout1(attended)
        attended = self._cross_attention(
            self.norm2(tgt), memory, memory_mask, memory_key_padding_mask, pos, query_pos
        )
        tgt = tgt + self.dropout2(attended)
        return tgt + self.dropout3(self._feed_forward(self.norm3(tgt)))


def _get_clones(module: nn.Module, N: int) -> nn.ModuleList:
    """N independent copies of a module."""
    return nn.ModuleList(copy.deepcopy(module) for _ in range(N))
