"""What is kept beside an exported file, as `FILE.json`: all that inference needs, and the parity.

The file also states inputs, outputs and sizes for programs that do not use this project.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import Metadata

from ..inference.model_file import (
    plain_metadata,
    portable_config,
    stored_config,
    stored_metadata,
)
from ..utils.files import atomic_write
from .network import INPUT
from .options import FORMATS, ExportOptions

# Raised when older versions of this project cannot read what is written.
_FORMAT = 1
_MEANINGS = {
    "pred_logits": "(batch, queries, classes + 1) class logits, no-object last",
    "pred_masks": "(batch, queries, height / stride, width / stride) mask logits",
    "semantic_labels": "(batch, height, width) int32, label of each pixel",
    "scores": "(batch, instances) in [0, 1]; 0 for a pair whose class is no thing",
    "labels": "(batch, instances) int64, indices of class_names",
    "masks": "(batch, instances, height, width) bool",
    "segment_ids": "(batch, height, width) int32, 0 where no segment is",
    "query_segments": "(batch, queries) int32, the segment of each query, 0 for none",
    "query_labels": "(batch, queries) int64, indices of class_names, or their number: no object",
    "query_scores": "(batch, queries) class probabilities",
}


@dataclass(frozen=True)
class SizeRule:
    """Which images a file takes.

    Attributes:
        divisor: heights and widths are multiples of it, in pixels.
        smallest, largest: of height and width.
        fixed: (H, W), the only size of a traced file.
        batch: B, the only one of a traced file; None for any.
    """

    divisor: int
    smallest: int
    largest: int
    fixed: tuple[int, int] | None = None
    batch: int | None = None

    def check(self, shape: tuple[int, ...]) -> None:
        """
        Args:
            shape: B, C, H and W of a batch.

        Raises:
            ValueError: the file does not take it; says what to do.
        """
        batch, _, *size = shape
        if self.fixed is not None and (tuple(size) != tuple(self.fixed) or batch != self.batch):
            raise ValueError(
                f"images are {batch} x {size[0]} x {size[1]}, but this file was traced for batches "
                f"of {self.batch} and {self.fixed[0]} x {self.fixed[1]} pixels only: resize or pad "
                "the images to that, or export again with this size, or with format torch or onnx, "
                "which take any size"
            )
        if self.fixed is not None:
            return
        for name, length in zip(("height", "width"), size, strict=True):
            if length % self.divisor or not self.smallest <= length <= self.largest:
                raise ValueError(
                    f"the images' {name} is {length}, but this file takes multiples of "
                    f"{self.divisor} from {self.smallest} to {self.largest} pixels: pad with zeros "
                    "at the right and below to the next multiple (after subtracting the mean), "
                    "resize larger images, or export with a larger --max-size"
                )


@dataclass
class ExportedDescription:
    """The content of `FILE.json`.

    Attributes:
        options: how it was exported.
        sizes: which images it takes.
        config: of the model, without paths.
        class_names: K names, by label.
        metadata: of the data set: class names, colours, ids.
        channels: C.
        pixel_mean, pixel_std: by channel, in the order of `input_format`.
        input_format: "RGB", "BGR", or of the bands.
        outputs: names, in order.
        versions: of the packages that wrote it.
        parity: differences to the model, see `parity.py`.
        accuracy: metrics of the model and the file, if they were evaluated, see `accuracy.py`.
    """

    options: ExportOptions
    sizes: SizeRule
    config: dict[str, Any]
    class_names: tuple[str, ...]
    metadata: dict[str, Any]
    channels: int
    pixel_mean: list[float]
    pixel_std: list[float]
    input_format: str
    outputs: tuple[str, ...]
    versions: dict[str, str] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)

    def cfg(self, path: str) -> CfgNode:
        """The config of the model; `path` names the file in errors."""
        stored = {"config": self.config, "mask2former": self.versions.get("mask2former", "?")}
        return stored_config(path, stored)

    def detectron2_metadata(self) -> Metadata:
        """The metadata of the data set, as Detectron2 and the model use it."""
        return stored_metadata("exported", self.metadata)


def describe(
    cfg: CfgNode, metadata: Metadata, class_names: tuple[str, ...], **parts: Any
) -> ExportedDescription:
    """Describe a file from the config and metadata of its model; `parts` are the other fields."""
    return ExportedDescription(
        config=portable_config(cfg),
        class_names=tuple(class_names),
        metadata=plain_metadata(metadata),
        channels=len(cfg.MODEL.PIXEL_MEAN),
        pixel_mean=list(cfg.MODEL.PIXEL_MEAN),
        pixel_std=list(cfg.MODEL.PIXEL_STD),
        input_format=cfg.INPUT.FORMAT,
        versions=_versions(parts["options"].format),
        **parts,
    )


def description_file(path: str) -> str:
    """The file beside an exported file."""
    return f"{path}.json"


def write_description(path: str, description: ExportedDescription) -> None:
    """Write `FILE.json`.

    Raises:
        WriteError: it cannot be written.
    """
    fixed = description.sizes.fixed
    sizes: list[Any] = ["height", "width"] if fixed is None else list(fixed)
    batch = "batch" if description.sizes.batch is None else description.sizes.batch
    interface = {
        "inputs": [
            {
                "name": INPUT,
                "dtype": "float32",
                "shape": [batch, description.channels, *sizes],
                "meaning": "(pixel - pixel_mean) / pixel_std by channel, zeros as padding at the "
                "right and below",
            }
        ],
        "outputs": [{"name": x, "meaning": _MEANINGS[x]} for x in description.outputs],
    }
    content = {"format": _FORMAT, "file": os.path.basename(path), **interface}
    # Not asdict of the whole: it copies the config in a way that yacs does not allow.
    fields = dict(vars(description))
    fields |= {"options": asdict(description.options), "sizes": asdict(description.sizes)}
    fields.pop("outputs")
    with atomic_write(description_file(path)) as file:
        json.dump(content | fields, file, indent=1)
        file.write("\n")


def read_description(path: str) -> ExportedDescription:
    """Read `FILE.json`.

    Args:
        path: the exported file.

    Raises:
        FileNotFoundError: the file, or the one beside it, does not exist.
        ValueError: it is damaged, or of a newer version.
    """
    beside = description_file(path)
    for needed in (path, beside):
        if not os.path.isfile(needed):
            raise FileNotFoundError(
                f"{needed} does not exist: an exported model is a file "
                f"({', '.join(FORMATS.values())}) and its description FILE.json beside it, as "
                "tools/export.py writes them"
            )
    try:
        with open(beside, encoding="utf-8") as file:
            content = json.load(file)
        if content["format"] > _FORMAT:
            raise ValueError(f"it has format {content['format']}: update Mask2Former")
        names = tuple(output["name"] for output in content["outputs"])
        options, sizes = content.pop("options"), content.pop("sizes")
        for values, key in ((options, "size"), (sizes, "fixed")):
            values[key] = None if values[key] is None else tuple(values[key])
        for extra in ("format", "file", "inputs", "outputs"):
            content.pop(extra)
        content["class_names"] = tuple(content["class_names"])
        return ExportedDescription(
            options=ExportOptions(**options), sizes=SizeRule(**sizes), outputs=names, **content
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{beside} cannot be read: {error}") from error


def _versions(file_format: str) -> dict[str, str]:
    from .. import __version__

    versions = {"mask2former": __version__, "torch": torch.__version__}
    if file_format == "onnx":
        import onnx
        import onnxruntime

        versions |= {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    return versions
