"""Data sets registered with Detectron2, mappers from records to training samples, data loaders.

datasets/             registered names → records
dataset_mappers/      record → sample; the registry of mappers
augmentations.py      the augmentations of the mappers
lazy_augmentation.py  applies them, computing only the pixels that crops keep
targets.py            annotations → classes and masks
label_maps.py         masks that do not overlap, as label maps
packed_masks.py       masks as sent to the device
loader.py             samples → batches, in a resumable order
class_counts.py       sets the number of classes from your data and checks it for every data set
check/                checks of whole data sets, for tools/check_dataset.py
conversion/           any annotation format → COCO instances, COCO panoptic, label maps

Register your own data with `register_annotations` (any format), `register_panoptic`,
`register_instances` or `register_semantic`, and your own mapper with `register_mapper`.
"""

from . import datasets
from .dataset_mappers import (
    DATASET_MAPPER_REGISTRY,
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    DETRPanopticDatasetMapper,
    MaskFormerInstanceDatasetMapper,
    MaskFormerPanopticDatasetMapper,
    MaskFormerSemanticDatasetMapper,
    build_mapper,
    register_mapper,
)
from .datasets.register_annotations import register_annotations
from .datasets.register_custom import register_instances, register_panoptic, register_semantic

__all__ = [
    "DATASET_MAPPER_REGISTRY",
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "DETRPanopticDatasetMapper",
    "MaskFormerInstanceDatasetMapper",
    "MaskFormerPanopticDatasetMapper",
    "MaskFormerSemanticDatasetMapper",
    "build_mapper",
    "datasets",
    "register_annotations",
    "register_instances",
    "register_mapper",
    "register_panoptic",
    "register_semantic",
]
