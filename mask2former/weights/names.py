"""Names of the `transformers` package's Mask2Former ↔ ours.

The names are those of the files on the Hugging Face hub, which every version of the package reads
and writes (version 5 renames the modules of its Swin in memory only). A name on one side may stand
for three on the other: we keep the matrices of queries, keys and values as one.

In the tables: <i>, <j> numbers; <p> weight or bias; <q> also the statistics of a batch norm.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from ..modeling.backbone.swin_layers import relative_position_index

ENCODER = "model.pixel_level_module.encoder."
TIMM = f"{ENCODER}_backbone."
OUR_TIMM = "backbone.body."
_THEIR_PIXELS, _THEIR_DECODER = "model.pixel_level_module.decoder", "model.transformer_module"
_PIXELS, _PREDICTOR = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
_OUR_ENCODER_LAYER = f"{_PIXELS}.transformer.encoder.layers.<i>"
_ENCODER_LAYER = f"{_THEIR_PIXELS}.encoder.layers.<i>"
_DECODER_LAYER = f"{_THEIR_DECODER}.decoder.layers.<i>"
_SELF, _CROSS, _FFN = (
    f"{_PREDICTOR}.transformer_{kind}_layers.<i>"
    for kind in ("self_attention", "cross_attention", "ffn")
)

_HEAD: dict[str, str | tuple[str, ...]] = {
    "criterion.empty_weight": "criterion.empty_weight",
    # Pixel decoder.
    f"{_PIXELS}.transformer.level_embed": f"{_THEIR_PIXELS}.level_embed",
    f"{_PIXELS}.input_proj.<i>.<j>.<p>": f"{_THEIR_PIXELS}.input_projections.<i>.<j>.<p>",
    f"{_PIXELS}.mask_features.<p>": f"{_THEIR_PIXELS}.mask_projection.<p>",
    f"{_PIXELS}.adapter_<i>.weight": f"{_THEIR_PIXELS}.adapter_<i>.0.weight",
    f"{_PIXELS}.adapter_<i>.norm.<p>": f"{_THEIR_PIXELS}.adapter_<i>.1.<p>",
    f"{_PIXELS}.layer_<i>.weight": f"{_THEIR_PIXELS}.layer_<i>.0.weight",
    f"{_PIXELS}.layer_<i>.norm.<p>": f"{_THEIR_PIXELS}.layer_<i>.1.<p>",
    **{
        f"{_OUR_ENCODER_LAYER}.self_attn.{part}.<p>": f"{_ENCODER_LAYER}.self_attn.{part}.<p>"
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    },
    f"{_OUR_ENCODER_LAYER}.norm1.<p>": f"{_ENCODER_LAYER}.self_attn_layer_norm.<p>",
    f"{_OUR_ENCODER_LAYER}.norm2.<p>": f"{_ENCODER_LAYER}.final_layer_norm.<p>",
    f"{_OUR_ENCODER_LAYER}.linear1.<p>": f"{_ENCODER_LAYER}.fc1.<p>",
    f"{_OUR_ENCODER_LAYER}.linear2.<p>": f"{_ENCODER_LAYER}.fc2.<p>",
    # Transformer decoder.
    f"{_PREDICTOR}.query_feat.weight": f"{_THEIR_DECODER}.queries_features.weight",
    f"{_PREDICTOR}.query_embed.weight": f"{_THEIR_DECODER}.queries_embedder.weight",
    f"{_PREDICTOR}.level_embed.weight": f"{_THEIR_DECODER}.level_embed.weight",
    f"{_PREDICTOR}.input_proj.<i>.<p>": f"{_THEIR_DECODER}.input_projections.<i>.<p>",
    f"{_SELF}.self_attn.in_proj_<p>": tuple(
        f"{_DECODER_LAYER}.self_attn.{letter}_proj.<p>" for letter in "qkv"
    ),
    f"{_SELF}.self_attn.out_proj.<p>": f"{_DECODER_LAYER}.self_attn.out_proj.<p>",
    f"{_SELF}.norm.<p>": f"{_DECODER_LAYER}.self_attn_layer_norm.<p>",
    f"{_CROSS}.multihead_attn.in_proj_<p>": f"{_DECODER_LAYER}.cross_attn.in_proj_<p>",
    f"{_CROSS}.multihead_attn.out_proj.<p>": f"{_DECODER_LAYER}.cross_attn.out_proj.<p>",
    f"{_CROSS}.norm.<p>": f"{_DECODER_LAYER}.cross_attn_layer_norm.<p>",
    f"{_FFN}.linear1.<p>": f"{_DECODER_LAYER}.fc1.<p>",
    f"{_FFN}.linear2.<p>": f"{_DECODER_LAYER}.fc2.<p>",
    f"{_FFN}.norm.<p>": f"{_DECODER_LAYER}.final_layer_norm.<p>",
    f"{_PREDICTOR}.decoder_norm.<p>": f"{_THEIR_DECODER}.decoder.layernorm.<p>",
    f"{_PREDICTOR}.class_embed.<p>": "class_predictor.<p>",
    f"{_PREDICTOR}.mask_embed.layers.<i>.<p>": (
        f"{_THEIR_DECODER}.decoder.mask_predictor.mask_embedder.<i>.0.<p>"
    ),
}
_OUR_BLOCK = "backbone.layers.<i>.blocks.<j>"
_BLOCK = f"{ENCODER}encoder.layers.<i>.blocks.<j>"
_SWIN: dict[str, str | tuple[str, ...]] = {
    "backbone.patch_embed.proj.<p>": f"{ENCODER}embeddings.patch_embeddings.projection.<p>",
    "backbone.patch_embed.norm.<p>": f"{ENCODER}embeddings.norm.<p>",
    f"{_OUR_BLOCK}.norm1.<p>": f"{_BLOCK}.layernorm_before.<p>",
    f"{_OUR_BLOCK}.norm2.<p>": f"{_BLOCK}.layernorm_after.<p>",
    f"{_OUR_BLOCK}.attn.relative_position_bias_table": (
        f"{_BLOCK}.attention.self.relative_position_bias_table"
    ),
    f"{_OUR_BLOCK}.attn.qkv.<p>": tuple(
        f"{_BLOCK}.attention.self.{part}.<p>" for part in ("query", "key", "value")
    ),
    f"{_OUR_BLOCK}.attn.proj.<p>": f"{_BLOCK}.attention.output.dense.<p>",
    f"{_OUR_BLOCK}.mlp.fc1.<p>": f"{_BLOCK}.intermediate.dense.<p>",
    f"{_OUR_BLOCK}.mlp.fc2.<p>": f"{_BLOCK}.output.dense.<p>",
    "backbone.layers.<i>.downsample.norm.<p>": f"{ENCODER}encoder.layers.<i>.downsample.norm.<p>",
    "backbone.layers.<i>.downsample.reduction.<p>": (
        f"{ENCODER}encoder.layers.<i>.downsample.reduction.<p>"
    ),
    **{f"backbone.norm{i}.<p>": f"{ENCODER}hidden_states_norms.stage{i + 1}.<p>" for i in range(4)},
}


def _resnet_block() -> Iterator[tuple[str, str]]:
    """Convolutions and norms of the blocks of all stages."""
    for stage in range(4):
        ours, theirs = (
            f"backbone.res{stage + 2}.<i>",
            f"{ENCODER}encoder.stages.{stage}.layers.<i>",
        )
        places = {"shortcut": "shortcut"} | {f"conv{n + 1}": f"layer.{n}" for n in range(3)}
        for our_place, place in places.items():
            yield f"{ours}.{our_place}.weight", f"{theirs}.{place}.convolution.weight"
            yield f"{ours}.{our_place}.norm.<q>", f"{theirs}.{place}.normalization.<q>"


_RESNET: dict[str, str | tuple[str, ...]] = {
    "backbone.stem.conv1.weight": f"{ENCODER}embedder.embedder.convolution.weight",
    "backbone.stem.conv1.norm.<q>": f"{ENCODER}embedder.embedder.normalization.<q>",
    **dict(_resnet_block()),
}
_TABLE = _HEAD | _SWIN | _RESNET

_HOLES = {
    "i": r"(?P<i>\d+)",
    "j": r"(?P<j>\d+)",
    "p": r"(?P<p>weight|bias)",
    "q": r"(?P<q>weight|bias|running_mean|running_var|num_batches_tracked)",
}
# Names of other versions and of Swin's own classes → those of the table.
_OLDER = [
    (r"^(pixel_level_module|transformer_module)\.", r"model.\1."),
    (r"^(?:resnet|swin)\.", ENCODER),
    (rf"^({re.escape(ENCODER)})(?:swin|model)\.", r"\1"),
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.relative_position_bias\.", ".attention.self."),
    (r"(\.blocks\.\d+)\.mlp\.fc1\.", r"\1.intermediate.dense."),
    (r"(\.blocks\.\d+)\.mlp\.fc2\.", r"\1.output.dense."),
]
# What no prediction depends on: Swin's norm behind its last stage, tables that follow from the
# window size, counters. Classifiers of ImageNet, where only the backbone is in the file.
_UNUSED = re.compile(
    rf"{re.escape(ENCODER)}(layernorm|pooler)\..*|.*\.relative_position_index"
    r"|.*\.num_batches_tracked|classifier\..*"
)
_BIAS_TABLE = "relative_position_bias_table"


def _compiled(template: str) -> re.Pattern:
    return re.compile(re.sub("<(.)>", lambda hole: _HOLES[hole[1]], re.escape(template)))


def _filled(template: str, match: re.Match) -> str:
    return re.sub("<(.)>", lambda hole: match[hole[1]], template)


_OURS = [(_compiled(ours), theirs) for ours, theirs in _TABLE.items()]
_THEIRS = [
    (_compiled(part), ours, (position, 1 if isinstance(theirs, str) else len(theirs)))
    for ours, theirs in _TABLE.items()
    for position, part in enumerate((theirs,) if isinstance(theirs, str) else theirs)
]


def is_transformers(names: Collection[str]) -> bool:
    """Whether a state dict is of the `transformers` package: Mask2Former, or a backbone of it."""
    beginnings = ("model.pixel_level_module.", "pixel_level_module.", "swin.", "resnet.embedder.")
    return any(name.startswith(beginnings) for name in names)


def backbone_kind(names: Collection[str]) -> str:
    """ "Swin", "ResNet", "timm model" or "unknown backbone", of names of `transformers`."""
    for part, kind in ((".embeddings.", "Swin"), ("embedder.embedder.", "ResNet")):
        if any(part in name for name in names):
            return kind
    return "timm model" if any(name.startswith(TIMM) for name in names) else "unknown backbone"


def to_transformers(
    tensors: Mapping[str, Tensor], timm_names: Collection[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename tensors (parameters, buffers or gradients).

    Args:
        tensors: by our names.
        timm_names: of all tensors of the features-only model of timm, for a backbone of timm.

    Returns:
        The tensors by the names of `transformers`, and our names that have no counterpart.
    """
    result, unknown = {}, []
    theirs_of = {_flat(name): name for name in timm_names}
    for name, tensor in tensors.items():
        if name.endswith("relative_position_index"):
            continue
        if name.startswith(OUR_TIMM) and _flat(name.removeprefix(OUR_TIMM)) in theirs_of:
            result[TIMM + theirs_of[_flat(name.removeprefix(OUR_TIMM))]] = tensor
            continue
        for pattern, theirs in _OURS:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            parts = (theirs,) if isinstance(theirs, str) else theirs
            pieces = tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,)
            for part, piece in zip(parts, pieces, strict=True):
                result[_filled(part, match)] = piece
            break
        else:
            unknown.append(name)
    return result, unknown


def from_transformers(
    tensors: Mapping[str, Tensor], our_names: Collection[str] = ()
) -> dict[str, Tensor]:
    """Rename tensors of the `transformers` package, and add Swin's index tables.

    Args:
        tensors: by the names of any version of the package.
        our_names: of the model, needed for a backbone of timm only.

    Returns:
        The tensors by our names. Names without counterpart stay.

    Raises:
        ValueError: of queries, keys and values not all are there.
    """
    result: dict[str, Tensor] = {}
    fused: dict[str, dict[int, Tensor]] = {}
    our_timm = {_flat(k): k for k in our_names if k.startswith(OUR_TIMM)}
    for original, tensor in tensors.items():
        name = _modern(original)
        if _UNUSED.fullmatch(name):
            continue
        if name.startswith(TIMM):
            key = OUR_TIMM + name.removeprefix(TIMM)
            result[our_timm.get(_flat(key), key)] = tensor
            continue
        for pattern, ours, (position, count) in _THEIRS:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            target = _filled(ours, match)
            if count > 1:
                fused.setdefault(target, {})[position] = tensor
            else:
                result[target] = tensor
            break
        else:
            result[original] = tensor
    for target, pieces in fused.items():
        if len(pieces) != 3:
            raise ValueError(
                f"of the three projections to queries, keys and values that make {target}, only "
                f"{len(pieces)} are in the file."
            )
        result[target] = torch.cat([pieces[position] for position in range(3)])
    for name in [name for name in result if name.endswith(_BIAS_TABLE)]:
        window = (math.isqrt(len(result[name])) + 1) // 2
        result[name.replace(_BIAS_TABLE, "relative_position_index")] = relative_position_index(
            window, window
        )
    return result


def _modern(name: str) -> str:
    for pattern, replacement in _OLDER:
        if name.startswith(TIMM):  # names of timm, which stay
            break
        name = re.sub(pattern, replacement, name)
    return name


def _flat(name: str) -> str:
    """timm's features-only models join the outer modules of a name with underscores."""
    return name.replace(".", "_")
