"""Whole numbers that were written as floats: pandas writes `"width": 12.0` for a column with gaps.

JSON does not tell 12.0 from 12, nor does a dict of Python, so that both are the same id or size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

# Floats beyond it are not exact.
_MAX_EXACT = 2**53

# Returns a value with its whole floats as int; changes lists and dicts in place.
_Fix = Callable[[Any], Any]


def as_whole(value: Any) -> Any:
    """A float without fraction as int; every other value as it is."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _MAX_EXACT:
        return int(value)
    return value


def fix_whole_numbers(entries: list, kind: type[msgspec.Struct]) -> None:
    """Make whole floats int where a schema asks for int, in place.

    Args:
        entries: decoded from JSON without schema, such as `annotations`.
        kind: schema of an entry.
    """
    fix = _fix_of(kind)
    if fix is not None:
        for entry in entries:
            fix(entry)


@cache
def _fix_of(kind: type[msgspec.Struct]) -> _Fix | None:
    return _fix(inspect.type_info(kind))


def _fix(info: inspect.Type) -> _Fix | None:
    """What to do with a value of a type; None: nothing."""
    types = info.types if isinstance(info, inspect.UnionType) else (info,)
    is_whole = any(isinstance(kind, inspect.IntType | inspect.LiteralType) for kind in types)
    is_number = any(isinstance(kind, inspect.FloatType) for kind in types)
    number = as_whole if is_whole and not is_number else None
    item = next((_fix(k.item_type) for k in types if isinstance(k, inspect.ListType)), None)
    fields = next((_fixes(k) for k in types if isinstance(k, inspect.StructType)), {})
    if item is None and not fields:
        return number

    def fix(value: Any) -> Any:
        if isinstance(value, list):
            if item is not None:
                value[:] = map(item, value)
        elif isinstance(value, dict):
            for key, fix_field in fields.items():
                if key in value:
                    value[key] = fix_field(value[key])
        elif number is not None:
            return number(value)
        return value

    return fix


def _fixes(info: inspect.StructType) -> dict[str, _Fix]:
    fixes = ((field.encode_name, _fix(field.type)) for field in info.fields)
    return {name: fix for name, fix in fixes if fix is not None}
