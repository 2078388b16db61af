"""JSON in any Unicode encoding, decoded entry by entry against a schema (msgspec).

A sound file of 450 MB is decoded in one pass into typed entries. Only if an entry does not fit are
the entries decoded one by one, so that each mistake is found with its path, such as
`$.annotations[3].bbox`. What JSON does not allow but Python writes (NaN, Infinity) is read, too,
and left to the checks.
"""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from detectron2.utils.file_io import PathManager

from .findings import Findings
from .other_formats import name_annotations, name_bytes, name_list, name_object
from .whole_numbers import fix_whole_numbers

T = TypeVar("T")

# An undecoded or decoded value.
Section = Any


@contextmanager
def without_gc() -> Iterator[None]:
    """Pause Python's garbage collector, which slows down the creation of millions of lists."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(file: str, findings: Findings) -> Section:
    """Read a JSON file; `decode_value` decodes it.

    Args:
        file: UTF-8, -16 or -32, with or without a byte order mark.
        findings: gets a problem if the file is not JSON.

    Returns:
        The content, undecoded if it is UTF-8 that follows the standard; None after a problem.
    """
    try:
        with PathManager.open(file, "rb") as stream:
            data = stream.read()
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        why = f"cannot be read: {error.strerror or error}"
        if isinstance(error, IsADirectoryError):
            why = f"is a folder; name the JSON in it{_jsons_in(file)}, or read it with TYPE: auto"
        findings.problem(file, None, why, is_missing=is_missing)
        return None
    try:
        encoding = json.detect_encoding(data)
        if encoding != "utf-8":
            data = data.decode(encoding).encode()
        try:
            return msgspec.json.decode(data, type=msgspec.Raw)
        except msgspec.DecodeError:
            content = json.loads(data)  # reads NaN, and its errors say the line
            if b"\\ud" in data.lower():
                # Half a character, which no file name or message can hold.
                json.dumps(content, ensure_ascii=False).encode()
            return content
    except (ValueError, RecursionError) as error:
        name = name_bytes(data)
        why = f"is not valid JSON: {error or type(error).__name__}"
        findings.problem(file, None, why if name is None else f"is {name}")
    return None


def read_sections(file: str, findings: Findings) -> dict[str, Section] | None:
    """Read the top level of a COCO JSON; its values are decoded by the functions below.

    Args:
        file, findings: see `read_json`; a problem if it is not a JSON object, too.

    Returns:
        The values by key, or None.
    """
    number = len(findings.problems)
    content = read_json(file, findings)
    if len(findings.problems) > number:
        return None
    if isinstance(content, msgspec.Raw):
        try:
            content = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
        except msgspec.ValidationError:
            content = decode_value(content)
    if isinstance(content, dict):
        return _named_format(file, content, findings)
    name = name_list(content) if isinstance(content, list) else None
    if name is None:
        name = f"{_named(content)}; COCO JSON is an object with lists such as 'images'"
    findings.problem(file, None, f"is {name}")
    return None


def json_object(path: Path, *words: bytes) -> dict[str, Section] | None:
    """The values by key of a file, to recognise its format; None if it is no JSON object.

    Args:
        path: the file.
        words: if none of them is in the file, it is not decoded; UTF-8 only.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if words and not any(word in data for word in words):
        return None
    findings = Findings()
    content = read_json(str(path), findings)
    try:
        if isinstance(content, msgspec.Raw):
            content = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _jsons_in(folder: str) -> str:
    names = sorted(name for name in PathManager.ls(folder) if name.endswith(".json"))
    return f", such as {names[0]}" if names else ""


def _named_format(
    file: str, content: dict[str, Section], findings: Findings
) -> dict[str, Section] | None:
    """The content, unless it is in another format, which becomes a problem."""
    if "annotations" in content or "images" in content:
        return content
    value = next(iter(content.values()), None)
    name = name_object(content, bytes(value) if isinstance(value, msgspec.Raw) else b"")
    if name is None:
        return content
    findings.problem(file, None, f"is {name}")
    return None


def decode_value(section: Section) -> Any:
    """The content of a section without a schema.

    Raises:
        ValueError: the JSON is malformed.
    """
    if not isinstance(section, msgspec.Raw):
        return section
    try:
        return msgspec.json.decode(section)
    except ValueError:
        return json.loads(bytes(section))


def decode_list(
    sections: dict[str, Section],
    key: str,
    kind: type[T],
    file: str,
    findings: Findings,
    what: str,
) -> list[T | None] | None:
    """Decode a list of the JSON.

    Args:
        sections: from `read_sections`. Its list has whole floats as int afterwards where the schema
            asks for int.
        key: of the list.
        kind: schema of its entries.
        file: of the JSON.
        findings: gets a problem for each entry that does not fit.
        what: an entry in words, such as "an image".

    Returns:
        One value per entry, None where it does not fit; None if there is no such list.
    """
    section = sections.get(key)
    if isinstance(section, msgspec.Raw):
        try:
            return msgspec.json.decode(section, type=list[kind])  # type: ignore[valid-type]
        except (ValueError, RecursionError):
            pass
    try:
        entries = decode_value(section)
    except (ValueError, RecursionError) as error:
        findings.problem(file, f"$.{key}", f"is not valid JSON: {error or type(error).__name__}")
        return None
    if not isinstance(entries, list):
        why = f"has no list {key!r}" + (f", but {_named(entries)}" if key in sections else "")
        findings.problem(file, None, why)
        return None
    fields = msgspec.structs.fields(kind)  # type: ignore[arg-type]
    required = {field.name for field in fields if field.required}
    name = name_annotations(entries, required) if key == "annotations" else None
    if name is not None:
        findings.problem(file, None, name)
        return None
    sections[key] = entries
    return convert_list(entries, kind, f"$.{key}", file, findings, what)


def convert_list(
    entries: list, kind: type[T], path: str, file: str, findings: Findings, what: str
) -> list[T | None]:
    """Check decoded entries against a schema; see `decode_list`.

    Whole floats become int where the schema asks for int, also in `entries`.
    """
    for fix in (None, fix_whole_numbers):
        try:
            if fix is not None:
                fix(entries, kind)  # type: ignore[arg-type]
            return msgspec.convert(entries, list[kind])  # type: ignore[valid-type]
        except (msgspec.ValidationError, RecursionError):
            pass
    converted: list[T | None] = []
    for i, entry in enumerate(entries):
        try:
            converted.append(msgspec.convert(entry, kind))
        except (msgspec.ValidationError, RecursionError) as error:
            converted.append(None)
            place = f"{path}[{i}]"
            known = entry.get("id") if isinstance(entry, dict) else None
            record = known if type(known) in (int, str) else place
            findings.problem(file, record, explain(str(error), place, what))
    return converted


def explain(error: str, place: str, what: str) -> str:
    """An error of msgspec in our words, with the whole path.

    Args:
        error: its text, with a path such as `$.bbox`.
        place: path of the decoded value.
        what: the value in words.
    """
    reason, _, at = error.partition(" - at `$")
    at = f"{place}{at.removesuffix('`')}"
    if reason.startswith("Object missing required field"):
        key = reason.rpartition("`")[0].rpartition("`")[2]
        return f"{what} has no {key!r} ({at})"
    reason = reason.replace("`", "'")
    return f"{at}: {reason[:1].lower()}{reason[1:]}"


def _named(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "text", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
