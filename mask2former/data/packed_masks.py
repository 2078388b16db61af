"""Compact masks for the transfer from loader workers to the device, and that transfer.

N boolean masks of H x W are large (20 targets of 1024 x 1024 pixels: 20 MB) and slow to make and
transfer. Mappers store `PackedMasks` in a `TargetInstances` instead. Reading its `gt_masks`
expands them to a tensor (N, H, W) on the current device of the instances.

Shape letters: N masks, P planes, H W pixels.
"""

from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances
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

    def pin_memory(self) -> "PackedMasks":
        """A copy in pinned memory."""
        planes = self.planes.pin_memory()
        return PackedMasks(planes, self.num_masks, overlapping=self.overlapping)

    def __getitem__(self, item: Any) -> Tensor:
        return self.expand()[item]

    def pad(self, padding: list[int]) -> "PackedMasks":
        """Pad with background; `padding` as in `torch.nn.functional.pad`."""
        if not any(padding):
            return self
        planes = torch.nn.functional.pad(self.planes, padding)
        return PackedMasks(planes, self.num_masks, overlapping=self.overlapping)

    def uncovered(self) -> Tensor:
        """Pixels of no mask, (H, W) bool."""
        # Planes of labels may be padded with 255, which is no label.
        covered = self.planes != 0 if self.overlapping else self.planes - 1 < LABELS_PER_PLANE
        return ~covered.any(0)

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
            moved.set(name, _move(value, *args, **kwargs))
        return moved

    def pin_memory(self) -> "TargetInstances":
        """A copy in pinned memory, from which `upload` does not block; masks stay packed."""
        pinned = TargetInstances(self._image_size)
        for name, value in self._fields.items():
            pinned.set(name, pin(value))
        return pinned


def pin(value: Any) -> Any:
    """A copy in pinned memory of tensors on the CPU, boxes and instances; others as they are."""
    # Subclasses, such as rotated boxes, have other tensors.
    if type(value) is Boxes:
        return Boxes(pin(value.tensor))
    if isinstance(value, Tensor):
        return value.pin_memory() if value.is_cpu else value
    return value.pin_memory() if isinstance(value, PackedMasks | TargetInstances) else value


def upload(value: Any, device: torch.device) -> Any:
    """`value.to(device)` that does not block if the values lie in pinned memory.

    Args:
        value: a tensor or instances. Instances with a `to` of their own are moved by that.
        device: to move to. A copy to the CPU blocks, or the host could read before it is done.
    """
    if device.type == "cpu":
        return value.to(device)
    method = getattr(type(value), "to", None)
    if method in _TAKE_NON_BLOCKING:
        return value.to(device, non_blocking=True)
    if method is Instances.to:
        moved = Instances(value.image_size)
        for name, field in value.get_fields().items():
            moved.set(name, _move(field, device, non_blocking=True))
        return moved
    return value.to(device)


def _move(field: Any, *args: Any, **kwargs: Any) -> Any:
    """`field.to(*args, **kwargs)` of a field of instances, if it can be moved.

    Detectron2's boxes and other types of fields may take nothing but a device.
    """
    if type(field) is Boxes:
        return Boxes(field.tensor.to(*args, **kwargs)) if kwargs else field.to(*args)
    if not hasattr(field, "to"):
        return field
    if getattr(type(field), "to", None) not in _TAKE_NON_BLOCKING:
        kwargs = {name: value for name, value in kwargs.items() if name != "non_blocking"}
    return field.to(*args, **kwargs)


_TAKE_NON_BLOCKING = (Tensor.to, PackedMasks.to, TargetInstances.to, BitMasks.to)
