"""Hierarchical backbones of timm: ConvNeXt, EfficientNet, ResNets, Swin V2, MaxViT and others.

    image (B, C, H, W) → padded → model of timm → res2 … res5, strides 4 to 32

Any model of timm whose feature maps have these strides; plain vision transformers are in `vit.py`.
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
from .freezing import freeze_at_of
from .timm_models import (
    TimmParts,
    crop_to_stride,
    import_timm,
    last_depth_within,
    layer_depths,
    on_meta,
    options_for,
    pad_to_multiple,
)

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
NORMS = ("FrozenBN", "BN", "SyncBN")
# Multiples of pixels to try: 32 is the largest stride, window attention needs whole windows.
_DIVISORS = (32, 64, 128, 192, 224, 256, 320, 384, 448, 512)


@register_unless_taken(BACKBONE_REGISTRY)
class TimmBackbone(TimmParts, Backbone):
    """A hierarchical model of timm as a Detectron2 backbone.

    Args:
        name: of the model, such as "convnext_tiny" or "convnext_tiny.fb_in22k_ft_in1k".
        in_channels: of the images.
        out_features: names of the maps to return, among "res2" to "res5".
        drop_path_rate: largest probability of stochastic depth, in [0, 1).
        norm: of models with batch norm: "FrozenBN" (statistics and affine parameters are fixed),
            "BN" (trained) or "SyncBN" (trained, statistics over all processes).
        freeze_at: what is not trained, see `freeze`.

    Raises:
        ValueError: timm has no such model, or it has no maps of strides 4 to 32, or it takes images
            of one size only.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        in_channels: int = 3,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        drop_path_rate: float = 0.0,
        norm: str = "FrozenBN",
        freeze_at: int = 0,
    ):
        super().__init__()
        if not out_features or not set(out_features) <= STRIDES.keys():
            raise ValueError(
                f"out_features (MODEL.TIMM.OUT_FEATURES) is {list(out_features)}; allowed: one or "
                f"more of {list(STRIDES)}."
            )
        if norm not in NORMS:
            raise ValueError(f"norm (MODEL.TIMM.NORM) is {norm!r}; allowed: {', '.join(NORMS)}.")
        options = options_for(name, "MODEL.TIMM", in_channels, drop_path_rate)
        outline = on_meta(name, **options)
        infos = outline.feature_info
        levels = _levels(name, infos)
        self._out_features = [feature for feature in STRIDES if feature in out_features]
        self._out_feature_strides = dict(STRIDES)
        self._out_feature_channels = {feature: infos[i]["num_chs"] for feature, i in levels.items()}
        indices = [levels[feature] for feature in self._out_features]
        self._divisor = self._smallest_divisor(name, outline, indices, in_channels)
        sizes = (self._divisor, 2 * self._divisor), (3 * self._divisor, self._divisor)
        # Two, because a norm in training takes no single value.
        images = [torch.empty(2, in_channels, *size, device="meta") for size in sizes]
        constant = _with_whole_strides(outline, indices, images)
        body = import_timm().create_model(name, **options)
        # Without what lies behind the last map, which nothing would train.
        self._indices = body.prune_intermediate_layers(indices, prune_norm=True)
        depths = layer_depths(body)
        # A few models name modules that they do not have; their stages are then called so. Of those
        # that they have, some are pruned although their map is returned.
        known = {module for module, _ in outline.named_modules()}
        modules = [
            infos[i]["module"] if infos[i]["module"] in known else f"stages.{i}"
            for i in levels.values()
            if i <= max(indices)
        ]
        stages = [last_depth_within(outline, depths, module) for module in modules]
        has_norms = any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
        self.has_frozen_norms = has_norms and norm == "FrozenBN"
        self.body: Any = _with_constant_padding(_with_norm(body, norm), constant)
        self._set_up(name, "body.", depths, [0, *stages])
        self.freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> dict[str, Any]:
        """Arguments from `MODEL.TIMM`; the channels are those of MODEL.PIXEL_MEAN."""
        options = cfg.MODEL.TIMM
        return {
            "name": options.NAME,
            "in_channels": len(cfg.MODEL.PIXEL_MEAN),
            "out_features": options.OUT_FEATURES,
            "drop_path_rate": options.DROP_PATH_RATE,
            "norm": options.NORM,
            "freeze_at": freeze_at_of(cfg),
        }

    def _smallest_divisor(
        self, name: str, model: Any, indices: Sequence[int], in_channels: int
    ) -> int:
        """The least number of pixels of which all multiples give maps of the right shapes.

        Args:
            model: on the meta device.

        Raises:
            ValueError: there is none; the model takes images of one size only.
        """
        problem: Exception | None = None
        for divisor in _DIVISORS:
            try:
                for height, width in ((divisor, 2 * divisor), (3 * divisor, divisor)):
                    images = torch.empty(2, in_channels, height, width, device="meta")
                    maps = _maps(model, indices, images)
                    for map_, feature in zip(maps, self._out_features, strict=True):
                        channels, stride = self._out_feature_channels[feature], STRIDES[feature]
                        expected = (2, channels, height // stride, width // stride)
                        assert map_.shape == expected, f"{tuple(map_.shape)}, not {expected}"
            # What a model raises for a size that it does not take is its own affair.
            except (AssertionError, RuntimeError, ValueError, IndexError, TypeError) as error:
                problem = error
            else:
                return divisor
        raise ValueError(
            f"MODEL.TIMM.NAME is {name!r}, which does not take images of any size, or whose maps "
            "are not exactly 4 to 32 times smaller, not even for multiples of "
            f"{', '.join(map(str, _DIVISORS))} pixels ({problem}). Choose another model."
        ) from problem

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the feature maps of a batch of images.

        Args:
            x: (B, in_channels, H, W), normalised; any height and width.

        Returns:
            (B, channels, ⌈H/stride⌉, ⌈W/stride⌉) by name.
        """
        maps = _maps(self.body, self._indices, pad_to_multiple(x, self._divisor))
        return {
            name: crop_to_stride(map_, x.shape[-2:], STRIDES[name])
            for name, map_ in zip(self._out_features, maps, strict=True)
        }

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of this, the largest stride."""
        return 32


@register_unless_taken(BACKBONE_REGISTRY)
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> TimmBackbone:
    """`TimmBackbone` from a config, under the name that other projects use."""
    return TimmBackbone(cfg, input_shape)


def _levels(name: str, infos: list[dict[str, Any]]) -> dict[str, int]:
    """The number of the last map of each stride, by feature name.

    Raises:
        ValueError: a stride is missing.
    """
    strides = [info["reduction"] for info in infos]
    missing = [stride for stride in STRIDES.values() if stride not in strides]
    if missing:
        plain = len(set(strides)) == 1
        remedy = (
            "For a plain vision transformer set MODEL.BACKBONE.NAME to TimmViTBackbone and "
            "MODEL.VIT.NAME."
            if plain
            else "Choose another model, such as convnext_tiny, resnet50 or swinv2_tiny_window8_256."
        )
        raise ValueError(
            f"MODEL.TIMM.NAME is {name!r}, whose feature maps have strides {sorted(set(strides))}; "
            f"allowed: models with strides {list(STRIDES.values())}. {remedy}"
        )
    last = {stride: i for i, stride in enumerate(strides)}
    return {feature: last[stride] for feature, stride in STRIDES.items()}


def _maps(body: Any, indices: Sequence[int], images: Tensor) -> list[Tensor]:
    return body.forward_intermediates(
        images, indices=indices, output_fmt="NCHW", intermediates_only=True
    )


def _with_norm(body: nn.Module, norm: str) -> nn.Module:
    """Replace the batch norms; timm's have an activation in them, which Detectron2 would drop."""
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

    if norm == "FrozenBN":
        return freeze_batch_norm_2d(body)
    return convert_sync_batchnorm(body) if norm == "SyncBN" else body


class _SamePaddedConv2d(nn.Conv2d):
    """TensorFlow's "SAME" padding, for maps whose sizes are multiples of the stride.

    The padding is then constant. timm computes it from the sizes of each map, for which
    `torch.export` takes many minutes if they are free.
    """

    @classmethod
    def of(cls, conv: Any) -> "_SamePaddedConv2d":
        """With the parameters of `conv`."""
        kernel_size: Any = conv.kernel_size
        padded = cls(conv.in_channels, conv.out_channels, kernel_size, device="meta")
        padded.stride, padded.dilation, padded.groups = conv.stride, conv.dilation, conv.groups
        padded.weight, padded.bias = conv.weight, conv.bias
        return padded

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H/stride, W/stride)."""
        rows, columns = (
            max((kernel - 1) * dilation + 1 - stride, 0)
            for kernel, dilation, stride in zip(
                self.kernel_size, self.dilation, self.stride, strict=True
            )
        )
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(x)


def _with_whole_strides(model: Any, indices: Sequence[int], images: Sequence[Tensor]) -> set[str]:
    """Names of the convolutions with "SAME" padding whose inputs are multiples of their stride.

    Not so behind a convolution without padding, as in NASNet.
    """
    from timm.layers import Conv2dSame

    names = {module: name for name, module in model.named_modules() if type(module) is Conv2dSame}
    others: set[str] = set()
    if not names:
        return others

    def check(module: Any, inputs: tuple[Tensor, ...]) -> None:
        sizes = zip(inputs[0].shape[-2:], module.stride, strict=True)
        if any(size % stride for size, stride in sizes):
            others.add(names[module])

    handles = [module.register_forward_pre_hook(check) for module in names]
    for batch in images:
        _maps(model, indices, batch)
    for handle in handles:
        handle.remove()
    return set(names.values()) - others


def _with_constant_padding(body: nn.Module, names: set[str]) -> nn.Module:
    """Replace the convolutions of these names."""
    modules = dict(body.named_modules())
    for name in names & modules.keys():
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, _SamePaddedConv2d.of(modules[name]))
    return body
