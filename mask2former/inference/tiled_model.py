"""A model that evaluators call with whole images and that predicts in tiles, for TEST.TILES.

K classes, H W pixels of the image.
"""

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..data.augmentations import ResizeShortestEdge
from ..data.formats.bands import image_format_of
from ..data.formats.windows import open_image
from ..utils.instance_masks import InstanceMasks
from .tiles import predict_tiles


class TiledModel(nn.Module):
    """A model whose inputs are files of images, for evaluators that know records only.

    It takes records with `file_name` and returns what `MaskFormer` returns, but `sem_seg` is a
    `LabelScores` and the `pred_masks` of instances are `InstanceMasks`.
    """

    def __init__(self, model: nn.Module, cfg: CfgNode) -> None:
        """
        Args:
            model: in evaluation mode.
            cfg: its config, with TEST.TILES.
        """
        super().__init__()
        self.model = model
        self._tiles = cfg.TEST.TILES
        self._format = image_format_of(cfg)
        self._resize = ResizeShortestEdge(
            cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice"
        )
        self._boxes_on = cfg.TEST.BOXES
        self._num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES

    def forward(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Raises:
            FileNotFoundError, ValueError: an image cannot be read, or has another size than its
                record.
        """
        return [self._predict(record) for record in records]

    def _predict(self, record: dict[str, Any]) -> dict[str, Any]:
        tiles = self._tiles
        with open_image(record["file_name"], self._format) as image:
            known = record.get("height", image.size[0]), record.get("width", image.size[1])
            if known != image.size:
                raise ValueError(
                    f"{record['file_name']} has (height, width) {image.size}, but its record has "
                    f"{known}"
                )
            outputs = predict_tiles(
                self._run, image, tiles.SIZE, tiles.OVERLAP, batch_size=tiles.BATCH_SIZE
            )
        result: dict[str, Any] = {}
        if outputs.semantic is not None:
            result["sem_seg"] = LabelScores(outputs.semantic, self._num_classes)
        if outputs.panoptic is not None:
            result["panoptic_seg"] = torch.from_numpy(outputs.panoptic[0]), outputs.panoptic[1]
        if outputs.instances is not None:
            one = outputs.instances
            boxes = torch.zeros(len(one), 4)
            if self._boxes_on:
                boxes = torch.from_numpy(one.masks.boxes())
            result["instances"] = Instances(
                image.size,
                pred_masks=_TensorMasks(one.masks.crops, one.masks.offsets, image.size),
                pred_boxes=Boxes(boxes),
                scores=torch.from_numpy(one.scores),
                pred_classes=torch.from_numpy(one.labels),
            )
        return result

    def _run(self, tiles: list[np.ndarray]) -> list[dict[str, Any]]:
        inputs = []
        for tile in tiles:
            resized = self._resize.get_transform(tile).apply_image(tile)
            image = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
            inputs.append({"image": image, "height": tile.shape[0], "width": tile.shape[1]})
        return self.model(inputs)


class _TensorMasks(InstanceMasks):
    """A single mask is a tensor (H, W) bool, as evaluators of other projects read it."""

    def __getitem__(self, index: Any) -> Any:
        masks = super().__getitem__(index)
        return torch.from_numpy(masks) if isinstance(masks, np.ndarray) else masks


class LabelScores:
    """Stands for scores (K, H, W) of which only the best class of each pixel is known.

    Evaluators take the argmax over classes, and nothing else.
    """

    device = torch.device("cpu")

    def __init__(self, labels: np.ndarray, num_classes: int) -> None:
        self._labels = torch.from_numpy(labels.astype(np.int64))
        self.shape = torch.Size((num_classes, *labels.shape))
        self.dtype = self._labels.dtype

    def argmax(self, dim: int) -> Tensor:
        """The labels (H, W) int64."""
        if dim != 0:
            raise ValueError(f"only the argmax over classes, dim 0, is known, not over dim {dim}")
        return self._labels
