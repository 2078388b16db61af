"""The evaluator types a data set can have in its metadata, one entry each.

The table lives with the data, because an entry is a fact about data sets; `evaluation/build.py`
fills it, because that has the evaluators. It is read by `build_evaluator`, by the class counts and
by the checks before a run. `register_evaluator_type` adds an entry from outside.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

# Called with the data set's name and the folder for predictions. None: this data set has no
# annotation for the task.
EvaluatorBuilder = Callable[[str, str], DatasetEvaluator | None]

# Keys of MODEL.MASK_FORMER.TEST.
TASKS = ("PANOPTIC_ON", "INSTANCE_ON", "SEMANTIC_ON")
CLASS_LISTS = ("thing_classes", "stuff_classes")


@dataclass(frozen=True)
class EvaluatorType:
    """What follows from an evaluator type.

    Attributes:
        builders: task, one of TASKS → what builds its evaluator.
        classes: the metadata entry that lists the classes a model of the data set predicts:
            "thing_classes" for instances; "stuff_classes" for semantic and panoptic data, where it
            lists things as well.
    """

    builders: Mapping[str, EvaluatorBuilder]
    classes: str


EVALUATOR_TYPES: dict[str, EvaluatorType] = {}


def register_evaluator_type(
    name: str, builders: Mapping[str, EvaluatorBuilder], *, classes: str
) -> None:
    """Add an evaluator type. If the name is taken, the first entry stays and a warning says so.

    Args:
        name: value of `evaluator_type` in a data set's metadata.
        builders: task ("PANOPTIC_ON", "INSTANCE_ON", "SEMANTIC_ON") → function of the data set's
            name and the output folder that returns a `DatasetEvaluator`. A task is evaluated if
            MODEL.MASK_FORMER.TEST turns it on.
        classes: "thing_classes" or "stuff_classes": the metadata entry with the names of the
            classes that the model predicts.

    Raises:
        ValueError: no or unknown tasks, or another value of `classes`.
    """
    if not builders or not set(builders) <= set(TASKS):
        raise ValueError(
            f"evaluator type {name!r} has the tasks {list(builders)}; allowed: one or more of "
            f"{', '.join(TASKS)}"
        )
    if classes not in CLASS_LISTS:
        raise ValueError(
            f"evaluator type {name!r} has classes={classes!r}; allowed: {', '.join(CLASS_LISTS)}"
        )
    if name in EVALUATOR_TYPES:
        logging.getLogger(__name__).warning(
            "Evaluator type %r is already registered; the first entry stays.", name
        )
        return
    EVALUATOR_TYPES[name] = EvaluatorType(dict(builders), classes)


def evaluator_type_of(dataset_name: str) -> EvaluatorType:
    """The entry of a data set.

    Raises:
        ValueError: its evaluator type is unknown.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type not in EVALUATOR_TYPES:
        raise ValueError(
            f"Data set {dataset_name!r} has evaluator_type {evaluator_type!r} in its metadata; "
            f"known: {', '.join(EVALUATOR_TYPES)}. For others call "
            "mask2former.evaluation.register_evaluator_type or override Trainer.build_evaluator."
        )
    return EVALUATOR_TYPES[evaluator_type]


def builders_of(cfg: CfgNode, dataset_name: str) -> dict[str, EvaluatorBuilder]:
    """The builders of the tasks that the config turns on, at least one.

    Raises:
        ValueError: an unknown evaluator type, or no task of it is turned on.
    """
    possible = evaluator_type_of(dataset_name).builders
    test = cfg.MODEL.MASK_FORMER.TEST
    builders = {task: build for task, build in possible.items() if test[task]}
    if not builders:
        raise nothing_to_evaluate(dataset_name)
    return builders


def nothing_to_evaluate(dataset_name: str) -> ValueError:
    """The error of a data set on which the config turns on no task that has annotations."""
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    return ValueError(
        f"Nothing to evaluate on {dataset_name!r} (evaluator_type {evaluator_type!r}): set "
        f"MODEL.MASK_FORMER.TEST.{' or '.join(EVALUATOR_TYPES[evaluator_type].builders)} to True, "
        "or name other data sets in DATASETS.TEST."
    )
