"""Predicts for images larger than a model takes, and for more objects than it has queries.

    image → overlapping tiles → model → mergers (tile_merging.py, tile_instances.py) → one result

Tiles are read one by one where the format allows it (data/formats/windows.py). Results of the size
of the image are the panoptic map, 4 bytes a pixel, and the semantic map, 1 byte.

K classes, H W pixels of the image.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from tqdm import tqdm

from ..data.augmentations import ResizeShortestEdge
from ..data.formats.bands import image_format_of
from ..data.formats.windows import ImageWindows, open_image
from ..utils.tile_grid import tile_grid
from .masks import InstanceMasks
from .result import InstanceResult, PanopticResult, Result, Segment
from .tile_instances import ImageInstance, InstanceMerger
from .tile_merging import PanopticMerger, SemanticMerger

# Tiles (H, W, C) uint8 of one size → the model's outputs for each, see `MaskFormer.forward`.
RunTiles = Callable[[list[np.ndarray]], list[dict[str, Any]]]


class TiledOutputs(NamedTuple):
    """What a model predicts for an image, of the tasks that it has turned on.

    Attributes:
        instances: in descending score order.
        panoptic: the map (H, W) int32 and segments with `id`, `category_id`, `isthing`, `area`.
        semantic: labels (H, W), of the smallest unsigned integers that hold them.
    """

    instances: InstanceResult | None
    panoptic: tuple[np.ndarray, list[dict[str, Any]]] | None
    semantic: np.ndarray | None


def default_overlap(tile_size: int) -> int:
    """The overlap of tiles in pixels if none is given: a quarter of their size."""
    return tile_size // 4


def predict_tiles(
    run: RunTiles,
    image: ImageWindows,
    tile_size: int,
    overlap: int,
    *,
    batch_size: int = 1,
    max_instances: int | None = None,
    min_score: float = 0.0,
    progress: bool = False,
) -> TiledOutputs:
    """Predict for an image tile by tile.

    Args:
        run: predicts for tiles of one size.
        image: to read the tiles from.
        tile_size: height and width of a tile in pixels of the image.
        overlap: pixels that neighbours share at least, at most half a tile. Objects that two tiles
            see are joined by what both predict there, so it should be as large as small objects.
        batch_size: tiles that run together.
        max_instances: keep those of the highest scores; default: all of all tiles.
        min_score: drop instances of a lower score.
        progress: show a progress bar.

    Raises:
        ValueError: the tiles are too small for the overlap, or an image cannot be read.
    """
    grid = tile_grid(image.size, tile_size, overlap)
    semantic: SemanticMerger | None = None
    panoptic: PanopticMerger | None = None
    instances: InstanceMerger | None = None
    tiles = itertools.chain(*grid)
    num_tiles = len(grid) * len(grid[0])
    with tqdm(total=num_tiles, unit="tile", disable=not progress) as bar:
        while batch := list(itertools.islice(tiles, batch_size)):
            outputs = run([image.read(*tile.window) for tile in batch])
            for tile, output in zip(batch, outputs, strict=True):
                if "sem_seg" in output:
                    scores = output["sem_seg"]
                    semantic = semantic or SemanticMerger(grid, len(scores), overlap)
                    semantic.add(tile, scores)
                if "panoptic_seg" in output:
                    ids, segments = output["panoptic_seg"]
                    panoptic = panoptic or PanopticMerger(grid)
                    panoptic.add(tile, ids.cpu().numpy(), segments)
                if "instances" in output:
                    instances = instances or InstanceMerger(grid)
                    found = output["instances"]
                    masks = (found.pred_masks >= 0.5).cpu().numpy()
                    labels, scores = found.pred_classes.cpu(), found.scores.float().cpu()
                    instances.add(tile, masks, labels.numpy(), scores.numpy())
            bar.update(len(batch))
    return TiledOutputs(
        None
        if instances is None
        else _instance_result(instances.finish(max_instances, min_score), image.size),
        None if panoptic is None else (panoptic.segment_ids, panoptic.finish()),
        None if semantic is None else semantic.labels,
    )


def _instance_result(found: list[ImageInstance], size: tuple[int, int]) -> InstanceResult:
    masks = InstanceMasks([one.crop for one in found], [one.offset for one in found], size)
    scores = np.array([one.score for one in found], dtype=np.float32)
    return InstanceResult(masks, scores, np.array([one.label for one in found], dtype=np.int64))


def predict_tiled(
    predictor: Any,
    image: ImageWindows,
    *,
    tile_size: int,
    overlap: int | None = None,
    batch_size: int = 1,
    max_instances: int | None = None,
    min_score: float = 0.0,
    progress: bool = False,
    file_name: str | None = None,
    keep_image: bool = False,
) -> Result:
    """Predict for an image of any size with a `Predictor`, see `predict_tiles`.

    Args:
        predictor: a `Predictor`.
        image: in the format of the predictor.
        overlap: default: a quarter of the tile size.
        file_name: of the image, for the result.
        keep_image: whether the result keeps the image, as a whole.
    """
    overlap = default_overlap(tile_size) if overlap is None else overlap
    outputs = predict_tiles(
        predictor.outputs,
        image,
        tile_size,
        overlap,
        batch_size=batch_size,
        max_instances=max_instances,
        min_score=min_score,
        progress=progress,
    )
    panoptic = None
    if outputs.panoptic is not None:
        ids, segments = outputs.panoptic
        panoptic = PanopticResult(
            ids,
            [
                Segment(s["id"], s["category_id"], bool(s["isthing"]), s.get("score"), s["area"])
                for s in segments
            ],
        )
    pixels = image.read(slice(0, image.size[0]), slice(0, image.size[1])) if keep_image else None
    return Result(
        image.size,
        predictor.class_names,
        outputs.instances,
        panoptic,
        outputs.semantic,
        file_name,
        None if pixels is None else np.ascontiguousarray(predictor.colours(pixels)),
        predictor.metadata,
    )


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
            found = predict_tiles(
                self._run, image, tiles.SIZE, tiles.OVERLAP, batch_size=tiles.BATCH_SIZE
            )
        result: dict[str, Any] = {}
        if found.semantic is not None:
            result["sem_seg"] = LabelScores(found.semantic, self._num_classes)
        if found.panoptic is not None:
            result["panoptic_seg"] = torch.from_numpy(found.panoptic[0]), found.panoptic[1]
        if found.instances is not None:
            one = found.instances
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
        found = super().__getitem__(index)
        return torch.from_numpy(found) if isinstance(found, np.ndarray) else found


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
