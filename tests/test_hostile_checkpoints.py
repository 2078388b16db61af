"""Checkpoints by somebody who wants a crash, memory, time or code: one named error each.

They are loaded in a process of its own, because a crash would end the tests as well.
"""

import io
import itertools
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import zipfile
from pathlib import Path

import forked
import numpy as np
import pytest
import torch

from mask2former.checkpoint import Mask2FormerCheckpointer

ROOT = Path(__file__).resolve().parents[1]


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def items(*parts):
    return b"(" + b"".join(parts) + b"t"


def name(dotted):
    module, _, function = dotted.rpartition(".")
    return f"c{module}\n{function}\n".encode()


def call(dotted, *arguments):
    return name(dotted) + items(*arguments) + b"R"


def data(value):
    return call("_codecs.encode", text(value), text("latin1"))


def storage(key="0", kind="torch.FloatStorage", size=4, word="storage", location="cpu"):
    return items(text(word), name(kind), text(key), text(location), number(size)) + b"Q"


def tensor(size, stride, offset=0, store=None, function="_rebuild_tensor_v2", last=b"}"):
    sizes, strides = (items(*map(number, values)) for values in (size, stride))
    store = storage() if store is None else store
    return call(f"torch._utils.{function}", store, number(offset), sizes, strides, b"\x89", last)


def state(*others, flags=b""):
    """What `__setstate__` of an array gets."""
    return items(number(1), *others)


FLOAT = call("numpy.dtype", text("f4"))
OBJECT = call("numpy.dtype", text("O"))
EMPTY = call(
    "numpy.core.multiarray._reconstruct", name("numpy.ndarray"), items(number(0)), data("b")
)
SCALAR = "numpy.core.multiarray.scalar"
BUFFER = "numpy.core.numeric._frombuffer"
HUGE = 10**11

# Small in memory, endless when written out.
LAUGHS = b"]q\x60(K\x00e" + b"".join(
    b"0](" + b"h" + bytes([0x60 + i]) + (b"h" + bytes([0x60 + i])) * 8 + b"eq" + bytes([0x61 + i])
    for i in range(24)
)

# Values in a pickle; each is refused in a .pkl and in a .pth.
VALUES = {
    "array of objects": call("numpy.ndarray", items(number(1)), OBJECT, data("AAAAAAAA")),
    "array of numbers over too few bytes": call(
        "numpy.ndarray", items(number(9)), FLOAT, data("A")
    ),
    "huge array": call("numpy.ndarray", items(number(HUGE)), FLOAT),
    "endless list": LAUGHS,
    "endless size": call("torch.Size", LAUGHS),
    "endless tuple": call("torch.Size", LAUGHS + b"\x85"),
    "endless type": call("numpy.dtype", LAUGHS),
    "endless name": LAUGHS + LAUGHS + b"\x93",
    "endless key": b"}" + LAUGHS + b"Ns",
    "endless device": call("torch.device", LAUGHS),
    "endless shape": EMPTY + state(LAUGHS, FLOAT, b"\x89", data("AAAA")) + b"b",
    "huge integer": call("torch.Size", items(b"\x8b" + struct.pack("<i", 5000) + b"\x7f" * 5000)),
    "array class": name("numpy.ndarray"),
    "array created without class": name("numpy.ndarray") + items(items(number(3))) + b"\x81",
    "objects over bytes": EMPTY + state(items(number(1)), OBJECT, b"\x89", data("AAAAAAAA")) + b"b",
    "list as objects": EMPTY + state(items(number(1)), OBJECT, b"\x89", b"]K\x01a") + b"b",
    "too short": EMPTY + state(items(number(9)), FLOAT, b"\x89", data("AAAAAAAA")) + b"b",
    "negative shape": EMPTY + state(items(number(-1)), FLOAT, b"\x89", data("AAAA")) + b"b",
    "overflowing shape": EMPTY
    + state(items(number(2**47), number(2**47)), FLOAT, b"\x89", data(""))
    + b"b",
    "no shape": EMPTY + state(number(4), FLOAT, b"\x89", data("AAAA")) + b"b",
    "no type": EMPTY + state(items(number(1)), text("f4"), b"\x89", data("AAAA")) + b"b",
    "40 dimensions": EMPTY + state(items(*[number(1)] * 40), FLOAT, b"\x89", data("AAAA")) + b"b",
    "filled twice": EMPTY + (state(items(number(1)), FLOAT, b"\x89", data("AAAA")) + b"b") * 2,
    "short state": EMPTY + items(number(1)) + b"b",
    "reconstruct another class": call(
        "numpy.core.multiarray._reconstruct", name("numpy.dtype"), items(number(0)), data("b")
    ),
    "reconstruct a large array": call(
        "numpy.core.multiarray._reconstruct", name("numpy.ndarray"), items(number(HUGE)), data("b")
    ),
    "structured type": call("numpy.dtype", text("f4,O")),
    "list of types": call("numpy.dtype", b"]" + items(text("a"), text("O")) + b"a"),
    "void type": call("numpy.dtype", text("V8")),
    "date type": call("numpy.dtype", text("M8[s]")),
    "type of a class": call("numpy.dtype", name("collections.OrderedDict")),
    "fields of a type": FLOAT
    + items(number(3), text("<"), b"N", items(text("a")), b"}", number(8), number(1), number(0))
    + b"b"
    + b"0N",
    "type with odd order": FLOAT + items(number(3), text("x")) + b"b",
    "scalar of an object": call(SCALAR, OBJECT, data("AAAAAAAA")),
    "short scalar": call(SCALAR, FLOAT, data("A")),
    "empty scalar": call(SCALAR, call("numpy.dtype", text("S0")), data("")),
    "scalar without type": call(SCALAR, text("f4"), data("AAAA")),
    "objects from a buffer": call(BUFFER, data("AAAAAAAA"), OBJECT, items(number(1)), text("C")),
    "too short buffer": call(BUFFER, data("AAAA"), FLOAT, items(number(2)), text("C")),
    "bad order": call(BUFFER, data("AAAA"), FLOAT, items(number(1)), text("X")),
    "buffer of text": call(BUFFER, text("AAAA"), FLOAT, items(number(1)), text("C")),
    "many bytes": call("builtins.bytearray", number(HUGE)),
    "bytes of a list": call("builtins.bytearray", b"](K\x01K\x02e"),
    "attribute of a function": name("_codecs.encode") + b"}" + text("__name__") + text("x") + b"sb",
    "attribute of a class": name("collections.OrderedDict") + b"}" + text("a") + text("b") + b"sb",
    "attribute of a list": b"]" + b"}" + text("append") + b"N" + b"sb",
    "method of a dict": call("collections.OrderedDict") + b"}" + text("_metadata") + b"]" + b"sb",
    "versions without dict": call("collections.OrderedDict")
    + b"}"
    + text("_metadata")
    + b"}"
    + text("")
    + b"]"
    + b"ss"
    + b"b",
    "dict of numbers": call("collections.OrderedDict", number(3)),
    "counter of text": call("collections.Counter", text("abc")),
    "set of lists": call("builtins.set", b"]]a"),
    "set of numbers": call("builtins.set", number(HUGE)),
    "huge size": call("torch.Size", items(number(-1))),
    "complex text": call("builtins.complex", text("1j")),
    "unknown device": call("torch.device", text("nowhere")),
    "slice": call("builtins.slice", number(1)),
    "deep key": b"}" + b"N" + b"\x85" * 100_000 + b"Ns",
    "list as key": b"}" + b"]Ns",
    "colliding keys": b"}" + b"".join(number(i * (2**61 - 1)) + b"Ns" for i in range(2, 9)),
    "items for a number": number(1) + text("a") + text("b") + b"s",
    "append to a tuple": b")" + b"Na",
    "append to an array": EMPTY + b"Na",
    "append to a set": call("builtins.set") + b"Na",
    "odd items": b"}(" + text("a") + b"u",
    "deep list": b"]" * 100 + b"a" * 99,
    "very deep list": b"]" * 50_000 + b"a" * 49_999,
    "cycle": b"]q\x01h\x01a",
    "cycle through dicts": b"}q\x01" + text("a") + b"h\x01s",
    "no mark": b"N.t",
    "empty stack": b"RRR",
    "reduce a number": number(1) + b")R",
    "reduce without tuple": name("collections.OrderedDict") + b"]R",
    "large memo": b"Nr\xff\xff\xff\xff" + b"0j\xff\xff\xff\xfe",
    "missing memo": b"h\x63",
    "extension": b"\x82\x01",
    "instance": b"(ios\nmkdir\n",
    "object": b"(" + name("os.mkdir") + text("TRACE") + b"o",
    "large frame": b"\x95" + struct.pack("<Q", 2**62) + b"Q",
    "large bytes": b"\x8e" + struct.pack("<Q", 2**62) + b"abc",
    "large text": b"\x8d" + struct.pack("<Q", 2**40) + b"abc",
    "large byte array": b"\x96" + struct.pack("<Q", 2**40) + b"abc",
    "large integer": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"abc",
    "negative integer": b"\x8b" + struct.pack("<i", -1) + b"abc",
    "long decimal": b"L" + b"9" * 10_000 + b"L\n",
    "out-of-band buffer": b"\x97",
    "bad text": b"X\x02\0\0\0\xff\xfe",
    "protocol 9": b"\x80\x09N",
    "unknown operation": b"\xff",
    "other reference": text("x") + b"Q",
    "reference of text": b"Pabc\n",
    "reference to a module": storage(word="module"),
    "bare storage type": name("torch.FloatStorage"),
    "bare function": name("torch._utils._rebuild_tensor_v2"),
    "copies": b"]"
    + data("A" * 100_000)
    + b"q\x07a("
    + (name("builtins.bytearray") + b"h\x07\x85R") * 5000
    + b"e",
    "code": call("os.mkdir", text("TRACE")),
    "code in protocol 4": text("os") + text("mkdir") + b"\x93" + items(text("TRACE")) + b"R",
    "evaluated": call("builtins.eval", text("__import__('os').mkdir('TRACE')")),
    "attribute": call("builtins.getattr", name("torch.Size"), text("mro")),
    "torch.load": call("torch.load", text("TRACE")),
    "nested name": text("torch.nn") + text("Module.__init__") + b"\x93",
    "empty name": text("") + text("") + b"\x93",
    "name of a number": number(1) + number(2) + b"\x93",
    "storage of unsafe bytes": call("torch.storage._load_from_bytes", data("\x80\x02cos\nmkdir\n")),
    "storage of no bytes": call("torch.storage._load_from_bytes", number(3)),
    "quantised": call("torch._utils._rebuild_qtensor", storage()),
    "sparse": call("torch._utils._rebuild_sparse_tensor", name("torch.sparse_coo"), b")"),
    "meta": call("torch._utils._rebuild_meta_tensor_no_storage", name("torch.float32")),
    "nested tensor": call("torch._utils._rebuild_nested_tensor", storage()),
    "subclass": call("torch._utils._rebuild_wrapper_subclass", name("torch.Tensor")),
    "new tensor": name("torch.FloatTensor") + items(number(10**6), number(10**6)) + b"\x81",
    "new Tensor": name("torch.Tensor") + items(number(10**6), number(10**6)) + b"\x81",
    "called Tensor": name("torch.Tensor") + items(number(10**6), number(10**6)) + b"R",
    "parameter of a number": call("torch._utils._rebuild_parameter", number(3), b"\x89", b"}"),
    "typed by a function": call(
        "torch._tensor._rebuild_from_type_v2", name("os.mkdir"), name("torch.Tensor"), b")", b"}"
    ),
    "typed by another": call(
        "torch._tensor._rebuild_from_type_v2",
        name("builtins.set"),
        name("torch.Tensor"),
        b")",
        b"}",
    ),
    "typed as a function": call(
        "torch._tensor._rebuild_from_type_v2",
        name("torch._utils._rebuild_tensor_v2"),
        name("builtins.set"),
        b")",
        b"}",
    ),
}
# Values that need a storage: only in a .pth, with one of 16 bytes.
TENSORS = {
    "longer than its storage": tensor([5], [1]),
    "beyond its storage": tensor([4], [1], offset=1),
    "far beyond its storage": tensor([1], [1], offset=2**40),
    "huge": tensor([HUGE], [1]),
    "huge and expanded": tensor([HUGE], [0]),
    "expanded": tensor([2**21], [0]),
    "expanded twice": tensor([2**11, 2**11], [0, 0]),
    "overflowing": tensor([2**32, 2**32], [0, 0]),
    "overflowing and empty": tensor([2**40, 2**40, 0], [1, 1, 1]),
    "large stride": tensor([2], [2**60]),
    "negative stride": tensor([4], [-1], offset=3),
    "negative offset": tensor([4], [1], offset=-1),
    "negative size": tensor([-4], [1]),
    "two strides": tensor([4], [1, 1]),
    "no stride": tensor([4], []),
    "50 dimensions": tensor([1] * 50, [1] * 50),
    "conjugate": call(
        "torch._utils._rebuild_tensor_v2",
        *(storage(kind="torch.ComplexFloatStorage", size=2), number(0), items(number(2))),
        *(items(number(1)), b"\x89", b"}", b"}" + text("conj") + b"\x88s"),
    ),
    "endless offset": call("torch._utils._rebuild_tensor_v2", storage(), LAUGHS, b"))"),
    "endless stride": call("torch._utils._rebuild_tensor_v2", storage(), b"K\x00)", LAUGHS),
    "endless reference": tensor([4], [1], store=LAUGHS + b"Q"),
    "endless key": tensor(
        [4], [1], store=items(text("storage"), LAUGHS, LAUGHS, LAUGHS, LAUGHS) + b"Q"
    ),
    "over a number": tensor([4], [1], store=number(4)),
    "over a text": tensor([4], [1], store=text("0")),
    "storage of more elements": tensor([4], [1], store=storage(size=5)),
    "storage of many elements": tensor([4], [1], store=storage(size=HUGE)),
    "storage of fewer elements": tensor([4], [1], store=storage(size=3)),
    "storage of negative size": tensor([4], [1], store=storage(size=-4)),
    "storage of another type": tensor([4], [1], store=storage(kind="torch.DoubleStorage")),
    "missing storage": tensor([4], [1], store=storage(key="1")),
    "storage outside": tensor([4], [1], store=storage(key="../data.pkl")),
    "storage of unknown type": tensor([4], [1], store=storage(kind="torch.QInt8Storage")),
    "storage of a function": tensor([4], [1], store=storage(kind="builtins.set")),
    "no storage": tensor([4], [1], store=storage(word="module")),
    "empty reference": tensor([4], [1], store=b")Q"),
    "short reference": tensor([4], [1], store=items(text("storage")) + b"Q"),
    "version 3 without type": tensor([4], [1], function="_rebuild_tensor_v3"),
    "integers with gradient": call(
        "torch._utils._rebuild_tensor_v2",
        *(storage(kind="torch.IntStorage"), number(0), items(number(4)), items(number(1))),
        *(b"\x88", b"}"),
    ),
}


def pickled(value):
    return b"\x80\x02}" + text("model") + b"}" + text("weight") + value + b"ss."


def write_zip(path, pickle_data, records=None, **options):
    records = {"data.pkl": pickle_data, "byteorder": b"little", "data/0": bytes(16)} | (
        records or {}
    )
    with zipfile.ZipFile(path, "w", **options) as file:
        for record, content in records.items():
            if content is not None:
                file.writestr(f"archive/{record}", content)


def legacy(pickle_data, keys=(), size=4, content=bytes(16)):
    """A file of torch.save before the zip format."""
    header = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001}]
    parts = [*(pickle.dumps(value, protocol=2) for value in header), pickle_data]
    storages = [struct.pack("<q", size) + content for _ in keys]
    return b"".join([*parts, pickle.dumps(list(keys), protocol=2), *storages])


def legacy_tensor(size, view=b"N"):
    store = items(
        *(text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), number(size), view)
    )
    return pickled(tensor([4], [1], store=store + b"Q"))


def safetensors(header, content=bytes(16), length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + content


def safe_entry(**changes):
    return {"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


def files(folder):
    """Yield (what, path) of all cases, each written to a file."""
    for what, value in VALUES.items():
        content = pickled(value).replace(b"TRACE", b"trace")
        (folder / "a.pkl").write_bytes(content)
        yield what, folder / "a.pkl"
        write_zip(folder / "a.pth", content)
        yield what, folder / "a.pth"
        (folder / "old.pth").write_bytes(legacy(content))
        yield what, folder / "old.pth"
    for what, value in TENSORS.items():
        write_zip(folder / "a.pth", pickled(value))
        yield what, folder / "a.pth"
    good = pickled(tensor([4], [1]))
    many = pickled(
        b"](" + b"".join(tensor([4], [1], store=storage(str(i))) for i in range(9)) + b"e"
    )
    for what, records in {
        "no pickle": {"data.pkl": None},
        "empty pickle": {"data.pkl": b""},
        "unknown byte order": {"byteorder": b"middle"},
        "no storage": {"data/0": None},
        "short storage": {"data/0": bytes(15)},
        "long storage": {"data/0": bytes(17)},
    }.items():
        write_zip(folder / "a.pth", good, records)
        yield what, folder / "a.pth"
    write_zip(folder / "a.pth", good, compression=zipfile.ZIP_DEFLATED)
    yield "compressed", folder / "a.pth"
    write_zip(folder / "a.pth", good, {"data/0": bytes(2**24)}, compression=zipfile.ZIP_DEFLATED)
    yield "zip bomb", folder / "a.pth"
    # The directory claims that all storages are the same large record.
    write_zip(folder / "a.pth", many, {f"data/{i}": bytes(2**20) for i in range(1)})
    yield "missing storages", folder / "a.pth"
    write_zip(folder / "a.pth", good)
    whole = (folder / "a.pth").read_bytes()
    for position, value in itertools.product(range(16, 46), (0, 0xFF)):
        start = whole.index(b"PK\x01\x02")
        changed = bytearray(whole)
        changed[start + position] = value
        (folder / "directory.pth").write_bytes(changed)
        yield f"directory {position}", folder / "directory.pth"
    for what, content in {
        "large": legacy(legacy_tensor(HUGE), ["0"], HUGE),
        "negative": legacy(legacy_tensor(-1), ["0"], -1),
        "other size": legacy(legacy_tensor(4), ["0"], 5),
        "not listed": legacy(legacy_tensor(4), []),
        "listed twice": legacy(legacy_tensor(4), ["0", "0"]),
        "unknown": legacy(legacy_tensor(4), ["0", "1"]),
        "early end": legacy(legacy_tensor(4), ["0"], content=bytes(8)),
        "view": legacy(legacy_tensor(4, items(text("1"), number(1), number(4))), ["0"]),
        "far view": legacy(legacy_tensor(4, items(text("1"), number(2**60), number(4))), ["0"]),
        "odd view": legacy(legacy_tensor(4, text("x")), ["0"]),
        "endless magic": b"\x80\x02" + LAUGHS + b".",
        "plain pickle": pickled(b"N"),
        "two pickles": pickled(b"N") * 2,
        "zeros": bytes(1000),
        "text": b"hello",
        "empty": b"",
    }.items():
        (folder / "old.pth").write_bytes(content)
        yield what, folder / "old.pth"
    for what, content in {
        "huge header": safetensors(safe_entry(), length=2**62),
        "short": b"\0" * 3,
        "empty": b"",
        "no JSON": safetensors(b"{not JSON}"),
        "list": safetensors([1]),
        "other offsets": safetensors(safe_entry(data_offsets=[0, 2**40])),
        "negative offsets": safetensors(safe_entry(data_offsets=[-4, 12])),
        "reversed offsets": safetensors(safe_entry(data_offsets=[16, 0])),
        "hole": safetensors(safe_entry(data_offsets=[4, 20]), bytes(20)),
        "other shape": safetensors(safe_entry(shape=[5])),
        "overflowing shape": safetensors(safe_entry(shape=[2**33, 2**33])),
        "negative shape": safetensors(safe_entry(shape=[-4])),
        "unknown type": safetensors(safe_entry(dtype="OBJECT")),
        "overlap": safetensors(safe_entry() | {"b": safe_entry()["weight"]}),
        "deep": safetensors(b'{"a":' * 100_000),
        "truncated": safetensors(safe_entry(), bytes(8)),
        "trailing": safetensors(safe_entry(), bytes(24)),
    }.items():
        (folder / "a.safetensors").write_bytes(content)
        yield what, folder / "a.safetensors"


class TimeLimit(Exception):
    pass


def run_hostile_files(folder):
    """Load each file and print what ends in anything but a ValueError that names it."""
    os.chdir(folder)
    folder = Path(folder)

    def stop(*_):
        raise TimeLimit

    signal.signal(signal.SIGALRM, stop)
    number_of_files = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for what, path in files(folder):
        number_of_files += 1
        problem = ""
        signal.alarm(60)
        try:
            Mask2FormerCheckpointer(torch.nn.Linear(1, 1)).load(str(path))
            problem = "was loaded"
        except ValueError as error:
            if f"Checkpoint {path}" not in str(error):
                problem = f"an error that does not name the file: {error}"
            # A misfit means that the values were accepted.
            elif "does not fit the model" in str(error):
                problem = "was accepted"
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        # Changes of a directory entry that torch does not read either are harmless.
        if what.startswith("directory") and problem == "was accepted":
            problem = ""
        if problem:
            print(what, path.name, problem[:300], flush=True)
        if (folder / "trace").exists():
            print(what, path.name, "ran code", flush=True)
            (folder / "trace").rmdir()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > 500_000:
        print(f"memory grew by {grown} KiB")
    assert number_of_files > 400


def test_hostile_files_end_in_named_errors(tmp_path):
    program = f"import test_hostile_checkpoints as t; t.run_hostile_files({str(tmp_path)!r})"
    run_apart(program)


def run_apart(program):
    result = forked.run(
        [sys.executable, "-W", "ignore", "-c", program],
        timeout=600,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))},
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stderr[-3000:]


def damage(content, generator):
    """One flipped byte, a cut, a repeated or a removed part."""
    content = bytearray(content)
    i, j = sorted(generator.randrange(len(content)) for _ in range(2))
    kind = generator.randrange(4)
    if kind == 0:
        content[i] ^= generator.randrange(1, 256)
    elif kind == 1:
        del content[i:]
    elif kind == 2:
        content[i:i] = content[i : min(j, i + 50)]
    else:
        del content[i : min(j + 1, i + 50)]
    return bytes(content)


def run_damaged_files(folder):
    """Flip, cut, repeat: a zip is whole or refused; others have no checksums, but never crash."""
    generator = random.Random(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    weights = model.state_dict()
    old, arrays = io.BytesIO(), {k: v.numpy() for k, v in weights.items()}
    torch.save(weights, old, _use_new_zipfile_serialization=False)
    new = io.BytesIO()
    torch.save({"model": weights, "iteration": 3, "lists": [1, (2.5, None)]}, new)
    pkl = pickle.dumps({"model": arrays, "__author__": "x"}, protocol=2)
    contents = {"new.pth": new.getvalue(), "old.pth": old.getvalue(), "new.pkl": pkl}
    for file, content in contents.items():
        path = Path(folder) / file
        for _ in range(400):
            path.write_bytes(damage(content, generator))
            target = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
            try:
                Mask2FormerCheckpointer(target).load(str(path))
            except ValueError as error:
                if str(path) not in str(error):
                    print(file, "does not name the file:", error)
                continue
            except BaseException as error:
                print(file, type(error).__name__, str(error)[:300])
                continue
            same = all(torch.equal(v, weights[k]) for k, v in target.state_dict().items())
            if file == "new.pth" and not same:
                print(file, "other values in silence")


def test_damaged_files_are_refused_or_whole(tmp_path):
    program = f"import test_hostile_checkpoints as t; t.run_damaged_files({str(tmp_path)!r})"
    run_apart(program)


def test_every_record_is_checked(tmp_path):
    """A flipped bit in any record, in those that nothing reads too."""
    path, target = tmp_path / "model.pth", torch.nn.Linear(3, 2)
    torch.save(target.state_dict(), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        records = file.infolist()
    for record in records:
        lengths = struct.unpack("<HH", whole[record.header_offset + 26 : record.header_offset + 30])
        changed = bytearray(whole)
        changed[record.header_offset + 30 + sum(lengths)] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"model\.pth cannot be read"):
            Mask2FormerCheckpointer(target).load(str(path))
    assert len(records) >= 5


def test_files_without_checksums_are_read(tmp_path, caplog):
    path, source, target = tmp_path / "model.pth", torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(source.state_dict(), path)
    finally:
        torch.serialization.set_crc32_options(True)
    Mask2FormerCheckpointer(target).load(str(path))
    assert torch.equal(source.weight, target.weight)
    assert "no checksums" in caplog.text


def test_a_file_cannot_have_another_ending(tmp_path):
    """The content decides: Python's unpickler never sees a file, whatever its name."""
    source = torch.nn.Linear(3, 2)
    torch.save(source.state_dict(), tmp_path / "zip.pkl")
    torch.save({"model_state": source.state_dict()}, tmp_path / "pycls.pyth")
    for file in ("zip.pkl", "pycls.pyth"):
        target = torch.nn.Linear(3, 2)
        Mask2FormerCheckpointer(target).load(str(tmp_path / file))
        assert torch.equal(source.weight, target.weight)
    (tmp_path / "bad.pyth").write_bytes(legacy(pickled(VALUES["code"])))
    with pytest.raises(ValueError, match=r"bad\.pyth was not loaded: it refers to os\.mkdir"):
        Mask2FormerCheckpointer(source).load(str(tmp_path / "bad.pyth"))


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_no_file(tmp_path, kind):
    path = tmp_path / "model.pth"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    with pytest.raises(FileNotFoundError, match=r"model\.pth is not a file"):
        Mask2FormerCheckpointer(torch.nn.Linear(1, 1)).load(str(path))


def test_arrays_of_another_byte_order(tmp_path):
    target = torch.nn.Linear(3, 2)
    arrays = {"weight": np.arange(6, dtype=">f4").reshape(2, 3), "bias": np.ones(2, "<f4")}
    (tmp_path / "big.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}))
    Mask2FormerCheckpointer(target).load(str(tmp_path / "big.pkl"))
    assert target.weight.flatten().tolist() == [0, 1, 2, 3, 4, 5]
