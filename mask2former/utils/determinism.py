"""Deterministic mode (config key DETERMINISTIC): the same bits in every run, on a GPU too.

Operators whose backward adds in any order are then replaced, by torch or here, or torch raises.
"""

import logging
import os

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)


def use_deterministic_algorithms() -> None:
    """Turn the mode on in this process.

    Call it before the first matrix product on a GPU, because cuBLAS reads its variable once.
    """
    is_on = torch.are_deterministic_algorithms_enabled()
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It would choose algorithms by timing.
    torch.backends.cudnn.benchmark = False
    if not is_on:
        _logger.info(
            "DETERMINISTIC: torch.use_deterministic_algorithms(True), cudnn.benchmark off, "
            f"CUBLAS_WORKSPACE_CONFIG={workspace}"
        )


def is_deterministic(x: Tensor) -> bool:
    """Whether to avoid operators on `x` that add in any order; those of a CPU do not."""
    return torch.are_deterministic_algorithms_enabled() and not x.is_cpu
