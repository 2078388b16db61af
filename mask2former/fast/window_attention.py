"""Swin's window attention with fused kernels.

Shape letters: B batch, V windows per image, N tokens per window, C channels, A attention heads,
D channels per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.backbone.swin_layers import WindowAttention


class FastWindowAttention(WindowAttention):
    """`WindowAttention` through `F.scaled_dot_product_attention`.

    Stands for `WindowAttention.forward`; does not call the modules `softmax` and `attn_drop`.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `WindowAttention.forward`."""
        if x.is_cpu and torch.is_grad_enabled() and self.relative_position_bias_table.requires_grad:
            # No fused CPU kernel computes the gradient of the bias, and the fallback of
            # scaled_dot_product_attention makes a training step of the backbone a third slower.
            return super().forward(x, mask)
        num_windows, num_tokens, _ = x.shape
        q, k, v = self.project(x)  # each (B·V, A, N, D)
        # Narrow before the repeat. Autograd sums the gradient over the repeats.
        bias = self.attention_bias(mask, q.dtype)  # (V or 1, A, N, N)
        if mask is not None:
            bias = bias.repeat(num_windows // mask.shape[0], 1, 1, 1)  # (B·V, A, N, N)
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout, scale=self.scale
        )
        x = x.transpose(1, 2).reshape(num_windows, num_tokens, self.dim)
        return self.proj_drop(self.proj(x))
