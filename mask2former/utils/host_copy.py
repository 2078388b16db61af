"""Copies from the device to the host that do not stop the host."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor to the host, begun at once and waited for only when it is read.

    Without a sync the host can prepare the next operations while the device computes. A read after
    some other sync of the same stream does not wait at all.

    Args:
        tensor: its values may be changed later; the copy has those of now.
    """

    def __init__(self, tensor: Tensor) -> None:
        # From a device, torch takes pinned memory for a copy that does not block.
        self._values = tensor.to("cpu", non_blocking=True, copy=True)
        self._done = None
        if not tensor.is_cpu:
            backend = torch.get_device_module(tensor.device)
            self._done = backend.Event()
            self._done.record(backend.current_stream(tensor.device))

    def read(self) -> Tensor:
        """The values, on the CPU."""
        if self._done is not None:
            self._done.synchronize()
        return self._values
