"""Windows of Swin by gathers, for programs of `torch.export` with free image sizes.

Padding to multiples of the window, splitting and shifting by views makes the exporter compute for
minutes whether rounded-up sizes divide each other. Indices have sizes that are plain products.

Shape letters: B batch, V windows per image, N tokens per window, C channels, H W size of the map.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowIndices:
    """Where the tokens of a map are in its windows.

    Attributes:
        tokens: (V, N), the token at each place of each window; H·W where padding is.
        places: (H·W,), the place of each token among V·N.
        regions: (V, N), whose tokens attend to each other if they are equal.
    """

    tokens: Tensor
    places: Tensor
    regions: Tensor

    def partition(self, x: Tensor) -> Tensor:
        """Tokens (B, H·W, C) → windows (B·V, N, C), with zeros as padding."""
        x = torch.cat((x, x.new_zeros(x.shape[0], 1, x.shape[2])), 1)
        return x[:, self.tokens].flatten(0, 1)

    def reverse(self, windows: Tensor, batch: int) -> Tensor:
        """Invert `partition` for a batch of B images."""
        num_windows, num_tokens = self.tokens.shape
        x = windows.view(batch, num_windows * num_tokens, windows.shape[-1])
        return x[:, self.places]


def window_indices(
    height: int, width: int, window_size: int, shift: int, device: torch.device
) -> WindowIndices:
    """Indices of windows of M x M tokens.

    Args:
        height, width: H and W, which may be symbolic.
        window_size: M.
        shift: of the windows, in tokens; 0 for none.
        device: of the map.
    """
    rows, columns = ((size + window_size - 1) // window_size for size in (height, width))
    row_tokens, row_regions = _axis(rows, window_size, shift, device)
    column_tokens, column_regions = _axis(columns, window_size, shift, device)
    is_token = (row_tokens < height)[:, None, :, None] & (column_tokens < width)[None, :, None, :]
    tokens = row_tokens[:, None, :, None] * width + column_tokens[None, :, None, :]
    tokens = torch.where(is_token, tokens, height * width)  # (rows, columns, M, M)
    regions = 3 * row_regions[:, None, :, None] + column_regions[None, :, None, :]

    row_window, row_place = _places(height, rows, window_size, shift, device)
    column_window, column_place = _places(width, columns, window_size, shift, device)
    windows = row_window[:, None] * columns + column_window  # (H, W)
    places = row_place[:, None] * window_size + column_place
    return WindowIndices(
        tokens=tokens.flatten(2).flatten(0, 1),
        places=(windows * window_size**2 + places).flatten(),
        regions=regions.flatten(2).flatten(0, 1),
    )


def _axis(
    windows: int, window_size: int, shift: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of each place of each window along an axis, (windows, M): the token, and its region."""
    place = torch.arange(window_size, device=device)
    place = torch.arange(windows, device=device)[:, None] * window_size + place
    padded = windows * window_size
    token = place + shift
    token = torch.where(token >= padded, token - padded, token)
    region = (place >= padded - window_size).int() + (place >= padded - shift).int()
    return token, region


def _places(
    length: int, windows: int, window_size: int, shift: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of each token along an axis, (length,): its window, and its place in it."""
    place = torch.arange(length, device=device) - shift
    place = torch.where(place < 0, place + windows * window_size, place)
    return place // window_size, place % window_size
