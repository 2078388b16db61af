"""Schemas of COCO instance JSON and of its relatives: what each entry must and may have.

COCO_JSON             what the reader of this project needs
DETECTRON2_COCO_JSON  what Detectron2's `load_coco_json` needs besides; it drops unusable objects
DETECTRON2_COCO_GT    COCO_JSON for the evaluation of such data
LVIS_JSON             what Detectron2's `load_lvis_json` needs
LVIS_EVALUATION_JSON  what the official LVIS evaluation needs besides
"""

from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, UnsetType

Id = int | str
Number = int | float

# Largest side of an image in pixels.
_MAX_SIDE = 1 << 20


class Category(msgspec.Struct, gc=False):
    id: Id
    name: str | None = None
    isthing: Literal[0, 1] | bool | None = None
    color: Annotated[list[int], Meta(min_length=3, max_length=3)] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The keys that are present."""
        keys = ("id", "name", "isthing", "color")
        return {key: value for key in keys if (value := getattr(self, key)) is not None}


class Image(msgspec.Struct, gc=False):
    id: Id
    file_name: str | None = None
    height: Annotated[int, Meta(ge=1, le=_MAX_SIDE)] | None = None
    width: Annotated[int, Meta(ge=1, le=_MAX_SIDE)] | None = None
    coco_url: str | None = None


class Rle(msgspec.Struct, gc=False):
    size: Annotated[list[int], Meta(min_length=2, max_length=2)]
    counts: str | list[int]

    def as_dict(self) -> dict[str, Any]:
        return {"size": self.size, "counts": self.counts}


class Annotation(msgspec.Struct, gc=False):
    id: Id
    image_id: Id
    category_id: Id
    segmentation: list[list[Number]] | Rle | None = None
    bbox: Annotated[list[Number], Meta(min_length=4, max_length=4)] | UnsetType = UNSET
    area: Number | None = None
    iscrowd: Literal[0, 1] | bool | UnsetType | None = UNSET
    keypoints: list[Number] | None = None
    ignore: Number | bool | None = None


Side = Annotated[int, Meta(ge=1, le=_MAX_SIDE)]


class _SizedImage(Image, kw_only=True, gc=False):
    file_name: str
    height: Side
    width: Side


class _LvisImage(Image, kw_only=True, gc=False):
    # The last two parts are the folder and the file.
    coco_url: Annotated[str, Meta(pattern="[^/]/[^/]+$")]
    height: Side
    width: Side
    neg_category_ids: list[int] = []
    not_exhaustive_category_ids: list[int] = []


class _EvaluatedLvisImage(_LvisImage, kw_only=True, gc=False):
    neg_category_ids: list[int]
    not_exhaustive_category_ids: list[int]


class _LvisAnnotation(Annotation, kw_only=True, gc=False):
    segmentation: Annotated[list[Annotated[list[Number], Meta(min_length=6)]], Meta(min_length=1)]
    bbox: Annotated[list[Number], Meta(min_length=4, max_length=4)]


class _EvaluatedLvisAnnotation(_LvisAnnotation, kw_only=True, gc=False):
    area: Number


class _EvaluatedLvisCategory(Category, kw_only=True, gc=False):
    frequency: Literal["r", "c", "f"]


class InstanceSchema(NamedTuple):
    """The schema of a COCO instance JSON.

    Attributes:
        image, annotation, category: of the entries of the three lists.
        needs_annotations: whether there must be a list of annotations.
        allow_partial: whether parts of an object that are no polygons are left out.
        allow_unusable: whether objects without any polygon or RLE are left out.
        is_lvis: whether the URL of an image says its file, and category ids count from 1.
    """

    image: type[Image] = Image
    annotation: type[Annotation] = Annotation
    category: type[Category] = Category
    needs_annotations: bool = False
    allow_partial: bool = True
    allow_unusable: bool = False
    is_lvis: bool = False


COCO_JSON = InstanceSchema()
DETECTRON2_COCO_JSON = InstanceSchema(image=_SizedImage, allow_unusable=True)
DETECTRON2_COCO_GT = COCO_JSON._replace(allow_unusable=True)
LVIS_JSON = InstanceSchema(
    _LvisImage, _LvisAnnotation, needs_annotations=True, allow_partial=False, is_lvis=True
)
LVIS_EVALUATION_JSON = LVIS_JSON._replace(
    image=_EvaluatedLvisImage,
    annotation=_EvaluatedLvisAnnotation,
    category=_EvaluatedLvisCategory,
)
