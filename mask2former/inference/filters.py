"""Removes predictions that are of no use: unsure, duplicate, small or scattered ones.

Every filter is off by default, so that a result is what the model predicts.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.label_maps import count_ids
from .overlaps import (
    fill_fragments,
    mask_nms,
    without_fragments,
    without_segment_fragments,
)

if TYPE_CHECKING:
    from .result import InstanceResult, PanopticResult, Result


@dataclass(frozen=True)
class PredictionFilter:
    """What to remove from a result.

    Filters run in the order of the attributes. An instance without pixels left is removed; pixels
    of a removed panoptic segment become 0, no segment; ids of the others stay.

    Attributes:
        min_score: instances and panoptic segments of a lower score are removed, from 0 to 1. Before
            it MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD has left out panoptic segments.
        min_score_per_class: replaces `min_score` for some classes: class name or label → score.
        min_fragment: connected parts of fewer pixels are removed from the masks of instances and
            panoptic segments; in a semantic map they get the label around them, see
            `fill_fragments`. Pixels that touch at a corner are connected.
        min_area: instances and panoptic segments of fewer pixels are removed.
        mask_nms: of instances of one class whose masks have a larger intersection over union, only
            that of the highest score stays. From 0 to 1.
        class_agnostic_nms: `mask_nms` also compares instances of different classes.
        top_k: only that many instances stay, those of the highest scores.
    """

    min_score: float | None = None
    min_score_per_class: Mapping[str | int, float] | None = None
    min_fragment: int | None = None
    min_area: int | None = None
    mask_nms: float | None = None
    class_agnostic_nms: bool = False
    top_k: int | None = None

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value is out of range.
        """
        if not isinstance(self.min_score_per_class or {}, Mapping):
            raise ValueError(
                f"min_score_per_class is {self.min_score_per_class!r}; allowed: a mapping such as "
                '{"person": 0.7}'
            )
        fractions = {"min_score": self.min_score, "mask_nms": self.mask_nms}
        for key, score in (self.min_score_per_class or {}).items():
            fractions[f"min_score_per_class[{key!r}]"] = score
        for name, value in fractions.items():
            if value is not None and not (_is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name} is {value!r}; allowed: 0 to 1")
        counts = {"min_fragment": self.min_fragment, "min_area": self.min_area, "top_k": self.top_k}
        for name, count in counts.items():
            is_count = isinstance(count, int | np.integer) and not isinstance(count, bool)
            if count is not None and not (is_count and count >= 0):
                raise ValueError(f"{name} is {count!r}; allowed: whole numbers from 0 on")
        if self.class_agnostic_nms and self.mask_nms is None:
            raise ValueError("class_agnostic_nms is for mask_nms: set it too")

    def check(self, class_names: tuple[str, ...]) -> None:
        """Check that a model has the classes of `min_score_per_class`.

        Raises:
            ValueError: it does not have one of them.
        """
        self._thresholds(class_names)

    def apply(self, result: "Result") -> "Result":
        """A result without what is removed; the given one stays as it is.

        Raises:
            ValueError: `min_score_per_class` names a class that the result does not have, or the
                panoptic segments have no score to compare.
        """
        thresholds = self._thresholds(result.class_names)
        changes: dict = {}
        if result.instances is not None:
            changes["instances"] = self._instances(result.instances, thresholds)
        if result.panoptic is not None:
            changes["panoptic"] = self._panoptic(result.panoptic, thresholds)
        if result.semantic is not None and self.min_fragment:
            changes["semantic"] = fill_fragments(result.semantic, self.min_fragment)
        return replace(result, **changes)

    def least_score(self, class_names: tuple[str, ...]) -> float:
        """The lowest score that an instance of any class may have."""
        thresholds = self._thresholds(class_names)
        return 0.0 if thresholds is None else float(thresholds.min(initial=1.0))

    def _thresholds(self, class_names: tuple[str, ...]) -> np.ndarray | None:
        """The lowest score of each class, (K,) float32."""
        if self.min_score is None and not self.min_score_per_class:
            return None
        # Scores are float32: one of 0.3 must reach a threshold of 0.3.
        thresholds = np.full(len(class_names), self.min_score or 0.0, np.float32)
        for key, score in (self.min_score_per_class or {}).items():
            thresholds[label_of(key, class_names)] = score
        return thresholds

    def _instances(
        self, instances: "InstanceResult", thresholds: np.ndarray | None
    ) -> "InstanceResult":
        if thresholds is not None:
            instances = instances[instances.scores >= thresholds[instances.labels]]
        if self.min_fragment:
            masks = without_fragments(instances.masks, self.min_fragment)
            instances = replace(instances, masks=masks)
        if self.min_fragment or self.min_area:
            instances = instances[instances.masks.areas() >= max(1, self.min_area or 0)]
        if self.mask_nms is not None:
            labels = None if self.class_agnostic_nms else instances.labels
            instances = instances[
                mask_nms(instances.masks, instances.scores, self.mask_nms, labels)
            ]
        if self.top_k is not None and self.top_k < len(instances):
            best = np.argsort(-instances.scores, kind="stable")[: self.top_k]
            instances = instances[np.sort(best)]
        return instances

    def _panoptic(
        self, panoptic: "PanopticResult", thresholds: np.ndarray | None
    ) -> "PanopticResult":
        ids, segments = panoptic.segment_ids, panoptic.segments
        if thresholds is not None:
            for segment in segments:
                if segment.score is None:
                    raise ValueError(
                        "min_score needs the scores of panoptic segments, but this model does not "
                        "give any: its class overrides `panoptic_inference`. Add `score` to the "
                        "dicts of segments there"
                    )
            segments = [s for s in segments if np.float32(s.score) >= thresholds[s.label]]
            ids = _only(ids, segments)
        if self.min_fragment:
            ids = without_segment_fragments(ids, self.min_fragment)
        if ids is not panoptic.segment_ids or self.min_area:
            areas = count_ids(ids, max((s.id for s in segments), default=0))
            segments = [replace(s, area=int(areas[s.id])) for s in segments]
            segments = [s for s in segments if s.area >= max(1, self.min_area or 0)]
            ids = _only(ids, segments)
        return replace(panoptic, segment_ids=ids, segments=segments)


def _only(ids: np.ndarray, segments: list) -> np.ndarray:
    """Segment ids with 0 where none of the segments is."""
    lookup = np.zeros(int(ids.max(initial=0)) + 1, ids.dtype)
    kept = [segment.id for segment in segments if segment.id < len(lookup)]
    lookup[kept] = kept
    return lookup[ids]


def label_of(key: str | int, class_names: tuple[str, ...]) -> int:
    """The label of a class.

    Args:
        key: its name or its label.
        class_names: K names.

    Raises:
        ValueError: there is no such class, or several have the name.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not 0 <= key < len(class_names):
            raise ValueError(f"there is no class {key}; labels are 0 to {len(class_names) - 1}")
        return int(key)
    labels = [label for label, name in enumerate(class_names) if name == key]
    if len(labels) > 1:
        raise ValueError(f"the classes {labels} are all named {key!r}: name them by label")
    if not labels:
        close = difflib.get_close_matches(str(key), class_names, n=3)
        known = (
            f"did you mean {' or '.join(map(repr, close))}?"
            if close
            else "known: "
            + (", ".join(map(repr, class_names[:10])) + (", ..." if len(class_names) > 10 else ""))
        )
        raise ValueError(f"there is no class {key!r}; {known}")
    return labels[0]


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float | np.integer | np.floating)
    return is_real and not isinstance(value, bool) and math.isfinite(value)
