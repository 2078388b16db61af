"""Mask2Former: one architecture for panoptic, instance and semantic segmentation, on Detectron2.

Importing the package registers its models, backbones and data sets with Detectron2.
"""

import importlib as _importlib
from typing import TYPE_CHECKING

from .utils import required_modules as _required_modules

if TYPE_CHECKING:
    from .inference import PredictionFilter, Result
    from .predictor import Predictor

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

# Imported when they are first used: they need Detectron2's engine, which takes seconds.
_LAZY = {"PredictionFilter": "inference", "Predictor": "predictor", "Result": "inference"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_importlib.import_module(f".{_LAZY[name]}", __name__), name)


__all__ = [
    "COCOInstanceNewBaselineDatasetMapper",
    "COCOPanopticNewBaselineDatasetMapper",
    "DETRPanopticDatasetMapper",
    "InstanceSegEvaluator",
    "MaskFormer",
    "MaskFormerInstanceDatasetMapper",
    "MaskFormerPanopticDatasetMapper",
    "MaskFormerSemanticDatasetMapper",
    "PredictionFilter",
    "Predictor",
    "Result",
    "SemanticSegmentorWithTTA",
    "add_maskformer2_config",
    "data",
    "modeling",
]
