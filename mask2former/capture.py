"""Capture files: one training iteration as data, for `tools/replay.py`.

    batch, weights, config, seed, iteration, rank → non_finite_ITERATION_rankR.pth → `Capture`

A file is tensors and plain containers: reading it runs no code (`utils/torch_files.py`).
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2
import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import Tensor

from .data.packed_masks import PackedMasks, TargetInstances
from .utils.files import atomic_write, explained_read_errors, load_torch

_FORMAT = "mask2former non-finite iteration"
_VERSION = 1
_TYPE = "__type__"
_INSTANCES = {"Instances": Instances, "TargetInstances": TargetInstances}
# Metadata of the training set that a model or a report may need.
_METADATA = (
    "thing_classes",
    "stuff_classes",
    "thing_dataset_id_to_contiguous_id",
    "stuff_dataset_id_to_contiguous_id",
    "ignore_label",
)


@dataclass
class Capture:
    """A training iteration whose loss or matching costs were not finite.

    Attributes:
        iteration, rank, world_size: where it happened.
        seed: the run's seed, from which `IterationSeed` seeded the iteration.
        reason: the error, or why the iteration was skipped.
        losses: weighted losses of this rank by name; empty if matching failed before them.
        config: the run's config, as YAML.
        dtype: what mixed precision computed in, such as "float16"; "float32" without.
        loss_scale: factor on the loss in float16; 1.0 otherwise.
        weights: the model's state dict.
        weights_are: which weights these are, in words.
        batch: what the model was called with, on the CPU.
        metadata: of the first training set: class names and ids.
        versions: of Python and packages.
    """

    iteration: int
    rank: int
    world_size: int
    seed: int
    reason: str
    losses: dict[str, float]
    config: str
    dtype: str
    loss_scale: float
    weights: dict[str, Any]
    weights_are: str
    batch: list[Any]
    metadata: dict[str, Any]
    versions: dict[str, str]


_TYPES: dict[str, type | tuple[type, ...]] = {
    "iteration": int,
    "rank": int,
    "world_size": int,
    "seed": int,
    "reason": str,
    "losses": dict,
    "config": str,
    "dtype": str,
    "loss_scale": (int, float),
    "weights": dict,
    "weights_are": str,
    "batch": list,
    "metadata": dict,
    "versions": dict,
}


def file_name(iteration: int, rank: int) -> str:
    """Name of the capture file of an iteration in OUTPUT_DIR."""
    return f"non_finite_{iteration}_rank{rank}.pth"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "detectron2": str(detectron2.__version__),
        "numpy": str(np.__version__),
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu",
    }


def plain_metadata(metadata: Any) -> dict[str, Any]:
    """Class names and ids of Detectron2 metadata."""
    return {name: pack(metadata.get(name)) for name in _METADATA if metadata.get(name) is not None}


def write_capture(path: str, capture: Capture) -> None:
    """Write a capture file; it appears under its name only when it is complete.

    Raises:
        WriteError: the file cannot be written.
    """
    content = {name: getattr(capture, name) for name in _TYPES}
    content["weights"] = {
        name: value.detach().cpu() if isinstance(value, Tensor) else pack(value)
        for name, value in capture.weights.items()
    }
    content["batch"] = pack(list(capture.batch))
    with atomic_write(path, "wb") as file:
        torch.save({"format": _FORMAT, "version": _VERSION, **content}, file)


def read_capture(path: str | os.PathLike) -> Capture:
    """Read a capture file without running code from it.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is damaged, or not a capture file.
    """
    path = str(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    with explained_read_errors(path):
        content = load_torch(path)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is not a capture of a non-finite loss, which training names "
            "non_finite_ITERATION_rankR.pth."
        )
    if content.get("version") != _VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r} of the capture format; this program "
            f"reads version {_VERSION}."
        )
    for name, kind in _TYPES.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{path}: {name!r} is missing or has the wrong type.")
    content["batch"] = unpack(content["batch"])
    return Capture(**{name: content[name] for name in _TYPES})


def pack(value: Any) -> Any:
    """A value of a batch as tensors and plain containers, on the CPU.

    What is neither, nor a structure of Detectron2 or of this project, is replaced by the name of
    its type.
    """
    if isinstance(value, Tensor):
        # A copy: a view would be saved with all of its storage.
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return np.array(value)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, str | os.PathLike):
        return str(value)
    if isinstance(value, bool | int | float):  # an enum
        return value.real
    if isinstance(value, dict):
        return {_key(key): pack(item) for key, item in value.items()}
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, tuple):
        return tuple(pack(item) for item in value)
    if isinstance(value, Instances):
        # `_fields`, because reading a field expands packed masks.
        fields = {name: pack(field) for name, field in value._fields.items()}
        kind = "TargetInstances" if isinstance(value, TargetInstances) else "Instances"
        return {_TYPE: kind, "image_size": tuple(map(int, value.image_size)), "fields": fields}
    if isinstance(value, PackedMasks):
        planes, number = pack(value.planes), value.num_masks
        return {
            _TYPE: "PackedMasks",
            "planes": planes,
            "num_masks": number,
            "overlapping": value.overlapping,
        }
    if type(value) in (Boxes, BitMasks):
        return {_TYPE: type(value).__name__, "tensor": pack(value.tensor)}
    if type(value) is PolygonMasks:
        return {_TYPE: "PolygonMasks", "polygons": pack(value.polygons)}
    return {_TYPE: "", "name": type(value).__qualname__}


def _key(key: Any) -> Any:
    return key if type(key) in (str, int) else str(key)


def unpack(value: Any) -> Any:
    """The value that `pack` was given; one that it could not keep becomes None.

    Raises:
        ValueError: it is not what `pack` returns.
    """
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if isinstance(value, tuple):
        return tuple(unpack(item) for item in value)
    if not isinstance(value, dict):
        return value
    kind = value.get(_TYPE)
    if kind is None:
        return {key: unpack(item) for key, item in value.items()}
    try:
        if kind in _INSTANCES:
            instances = _INSTANCES[kind](value["image_size"])
            for name, field in value["fields"].items():
                instances.set(name, unpack(field))
            return instances
        if kind == "PackedMasks":
            planes, number = value["planes"], value["num_masks"]
            return PackedMasks(planes, number, overlapping=value["overlapping"])
        if kind == "Boxes":
            return Boxes(value["tensor"])
        if kind == "BitMasks":
            return BitMasks(value["tensor"])
        if kind == "PolygonMasks":
            return PolygonMasks(value["polygons"])
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"the capture holds {kind} that cannot be restored: {error}") from error
    if kind == "":
        return None
    raise ValueError(f"the capture holds an unknown type {kind!r}")
