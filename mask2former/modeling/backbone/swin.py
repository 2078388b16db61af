"""Swin Transformer backbone ("Swin Transformer: Hierarchical Vision Transformer using Shifted
Windows", Liu et al., ICCV 2021).

    image (B, 3, H, W) → PatchEmbed (stride 4, C channels) → 4 × BasicLayer → res2 … res5

Each stage halves height and width of the map and doubles its channels (strides 4, 8, 16, 32). The
parts are in `swin_layers.py`.

Shape letters: B batch, C channels of the first stage, H W size of the current map.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from ...utils.registry import register_unless_taken
from .freezing import check_freeze_at, freeze, freeze_at_of
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

    Linear layers have PyTorch's default initialisation, so that a seed gives the weights of the
    original release. `init_weights` applies that of the Swin paper.

    Args:
        pretrain_img_size: size in pixels of the pretraining images, one number or (height, width);
            determines the size of the absolute position table.
        patch_size: side of a patch in pixels, or (height, width).
        in_chans: channels of the image.
        embed_dim: C of the first stage; each following stage doubles it.
        depths: number of blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: M, in tokens.
        mlp_ratio: hidden channels of the MLPs, relative to C.
        qkv_bias: whether the query, key and value projections have a bias.
        qk_scale: factor on the attention logits; None (or 0) for D ** -0.5.
        drop_rate: dropout probability of tokens and outputs, in [0, 1).
        attn_drop_rate: dropout probability of attention weights, in [0, 1).
        drop_path_rate: stochastic depth: probability of skipping a branch of the last block, in
            [0, 1); it grows linearly from 0 in the first block.
        norm_layer: constructor of a norm, called with the number of channels.
        ape: add a learned absolute position table, resized to the map.
        patch_norm: normalise the patch embedding.
        out_indices: stages to return, counted from 0.
        frozen_stages: what is not trained: -1 nothing, 0 the patch embedding, 1 also the position
            table, s ≥ 2 also the first s - 1 stages.
        use_checkpoint: activation checkpointing of each block: less memory, more time.

    Raises:
        ValueError: an argument is out of range or contradicts another; the message names the
            argument and its config key.
    """

    _freeze_at = 0  # see `freeze`

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
        check_stages(embed_dim, depths, num_heads, out_indices, frozen_stages)
        _check_rates(
            drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate
        )
        self.pretrain_img_size = pretrain_img_size
        self.num_layers = len(depths)
        self._stage_depths = list(depths)
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
                for size, patch in zip(pair(pretrain_img_size), pair(patch_size), strict=True)
            )
            if min(height, width) < 1:
                raise ValueError(
                    f"pretrain_img_size (MODEL.SWIN.PRETRAIN_IMG_SIZE) is {pretrain_img_size}, "
                    f"smaller than a patch of {patch_size} pixels."
                )
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, embed_dim, height, width))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)

        # On the CPU, because the model may be built on the meta device.
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        self.layers = nn.ModuleList(
            BasicLayer(
                dim=self.num_features[i],
                depth=depths[i],
                num_heads=num_heads[i],
                window_size=window_size,
                drop_path=rates[i].tolist(),
                norm_layer=norm_layer,
                downsample=PatchMerging if i < self.num_layers - 1 else None,
                use_checkpoint=use_checkpoint,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
            )
            for i in range(self.num_layers)
        )
        for i in out_indices:
            self.add_module(f"norm{i}", norm_layer(self.num_features[i]))
        self._freeze_stages()

    def init_weights(self) -> None:
        """Initialise as the Swin paper does, for training from scratch.

        Linear layers: truncated normal with standard deviation 0.02, zero bias. Norms: identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def _freeze_stages(self) -> None:
        frozen: list[nn.Module] = []
        if self.frozen_stages >= 0:
            frozen.append(self.patch_embed)
        if self.frozen_stages >= 1 and self.ape:
            self.absolute_pos_embed.requires_grad_(False)
        if self.frozen_stages >= 2:
            frozen += [self.pos_drop, *self.layers[: self.frozen_stages - 1]]
        if self._freeze_at >= 1:
            frozen += [self.patch_embed, self.pos_drop]
            if self.ape:
                self.absolute_pos_embed.requires_grad_(False)
        for i in range(self._freeze_at - 1):
            frozen.append(self.layers[i])
            if i in self.out_indices:
                frozen.append(getattr(self, f"norm{i}"))
        for module in frozen:
            freeze(module)

    def freeze(self, freeze_at: int) -> "SwinTransformer":
        """Freeze the first parts, as Detectron2's `ResNet.freeze` does.

        Args:
            freeze_at: 1 for the stem, which is patch embedding and position table; n for the first
                n - 1 stages as well, each with the norm of its output. At most the number of
                stages plus 1.

        Returns:
            The backbone itself.
        """
        check_freeze_at(self, freeze_at, self.num_layers)
        self._freeze_at = freeze_at
        self._freeze_stages()
        return self

    @property
    def num_depths(self) -> int:
        """The stem and each block, see `depths.py`."""
        return 1 + sum(self._stage_depths)

    def parameter_depth(self, name: str) -> int:
        """How deep a parameter is, by its name: 0 for the stem, then one for each block.

        A patch merging layer belongs to the block before it. The norms of the outputs follow the
        last block, as the heads do: ImageNet weights do not have them.
        """
        parts = name.split(".")
        if parts[0] in ("patch_embed", "absolute_pos_embed"):
            return 0
        if parts[0] != "layers":
            return self.num_depths
        stage = int(parts[1])
        before = sum(self._stage_depths[:stage])
        if parts[2] == "blocks":
            return 1 + before + int(parts[3])
        return before + self._stage_depths[stage]

    def set_checkpointing(self, enabled: bool) -> None:
        """Turn activation checkpointing of the blocks on or off."""
        layers: Any = self.layers
        for layer in layers:
            layer.use_checkpoint = enabled

    def train(self, mode: bool = True) -> "SwinTransformer":
        """Switch between training and evaluation mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the features of a batch of images.

        Args:
            x: (B, in_chans, H, W), normalised; any height and width.

        Returns:
            "res2" (stage 0), "res3", … for the stages in ``out_indices``:
            (B, C · 2**i, ⌈H/stride⌉, ⌈W/stride⌉).
        """
        x = self.patch_embed(x)  # (B, C, H, W)
        height, width = x.shape[2:]
        if self.ape:
            x = x + F.interpolate(self.absolute_pos_embed, size=(height, width), mode="bicubic")
        x = self.pos_drop(x.flatten(2).transpose(1, 2))  # (B, H·W, C)

        features = {}
        for i, layer in enumerate(self.layers):
            out, out_height, out_width, x, height, width = layer(x, height, width)
            if i in self.out_indices:
                out = getattr(self, f"norm{i}")(out)
                out = out.view(-1, out_height, out_width, self.num_features[i])
                features[f"res{i + 2}"] = out.permute(0, 3, 1, 2).contiguous()
        return features


@register_unless_taken(BACKBONE_REGISTRY)
class D2SwinTransformer(SwinTransformer, Backbone):
    """`SwinTransformer` as a Detectron2 backbone, built from a config or from keyword arguments.

    Args:
        out_features: names of the maps to return, among "res2", "res3", …
        freeze_at: what is not trained, see `SwinTransformer.freeze`.
        swin_arguments: keyword arguments of `SwinTransformer`.
    """

    @configurable
    def __init__(
        self,
        *,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 0,
        **swin_arguments: Any,
    ):
        super().__init__(**swin_arguments)
        known = [f"res{i + 2}" for i in self.out_indices]
        if not out_features or not set(out_features) <= set(known):
            raise ValueError(
                f"out_features (MODEL.SWIN.OUT_FEATURES) is {list(out_features)}, but this Swin "
                f"can return {known}: give one or more of these."
            )
        patch_height, patch_width = self.patch_embed.patch_size
        if patch_height != patch_width:
            raise ValueError(
                f"patch_size (MODEL.SWIN.PATCH_SIZE) is {(patch_height, patch_width)}: a "
                "Detectron2 backbone has one stride for both axes, so patches must be square."
            )
        self._out_features = list(out_features)
        self._out_feature_strides = {
            f"res{i + 2}": patch_height * 2**i for i in range(self.num_layers)
        }
        self._out_feature_channels = {
            f"res{i + 2}": channels for i, channels in enumerate(self.num_features)
        }
        if freeze_at > 0:
            self.freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """Arguments from `MODEL.SWIN`, MODEL.BACKBONE.FREEZE_AT and MODEL.PIXEL_MEAN.

        As in the original release, a subclass, or the Swin of another architecture than
        `MaskFormer` itself, is not frozen, and its stem has 3 channels whatever ``input_shape``,
        that is MODEL.PIXEL_MEAN, says: the images may have more channels than are passed on.
        """
        swin = cfg.MODEL.SWIN
        is_ours = cls is D2SwinTransformer and cfg.MODEL.META_ARCHITECTURE == "MaskFormer"
        channels = len(cfg.MODEL.PIXEL_MEAN) if is_ours else 3
        if is_ours and input_shape is not None:
            channels = input_shape.channels
        # Not given to the constructors of subclasses, which may not know it.
        frozen = {"freeze_at": freeze_at_of(cfg)} if is_ours else {}
        return frozen | {
            "out_features": swin.OUT_FEATURES,
            "pretrain_img_size": swin.PRETRAIN_IMG_SIZE,
            "patch_size": swin.PATCH_SIZE,
            "in_chans": channels,
            "embed_dim": swin.EMBED_DIM,
            "depths": swin.DEPTHS,
            "num_heads": swin.NUM_HEADS,
            "window_size": swin.WINDOW_SIZE,
            "mlp_ratio": swin.MLP_RATIO,
            "qkv_bias": swin.QKV_BIAS,
            "qk_scale": swin.QK_SCALE,
            "drop_rate": swin.DROP_RATE,
            "attn_drop_rate": swin.ATTN_DROP_RATE,
            "drop_path_rate": swin.DROP_PATH_RATE,
            "ape": swin.APE,
            "patch_norm": swin.PATCH_NORM,
            "use_checkpoint": swin.USE_CHECKPOINT,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the maps in ``out_features``, see `SwinTransformer.forward`."""
        assert x.dim() == 4, f"expected images of shape (B, C, H, W), got {tuple(x.shape)}"
        features = super().forward(x)
        return {name: map_ for name, map_ in features.items() if name in self._out_features}

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of this, the largest stride of the released models."""
        return 32


def _check_sizes(
    patch_size: int | tuple[int, int], embed_dim: int, window_size: int, mlp_ratio: float
) -> None:
    """Reject sizes that are not positive."""
    for key, value in (("window_size", window_size), ("embed_dim", embed_dim)):
        if value < 1:
            raise ValueError(f"{key} (MODEL.SWIN.{key.upper()}) is {value}: it must be positive.")
    if min(pair(patch_size)) < 1:
        raise ValueError(
            f"patch_size (MODEL.SWIN.PATCH_SIZE) is {patch_size}: it must be positive."
        )
    if mlp_ratio * embed_dim < 1:
        raise ValueError(
            f"mlp_ratio (MODEL.SWIN.MLP_RATIO) is {mlp_ratio}: the MLPs would have no hidden "
            "channel."
        )


def check_stages(
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    out_indices: Sequence[int] = (),
    frozen_stages: int = -1,
) -> None:
    """Reject per-stage lists that contradict each other."""
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
    """Reject probabilities outside [0, 1). At 1 nothing is left to train."""
    for key, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{key} (MODEL.SWIN.{key.upper()}) is {rate}: it must be in [0, 1).")
