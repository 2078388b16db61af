"""Data: sets registered with Detectron2, mappers from records to training samples, the loader.

datasets/          registered names → records
dataset_mappers/   record → sample, with augmentations.py, targets.py and
  lazy_augmentation.py           Detectron2's transforms, computing only what crops keep
  label_maps.py, packed_masks.py  targets as they travel to the device
loader.py          samples → batches, in an order that can be resumed
class_counts.py    the number of classes follows from your own data, and must be every data set's
check/             reads whole data sets and reports what is wrong with them

`register_panoptic`, `register_instances` and `register_semantic` register your own data.
"""

from . import datasets
from .dataset_mappers import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
    MaskFormerInstanceDatasetMapper,
    MaskFormerPanopticDatasetMapper,
    MaskFormerSemanticDatasetMapper,
    build_mapper,
)
from .datasets.register_custom import register_instances, register_panoptic, register_semantic

__all__ = [
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "MaskFormerInstanceDatasetMapper",
    "MaskFormerPanopticDatasetMapper",
    "MaskFormerSemanticDatasetMapper",
    "build_mapper",
    "datasets",
    "register_instances",
    "register_panoptic",
    "register_semantic",
]
