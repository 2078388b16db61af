"""The number of classes: read from your own data, and compared with every data set.

What counts as a class follows from the evaluator type in the metadata (`evaluator_types.py`):
`thing_classes` for instance data; for semantic and panoptic data `stuff_classes`, which lists all
classes, things included.
"""

import logging
from collections.abc import Set

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..utils.registry import is_mask_former
from .datasets.register_custom import is_own
from .evaluator_types import EVALUATOR_TYPES

NUM_CLASSES = "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
IGNORE_VALUE = "MODEL.SEM_SEG_HEAD.IGNORE_VALUE"


def class_names(name: str) -> list[str] | None:
    """The classes a model of a data set predicts, in the order of their ids.

    Args:
        name: of a data set.

    Returns:
        Their names, or None if the data set is not registered, its evaluator type is unknown, or
        its classes are known only once it is loaded.
    """
    if name not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(name)
    entry = EVALUATOR_TYPES.get(metadata.get("evaluator_type"))
    return None if entry is None else metadata.get(entry.classes)


def follow_own_data(cfg: CfgNode, file_keys: Set[str], option_keys: Set[str]) -> None:
    """Set the number of classes and the ignore label from the first data set of your own.

    Values set together with the data set's name, or after it, stay. Values set before it (in a
    base file, or in the config file if an override names the data set) were meant for other data.

    Args:
        cfg: changed in place.
        file_keys: dotted keys of the config file itself.
        option_keys: dotted keys of the overrides.
    """
    own = _first_own(cfg)
    if own is None:
        return
    named_by = "DATASETS.TRAIN" if own in cfg.DATASETS.TRAIN else "DATASETS.TEST"
    explicit = option_keys if named_by in option_keys else option_keys | file_keys
    head = cfg.MODEL.SEM_SEG_HEAD
    if NUM_CLASSES not in explicit:
        head.NUM_CLASSES = len(class_names(own))
    ignore_label = MetadataCatalog.get(own).get("ignore_label")
    if IGNORE_VALUE not in explicit and ignore_label is not None:
        head.IGNORE_VALUE = ignore_label


def _first_own(cfg: CfgNode) -> str | None:
    return next((name for name in _names(cfg) if is_own(name)), None)


def _names(cfg: CfgNode) -> list[str]:
    return list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))


def check_class_counts(cfg: CfgNode) -> None:
    """Check that the model has the classes of its data sets, and that all have the same.

    Only configs of `MaskFormer` and its subclasses are checked, and only data sets whose classes
    are known before they are loaded. A data set of unknown evaluator type is skipped with a
    warning.

    Raises:
        ValueError: naming the data sets, the key and both numbers or classes.
    """
    if not is_mask_former(cfg.MODEL.META_ARCHITECTURE):
        return
    num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    first: tuple[str, list[str]] | None = None
    for name in _names(cfg):
        classes = class_names(name)
        if classes is None:
            _warn_of_unknown_type(name)
            continue
        if _lists_things_of(name, cfg):
            continue
        if len(classes) != num_classes:
            raise ValueError(_wrong_number(cfg, name, classes))
        if first is None:
            first = (name, classes)
        _check_same_classes(*first, name, classes)
        _check_ignore_label(cfg, name)


def _warn_of_unknown_type(name: str) -> None:
    if name not in DatasetCatalog:
        return
    evaluator_type = MetadataCatalog.get(name).get("evaluator_type")
    if evaluator_type not in EVALUATOR_TYPES:
        logging.getLogger(__name__).warning(
            f"The classes of data set {name!r} are not compared with {NUM_CLASSES}: its metadata "
            f"has evaluator_type {evaluator_type!r}, which is unknown."
        )


def _wrong_number(cfg: CfgNode, name: str, classes: list[str]) -> str:
    own = _first_own(cfg)
    listed = ", ".join(classes[:5]) + ", ..." * (len(classes) > 5)
    message = (
        f"{NUM_CLASSES} is {cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES}, but data set {name!r} of "
        f"DATASETS.{'TRAIN' if name in cfg.DATASETS.TRAIN else 'TEST'} has {len(classes)} classes "
        f"({listed})."
    )
    if own is None:
        return f"{message} Set the key to {len(classes)}, or name other data sets."
    if own == name:
        return f"{message} Leave the key out, and it follows from the data, or correct the data."
    expected = class_names(own) or []
    one_sided = [
        f"only {owner!r} has {', '.join(map(repr, only[:5]))}{', ...' * (len(only) > 5)}"
        for owner, only in (
            (own, [c for c in expected if c not in classes]),
            (name, [c for c in classes if c not in expected]),
        )
        if only
    ]
    return (
        f"{message} Data set {own!r} has {len(expected)}: all of DATASETS.TRAIN and "
        f"DATASETS.TEST must have the same classes; {'; '.join(one_sided)}.{_remedy(own, name)}"
    )


def _remedy(*names: str) -> str:
    """How to give your own data sets the same classes."""
    if not all(map(is_own, names)):
        return ""
    return (
        " CLASSES in each entry of DATASETS.CUSTOM, with all classes in order, makes them the same;"
        " RENAME merges or leaves out others."
    )


def _check_same_classes(first: str, expected: list[str], name: str, classes: list[str]) -> None:
    for i, (one, other) in enumerate(zip(expected, classes, strict=True)):
        if one != other:
            raise ValueError(
                f"Data sets {first!r} and {name!r} have different classes: number {i} (from 0) is "
                f"{one!r} in the first and {other!r} in the second.{_remedy(first, name)}"
            )


def _check_ignore_label(cfg: CfgNode, name: str) -> None:
    ignore_label = MetadataCatalog.get(name).get("ignore_label")
    ignore_value = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    if is_own(name) and ignore_label not in (None, ignore_value):
        raise ValueError(
            f"{IGNORE_VALUE} is {ignore_value}, but data set {name!r} has the ignore label "
            f"{ignore_label}. They must be the same."
        )


def _lists_things_of(name: str, cfg: CfgNode) -> bool:
    """Whether `name` is an instance data set of exactly the things that a panoptic model predicts.

    A panoptic model returns instances of things only, so their AP is defined on such a data set if
    the things have the same ids, which means that they come before all stuff.
    """
    panoptic = cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON and name not in cfg.DATASETS.TRAIN
    if not panoptic or not cfg.DATASETS.TRAIN:
        return False
    trained, tested = (MetadataCatalog.get(n) for n in (cfg.DATASETS.TRAIN[0], name))
    things = trained.get("thing_classes")
    ids = trained.get("thing_dataset_id_to_contiguous_id", {})
    return (
        EVALUATOR_TYPES[tested.evaluator_type].classes == "thing_classes"
        and things is not None
        and sorted(ids.values()) == list(range(len(things)))
        and tested.get("thing_classes") == things
    )
