"""Which evaluators a data set gets: by its evaluator type and by what the config turns on.

evaluator_type       task turned on → evaluator
"sem_seg"            semantic → mIoU
"coco"               instance → mask AP
"coco_panoptic_seg"  panoptic → PQ, instance → mask AP of the things, semantic → mIoU
"""

import logging
import os
from collections.abc import Callable

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators, SemSegEvaluator
from detectron2.utils.file_io import PathManager
from panopticapi.utils import rgb2id
from PIL import Image

from .instance_evaluation import InstanceSegEvaluator
from .panoptic_evaluation import PanopticEvaluator

_IGNORE = 255
_TASKS = {
    "sem_seg": ("SEMANTIC_ON",),
    "coco": ("INSTANCE_ON",),
    "coco_panoptic_seg": ("PANOPTIC_ON", "INSTANCE_ON", "SEMANTIC_ON"),
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
    """
    metadata = MetadataCatalog.get(dataset_name)
    evaluator_type = metadata.get("evaluator_type")
    if evaluator_type not in _TASKS:
        raise ValueError(
            f"Data set {dataset_name!r} has evaluator_type {evaluator_type!r} in its metadata; "
            f"known: {', '.join(_TASKS)}. For others override Trainer.build_evaluator."
        )
    output_folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    tasks = [task for task in _TASKS[evaluator_type] if cfg.MODEL.MASK_FORMER.TEST[task]]
    if "INSTANCE_ON" in tasks and evaluator_type != "coco" and not metadata.get("json_file"):
        logging.getLogger(__name__).warning(
            f"Instances are not evaluated on {dataset_name}: its metadata has no COCO json_file."
        )
        tasks.remove("INSTANCE_ON")
    if not tasks:
        possible = " or ".join(_TASKS[evaluator_type])
        raise ValueError(
            f"Nothing to evaluate on {dataset_name!r} (evaluator_type {evaluator_type!r}): set "
            f"MODEL.MASK_FORMER.TEST.{possible} to True, or name other data sets in DATASETS.TEST."
        )
    builders: dict[str, Callable[[], DatasetEvaluator]] = {
        "PANOPTIC_ON": lambda: PanopticEvaluator(dataset_name, output_folder),
        "INSTANCE_ON": lambda: InstanceSegEvaluator(dataset_name, output_dir=output_folder),
        "SEMANTIC_ON": lambda: _build_semantic_evaluator(dataset_name, output_folder),
    }
    evaluators = [builders[task]() for task in tasks]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def load_label_map(file_name: str, dtype: np.dtype | type | None = None) -> np.ndarray:
    """Read a label image (H, W), one class id a pixel."""
    with PathManager.open(file_name, "rb") as file:
        return np.array(Image.open(file), dtype=dtype)


def _build_semantic_evaluator(dataset_name: str, output_folder: str) -> SemSegEvaluator:
    loading_fn = load_label_map
    records = DatasetCatalog.get(dataset_name)
    if not all("sem_seg_file_name" in record for record in records):
        loading_fn = PanopticToSemantic(records)
        dataset_name = _register_semantic_view(dataset_name, records)
    return SemSegEvaluator(
        dataset_name, distributed=True, output_dir=output_folder, sem_seg_loading_fn=loading_fn
    )


class PanopticToSemantic:
    """Reads semantic truth out of panoptic PNGs: each segment's class, 255 where there is none."""

    def __init__(self, records: list[dict]) -> None:
        """
        Args:
            records: with `pan_seg_file_name` and `segments_info` in contiguous class ids.
        """
        self._classes = {
            record["pan_seg_file_name"]: {
                s["id"]: s["category_id"] for s in record["segments_info"]
            }
            for record in records
        }

    def __call__(self, file_name: str, dtype: np.dtype | type = int) -> np.ndarray:
        """The label map (H, W) of a panoptic PNG."""
        segment_ids = rgb2id(load_label_map(file_name))
        semantic = np.full(segment_ids.shape, _IGNORE, dtype=dtype)
        for segment_id, class_id in self._classes[file_name].items():
            semantic[segment_ids == segment_id] = class_id
        return semantic


def _register_semantic_view(dataset_name: str, records: list[dict]) -> str:
    """Register the panoptic data set under a second name, as the semantic evaluator wants it.

    Raises:
        ValueError: thing and stuff classes overlap, or `stuff_classes` does not name all classes.
    """
    view = f"{dataset_name}/semantic_from_panoptic"
    if view in DatasetCatalog.list():
        return view
    metadata: Metadata = MetadataCatalog.get(dataset_name)
    to_contiguous = {
        **metadata.stuff_dataset_id_to_contiguous_id,
        **metadata.thing_dataset_id_to_contiguous_id,
    }
    num_classes = len(metadata.stuff_classes)
    if sorted(to_contiguous.values()) != list(range(num_classes)):
        raise ValueError(
            f"Semantic segmentation cannot be evaluated on {dataset_name}: it has no "
            "sem_seg_file_name, and its panoptic classes do not match its metadata: stuff_classes "
            f"has {num_classes} names, the contiguous ids are {sorted(to_contiguous.values())}."
        )
    keys = {"file_name": "file_name", "sem_seg_file_name": "pan_seg_file_name"}
    view_records = [{new: record[old] for new, old in keys.items()} for record in records]
    DatasetCatalog.register(view, lambda: view_records)
    MetadataCatalog.get(view).set(
        stuff_classes=metadata.stuff_classes,
        stuff_dataset_id_to_contiguous_id=to_contiguous,
        ignore_label=_IGNORE,
    )
    return view
