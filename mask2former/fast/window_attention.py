"""Swin's window attention with fused kernels.

Shape letters: B batch, V windows per image, N tokens per window, C channels, A attention heads,
D channels per head.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modeling.backbone.swin_layers import WindowAttention
from .attention import ROW_ALIGNMENT, masked_backend

# As written, also if somebody wraps the method later.
_PLAIN = inspect.unwrap(WindowAttention.forward)


def window_attention(module: WindowAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Twin of `WindowAttention.forward`."""
    trains_bias = torch.is_grad_enabled() and module.relative_position_bias_table.requires_grad
    if x.is_cpu and trains_bias:
        # No fused CPU kernel computes the gradient of the bias, and the fallback of
        # scaled_dot_product_attention makes a training step of the backbone a third slower.
        return _PLAIN(module, x, mask)
    num_windows, num_tokens, _ = x.shape
    q, k, v = module.project(x)  # each (B·V, A, N, D)
    # Cast before the repeat, to copy less. Autograd sums the gradient over the repeats.
    bias = module.attention_bias(mask, q.dtype)  # (V or 1, A, N, N)
    repeats = num_windows // mask.shape[0] if mask is not None else 1
    if not x.is_cpu:
        bias = _repeat_aligned(bias, repeats)
    elif mask is not None:
        bias = bias.repeat(repeats, 1, 1, 1)  # (B·V, A, N, N)
    dropout = module.attn_drop.p if module.attn_drop.training else 0.0
    with masked_backend(q):
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout, scale=module.scale
        )
    x = x.transpose(1, 2).reshape(num_windows, num_tokens, module.dim)
    return module.proj_drop(module.proj(x))


def _repeat_aligned(bias: Tensor, repeats: int) -> Tensor:
    """Repeat a bias (V, A, N, N) → (B·V, A, N, N), its rows aligned as fused kernels need it.

    They take no bias whose rows are not contiguous, as those of a gathered table, and copy one
    whose rows are not aligned.
    """
    num_tokens = bias.shape[-1]
    bias = bias.expand(repeats, *bias.shape)
    padding = -num_tokens % ROW_ALIGNMENT
    bias = F.pad(bias, (0, padding)) if padding else bias.contiguous()
    return bias.flatten(0, 1)[..., :num_tokens]
