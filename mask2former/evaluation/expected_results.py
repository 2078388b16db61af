"""TEST.EXPECTED_RESULTS: that its tasks and metrics are those of an evaluation.

Detectron2's `verify_results` compares the numbers. It ends with a KeyError where a task is missing,
and does not say which metric is.

check_expected_tasks(cfg, with_tta)   before a run, as far as the tasks are known
check_expected_results(cfg, results)  before the comparison
"""

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

from ..data.evaluator_types import builders_of

_KEY = "TEST.EXPECTED_RESULTS"
# Task of the config → its name in the results of the evaluators here.
RESULT_NAMES = {"PANOPTIC_ON": "panoptic_seg", "INSTANCE_ON": "segm", "SEMANTIC_ON": "sem_seg"}
_AUGMENTED = "sem_seg_TTA"


def check_expected_tasks(cfg: CfgNode, *, with_tta: bool) -> None:
    """Check before a run that the tasks of TEST.EXPECTED_RESULTS will be evaluated.

    What evaluators of other projects return is not known before.

    Args:
        cfg: the config; its evaluator types are known.
        with_tta: whether the run evaluates with TEST.AUG, too.

    Raises:
        ValueError: a task is not evaluated, or there is not exactly one data set, whose results
            could be compared.
    """
    expected = cfg.TEST.EXPECTED_RESULTS
    if not expected:
        return
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            f"{_KEY} is {expected!r}, which is compared with the results of one data set, but "
            f"DATASETS.TEST is {cfg.DATASETS.TEST!r}: name one there, or leave the key out."
        )
    name = cfg.DATASETS.TEST[0]
    builders = builders_of(cfg, name)
    if not all(build.__module__.startswith("mask2former.") for build in builders.values()):
        return
    tasks = [RESULT_NAMES[task] for task in builders]
    if with_tta and cfg.TEST.AUG.ENABLED:
        tasks.append(_AUGMENTED)
    for i, (task, *_) in enumerate(expected):
        if task not in tasks:
            raise ValueError(
                f"{_KEY}[{i}] has the task {task!r}, which is not evaluated on {name!r}: "
                f"{', '.join(map(repr, tasks))}. Name one of these, or turn the task on in "
                "MODEL.MASK_FORMER.TEST."
            )


def check_expected_results(cfg: CfgNode, results: Mapping[str, Any]) -> None:
    """Check that an evaluation has the tasks and metrics of TEST.EXPECTED_RESULTS.

    Args:
        cfg: the config.
        results: {task: {metric: value}}.

    Raises:
        ValueError: one is missing.
    """
    for i, (task, metric, *_) in enumerate(cfg.TEST.EXPECTED_RESULTS):
        for what, key, known in (
            ("task", task, results),
            ("metric", metric, results.get(task, {})),
        ):
            if key not in known:
                raise ValueError(
                    f"{_KEY}[{i}] has the {what} {key!r}, which the evaluation has not: "
                    f"{', '.join(map(repr, known)) or 'nothing'}."
                )
