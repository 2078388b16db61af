"""Composes the panoptic annotation of an image from objects, which may overlap, and a label map.

From bottom to top: void, stuff of the label map, stuff drawn as objects, crowds, objects. Where
objects overlap, either the smaller one is on top ("area") or the later one ("order"); the same
among crowds and among stuff.

H W pixels of the image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from scipy import ndimage

from ..formats.annotated_images import Segmentation, encode
from ..formats.coco_schemas import Id
from ..label_maps import count_values, present_values

Overlap = Literal["area", "order"]
Unassigned = Literal["void", "crowd"]

# Multiples of an odd number modulo 2^24 are distinct, and the colours of successive ones differ.
_ID_STEP, _NUM_IDS = 0x9E3779, 1 << 24


class PlacedObject(NamedTuple):
    """An object, a region with several that are not told apart, or a region of stuff.

    Attributes:
        id: of its annotation.
        category_id: of its class.
        segmentation: its mask.
        is_crowd: whether it is a region with several objects.
    """

    id: Id
    category_id: Id
    segmentation: Segmentation
    is_crowd: bool = False


@dataclass(frozen=True)
class Rules:
    """How an image is composed.

    Attributes:
        overlap: "area": larger objects are below smaller ones, by the pixels of their masks, and
            earlier ones below later ones of the same size. "order": earlier ones are below later
            ones.
        min_area: segments with fewer visible pixels become void.
        stuff_ids: category ids of stuff; its objects in an image become one segment.
        stuff: label → category id of a stuff class.
        things: label → category id of a thing class.
        void: labels of pixels without a class.
        unassigned: what pixels with a thing's label become where no object is: void, or with the
            crowds of the class a crowd.
        background: category id of the stuff that fills images without a label map; None: void.
    """

    overlap: Overlap = "area"
    min_area: int = 1
    stuff_ids: frozenset[Id] = frozenset()
    stuff: Mapping[int, Id] = field(default_factory=dict)
    things: Mapping[int, Id] = field(default_factory=dict)
    void: frozenset[int] = frozenset()
    unassigned: Unassigned = "void"
    background: Id | None = None


@dataclass
class PanopticImage:
    """The panoptic annotation of an image.

    Attributes:
        ids: (H, W) int32 segment ids; 0 is void.
        segments: as in COCO panoptic JSON: `id`, `category_id`, `area`, `bbox`, `iscrowd`. Areas
            and boxes are those of the visible pixels.
        empty: ids of objects whose masks cover no pixel.
        hidden: ids of objects without a visible pixel, because others cover them.
        small: ids of objects that became void, because fewer than `min_area` pixels are visible.
        unassigned: category id → pixels with the label of this thing where no object is.
    """

    ids: np.ndarray
    segments: list[dict[str, Any]]
    empty: list[Id] = field(default_factory=list)
    hidden: list[Id] = field(default_factory=list)
    small: list[Id] = field(default_factory=list)
    unassigned: dict[Id, int] = field(default_factory=dict)


class _Segments:
    """The segments of an image, numbered from 1."""

    def __init__(self) -> None:
        self.classes: list[tuple[Id, bool]] = []  # category id, whether it is a crowd
        self.object_ids: list[list[Id]] = []
        self._shared: dict[tuple[Id, bool], int] = {}

    def add(self, category_id: Id, is_crowd: bool = False) -> int:
        self.classes.append((category_id, is_crowd))
        self.object_ids.append([])
        return len(self.classes)

    def shared(self, category_id: Id, is_crowd: bool = False) -> int:
        """The one segment of a stuff class, or of the crowds of a thing class.

        The official evaluation knows one crowd of a class and image.
        """
        key = (category_id, is_crowd)
        if key not in self._shared:
            self._shared[key] = self.add(category_id, is_crowd)
        return self._shared[key]


def compose(
    size: tuple[int, int],
    objects: Sequence[PlacedObject],
    rules: Rules,
    labels: np.ndarray | None = None,
) -> PanopticImage:
    """Compose the panoptic annotation of an image.

    Args:
        size: (H, W).
        objects: in the order of their file.
        rules: how.
        labels: (H, W) integers, the label map, if there is one.

    Raises:
        ValueError: the label map has another size, or labels that the rules do not know.
    """
    segments = _Segments()
    owners = np.zeros(size, np.int32)  # number of the segment of each pixel; 0 is void
    if labels is not None:
        owners = _paint_labels(labels, size, rules, segments)
    elif rules.background is not None:
        owners[:] = segments.shared(rules.background)
    covered = np.zeros(size, bool)  # by objects and crowds
    rles = [encode(item.segmentation, *size) for item in objects]
    areas = [int(mask_util.area(rle)) for rle in rles]
    for i in _bottom_to_top(objects, areas, rules):
        item = objects[i]
        if not areas[i]:
            continue
        is_stuff = item.category_id in rules.stuff_ids
        if is_stuff or item.is_crowd:
            number = segments.shared(item.category_id, is_crowd=not is_stuff)
        else:
            number = segments.add(item.category_id)
        segments.object_ids[number - 1].append(item.id)
        _paint(owners, covered, rles[i], number)

    image = _number(owners, segments, rules.min_area)
    image.empty = [item.id for item, area in zip(objects, areas, strict=True) if not area]
    if labels is not None and rules.things:
        for value, count in zip(*(a.tolist() for a in count_values(labels[~covered])), strict=True):
            if value in rules.things:
                category_id = rules.things[value]
                image.unassigned[category_id] = image.unassigned.get(category_id, 0) + count
    return image


def segment_boxes(owners: np.ndarray, number: int) -> list[list[int] | None]:
    """Boxes [x, y, width, height] in pixels of the labels 1 to `number`; None for absent ones.

    Args:
        owners: (H, W) integers.
        number: the largest label.
    """
    boxes: list[list[int] | None] = []
    for window in ndimage.find_objects(owners, number) if number else []:
        if window is None:
            boxes.append(None)
            continue
        rows, columns = window
        height, width = rows.stop - rows.start, columns.stop - columns.start
        boxes.append([columns.start, rows.start, width, height])
    return boxes


def _paint_labels(
    labels: np.ndarray, size: tuple[int, int], rules: Rules, segments: _Segments
) -> np.ndarray:
    """The segments (H, W) of stuff, and of things that become crowds."""
    if labels.shape != tuple(size):
        raise ValueError(
            f"is {labels.shape[1]} x {labels.shape[0]} pixels, but its image {size[1]} x {size[0]}"
        )
    values = present_values(labels)
    unknown = []
    numbers = np.zeros(len(values), np.int32)
    for i, value in enumerate(values.tolist()):
        if value in rules.void:
            continue
        if value in rules.stuff:
            numbers[i] = segments.shared(rules.stuff[value])
        elif value not in rules.things:
            unknown.append(value)
        elif rules.unassigned == "crowd":
            numbers[i] = segments.shared(rules.things[value], is_crowd=True)
    if unknown:
        listed = ", ".join(map(str, unknown[:5])) + ", ..." * (len(unknown) > 5)
        raise ValueError(f"has labels that are neither of a class nor ignored: {listed}")
    return numbers[np.searchsorted(values, labels)]


def _bottom_to_top(
    objects: Sequence[PlacedObject], areas: Sequence[int], rules: Rules
) -> list[int]:
    """Indices of the objects in the order of painting."""

    def depth(i: int) -> tuple[int, int]:
        item = objects[i]
        layer = 0 if item.category_id in rules.stuff_ids else 1 if item.is_crowd else 2
        return layer, -areas[i] if rules.overlap == "area" else 0

    return sorted(range(len(objects)), key=depth)


def _paint(owners: np.ndarray, covered: np.ndarray, rle: dict[str, Any], number: int) -> None:
    """Give the pixels of a mask to a segment."""
    x, y, width, height = (int(value) for value in mask_util.toBbox(rle))
    window = (slice(y, y + height), slice(x, x + width))
    mask = mask_util.decode(rle)[window].astype(bool)
    owners[window][mask] = number
    covered[window] |= mask


def _number(owners: np.ndarray, segments: _Segments, min_area: int) -> PanopticImage:
    """Give the visible segments their ids, and drop the others."""
    total = len(segments.classes)
    areas = np.bincount(owners.ravel(), minlength=total + 1)[1:].tolist()
    boxes = segment_boxes(owners, total)
    new_ids = np.zeros(total + 1, np.int32)
    image = PanopticImage(owners, [])
    for i, (category_id, is_crowd) in enumerate(segments.classes):
        if areas[i] < min_area or not areas[i]:
            (image.small if areas[i] else image.hidden).extend(segments.object_ids[i])
            continue
        new_ids[i + 1] = (len(image.segments) + 1) * _ID_STEP % _NUM_IDS
        image.segments.append(
            {
                "id": int(new_ids[i + 1]),
                "category_id": category_id,
                "area": areas[i],
                "bbox": boxes[i],
                "iscrowd": int(is_crowd),
            }
        )
    image.ids = new_ids[owners]
    return image
