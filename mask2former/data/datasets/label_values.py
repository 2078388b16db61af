"""What the pixels of label images mean: values or colours, their classes, and what is ignored.

    VALUE_MAP {0: background, 255: object}              integers; of palette images the indices
    VALUE_MAP {"#804080": road, "70, 130, 180": sky}    colours
    CLASSES [background, object]                        the class of label 0, 1, ...

Shape letters: H W pixels.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..formats.images import read_header, read_image
from ..label_maps import Runs, check_whole
from .selection import check_rename, map_classes

Colour = tuple[int, int, int]
Value = int | str | Sequence[int]
ValueMap = Mapping[Any, str | None]

_HEX = re.compile(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})")
_DECIMAL = re.compile(r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})")
_EXAMPLE = 'VALUE_MAP: {0: background, 255: object}, or of colours {"#ff0000": road}'
_IGNORE = 255
# Distinct unknown values that an error lists.
_NUM_LISTED = 5


@dataclass(frozen=True)
class Labels:
    """The classes of label images.

    Attributes:
        classes: names in the order of the labels.
        ignore_label: label of pixels that are ignored.
        table: value in the files → label; colours are red 65536 + green 256 + blue. None: the
            files have the labels themselves.
        is_colour: whether the values are colours.
        colours: a colour of each class, if they are.
    """

    classes: list[str]
    ignore_label: int
    table: dict[int, int] | None = None
    is_colour: bool = False
    colours: list[list[int]] | None = None

    def dtype(self) -> type[np.generic]:
        """The smallest type that holds the labels."""
        return np.uint8 if max(len(self.classes) - 1, self.ignore_label) < 256 else np.uint16

    def map_file(self, file_name: str) -> np.ndarray:
        """Read a label image and map its values.

        Returns:
            (H, W) labels.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it cannot be read, or has a value that the table lacks.
        """
        assert self.table is not None
        runs = Runs(_read_colours(file_name) if self.is_colour else _read_values(file_name))
        values = [int(value) for value in runs.values]
        unknown = [i for i, value in enumerate(values) if value not in self.table]
        if unknown:
            counts = runs.counts()
            unknown.sort(key=lambda i: -counts[i])
            listed = ", ".join(
                f"{self._named(values[i])} ({counts[i]} pixels)" for i in unknown[:_NUM_LISTED]
            )
            text = (
                f"{file_name} has the value {listed}{', ...' * (len(unknown) > _NUM_LISTED)}, "
                "which has no class; add it to VALUE_MAP, or name it in IGNORE_LABELS"
            )
            if file_name.lower().endswith((".jpg", ".jpeg")):
                text += ". JPEG changes values: save label images as PNG"
            raise ValueError(text)
        new_values = np.array([self.table[value] for value in values], dtype=self.dtype())
        return runs.replaced(new_values)

    def _named(self, value: int) -> str:
        return f"#{value:06x}" if self.is_colour else str(value)


def _read_values(file_name: str) -> np.ndarray:
    """The values (H, W) of a label image; a grey image may have several equal channels."""
    labels = read_image(file_name)
    if labels.ndim == 3:
        # Grey and alpha, or red, green, blue and alpha.
        colours = labels[..., : 3 if labels.shape[-1] > 2 else 1]
        if (colours != colours[..., :1]).any():
            raise ValueError(
                f"{file_name} is an image of colours, but VALUE_MAP has integers: map colours, "
                'such as {"#ff0000": road}'
            )
        labels = colours[..., 0]
    check_whole(labels, file_name)
    return labels.astype(np.int64)


def _read_colours(file_name: str) -> np.ndarray:
    """The colours (H, W) of a label image as numbers, also of one with a palette or of grey."""
    mode = read_header(file_name).mode
    if mode in ("I", "F") or mode.startswith("I;"):
        raise ValueError(
            f"{file_name} is an image of mode {mode}, which has no colours: map integers"
        )
    channels = read_image(file_name, "RGB").astype(np.int64)
    return channels[..., 0] << 16 | channels[..., 1] << 8 | channels[..., 2]


def make_labels(
    name: str,
    classes: Sequence[str] | None,
    value_map: ValueMap | None,
    ignore_label: int | None,
    ignore_labels: Sequence[Value],
    rename: Mapping[str, str | None] | None,
) -> Labels:
    """Check the arguments of `register_semantic` about classes.

    Args:
        name: of the data set, for errors.
        classes, value_map, ignore_label, ignore_labels, rename: see `register_semantic`.

    Raises:
        ValueError: they are incomplete or contradict each other.
    """
    where = f"Data set {name!r}"
    rename = check_rename(name, rename)
    meanings: dict[Any, str | None]
    if value_map is not None:
        meanings = _read_map(where, value_map)
        class_order = classes
    elif classes is not None:
        meanings = dict(enumerate(classes))
        ignore_label = _IGNORE if ignore_label is None else ignore_label
        if 0 <= ignore_label < len(classes):
            raise ValueError(
                f"{where}: ignore_label {ignore_label} is the label of class "
                f"{classes[ignore_label]!r}; choose one outside [0, {len(classes)})."
            )
        class_order = None
        if not ignore_labels and rename is None:
            return Labels(list(classes), ignore_label)
    else:
        raise ValueError(f"{where} has neither CLASSES nor VALUE_MAP, such as {_EXAMPLE}.")
    ignored = [_read_value(where, "IGNORE_LABELS", value) for value in ignore_labels]
    if ignore_label is not None:
        ignored.append(ignore_label)
    for value in ignored:
        if meanings.get(value) is not None:
            raise ValueError(
                f"{where}: the value {value!r} of the ignored labels has the class "
                f"{meanings[value]!r}; leave one of them out."
            )
        meanings[value] = None
    is_colour = _are_colours(where, meanings)
    present = list(dict.fromkeys(c for c in meanings.values() if c is not None))
    if not present:
        raise ValueError(f"{where}: VALUE_MAP has no class, such as {_EXAMPLE}.")
    names, renamed = map_classes(where, present, class_order, rename)
    # A label that needs no mapping in other splits stays.
    fits = ignore_label is not None and len(names) <= ignore_label <= _IGNORE
    ignore = ignore_label if fits else _IGNORE if len(names) <= _IGNORE else 65535
    assert ignore is not None
    labels = {value: None if c is None else renamed[c] for value, c in meanings.items()}
    first: dict[str, Colour] = {}
    for value, new in labels.items():
        if is_colour and new is not None:
            first.setdefault(new, value)
    return Labels(
        names,
        ignore,
        {
            _as_number(value): ignore if new is None else names.index(new)
            for value, new in labels.items()
        },
        is_colour,
        [list(first[c]) for c in names] if len(first) == len(names) else None,
    )


def _read_map(where: str, value_map: ValueMap) -> dict[Any, str | None]:
    meanings: dict[Any, str | None] = {}
    for key, class_name in value_map.items():
        value = _read_value(where, "VALUE_MAP", key)
        if value in meanings:
            raise ValueError(f"{where}: VALUE_MAP has the value {key!r} more than once.")
        if class_name is not None and (not isinstance(class_name, str) or not class_name):
            raise ValueError(
                f"{where}: VALUE_MAP has {key!r}: {class_name!r}, which is no class name; null "
                "ignores the pixels. YAML reads words such as yes, no, on and off as true or "
                "false: quote them."
            )
        meanings[value] = class_name
    return meanings


def _read_value(where: str, key: str, value: Any) -> int | Colour:
    """An integer or a colour (red, green, blue)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    channels: Sequence[Any] = ()
    if isinstance(value, str):
        text = value.strip().strip("()[]")
        if match := _HEX.fullmatch(text):
            channels = [int(channel, 16) for channel in match.groups()]
        elif match := _DECIMAL.fullmatch(text.strip()):
            channels = [int(channel) for channel in match.groups()]
        elif text.isdecimal():
            return int(text)
    elif isinstance(value, list | tuple):
        channels = value
    if len(channels) == 3 and all(
        isinstance(c, int) and not isinstance(c, bool) and 0 <= c < 256 for c in channels
    ):
        return (channels[0], channels[1], channels[2])
    raise ValueError(
        f"{where}: {key} has {value!r}, which is neither an integer nor a colour such as "
        '"#ff0000" or "255, 0, 0".'
    )


def _are_colours(where: str, meanings: Mapping[Any, str | None]) -> bool:
    """Whether all values are colours.

    Raises:
        ValueError: some are, some are integers.
    """
    kinds = {isinstance(value, tuple) for value in meanings}
    if len(kinds) > 1:
        one, other = (next(v for v in meanings if isinstance(v, tuple) is k) for k in (True, False))
        raise ValueError(
            f"{where}: the values of VALUE_MAP and of the ignored labels mix colours ({one}) and "
            f"integers ({other}); write all of them in one way."
        )
    return kinds == {True}


def _as_number(value: int | Colour) -> int:
    return value if isinstance(value, int) else value[0] << 16 | value[1] << 8 | value[2]
