"""Copies to the host that are waited for when they are read."""

import pytest
import torch

from mask2former.utils.host_copy import HostCopy


def test_values_of_the_time_of_the_copy():
    x = torch.arange(3.0)
    copied = HostCopy(x)
    x.zero_()
    assert copied.read().tolist() == [0.0, 1.0, 2.0]


def test_device_is_awaited_on_read_only(monkeypatch):
    """With a stand-in for the device: the event follows the copy, and a read waits for it."""
    order = []

    class Backend:
        class Event:
            def record(self, stream):
                order.append(f"record on {stream}")

            def synchronize(self):
                order.append("wait")

        @staticmethod
        def current_stream(device):
            return f"the stream of {device}"

    monkeypatch.setattr(torch, "get_device_module", lambda device: Backend)

    class OnDevice:
        is_cpu = False
        device = "device"

        def to(self, device, **options):
            order.append(f"copy to {device} {options}")
            return torch.ones(1)

    copied = HostCopy(OnDevice())
    begun = ["copy to cpu {'non_blocking': True, 'copy': True}", "record on the stream of device"]
    assert order == begun
    assert copied.read().tolist() == [1.0]
    assert order == [*begun, "wait"]


@pytest.mark.gpu
def test_from_a_gpu():
    x = torch.arange(3.0, device="cuda")
    copied = HostCopy(x)
    x.zero_()
    assert copied._values.is_pinned()  # otherwise the copy would block
    assert copied.read().tolist() == [0.0, 1.0, 2.0]
