"""Config switches applied to a built model: fast twins and activation checkpointing."""

from detectron2.config import CfgNode
from torch import nn

from ..utils.twins import run_plain
from .checkpointing import set_checkpointing
from .frozen_norm import fold_frozen_norms


def follow_parts(model: nn.Module) -> None:
    """Prepare a model from its parts, whether or not `apply_config` was called on them.

    `MaskFormer.from_config` calls `apply_config` on the parts that it builds. The constructor has
    no config, and its parts may come from another project's `from_config`: if one of them must run
    as written, all of the model does; otherwise frozen norms are folded here.
    """
    if any("_always_plain" in part.__dict__ for part in model.children()):
        run_plain(model)
    else:
        fold_frozen_norms(model)


def apply_config(cfg: CfgNode, *modules: nn.Module) -> None:
    """Apply MODEL.FAST and MODEL.CHECKPOINTING to parts of a model, or to the whole.

    Configs made by another project's copy of `add_maskformer2_config` lack these keys; the defaults
    then apply.
    """
    for module in modules:
        if cfg.MODEL.get("FAST", True):
            fold_frozen_norms(module)
        else:
            run_plain(module)
        set_checkpointing(module, cfg.MODEL.get("CHECKPOINTING", "selective"))
