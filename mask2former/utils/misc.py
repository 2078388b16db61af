"""Batches of tensors of different sizes, process groups; other projects import from here too.

Shape letters: B batch, C channels (or number of masks), H W height and width in pixels.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class NestedTensor:
    """A batch of tensors padded to one size, with the mask of the padding.

    Args:
        tensors: (B, C, H, W), zero in the padding.
        mask: (B, H, W) bool, True in the padding; or None.
    """

    def __init__(self, tensors: Tensor, mask: Tensor | None):
        self.tensors = tensors
        self.mask = mask

    def to(self, device: torch.device | str) -> "NestedTensor":
        mask = None if self.mask is None else self.mask.to(device)
        return NestedTensor(self.tensors.to(device), mask)

    def decompose(self) -> tuple[Tensor, Tensor | None]:
        return self.tensors, self.mask

    def __repr__(self) -> str:
        return str(self.tensors)


def nested_tensor_from_tensor_list(tensor_list: Sequence[Tensor]) -> NestedTensor:
    """Pad tensors at the end of every dimension to the largest size and stack them.

    Args:
        tensor_list: tensors (C_i, H_i, W_i) of one dtype and device. C_i may differ, as for the
            masks of different images, and may be 0.

    Returns:
        `tensors` (B, max C_i, max H_i, max W_i) and `mask` (B, max H_i, max W_i) bool, True
        outside H_i x W_i. Padded channels are zero and not part of the mask.

    Raises:
        ValueError: the list is empty, or a tensor does not have three dimensions.
    """
    if len(tensor_list) == 0:
        raise ValueError("Cannot batch an empty list of tensors.")
    for index, tensor in enumerate(tensor_list):
        if tensor.ndim != 3:
            raise ValueError(
                f"Tensor {index} of the list has shape {tuple(tensor.shape)}; "
                "expected three dimensions (C, H, W)."
            )
    sizes = [max(lengths) for lengths in zip(*(t.shape for t in tensor_list), strict=True)]
    batch = tensor_list[0].new_zeros((len(tensor_list), *sizes))
    mask = torch.ones(
        (len(tensor_list), *sizes[1:]), dtype=torch.bool, device=tensor_list[0].device
    )
    for index, tensor in enumerate(tensor_list):
        channels, height, width = tensor.shape
        batch[index, :channels, :height, :width] = tensor
        mask[index, :height, :width] = False
    return NestedTensor(batch, mask)


def is_dist_avail_and_initialized() -> bool:
    """Whether torch.distributed is available and its process group initialised."""
    return dist.is_available() and dist.is_initialized()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without its wrapper for distributed training."""
    return model.module if isinstance(model, DistributedDataParallel) else model
