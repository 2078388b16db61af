"""Registers your own data sets from DATASETS.CUSTOM of a config.

    DATASETS:
      CUSTOM:
        - {NAME: my_train, TYPE: instance, IMAGE_ROOT: images, INSTANCES_JSON: train.json}
        - {NAME: my_val, TYPE: instance, IMAGE_ROOT: images, INSTANCES_JSON: val.json}

The keys of an entry are the arguments of the function that registers its TYPE, in capitals.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .register_custom import register_instances, register_panoptic, register_semantic

_HELPERS: dict[str, Callable[..., None]] = {
    "panoptic": register_panoptic,
    "instance": register_instances,
    "semantic": register_semantic,
}


def register_entries(entries: Sequence[Mapping[str, Any]]) -> None:
    """Register the data sets that DATASETS.CUSTOM lists.

    Args:
        entries: mappings, each with NAME, TYPE (panoptic, instance or semantic) and the arguments
            of `register_panoptic`, `register_instances` or `register_semantic` in capitals.

    Raises:
        FileNotFoundError: a file or a folder does not exist.
        ValueError: an entry is invalid; the message names the entry and the key.
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
        if kind not in _HELPERS:
            stated = f"TYPE {kind!r}" if "TYPE" in entry else "no TYPE"
            raise ValueError(f"{where} has {stated}; allowed: {', '.join(_HELPERS)}.")
        helper = _HELPERS[kind]
        parameters = inspect.signature(helper).parameters
        arguments = {str(key): value for key, value in entry.items() if key != "TYPE"}
        _check_keys(where, kind, arguments, parameters)
        helper(**{key.lower(): value for key, value in arguments.items()})


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
        allowed: tuple[type, ...] = (str,)
        if key == "CLASSES":
            allowed = (str, list, tuple)
        elif key == "IGNORE_LABEL":
            allowed = (int,)
        elif keys[key].default is None:
            allowed = (str, type(None))
        if not isinstance(value, allowed) or isinstance(value, bool):
            names = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"{where} has {key} {value!r}; it must be a {names}.")
    missing = [
        key
        for key, parameter in keys.items()
        if parameter.default is inspect.Parameter.empty and key not in arguments
    ]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}, which type {kind} needs.")
