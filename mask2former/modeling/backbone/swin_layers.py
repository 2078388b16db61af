"""Parts of the Swin Transformer, from window attention to a whole stage.

A stage attends within windows of M x M tokens. Every second block shifts the windows by M // 2, so
that information crosses their borders (Swin paper, section 3.2). A map whose size is no multiple of
the window is padded with zeros after the norm. The padding takes part in attention: the released
weights were trained this way.

Shape letters: B batch, C channels, H W size of the current map (pixels of the image, then tokens),
M window size, N = M² tokens per window, V windows per image, A attention heads, D = C / A channels
per head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from ...utils.shape_cache import cached_by_shape
from ...utils.twins import has_fast_twin
from .swin_export import window_indices

# Added to the logits of token pairs that only the cyclic shift brought together. Finite, because
# the released weights were trained with this value.
_MASKED_LOGIT = -100.0

NormLayer = Callable[[int], nn.Module]


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Expand one number to (height, width); return a pair unchanged."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return height, width


def relative_position_index(height: int, width: int) -> Tensor:
    """Row of the position table for each pair of tokens of a window: (N, N) int64."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row, column = row.flatten(), column.flatten()  # (N,)
    row_offset = row[:, None] - row + height - 1  # (N, N), from 0 on
    column_offset = column[:, None] - column + width - 1
    return row_offset * (2 * width - 1) + column_offset


def padded_size(height: int, width: int, window_size: int) -> tuple[int, int]:
    """The next multiples of the window size."""
    rows, columns = ((length + window_size - 1) // window_size for length in (height, width))
    return rows * window_size, columns * window_size


def window_partition(x: Tensor, window_size: int) -> Tensor:
    """Split maps into windows, in row-major order within each image.

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
    """Invert `window_partition`.

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


# A mask has V · N² floats, 13 MB for the first stage of a 1024 x 1024 image with windows of 7. Four
# stages, four image sizes.
@cached_by_shape(maxsize=16)
def _shifted_window_mask(
    height: int, width: int, window_size: int, shift: int, device: torch.device
) -> Tensor:
    """The attention mask of shifted windows (Swin paper, section 3.2).

    The cyclic shift moves the first rows and columns behind the last ones. Along each axis this
    makes three regions: all windows before the last one, and the two parts of the last window on
    either side of the seam. Tokens attend to each other if they are in the same region.

    Returns:
        (V, N, N) float32, added to the logits: 0 within a region, -100 across regions.
    """

    def regions(length: int) -> Tensor:
        index = torch.arange(length, device=device)
        return (index >= length - window_size).int() + (index >= length - shift).int()

    region = 3 * regions(height)[:, None] + regions(width)  # (H, W)
    return region_mask(window_partition(region[None, :, :, None], window_size).flatten(1))


def region_mask(region: Tensor) -> Tensor:
    """The mask (V, N, N) of the regions (V, N) of tokens."""
    differs = region[:, None, :] != region[:, :, None]  # (V, N, N)
    return differs.float() * _MASKED_LOGIT


class Mlp(nn.Module):
    """Two linear layers with an activation between them.

    Args:
        in_features: channels of the input.
        hidden_features: hidden channels, by default those of the input.
        out_features: channels of the output, by default those of the input.
        act_layer: constructor of the activation.
        drop: dropout probability after each layer.
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

    relative_position_index: Tensor

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

        height, width = window_size
        num_offsets = (2 * height - 1) * (2 * width - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_offsets, num_heads))
        index = relative_position_index(height, width)
        self.register_buffer("relative_position_index", index)  # (N, N) int64

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.softmax = nn.Softmax(dim=-1)

    @has_fast_twin
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend within each window.

        Args:
            x: (B·V, N, C), the windows of each image together.
            mask: (V, N, N), added to the logits of every head and image; or None.

        Returns:
            (B·V, N, C)
        """
        num_windows, num_tokens, _ = x.shape
        q, k, v = self.project(x)  # each (B·V, A, N, D)
        bias = self.attention_bias(mask, q.dtype)  # (V or 1, A, N, N)
        logits = (q * self.scale) @ k.transpose(2, 3)  # (B·V, A, N, N)
        logits = (logits.unflatten(0, (-1, bias.shape[0])) + bias).flatten(0, 1)
        weights = self.attn_drop(self.softmax(logits))
        x = (weights @ v).transpose(1, 2).reshape(num_windows, num_tokens, self.dim)
        return self.proj_drop(self.proj(x))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of (B·V, N, C), each (B·V, A, N, D)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def attention_bias(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Relative position bias plus mask: (1, A, N, N), with a mask (V, A, N, N)."""
        bias = self.relative_position_bias_table[self.relative_position_index]  # (N, N, A)
        bias = bias.permute(2, 0, 1)[None]
        if mask is not None:
            bias = bias + mask[:, None]
        return bias.to(dtype)


class SwinTransformerBlock(nn.Module):
    """Window attention and an MLP, each with a norm before it and a residual connection.

    The caller sets `H` and `W`, the size of the map, before each call.

    Args:
        dim: C.
        num_heads: A.
        window_size: M.
        shift_size: shift of the windows in tokens, in [0, M).
        mlp_ratio: hidden channels of the MLP, relative to C.
        qkv_bias: see `WindowAttention`.
        qk_scale: see `WindowAttention`.
        drop: dropout probability of the outputs.
        attn_drop: dropout probability of attention weights.
        drop_path: stochastic depth: probability, per image, of skipping a branch in training.
        act_layer: constructor of the activation.
        norm_layer: constructor of a norm, called with the number of channels.
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
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift_size = shift_size
        self.mlp_ratio = mlp_ratio
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(
            dim, pair(window_size), num_heads, qkv_bias, qk_scale, attn_drop, drop
        )
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)
        self.H: int | None = None
        self.W: int | None = None

    def forward(self, x: Tensor, mask_matrix: Tensor | None) -> Tensor:
        """Apply the block to a map.

        Args:
            x: (B, H·W, C)
            mask_matrix: (V, N, N) of the padded map, see `WindowAttention`; read by blocks with
                shifted windows only.

        Returns:
            (B, H·W, C)
        """
        batch, num_tokens, channels = x.shape
        height, width = self.H, self.W
        assert num_tokens == height * width, f"{num_tokens} tokens are not {height} × {width}"

        if torch.compiler.is_exporting():
            indices = window_indices(height, width, self.window_size, self.shift_size, x.device)
            windows = indices.partition(self.norm1(x))
            mask = region_mask(indices.regions) if self.shift_size else None
            attended = indices.reverse(self.attn(windows, mask=mask), batch)
            x = x + self.drop_path(attended)
            return x + self.drop_path(self.mlp(self.norm2(x)))

        shortcut = x
        x = self.norm1(x).view(batch, height, width, channels)
        padded = padded_size(height, width, self.window_size)
        pad_bottom, pad_right = padded[0] - height, padded[1] - width
        if pad_bottom or pad_right:
            x = F.pad(x, (0, 0, 0, pad_right, 0, pad_bottom))
        if self.shift_size:
            x = x.roll((-self.shift_size, -self.shift_size), dims=(1, 2))

        windows = window_partition(x, self.window_size)  # (B·V, M, M, C)
        mask = mask_matrix if self.shift_size else None
        attended = self.attn(windows.flatten(1, 2), mask=mask).view_as(windows)
        x = window_reverse(attended, self.window_size, *padded)

        if self.shift_size:
            x = x.roll((self.shift_size, self.shift_size), dims=(1, 2))
        x = x[:, :height, :width].reshape(batch, num_tokens, channels)
        x = shortcut + self.drop_path(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Halves a map: the four tokens of each 2 x 2 square become one with twice the channels.

    Args:
        dim: C.
        norm_layer: constructor of a norm, called with the number of channels.
    """

    def __init__(self, dim: int, norm_layer: NormLayer = nn.LayerNorm):
        super().__init__()
        self.dim = dim
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        """(B, H·W, C) → (B, ⌈H/2⌉·⌈W/2⌉, 2·C); an odd last row or column is padded with zeros."""
        batch, num_tokens, channels = x.shape
        assert num_tokens == H * W, f"{num_tokens} tokens are not {H} × {W}"
        x = x.view(batch, H, W, channels)
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        x = x.view(batch, rows, 2, columns, 2, channels)
        # Column-major order within a square, as the weights expect.
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(batch, rows * columns, 4 * channels)
        return self.reduction(self.norm(x))


class BasicLayer(nn.Module):
    """One stage: blocks with regular and shifted windows in turn, then downsampling.

    Args:
        dim: C.
        depth: number of blocks.
        num_heads: A.
        window_size: M.
        mlp_ratio, qkv_bias, qk_scale, drop, attn_drop: see `SwinTransformerBlock`.
        drop_path: stochastic depth, see `SwinTransformerBlock`: one probability, or one per block.
        norm_layer: constructor of a norm, called with the number of channels.
        downsample: constructor of the step to the next stage, `PatchMerging`; None for none.
        use_checkpoint: activation checkpointing of each block in training.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float | Sequence[float] = 0.0,
        norm_layer: NormLayer = nn.LayerNorm,
        downsample: Callable[..., nn.Module] | None = None,
        use_checkpoint: bool = False,
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
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop,
                attn_drop=attn_drop,
                drop_path=rate,
                norm_layer=norm_layer,
            )
            for i, rate in enumerate(rates)
        )
        self.downsample = None if downsample is None else downsample(dim=dim, norm_layer=norm_layer)

    def forward(self, x: Tensor, H: int, W: int) -> tuple[Tensor, int, int, Tensor, int, int]:
        """Apply the stage to a map (B, H·W, C).

        Returns:
            the stage's output (B, H·W, C), H and W; then the next stage's input
            (B, ⌈H/2⌉·⌈W/2⌉, 2·C), its height and its width (without downsampling, the same again).
        """
        mask = None
        # Programs are exported with windows of another form, see `swin_export.py`.
        if self.shift_size and self.depth > 1 and not torch.compiler.is_exporting():
            padded = padded_size(H, W, self.window_size)
            mask = _shifted_window_mask(*padded, self.window_size, self.shift_size, x.device)
        blocks: Any = self.blocks
        for block in blocks:
            block.H, block.W = H, W
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(_run_block, block, x, H, W, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        if self.downsample is None:
            return x, H, W, x, H, W
        return x, H, W, self.downsample(x, H, W), (H + H % 2) // 2, (W + W % 2) // 2


def _run_block(
    block: SwinTransformerBlock, x: Tensor, height: int, width: int, mask: Tensor | None
) -> Tensor:
    """Run a block; called again in backward, when it may have seen another image size."""
    if (block.H, block.W) != (height, width):
        block.H, block.W = height, width
    return block(x, mask)


class PatchEmbed(nn.Module):
    """Splits an image into patches and embeds each as one token.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        in_chans: channels of the image.
        embed_dim: C.
        norm_layer: constructor of the norm of the tokens; None for none.
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
        """(B, in_chans, H, W) → (B, C, ⌈H/patch⌉, ⌈W/patch⌉), with zeros in incomplete patches."""
        if isinstance(self.proj, nn.Conv2d) and x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"the images have {x.shape[1]} channels (one per value of MODEL.PIXEL_MEAN), but "
                f"the stem of this Swin has {self.proj.in_channels}"
            )
        pad_bottom, pad_right = -x.shape[2] % self.patch_size[0], -x.shape[3] % self.patch_size[1]
        if pad_bottom or pad_right:
            x = F.pad(x, (0, pad_right, 0, pad_bottom))
        x = self.proj(x)
        if self.norm is not None:
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x
