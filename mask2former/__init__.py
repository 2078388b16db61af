"""Mask2Former: one architecture for panoptic, instance and semantic segmentation, on Detectron2.

Importing the package registers its models, backbones and data sets with Detectron2.
"""

from .utils import required_modules as _required_modules

try:
    from . import data, modeling
    from .config import add_maskformer2_config
    from .data.dataset_mappers import (
        COCOInstanceNewBaselineDatasetMapper,
        COCOPanopticNewBaselineDatasetMapper,
        DETRPanopticDatasetMapper,
        MaskFormerInstanceDatasetMapper,
        MaskFormerPanopticDatasetMapper,
        MaskFormerSemanticDatasetMapper,
    )
    from .evaluation import InstanceSegEvaluator
    from .fast import table as _fast_twins  # noqa: F401  (importing it lets them run)
    from .maskformer_model import MaskFormer
    from .test_time_augmentation import SemanticSegmentorWithTTA
except ModuleNotFoundError as error:
    _explained = _required_modules.explain(error)
    if _explained is None:
        raise
    if not _required_modules.is_env_program():
        raise _explained from None

__version__ = "0.1.0"

__all__ = [
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "DETRPanopticDatasetMapper",
    "InstanceSegEvaluator",
    "MaskFormer",
    "MaskFormerInstanceDatasetMapper",
    "MaskFormerPanopticDatasetMapper",
    "MaskFormerSemanticDatasetMapper",
    "SemanticSegmentorWithTTA",
    "add_maskformer2_config",
    "data",
    "modeling",
]
