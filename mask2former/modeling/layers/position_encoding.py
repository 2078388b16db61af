"""Sine position encoding of feature maps (paper, section 3.2.2, after DETR).

Shape letters: B batch, D channels of one axis, H W height and width of the map.
"""

import math

import torch
from torch import Tensor, nn

from ...utils.twins import has_fast_twin


class PositionEmbeddingSine(nn.Module):
    """Sine and cosine of the row and column index at geometrically spaced frequencies.

    Args:
        num_pos_feats: channels per axis D; the encoding has 2·D channels (rows, then columns).
        temperature: base of the wavelengths' geometric progression.
        normalize: scale the indices of each axis to (0, `scale`].
        scale: length of the normalised axis, 2π by default; only valid with `normalize`.
    """

    def __init__(
        self,
        num_pos_feats: int = 64,
        temperature: float = 10000,
        normalize: bool = False,
        scale: float | None = None,
    ):
        super().__init__()
        if scale is not None and not normalize:
            raise ValueError(f"scale={scale} has no effect unless normalize=True")
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = 2 * math.pi if scale is None else scale

    @has_fast_twin
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode the positions of `x`.

        Args:
            x: any tensor of shape (B, C, H, W); only its shape and device matter.
            mask: (B, H, W) bool, True at padding. Positions are then counted over real pixels.

        Returns:
            (B, 2·D, H, W) float32. Without a mask it is an expanded view: do not write to it.
        """
        if mask is not None:
            return self.encode(~mask)
        valid = torch.ones((1, *x.shape[-2:]), dtype=torch.bool, device=x.device)
        return self.encode(valid).expand(x.shape[0], -1, -1, -1)

    def encode(self, valid: Tensor) -> Tensor:
        """Encode pixel counts over `valid` (B, H, W) bool → (B, 2·D, H, W)."""
        # Integers: in deterministic mode some torch versions refuse cumsum of floats on a GPU.
        rows = valid.cumsum(1).to(torch.float32)
        columns = valid.cumsum(2).to(torch.float32)
        if self.normalize:
            eps = 1e-6
            rows = rows / (rows[:, -1:, :] + eps) * self.scale
            columns = columns / (columns[:, :, -1:] + eps) * self.scale
        channel = torch.arange(self.num_pos_feats, dtype=torch.float32, device=valid.device)
        pair = torch.div(channel, 2, rounding_mode="floor")
        wavelength = self.temperature ** (2 * pair / self.num_pos_feats)  # (D,)
        encodings = []
        for axis in (rows, columns):
            phase = axis[..., None] / wavelength  # (B, H, W, D)
            waves = torch.stack((phase[..., 0::2].sin(), phase[..., 1::2].cos()), dim=4)
            encodings.append(waves.flatten(3))
        return torch.cat(encodings, dim=3).permute(0, 3, 1, 2)

    def __repr__(self, _repr_indent: int = 4) -> str:
        names = ("num_pos_feats", "temperature", "normalize", "scale")
        indent = " " * _repr_indent
        body = [f"{indent}{name}: {getattr(self, name)}" for name in names]
        return "\n".join([f"Positional encoding {type(self).__name__}", *body])
