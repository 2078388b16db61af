"""Kinds of config values: the types and ranges of which `config_schema.py` makes its table.

Booleans are not numbers here, although Python counts them as such: `True` for a number of layers is
a mistake.

Upper bounds are far beyond any use. They turn a slip of the keyboard into an error that names the
key, instead of a lack of memory or an overflow later.
"""

import os
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol

import torch


class Kind(Protocol):
    """A set of values."""

    @property
    def allowed(self) -> str:
        """The values in words, for errors."""

    def accepts(self, value: Any) -> bool:
        """Whether the value is one of them; must not fail for any value."""


LARGEST = 2**63 - 1  # what fits into a tensor


@dataclass(frozen=True)
class Whole:
    """Integers between two bounds, both allowed; low=None: any negative number too."""

    low: int | None
    high: int = LARGEST

    @property
    def allowed(self) -> str:
        bounds = [] if self.low is None else [f"at least {self.low}"]
        bounds += [] if self.high == LARGEST else [f"at most {self.high}"]
        return "a whole number" + (f", {' and '.join(bounds)}" if bounds else "")

    def accepts(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral):
            return False
        return (self.low is None or int(value) >= self.low) and int(value) <= self.high


@dataclass(frozen=True)
class Number:
    """Finite numbers between two bounds; `above`, `below`: without the bound itself."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    @property
    def allowed(self) -> str:
        if (self.low, self.high, self.above, self.below) == (0, 1, False, False):
            return "a number, 0 to 1"
        low = f"{'above' if self.above else 'at least'} {self.low:g}"
        return f"a number {low} and {'below' if self.below else 'at most'} {self.high:g}"

    def accepts(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        try:
            number = float(value)
        except OverflowError:
            return False
        # NaN fails every comparison.
        inside = self.low < number if self.above else self.low <= number
        return inside and (number < self.high if self.below else number <= self.high)


@dataclass(frozen=True)
class Flag:
    """True or False."""

    allowed = "True, False"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, bool)


@dataclass(frozen=True)
class Text:
    """Text that is not empty, such as the name of a part or of a data set."""

    allowed = "text that is not empty"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and value.strip() != ""


@dataclass(frozen=True)
class Metric:
    """The name of a metric in the results of an evaluation."""

    allowed = "a metric by its path, such as 'segm/AP'"

    def accepts(self, value: Any) -> bool:
        return isinstance(value, str) and "/" in value and all(map(str.strip, value.split("/")))


@dataclass(frozen=True)
class Path:
    """A file or folder; empty: none."""

    optional: bool = False

    @property
    def allowed(self) -> str:
        return f"a path, or ''{' or null' if self.optional else ''} for none"

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.optional
        return isinstance(value, str | os.PathLike) and "\0" not in str(value)


@dataclass(frozen=True)
class Device:
    """The name of a device."""

    allowed = "a device such as 'cuda', 'cuda:1' or 'cpu'"

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, str):
            return False
        try:
            torch.device(value)
        except RuntimeError:
            return False
        return True


@dataclass(frozen=True)
class Norm:
    """What Detectron2's `get_norm` takes."""

    names = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")

    @property
    def allowed(self) -> str:
        return ", ".join(map(repr, self.names))

    def accepts(self, value: Any) -> bool:
        return value is None or callable(value) or (isinstance(value, str) and value in self.names)


class OneOf:
    """The values given, each of its own type: 1 is not True."""

    def __init__(self, *values: Any, because: str = "") -> None:
        self._values = values
        self.allowed = ", ".join(map(repr, values)) + because

    def accepts(self, value: Any) -> bool:
        return any(type(value) is type(one) and value == one for one in self._values)


@dataclass(frozen=True)
class Null:
    """None."""

    allowed = "null"

    def accepts(self, value: Any) -> bool:
        return value is None


class Either:
    """Values of any of the kinds given."""

    def __init__(self, *kinds: Kind) -> None:
        self._kinds = kinds
        self.allowed = ", or ".join(kind.allowed for kind in kinds)

    def accepts(self, value: Any) -> bool:
        return any(kind.accepts(value) for kind in self._kinds)


@dataclass(frozen=True)
class ListOf:
    """Lists and tuples of one kind."""

    item: Kind
    least: int = 0
    most: int | None = None
    distinct: bool = False

    @property
    def allowed(self) -> str:
        if self.most is None:
            number = f"with at least {self.least} entries, " if self.least else ""
        else:
            number = f"of {self.least} entries, "
        distinct = "without repetition, " if self.distinct else ""
        return f"a list, {number}{distinct}each {self.item.allowed}"

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, list | tuple) or len(value) < self.least:
            return False
        if self.most is not None and len(value) > self.most:
            return False
        if not all(self.item.accepts(item) for item in value):
            return False
        return not self.distinct or len(set(value)) == len(value)


@dataclass(frozen=True)
class Anything:
    """Values that other code checks."""

    allowed = "anything"

    def accepts(self, value: Any) -> bool:
        return True


@dataclass(frozen=True)
class Row:
    """Lists and tuples with one kind for each entry; `allowed` describes them."""

    items: tuple[Kind, ...]
    allowed: str

    def accepts(self, value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(self.items)
            and all(kind.accepts(item) for kind, item in zip(self.items, value, strict=True))
        )


def exactly(number: int, item: Kind) -> ListOf:
    """Lists of a fixed length."""
    return ListOf(item, number, number)
