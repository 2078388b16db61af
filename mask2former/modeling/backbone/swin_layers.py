"""Parts of the Swin Transformer, from attention within a window to a whole stage.

A stage attends within windows of M × M tokens; every second block moves the windows by M // 2, so
that information crosses their borders (Swin paper, section 3.2). Maps that do not divide by the
window are padded with zeros after the norm. The padding takes part in attention, as in the
published models: their numbers depend on it.

Shape letters: B batch, C channels, H W height and width of the current map (pixels for an image,
tokens afterwards), M window side, N = M² tokens of a window, V windows of an image, A attention
heads, D = C / A channels of a head.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

# Added to the logits of token pairs that the cyclic shift made neighbours. A finite number: the
# published models were trained with it.
_NOT_NEIGHBOURS = -100.0
# A mask has V · N² floats: 13 MB for the first stage of a 1024 × 1024 image and a window of 7.
_MAX_CACHED_MASKS = 4

NormLayer = Callable[[int], nn.Module]


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a value given as one number or as two."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """Cut maps into windows, image after image, row after row.

    Args:
        x: (B, H, W, C); H and W are multiples of ``window_size``.
        window_size: M, in tokens.

    Returns:
        (B·V, M, M, C)
    """
    batch, height, width, channels = x.shape
    rows, columns = height // window_size, width // window_size
    x = x.view(batch, rows, window_size, columns, window_size, channels)
    return x.transpose(2, 3).reshape(-1, window_size, window_size, channels)


def window_reverse(windows: Tensor, window_size: int, height: int, width: int) -> Tensor:
    """Put the windows of `window_partition` back together.

    Args:
        windows: (B·V, M, M, C)
        window_size: M, in tokens.
        height: H of the map, a multiple of M.
        width: W of the map, a multiple of M.

    Returns:
        (B, H, W, C)
    """
    rows, columns = height // window_size, width // window_size
    x = windows.view(-1, rows, columns, window_size, window_size, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def _shifted_window_mask(
    height: int, width: int, window_size: int, shift: int, device: torch.device
) -> Tensor:
    """Which tokens of a window are true neighbours after the cyclic shift (section 3.2).

    The shift brings the first rows and columns behind the last ones. Per axis there are three
    regions: the windows before the last one, and the two parts of the last window on either side
    of the seam. Tokens attend to each other when both their regions agree.

    Returns:
        (V, N, N) float32, added to the logits: 0 for neighbours, -100 for the others.
    """

    def regions(length: int) -> Tensor:
        index = torch.arange(length, device=device)
        return (index >= length - window_size).int() + (index >= length - shift).int()

    region = 3 * regions(height)[:, None] + regions(width)  # (H, W)
    region = window_partition(region[None, :, :, None], window_size).flatten(1)  # (V, N)
    differs = region[:, None, :] != region[:, :, None]  # (V, N, N)
    return differs.float() * _NOT_NEIGHBOURS


class Mlp(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        in_features: channels of the input.
        hidden_features: channels between the layers, by default those of the input.
        out_features: channels of the output, by default those of the input.
        act_layer: makes the activation.
        drop: dropout probability after either layer.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ):
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned relative position bias.

    Args:
        dim: C, a multiple of ``num_heads``.
        window_size: (height, width) of a window in tokens.
        num_heads: A.
        qkv_bias: whether the query, key and value projections have a bias.
        qk_scale: factor on the logits; None (or 0) means D ** -0.5.
        attn_drop: dropout probability of attention weights.
        proj_drop: dropout probability of the output.
    """

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{dim} channels do not divide into num_heads={num_heads}")
        self.dim = dim
        self.window_size = window_size
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.attn_drop = attn_drop

        height, width = window_size
        num_offsets = (2 * height - 1) * (2 * width - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_offsets, num_heads))
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        row, column = row.flatten(), column.flatten()  # (N,)
        row_offset = row[:, None] - row + height - 1  # (N, N), from 0 on
        column_offset = column[:, None] - column + width - 1
        index = row_offset * (2 * width - 1) + column_offset
        self.register_buffer("relative_position_index", index)  # (N, N) int64

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each window.

        Args:
            x: (B·V, N, C), image after image.
            mask: (V, N, N), added to the logits of every head and image; None adds nothing.

        Returns:
            (B·V, N, C)
        """
        num_windows, num_tokens, _ = x.shape
        qkv = self.qkv(x).view(num_windows, num_tokens, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 × (B·V, A, N, D)

        bias = self.relative_position_bias_table[self.relative_position_index]  # (N, N, A)
        bias = bias.permute(2, 0, 1)[None]  # (1, A, N, N)
        if mask is not None:
            bias = bias + mask[:, None]  # (V, A, N, N)
        # Cast before repeating: the repeats are then as narrow as the queries, and autograd sums
        # the gradient over the windows in the precision of the table.
        bias = bias.to(q.dtype)
        if mask is not None:
            bias = bias.repeat(num_windows // mask.shape[0], 1, 1, 1)  # (B·V, A, N, N)
        attn_drop = self.attn_drop if self.training else 0.0
        if q.is_cpu and bias.requires_grad:
            # No fused CPU kernel gives the bias a gradient, and what runs instead is slower than
            # this: a training step of the whole backbone takes a third longer.
            logits = (q * self.scale) @ k.transpose(2, 3) + bias  # (B·V, A, N, N)
            x = F.dropout(logits.softmax(3), attn_drop) @ v
        else:
            x = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=attn_drop, scale=self.scale
            )
        x = x.transpose(1, 2).reshape(num_windows, num_tokens, self.dim)
        return self.proj_drop(self.proj(x))


class SwinTransformerBlock(nn.Module):
    """Window attention and a feed-forward network, each normalised before and added to its input.

    Args:
        dim: C.
        num_heads: A.
        window_size: M.
        shift_size: rows and columns by which the windows are moved, in [0, M).
        mlp_ratio: hidden channels of the feed-forward network, relative to C.
        qkv_bias: see `WindowAttention`.
        qk_scale: see `WindowAttention`.
        drop: dropout probability of the outputs.
        attn_drop: dropout probability of attention weights.
        drop_path: probability, per image, of leaving out a branch in training.
        act_layer: makes the activation.
        norm_layer: makes a normalisation of that many channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 7,
        shift_size: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: NormLayer = nn.LayerNorm,
    ):
        super().__init__()
        if not 0 <= shift_size < window_size:
            raise ValueError(f"shift_size={shift_size} is not in [0, window_size={window_size})")
        self.window_size = window_size
        self.shift_size = shift_size
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(
            dim, pair(window_size), num_heads, qkv_bias, qk_scale, attn_drop, drop
        )
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)

    def forward(self, x: Tensor, height: int, width: int, mask: Tensor | None = None) -> Tensor:
        """Apply the block to a map.

        Args:
            x: (B, H·W, C)
            height: H.
            width: W.
            mask: (V, N, N) of the padded map, see `WindowAttention`; for shifted windows only.

        Returns:
            (B, H·W, C)
        """
        x = x + self.drop_path(self._attend(self.norm1(x), height, width, mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, height: int, width: int, mask: Tensor | None) -> Tensor:
        """Attention within the (shifted) windows of the map: (B, H·W, C) → (B, H·W, C)."""
        batch, num_tokens, channels = x.shape
        assert num_tokens == height * width, f"{num_tokens} tokens are not {height} × {width}"
        x = x.view(batch, height, width, channels)
        pad_bottom, pad_right = -height % self.window_size, -width % self.window_size
        if pad_bottom or pad_right:
            x = F.pad(x, (0, 0, 0, pad_right, 0, pad_bottom))
        if self.shift_size:
            x = x.roll((-self.shift_size, -self.shift_size), dims=(1, 2))

        windows = window_partition(x, self.window_size)  # (B·V, M, M, C)
        attended = self.attn(windows.flatten(1, 2), mask if self.shift_size else None)
        attended = attended.view_as(windows)
        x = window_reverse(attended, self.window_size, height + pad_bottom, width + pad_right)

        if self.shift_size:
            x = x.roll((self.shift_size, self.shift_size), dims=(1, 2))
        return x[:, :height, :width].reshape(batch, num_tokens, channels)


class PatchMerging(nn.Module):
    """Halves a map: the four tokens of each 2 × 2 square become one with twice the channels.

    Args:
        dim: C.
        norm_layer: makes a normalisation of that many channels.
    """

    def __init__(self, dim: int, norm_layer: NormLayer = nn.LayerNorm):
        super().__init__()
        self.dim = dim
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, H·W, C) → (B, ⌈H/2⌉·⌈W/2⌉, 2·C); an odd last row or column is paired with zeros."""
        batch, num_tokens, channels = x.shape
        assert num_tokens == height * width, f"{num_tokens} tokens are not {height} × {width}"
        x = x.view(batch, height, width, channels)
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        x = x.view(batch, rows, 2, columns, 2, channels)
        # The order of the four is that of the weights: down the first column, then the second.
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(batch, rows * columns, 4 * channels)
        return self.reduction(self.norm(x))


class BasicLayer(nn.Module):
    """One stage: blocks with unmoved and moved windows in turn, then the step to the next stage.

    Args:
        dim: C.
        depth: number of blocks.
        num_heads: A.
        window_size: M.
        drop_path: probability of leaving out a branch, see `SwinTransformerBlock`: one number, or
            one for each block.
        norm_layer: makes a normalisation of that many channels.
        downsample: makes the step to the next stage, `PatchMerging`; None after the last stage.
        use_checkpoint: recompute the blocks in the backward pass instead of keeping activations.
        block_arguments: further keyword arguments of `SwinTransformerBlock`.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        window_size: int = 7,
        drop_path: float | Sequence[float] = 0.0,
        norm_layer: NormLayer = nn.LayerNorm,
        downsample: Callable[..., nn.Module] | None = None,
        use_checkpoint: bool = False,
        **block_arguments: Any,
    ):
        super().__init__()
        self.window_size = window_size
        self.shift_size = window_size // 2
        self.depth = depth
        self.use_checkpoint = use_checkpoint
        rates = drop_path if isinstance(drop_path, Sequence) else [drop_path] * depth
        if len(rates) != depth:
            raise ValueError(f"{len(rates)} drop_path probabilities for {depth} blocks")
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(
                dim,
                num_heads,
                window_size,
                shift_size=self.shift_size if i % 2 else 0,
                drop_path=rate,
                norm_layer=norm_layer,
                **block_arguments,
            )
            for i, rate in enumerate(rates)
        )
        self.downsample = None if downsample is None else downsample(dim=dim, norm_layer=norm_layer)
        self._masks: OrderedDict[tuple[int, int, torch.device], Tensor] = OrderedDict()

    def forward(
        self, x: Tensor, height: int, width: int
    ) -> tuple[Tensor, int, int, Tensor, int, int]:
        """Apply the stage to a map (B, H·W, C).

        Returns:
            the stage's output (B, H·W, C), H and W; then the next stage's input
            (B, ⌈H/2⌉·⌈W/2⌉, 2·C) and its height and width (after the last stage, the same again).
        """
        mask = self._mask(height, width, x.device)
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, height, width, mask, use_reentrant=False)
            else:
                x = block(x, height, width, mask)
        if self.downsample is None:
            return x, height, width, x, height, width
        merged = self.downsample(x, height, width)
        return x, height, width, merged, (height + 1) // 2, (width + 1) // 2

    def _mask(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """The mask of shifted windows, (V, N, N); None where no block moves its windows."""
        if self.shift_size == 0 or self.depth < 2:
            return None
        height += -height % self.window_size
        width += -width % self.window_size
        key = (height, width, device)
        if key in self._masks and not torch.compiler.is_compiling():
            self._masks.move_to_end(key)
            return self._masks[key]
        mask = _shifted_window_mask(height, width, self.window_size, self.shift_size, device)
        if not torch.compiler.is_compiling():
            self._masks[key] = mask
            if len(self._masks) > _MAX_CACHED_MASKS:
                self._masks.popitem(last=False)
        return mask


class PatchEmbed(nn.Module):
    """Cuts an image into patches and maps each to one token.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        in_chans: channels of the image.
        embed_dim: C.
        norm_layer: makes the normalisation of the tokens; None for none.
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int] = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: NormLayer | None = None,
    ):
        super().__init__()
        self.patch_size = pair(patch_size)
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, stride=self.patch_size)
        self.norm = None if norm_layer is None else norm_layer(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → (B, C, ⌈H/patch⌉, ⌈W/patch⌉); zeros fill incomplete patches."""
        pad_bottom, pad_right = -x.shape[2] % self.patch_size[0], -x.shape[3] % self.patch_size[1]
        if pad_bottom or pad_right:
            x = F.pad(x, (0, pad_right, 0, pad_bottom))
        x = self.proj(x)
        if self.norm is not None:
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x
