"""Reading never executes code; written files are complete or absent."""

import errno
import os
import pickle
import re
import shutil
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from mask2former.utils.files import (
    WriteError,
    atomic_link,
    atomic_write,
    explained_read_errors,
    explained_write_errors,
    load_pickle,
    load_torch,
    require_writable,
)


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


def test_atomic_write_on_a_full_disk(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    os.symlink("/dev/full", tmp_path / "file.tmp")
    with pytest.raises(WriteError, match=rf"^Cannot write {path}: No space left on device\. Free "):
        with atomic_write(str(path)) as file:
            file.write("new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write_without_its_folder(tmp_path):
    with pytest.raises(WriteError, match=r"none/file: it, or its folder, does not exist\. Restore"):
        with atomic_write(str(tmp_path / "none" / "file")):
            pass
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(WriteError, match=r"folder/file: it, or its folder, does not exist"):
        with atomic_write(str(folder / "file")):
            shutil.rmtree(folder)
    (tmp_path / "file").mkdir()
    with pytest.raises(WriteError, match=r"/file: a folder is in the place of the file\. Rename"):
        with atomic_write(str(tmp_path / "file")):
            pass
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.EROFS, "Read-only file system. Mount it writable, or choose another folder."),
        (errno.EACCES, "Permission denied. Allow this user to write there, or choose another f"),
        (errno.EDQUOT, "Disk quota exceeded. Free some of your quota there, or choose another"),
        (errno.EIO, "Input/output error. Make it writable, or choose another folder."),
    ],
)
def test_causes_of_write_errors(number, text):
    with pytest.raises(WriteError, match=re.escape(f"Cannot write file: {text}")) as caught:
        with explained_write_errors("file"):
            raise OSError(number, os.strerror(number))
    assert caught.value.errno == number
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_other_errors_are_not_write_errors():
    with pytest.raises(ValueError, match="^unrelated$"):
        try:
            raise OSError(errno.ENOSPC, "before")
        except OSError:
            with explained_write_errors("file"):
                raise ValueError("unrelated")  # noqa: B904


def test_require_writable(tmp_path):
    require_writable(str(tmp_path / "a" / "b"))
    assert os.listdir(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/c: a file is in the place of a folder"):
        require_writable(str(tmp_path / "file" / "c"))
    # Not even root can.
    with pytest.raises(WriteError, match=r"Cannot write /proc/1\S*: "):
        require_writable("/proc/1")


def with_attribute(tensor):
    tensor.note = "kept by Python only"
    return tensor


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_read_as_by_torch(tmp_path, zipped):
    """Types, strides, shared memory and versions of modules."""
    path = str(tmp_path / "data.pth")
    base = torch.arange(24.0)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Linear(3, 2))
    tensors = {
        "whole": base,
        "view": base[4:10].view(2, 3).t(),
        "expanded": torch.ones(1).expand(3),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.rand(2)),
        "frozen": nn.Parameter(torch.rand(2), requires_grad=False),
        "marked": with_attribute(torch.rand(2)),
        "marked parameter": with_attribute(nn.Parameter(torch.rand(2))),
        "with gradient": torch.rand(2, requires_grad=True),
    }
    names = "float16 bfloat16 float64 int8 uint8 int16 int32 bool complex64 complex128"
    names += " uint16 uint32 float8_e4m3fn" if zipped else ""
    tensors |= {name: torch.ones(3, dtype=getattr(torch, name)) for name in names.split()}
    others = {
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda:1"),
        "dtype": torch.float16,
        "counter": Counter(a=2),
        "plain": [1, -(2**40), 2.5, None, True, "ä", b"\xff", {1, 2}, (1, (2,)), {3: "x"}, 1 + 2j],
        "bytes": bytearray(b"ab"),
    }
    data = {"model": model.state_dict(), "tensors": tensors, "others": others}
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    loaded, expected = load_torch(path), torch.load(path, weights_only=True)
    assert loaded["others"] == expected["others"] == others
    assert loaded["model"]._metadata == data["model"]._metadata
    for name, value in expected["tensors"].items():
        actual = loaded["tensors"][name]
        assert type(actual) is type(value), name
        assert (actual.dtype, actual.stride()) == (value.dtype, value.stride()), name
        assert actual.requires_grad == value.requires_grad, name
        assert (
            (actual.double() == value.double()).all()
            if actual.is_floating_point()
            else torch.equal(actual, value)
        )
    loaded["tensors"]["whole"][5] = 100
    assert loaded["tensors"]["view"][1, 0] == 100


def test_files_of_a_big_endian_machine(tmp_path):
    path = tmp_path / "data.pth"
    torch.save({"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([True])}, path)
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in records.items():
            content = b"big" if name.endswith("byteorder") else content
            swapped = (
                np.frombuffer(content, "<f4").byteswap().tobytes() if len(content) == 8 else b""
            )
            file.writestr(name, swapped or content)
    assert load_torch(str(path))["w"].tolist() == [1, 2]


@pytest.mark.parametrize("has_links", [True, False])
def test_second_name_of_a_file(tmp_path, monkeypatch, has_links):
    def refuse(source, path):
        raise PermissionError(1, "Operation not permitted", path)

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    source, path = tmp_path / "source", tmp_path / "path"
    path.write_text("old")
    source.write_text("new")
    for _ in range(2):
        atomic_link(str(source), str(path))
        assert path.read_text() == "new" and os.path.samefile(source, path) == has_links
    assert sorted(tmp_path.iterdir()) == [path, source]
    with pytest.raises(WriteError, match="nowhere"):
        atomic_link(str(source), str(tmp_path / "nowhere" / "path"))
