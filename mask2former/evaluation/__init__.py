"""Evaluation: official PQ, AP and mIoU, chosen by the data set and by what the config turns on."""

from .build import build_evaluator
from .instance_evaluation import InstanceSegEvaluator
from .panoptic_evaluation import PanopticEvaluator

__all__ = ["InstanceSegEvaluator", "PanopticEvaluator", "build_evaluator"]
