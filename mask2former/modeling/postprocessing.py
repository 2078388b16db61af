"""From class and mask logits to semantic, panoptic and instance segmentation.

Over one image (paper, appendix on inference; the panoptic rule is MaskFormer's). Full-size masks
are by far the largest tensors of inference. They are resized and used a few rows at a time, for all
results together, and only those of queries that a result needs.

Shape letters: Q queries, K classes, S kept queries, N instances, H W pixels.
"""

import functools
from collections.abc import Collection
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from .point_sampling import max_elements

# Mask logits made in one go: on a CPU they should stay in its caches, on a GPU keep it busy.
_MAX_LOGITS = {"cpu": 2**21, "cuda": 2**27}
# Columns made by one product: beyond a band around its diagonal, the matrix is zero.
_COLUMNS = 160


class ResizedMasks:
    """Mask logits of one image at the size of the output; rows are made when asked for.

    Published inference resizes masks to the padded batch, cuts the image out and, where the output
    has another size, resizes once more. Along each axis all of that is one matrix with a few
    entries in each row.

    Args:
        masks: (Q, h, w) logits as predicted.
        padded: height and width of the padded batch.
        image: height and width of the image in it.
        output: height and width of the masks wanted.
    """

    def __init__(
        self,
        masks: Tensor,
        padded: tuple[int, int],
        image: tuple[int, int],
        output: tuple[int, int],
    ):
        # Sums of half precision logits are made in fp32.
        self._masks = masks.to(torch.promote_types(masks.dtype, torch.float32))
        self._sizes = padded, image, output
        self._down, self._across = (
            _axis_matrix(*lengths, self._masks.dtype, masks.device)
            for lengths in zip(masks.shape[1:], padded, image, output, strict=True)
        )
        self.shape = torch.Size((len(masks), *output))
        self.dtype, self.device = self._masks.dtype, masks.device

    def full(self) -> Tensor:
        """All of them, by the published steps, (Q, H, W)."""
        padded, image, output = self._sizes
        masks = F.interpolate(self._masks[None], padded, mode="bilinear", align_corners=False)[0]
        return sem_seg_postprocess(masks, image, *output)

    def rows(self, rows: slice, queries: Tensor | None) -> Tensor:
        """Some rows of the masks of some or all queries, (Q, rows, W)."""
        down, used = self._down.block(rows)
        masks = self._masks[:, used]
        masks = masks if queries is None else masks.index_select(0, queries)
        wide = masks.new_empty(*masks.shape[:2], self.shape[2])
        for start in range(0, self.shape[2], _COLUMNS):
            columns = slice(start, min(start + _COLUMNS, self.shape[2]))
            across, used = self._across.block(columns)
            wide[..., columns] = masks[..., used] @ across.T
        return down.expand(len(masks), -1, -1) @ wide


class _GivenMasks:
    """The interface of `ResizedMasks` over masks that have the wanted size."""

    def __init__(self, masks: Tensor):
        self._masks = masks
        self.shape = masks.shape
        self.device = masks.device

    def rows(self, rows: slice, queries: Tensor | None) -> Tensor:
        masks = self._masks[:, rows]
        return masks if queries is None else masks[queries]


class _AxisMatrix:
    """How the published steps resize one axis, as a matrix (length of output, of input).

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
        """The rows of some outputs, and the inputs that these need."""
        inputs = slice(self._first[outputs.start], self._last[outputs.stop - 1])
        return self._matrix[outputs, inputs], inputs


@functools.lru_cache(maxsize=8)
def _axis_matrix(
    length: int, padded: int, image: int, output: int, dtype: torch.dtype, device: torch.device
) -> _AxisMatrix:
    # A tensor made in inference mode could not be used with gradients afterwards.
    with torch.inference_mode(False), torch.no_grad():
        basis = torch.eye(length, dtype=torch.float64)[None]
        basis = F.interpolate(basis, size=padded, mode="linear", align_corners=False)[..., :image]
        basis = F.interpolate(basis, size=output, mode="linear", align_corners=False)
        return _AxisMatrix(basis[0].T, dtype, device)


class Result(Protocol):
    """A result that is put together while rows of masks pass by.

    Attributes:
        queries: whose masks it needs: None for all, else int64 indices, ascending.
    """

    queries: Tensor | None

    def add(self, rows: slice, logits: Tensor, probabilities: Tensor) -> None:
        """Take some rows of the masks of `queries`, (Q, rows, W) logits and their sigmoid."""

    def finish(self) -> Any:
        """The result, when all rows have passed."""


class SemanticResult:
    """A `Result`, see `semantic_inference`.

    Args:
        mask_cls: (Q, K+1) class logits, no-object last.
        shape: Q, H and W of the result; what larger masks have to the right and below is cut off.
    """

    queries = None

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
    """A `Result`, see `panoptic_inference`."""

    def __init__(
        self,
        mask_cls: Tensor,
        shape: torch.Size,
        thing_ids: Collection[int],
        object_mask_threshold: float,
        overlap_threshold: float,
    ):
        self._thing_ids = thing_ids
        self._overlap_threshold = overlap_threshold
        scores, labels = mask_cls.softmax(dim=-1).max(-1)
        keep = labels.ne(mask_cls.shape[-1] - 1) & (scores > object_mask_threshold)
        self.queries = keep.nonzero()[:, 0]
        self._scores = scores[self.queries].view(-1, 1, 1)
        self._classes: list[int] = labels[self.queries].tolist()
        # For each pixel 2 · winner, plus 1 where the winner's own mask covers it.
        self._pixels = torch.zeros(shape[1:], dtype=torch.int32, device=mask_cls.device)
        self._areas = torch.zeros(len(self._classes), dtype=torch.int64, device=mask_cls.device)

    def add(self, rows: slice, logits: Tensor, probabilities: Tensor) -> None:
        winner = (self._scores * probabilities).max(0, keepdim=True)[1]
        inside = probabilities.gather(0, winner) >= 0.5
        self._pixels[rows] = (2 * winner + inside)[0]
        self._areas += (probabilities >= 0.5).flatten(1).sum(1)

    def finish(self) -> tuple[Tensor, list[dict[str, Any]]]:
        segments_info: list[dict[str, Any]] = []
        num_kept = len(self._classes)
        if not num_kept or self._pixels.numel() == 0:
            return torch.zeros_like(self._pixels), segments_info

        # One copy to the host for the areas of all segments.
        counts = torch.bincount(self._pixels.flatten(), minlength=2 * num_kept).view(-1, 2)
        areas = torch.column_stack((counts, self._areas)).tolist()
        segment_of_pixel = [0] * (2 * num_kept)
        segment_of_stuff: dict[int, int] = {}
        for query, (category, (outside, visible, original)) in enumerate(
            zip(self._classes, areas, strict=True)
        ):
            if visible == 0 or (outside + visible) / original < self._overlap_threshold:
                continue
            is_thing = category in self._thing_ids
            if not is_thing and category in segment_of_stuff:
                segment_of_pixel[2 * query + 1] = segment_of_stuff[category]
                continue
            segment = len(segments_info) + 1
            segment_of_pixel[2 * query + 1] = segment
            if not is_thing:
                segment_of_stuff[category] = segment
            segments_info.append({"id": segment, "isthing": is_thing, "category_id": category})
        lookup = torch.tensor(segment_of_pixel, dtype=torch.int32, device=self._pixels.device)
        return lookup[self._pixels], segments_info


class InstanceResult:
    """A `Result`, see `instance_inference`."""

    def __init__(
        self, mask_cls: Tensor, shape: torch.Size, topk: int, thing_ids: Collection[int] | None
    ):
        scores = mask_cls.softmax(dim=-1)[:, :-1]
        num_queries, num_classes = scores.shape
        scores, pairs = scores.flatten().topk(min(topk, num_queries * num_classes), sorted=False)
        classes = pairs % num_classes
        queries = torch.div(pairs, num_classes, rounding_mode="floor")
        if thing_ids is not None:
            things = torch.tensor(sorted(thing_ids), dtype=classes.dtype, device=classes.device)
            # As indices: reading by booleans would wait for a GPU each time.
            keep = torch.isin(classes, things).nonzero()[:, 0]
            scores, classes, queries = scores[keep], classes[keep], queries[keep]
        self.queries, self._mask_of_instance = queries.unique(return_inverse=True)
        self._scores, self._classes = scores, classes
        self._masks = scores.new_empty(len(scores), *shape[1:], dtype=torch.float32)
        # Of each mask's foreground.
        self._areas = scores.new_zeros(len(self.queries), dtype=torch.float64)
        self._sums = torch.zeros_like(self._areas)

    def add(self, rows: slice, logits: Tensor, probabilities: Tensor) -> None:
        # Compared straight into numbers: a mask of booleans would be a pass more.
        foreground = torch.empty_like(logits, dtype=self._masks.dtype)
        torch.gt(logits.detach(), 0, out=foreground)
        torch.index_select(foreground, 0, self._mask_of_instance, out=self._masks[:, rows])
        self._areas += foreground.flatten(1).sum(1)
        self._sums = self._sums + (probabilities * foreground).flatten(1).sum(1)

    def finish(self) -> Instances:
        result = Instances(tuple(self._masks.shape[1:]))
        result.pred_masks = self._masks
        result.pred_boxes = Boxes(torch.zeros(len(self._masks), 4))
        mask_scores = (self._sums / (self._areas + 1e-6)).to(self._scores.dtype)
        result.scores = self._scores * mask_scores[self._mask_of_instance]
        result.pred_classes = self._classes
        return result


def pass_rows(masks: ResizedMasks | _GivenMasks, results: Collection[Result]) -> None:
    """Give all rows of the masks to every result, some at a time."""
    results = [r for r in results if r.queries is None or len(r.queries)]
    num_queries, height, width = masks.shape
    if not results:
        return
    needed = None
    if all(r.queries is not None for r in results):
        needed = torch.cat([r.queries for r in results]).unique()
        num_queries = len(needed)
    # Where each result's queries are among the needed ones; None where it needs just these.
    places = [
        None
        if r.queries is None or len(r.queries) == num_queries
        else r.queries
        if needed is None
        else torch.searchsorted(needed, r.queries)
        for r in results
    ]
    limit = max_elements(_MAX_LOGITS, masks.device)
    step = max(1, limit // max(1, num_queries * width))
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        logits = masks.rows(rows, needed)
        probabilities = logits.sigmoid()
        for result, place in zip(results, places, strict=True):
            if place is None:
                result.add(rows, logits, probabilities)
            else:
                result.add(
                    rows, logits.index_select(0, place), probabilities.index_select(0, place)
                )


def semantic_inference(mask_cls: Tensor, mask_pred: Tensor) -> Tensor:
    """Marginalise over queries: class probability times mask probability, summed.

    Args:
        mask_cls: (Q, K+1) class logits, no-object last.
        mask_pred: (Q, H, W) mask logits.

    Returns:
        (K, H, W) scores, not normalised.
    """
    result = SemanticResult(mask_cls, mask_pred.shape)
    pass_rows(_GivenMasks(mask_pred), [result])
    return result.finish()


def panoptic_inference(
    mask_cls: Tensor,
    mask_pred: Tensor,
    thing_ids: Collection[int],
    object_mask_threshold: float,
    overlap_threshold: float,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Give every pixel to the query with the highest class × mask probability, then filter.

    Queries count when their class is not no-object and its probability is above
    ``object_mask_threshold``. A query's segment is dropped when the part of its mask (probability
    at least one half) that it won is below ``overlap_threshold``. Segments of the same stuff class
    are merged.

    Args:
        mask_cls: (Q, K+1) class logits, no-object last.
        mask_pred: (Q, H, W) mask logits.
        thing_ids: contiguous ids of the thing classes.
        object_mask_threshold: in [0, 1].
        overlap_threshold: in [0, 1].

    Returns:
        (H, W) int32 segment ids, 0 where there is none, and for each segment a dict with ``id``
        (from 1), ``isthing`` and ``category_id`` (contiguous).
    """
    result = PanopticResult(
        mask_cls, mask_pred.shape, thing_ids, object_mask_threshold, overlap_threshold
    )
    pass_rows(_GivenMasks(mask_pred), [result])
    return result.finish()


def instance_inference(
    mask_cls: Tensor,
    mask_pred: Tensor,
    topk: int,
    thing_ids: Collection[int] | None = None,
) -> Instances:
    """The ``topk`` most probable (query, class) pairs as instances.

    The score is class probability × mean mask probability over the mask's foreground.

    Args:
        mask_cls: (Q, K+1) class logits, no-object last.
        mask_pred: (Q, H, W) mask logits.
        topk: how many pairs to take, before classes are filtered.
        thing_ids: contiguous ids of the classes to keep; all when None.

    Returns:
        Instances with ``pred_masks`` (N, H, W) float 0 or 1, ``pred_boxes`` (zeros: masks are the
        prediction), ``scores`` (N,) and ``pred_classes`` (N,), in no particular order.
    """
    result = InstanceResult(mask_cls, mask_pred.shape, topk, thing_ids)
    pass_rows(_GivenMasks(mask_pred), [result])
    return result.finish()
