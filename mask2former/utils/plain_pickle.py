"""Pickles as data: tensors, NumPy arrays, numbers, text and plain containers, nothing else.

A list of allowed functions is not enough for Python's unpickler: NumPy and torch read or write
foreign memory, or allocate without limit, if their own functions get other arguments than they
saved. So the pickle machine is here. Names in a file stand for the constructors below, which check
each argument against the bytes that are there; nothing of the file is called or gets attributes.
"""

import codecs
import math
import pickle
import pickletools
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any, NamedTuple

import numpy as np
import torch

# Real training checkpoints have about 200,000 operations and 8 levels.
_MAX_OPERATIONS = 3_000_000
_MAX_DEPTH = 32
# Elements of a tensor whose elements share memory, such as an expanded one.
_MAX_EXPANDED = 2**20
# What calls may copy, relative to the size of the file.
_COPIES = 4
_MIN_BUDGET = 2**20
# Python hashes larger integers to the same values.
_MAX_KEY = 2**53
_KEY_TYPES = (str, bytes, bool, type(None))

_DTYPE = re.compile(r"[<>|=]?[?biufcSU]\d*")
_STORAGE_DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}


class Constructor(NamedTuple):
    """What a name in a file stands for; `call` builds its value, `kind` is for classes."""

    call: Callable[..., Any] | None = None
    kind: str = ""


class StorageType(NamedTuple):
    """The class of a storage in a file."""

    dtype: torch.dtype


class Storage(NamedTuple):
    """The memory of tensors."""

    memory: torch.UntypedStorage
    dtype: torch.dtype


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise pickle.UnpicklingError(problem)


def describe(value: Any) -> str:
    """A value of a file, for messages. `repr` of nested lists may never end."""
    scalars = (str, int, float, bool, type(None))
    if isinstance(value, list | tuple) and all(type(item) in scalars for item in value[:4]):
        items = ", ".join(map(describe, value[:4])) + (", ..." if len(value) > 4 else "")
        return f"[{items}]"
    if type(value) is int and value.bit_length() > 128:
        return "a huge integer"
    return f"{value!r:.80}" if type(value) in scalars else f"a {type(value).__name__}"


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _require_sizes(values: Any, what: str) -> None:
    is_tuple = isinstance(values, tuple | list)
    if not (is_tuple and len(values) <= 32 and all(map(_is_size, values))):
        raise pickle.UnpicklingError(f"{what} {describe(values)}")


def _require_key(key: Any) -> None:
    if type(key) is tuple:
        is_key = all(type(item) in _KEY_TYPES or _is_small(item) for item in key)
    else:
        is_key = type(key) in _KEY_TYPES or _is_small(key)
    _require(is_key, f"a {type(key).__name__} as a key")


def _is_small(value: Any) -> bool:
    return type(value) is int and abs(value) < _MAX_KEY


# What files build. Argument names are those of the functions that they stand for.


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    backward_hooks: Any = None,
    metadata: Any = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    _require(isinstance(storage, Storage), "a tensor without storage")
    _require(_is_size(offset), f"a tensor with offset {describe(offset)}")
    _require_sizes(size, "a tensor of size")
    _require_sizes(stride, "a tensor with stride")
    _require(len(size) == len(stride), f"a tensor of size {size} with stride {stride}")
    _require(not metadata, "a tensor that is a lazy conjugate or negative")
    dtype = dtype or storage.dtype
    available = storage.memory.nbytes() // dtype.itemsize
    num_elements = math.prod(size)
    if num_elements:
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        _require(end <= available, f"a tensor of size {tuple(size)} in {available} elements")
        limit = max(available, _MAX_EXPANDED)
        _require(num_elements <= limit, f"an expanded tensor of size {tuple(size)}")
    else:
        offset = 0
        _require(math.prod(n for n in size if n) < 2**48, f"a tensor of size {tuple(size)}")
    tensor = torch.empty(0, dtype=dtype).set_(storage.memory, offset, size, stride)  # type: ignore[call-overload]
    return tensor.requires_grad_() if requires_grad is True else tensor


def _tensor_v3(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    backward_hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> torch.Tensor:
    _require(isinstance(dtype, torch.dtype), "a tensor without type")
    return _tensor(storage, offset, size, stride, requires_grad, None, metadata, dtype)


def _parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> torch.nn.Parameter:
    _require(isinstance(data, torch.Tensor), "a parameter without tensor")
    return torch.nn.Parameter(data.detach(), requires_grad is True)


def _tensor_with_attributes(function: Any, kind: Any, args: Any, state: Any) -> torch.Tensor:
    is_tensor = isinstance(function, Constructor) and function.call in (_tensor, _tensor_v3)
    _require(is_tensor and kind is _TENSOR and type(args) is tuple, "a subclass of Tensor")
    return function.call(*args)


def _moved_tensor(data: Any, dtype: Any, device: Any, requires_grad: Any) -> torch.Tensor:
    _require(isinstance(data, torch.Tensor) and data.dtype == dtype, "a tensor of another device")
    return data


def _size(values: Any = ()) -> torch.Size:
    _require_sizes(values, "a size")
    return torch.Size(values)


def _device(kind: Any, index: Any = None) -> torch.device:
    _require(type(kind) is str and (index is None or _is_size(index)), "a device")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    # Python 3 pickles bytes this way for Python 2.
    _require(type(text) is str and encoding in ("latin1", "latin-1"), "an encoded text")
    return text.encode("latin1")


def _byte_array(data: Any = b"", encoding: Any = "latin1") -> bytearray:
    data = data if isinstance(data, bytes) else _encoded(data, encoding)
    return bytearray(data)


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    _require(type(real) in (int, float) and type(imaginary) in (int, float), "a complex number")
    return complex(real, imaginary)


def _set(items: Any = ()) -> set:
    _require(type(items) in (list, tuple), "a set")
    for item in items:
        _require_key(item)
    return set(items)


def _frozen_set(items: Any = ()) -> frozenset:
    return frozenset(_set(items))


def _ordered_dict(items: Any = ()) -> OrderedDict:
    _require(type(items) in (list, tuple), "an OrderedDict")
    for pair in items:
        _require(type(pair) in (list, tuple) and len(pair) == 2, "an item of an OrderedDict")
        _require_key(pair[0])
    return OrderedDict(items)


def _counter(counts: Any = None) -> Counter:
    counts = {} if counts is None else counts
    _require(type(counts) is dict and all(map(_is_small, counts.values())), "a Counter")
    return Counter(counts)


def _dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype:
    is_plain = type(code) is str and len(code) < 16 and _DTYPE.fullmatch(code)
    _require(bool(is_plain), f"NumPy data of type {describe(code)}, not numbers or text")
    # A copy, because the byte order may follow.
    return np.dtype(code, copy=True)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    data = _as_bytes(data)
    _require(isinstance(dtype, np.dtype) and len(data) == dtype.itemsize > 0, "a NumPy scalar")
    return np.frombuffer(data, dtype)[0]


def _array_from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    _require(isinstance(dtype, np.dtype) and isinstance(buffer, bytes | bytearray), "an array")
    _require_array(shape, dtype, buffer)
    _require(order in ("C", "F"), "an array")
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    _require(kind is _ARRAY, "a subclass of NumPy's array")
    return np.empty(0, np.uint8)


def _require_array(shape: Any, dtype: np.dtype, data: bytes | bytearray) -> None:
    _require_sizes(shape, "an array of shape")
    problem = f"an array of shape {shape} and type {dtype} over {len(data)} bytes"
    _require(math.prod(shape) * dtype.itemsize == len(data), problem)


def _as_bytes(data: Any) -> bytes:
    return data.encode("latin1") if type(data) is str else data


_TENSOR, _ARRAY = Constructor(kind="tensor"), Constructor(kind="array")


def _names() -> dict[str, Any]:
    names: dict[str, Any] = {
        "_codecs.encode": _encoded,
        "collections.Counter": _counter,
        "collections.OrderedDict": _ordered_dict,
        "numpy.dtype": _dtype,
        "torch.Size": _size,
        "torch.device": _device,
        "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
        "torch._utils._rebuild_device_tensor_from_cpu_tensor": _moved_tensor,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch._utils._rebuild_tensor": _tensor,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor_v3": _tensor_v3,
    }
    for core in ("numpy.core", "numpy._core"):
        names[f"{core}.multiarray._reconstruct"] = _empty_array
        names[f"{core}.multiarray.scalar"] = _scalar
        names[f"{core}.numeric._frombuffer"] = _array_from_buffer
    for builtins in ("builtins", "__builtin__"):
        names[f"{builtins}.bytearray"] = _byte_array
        names[f"{builtins}.complex"] = _complex
        names[f"{builtins}.set"] = _set
        names[f"{builtins}.frozenset"] = _frozen_set
    names = {name: Constructor(function) for name, function in names.items()}
    names |= {"numpy.ndarray": _ARRAY}
    names |= dict.fromkeys(("torch.Tensor", "torch._tensor.Tensor"), _TENSOR)
    names |= dict.fromkeys(("torch.nn.parameter.Parameter", "torch.nn.Parameter"), _TENSOR)
    for name, dtype in _STORAGE_DTYPES.items():
        names[f"torch.{name}Storage"] = StorageType(dtype)
        names[f"torch.cuda.{name}Storage"] = StorageType(dtype)
    names["torch.storage.UntypedStorage"] = StorageType(torch.uint8)
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    # Not the quantised types and those below a byte, which cannot become weights.
    plain = {*_STORAGE_DTYPES.values(), torch.uint16, torch.uint32, torch.uint64}
    dtypes = {value for value in dtypes if value in plain or str(value).startswith("torch.float8")}
    return names | {str(value): value for value in dtypes}


class PlainUnpickler:
    """The pickle machine, for one pickle at the position of a file."""

    _NAMES = _names()
    # Set below, when the methods exist.
    _operations: dict[bytes, tuple[Callable, Callable | None]]

    def __init__(
        self,
        file: IO[bytes],
        size: int,
        *,
        persistent_load: Callable[[Any], Storage] | None = None,
        names: Mapping[str, Constructor] | None = None,
    ) -> None:
        """
        Args:
            file: to read from.
            size: bytes of the file.
            persistent_load: gets a storage by what the file calls it.
            names: further names that the file may use.
        """
        self._file = file
        self._size = size
        self._persistent_load = persistent_load
        self._names = names or {}
        self._budget = max(_COPIES * size, _MIN_BUDGET)
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._unfilled: dict[int, np.ndarray] = {}

    def read(self, num_bytes: int) -> bytes:
        """Never asks for more than the file has."""
        return self._file.read(min(num_bytes, self._size - self._file.tell()))

    def readline(self) -> bytes:
        return self._file.readline()

    def load(self) -> Any:
        """Read the pickle.

        Raises:
            pickle.UnpicklingError, ValueError, ...: it is damaged, or holds more than data.
        """
        read_code, operations = self._file.read, self._operations
        for _ in range(_MAX_OPERATIONS):
            code = read_code(1)
            if code == pickle.STOP:
                _require(len(self._stack) == 1 and not self._marked, "no single value at the end")
                return self._stack.pop()
            if code not in operations:
                raise pickle.UnpicklingError(_unknown(code))
            method, read_argument = operations[code]
            method(self, read_argument(self) if read_argument else None)
        raise pickle.UnpicklingError(f"more than {_MAX_OPERATIONS} operations")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _read_string(self) -> str:
        """A text of protocol 0; Python 2 wrote any bytes."""
        text = self.readline().strip()
        _require(len(text) > 1 and text[:1] == text[-1:] and text[:1] in b"\"'", "a text")
        return codecs.escape_decode(text[1:-1])[0].decode("latin1")  # type: ignore[attr-defined]

    def _marked_items(self) -> list[Any]:
        _require(bool(self._marked), "no mark")
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _top(self, *kinds: type) -> Any:
        _require(bool(self._stack), "an empty stack")
        _require(type(self._stack[-1]) in kinds, "an item for no container")
        return self._stack[-1]

    def _do_proto(self, version: int) -> None:
        _require(version <= 5, f"protocol {version}")

    def _do_frame(self, size: int) -> None:
        pass

    def _do_mark(self, _: None) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _do_pop(self, _: None) -> None:
        self._stack.pop()

    def _do_pop_mark(self, _: None) -> None:
        self._marked_items()

    def _do_dup(self, _: None) -> None:
        self._stack.append(self._stack[-1])

    def _do_put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    _do_binput = _do_long_binput = _do_put

    def _do_memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _do_get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    _do_binget = _do_long_binget = _do_get

    def _do_none(self, _: None) -> None:
        self._stack.append(None)

    def _do_newtrue(self, _: None) -> None:
        self._stack.append(True)

    def _do_newfalse(self, _: None) -> None:
        self._stack.append(False)

    def _do_empty_tuple(self, _: None) -> None:
        self._stack.append(())

    def _do_empty_list(self, _: None) -> None:
        self._stack.append([])

    def _do_empty_dict(self, _: None) -> None:
        self._stack.append({})

    def _do_empty_set(self, _: None) -> None:
        self._stack.append(set())

    def _do_list(self, _: None) -> None:
        items = self._marked_items()
        self._stack.append(items)

    def _do_tuple(self, _: None) -> None:
        items = self._marked_items()
        self._stack.append(tuple(items))

    def _do_tuple1(self, _: None) -> None:
        self._last_as_tuple(1)

    def _do_tuple2(self, _: None) -> None:
        self._last_as_tuple(2)

    def _do_tuple3(self, _: None) -> None:
        self._last_as_tuple(3)

    def _last_as_tuple(self, length: int) -> None:
        _require(len(self._stack) >= length, "an empty stack")
        self._stack[-length:] = [tuple(self._stack[-length:])]

    def _do_frozenset(self, _: None) -> None:
        items = self._marked_items()
        self._stack.append(_frozen_set(items))

    def _do_dict(self, _: None) -> None:
        items = self._marked_items()
        self._stack.append({})
        self._set_items(items)

    def _do_append(self, _: None) -> None:
        item = self._stack.pop()
        self._top(list).append(item)

    def _do_appends(self, _: None) -> None:
        items = self._marked_items()
        self._top(list).extend(items)

    def _do_additems(self, _: None) -> None:
        items = self._marked_items()
        self._top(set).update(_set(items))

    def _do_setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _do_setitems(self, _: None) -> None:
        self._set_items(self._marked_items())

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict, OrderedDict, Counter)
        for key, value in zip(items[::2], items[1::2], strict=True):
            _require_key(key)
            target[key] = value

    def _do_global(self, module_and_name: str) -> None:
        module, _, name = module_and_name.partition(" ")
        self._push_name(module, name)

    def _do_stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_name(module, name)

    def _push_name(self, module: Any, name: Any) -> None:
        _require(type(module) is str and type(name) is str, "a name that is no text")
        full_name = f"{module}.{name}"
        value = self._NAMES.get(full_name, self._names.get(full_name))
        _require(value is not None, f"Unsupported global: GLOBAL {full_name[:200]} ")
        self._stack.append(value)

    def _do_reduce(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        is_call = type(function) is Constructor and function.call and type(arguments) is tuple
        _require(bool(is_call), "a call of something that is no function")
        sized = (str, bytes, bytearray, list, tuple, dict)
        self._charge(sum(len(argument) for argument in arguments if type(argument) in sized))
        result = function.call(*arguments)
        if function.call is _empty_array:
            self._unfilled[id(result)] = result
        self._stack.append(result)

    _do_newobj = _do_reduce

    def _charge(self, num_bytes: int) -> None:
        self._budget -= num_bytes
        _require(self._budget >= 0, "data that is copied again and again")

    def _do_build(self, _: None) -> None:
        state, value = self._stack.pop(), self._stack[-1]
        if type(value) is OrderedDict:
            self._set_metadata(value, state)
        elif isinstance(value, np.dtype):
            _require(type(state) is tuple and len(state) > 1, "a NumPy type")
            _require(state[1] in ("<", ">", "|", "="), "a NumPy type")
            reduced: Any = value.__reduce__()
            version, _, *others = reduced[2]
            value.__setstate__((version, state[1], *others))  # type: ignore[attr-defined]
        elif self._unfilled.pop(id(value), None) is not None:
            self._fill_array(value, state)
        else:
            raise pickle.UnpicklingError(f"attributes of a {type(value).__name__}")

    def _fill_array(self, array: np.ndarray, state: Any) -> None:
        _require(type(state) is tuple and len(state) in (4, 5), "an array")
        shape, dtype, is_fortran, data = state[-4:]
        data = _as_bytes(data)
        _require(isinstance(dtype, np.dtype) and isinstance(data, bytes), "an array")
        _require_array(shape, dtype, data)
        self._charge(len(data))
        filled: Any = array
        filled.__setstate__((1, tuple(shape), dtype, bool(is_fortran), data))

    @staticmethod
    def _set_metadata(value: OrderedDict, state: Any) -> None:
        """The versions that `Module.state_dict` attaches; other attributes are left out."""
        _require(type(state) is dict, "attributes of an OrderedDict")
        versions = state.get("_metadata")
        if versions is None:
            return
        kinds = (dict, OrderedDict)
        scalars = (str, int, float, bool, type(None))
        is_plain = type(versions) in kinds and all(
            type(key) is str
            and type(entry) in kinds
            and {type(v) for v in entry.values()} <= {*scalars}
            for key, entry in versions.items()
        )
        _require(is_plain, "versions of modules")
        value._metadata = versions  # type: ignore[attr-defined]

    def _do_persid(self, identity: Any) -> None:
        _require(self._persistent_load is not None, "a reference to another file")
        self._stack.append(self._persistent_load(identity))

    def _do_binpersid(self, _: None) -> None:
        self._do_persid(self._stack.pop())


def _operations() -> dict[bytes, tuple[Callable, Callable | None]]:
    """For each code: the method, and the reader of its argument in the file."""
    literals = {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
        *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
    table: dict[bytes, tuple[Callable, Callable | None]] = {}
    for operation in pickletools.opcodes:
        method = getattr(PlainUnpickler, f"_do_{operation.name.lower()}", None)
        method = PlainUnpickler._push if operation.name in literals else method
        reader: Callable | None = operation.arg.reader if operation.arg else None
        reader = PlainUnpickler._read_string if operation.name == "STRING" else reader
        if method is not None:
            table[operation.code.encode("latin1")] = method, reader
    return table


def _unknown(code: bytes) -> str:
    names = {operation.code.encode("latin1"): operation.name for operation in pickletools.opcodes}
    if not code:
        return "the file ends early"
    return f"unsupported operation {names[code]}" if code in names else f"unknown {code!r}"


PlainUnpickler._operations = _operations()


def require_plain(root: Any) -> None:
    """Reject values that only serve to build others, cycles, and deep nesting.

    Raises:
        pickle.UnpicklingError: naming what is wrong.
    """
    deepest: dict[int, int] = {}
    pending = [(root, 0)]
    while pending:
        value, depth = pending.pop()
        _require(not isinstance(value, Constructor | Storage | StorageType), "a bare class")
        children = value.values() if isinstance(value, dict) else value
        if not isinstance(value, dict | list | tuple):
            continue
        if deepest.get(id(value), -1) >= depth:
            continue
        _require(depth < _MAX_DEPTH, f"values nested more than {_MAX_DEPTH} deep")
        deepest[id(value)] = depth
        pending += [
            (child, depth + 1) for child in children if isinstance(child, dict | list | tuple)
        ]
