"""Activation checkpointing: recompute activations in backward instead of saving them.

The policy is the config key MODEL.CHECKPOINTING, applied to a built model from outside:

none        save all activations.
selective   recompute what is large and cheap: everything in the pixel decoder but convolutions and
            the sampling op, folded weights of convolutions on a CPU, point losses.
blocks      in addition whole layers of the pixel decoder's encoder, cross-attention layers of the
            decoder, and the blocks of the backbone: Detectron2's ResNets, and backbones with
            `set_checkpointing(enabled)`, as all of this project have.
auto        selective; on a GPU the trainer changes it to none when it has seen how much memory the
            first iterations take (`has_room`).

Gradients are the same with each policy. `torch.func.functional_call` needs "none": backward would
recompute with the module's own parameters. Flags on modules: `_saves_all` turns `checkpointed` into
a plain call, `_recompute_whole` is read where a module is called (`utils/twins.py`).
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.modeling.backbone import FPN, Backbone, ResNet
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ..config_checks import CHECKPOINTING
from ..modeling.backbone.depths import describes_depths
from ..modeling.backbone.swin import BasicLayer
from ..modeling.layers import CrossAttentionLayer
from ..modeling.pixel_decoder.msdeformattn import MSDeformAttnTransformerEncoderLayer
from .resnet_blocks import recompute_block

_logger = logging.getLogger(__name__)

# With policy "none" the activations of ResNet-50 take 1.9 to 2.0 times the bytes of "selective", in
# half and in full precision; parameters and optimiser take what they took. The rest is left for
# batches with more targets or larger images, and for fragmentation.
_NEEDED = 2.5
_BLOCKS = (MSDeformAttnTransformerEncoderLayer, CrossAttentionLayer)


def set_checkpointing(model: nn.Module, policy: str) -> None:
    """Apply a policy to all parts of a model.

    Raises:
        ValueError: no such policy.
    """
    if policy not in CHECKPOINTING:
        raise ValueError(f"MODEL.CHECKPOINTING is {policy!r}; allowed: {', '.join(CHECKPOINTING)}")
    for module in model.modules():
        vars(module)["_saves_all"] = policy == "none"
    if policy == "blocks":
        nested = {  # such as the transformer inside a feature pyramid
            part
            for backbone in model.modules()
            if isinstance(backbone, Backbone) and describes_depths(backbone)
            for part in backbone.modules()
            if part is not backbone
        }
        for module in model.modules():
            if isinstance(module, _BLOCKS):
                _save_all_within(module)
                vars(module)["_recompute_whole"] = True
            elif isinstance(module, BasicLayer):
                module.use_checkpoint = True
            elif recompute_block(module):
                _save_all_within(module)
            elif isinstance(module, Backbone) and module not in nested:
                _recompute_backbone(module)


def _save_all_within(block: nn.Module) -> None:
    """The block is recomputed as a whole."""
    for part in block.modules():
        vars(part)["_saves_all"] = True


def _recompute_backbone(backbone: Backbone) -> None:
    if describes_depths(backbone) and hasattr(backbone, "set_checkpointing"):
        backbone.set_checkpointing(True)
    elif not isinstance(backbone, ResNet | FPN):
        _logger.warning(
            f"MODEL.CHECKPOINTING is 'blocks', but the backbone {type(backbone).__name__} has no "
            "method `set_checkpointing(enabled)`: it saves its activations."
        )


def has_room(peak: int, available: int) -> bool:
    """Whether memory is ample for policy "none".

    Args:
        peak: bytes allocated at most, in iterations with policy "selective".
        available: bytes that this process could allocate in all.
    """
    return _NEEDED * peak <= available


def checkpointed(
    module: nn.Module,
    function: Callable[..., Any],
    *args: Any,
    keep: Sequence[torch._ops.OpOverload] = (),
    random: bool = False,
) -> Any:
    """`function(*args)`, saving only the arguments and the results of `keep` for backward.

    A plain call if the policy of the module is to save everything, if gradients are disabled, or
    under a compiler, which decides what to recompute.

    Args:
        module: its policy applies.
        function: computes from its arguments and parameters; called again in backward.
        args: its arguments.
        keep: operators whose results are saved because they are slow to recompute.
        random: whether the function draws random numbers; backward then draws the same ones.
    """
    saves_all = module.__dict__.get("_saves_all", False)
    if saves_all or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*args)
    options: dict[str, Any] = {}
    if keep:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, list(keep))
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random, **options)
