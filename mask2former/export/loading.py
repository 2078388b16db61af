"""Exported files as models: the network is the file's; padding and post-processing are ours.

Shape letters: B batch, C channels, H W image size in pixels, h w that of mask logits.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..config_schema import check_values
from ..fast.model import inference
from ..inference.model_file import merge_overrides
from ..maskformer_model import MaskFormer
from ..predictor import Predictor
from .metadata import SizeRule, read_description
from .network import LOGITS
from .runtimes import Runtime

_MUST_AGREE = (
    ("MODEL.PIXEL_MEAN", "pixel_mean"),
    ("MODEL.PIXEL_STD", "pixel_std"),
    ("INPUT.FORMAT", "input_format"),
)
# How images are resized before they are padded to what the file takes.
_SIZES = ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST")


class ExportedMaskFormer(MaskFormer):
    """A `MaskFormer` for inference whose network is an exported file.

    Args:
        runtime: the file, which returns class and mask logits.
        cfg: post-processing: tasks, thresholds, number of instances.
        metadata: of the data set whose classes it predicts.

    Raises:
        ValueError: the file has post-processing of its own.
    """

    def __init__(self, runtime: Runtime, cfg: CfgNode, metadata: Metadata):
        description = runtime.description
        if description.outputs != LOGITS:
            raise ValueError(
                f"{runtime.path} returns {', '.join(description.outputs)}: post-processing at the "
                "size of its input is a part of it, so that predictions cannot be made for "
                "images of other sizes as the evaluators expect. Export with --postprocess none to "
                "predict and evaluate here; call the runtime yourself for this file."
            )
        test = cfg.MODEL.MASK_FORMER.TEST
        # Its network has no parts of ours, and it is never trained.
        parts: dict[str, Any] = {"backbone": nn.Identity(), "sem_seg_head": nn.Identity()}
        super().__init__(
            **parts,
            criterion=None,  # type: ignore[arg-type]
            num_queries=cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES,
            object_mask_threshold=test.OBJECT_MASK_THRESHOLD,
            overlap_threshold=test.OVERLAP_THRESHOLD,
            metadata=metadata,
            size_divisibility=description.sizes.divisor,
            sem_seg_postprocess_before_inference=(
                test.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE or test.PANOPTIC_ON or test.INSTANCE_ON
            ),
            pixel_mean=tuple(description.pixel_mean),
            pixel_std=tuple(description.pixel_std),
            semantic_on=test.SEMANTIC_ON,
            instance_on=test.INSTANCE_ON,
            panoptic_on=test.PANOPTIC_ON,
            test_topk_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        self._runtime = runtime
        self.to(runtime.device).eval()

    def train(self, mode: bool = True) -> "ExportedMaskFormer":
        """
        Raises:
            ValueError: `mode`, because an exported file cannot be trained.
        """
        if mode:
            raise ValueError(f"{self._runtime.path} is exported: it cannot be trained")
        return super().train(False)

    def forward_network(self, images: Tensor) -> dict[str, Any]:
        """Normalised images (B, C, H, W) → `pred_logits` and `pred_masks` (B, Q, h, w)."""
        rule = self._runtime.description.sizes
        height, width = images.shape[-2:]
        if rule.fixed is not None:
            target = rule.fixed
            if height > target[0] or width > target[1]:
                raise ValueError(
                    f"the image is {height} x {width} pixels at the model's input, but "
                    f"{self._runtime.path} was traced for {target[0]} x {target[1]}: lower "
                    "INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST, or export for a larger size"
                )
        else:
            target = max(height, rule.smallest), max(width, rule.smallest)
        padded = F.pad(images, (0, target[1] - width, 0, target[0] - height))
        batches = [padded] if rule.batch is None else self._in_batches(padded, rule.batch)
        outputs = [self._runtime(batch) for batch in batches]
        logits, masks = (torch.cat([x[name] for x in outputs])[: len(images)] for name in LOGITS)
        # Cut off what was padded here.
        rows = masks.shape[2] * height // target[0]
        columns = masks.shape[3] * width // target[1]
        return {"pred_logits": logits, "pred_masks": masks[:, :, :rows, :columns]}

    @staticmethod
    def _in_batches(images: Tensor, size: int) -> list[Tensor]:
        """Batches of the size that the file takes; the last is filled with zeros."""
        missing = -len(images) % size
        return list(F.pad(images, (0, 0) * 3 + (0, missing)).split(size))

    def forward_inference(
        self, outputs: dict[str, Any], batched_inputs: list[dict[str, Any]], images: ImageList
    ) -> list[dict[str, Any]]:
        """See `MaskFormer.forward_inference`; streams rows as the model in PyTorch does."""
        return inference(self, outputs, batched_inputs, images)


def load_exported(
    path: str | os.PathLike, *, device: str | None = None, opts: Sequence[Any] = ()
) -> Predictor:
    """Load an exported file as a predictor.

    Args:
        path: the file; its description is beside it. Load only files that you trust.
        device: where to run; default: MODEL.DEVICE of `opts`, else "cpu".
        opts: overrides `KEY1 VALUE1 KEY2 VALUE2 ...` of MODEL.DEVICE, INPUT.MIN_SIZE_TEST and
            INPUT.MAX_SIZE_TEST. The rest of the config is part of the file.

    Raises:
        FileNotFoundError: the file or its description does not exist.
        ValueError: it cannot be loaded, has post-processing of its own, or does not take an
            override.
    """
    path = os.path.expanduser(os.fspath(path))
    description = read_description(path)
    cfg = description.cfg(path)
    cfg.MODEL.DEVICE = "cpu"
    _override(cfg, opts, path, description.sizes)
    device = cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
    metadata = description.detectron2_metadata()
    model = ExportedMaskFormer(Runtime(path, description, device), cfg, metadata)
    return Predictor.from_model(model, cfg, metadata, description.class_names)


def _override(cfg: CfgNode, opts: Sequence[Any], path: str, rule: SizeRule) -> None:
    """Change the config in place.

    Raises:
        ValueError: a key is part of the file, or images would be larger than the file takes.
    """
    others = sorted({*map(str, opts[::2])} - {"MODEL.DEVICE", *_SIZES})
    if others:
        raise ValueError(
            f"{path} is an exported model, of which MODEL.DEVICE, {' and '.join(_SIZES)} can be "
            f"changed, but not {', '.join(others)}: export again with the config changed"
        )
    if not opts:
        return
    merge_overrides(cfg, opts)
    check_values(cfg)
    sides = rule.fixed or (rule.largest, rule.largest)
    for key, limit in zip(_SIZES, (min(sides), max(sides)), strict=True):
        value = cfg.INPUT[key.partition(".")[2]]
        if key in opts[::2] and value > limit:
            what = (
                f"takes up to {limit} pixels: choose at most that, or export with a larger "
                "--max-size"
                if rule.fixed is None
                else f"was traced for {sides[0]} x {sides[1]} pixels only: choose {limit} or less, "
                "or export for a larger size, or with format torch or onnx, which take any size"
            )
            raise ValueError(f"{key} is {value}, but {path} {what}")


def build_exported_model(path: str | os.PathLike, cfg: CfgNode) -> ExportedMaskFormer:
    """Load an exported file as the model of a config, to evaluate it.

    Args:
        path: the file.
        cfg: names data sets, tasks and thresholds; its classes and pixel values must be the file's.

    Raises:
        FileNotFoundError, ValueError: as `load_exported`, or the config does not fit the file.
    """
    path = os.path.expanduser(os.fspath(path))
    description = read_description(path)
    num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if num_classes != len(description.class_names):
        raise ValueError(
            f"{path} predicts {len(description.class_names)} classes, but "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}: name the config it was trained with"
        )
    for key, name in _MUST_AGREE:
        section, _, field = key.partition(".")
        value, own = cfg[section][field], getattr(description, name)
        if (list(value) if isinstance(own, list) else value) != own:
            raise ValueError(f"{path} was exported with {key} {own}, but the config has {value}")
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    return ExportedMaskFormer(Runtime(path, description, cfg.MODEL.DEVICE), cfg, metadata)
