"""Test-time augmentation: average the semantic scores over image sizes and horizontal flips.

    record → image → each size, flipped or not → model → flip back → sum / number

The model resizes its scores to the original image, so they can be added pixel by pixel. A running
sum keeps the memory independent of the number of augmentations.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import DatasetMapperTTA
from fvcore.transforms import HFlipTransform
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .data.formats.bands import image_format_of
from .data.formats.images import read_image
from .maskformer_model import MaskFormer

__all__ = ["SemanticSegmentorWithTTA"]


class SemanticSegmentorWithTTA(nn.Module):
    """A semantic segmentation model whose scores are averaged over augmentations of the image.

    Replaces the model in evaluation: called with records, it returns ``sem_seg`` for each. Panoptic
    and instance inference have no test-time augmentation and are skipped.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: Callable[[dict], Iterable[dict]] | None = None,
        batch_size: int = 1,
    ):
        """
        Args:
            cfg: reads INPUT.FORMAT and, without a `tta_mapper`, TEST.AUG.{MIN_SIZES,MAX_SIZE,FLIP}.
            model: returns ``sem_seg`` in inference; possibly wrapped for distributed training.
            tta_mapper: turns a record with ``image``, ``height`` and ``width`` into augmented
                versions, each with the ``transforms`` applied to it; default: Detectron2's
                `DatasetMapperTTA`. Only resizing and horizontal flips are undone.
            batch_size: maximum number of augmented images per call of the model. A batch has images
                of one size, so that padding does not change the result.

        Raises:
            ValueError: the model's semantic inference is off, or `batch_size` is below 1.
        """
        super().__init__()
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if not getattr(model, "semantic_on", True):
            raise ValueError(
                "test-time augmentation averages semantic scores, but the model has semantic "
                "inference turned off: set MODEL.MASK_FORMER.TEST.SEMANTIC_ON to True"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.cfg = cfg.clone()
        self.model = model
        self.tta_mapper = DatasetMapperTTA(cfg) if tta_mapper is None else tta_mapper
        self.batch_size = batch_size
        # Evaluation restores the mode of this module, and with it that of the model.
        self.training = model.training

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Predict with augmentation.

        Args:
            batched_inputs: for each image a dict with ``image`` (3, H, W) uint8, or else
                ``file_name``; optionally the output's ``height`` and ``width``.

        Returns:
            For each image a dict with ``sem_seg`` (K, height, width), the mean of the scores.

        Raises:
            ValueError: neither ``image`` nor ``file_name``, or the model returns no ``sem_seg``.
        """
        with torch.no_grad(), _semantic_only(self.model):
            return [{"sem_seg": self._mean_scores(self._with_image(x))} for x in batched_inputs]

    def _with_image(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with its image, read upright in the model's format, and the output size."""
        record = dict(record)
        if "image" not in record:
            if "file_name" not in record:
                raise ValueError(f"an input needs 'image' or 'file_name', got {sorted(record)}")
            image = read_image(record["file_name"], image_format_of(self.cfg))  # (H, W, C)
            record["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        height, width = record["image"].shape[1:]
        record.setdefault("height", height)
        record.setdefault("width", width)
        return record

    def _mean_scores(self, record: dict[str, Any]) -> Tensor:
        """(K, height, width) mean over the augmentations of one image."""
        total, count = None, 0
        for batch in _batches(self.tta_mapper(record), self.batch_size):
            transforms = [x.pop("transforms") for x in batch]
            for output, applied in zip(self.model(batch), transforms, strict=True):
                if "sem_seg" not in output:
                    raise ValueError(
                        f"the model returns {sorted(output)} but no 'sem_seg': test-time "
                        "augmentation is for semantic segmentation"
                    )
                scores = output.pop("sem_seg")
                if sum(isinstance(t, HFlipTransform) for t in applied.transforms) % 2:
                    scores = scores.flip(dims=[2])
                # Scores of a large size may be on the CPU, after running out of GPU memory.
                total = scores.clone() if total is None else total.add_(scores.to(total.device))
                count += 1
        if total is None:
            name = record.get("file_name", "an input")
            raise ValueError(f"the TTA mapper returned no images for {name}")
        return total.div_(count)


def _batches(images: Iterable[dict], batch_size: int) -> Iterator[list[dict]]:
    """Consecutive images of the same size, at most `batch_size` of them."""
    batch: list[dict] = []
    for image in images:
        if batch and (
            len(batch) == batch_size or image["image"].shape[1:] != batch[0]["image"].shape[1:]
        ):
            yield batch
            batch = []
        batch.append(image)
    if batch:
        yield batch


@contextmanager
def _semantic_only(model: nn.Module) -> Iterator[None]:
    """Turn off a `MaskFormer`'s panoptic and instance inference, which are not used here."""
    if not isinstance(model, MaskFormer):
        yield
        return
    before = model.panoptic_on, model.instance_on
    model.panoptic_on = model.instance_on = False
    try:
        yield
    finally:
        model.panoptic_on, model.instance_on = before
