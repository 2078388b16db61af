"""Names and ids of the classes that a model predicts, from the metadata of its data set.

K classes. A label is a class's contiguous id, from 0 to K - 1; a category id is that of the data
set's files, such as 1 to 90 of COCO.
"""

from collections.abc import Sequence
from typing import Any

from detectron2.data import Metadata

from .evaluator_types import EVALUATOR_TYPES


def class_names_of(candidates: Sequence[Metadata], num_classes: int | None) -> tuple[str, ...]:
    """The names of a model's classes, by label.

    Args:
        candidates: metadata of data sets that may name them; the first that fits does.
        num_classes: K; None: that of the first with names.

    Returns:
        K names: "0", "1", ... where no data set has K names.
    """
    for metadata in candidates:
        entry = EVALUATOR_TYPES.get(metadata.get("evaluator_type"))
        first = metadata.get(entry.classes) if entry else None
        for names in (first, metadata.get("stuff_classes"), metadata.get("thing_classes")):
            if names and num_classes in (None, len(names)):
                return tuple(names)
    return tuple(map(str, range(num_classes or 0)))


def category_ids(metadata: Metadata | None) -> dict[int, int] | None:
    """Label → category id; None if the data set's category ids are the labels."""
    ids: dict[int, int] = {}
    for kind in ("stuff", "thing"):
        mapping = metadata and metadata.get(f"{kind}_dataset_id_to_contiguous_id")
        ids |= {label: category for category, label in (mapping or {}).items()}
    return ids or None


def colours_of(metadata: Metadata, num_classes: int) -> list[Any] | None:
    """RGB of the K classes, by label; None if the metadata has no K colours."""
    for key in ("stuff_colors", "thing_colors"):
        colours = metadata.get(key)
        if colours is not None and len(colours) == num_classes:
            return list(colours)
    return None
