"""MODEL.BACKBONE.FREEZE_AT: which parts of a backbone are not trained.

Frozen parts stay in evaluation mode while the model trains: their statistics do not move, and
neither dropout nor stochastic depth changes what they compute. No gradient is computed for them.
"""

import logging

from detectron2.config import CfgNode
from torch import nn

from ...utils.chosen_keys import is_own, is_unset

_logger = logging.getLogger(__name__)

FREEZE_AT = "MODEL.BACKBONE.FREEZE_AT"
_DEFAULT = 2  # in Detectron2's config, meant for ResNets
# A config file with every key has a FREEZE_AT that nobody may have chosen: the original release
# writes 2 for Swin, and freezes nothing. One with this key, which came with the freezing of all
# backbones, is from this project, and its FREEZE_AT is what the run did.
FREEZE_AT_COUNTS = "SOLVER.LAYER_DECAY"


def freeze_at_of(cfg: CfgNode) -> int:
    """FREEZE_AT for a backbone that is not one of Detectron2's.

    The original release does not read it for these, and its default in Detectron2 is 2. That value
    counts only where the config file itself or an override sets it.

    Returns:
        1 for the stem, n for the first n - 1 stages as well; 0 for nothing.
    """
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at == _DEFAULT and not is_own(cfg, FREEZE_AT):
        if not is_unset(cfg, FREEZE_AT):
            _logger.info(
                f"{FREEZE_AT} is {_DEFAULT}, Detectron2's default, and nothing of "
                f"{cfg.MODEL.BACKBONE.NAME} is frozen. To freeze the stem and the first stage, set "
                "it in the config file itself or on the command line."
            )
        return 0
    return max(freeze_at, 0)


def is_chosen_default(cfg: CfgNode) -> bool:
    """Whether FREEZE_AT is 2 because somebody wants it so; a file then has `FREEZE_AT_COUNTS`.

    Args:
        cfg: with a backbone of this project.
    """
    return freeze_at_of(cfg) == _DEFAULT


def check_freeze_at(backbone: nn.Module, freeze_at: int, num_stages: int) -> None:
    """Check that a backbone has the stages that are to be frozen.

    Raises:
        ValueError: it has not.
    """
    if not 0 <= freeze_at <= num_stages + 1:
        raise ValueError(
            f"{FREEZE_AT} is {freeze_at}; allowed: 0 to {num_stages + 1}, because "
            f"{type(backbone).__name__} has a stem and {num_stages} stages."
        )


def freeze(module: nn.Module) -> None:
    """Put a part in evaluation mode, without gradients."""
    module.eval().requires_grad_(False)
