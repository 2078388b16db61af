"""Whether two runs of one training ended with the same bits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mask2former.utils.files import load_torch

# Metrics that measure the machine, and what stood in the folder before: a run that is killed before
# its first checkpoint starts anew beside its own files.
_MACHINE = frozenset(
    {"time", "data_time", "rank_data_time", "eta_seconds", "max_mem", "earlier_files"}
)
_MAX_SHOWN = 5


def differences(first: Path, second: Path) -> list[str]:
    """Compare the output folders of two finished runs, the second of which may have been resumed.

    All checkpoints must hold the same bits: weights, optimiser, schedule, trainer. So must the
    values of all metrics but times, and the evaluation. The second run may have written a row of
    metrics.json twice, because what was done since its last checkpoint is done again, but not with
    other values. Both must have left the same files, so none half written, but for TensorBoard's,
    one for each start.

    Returns:
        one line for each difference.
    """
    found = _files(first, second) + _checkpoints(first, second)
    for name in ("last_checkpoint", "evaluation.json"):
        contents = [_content(folder / name) for folder in (first, second)]
        if contents[0] != contents[1]:
            found.append(f"{name}: {_short(contents[0])} and {_short(contents[1])}")
    try:
        found += _compare_metrics(*(read_metrics(folder) for folder in (first, second)))
    except ValueError as error:
        found.append(str(error))
    return found


def _content(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def _files(first: Path, second: Path) -> list[str]:
    names = [
        {
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if not path.name.startswith("events.out.tfevents.")
        }
        for folder in (first, second)
    ]
    differ = sorted(names[0] ^ names[1])
    return [f"files in one run only: {_some(differ)}"] if differ else []


def _checkpoints(first: Path, second: Path) -> list[str]:
    names = [sorted(path.name for path in folder.glob("*.pth")) for folder in (first, second)]
    if not names[0]:
        return ["the first run has no checkpoint"]
    found = []
    for name in sorted(set(names[0]) & set(names[1])):
        states = [load_torch(str(folder / name)) for folder in (first, second)]
        different = [f"{key} {what}" for key, what in compare_states(*states)]
        if different:
            found.append(f"{name}: {_some(different)}")
    return found


def compare_states(first: Any, second: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Compare nested containers of tensors and plain values to the bit, without times.

    Yields:
        the key of a difference, and what it is.
    """
    if type(first) is not type(second):
        yield key, f"is {_short(first)} and {_short(second)}"
    elif isinstance(first, dict):
        if single := (first.keys() ^ second.keys()) - _MACHINE:
            yield key, f"has {sorted(map(str, single))} in one run only"
        # In the order of the checkpoint: weights first.
        for name, value in first.items():
            if name in second and name not in _MACHINE:
                yield from compare_states(value, second[name], f"{key}.{name}".lstrip("."))
    elif isinstance(first, list | tuple):
        if len(first) != len(second):
            yield key, f"has {len(first)} and {len(second)} items"
        for i, pair in enumerate(zip(first, second, strict=False)):
            yield from compare_states(*pair, f"{key}[{i}]")
    elif isinstance(first, Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            yield key, "has another shape or type"
        elif not torch.equal(_bytes(first), _bytes(second)):
            yield key, f"differs by up to {_largest_difference(first, second)}"
    elif repr(first) != repr(second):  # unlike ==, for NaN and negative zero
        yield key, f"is {_short(first)} and {_short(second)}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _largest_difference(first: Tensor, second: Tensor) -> str:
    return f"{(first.double() - second.double()).abs().max().item():.3g}"


def read_metrics(folder: Path) -> dict[tuple[int, str], float]:
    """The values in metrics.json without times: {(iteration, name): value}.

    Raises:
        ValueError: two rows of an iteration disagree.
    """
    values: dict[tuple[int, str], float] = {}
    for number, line in enumerate((folder / "metrics.json").read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            # Cut off by a kill: its values must stand in another row.
            continue
        for name, value in row.items():
            if name in _MACHINE or name == "iteration":
                continue
            known = values.setdefault((row["iteration"], name), value)
            if repr(known) != repr(value):
                raise ValueError(
                    f"metrics.json: {name} of iteration {row['iteration']} is {known!r}, and in "
                    f"line {number} {value!r}"
                )
    return values


def _compare_metrics(first: dict, second: dict) -> list[str]:
    found = []
    for text, keys in (
        ("not written", first.keys() - second.keys()),
        ("in the second run only", second.keys() - first.keys()),
        (
            "not the same",
            {key for key in first.keys() & second.keys() if repr(first[key]) != repr(second[key])},
        ),
    ):
        if keys:
            named = [f"{name} of iteration {iteration}" for iteration, name in sorted(keys)]
            found.append(f"metrics.json: {text}: {_some(named)}")
    return found


def _some(items: list[str]) -> str:
    more = len(items) - _MAX_SHOWN
    return ", ".join(items[:_MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
