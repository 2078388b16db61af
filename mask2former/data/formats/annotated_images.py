"""What the readers of other annotation formats return: images and their objects, as in COCO.

    files of a labelling tool ─ reader ─→ AnnotatedImages ─ coco_instances ─→ COCO instance JSON

Masks are polygons or run-length encodings in pixels of the image as shown, which is how the tools
and `images.py` see it: with its EXIF orientation applied.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils

# Polygons [[x1, y1, x2, y2, ...], ...] in pixels, or {"size": [H, W], "counts": compressed text}.
Segmentation = list[list[float]] | dict[str, Any]


@dataclass(frozen=True, slots=True)
class AnnotatedObject:
    """One object.

    Attributes:
        class_name: its class.
        segmentation: its mask.
        is_crowd: whether the mask is of a region with several objects, which are not told apart.
    """

    class_name: str
    segmentation: Segmentation
    is_crowd: bool = False


@dataclass(slots=True)
class AnnotatedImage:
    """One image.

    Attributes:
        path: its file.
        height, width: in pixels.
        objects: from back to front where the format knows an order, else as in the file.
    """

    path: Path
    height: int
    width: int
    objects: list[AnnotatedObject] = field(default_factory=list)


@dataclass(slots=True)
class AnnotatedImages:
    """The images of one split.

    Attributes:
        format: name of the format, for messages.
        classes: names of all classes in the order of the format, or else of the alphabet; also
            those without an object.
        images: in the order of the format.
        sources: other files and folders that were read and may lie outside the root.
    """

    format: str
    classes: list[str]
    images: list[AnnotatedImage]
    sources: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class ReadOptions:
    """What a reader must be told because the files do not say it. Each reader documents its use.

    Attributes:
        split: which part to read, such as "train"; None: the data has one part.
        image_root: folder of the images where they are not where the format puts them.
        mask_root: folder of mask files whose names begin with that of their image.
        classes: class names of formats whose files hold none, in the order of their labels.
        rename: old → new class name, or None to leave it out; the reader does not apply it, but
            `classes` may be under the new names, of which files know nothing.
        class_attribute: the attribute with the class, for tools whose objects may have several.
        boxes_as_masks: whether data with rectangles only is read, each rectangle as a mask.
    """

    split: str | None = None
    image_root: Path | None = None
    mask_root: Path | None = None
    classes: tuple[str, ...] | None = None
    rename: Mapping[str, str | None] | None = None
    class_attribute: str | None = None
    boxes_as_masks: bool = False

    def label_names(self, source: object) -> list[str] | None:
        """`classes` as the names of the labels of files that hold none; None: not given.

        Args:
            source: the files, for the error.

        Raises:
            ValueError: a name is a new one of `rename`: which label it has cannot be known.
        """
        if self.classes is None:
            return None
        renamed = (self.rename or {}).items()
        new = [n for old, n in renamed if n in self.classes and old not in (*self.classes, "*")]
        if new:
            raise ValueError(
                f"{source}: the files do not name their labels, so that CLASSES must, in the order "
                f"of the labels, but {new[0]!r} is a new name of RENAME: list the old names."
            )
        return list(self.classes)


@dataclass(frozen=True)
class AnnotationFormat:
    """A format of annotations.

    Attributes:
        name: the TYPE in configs.
        title: the format in words, for messages.
        read: reads the annotations in a folder or file. Raises FileNotFoundError or ValueError
            that names file and entry.
        recognise: what of the format is in a folder or file, in words; None: nothing.
    """

    name: str
    title: str
    read: Callable[[Path, ReadOptions], AnnotatedImages]
    recognise: Callable[[Path], str | None]


def coco_instances(content: AnnotatedImages, image_root: Path) -> dict[str, Any]:
    """The images as COCO instance JSON: category, image and annotation ids count from 1.

    Args:
        content: what a reader returned.
        image_root: folder to which ``file_name`` is relative.

    Raises:
        ValueError: an image is not in `image_root`.
    """
    category_ids = {name: i for i, name in enumerate(content.classes, 1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, image in enumerate(content.images, 1):
        images.append(
            {
                "id": image_id,
                "file_name": image.path.relative_to(image_root).as_posix(),
                "height": image.height,
                "width": image.width,
            }
        )
        for item in image.objects:
            rle = encode(item.segmentation, image.height, image.width)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[item.class_name],
                    "segmentation": item.segmentation,
                    "area": float(mask_utils.area(rle)),
                    "bbox": [float(value) for value in mask_utils.toBbox(rle)],
                    "iscrowd": int(item.is_crowd),
                }
            )
    categories = [{"id": i, "name": name} for name, i in category_ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def image_folder(content: AnnotatedImages) -> Path:
    """The innermost folder that all images are in."""
    return Path(os.path.commonpath([image.path.parent for image in content.images]))


def encode(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """The run-length encoding of an object's mask, for pycocotools."""
    if isinstance(segmentation, dict):
        return segmentation
    return mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))


def rle_of_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask (H, W) of booleans for JSON."""
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
