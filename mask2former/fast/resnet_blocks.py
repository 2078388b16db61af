"""Activation checkpointing of Detectron2's ResNets: stem and residual blocks are recomputed.

Detectron2's classes cannot be told to do so, so the blocks of a built model change their class.
Parameters, buffers, their names and hooks stay.
"""

from detectron2.layers import CNNBlockBase
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeformBottleneckBlock,
)
from detectron2.projects.deeplab.resnet import DeepLabStem
from torch import Tensor, nn

from ..utils.recompute import recomputed


class _Recomputed(CNNBlockBase):
    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) → (B, C_out, H', W')."""
        return recomputed(self, super().forward, x)


class RecomputedBasicStem(_Recomputed, BasicStem):
    """`BasicStem`, recomputed in backward."""


class RecomputedDeepLabStem(_Recomputed, DeepLabStem):
    """`DeepLabStem`, recomputed in backward."""


class RecomputedBasicBlock(_Recomputed, BasicBlock):
    """`BasicBlock`, recomputed in backward."""


class RecomputedBottleneckBlock(_Recomputed, BottleneckBlock):
    """`BottleneckBlock`, recomputed in backward."""


class RecomputedDeformBottleneckBlock(_Recomputed, DeformBottleneckBlock):
    """`DeformBottleneckBlock`, recomputed in backward."""


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    BasicStem: RecomputedBasicStem,
    DeepLabStem: RecomputedDeepLabStem,
    BasicBlock: RecomputedBasicBlock,
    BottleneckBlock: RecomputedBottleneckBlock,
    DeformBottleneckBlock: RecomputedDeformBottleneckBlock,
}


def recompute_block(module: nn.Module) -> bool:
    """Let backward recompute a module if it is one of Detectron2's blocks.

    Subclasses of other projects, and blocks with a replaced `forward`, run as they are.

    Returns:
        Whether the module is recomputed.
    """
    kind = _KINDS.get(type(module))
    if kind is not None and "forward" not in module.__dict__:
        module.__class__ = kind
    return isinstance(module, _Recomputed)
