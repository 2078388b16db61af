"""The report of time and memory after the first iterations."""

import logging
from types import SimpleNamespace

import pytest
import torch
import toy_training as toy
from detectron2.utils.events import EventStorage
from torch import nn

from mask2former.hooks import READING_PERIODS, StartReport
from mask2former.utils.memory import peak_resident_bytes

GIB = 2**30


@pytest.fixture
def report(tmp_path):
    """Function of seconds of each iteration, and of waiting for data in it → the report."""

    def make(seconds, data_seconds):
        hook = StartReport()
        with EventStorage() as storage:
            for storage.iter in range(20):
                storage.put_scalars(time=seconds, data_time=data_seconds)
        trainer = SimpleNamespace(
            cfg=toy.toy_config(tmp_path, "DATALOADER.NUM_WORKERS", "3"),
            storage=storage,
            model=nn.Linear(1, 1),
            iter=19,
            start_iter=0,
            max_iter=3620,
        )
        hook.trainer = trainer
        return hook._report()

    return make


def test_numbers(report):
    text = report(0.5, 0.05)
    # Two images in half a second; 3600 iterations of it are half an hour.
    assert "After 20 iterations: 0.500 s/it, 4.0 images/s, 10% of the time waiting" in text
    assert "ETA 0:30:00\n  batch 2 = 1 process(es) x 2 images; peak memory" in text
    assert "raise" not in text


def test_slow_data(report):
    assert "raise DATALOADER.NUM_WORKERS (3 for each process; this" in report(0.5, 0.25)


@pytest.mark.parametrize(("reserved", "hint"), [(20, "75% of the GPU's memory is free"), (60, "")])
def test_memory_of_a_gpu(report, monkeypatch, reserved, hint):
    parameters = lambda self: iter([SimpleNamespace(device=torch.device("cuda:1"))])  # noqa: E731
    monkeypatch.setattr(nn.Linear, "parameters", parameters)
    for name, size in {
        "max_memory_allocated": 10 * GIB,
        "max_memory_reserved": reserved * GIB,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
    properties = SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    text = report(0.5, 0.05)
    assert f"GPU 10.0 GiB allocated, {reserved:.1f} reserved, of 80.0" in text
    assert hint in text and ("find_batch_size" in text) == bool(hint)


@pytest.mark.parametrize(("max_iter", "number"), [("45", 20), ("5", 5), ("2", 2)])
def test_once_in_a_training(tmp_path, caplog, max_iter, number):
    caplog.set_level(logging.INFO)
    trainer = toy.ToyTrainer(toy.toy_config(tmp_path, "SOLVER.MAX_ITER", max_iter))
    trainer.train()
    lines = [r.message for r in caplog.records if r.message.startswith("After ")]
    assert len(lines) == 1 and lines[0].startswith(f"After {number} iterations: ")
    assert READING_PERIODS[StartReport] is None


def test_resident_memory():
    before = peak_resident_bytes()
    block = bytearray(64 * 2**20)
    assert 0 < before < peak_resident_bytes() + len(block)
