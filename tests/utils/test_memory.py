"""Whether the allocator keeps freed memory."""

import ctypes
import sys

import forked
import pytest

from mask2former.utils import memory

# Fills 64 MiB repeatedly and counts the page faults.
_FAULTS = """
import resource, sys
import torch
from mask2former.utils.memory import keep_freed_memory
assert sys.argv[1] == "no" or keep_freed_memory()
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_blocks_are_reused(monkeypatch):
    monkeypatch.delenv(memory.KEEP_VARIABLE, raising=False)
    faults = {}
    for keep in ("no", "yes"):
        command = [sys.executable, "-W", "ignore", "-c", _FAULTS, keep]
        faults[keep] = int(forked.run(command, check=True).stdout)
    assert faults["yes"] < faults["no"] / 10


def test_other_systems_are_unchanged(monkeypatch):
    monkeypatch.delenv(memory.KEEP_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not memory.keep_freed_memory()


def test_environment_variable(monkeypatch):
    def refuse(name):
        raise AssertionError("the allocator must not change")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setenv(memory.KEEP_VARIABLE, "0")
    assert not memory.keep_freed_memory()
    monkeypatch.setenv(memory.KEEP_VARIABLE, "no")
    with pytest.raises(ValueError, match="MASK2FORMER_KEEP_FREED_MEMORY is 'no': set it to 0 or 1"):
        memory.keep_freed_memory()
