"""Official metrics, chosen by the evaluator type of the data set and the tasks in the config."""

from ..data.evaluator_types import register_evaluator_type
from .boundary_ap import BoundaryEval, evaluate_boundary_ap, mask_to_boundary
from .build import build_evaluator
from .cityscapes_evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from .instance_evaluation import InstanceSegEvaluator
from .lvis_evaluation import LVISEvaluator
from .panoptic_evaluation import PanopticEvaluator
from .proposal_evaluation import LayerProposals, ProposalEvaluator, layer_proposals
from .results import results_table, write_results
from .semantic_pq import SemanticPQ

__all__ = [
    "BoundaryEval",
    "CityscapesInstanceEvaluator",
    "CityscapesSemSegEvaluator",
    "InstanceSegEvaluator",
    "LVISEvaluator",
    "LayerProposals",
    "PanopticEvaluator",
    "ProposalEvaluator",
    "SemanticPQ",
    "build_evaluator",
    "evaluate_boundary_ap",
    "layer_proposals",
    "mask_to_boundary",
    "register_evaluator_type",
    "results_table",
    "write_results",
]
