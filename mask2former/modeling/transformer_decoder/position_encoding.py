"""Sine position encoding of feature maps (paper, section 3.2.1, after DETR).

Shape letters: B batch, D channels of one axis, H W height and width of the map.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

# Enough for the three scales of a few image sizes; multi-scale training visits many more shapes
# than are worth keeping.
_MAX_CACHED_SHAPES = 12


class PositionEmbeddingSine(nn.Module):
    """Sine and cosine of the row and column index at geometrically spaced frequencies.

    Without a padding mask the encoding depends on the shape alone: it is computed once per shape
    and kept.

    Args:
        num_pos_feats: channels per axis D; the encoding has 2·D channels (rows, then columns).
        temperature: base of the wavelengths' geometric progression.
        normalize: scale the indices of each axis to (0, ``scale``].
        scale: length of the normalised axis, 2π by default; only valid with ``normalize``.
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
        self._cache: OrderedDict[tuple[int, int, torch.device], Tensor] = OrderedDict()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode the positions of ``x``.

        Args:
            x: any tensor of shape (B, C, H, W); only its shape and device matter.
            mask: (B, H, W) bool, True at padding. Positions are then counted over real pixels.

        Returns:
            (B, 2·D, H, W) float32. Without a mask it is an expanded view: do not write to it.
        """
        batch, _, height, width = x.shape
        if mask is not None:
            return self._encode(~mask)
        key = (height, width, x.device)
        if key in self._cache and not torch.compiler.is_compiling():
            self._cache.move_to_end(key)
            return self._cache[key].expand(batch, -1, -1, -1)
        # A tensor made in inference mode could not be used for training afterwards.
        with torch.inference_mode(False), torch.no_grad():
            valid = torch.ones((1, height, width), dtype=torch.bool, device=x.device)
            encoding = self._encode(valid)
        if not torch.compiler.is_compiling():
            self._cache[key] = encoding
            if len(self._cache) > _MAX_CACHED_SHAPES:
                self._cache.popitem(last=False)
        return encoding.expand(batch, -1, -1, -1)

    def _encode(self, valid: Tensor) -> Tensor:
        """Encode pixel counts over ``valid`` (B, H, W) bool → (B, 2·D, H, W)."""
        rows = valid.cumsum(1, dtype=torch.float32)
        columns = valid.cumsum(2, dtype=torch.float32)
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

    def extra_repr(self) -> str:
        return (
            f"num_pos_feats={self.num_pos_feats}, temperature={self.temperature}, "
            f"normalize={self.normalize}, scale={self.scale}"
        )
