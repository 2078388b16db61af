"""Registers your own data sets from DATASETS.CUSTOM of a config.

    DATASETS:
      CUSTOM:
        - {NAME: my_train, TYPE: auto, ROOT: my_data, SHARE: [0.0, 0.8]}
        - {NAME: my_val, TYPE: auto, ROOT: my_data, SHARE: [0.8, 1.0]}
        - {NAME: others, TYPE: instance, IMAGE_ROOT: images, INSTANCES_JSON: train.json}

The keys of an entry are the arguments of the function that registers its TYPE, in capitals.
"""

import difflib
import inspect
import itertools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ..formats.annotation_formats import FORMATS
from .register_annotations import AUTO, register_annotations
from .register_custom import register_instances, register_panoptic, register_semantic

_HELPERS: dict[str, Callable[..., None]] = {
    "panoptic": register_panoptic,
    "instance": register_instances,
    "semantic": register_semantic,
}
# Keys whose values are not texts → the types that they may have, and in words.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "BOXES_AS_MASKS": ((bool,), "bool"),
    "CLASSES": ((str, list, tuple), "str or list or tuple"),
    "IGNORE_LABEL": ((int,), "int"),
    "IGNORE_LABELS": ((list, tuple), "list of values"),
    "IMAGE_EXT": ((str, list, tuple), "str or list of str"),
    "LABEL_EXT": ((str, list, tuple), "str or list of str"),
    "RENAME": ((Mapping,), "mapping of class names, such as {old: new}"),
    "SHARE": ((list, tuple), "list of two numbers, such as [0.0, 0.8]"),
    "SHARE_SEED": ((int,), "int"),
    "VALUE_MAP": ((Mapping,), "mapping of values to class names, such as {0: background, 255: x}"),
}
# Types of the entries of lists.
_ITEMS: dict[str, tuple[type, ...]] = {
    "IGNORE_LABELS": (int, str, list, tuple),
    "IMAGE_EXT": (str,),
    "LABEL_EXT": (str,),
    "SHARE": (int, float),
}

# What says whether two entries are of the same images.
_SOURCES = (
    "TYPE",
    "ROOT",
    "SPLIT",
    "IMAGE_ROOT",
    "INSTANCES_JSON",
    "PANOPTIC_JSON",
    "LABEL_ROOT",
    "IMAGE_LIST",
)

_logger = logging.getLogger(__name__)


def register_entries(entries: Sequence[Mapping[str, Any]]) -> None:
    """Register the data sets that DATASETS.CUSTOM lists.

    Args:
        entries: mappings, each with NAME, TYPE and the arguments in capitals of
            `register_panoptic`, `register_instances` or `register_semantic` (TYPE panoptic,
            instance or semantic), or of `register_annotations` (TYPE auto or a format).

    Raises:
        FileNotFoundError: a file or a folder does not exist.
        ValueError: an entry is invalid; the message names the entry and the key.
        WriteError: the cache of converted annotations cannot be written.
    """
    for i, entry in enumerate(entries):
        where = f"DATASETS.CUSTOM[{i}]"
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"{where} is {entry!r}; it must be a mapping such as "
                "{NAME: my_train, TYPE: instance, IMAGE_ROOT: images, INSTANCES_JSON: train.json}."
            )
        where += f" ({entry['NAME']})" if "NAME" in entry else ""
        kind = entry.get("TYPE")
        helpers = _helpers()
        if not isinstance(kind, str) or kind not in helpers:
            stated = f"TYPE {kind!r}" if "TYPE" in entry else "no TYPE"
            raise ValueError(f"{where} has {stated}; allowed: {', '.join(helpers)}.")
        helper = helpers[kind]
        parameters = dict(inspect.signature(helper).parameters)
        parameters.pop("type", None)
        arguments = {str(key): value for key, value in entry.items() if key != "TYPE"}
        _check_keys(where, kind, arguments, parameters)
        helper(**{key.lower(): value for key, value in arguments.items()})
    _warn_of_common_images(entries)


def _helpers() -> dict[str, Callable[..., None]]:
    """TYPE → the function that registers it."""
    return _HELPERS | {kind: partial(register_annotations, type=kind) for kind in (AUTO, *FORMATS)}


def _warn_of_common_images(entries: Sequence[Mapping[str, Any]]) -> None:
    """Warn of two splits of one source with different shares that have images in common."""
    for one, other in itertools.combinations(entries, 2):
        if not (one.get("SHARE") or other.get("SHARE")):
            continue
        if any(_source(one, key) != _source(other, key) for key in _SOURCES):
            continue
        (low, high), (other_low, other_high) = (x.get("SHARE") or (0, 1) for x in (one, other))
        names = f"Data sets {one['NAME']!r} and {other['NAME']!r} are of one source"
        is_split = bool(one.get("SHARE") and other.get("SHARE"))
        if is_split and one.get("SHARE_SEED", 0) != other.get("SHARE_SEED", 0):
            _logger.warning(
                f"{names}, but have different SHARE_SEED, so that they have images in common."
            )
        elif max(low, other_low) < min(high, other_high) and (low, high) != (other_low, other_high):
            _logger.warning(
                f"{names}, and have images in common: SHARE [{low:g}, {high:g}] and "
                f"[{other_low:g}, {other_high:g}] overlap."
            )


def _source(entry: Mapping[str, Any], key: str) -> Any:
    """The value of a key of `_SOURCES`, which may be a path."""
    value = entry.get(key)
    if isinstance(value, str) and key not in ("TYPE", "SPLIT"):
        return os.path.realpath(os.path.expanduser(value))
    return value


def _check_keys(
    where: str,
    kind: str,
    arguments: Mapping[str, Any],
    parameters: Mapping[str, inspect.Parameter],
) -> None:
    keys = {name.upper(): parameter for name, parameter in parameters.items()}
    for key, value in arguments.items():
        if key not in keys:
            close = difflib.get_close_matches(key.upper(), keys, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"{where} has the key {key!r}, which is unknown for type {kind}.{hint} Keys of "
                f"type {kind}: TYPE, {', '.join(keys)}."
            )
        _check_value(where, key, value, keys[key])
    missing = [
        key
        for key, parameter in keys.items()
        if parameter.default is inspect.Parameter.empty and key not in arguments
    ]
    hint = ""
    if kind == "semantic" and not {"CLASSES", "VALUE_MAP"} & arguments.keys():
        missing.append("CLASSES")
        hint = " VALUE_MAP can be in place of CLASSES."
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}, which type {kind} needs.{hint}")


def _check_value(where: str, key: str, value: Any, parameter: inspect.Parameter) -> None:
    allowed, words = _KINDS.get(key, ((str,), "str"))
    if value is None and parameter.default is None:
        return
    is_wrong_bool = isinstance(value, bool) and bool not in allowed
    if not isinstance(value, allowed) or is_wrong_bool:
        raise ValueError(f"{where} has {key} {value!r}; it must be a {words}.")
    items = value if key in _ITEMS and isinstance(value, list | tuple) else ()
    for item in items:
        if not isinstance(item, _ITEMS[key]) or isinstance(item, bool):
            raise ValueError(f"{where} has {key} {value!r}; it must be a {words}, not {item!r}.")
