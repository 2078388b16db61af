"""The evaluators of a data set: by its evaluator type and the tasks that the config turns on.

evaluator_type                  PANOPTIC_ON   INSTANCE_ON          SEMANTIC_ON
"sem_seg"                                                          mIoU
"coco"                                        mask AP
"lvis"                                        LVIS mask AP
"coco_panoptic_seg"             PQ            mask AP of things    mIoU
"ade20k_panoptic_seg"           PQ            mask AP of things    mIoU
"mapillary_vistas_panoptic_seg" PQ            mask AP of things    mIoU
"cityscapes_sem_seg"                                               Cityscapes' IoU
"cityscapes_instance"                         Cityscapes' AP
"cityscapes_panoptic_seg"       PQ            Cityscapes' AP       Cityscapes' IoU

`register_evaluator_type` adds a row.
"""

import logging
import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from ..data.evaluator_types import (
    EvaluatorBuilder,
    builders_of,
    nothing_to_evaluate,
    register_evaluator_type,
)
from .cityscapes_evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from .instance_evaluation import InstanceSegEvaluator
from .lvis_evaluation import LVISEvaluator
from .panoptic_evaluation import PanopticEvaluator
from .semantic_evaluation import build_semantic_evaluator

_Builders = dict[str, EvaluatorBuilder]


def _instance(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return InstanceSegEvaluator(dataset_name, output_dir=output_folder)


def _things(dataset_name: str, output_folder: str) -> DatasetEvaluator | None:
    if MetadataCatalog.get(dataset_name).get("json_file"):
        return _instance(dataset_name, output_folder)
    logging.getLogger(__name__).warning(
        f"Instances are not evaluated on {dataset_name}: its metadata has no COCO json_file."
    )
    return None


def _lvis(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return LVISEvaluator(dataset_name, output_dir=output_folder)


def _cityscapes_instance(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return CityscapesInstanceEvaluator(dataset_name)


def _cityscapes_semantic(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return CityscapesSemSegEvaluator(dataset_name)


_PANOPTIC: _Builders = {
    "PANOPTIC_ON": PanopticEvaluator,
    "INSTANCE_ON": _things,
    "SEMANTIC_ON": build_semantic_evaluator,
}
_CITYSCAPES_PANOPTIC: _Builders = {
    "PANOPTIC_ON": PanopticEvaluator,
    "INSTANCE_ON": _cityscapes_instance,
    "SEMANTIC_ON": _cityscapes_semantic,
}
_TYPES: tuple[tuple[str, _Builders, str], ...] = (
    ("sem_seg", {"SEMANTIC_ON": build_semantic_evaluator}, "stuff_classes"),
    ("coco", {"INSTANCE_ON": _instance}, "thing_classes"),
    ("lvis", {"INSTANCE_ON": _lvis}, "thing_classes"),
    ("coco_panoptic_seg", _PANOPTIC, "stuff_classes"),
    ("ade20k_panoptic_seg", _PANOPTIC, "stuff_classes"),
    ("mapillary_vistas_panoptic_seg", _PANOPTIC, "stuff_classes"),
    ("cityscapes_sem_seg", {"SEMANTIC_ON": _cityscapes_semantic}, "stuff_classes"),
    ("cityscapes_instance", {"INSTANCE_ON": _cityscapes_instance}, "thing_classes"),
    ("cityscapes_panoptic_seg", _CITYSCAPES_PANOPTIC, "stuff_classes"),
)
for _name, _builders, _classes in _TYPES:
    register_evaluator_type(_name, _builders, classes=_classes)


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """Build the evaluators of one data set.

    Args:
        cfg: reads OUTPUT_DIR and MODEL.MASK_FORMER.TEST.{PANOPTIC_ON,INSTANCE_ON,SEMANTIC_ON}.
        dataset_name: registered name; its metadata has `evaluator_type`.
        output_folder: where evaluators write predictions; default OUTPUT_DIR/inference.

    Raises:
        ValueError: an unknown evaluator type, or nothing that is turned on can be evaluated.
        ImportError: the data set's official evaluation package is not installed.
    """
    output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    builders = builders_of(cfg, dataset_name).values()
    evaluators = [e for build in builders if (e := build(dataset_name, output_folder)) is not None]
    if not evaluators:
        raise nothing_to_evaluate(dataset_name)
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
