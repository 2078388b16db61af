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
from tqdm import tqdm

from ..data.formats.windows import ImageWindows
from ..utils.instance_masks import InstanceMasks
from ..utils.tile_grid import check_tile_size, tile_grid
from .result import InstanceResult, PanopticResult, Result, Segment
from .tile_instances import ImageInstance, InstanceMerger
from .tile_merging import PanopticMerger, SemanticMerger

# Tiles (H, W, C) uint8 of one size → the model's outputs for each, see `MaskFormer.forward`.
RunTiles = Callable[[list[np.ndarray]], list[dict[str, Any]]]


class TiledOutputs(NamedTuple):
    """What a model predicts for an image, of the tasks that it has turned on.

    Attributes:
        instances: in descending score order.
        panoptic: the map (H, W) int32 and segments with `id`, `category_id`, `isthing`, `area`, and
            `score` if the model gives one.
        semantic: labels (H, W), of the smallest unsigned integers that hold them.
    """

    instances: InstanceResult | None
    panoptic: tuple[np.ndarray, list[dict[str, Any]]] | None
    semantic: np.ndarray | None


def tile_overlap(tile_size: int, overlap: int | None) -> int:
    """The overlap of tiles in pixels: a quarter of their size if it is None.

    Raises:
        ValueError: see `check_tile_size`.
    """
    if overlap is None and isinstance(tile_size, int):
        overlap = tile_size // 4
    check_tile_size(tile_size, 0 if overlap is None else overlap)
    assert overlap is not None
    return overlap


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
                    pred = output["instances"]
                    masks = (pred.pred_masks >= 0.5).cpu().numpy()
                    labels, scores = pred.pred_classes.cpu(), pred.scores.float().cpu()
                    instances.add(tile, masks, labels.numpy(), scores.numpy())
            bar.update(len(batch))
    return TiledOutputs(
        None
        if instances is None
        else _instance_result(instances.finish(max_instances, min_score), image.size),
        None if panoptic is None else (panoptic.segment_ids, panoptic.finish()),
        None if semantic is None else semantic.labels,
    )


def _instance_result(instances: list[ImageInstance], size: tuple[int, int]) -> InstanceResult:
    masks = InstanceMasks([x.crop for x in instances], [x.offset for x in instances], size)
    scores = np.array([x.score for x in instances], dtype=np.float32)
    return InstanceResult(masks, scores, np.array([x.label for x in instances], dtype=np.int64))


def predict_in_tiles(
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
    overlap = tile_overlap(tile_size, overlap)
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
