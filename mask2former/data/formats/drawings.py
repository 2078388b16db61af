"""Collects what was drawn on images, then checks, clips and joins it into objects.

The readers of tools whose objects are drawn shapes share this. The rules are the same for all:

- Polygons may reach outside the image and are clipped; more than two pixels are warned about, more
  than one side of the image is a mistake.
- Shapes of one image, class and group are one object.
- A rectangle is a mask like any closed shape, as in the mask exports of LabelMe and CVAT. But data
  with rectangles only was made for detection and is refused, unless it is read with
  `ReadOptions.boxes_as_masks`.
- The size that an annotation states must be that of the image.

h w pixels of the image as shown.
"""

import math
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils

from .annotated_images import (
    AnnotatedImage,
    AnnotatedImages,
    AnnotatedObject,
    Segmentation,
    encode,
)
from .findings import Findings
from .images import read_header
from .masks import farthest, is_polygon, polygon_extents, reach_outside

# Pixels that polygons may end outside the image without a warning.
_TOLERANCE = 2.0
# Largest distance of a circle to the polygon that stands for it, in pixels.
_CIRCLE_ERROR = 0.05


@dataclass(slots=True)
class _Shape:
    image: AnnotatedImage
    class_name: str
    part: list[float] | dict[str, Any]
    file: str
    entry: Any
    group: Hashable
    order: int
    is_box: bool


class Drawings:
    """The images of one split and the shapes on them."""

    def __init__(self, format: str) -> None:
        self.findings = Findings()
        self._format = format
        self._images: list[AnnotatedImage] = []
        self._sources: dict[str, str] = {}
        self._shapes: list[_Shape] = []

    def add_image(
        self, path: Path, file: str, entry: Any = None, size: tuple[int, int] | None = None
    ) -> AnnotatedImage | None:
        """Add an image.

        Args:
            path: its file.
            file, entry: what names it, for messages.
            size: (h, w) according to the annotation.

        Returns:
            The image, or None if it cannot be used, which is a problem.
        """
        source = file if entry is None else f"{file}, {entry}"
        key = os.path.normpath(path)
        if key in self._sources:
            why = f"the image {path} occurs more than once, before in {self._sources[key]}"
            self.findings.problem(file, entry, why)
            return None
        self._sources[key] = source
        try:
            header = read_header(str(path))
        except (OSError, ValueError) as error:
            is_missing = isinstance(error, FileNotFoundError)
            why = "does not exist" if is_missing else str(error).removeprefix(f"{path} ")
            why += "" if source == str(path) else f" (an image of {source})"
            self.findings.problem(str(path), None, why, is_missing=is_missing)
            return None
        if size is not None and size != header.size:
            why = (
                f"the annotation is of {size[1]} x {size[0]} pixels, but the image {path} has "
                f"{header.size[1]} x {header.size[0]}"
            )
            if header.orientation > 1:
                why += f" as shown with its EXIF orientation {header.orientation}"
            self.findings.problem(file, entry, why)
            return None
        image = AnnotatedImage(path, *header.size)
        self._images.append(image)
        return image

    def add_polygon(
        self,
        image: AnnotatedImage,
        class_name: str,
        coordinates: list[float],
        file: str,
        entry: Any,
        *,
        group: Hashable = None,
        order: int = 0,
        is_box: bool = False,
    ) -> None:
        """Add a polygon.

        Args:
            image: from `add_image`.
            class_name: of the object.
            coordinates: x1, y1, x2, y2, ... in pixels.
            file, entry: what names it, for messages.
            group: shapes with the same one are parts of one object; None: an object of its own.
            order: the larger, the nearer to the viewer.
            is_box: whether it is a rectangle.
        """
        if not is_polygon(coordinates):
            why = f"a polygon of {len(coordinates) / 2:g} points; it needs at least 3"
            self.findings.problem(file, entry, why)
            return
        shape = _Shape(image, class_name, coordinates, file, entry, group, order, is_box)
        self._shapes.append(shape)

    def add_mask(
        self,
        image: AnnotatedImage,
        class_name: str,
        patch: np.ndarray,
        corner: tuple[int, int],
        file: str,
        entry: Any,
        *,
        group: Hashable = None,
        order: int = 0,
    ) -> None:
        """Add the mask of a part of the image.

        Args:
            patch: (h', w') of booleans.
            corner: left and top of the patch in the image.
            image, class_name, file, entry, group, order: see `add_polygon`.
        """
        height, width = patch.shape
        left, top = corner
        if left >= image.width or top >= image.height or left + width <= 0 or top + height <= 0:
            why = (
                f"a mask of {width} x {height} pixels at ({left}, {top}) is outside the "
                f"{image.width} x {image.height} pixels of the image"
            )
            self.findings.problem(file, entry, why)
            return
        if not patch.any():
            self.findings.problem(file, entry, "a mask without any pixel")
            return
        rle = rle_of_patch(patch, corner, (image.height, image.width))
        shape = _Shape(image, class_name, rle, file, entry, group, order, False)
        self._shapes.append(shape)

    def class_names(self) -> set[str]:
        """Of all shapes."""
        return {shape.class_name for shape in self._shapes}

    def finish(self, classes: Sequence[str], *, boxes_as_masks: bool = False) -> AnnotatedImages:
        """Join the shapes into objects.

        Args:
            classes: in order.
            boxes_as_masks: see `ReadOptions`.

        Raises:
            FileNotFoundError, ValueError: the first of all problems.
        """
        if not boxes_as_masks and self._shapes and all(shape.is_box for shape in self._shapes):
            first = self._shapes[0]
            why = (
                f"all {len(self._shapes)} shapes are rectangles: data made for detection, without "
                "masks. If each rectangle is the mask of its object, set BOXES_AS_MASKS: True"
            )
            self.findings.problem(first.file, first.entry, why)
        self._check_polygons()
        if not self._images and not self.findings.problems:
            raise ValueError(f"The {self._format} annotations list no images.")
        self.findings.raise_first(is_data=False)
        self.findings.log()
        objects: dict[Hashable, list[_Shape]] = {}
        for i, shape in enumerate(self._shapes):
            group = ("single", i) if shape.group is None else ("group", shape.group)
            objects.setdefault((id(shape.image), shape.class_name, group), []).append(shape)
        ordered = sorted(objects.values(), key=lambda shapes: shapes[0].order)
        for shapes in ordered:
            image = shapes[0].image
            joined = _join([shape.part for shape in shapes], image)
            image.objects.append(AnnotatedObject(shapes[0].class_name, joined))
        return AnnotatedImages(self._format, list(classes), self._images)

    def _check_polygons(self) -> None:
        shapes = [shape for shape in self._shapes if isinstance(shape.part, list)]
        if not shapes:
            return
        polygons = [shape.part for shape in self._shapes if isinstance(shape.part, list)]
        extents = polygon_extents(polygons)
        sizes = np.array([(shape.image.height, shape.image.width) for shape in shapes])
        outside = reach_outside(extents, sizes)
        # NaN compares false.
        for i in np.flatnonzero(~(outside <= 0)).tolist():
            shape, size = shapes[i], tuple(sizes[i].tolist())
            if not np.isfinite(extents[i]).all():
                why = "a polygon has coordinates that are not finite numbers"
                self.findings.problem(shape.file, shape.entry, why)
                continue
            left, top, right, bottom = extents[i].tolist()
            beyond = (
                f"a polygon spans x {left:g} to {right:g}, y {top:g} to {bottom:g}, beyond the "
                f"{size[1]} x {size[0]} pixels of the image"
            )
            if outside[i] > farthest(size):
                beyond += ", by more than its longest side; correct the coordinates"
                self.findings.problem(shape.file, shape.entry, beyond)
                continue
            clipped = clip_polygon(polygons[i], size)
            if len(clipped) < 6:
                beyond += ": it is outside of it; correct or remove it"
                self.findings.problem(shape.file, shape.entry, beyond)
                continue
            if outside[i] > _TOLERANCE:
                self.findings.warn(shape.file, shape.entry, f"{beyond}. It is clipped")
            shape.part = clipped


def _join(parts: list[list[float] | dict[str, Any]], image: AnnotatedImage) -> Segmentation:
    polygons = [part for part in parts if isinstance(part, list)]
    rles = [part for part in parts if isinstance(part, dict)]
    if not rles:
        return polygons
    if polygons:
        rles.append(encode(polygons, image.height, image.width))
    return rles[0] if len(rles) == 1 else _as_text(mask_utils.merge(rles))


def _as_text(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def rle_of_patch(
    patch: np.ndarray, corner: tuple[int, int], size: tuple[int, int]
) -> dict[str, Any]:
    """Encode the mask of a part of an image for JSON, in a time that does not grow with the image.

    Args:
        patch: (h', w') of booleans; what is outside the image is cut off.
        corner: left and top of the patch in the image.
        size: (h, w) of the image.
    """
    left, top = corner
    height, width = size
    patch = patch[max(-top, 0) : height - top, max(-left, 0) : width - left].astype(bool)
    left, top = max(left, 0), max(top, 0)
    # A row of background below ends the runs of each column.
    rows = patch.shape[0] + 1
    columns = np.zeros((patch.shape[1], rows), bool)
    columns[:, :-1] = patch.T
    flat = np.concatenate(([False], columns.ravel())).astype(np.int8)
    changes = np.flatnonzero(np.diff(flat))  # starts and ends of runs, alternating
    positions = (left + changes // rows) * height + top + changes % rows
    # A run that ends at the lower border goes on at the upper border of the next column.
    goes_on = np.zeros(len(positions), bool)
    goes_on[1:-1:2] = positions[1:-1:2] == positions[2::2]
    goes_on[2::2] |= goes_on[1:-1:2]
    positions = positions[~goes_on]
    counts = np.diff(positions, prepend=0, append=height * width).tolist()
    if counts[-1] == 0:  # the last pixel is in the mask
        del counts[-1]
    rle = {"size": [height, width], "counts": counts}
    return _as_text(mask_utils.frPyObjects(rle, height, width))


def clip_polygon(coordinates: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Cut a polygon at the borders of an image of size (h, w); [] if all of it is outside."""
    points = [complex(x, y) for x, y in zip(coordinates[::2], coordinates[1::2], strict=True)]
    height, width = size
    # Distances to each border, positive inside.
    borders = (
        lambda p: p.real,
        lambda p: width - p.real,
        lambda p: p.imag,
        lambda p: height - p.imag,
    )
    for inside in borders:
        kept: list[complex] = []
        for before, point in zip(points[-1:] + points[:-1], points, strict=True):
            d0, d1 = inside(before), inside(point)
            if (d0 >= 0) != (d1 >= 0):
                kept.append(before + (point - before) * (d0 / (d0 - d1)))
            if d1 >= 0:
                kept.append(point)
        points = kept
    extents = [(p.real, p.imag) for p in points]
    if not extents or any(min(v) == max(v) for v in zip(*extents, strict=True)):
        return []
    # Rounding of an intersection must not leave the image.
    return [v for x, y in extents for v in (min(max(x, 0.0), width), min(max(y, 0.0), height))]


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[float]:
    """The polygon of a rectangle with two opposite corners."""
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def ellipse(
    x: float, y: float, radius_x: float, radius_y: float, angle: float = 0.0
) -> list[float]:
    """The polygon of an ellipse.

    Args:
        x, y: its centre.
        radius_x, radius_y: its radii in pixels.
        angle: by which it is turned, from x to y, in radians.
    """
    radius = max(radius_x, radius_y, 1.0)
    number = 12
    if math.isfinite(radius):
        number = min(max(12, math.ceil(math.pi / math.sqrt(2 * _CIRCLE_ERROR / radius))), 2000)
    t = np.arange(number) * (2 * math.pi / number)
    u, v = radius_x * np.cos(t), radius_y * np.sin(t)
    cos, sin = math.cos(angle), math.sin(angle)
    points = np.stack((x + u * cos - v * sin, y + u * sin + v * cos), axis=1)
    return points.ravel().tolist()


def rotate(coordinates: Sequence[float], angle: float) -> list[float]:
    """Turn a polygon about the centre of its bounds by an angle in radians, from x to y."""
    points = np.array(coordinates, float).reshape(-1, 2)
    centre = (points.min(0) + points.max(0)) / 2
    cos, sin = math.cos(angle), math.sin(angle)
    turned = (points - centre) @ np.array([[cos, sin], [-sin, cos]]) + centre
    return turned.ravel().tolist()
