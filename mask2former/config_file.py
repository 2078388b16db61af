"""Config files: YAML that is data, never code.

Detectron2 reads configs with PyYAML's unsafe loader, which runs any function that a file names.
Here a file and the files of its `_BASE_` hold text, numbers, lists and sections. The one tag
accepted is the arithmetic of the original release's configs,

    MIN_SIZE_TRAIN: !!python/object/apply:eval ["[int(x * 0.1 * 512) for x in range(5, 21)]"]

which is computed here from its syntax tree. Every file is read once.
"""

import ast
import codecs
import math
import operator
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import yaml
from detectron2.utils.file_io import PathManager

from .utils.project_files import SCHEME, local_path

_BASE = "_BASE_"
_TAG_PREFIX = "tag:yaml.org,2002:"
_EVAL = f"{_TAG_PREFIX}python/object/apply:eval"
_SCALARS = {f"{_TAG_PREFIX}{name}" for name in ("str", "int", "float", "bool", "null")}
_SEQUENCE, _MAPPING, _MERGE = (f"{_TAG_PREFIX}{name}" for name in ("seq", "map", "merge"))

# Far above any real config, far below what takes noticeable memory.
_MAX_BYTES = 2**20
_MAX_NODES = 50_000  # with aliases and merges expanded
_MAX_DEPTH = 50
_MAX_DIGITS = 100
_MAX_FILES = 50

_MAX_EXPRESSION = 200
_MAX_RANGE = 1000
_MAX_NUMBER = 1e12
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


class ConfigFile(NamedTuple):
    """What a config file says.

    Attributes:
        values: nested dict, with the values of the files it builds on.
        own_keys: dotted keys that the file itself sets, sections included.
        places: for each dotted key, file and line of its last definition.
    """

    values: dict[str, Any]
    own_keys: set[str]
    places: dict[str, str]


def read_config_file(path: str) -> ConfigFile:
    """Read a config file and the files it builds on.

    `_BASE_` is a path or a list of paths, relative to the file that names it, with `~` for the home
    folder; http:// and https:// are downloaded, mask2former://configs/... is a config of this
    project, wherever it is installed.

    Args:
        path: YAML in UTF-8, or in UTF-16 with its byte order mark.

    Raises:
        FileNotFoundError: the file, or one it builds on, does not exist.
        ValueError: naming file and line of what is not plain data, not YAML, or too large.
    """
    return _Reader().read(path)


class _Reader:
    """Reads files after those they build on, each once."""

    def __init__(self) -> None:
        self._done: dict[str, ConfigFile] = {}

    def read(self, path: str, users: tuple[str, ...] = (), named_by: str = "") -> ConfigFile:
        """
        Args:
            path: the file.
            users: the files that build on it, outermost first.
            named_by: where its path comes from, for messages.
        """
        local = local_path(path)
        if "://" in local:
            try:
                local = PathManager.get_local_path(path)
            except OSError as error:
                raise ValueError(f"Config file {path!r}{named_by}: {error}.") from error
        identity = os.path.realpath(local)
        if identity in users:
            chain = " → ".join((*users[users.index(identity) :], identity))
            raise ValueError(f"Config file {path!r}{named_by} builds on itself: {chain}.")
        if identity not in self._done:
            if len(self._done) + len(users) >= _MAX_FILES:
                raise ValueError(f"Config file {path!r}{named_by} is one of over {_MAX_FILES}.")
            parsed = _File(path, _read_text(path, local, named_by))
            own = parsed.content()
            values: dict[str, Any] = {}
            places: dict[str, str] = {}
            for base, base_path in parsed.bases(own):
                origin = f" ({parsed.place(_BASE)}: {_BASE} {base!r})"
                _, _, base_places = file = self.read(base_path, (*users, identity), origin)
                values = _merged(values, file.values, base_places)
                places |= base_places
            own.pop(_BASE, None)
            places |= {key: parsed.place(key) for key in parsed.lines}
            self._done[identity] = ConfigFile(_merged(values, own, places), set(_keys(own)), places)
        return self._done[identity]


def _merged(base: dict, own: dict, places: dict[str, str], prefix: str = "") -> dict:
    """A new dict: `own` over `base`, section by section."""
    result = dict(base)
    for key, value in own.items():
        if isinstance(value, dict) and key in base:
            dotted = f"{prefix}{key}"
            if not isinstance(base[key], dict):
                raise ValueError(
                    f"{places[dotted]}: {dotted} has keys of its own, but in a file of {_BASE} it "
                    f"is {base[key]!r}, not a section."
                )
            value = _merged(base[key], value, places, f"{dotted}.")
        result[key] = value
    return result


def _keys(values: dict, prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def _read_text(path: str, local: str, named_by: str) -> str:
    name = f"Config file {path!r}{named_by}"
    try:
        mode = os.stat(local).st_mode
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
            raise ValueError(f"{name} is {kind}, not a file.")
        with open(local, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{name} does not exist.") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}.") from error
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{name} is larger than {_MAX_BYTES} bytes; that is no config.")
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not a text file in UTF-8 ({error}); save it in that encoding."
        ) from error


class _Loader(yaml.SafeLoader):
    """Composes nodes, few and not too deep."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._num_nodes += 1
        _check_size(self._depth, self._num_nodes)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def load_plain_yaml(text: str) -> Any:
    """The content of YAML that is no config: text, numbers, lists and sections with any keys.

    Raises:
        ValueError: the text is not YAML, has other tags or is too large; with the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{problem}{f' (line {mark.line + 1})' if mark else ''}") from error


def _check_size(depth: int, num_nodes: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"values are nested more than {_MAX_DEPTH} deep, or contain themselves")
    if num_nodes > _MAX_NODES:
        raise ValueError(f"it has more than {_MAX_NODES} values, aliases included")


class _File:
    """The content of one file.

    Attributes:
        lines: for each dotted key, the line that sets it.
    """

    def __init__(self, path: str, text: str) -> None:
        self.lines: dict[str, int] = {}
        self._path = path
        self._text = text
        self._num_nodes = 0

    def place(self, key: str) -> str:
        """File and line of a key, for messages."""
        return f"Config file {self._path!r}, line {self.lines[key]}"

    def content(self) -> dict[str, Any]:
        self._loader = None
        try:
            self._loader = _Loader(self._text)
            root = self._loader.get_single_node()
        except (yaml.YAMLError, ValueError) as error:
            mark = getattr(error, "problem_mark", None) or self._loader
            line = f", line {mark.line + 1}" if mark else ""
            problem = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise ValueError(
                f"Config file {self._path!r}{line} cannot be read as YAML: {problem}."
            ) from error
        if not isinstance(root, yaml.MappingNode) or not root.value:
            raise ValueError(
                f"Config file {self._path!r} has no KEY: VALUE entries at its top level."
            )
        return self._mapping(root, "", 1, in_list=False)

    def bases(self, own: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Yield (path as written, path to read) of the files that this one builds on."""
        if _BASE not in own:
            return
        bases = own[_BASE] if isinstance(own[_BASE], list) else [own[_BASE]]
        if not bases or not all(
            isinstance(base, str) and base.strip() and "\0" not in base for base in bases
        ):
            raise ValueError(
                f"{self.place(_BASE)}: {_BASE} is {own[_BASE]!r}; allowed: the path of a config "
                "file, or a list of such paths. Remove the key if there is none."
            )
        for base in bases:
            path = os.path.expanduser(base) if base.startswith("~") else base
            if not path.startswith(("/", "https://", "http://", SCHEME)):
                path = os.path.join(os.path.dirname(self._path), path)
            yield base, path

    def _value(self, node: yaml.Node, key: str, depth: int, in_list: bool) -> Any:
        self._num_nodes += 1
        try:
            _check_size(depth, self._num_nodes)
        except ValueError as error:
            raise self._error(node, key, str(error)) from error
        if node.tag == _EVAL:
            return self._computed(node, key)
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node, key)
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE:
            return [self._value(item, key, depth + 1, True) for item in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == _MAPPING:
            return self._mapping(node, f"{key}." if key else "", depth, in_list)
        tag = node.tag.replace(_TAG_PREFIX, "!!")
        raise self._error(
            node,
            key,
            f"the tag {tag} is not accepted, because a config is data and never runs code; write "
            "the value itself (text in quotes, lists in brackets)",
        )

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Any:
        if not node.tag.endswith(":str") and len(node.value) > _MAX_DIGITS:
            raise self._error(node, key, f"a number has more than {_MAX_DIGITS} digits")
        try:
            return self._loader.construct_object(node)
        # `!!int text` and `!!bool text`.
        except (yaml.YAMLError, ValueError, KeyError) as error:
            tag = node.tag.replace(_TAG_PREFIX, "!!")
            raise self._error(node, key, f"{node.value!r} is not of type {tag}") from error

    def _mapping(
        self, node: yaml.MappingNode, prefix: str, depth: int, in_list: bool
    ) -> dict[str, Any]:
        """
        Args:
            node: the section.
            prefix: its dotted key with a dot; empty at the top level.
            depth: its level in the file.
            in_list: whether it is part of a list, so that its keys are no config keys.
        """
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        own_lines: dict[Any, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                is_list = isinstance(value_node, yaml.SequenceNode)
                for source in reversed(value_node.value) if is_list else [value_node]:
                    if not isinstance(source, yaml.MappingNode):
                        raise self._error(source, f"{prefix}<<", "only a section can be merged")
                    merged |= self._value(source, prefix.rstrip("."), depth + 1, in_list)
                continue
            key = self._key(key_node, prefix, in_list)
            dotted, line = f"{prefix}{key}", key_node.start_mark.line + 1
            if key in own_lines:
                raise self._error(
                    key_node,
                    dotted,
                    f"the key is already set in line {own_lines[key]}; keep one of them",
                )
            own_lines[key] = line
            own[key] = self._value(value_node, dotted, depth + 1, in_list)
            if not in_list:
                self.lines[dotted] = line
        return merged | own

    def _key(self, node: yaml.Node, prefix: str, in_list: bool) -> Any:
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            raise self._error(node, f"{prefix}?", "a key must be text")
        key = self._scalar(node, f"{prefix}{node.value}")
        if not in_list and not isinstance(key, str):
            raise self._error(
                node, f"{prefix}{node.value}", f"the key is read as {key!r}, but must be text"
            )
        return key

    def _computed(self, node: yaml.Node, key: str) -> Any:
        items = node.value if isinstance(node, yaml.SequenceNode) else []
        if len(items) != 1 or items[0].tag != f"{_TAG_PREFIX}str":
            raise self._error(node, key, '!!python/object/apply:eval needs ["EXPRESSION"]')
        try:
            return evaluate_arithmetic(items[0].value)
        except ValueError as error:
            raise self._error(node, key, f"{error}; write the value itself") from error

    def _error(self, node: yaml.Node, key: str, problem: str) -> ValueError:
        line = node.start_mark.line + 1
        return ValueError(f"Config file {self._path!r}, line {line}, {key}: {problem}.")


def evaluate_arithmetic(expression: str) -> Any:
    """Compute a number or a list of numbers.

    Args:
        expression: numbers with + - * / //, `int(...)`, and one list comprehension over
            `range(...)`, such as "[int(x * 0.1 * 512) for x in range(5, 21)]".

    Raises:
        ValueError: anything else, or a number or list that is too large.
    """
    if len(expression) > _MAX_EXPRESSION:
        raise ValueError(f"an expression of more than {_MAX_EXPRESSION} characters")
    try:
        root = ast.parse(expression.strip(), mode="eval").body
        if not isinstance(root, ast.ListComp):
            return _number(root, {})
        return _comprehension(root)
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError) as error:
        problem = getattr(error, "msg", str(error))
        raise ValueError(f"cannot compute {expression!r}: {problem}") from error


def _comprehension(node: ast.ListComp) -> list:
    loop, *others = node.generators
    if others or loop.ifs or loop.is_async or not isinstance(loop.target, ast.Name):
        raise ValueError("a list needs one loop over one variable, without conditions")
    bounds = [_number(argument, {}) for argument in _arguments(loop.iter, "range")]
    if not 1 <= len(bounds) <= 3:
        raise ValueError("the loop must be over range(...)")
    if not all(isinstance(bound, int) for bound in bounds):
        raise ValueError("range needs integers")
    values = range(*bounds)
    if len(values) > _MAX_RANGE:
        raise ValueError(f"a list of more than {_MAX_RANGE} numbers")
    return [_number(node.elt, {loop.target.id: value}) for value in values]


def _number(node: ast.expr, variables: dict[str, int]) -> Any:
    result: Any
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        result = node.value
    elif isinstance(node, ast.Name) and node.id in variables:
        result = variables[node.id]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        result = -_number(node.operand, variables)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _number(node.left, variables), _number(node.right, variables)
        result = _OPERATORS[type(node.op)](left, right)
    elif len(arguments := _arguments(node, "int")) == 1:
        result = int(_number(arguments[0], variables))
    else:
        what = type(node).__name__
        raise ValueError(f"only numbers, + - * / //, int and range are computed, not {what}")
    if not (math.isfinite(result) and abs(result) <= _MAX_NUMBER):
        raise ValueError(f"a number beyond {_MAX_NUMBER:g}")
    return result


def _arguments(node: ast.expr, name: str) -> list[ast.expr]:
    """The arguments of a call of `name`; none for every other expression."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return node.args if node.func.id == name else []
    return []
