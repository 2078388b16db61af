"""What a trained model is used with: results as plain objects, filters, models in one folder."""

from .filters import PredictionFilter
from .masks import InstanceMasks
from .result import InstanceResult, PanopticResult, Result, Segment

__all__ = [
    "InstanceMasks",
    "InstanceResult",
    "PanopticResult",
    "PredictionFilter",
    "Result",
    "Segment",
]
