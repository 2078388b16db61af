"""Post-processing a few rows of masks at a time, for all results together.

Full-size masks are by far the largest tensors of inference. They are resized and consumed in blocks
of rows, and only for queries that a result needs. A GPU has room for all rows of most images, and
resizes them in one step. Areas of all panoptic segments take one host sync.

Shape letters: Q queries, K classes, S kept queries, N instances, H W pixels.
"""

import functools
import math
from collections.abc import Collection
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..modeling.postprocessing import boxes_of
from ..utils.shape_cache import cached_by_shape
from .point_sampling import max_elements

# Mask logits per block of rows: few enough for a CPU's cache, enough to keep a GPU busy.
_MAX_LOGITS = {"cpu": 2**21, "cuda": 2**27}
# Output columns per matrix product. The matrix is banded, so each block reads few input columns.
_COLUMNS = 160


class ResizedMasks:
    """Mask logits of one image at output size; rows are computed on demand.

    Plain inference resizes masks to the padded batch, crops the image and, if the output has
    another size, resizes once more. Along each axis this is one matrix with few entries per row.

    Args:
        masks: (Q, h, w) logits as predicted.
        padded: height and width of the padded batch.
        image: height and width of the image in it.
        output: height and width of the result.
    """

    def __init__(
        self,
        masks: Tensor,
        padded: tuple[int, int],
        image: tuple[int, int],
        output: tuple[int, int],
    ):
        # Sums of half precision logits are computed in fp32.
        self._masks = masks.to(torch.promote_types(masks.dtype, torch.float32))
        self._sizes = padded, image, output
        self.shape = torch.Size((len(masks), *output))
        self.dtype, self.device = self._masks.dtype, masks.device

    @functools.cached_property
    def _axes(self) -> list["_AxisMatrix"]:
        """The matrices of resizing down and across."""
        lengths = zip(self._masks.shape[1:], *self._sizes, strict=True)
        return [_axis_matrix(*x, self.dtype, self._masks.device) for x in lengths]

    def fit(self, num_queries: int, limit: int) -> bool:
        """Whether `full` makes no tensor of more elements than the limit."""
        padded, _, output = self._sizes
        return num_queries * max(math.prod(padded), math.prod(output)) <= limit

    def full(self, queries: Tensor | None = None) -> Tensor:
        """The masks of some or all queries by the plain steps, (Q, H, W)."""
        padded, image, output = self._sizes
        masks = self._masks if queries is None else self._masks.index_select(0, queries)
        masks = F.interpolate(masks[None], padded, mode="bilinear", align_corners=False)[0]
        if image == output:
            return masks[:, : image[0], : image[1]]
        return sem_seg_postprocess(masks, image, *output)

    def rows(self, rows: slice, queries: Tensor | None) -> Tensor:
        """Some rows of the masks of some or all queries, (Q, rows, W)."""
        down, across = self._axes
        weights_down, used = down.block(rows)
        masks = self._masks[:, used]
        masks = masks if queries is None else masks.index_select(0, queries)
        wide = masks.new_empty(*masks.shape[:2], self.shape[2])
        for start in range(0, self.shape[2], _COLUMNS):
            columns = slice(start, min(start + _COLUMNS, self.shape[2]))
            weights, used = across.block(columns)
            wide[..., columns] = masks[..., used] @ weights.T
        return weights_down.expand(len(masks), -1, -1) @ wide


class _AxisMatrix:
    """Resizing of one axis as a matrix (length of output, length of input).

    Args:
        matrix: float64, on the host.
        dtype: of the products.
        device: of the products.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype, device: torch.device):
        used = matrix != 0
        self._first = used.int().argmax(1).tolist()
        self._last = (matrix.shape[1] - used.flip(1).int().argmax(1)).tolist()
        self._matrix = matrix.to(device, dtype)

    def block(self, outputs: slice) -> tuple[Tensor, slice]:
        """Matrix block for some outputs, and the range of inputs that they depend on."""
        inputs = slice(self._first[outputs.start], self._last[outputs.stop - 1])
        return self._matrix[outputs, inputs], inputs


@cached_by_shape(maxsize=8)
def _axis_matrix(
    length: int, padded: int, image: int, output: int, dtype: torch.dtype, device: torch.device
) -> _AxisMatrix:
    basis = torch.eye(length, dtype=torch.float64)[None]
    basis = F.interpolate(basis, size=padded, mode="linear", align_corners=False)[..., :image]
    basis = F.interpolate(basis, size=output, mode="linear", align_corners=False)
    return _AxisMatrix(basis[0].T, dtype, device)


class Result(Protocol):
    """A result that is assembled from rows of masks.

    Attributes:
        queries: the queries whose masks it needs, int64 indices in ascending order; None for all.
    """

    queries: Tensor | None

    def add(self, rows: slice, logits: Tensor, probabilities: Tensor) -> None:
        """Add some rows of the masks of `queries`, (Q, rows, W) logits and their sigmoid."""

    def finish(self) -> Any:
        """The result, once all rows were added."""


class SemanticResult:
    """A `Result`, see `postprocessing.semantic_inference`.

    Args:
        mask_cls: (Q, K+1) class logits, no-object last.
        shape: Q, H and W of the result; larger masks are cropped at the right and below.
    """

    queries: Tensor | None = None

    def __init__(self, mask_cls: Tensor, shape: torch.Size):
        self._probabilities = mask_cls.softmax(dim=-1)[:, :-1].T  # (K, Q)
        self._scores = mask_cls.new_empty(len(self._probabilities), *shape[1:])

    def add(self, rows: slice, logits: Tensor, probabilities: Tensor) -> None:
        height, width = self._scores.shape[1:]
        probabilities = probabilities[:, : max(0, height - rows.start), :width]
        scores = self._probabilities @ probabilities.flatten(1)
        self._scores[:, rows] = scores.unflatten(1, probabilities.shape[1:])

    def finish(self) -> Tensor:
        return self._scores


class PanopticResult:
    """A `Result`, see `postprocessing.panoptic_inference`."""

    def __init__(
        self,
        mask_cls: Tensor,
        shape: torch.Size,
        thing_ids: Collection[int],
        object_mask_threshold: float,
        overlap_threshold: float,
        *,
        with_scores: bool = False,
    ):
        self._thing_ids = thing_ids
        self._with_scores = with_scores
        self._overlap_threshold = overlap_threshold
        scores, labels = mask_cls.softmax(dim=-1).max(-1)
        keep = labels.ne(mask_cls.shape[-1] - 1) & (scores > object_mask_threshold)
        self.queries = keep.nonzero()[:, 0]
        self._scores = scores[self.queries].view(-1, 1, 1)
        self._classes: list[int] = labels[self.queries].tolist()
        # For each pixel 2 · owner, plus 1 inside the owner's mask.
        self._pixels = torch.zeros(shape[1:], dtype=torch.int32, device=mask_cls.device)
        self._areas = torch.zeros(len(self._classes), dtype=torch.int64, device=mask_cls.device)

    def add(self, rows: slice, logits: Tensor, probabilities: Tensor) -> None:
        owner = (self._scores * probabilities).max(0, keepdim=True)[1]
        inside = probabilities.gather(0, owner) >= 0.5
        self._pixels[rows] = (2 * owner + inside)[0]
        self._areas += (probabilities >= 0.5).flatten(1).sum(1)

    def finish(self) -> tuple[Tensor, list[dict[str, Any]]]:
        segments_info: list[dict[str, Any]] = []
        num_kept = len(self._classes)
        if not num_kept or self._pixels.numel() == 0:
            return torch.zeros_like(self._pixels), segments_info

        # One host sync for the areas of all segments.
        counts = torch.bincount(self._pixels.flatten(), minlength=2 * num_kept).view(-1, 2)
        areas = torch.column_stack((counts, self._areas)).tolist()
        scores = self._scores.flatten().tolist() if self._with_scores else [0.0] * num_kept
        segment_of_pixel = [0] * (2 * num_kept)
        segment_of_stuff: dict[int, int] = {}
        for query, (category, score, (outside, visible, original)) in enumerate(
            zip(self._classes, scores, areas, strict=True)
        ):
            if visible == 0 or (outside + visible) / original < self._overlap_threshold:
                continue
            is_thing = category in self._thing_ids
            if not is_thing and category in segment_of_stuff:
                segment_of_pixel[2 * query + 1] = segment_of_stuff[category]
                if self._with_scores:
                    merged = segments_info[segment_of_stuff[category] - 1]
                    merged["score"] = max(merged["score"], score)
                continue
            segment = len(segments_info) + 1
            segment_of_pixel[2 * query + 1] = segment
            if not is_thing:
                segment_of_stuff[category] = segment
            segments_info.append({"id": segment, "isthing": is_thing, "category_id": category})
            if self._with_scores:
                segments_info[-1]["score"] = score
        lookup = torch.tensor(segment_of_pixel, dtype=torch.int32, device=self._pixels.device)
        return lookup[self._pixels], segments_info


class InstanceResult:
    """A `Result`, see `postprocessing.instance_inference`."""

    def __init__(
        self,
        mask_cls: Tensor,
        shape: torch.Size,
        topk: int,
        thing_ids: Collection[int] | None,
        *,
        with_boxes: bool = False,
    ):
        scores = mask_cls.softmax(dim=-1)[:, :-1]
        num_queries, num_classes = scores.shape
        scores, pairs = scores.flatten().topk(min(topk, num_queries * num_classes), sorted=False)
        classes = pairs % num_classes
        queries = torch.div(pairs, num_classes, rounding_mode="floor")
        if thing_ids is not None:
            things = torch.tensor(sorted(thing_ids), dtype=classes.dtype, device=classes.device)
            # Integer indices: each indexing by booleans would be a host sync.
            keep = torch.isin(classes, things).nonzero()[:, 0]
            scores, classes, queries = scores[keep], classes[keep], queries[keep]
        self.queries, self._mask_of_instance = queries.unique(return_inverse=True)
        self._scores, self._classes = scores, classes
        self._masks = scores.new_empty(len(scores), *shape[1:], dtype=torch.float32)
        # Over the foreground of each mask.
        self._areas = scores.new_zeros(len(self.queries), dtype=torch.float64)
        self._sums = torch.zeros_like(self._areas)
        # Whether rows and columns of each mask have foreground.
        self._extents: tuple[Tensor, Tensor] | None = None
        if with_boxes:
            sizes = ((len(self.queries), length) for length in shape[1:])
            rows, columns = (self._areas.new_zeros(size, dtype=torch.bool) for size in sizes)
            self._extents = rows, columns

    def add(self, rows: slice, logits: Tensor, probabilities: Tensor) -> None:
        # Write the comparison directly as float to avoid an extra pass.
        foreground = torch.empty_like(logits, dtype=self._masks.dtype)
        torch.gt(logits.detach(), 0, out=foreground)
        torch.index_select(foreground, 0, self._mask_of_instance, out=self._masks[:, rows])
        if self._extents is not None and foreground.numel():
            self._extents[0][:, rows] = foreground.amax(2) > 0
            self._extents[1].logical_or_(foreground.amax(1) > 0)
        self._areas += foreground.flatten(1).sum(1)
        self._sums = self._sums + (probabilities * foreground).flatten(1).sum(1)

    def finish(self) -> Instances:
        result = Instances(tuple(self._masks.shape[1:]))
        result.pred_masks = self._masks
        result.pred_boxes = Boxes(torch.zeros(len(self._masks), 4))
        if self._extents is not None:
            result.pred_boxes = boxes_of(*(x[self._mask_of_instance] for x in self._extents))
        mask_scores = (self._sums / (self._areas + 1e-6)).to(self._scores.dtype)
        result.scores = self._scores * mask_scores[self._mask_of_instance]
        result.pred_classes = self._classes
        return result


def stream_rows(masks: ResizedMasks, results: Collection[Result]) -> None:
    """Add all rows of the masks to every result, some at a time."""
    results = [r for r in results if r.queries is None or len(r.queries)]
    num_queries, height, width = masks.shape
    if not results:
        return
    needed = None
    if all(r.queries is not None for r in results):
        needed = torch.cat([r.queries for r in results]).unique()
        num_queries = len(needed)
    # Position of each result's queries among the needed ones; None if it needs exactly these.
    places = [
        None
        if r.queries is None or len(r.queries) == num_queries
        else r.queries
        if needed is None
        else torch.searchsorted(needed, r.queries)
        for r in results
    ]
    limit = max_elements(_MAX_LOGITS, masks.device)
    # Products of banded matrices are faster than resizing on a CPU, and need no full-size masks.
    in_one_step = masks.device.type != "cpu" and masks.fit(num_queries, limit)
    step = max(1, height if in_one_step else limit // max(1, num_queries * width))
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        logits = masks.full(needed) if in_one_step else masks.rows(rows, needed)
        probabilities = logits.sigmoid()
        for result, place in zip(results, places, strict=True):
            if place is None:
                result.add(rows, logits, probabilities)
            else:
                result.add(
                    rows, logits.index_select(0, place), probabilities.index_select(0, place)
                )
