"""Swin Transformer backbone ("Swin Transformer: Hierarchical Vision Transformer using Shifted
Windows", Liu et al., ICCV 2021).

    image (B, 3, H, W) → PatchEmbed (stride 4, C channels) → 4 × BasicLayer → res2 … res5

Each stage's map has half the height and width and twice the channels of the one before (strides 4,
8, 16, 32). The parts are in `swin_layers.py`.

Shape letters: B batch, C channels of the first stage, H W height and width of the current map.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from .swin_layers import (
    BasicLayer,
    Mlp,
    NormLayer,
    PatchEmbed,
    PatchMerging,
    SwinTransformerBlock,
    WindowAttention,
    pair,
    window_partition,
    window_reverse,
)

__all__ = [
    "BasicLayer",
    "D2SwinTransformer",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "SwinTransformer",
    "SwinTransformerBlock",
    "WindowAttention",
    "window_partition",
    "window_reverse",
]


class SwinTransformer(nn.Module):
    """The Swin Transformer without its classification head.

    Linear layers start with PyTorch's default initialisation, as in the published release, so that
    a seed gives the same weights; `init_weights` gives those of the Swin paper.

    Args:
        pretrain_img_size: size in pixels of the pretraining images, one number or (height, width);
            the size of the absolute position table.
        patch_size: side of a patch in pixels, or (height, width).
        in_chans: channels of the image.
        embed_dim: C of the first stage; each following stage doubles it.
        depths: number of blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: M, in tokens.
        mlp_ratio: hidden channels of the feed-forward networks, relative to C.
        qkv_bias: whether the query, key and value projections have a bias.
        qk_scale: factor on the attention logits; None (or 0) means D ** -0.5.
        drop_rate: dropout probability of tokens and outputs, in [0, 1).
        attn_drop_rate: dropout probability of attention weights, in [0, 1).
        drop_path_rate: probability of leaving out a branch of the last block, in [0, 1); it grows
            linearly from 0 in the first block ("Deep Networks with Stochastic Depth", section 3).
        norm_layer: makes a normalisation of that many channels.
        ape: add a learned absolute position table, resized to the map.
        patch_norm: normalise the patch embedding.
        out_indices: stages to return, from 0 on.
        frozen_stages: parts that are not trained: -1 none, 0 the patch embedding, 1 also the
            position table, s ≥ 2 also the first s - 1 stages.
        use_checkpoint: recompute the blocks in the backward pass: less memory, more time.

    Raises:
        ValueError: an argument is out of its range or two do not fit together; the message names
            the argument and its config key.
    """

    def __init__(
        self,
        pretrain_img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        norm_layer: NormLayer = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        _check_sizes(patch_size, embed_dim, window_size, mlp_ratio)
        _check_stages(embed_dim, depths, num_heads, out_indices, frozen_stages)
        _check_rates(
            drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate
        )
        self.pretrain_img_size = pretrain_img_size
        self.num_layers = len(depths)
        self.embed_dim = embed_dim
        self.ape = ape
        self.patch_norm = patch_norm
        self.out_indices = out_indices
        self.frozen_stages = frozen_stages
        self.num_features = [embed_dim * 2**i for i in range(self.num_layers)]

        self.patch_embed = PatchEmbed(
            patch_size, in_chans, embed_dim, norm_layer if patch_norm else None
        )
        if ape:
            height, width = (
                size // patch


def _check_stages(
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    out_indices: Sequence[int],
    frozen_stages: int,
) -> None:
    """Reject lists of stages that do not fit together."""
    if len(depths) != len(num_heads):
        raise ValueError(
            f"depths (MODEL.SWIN.DEPTHS) has {len(depths)} stages, num_heads "
            f"(MODEL.SWIN.NUM_HEADS) has {len(num_heads)}: give one number per stage in both."
        )
    if not depths or min(depths) < 1:
        raise ValueError(
            f"depths (MODEL.SWIN.DEPTHS) is {list(depths)}: each stage needs at least one block."
        )
    for i, heads in enumerate(num_heads):
        channels = embed_dim * 2**i
        if heads < 1 or channels % heads:
            raise ValueError(
                f"num_heads (MODEL.SWIN.NUM_HEADS) is {list(num_heads)}: the {channels} channels "
                f"of stage {i} (MODEL.SWIN.EMBED_DIM {embed_dim}, doubled by each stage) do not "
                f"divide into {heads} heads."
            )
    if any(i not in range(len(depths)) for i in out_indices):
        raise ValueError(f"out_indices is {tuple(out_indices)}, but there are {len(depths)} stages")
    if frozen_stages > len(depths) + 1:
        raise ValueError(
            f"frozen_stages is {frozen_stages}; {len(depths) + 1} freezes all {len(depths)} stages"
        )


def _check_rates(**rates: float) -> None:
    """Reject probabilities outside [0, 1); at 1 nothing would be left to train."""
    for key, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{key} (MODEL.SWIN.{key.upper()}) is {rate}: it must be in [0, 1).")


# Several projects register a backbone of this name; two of them in one process is no error.
if D2SwinTransformer.__name__ in BACKBONE_REGISTRY:
    logging.getLogger(__name__).warning(
        "MODEL.BACKBONE.NAME 'D2SwinTransformer' already belongs to %s and still does.",
        BACKBONE_REGISTRY.get(D2SwinTransformer.__name__).__module__,
    )
else:
    BACKBONE_REGISTRY.register(D2SwinTransformer)
