"""Mask2Former of the `transformers` package, built from one of our configs, with our weights.

An independent implementation of the same model: tests compare numbers with it, benchmarks times.
"""

import re
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

_RESNET_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_STAGES = ["stage1", "stage2", "stage3", "stage4"]

# Our names → the peer's, applied one after the other.
_HEAD_RENAMES = [
    (r"^sem_seg_head\.pixel_decoder\.", "model.pixel_level_module.decoder."),
    (r"\.decoder\.transformer\.", ".decoder."),
    (r"\.decoder\.mask_features\.", ".decoder.mask_projection."),
    (r"\.(adapter|layer)_1\.norm\.", r".\1_1.1."),
    (r"\.(adapter|layer)_1\.weight", r".\1_1.0.weight"),
    (r"(\.decoder\.encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(\.decoder\.encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"^sem_seg_head\.predictor\.class_embed\.", "class_predictor."),
    (r"^sem_seg_head\.predictor\.", "model.transformer_module."),
    (r"\.transformer_self_attention_layers\.(\d+)\.norm", r".layers.\1.self_attn_layer_norm"),
    (r"\.transformer_cross_attention_layers\.(\d+)\.norm", r".layers.\1.cross_attn_layer_norm"),
    (r"\.transformer_ffn_layers\.(\d+)\.norm", r".layers.\1.final_layer_norm"),
    (r"\.transformer_(?:self_attention|cross_attention|ffn)_layers\.", ".layers."),
    (r"\.transformer_module\.layers\.", ".transformer_module.decoder.layers."),
    (r"\.multihead_attn\.", ".cross_attn."),
    (r"\.linear([12])\.", r".fc\1."),
    (r"\.decoder_norm\.", ".decoder.layernorm."),
    (r"\.query_feat\.", ".queries_features."),
    (r"\.query_embed\.", ".queries_embedder."),
    (r"\.input_proj\.", ".input_projections."),
    (r"\.mask_embed\.layers\.(\d)\.", r".decoder.mask_predictor.mask_embedder.\1.0."),
]
_RESNET_RENAMES = [
    (r"^backbone\.stem\.conv1\.", "backbone.embedder.embedder."),
    (r"^backbone\.res(\d)\.", lambda m: f"backbone.encoder.stages.{int(m[1]) - 2}.layers."),
    (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}."),
    (r"^(backbone\..*)\.norm\.", r"\1.normalization."),
    (r"^(backbone\..*\.(?:embedder|\d|shortcut))\.weight$", r"\1.convolution.weight"),
]
_SWIN_RENAMES = [
    (r"^backbone\.patch_embed\.proj\.", "backbone.swin.embeddings.patch_embeddings.projection."),
    (r"^backbone\.patch_embed\.norm\.", "backbone.swin.embeddings.norm."),
    (r"^backbone\.norm(\d)\.", lambda m: f"backbone.hidden_states_norms.stage{int(m[1]) + 1}."),
    (r"^backbone\.layers\.", "backbone.swin.encoder.layers."),
    (r"(\.blocks\.\d+)\.norm1\.", r"\1.layernorm_before."),
    (r"(\.blocks\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.(relative_position_bias_table)", r".attention.relative_position_bias.\1"),
    (r"\.attn\.", ".attention."),
]
# Unused, so without a counterpart: a norm after Swin's last stage, and counters.
_UNUSED = ("encoder.swin.layernorm.weight", "encoder.swin.layernorm.bias", "num_batches_tracked")


def to_peer(tensors: dict[str, Tensor], is_swin: bool) -> dict[str, Tensor]:
    """Rename tensors (parameters or their gradients) to the peer's names."""
    renames = [*_HEAD_RENAMES, *(_SWIN_RENAMES if is_swin else _RESNET_RENAMES)]
    renames.append((r"^backbone\.", "model.pixel_level_module.encoder."))
    result = {}
    for name, tensor in tensors.items():
        # In our state dict only: it follows from the window size.
        if name.endswith("relative_position_index"):
            continue
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        # The peer splits the matrix for queries, keys and values into three.
        fused = re.fullmatch(r"(.*\.self_attn\.)in_proj_(.*)|(.*\.)qkv\.(.*)", name)
        if fused is None:
            result[name] = tensor
            continue
        prefix, suffix = (part for part in fused.groups() if part is not None)
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            result[f"{prefix}{letter}_proj.{suffix}"] = part
    return result


def has_swin(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME == "D2SwinTransformer"


def _backbone_config(cfg: CfgNode) -> Any:
    import transformers

    if has_swin(cfg):
        swin = cfg.MODEL.SWIN
        return transformers.SwinConfig(
            patch_size=swin.PATCH_SIZE,
            embed_dim=swin.EMBED_DIM,
            depths=list(swin.DEPTHS),
            num_heads=list(swin.NUM_HEADS),
            window_size=swin.WINDOW_SIZE,
            mlp_ratio=swin.MLP_RATIO,
            drop_path_rate=swin.DROP_PATH_RATE,
            out_features=_STAGES,
        )
    resnet = cfg.MODEL.RESNETS
    if cfg.MODEL.BACKBONE.NAME != "build_resnet_backbone" or resnet.DEPTH not in _RESNET_BLOCKS:
        raise ValueError(
            f"transformers' Mask2Former has no counterpart of MODEL.BACKBONE.NAME "
            f"{cfg.MODEL.BACKBONE.NAME} with MODEL.RESNETS.DEPTH {resnet.DEPTH}"
        )
    width = resnet.RES2_OUT_CHANNELS
    if resnet.STRIDE_IN_1X1 or resnet.NUM_GROUPS != 1 or 4 * resnet.WIDTH_PER_GROUP != width:
        raise ValueError("transformers' ResNet lacks the bottleneck of MODEL.RESNETS")
    return transformers.ResNetConfig(
        embedding_size=resnet.STEM_OUT_CHANNELS,
        hidden_sizes=[width * 2**stage for stage in range(4)],
        depths=list(_RESNET_BLOCKS[resnet.DEPTH]),
        out_features=_STAGES,
    )


def build_peer(cfg: CfgNode) -> nn.Module:
    """The peer's model of the architecture in a config, randomly initialised.

    Raises:
        ValueError: the peer has no such architecture.
    """
    import transformers

    head, model = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    decoders = head.PIXEL_DECODER_NAME, model.TRANSFORMER_DECODER_NAME
    if decoders != ("MSDeformAttnPixelDecoder", "MultiScaleMaskedTransformerDecoder"):
        raise ValueError(
            f"transformers' Mask2Former has no counterpart of {' and '.join(decoders)}"
        )
    config = transformers.Mask2FormerConfig(
        backbone_config=_backbone_config(cfg),
        feature_size=head.CONVS_DIM,
        mask_feature_size=head.MASK_DIM,
        hidden_dim=model.HIDDEN_DIM,
        encoder_layers=head.TRANSFORMER_ENC_LAYERS,
        decoder_layers=model.DEC_LAYERS,
        num_attention_heads=model.NHEADS,
        dim_feedforward=model.DIM_FEEDFORWARD,
        pre_norm=model.PRE_NORM,
        enforce_input_projection=model.ENFORCE_INPUT_PROJ,
        num_queries=model.NUM_OBJECT_QUERIES,
        num_labels=head.NUM_CLASSES,
        no_object_weight=model.NO_OBJECT_WEIGHT,
        class_weight=model.CLASS_WEIGHT,
        mask_weight=model.MASK_WEIGHT,
        dice_weight=model.DICE_WEIGHT,
        train_num_points=model.TRAIN_NUM_POINTS,
        oversample_ratio=model.OVERSAMPLE_RATIO,
        importance_sample_ratio=model.IMPORTANCE_SAMPLE_RATIO,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def load_weights(peer: nn.Module, ours: nn.Module, is_swin: bool) -> None:
    """Copy our weights to the peer.

    Raises:
        ValueError: a weight on one side has no counterpart on the other.
    """
    result = peer.load_state_dict(to_peer(ours.state_dict(), is_swin), strict=False)
    missing = [k for k in result.missing_keys if not k.endswith(_UNUSED)]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"weights without a counterpart: {missing[:3]} of transformers' model, "
            f"{result.unexpected_keys[:3]} of ours"
        )


class PeerCriterion(nn.Module):
    """The peer's criterion with our interface: same arguments, same losses.

    Args:
        peer: from `build_peer`.
        weight_dict: weight of each named loss.
    """

    def __init__(self, peer: nn.Module, weight_dict: dict[str, float]):
        super().__init__()
        self.peer = peer.criterion
        self.weight_dict = weight_dict

    def forward(
        self, outputs: dict[str, Any], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """As `SetCriterion.forward`, with full-size masks."""
        layers = [
            {
                "class_queries_logits": layer["pred_logits"],
                "masks_queries_logits": layer["pred_masks"],
            }
            for layer in (outputs, *outputs.get("aux_outputs", ()))
        ]
        losses = self.peer(
            **layers[0],
            mask_labels=[target["masks"].to(torch.float32) for target in targets],
            class_labels=[target["labels"] for target in targets],
            auxiliary_predictions=layers[1:] or None,
        )
        return {name.replace("cross_entropy", "ce"): loss for name, loss in losses.items()}
