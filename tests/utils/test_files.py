"""Reading never executes code; written files are complete or absent."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from mask2former.utils.files import atomic_write, explained_read_errors, load_pickle, load_torch


class Payload:
    """Runs a command when an ordinary unpickler loads it."""

    def __init__(self, target, *arguments):
        self.call = target, arguments

    def __reduce__(self):
        return self.call


def write_pickle(path, data, protocol=2):
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return str(path)


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_data(tmp_path, protocol):
    data = {
        "model": OrderedDict(
            weight=np.arange(6, dtype=np.float32).reshape(2, 3),
            half=np.ones(2, dtype=np.float16)[::2],
            scalar=np.float64(1.5),
            tensor=torch.arange(4.0).reshape(2, 2).t(),
            parameter=torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        ),
        "others": [1, 2.5, None, "name", ("a", {3}), b"\xff\x00", True],
    }
    loaded = load_pickle(write_pickle(tmp_path / "data.pkl", data, protocol))
    assert loaded["others"] == data["others"]
    assert list(loaded["model"]) == list(data["model"])
    for name, value in data["model"].items():
        assert type(loaded["model"][name]) is type(value)
        assert loaded["model"][name].dtype == value.dtype
        assert (loaded["model"][name] == value).all()


def test_names_of_numpy_1(tmp_path):
    """Files of the original release predate the renaming of NumPy's core."""
    data = pickle.dumps(np.arange(3.0), protocol=2)
    assert b"numpy._core.multiarray" in data
    path = tmp_path / "old.pkl"
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_pickle(str(path)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("target", "name"),
    [(os.mkdir, "mkdir"), (eval, "eval"), (getattr, "getattr"), (np.load, "load")],
)
def test_code_in_a_pickle_does_not_run(tmp_path, protocol, target, name):
    trace = tmp_path / "trace"
    argument = f"__import__('os').mkdir({str(trace)!r})" if target is eval else str(trace)
    path = write_pickle(tmp_path / "bad.pkl", {"model": {"w": Payload(target, argument)}}, protocol)
    with pytest.raises(ValueError, match=rf"bad\.pkl was not loaded: it refers to \S+\.{name},"):
        with explained_read_errors(path):
            load_pickle(path)
    assert not trace.exists()


def test_code_inside_a_storage_inside_a_pickle_does_not_run(tmp_path):
    """A pickled tensor contains a file of torch.save, which torch itself loads unsafely."""
    trace = tmp_path / "trace"
    inner = tmp_path / "inner.pth"
    torch.save(Payload(os.mkdir, str(trace)), inner, _use_new_zipfile_serialization=False)
    outer = Payload(torch.storage._load_from_bytes, inner.read_bytes())
    path = write_pickle(tmp_path / "nested.pkl", {"model": {"w": outer}})
    with pytest.raises(ValueError, match=r"nested\.pkl was not loaded: it refers to \S+mkdir,"):
        with explained_read_errors(path):
            load_pickle(path)
    assert not trace.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_torch_file_does_not_run(tmp_path, zipped):
    trace = tmp_path / "trace"
    path = str(tmp_path / "bad.pth")
    torch.save(Payload(os.mkdir, str(trace)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bad\.pth was not loaded: it refers to \S+mkdir,"):
        with explained_read_errors(path):
            load_torch(path)
    assert not trace.exists()


def test_torch_files_with_numpy_data(tmp_path):
    path = str(tmp_path / "data.pth")
    data = {"w": np.arange(3), "s": np.float32(2), "b": np.bool_(True), "t": torch.ones(2)}
    torch.save(data, path)
    loaded = load_torch(path)
    assert loaded["w"].tolist() == [0, 1, 2]
    assert loaded["s"] == 2
    assert loaded["b"]
    assert loaded["t"].tolist() == [1, 1]


@pytest.mark.parametrize("load", [load_pickle, load_torch])
@pytest.mark.parametrize("kind", ["truncated", "empty", "web page"])
def test_damaged_files(tmp_path, load, kind):
    path = tmp_path / "damaged.file"
    data = {"w": np.arange(1000.0), "t": torch.ones(1000)}
    if load is load_torch:
        torch.save(data, path)
    else:
        write_pickle(path, data)
    whole = path.read_bytes()
    content = {"truncated": whole[: len(whole) // 2], "empty": b"", "web page": b"<!DOCTYPE html>"}
    path.write_bytes(content[kind])
    with pytest.raises(ValueError, match=r"damaged\.file cannot be read: it is truncated, damaged"):
        with explained_read_errors(str(path)):
            load(str(path))


def test_atomic_write_replaces_whole_files_only(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(str(path)) as file:
            file.write("half of the ne")
            file.flush()
            assert path.read_text() == "old"
            raise KeyboardInterrupt
    assert path.read_text() == "old"
    with atomic_write(str(path)) as file:
        file.write("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]
