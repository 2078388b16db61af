"""Class names, thing and stuff, and the task of a model of another library."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import Metadata, MetadataCatalog

from ..data.class_labels import class_names_of
from ..data.datasets.colours import class_colours
from ..data.evaluator_types import CLASS_LISTS
from .transformers_config import OURS, TASKS

_logger = logging.getLogger(__name__)

# Published models name the classes of these, but do not say which are things.
_KNOWN = (
    "coco_2017_val_panoptic_with_sem_seg",
    "ade20k_panoptic_val",
    "cityscapes_fine_panoptic_val",
    "mapillary_vistas_panoptic_val",
)


def require_class_names(metadata: Metadata, num_classes: int) -> list[str]:
    """The names of the K classes of a model.

    Args:
        metadata: of its data set.
        num_classes: K.

    Raises:
        ValueError: the metadata names other classes, or none.
    """
    if any(len(metadata.get(key, ())) == num_classes for key in CLASS_LISTS):
        return list(class_names_of([metadata], num_classes))
    counts = [str(len(metadata.get(key))) for key in CLASS_LISTS if metadata.get(key)]
    raise ValueError(
        f"The data set {metadata.get('name', '')!r} names {' and '.join(counts) or 'no'} classes, "
        f"but MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}: set DATASETS.TEST to the data of "
        "the training."
    )


def thing_ids_of(metadata: Metadata, num_classes: int) -> list[int] | None:
    """The ids of the things among K classes; None if the data does not have things and stuff."""
    things = metadata.get("thing_dataset_id_to_contiguous_id")
    if things is None or len(metadata.get("stuff_classes", ())) != num_classes:
        return None
    return sorted(things.values())


def read_class_names(content: Mapping[str, Any], num_classes: int, path: str) -> list[str]:
    """The names in `id2label` of a config.json.

    Raises:
        ValueError: they are not those of K classes.
    """
    labels = content.get("id2label")
    if not labels:
        return [f"LABEL_{i}" for i in range(num_classes)]
    names = {int(key): str(name) for key, name in labels.items() if str(key).isdigit()}
    if sorted(names) != list(range(num_classes)) or len(names) != len(labels):
        raise ValueError(
            f"{path} names {len(labels)} classes in id2label, but the weights have {num_classes}."
        )
    return [names[i] for i in range(num_classes)]


def tasks_of(content: Mapping[str, Any], things: Sequence[int] | None, folder: str) -> list[str]:
    """What a model was trained for.

    Args:
        content: config.json. Models that this project wrote say it; of others the name tells.
        things: ids of the thing classes if known.
        folder: its path; its name is that of the model on the hub, perhaps.
    """
    ours = content.get(OURS)
    stated = ours.get("tasks") if isinstance(ours, Mapping) else None
    if isinstance(stated, list) and stated and set(stated) <= set(TASKS):
        return stated
    parts = re.split(r"[\\/]", folder)
    # In the cache of the hub the folder's name is a commit, and the model's further up.
    in_cache = [part for part in parts if part.startswith("models--")]
    for name in (str(content.get("_name_or_path", "")).rpartition("/")[2], parts[-1], *in_cache):
        words = re.findall("|".join(TASKS), name)
        if words:
            return list(TASKS) if words[-1] == "panoptic" else [words[-1]]
    tasks = list(TASKS) if things is not None else ["instance", "semantic"]
    _logger.warning(
        f"{folder} does not say for which task it was trained: it predicts {', '.join(tasks)}. "
        "Set MODEL.MASK_FORMER.TEST.PANOPTIC_ON, INSTANCE_ON and SEMANTIC_ON otherwise."
    )
    return tasks


def known_data(names: Sequence[str]) -> Metadata | None:
    """The metadata of the public data set with these classes, to tell things from stuff.

    A fifth of the names may differ: "window" is "windowpane" elsewhere.
    """
    for data_set in _KNOWN:
        metadata = MetadataCatalog.get(data_set) if data_set in MetadataCatalog else None
        classes = metadata.get("stuff_classes", ()) if metadata else ()
        if not classes or len(classes) != len(names):
            continue
        pairs = zip(classes, names, strict=True)
        num_equal = sum(_plain(one) == _plain(other) for one, other in pairs)
        if num_equal >= 0.8 * len(names):
            return metadata
    return None


def _plain(name: str) -> str:
    """Without what spellings differ in; of a list of synonyms the first."""
    return re.sub(r"[^a-z0-9]", "", name.partition(",")[0].casefold())


def make_metadata(
    names: Sequence[str], things: Sequence[int] | None, tasks: Sequence[str]
) -> dict[str, Any]:
    """Metadata as of a data set with these classes.

    Args:
        names: of all classes, in the order of their ids.
        things: ids of the thing classes; None: all, if instances are predicted.
        tasks: of the model.
    """
    known = known_data(names)
    colours = [list(c) for c in known.stuff_colors] if known else class_colours(len(names))
    metadata: dict[str, Any] = {}
    if set(tasks) != {"instance"}:
        metadata |= {
            "stuff_classes": list(names),
            "stuff_colors": colours,
            "stuff_dataset_id_to_contiguous_id": {i: i for i in range(len(names))},
        }
    if set(tasks) != {"semantic"}:
        ids = range(len(names)) if things is None else things
        metadata |= {
            "thing_classes": [names[i] for i in ids],
            "thing_colors": [colours[i] for i in ids],
            "thing_dataset_id_to_contiguous_id": {i: i for i in ids},
        }
    return metadata


def register(metadata: Mapping[str, Any]) -> str:
    """Put metadata into Detectron2's catalogue; the name is the same for equal metadata."""
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode()).hexdigest()[:12]
    name = f"pretrained_{digest}"
    MetadataCatalog.get(name).set(**metadata)
    return name
