"""The pixel decoder with level sizes on the host, checkpointing, and cached encodings.

Shape letters: B batch, C channels, H W size of a level, S = ΣH·W values of all levels, L levels.
"""

import inspect
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.layers.batch_norm import LayerNorm
from torch import Tensor, nn

from ..modeling.layers import PositionEmbeddingSine
from ..modeling.pixel_decoder.msdeformattn import (
    MSDeformAttnPixelDecoder,
    MSDeformAttnTransformerEncoder,
    MSDeformAttnTransformerEncoderLayer,
    MSDeformAttnTransformerEncoderOnly,
)
from ..ops import MSDeformAttn, backend
from ..utils.shape_cache import cached_by_shape, sizes_tensor
from ..utils.twins import why_hooked, why_touched
from .checkpointing import checkpointed
from .frozen_norm import ConvWithFrozenNorm

Shapes = tuple[tuple[int, int], ...]

# On a CPU the feed-forward network processes this many positions at a time, so that hidden
# activations stay in cache.
_FFN_CHUNK = 2048
_LAYER_METHODS = {"forward": MSDeformAttnTransformerEncoderLayer.forward}
_ATTENTION_METHODS = {"forward": MSDeformAttn.forward}
# As written, also if somebody wraps the method later.
_ADD_FPN_LEVELS = inspect.unwrap(MSDeformAttnPixelDecoder.add_fpn_levels)
# Parts of FPN levels that give the same result when called again, and change nothing.
_RECOMPUTABLE = {
    kind: kind.forward
    for kind in (Conv2d, ConvWithFrozenNorm, FrozenBatchNorm2d, LayerNorm, nn.GroupNorm)
}


# Enough for the three scales of a few image sizes.
@cached_by_shape(maxsize=12)
def _position_encoding(
    height: int,
    width: int,
    device: torch.device,
    num_pos_feats: int,
    temperature: float,
    normalize: bool,
    scale: float,
) -> Tensor:
    module = PositionEmbeddingSine(num_pos_feats, temperature, normalize, scale)
    return module.encode(torch.ones((1, height, width), dtype=torch.bool, device=device))


def position_encoding(
    module: PositionEmbeddingSine, x: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Twin of `PositionEmbeddingSine.forward`: without a mask it depends on the shape only."""
    if mask is not None:
        return module.encode(~mask)
    # Without normalisation the scale has no effect, and the constructor accepts only None.
    scale = module.scale if module.normalize else None
    settings = (module.num_pos_feats, module.temperature, module.normalize, scale)
    encoding = _position_encoding(*x.shape[-2:], x.device, *settings)
    # A copy, because callers may write to it.
    return encoding.clone().expand(x.shape[0], -1, -1, -1)


@cached_by_shape(maxsize=4)
def _reference_points(shapes: Shapes, device: torch.device) -> Tensor:
    return MSDeformAttnTransformerEncoder.get_reference_points(shapes, None, device)


@cached_by_shape(maxsize=4)
def _level_tensors(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    spatial_shapes = sizes_tensor(shapes, torch.int64, "cpu")
    sizes = spatial_shapes.prod(1)
    return spatial_shapes.to(device), (sizes.cumsum(0) - sizes).to(device)


def encode(
    module: MSDeformAttnTransformerEncoderOnly, srcs: list[Tensor], pos_embeds: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Twin of `MSDeformAttnTransformerEncoderOnly.forward`.

    The op needs level sizes on the host. The layers get them as integers, which saves a host sync
    per layer.
    """
    shapes: Shapes = tuple((src.shape[2], src.shape[3]) for src in srcs)
    memory, pos = module.flatten_levels(srcs, pos_embeds)
    reference_points = _reference_points(shapes, memory.device)
    for layer in module.encoder.layers:
        memory = layer(memory, pos, reference_points, shapes)
    spatial_shapes, level_start_index = _level_tensors(shapes, memory.device)
    return memory, spatial_shapes.clone(), level_start_index.clone()


def why_not_encode(module: MSDeformAttnTransformerEncoderOnly) -> str | None:
    """Why the layers must get level sizes as tensors, or None if only twins read them."""
    layers: Any = module.encoder.layers
    for layer in layers:
        for part, kind, methods in (
            (layer, MSDeformAttnTransformerEncoderLayer, _LAYER_METHODS),
            (layer.self_attn, MSDeformAttn, _ATTENTION_METHODS),
        ):
            reason = why_touched(part, kind, methods) or why_hooked(part)
            if reason is not None:
                return reason
    return None


def why_not_chunk(layer: MSDeformAttnTransformerEncoderLayer) -> str | None:
    """Why the activation must be called once, or None: it is a function."""
    if isinstance(layer.activation, nn.Module):
        return "its activation is a module"
    return None


def encoder_layer(
    layer: MSDeformAttnTransformerEncoderLayer,
    src: Tensor,
    pos: Tensor | None,
    reference_points: Tensor,
    spatial_shapes: Tensor | Shapes,
    level_start_index: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Twin of `MSDeformAttnTransformerEncoderLayer.forward`."""

    def attend(src: Tensor) -> Tensor:
        query = src if pos is None else src + pos
        return layer.self_attn(
            query, reference_points, src, spatial_shapes, level_start_index, padding_mask
        )

    # Recompute everything except the sampling op in backward. Only the compiled operator's result
    # can be saved separately.
    if type(layer.self_attn) is MSDeformAttn and backend(src.device) == "compiled":
        sampling = torch.ops.mask2former.ms_deform_attn_fused.default
        attended = checkpointed(layer, attend, src, keep=[sampling])
    else:
        attended = attend(src)
    return layer.norm2(_feed_forward(layer, src + layer.dropout1(attended)))


def _feed_forward(layer: MSDeformAttnTransformerEncoderLayer, summed: Tensor) -> Tensor:
    """Norm, network and residual connection: (B, S, C) → (B, S, C)."""

    def norm_and_network(x: Tensor) -> Tensor:
        x = layer.norm1(x)
        hidden = layer.dropout2(layer.activation(layer.linear1(x)))
        return x + layer.dropout3(layer.linear2(hidden))

    random = layer.training and max(layer.dropout2.p, layer.dropout3.p) > 0
    if summed.device.type != "cpu" or random or torch.compiler.is_compiling():
        return checkpointed(layer, norm_and_network, summed, random=random)
    # In chunks hidden activations stay in cache.
    chunks = summed.flatten(0, 1).split(_FFN_CHUNK)
    chunks = [checkpointed(layer, norm_and_network, chunk) for chunk in chunks]
    return torch.cat(chunks).view_as(summed)


def add_fpn_levels(
    module: MSDeformAttnPixelDecoder, finest: Tensor, features: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Twin of `MSDeformAttnPixelDecoder.add_fpn_levels`.

    Normalisation and resizing are cheap compared with the memory of their results.
    """

    def add(finest: Tensor, *features: Tensor) -> tuple[Tensor, list[Tensor]]:
        return _ADD_FPN_LEVELS(module, finest, list(features))

    return checkpointed(module, add, finest, *features, keep=[torch.ops.aten.convolution.default])


def why_not_add(module: MSDeformAttnPixelDecoder) -> str | None:
    """Why the FPN levels must not be recomputed in backward, or None: nothing would change.

    Hooks would fire again, batch norms count again, other modules perhaps draw other random
    numbers.
    """
    convs = (*module.lateral_convs, *module.output_convs, module.mask_features)
    for part in (part for conv in convs for part in conv.modules()):
        forward = _RECOMPUTABLE.get(type(part))
        if forward is None:
            return f"an FPN level has a {type(part).__name__}"
        reason = why_touched(part, type(part), {"forward": forward}) or why_hooked(part)
        if reason is not None:
            return reason
    return None
