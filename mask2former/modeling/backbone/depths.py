"""What the optimiser and the config need to know of a backbone: how deep each parameter is.

    depth 0: stem, position and class embeddings
    depth 1 … num_depths - 1: the blocks, in the order of the forward pass
    depth num_depths: what follows the last block, such as a feature pyramid

A backbone says it with the attribute `num_depths` and the method `parameter_depth(name)`, where the
name of the parameter is relative to the backbone. Detectron2's ResNets do not; their names are read
here.
"""

import re
from collections.abc import Callable
from typing import Any

from detectron2.modeling.backbone import FPN, ResNet
from torch import nn

_RESNET_BLOCK = re.compile(r"(res\d+)\.(\d+)\.")
# Learned tables and tokens: what no weight decay should pull to zero.
_TOKENS = (
    *("pos_embed", "position_embeddings", "rope", "cls_token", "reg_token", "dist_token"),
    *("register_tokens", "mask_token", "storage_tokens", "cls_pos_embed"),
)


def describes_depths(backbone: nn.Module) -> bool:
    """Whether a backbone says itself how deep its parameters are."""
    return hasattr(backbone, "num_depths") and hasattr(backbone, "parameter_depth")


def depths_of(backbone: Any) -> tuple[int, Callable[[str], int]]:
    """The number of depths of a backbone, and the depth of a parameter by its name.

    Args:
        backbone: this project's, Detectron2's ResNet, Detectron2's FPN on top of one of these, or
            any with `num_depths` and `parameter_depth`.

    Raises:
        ValueError: nothing is known of the depths of this backbone.
    """
    if describes_depths(backbone):
        return backbone.num_depths, backbone.parameter_depth
    if isinstance(backbone, ResNet):
        return _depths_of_resnet(backbone)
    if isinstance(backbone, FPN):
        num_depths, depth = depths_of(backbone.bottom_up)

        def depth_in_fpn(name: str) -> int:
            inner = name.removeprefix("bottom_up.")
            return num_depths if inner == name else depth(inner)

        return num_depths, depth_in_fpn
    raise ValueError(
        f"SOLVER.LAYER_DECAY is set, but the backbone {type(backbone).__name__} does not say how "
        "deep its parameters are. Give it the attribute `num_depths` and the method "
        "`parameter_depth(name) -> int`: 0 for the stem, num_depths - 1 for the last block; or set "
        "SOLVER.LAYER_DECAY to 1.0."
    )


def _depths_of_resnet(backbone: ResNet) -> tuple[int, Callable[[str], int]]:
    """Each residual block is one depth."""
    first, num_depths = {}, 1
    for name, stage in zip(backbone.stage_names, backbone.stages, strict=True):
        first[name] = num_depths
        num_depths += len(stage)

    def depth(name: str) -> int:
        if name.startswith("stem."):
            return 0
        match = _RESNET_BLOCK.match(name)
        return first[match[1]] + int(match[2]) if match and match[1] in first else num_depths

    return num_depths, depth


def layer_decay_of(backbone: nn.Module, decay: float) -> Callable[[str], float]:
    """The factor on the learning rate of each parameter of a backbone, by its name.

    decay ** (num_depths - depth), as Detectron2's `get_vit_lr_decay_rate` and BEiT have it: the
    last block has decay ** 1, what follows it and the heads have 1.

    Args:
        backbone: see `depths_of`.
        decay: in (0, 1].

    Raises:
        ValueError: the backbone says nothing of depths, or a depth that it does not have.
    """
    num_depths, depth_of = depths_of(backbone)

    def factor(name: str) -> float:
        depth = depth_of(name)
        if not 0 <= depth <= num_depths:
            raise ValueError(
                f"{type(backbone).__name__}.parameter_depth({name!r}) is {depth}; allowed: 0 to "
                f"its num_depths, {num_depths}."
            )
        return decay ** (num_depths - depth)

    return factor


def is_token(name: str) -> bool:
    """Whether a parameter of a backbone is a position embedding, or a token that it learns.

    Args:
        name: relative to the backbone.
    """
    return any(part in _TOKENS for part in name.split("."))
