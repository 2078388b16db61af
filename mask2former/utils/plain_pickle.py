"""Pickles as data: tensors, NumPy arrays, numbers, text and plain containers, nothing else.

A list of allowed functions is not enough for Python's unpickler: NumPy and torch read or write
foreign memory, or allocate without limit, if their own functions get other arguments than they
saved. So the pickle machine is here. Names in a file stand for the constructors of
`plain_values.py`, which check each argument against the bytes that are there; nothing of the file
is called or gets attributes.
"""

import codecs
import pickle
import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from .plain_values import (
    Constructor,
    Storage,
    StorageType,
    as_bytes,
    empty_array,
    known_names,
    make_frozen_set,
    make_set,
    require,
    require_array,
    require_key,
)

# Real training checkpoints have about 200,000 operations and 8 levels.
_MAX_OPERATIONS = 3_000_000
_MAX_DEPTH = 32
# What calls may copy, relative to the size of the file.
_COPIES = 4
_MIN_BUDGET = 2**20


class PlainUnpickler:
    """The pickle machine, for one pickle at the position of a file."""

    _NAMES = known_names()
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
                require(len(self._stack) == 1 and not self._marked, "no single value at the end")
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
        require(len(text) > 1 and text[:1] == text[-1:] and text[:1] in b"\"'", "a text")
        return codecs.escape_decode(text[1:-1])[0].decode("latin1")  # type: ignore[attr-defined]

    def _marked_items(self) -> list[Any]:
        require(bool(self._marked), "no mark")
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _top(self, *kinds: type) -> Any:
        require(bool(self._stack), "an empty stack")
        require(type(self._stack[-1]) in kinds, "an item for no container")
        return self._stack[-1]

    def _do_proto(self, version: int) -> None:
        require(version <= 5, f"protocol {version}")

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
        require(len(self._stack) >= length, "an empty stack")
        self._stack[-length:] = [tuple(self._stack[-length:])]

    def _do_frozenset(self, _: None) -> None:
        items = self._marked_items()
        self._stack.append(make_frozen_set(items))

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
        self._top(set).update(make_set(items))

    def _do_setitem(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set_items([key, value])

    def _do_setitems(self, _: None) -> None:
        self._set_items(self._marked_items())

    def _set_items(self, items: list[Any]) -> None:
        target = self._top(dict, OrderedDict, Counter)
        for key, value in zip(items[::2], items[1::2], strict=True):
            require_key(key)
            target[key] = value

    def _do_global(self, module_and_name: str) -> None:
        module, _, name = module_and_name.partition(" ")
        self._push_name(module, name)

    def _do_stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._push_name(module, name)

    def _push_name(self, module: Any, name: Any) -> None:
        require(type(module) is str and type(name) is str, "a name that is no text")
        full_name = f"{module}.{name}"
        value = self._NAMES.get(full_name, self._names.get(full_name))
        require(value is not None, f"Unsupported global: GLOBAL {full_name[:200]} ")
        self._stack.append(value)

    def _do_reduce(self, _: None) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        is_call = type(function) is Constructor and function.call and type(arguments) is tuple
        require(bool(is_call), "a call of something that is no function")
        sized = (str, bytes, bytearray, list, tuple, dict)
        self._charge(sum(len(argument) for argument in arguments if type(argument) in sized))
        result = function.call(*arguments)
        if function.call is empty_array:
            self._unfilled[id(result)] = result
        self._stack.append(result)

    _do_newobj = _do_reduce

    def _charge(self, num_bytes: int) -> None:
        self._budget -= num_bytes
        require(self._budget >= 0, "data that is copied again and again")

    def _do_build(self, _: None) -> None:
        state, value = self._stack.pop(), self._stack[-1]
        if type(value) is OrderedDict:
            self._set_metadata(value, state)
        elif isinstance(value, np.dtype):
            require(type(state) is tuple and len(state) > 1, "a NumPy type")
            require(state[1] in ("<", ">", "|", "="), "a NumPy type")
            reduced: Any = value.__reduce__()
            version, _, *others = reduced[2]
            value.__setstate__((version, state[1], *others))  # type: ignore[attr-defined]
        elif self._unfilled.pop(id(value), None) is not None:
            self._fill_array(value, state)
        else:
            raise pickle.UnpicklingError(f"attributes of a {type(value).__name__}")

    def _fill_array(self, array: np.ndarray, state: Any) -> None:
        require(type(state) is tuple and len(state) in (4, 5), "an array")
        shape, dtype, is_fortran, data = state[-4:]
        data = as_bytes(data)
        require(isinstance(dtype, np.dtype) and isinstance(data, bytes), "an array")
        require_array(shape, dtype, data)
        self._charge(len(data))
        filled: Any = array
        filled.__setstate__((1, tuple(shape), dtype, bool(is_fortran), data))

    @staticmethod
    def _set_metadata(value: OrderedDict, state: Any) -> None:
        """The versions that `Module.state_dict` attaches; other attributes are left out."""
        require(type(state) is dict, "attributes of an OrderedDict")
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
        require(is_plain, "versions of modules")
        value._metadata = versions  # type: ignore[attr-defined]

    def _do_persid(self, identity: Any) -> None:
        require(self._persistent_load is not None, "a reference to another file")
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
        require(not isinstance(value, Constructor | Storage | StorageType), "a bare class")
        children = value.values() if isinstance(value, dict) else value
        if not isinstance(value, dict | list | tuple):
            continue
        if deepest.get(id(value), -1) >= depth:
            continue
        require(depth < _MAX_DEPTH, f"values nested more than {_MAX_DEPTH} deep")
        deepest[id(value)] = depth
        pending += [
            (child, depth + 1) for child in children if isinstance(child, dict | list | tuple)
        ]
