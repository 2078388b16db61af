"""Compact masks for the transfer from loader workers to the device.

N boolean masks of H x W are large (20 targets of 1024 x 1024 pixels: 20 MB) and slow to make and
transfer. Mappers store `PackedMasks` in a `TargetInstances` instead. Reading its `gt_masks`
expands them to a tensor (N, H, W) on the current device of the instances.

Shape letters: N masks, P planes, H W pixels.
"""

from typing import Any

import torch
from detectron2.structures import Instances
from torch import Tensor

# 0 is background, and Detectron2's crops pad with 255.
LABELS_PER_PLANE = 254
BITS_PER_PLANE = 8


class PackedMasks:
    """N binary masks in uint8 planes.

    Masks that do not overlap are stored as labels: mask n is plane[n // 254] == n % 254 + 1. Masks
    that may overlap are stored as bits: mask n is bit n % 8 of plane[n // 8].
    """

    def __init__(self, planes: Tensor, num_masks: int, *, overlapping: bool) -> None:
        """
        Args:
            planes: (P, H, W) uint8.
            num_masks: N.
            overlapping: whether planes hold bits; otherwise they hold labels.
        """
        per_plane = BITS_PER_PLANE if overlapping else LABELS_PER_PLANE
        assert planes.dtype == torch.uint8 and planes.ndim == 3
        assert num_masks <= per_plane * len(planes)
        self.planes = planes
        self.num_masks = num_masks
        self.overlapping = overlapping

    def __len__(self) -> int:
        return self.num_masks

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, H, W)"""
        return self.num_masks, *self.planes.shape[1:]

    def to(self, *args: Any, **kwargs: Any) -> "PackedMasks | Tensor":
        """Like `Tensor.to`; with another dtype returns the expanded tensor in that dtype."""
        planes = self.planes.to(*args, **kwargs)
        if planes.dtype != torch.uint8:
            return self.expand().to(*args, **kwargs)
        return PackedMasks(planes, self.num_masks, overlapping=self.overlapping)

    def __getitem__(self, item: Any) -> Tensor:
        return self.expand()[item]

    def pad(self, padding: list[int]) -> "PackedMasks":
        """Pad with background; `padding` as in `torch.nn.functional.pad`."""
        if not any(padding):
            return self
        planes = torch.nn.functional.pad(self.planes, padding)
        return PackedMasks(planes, self.num_masks, overlapping=self.overlapping)

    def expand(self) -> Tensor:
        """The masks as (N, H, W) bool, on the device of the planes."""
        masks = self.planes.new_empty(self.shape, dtype=torch.bool)
        per_plane = BITS_PER_PLANE if self.overlapping else LABELS_PER_PLANE
        for plane, chunk in zip(self.planes, masks.split(per_plane), strict=False):
            codes = torch.arange(len(chunk), dtype=torch.uint8, device=plane.device)
            if self.overlapping:
                bits = torch.ones_like(codes).bitwise_left_shift(codes)
                torch.ne(plane & bits[:, None, None], 0, out=chunk)
            else:
                torch.eq(plane, codes[:, None, None] + 1, out=chunk)
        return masks


class TargetInstances(Instances):
    """Detectron2's `Instances` that expands `PackedMasks` to a tensor when the field is read."""

    def __getattr__(self, name: str) -> Any:
        super().__getattr__(name)  # raises if `name` is not a field
        return self.get(name)

    def get(self, name: str) -> Any:
        value = super().get(name)
        if isinstance(value, PackedMasks):
            value = self._fields[name] = value.expand()
        return value

    def get_fields(self) -> dict[str, Any]:
        for name in self._fields:
            self.get(name)
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> "TargetInstances":
        """Like Detectron2's; packed masks stay packed."""
        moved = TargetInstances(self._image_size)
        for name, value in self._fields.items():
            moved.set(name, value.to(*args, **kwargs) if hasattr(value, "to") else value)
        return moved
