"""What a plain pickle may build: the constructors behind the names that files use.

Each checks every argument against the bytes that are there (`plain_pickle.py` says why).
"""

import math
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

# Elements of a tensor whose elements share memory, such as an expanded one.
_MAX_EXPANDED = 2**20
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


def require(condition: bool, problem: str) -> None:
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


def require_key(key: Any) -> None:
    if type(key) is tuple:
        is_key = all(type(item) in _KEY_TYPES or _is_small(item) for item in key)
    else:
        is_key = type(key) in _KEY_TYPES or _is_small(key)
    require(is_key, f"a {type(key).__name__} as a key")


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
    require(isinstance(storage, Storage), "a tensor without storage")
    require(_is_size(offset), f"a tensor with offset {describe(offset)}")
    _require_sizes(size, "a tensor of size")
    _require_sizes(stride, "a tensor with stride")
    require(len(size) == len(stride), f"a tensor of size {size} with stride {stride}")
    require(not metadata, "a tensor that is a lazy conjugate or negative")
    dtype = dtype or storage.dtype
    available = storage.memory.nbytes() // dtype.itemsize
    num_elements = math.prod(size)
    if num_elements:
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        require(end <= available, f"a tensor of size {tuple(size)} in {available} elements")
        limit = max(available, _MAX_EXPANDED)
        require(num_elements <= limit, f"an expanded tensor of size {tuple(size)}")
    else:
        offset = 0
        require(math.prod(n for n in size if n) < 2**48, f"a tensor of size {tuple(size)}")
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
    require(isinstance(dtype, torch.dtype), "a tensor without type")
    return _tensor(storage, offset, size, stride, requires_grad, None, metadata, dtype)


def _parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> torch.nn.Parameter:
    require(isinstance(data, torch.Tensor), "a parameter without tensor")
    return torch.nn.Parameter(data.detach(), requires_grad is True)


def _tensor_with_attributes(function: Any, kind: Any, args: Any, state: Any) -> torch.Tensor:
    is_tensor = isinstance(function, Constructor) and function.call in (_tensor, _tensor_v3)
    require(is_tensor and kind is _TENSOR and type(args) is tuple, "a subclass of Tensor")
    return function.call(*args)


def _moved_tensor(data: Any, dtype: Any, device: Any, requires_grad: Any) -> torch.Tensor:
    require(isinstance(data, torch.Tensor) and data.dtype == dtype, "a tensor of another device")
    return data


def _size(values: Any = ()) -> torch.Size:
    _require_sizes(values, "a size")
    return torch.Size(values)


def _device(kind: Any, index: Any = None) -> torch.device:
    require(type(kind) is str and (index is None or _is_size(index)), "a device")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    # Python 3 pickles bytes this way for Python 2.
    require(type(text) is str and encoding in ("latin1", "latin-1"), "an encoded text")
    return text.encode("latin1")


def _byte_array(data: Any = b"", encoding: Any = "latin1") -> bytearray:
    data = data if isinstance(data, bytes) else _encoded(data, encoding)
    return bytearray(data)


def _complex(real: Any = 0.0, imaginary: Any = 0.0) -> complex:
    require(type(real) in (int, float) and type(imaginary) in (int, float), "a complex number")
    return complex(real, imaginary)


def make_set(items: Any = ()) -> set:
    require(type(items) in (list, tuple), "a set")
    for item in items:
        require_key(item)
    return set(items)


def make_frozen_set(items: Any = ()) -> frozenset:
    return frozenset(make_set(items))


def _ordered_dict(items: Any = ()) -> OrderedDict:
    require(type(items) in (list, tuple), "an OrderedDict")
    for pair in items:
        require(type(pair) in (list, tuple) and len(pair) == 2, "an item of an OrderedDict")
        require_key(pair[0])
    return OrderedDict(items)


def _counter(counts: Any = None) -> Counter:
    counts = {} if counts is None else counts
    require(type(counts) is dict and all(map(_is_small, counts.values())), "a Counter")
    return Counter(counts)


def _dtype(code: Any, align: Any = False, copy: Any = False) -> np.dtype:
    is_plain = type(code) is str and len(code) < 16 and _DTYPE.fullmatch(code)
    require(bool(is_plain), f"NumPy data of type {describe(code)}, not numbers or text")
    # A copy, because the byte order may follow.
    return np.dtype(code, copy=True)


def _scalar(dtype: Any, data: Any = b"") -> Any:
    data = as_bytes(data)
    require(isinstance(dtype, np.dtype) and len(data) == dtype.itemsize > 0, "a NumPy scalar")
    return np.frombuffer(data, dtype)[0]


def _array_from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    require(isinstance(dtype, np.dtype) and isinstance(buffer, bytes | bytearray), "an array")
    require_array(shape, dtype, buffer)
    require(order in ("C", "F"), "an array")
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


def empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    require(kind is _ARRAY, "a subclass of NumPy's array")
    return np.empty(0, np.uint8)


def require_array(shape: Any, dtype: np.dtype, data: bytes | bytearray) -> None:
    _require_sizes(shape, "an array of shape")
    problem = f"an array of shape {shape} and type {dtype} over {len(data)} bytes"
    require(math.prod(shape) * dtype.itemsize == len(data), problem)


def as_bytes(data: Any) -> bytes:
    return data.encode("latin1") if type(data) is str else data


_TENSOR, _ARRAY = Constructor(kind="tensor"), Constructor(kind="array")


def known_names() -> dict[str, Any]:
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
        names[f"{core}.multiarray._reconstruct"] = empty_array
        names[f"{core}.multiarray.scalar"] = _scalar
        names[f"{core}.numeric._frombuffer"] = _array_from_buffer
    for builtins in ("builtins", "__builtin__"):
        names[f"{builtins}.bytearray"] = _byte_array
        names[f"{builtins}.complex"] = _complex
        names[f"{builtins}.set"] = make_set
        names[f"{builtins}.frozenset"] = make_frozen_set
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
