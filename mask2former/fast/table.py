"""All fast twins: plain class and method → twin, and the plain methods that the twin replaces.

Importing this module enables them. Convolutions with a frozen norm are not in the table, because
their class is Detectron2's (`frozen_norm.py`).
"""

from torch import nn

from ..maskformer_model import MaskFormer
from ..modeling.backbone.swin_layers import WindowAttention
from ..modeling.criterion import SetCriterion
from ..modeling.layers import CrossAttentionLayer, PositionEmbeddingSine, SelfAttentionLayer
from ..modeling.matcher import HungarianMatcher
from ..modeling.pixel_decoder.msdeformattn import (
    MSDeformAttnPixelDecoder,
    MSDeformAttnTransformerEncoder,
    MSDeformAttnTransformerEncoderLayer,
    MSDeformAttnTransformerEncoderOnly,
)
from ..modeling.transformer_decoder import (
    ConfigurableTransformerDecoder,
    MultiScaleMaskedTransformerDecoder,
)
from ..ops import MSDeformAttn
from ..utils.twins import Twin, register_twin
from . import attention, criterion, decoder, model, pixel_decoder, window_attention

TABLE = (
    Twin(
        MaskFormer,
        "forward_network",
        model.network,
        condition=model.why_not_factors,
    ),
    Twin(
        MaskFormer,
        "forward_inference",
        model.inference,
        stands_for=("semantic_inference", "panoptic_inference", "instance_inference"),
        functions=(
            "semantic_inference",
            "panoptic_inference",
            "instance_inference",
            "sem_seg_postprocess",
        ),
    ),
    Twin(
        WindowAttention,
        "forward",
        window_attention.window_attention,
        parts={"softmax": nn.Softmax, "attn_drop": nn.Dropout},
    ),
    Twin(
        MSDeformAttnTransformerEncoderOnly,
        "forward",
        pixel_decoder.encode,
        stands_for=("encoder.get_reference_points",),
        parts={"encoder": MSDeformAttnTransformerEncoder},
        condition=pixel_decoder.why_not_encode,
    ),
    Twin(
        MSDeformAttnTransformerEncoderLayer,
        "forward",
        pixel_decoder.encoder_layer,
        stands_for=("forward_ffn", "with_pos_embed"),
        # Called on chunks, and again in backward: hooks must not see that.
        parts={
            "self_attn": MSDeformAttn,
            "self_attn.sampling_offsets": nn.Linear,
            "self_attn.attention_weights": nn.Linear,
            "self_attn.value_proj": nn.Linear,
            "self_attn.output_proj": nn.Linear,
            "norm1": nn.LayerNorm,
            "linear1": nn.Linear,
            "dropout2": nn.Dropout,
            "linear2": nn.Linear,
            "dropout3": nn.Dropout,
        },
        condition=pixel_decoder.why_not_chunk,
    ),
    Twin(
        MSDeformAttnPixelDecoder,
        "add_fpn_levels",
        pixel_decoder.add_fpn_levels,
        condition=pixel_decoder.why_not_add,
    ),
    Twin(
        PositionEmbeddingSine,
        "forward",
        pixel_decoder.position_encoding,
        stands_for=("encode",),
    ),
    Twin(
        MultiScaleMaskedTransformerDecoder,
        "forward",
        decoder.decode,
        stands_for=("forward_prediction_heads", "attention_mask"),
    ),
    Twin(
        ConfigurableTransformerDecoder,
        "forward",
        decoder.decode,
        stands_for=("forward_prediction_heads", "attention_mask"),
    ),
    Twin(
        CrossAttentionLayer,
        "forward",
        attention.cross_attention,
        stands_for=("forward_post", "forward_pre", "with_pos_embed"),
        parts={"multihead_attn": nn.MultiheadAttention},
        condition=lambda layer: attention.why_not_attend(layer.multihead_attn),
    ),
    Twin(
        SelfAttentionLayer,
        "forward",
        attention.self_attention,
        stands_for=("forward_post", "forward_pre", "with_pos_embed"),
        parts={"self_attn": nn.MultiheadAttention},
        condition=lambda layer: attention.why_not_attend(layer.self_attn),
    ),
    Twin(
        HungarianMatcher,
        "forward",
        criterion.match,
        stands_for=("memory_efficient_forward", "mask_costs"),
        functions=("batch_dice_loss_jit", "batch_sigmoid_ce_loss_jit", "point_sample"),
    ),
    Twin(
        SetCriterion,
        "forward",
        criterion.losses,
        stands_for=(
            "loss_labels",
            "loss_masks",
            "get_loss",
            "matched_masks",
            "gather_masks",
            "_get_src_permutation_idx",
            "_get_tgt_permutation_idx",
        ),
        functions=(
            "calculate_uncertainty",
            "dice_loss_jit",
            "get_uncertain_point_coords_with_randomness",
            "point_sample",
            "sigmoid_ce_loss_jit",
        ),
    ),
)

for _twin in TABLE:
    register_twin(_twin)
