"""Deterministic mode of a process."""

import logging
import os

import pytest
import torch

from mask2former.utils.determinism import is_deterministic, use_deterministic_algorithms


@pytest.fixture
def restored(monkeypatch):
    """Leave the process as it was; without the variable of cuBLAS."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that the original state is recorded
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    benchmark = torch.backends.cudnn.benchmark
    yield monkeypatch
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def test_mode(restored, caplog):
    caplog.set_level(logging.INFO)
    torch.backends.cudnn.benchmark = True
    use_deterministic_algorithms()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    use_deterministic_algorithms()
    lines = [r.getMessage() for r in caplog.records if "DETERMINISTIC" in r.getMessage()]
    assert len(lines) == 1 and lines[0].endswith("CUBLAS_WORKSPACE_CONFIG=:4096:8")


def test_own_workspace_is_kept(restored):
    restored.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_algorithms()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_only_other_devices_need_other_operators(restored):
    cpu, other = torch.zeros(1), torch.zeros(1, device="meta")
    assert not is_deterministic(cpu) and not is_deterministic(other)
    use_deterministic_algorithms()
    assert not is_deterministic(cpu) and is_deterministic(other)
