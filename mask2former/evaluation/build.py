"""Which evaluators a data set gets: by its evaluator type and by what the config turns on.

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
"""

import logging
import os
from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from .cityscapes_evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from .instance_evaluation import InstanceSegEvaluator
from .lvis_evaluation import LVISEvaluator
from .panoptic_evaluation import PanopticEvaluator
from .semantic_evaluation import build_semantic_evaluator

_Builder = Callable[[str, str], DatasetEvaluator]


def _instance(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return InstanceSegEvaluator(dataset_name, output_dir=output_folder)


def _lvis(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return LVISEvaluator(dataset_name, output_dir=output_folder)


def _cityscapes_instance(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return CityscapesInstanceEvaluator(dataset_name)


def _cityscapes_semantic(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    return CityscapesSemSegEvaluator(dataset_name)


_PANOPTIC: dict[str, _Builder] = {
    "PANOPTIC_ON": PanopticEvaluator,
    "INSTANCE_ON": _instance,
    "SEMANTIC_ON": build_semantic_evaluator,
}
_BUILDERS: dict[str, dict[str, _Builder]] = {
    "sem_seg": {"SEMANTIC_ON": build_semantic_evaluator},
    "coco": {"INSTANCE_ON": _instance},
    "lvis": {"INSTANCE_ON": _lvis},
    "coco_panoptic_seg": _PANOPTIC,
    "ade20k_panoptic_seg": _PANOPTIC,
    "mapillary_vistas_panoptic_seg": _PANOPTIC,
    "cityscapes_sem_seg": {"SEMANTIC_ON": _cityscapes_semantic},
    "cityscapes_instance": {"INSTANCE_ON": _cityscapes_instance},
    "cityscapes_panoptic_seg": {
        "PANOPTIC_ON": PanopticEvaluator,
        "INSTANCE_ON": _cityscapes_instance,
        "SEMANTIC_ON": _cityscapes_semantic,
    },
}


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str | None = None
) -> DatasetEvaluator:
    """Build the evaluators of one data set.

    Args:
        cfg: read are OUTPUT_DIR and MODEL.MASK_FORMER.TEST.{PANOPTIC_ON,INSTANCE_ON,SEMANTIC_ON}.
        dataset_name: registered name; its metadata has `evaluator_type`.
        output_folder: where evaluators keep predictions; by default OUTPUT_DIR/inference.

    Raises:
        ValueError: an unknown evaluator type, or nothing that is turned on can be evaluated.
        ImportError: the data set's official evaluation package is not installed.
    """
    metadata = MetadataCatalog.get(dataset_name)
    evaluator_type = metadata.get("evaluator_type")
    if evaluator_type not in _BUILDERS:
        raise ValueError(
            f"Data set {dataset_name!r} has evaluator_type {evaluator_type!r} in its metadata; "
            f"known: {', '.join(_BUILDERS)}. For others override Trainer.build_evaluator."
        )
    output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    possible = _BUILDERS[evaluator_type]
    builders = {task: build for task, build in possible.items() if cfg.MODEL.MASK_FORMER.TEST[task]}
    if possible is _PANOPTIC and "INSTANCE_ON" in builders and not metadata.get("json_file"):
        logging.getLogger(__name__).warning(
            f"Instances are not evaluated on {dataset_name}: its metadata has no COCO json_file."
        )
        del builders["INSTANCE_ON"]
    if not builders:
        raise ValueError(
            f"Nothing to evaluate on {dataset_name!r} (evaluator_type {evaluator_type!r}): set "
            f"MODEL.MASK_FORMER.TEST.{' or '.join(possible)} to True, or name other data sets in "
            "DATASETS.TEST."
        )
    evaluators = [build(dataset_name, output_folder) for build in builders.values()]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)
