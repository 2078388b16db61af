"""What other projects and released files rely on, frozen: names, state dicts, model sizes.

test_config.py freezes config defaults and recipes. The facts in contracts/ were read off the
original release. state_dicts/*.txt have one line per entry, in order: name, dtype, shape.
"""

import importlib
import inspect
import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    build_model,
)

import mask2former
from mask2former.config import load_config
from mask2former.data.dataset_mappers import DATASET_MAPPER_REGISTRY
from mask2former.modeling.criterion import CRITERION_REGISTRY
from mask2former.modeling.layers import CROSS_ATTENTION_REGISTRY
from mask2former.modeling.matcher import MATCHER_REGISTRY
from mask2former.modeling.transformer_decoder.maskformer_transformer_decoder import (
    TRANSFORMER_DECODER_REGISTRY,
)

CONTRACTS = Path(__file__).parent / "contracts"
CONFIGS = Path(__file__).parents[1] / "configs"
NUM_PARAMETERS = json.loads((CONTRACTS / "num_parameters.json").read_text())
STATE_DICTS = {
    "r50_coco_panoptic": "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
    "r101_coco_instance": "coco/instance-segmentation/maskformer2_R101_bs16_50ep.yaml",
    "swin_t_coco_panoptic": "coco/panoptic-segmentation/swin/maskformer2_swin_tiny_bs16_50ep.yaml",
    "swin_l_coco_panoptic": (
        "coco/panoptic-segmentation/swin/maskformer2_swin_large_IN21k_384_bs16_100ep.yaml"
    ),
}
# Every module of the original package, with the public names it defines or re-exports.
IMPORT_SURFACE = json.loads((CONTRACTS / "import_surface.json").read_text())
# More names that other projects import.
DEEP = {
    "utils.misc": "NestedTensor",
    "modeling.transformer_decoder.maskformer_transformer_decoder": "StandardTransformerDecoder",
}
REGISTERED = [
    (META_ARCH_REGISTRY, "MaskFormer"),
    (SEM_SEG_HEADS_REGISTRY, "MaskFormerHead"),
    (SEM_SEG_HEADS_REGISTRY, "PerPixelBaselineHead"),
    (SEM_SEG_HEADS_REGISTRY, "PerPixelBaselinePlusHead"),
    (SEM_SEG_HEADS_REGISTRY, "MSDeformAttnPixelDecoder"),
    (SEM_SEG_HEADS_REGISTRY, "BasePixelDecoder"),
    (SEM_SEG_HEADS_REGISTRY, "TransformerEncoderPixelDecoder"),
    (SEM_SEG_HEADS_REGISTRY, "SemanticFPNPixelDecoder"),
    (SEM_SEG_HEADS_REGISTRY, "FaPNPixelDecoder"),
    (SEM_SEG_HEADS_REGISTRY, "BiFPNPixelDecoder"),
    (BACKBONE_REGISTRY, "D2SwinTransformer"),
    (BACKBONE_REGISTRY, "TimmBackbone"),
    (BACKBONE_REGISTRY, "build_timm_backbone"),
    (BACKBONE_REGISTRY, "TimmViTBackbone"),
    (TRANSFORMER_DECODER_REGISTRY, "MultiScaleMaskedTransformerDecoder"),
    (TRANSFORMER_DECODER_REGISTRY, "StandardTransformerDecoder"),
    (MATCHER_REGISTRY, "HungarianMatcher"),
    (MATCHER_REGISTRY, "FullMaskMatcher"),
    (MATCHER_REGISTRY, "MaskFormerMatcher"),
    (CRITERION_REGISTRY, "SetCriterion"),
    (CRITERION_REGISTRY, "FullMaskCriterion"),
    (CRITERION_REGISTRY, "MaskFormerCriterion"),
    (DATASET_MAPPER_REGISTRY, "detr_panoptic"),
    (TRANSFORMER_DECODER_REGISTRY, "ConfigurableTransformerDecoder"),
    *((CROSS_ATTENTION_REGISTRY, name) for name in ("masked", "full", "smca", "mask_pooling")),
]
# Parameters, without self, of each method that subclasses override or call.
METHODS = {
    "maskformer_model.MaskFormer": {
        "forward": "batched_inputs",
        "prepare_targets": "targets images",
        "semantic_inference": "mask_cls mask_pred",
        "panoptic_inference": "mask_cls mask_pred",
        "instance_inference": "mask_cls mask_pred",
    },
    "modeling.meta_arch.mask_former_head.MaskFormerHead": {
        "forward": "features mask",
        "layers": "features mask",
    },
    "modeling.meta_arch.per_pixel_baseline.PerPixelBaselineHead": {
        "forward": "features targets",
        "layers": "features",
        "losses": "predictions targets",
    },
    "modeling.meta_arch.per_pixel_baseline.PerPixelBaselinePlusHead": {
        "forward": "features targets",
        "layers": "features",
    },
    "modeling.backbone.swin.WindowAttention": {"forward": "x mask"},
    "modeling.backbone.swin.SwinTransformerBlock": {"forward": "x mask_matrix"},
    "modeling.backbone.swin.PatchMerging": {"forward": "x H W"},
    "modeling.backbone.swin.BasicLayer": {"forward": "x H W"},
    "modeling.backbone.swin.SwinTransformer": {"forward": "x"},
    "modeling.pixel_decoder.ops.modules.MSDeformAttn": {
        "forward": (
            "query reference_points input_flatten input_spatial_shapes input_level_start_index "
            "input_padding_mask"
        ),
    },
    "modeling.pixel_decoder.ops.functions.MSDeformAttnFunction": {
        "apply": (
            "value value_spatial_shapes value_level_start_index sampling_locations "
            "attention_weights im2col_step"
        ),
    },
    "modeling.transformer_decoder.mask2former_transformer_decoder"
    ".MultiScaleMaskedTransformerDecoder": {
        "forward": "x mask_features mask",
        "forward_prediction_heads": "output mask_features attn_mask_target_size",
        "_set_aux_loss": "outputs_class outputs_seg_masks",
    },
    "modeling.transformer_decoder.mask2former_transformer_decoder.SelfAttentionLayer": {
        "forward_post": "tgt tgt_mask tgt_key_padding_mask query_pos",
    },
    "modeling.transformer_decoder.mask2former_transformer_decoder.CrossAttentionLayer": {
        "forward_post": "tgt memory memory_mask memory_key_padding_mask pos query_pos",
    },
    "modeling.transformer_decoder.mask2former_transformer_decoder.FFNLayer": {
        "forward_post": "tgt"
    },
    "modeling.matcher.HungarianMatcher": {
        "forward": "outputs targets",
        "mask_costs": "mask_logits target_masks ignored",
    },
    "modeling.criterion.SetCriterion": {
        "forward": "outputs targets",
        "loss_labels": "outputs targets indices num_masks",
        "loss_masks": "outputs targets indices num_masks",
        "get_loss": "loss outputs targets indices num_masks",
        "gather_masks": "outputs targets indices",
    },
    "modeling.pixel_decoder.fpn.BasePixelDecoder": {"forward_features": "features"},
    "modeling.pixel_decoder.semantic_fpn.SemanticFPNPixelDecoder": {"forward_features": "features"},
    "modeling.pixel_decoder.fapn.FaPNPixelDecoder": {"forward_features": "features"},
    "modeling.pixel_decoder.bifpn.BiFPNPixelDecoder": {"forward_features": "features"},
    "modeling.pixel_decoder.msdeformattn.MSDeformAttnPixelDecoder": {
        "forward_features": "features"
    },
}
# Constructor keywords, in order, that other projects use without a config.
CONSTRUCTORS = {
    "modeling.matcher.HungarianMatcher": "cost_class cost_mask cost_dice num_points",
    "modeling.criterion.SetCriterion": (
        "num_classes matcher weight_dict eos_coef losses num_points oversample_ratio "
        "importance_sample_ratio"
    ),
    "data.dataset_mappers.DETRPanopticDatasetMapper": "is_train crop_gen tfm_gens image_format",
    "maskformer_model.MaskFormer": (
        "backbone sem_seg_head criterion num_queries object_mask_threshold overlap_threshold "
        "metadata size_divisibility sem_seg_postprocess_before_inference pixel_mean pixel_std "
        "semantic_on panoptic_on instance_on test_topk_per_image"
    ),
    "modeling.meta_arch.mask_former_head.MaskFormerHead": (
        "input_shape num_classes pixel_decoder loss_weight ignore_value transformer_predictor "
        "transformer_in_feature"
    ),
    "modeling.meta_arch.per_pixel_baseline.PerPixelBaselineHead": (
        "input_shape num_classes pixel_decoder loss_weight ignore_value"
    ),
    "modeling.meta_arch.per_pixel_baseline.PerPixelBaselinePlusHead": (
        "input_shape transformer_predictor transformer_in_feature deep_supervision num_classes "
        "pixel_decoder loss_weight ignore_value"
    ),
    "modeling.backbone.swin.WindowAttention": (
        "dim window_size num_heads qkv_bias qk_scale attn_drop proj_drop"
    ),
    "modeling.backbone.swin.SwinTransformerBlock": (
        "dim num_heads window_size shift_size mlp_ratio qkv_bias qk_scale drop attn_drop drop_path "
        "act_layer norm_layer"
    ),
    "modeling.backbone.swin.BasicLayer": (
        "dim depth num_heads window_size mlp_ratio qkv_bias qk_scale drop attn_drop drop_path "
        "norm_layer downsample use_checkpoint"
    ),
    "modeling.pixel_decoder.msdeformattn.MSDeformAttnPixelDecoder": (
        "input_shape transformer_dropout transformer_nheads transformer_dim_feedforward "
        "transformer_enc_layers conv_dim mask_dim norm transformer_in_features common_stride"
    ),
    "modeling.pixel_decoder.fpn.TransformerEncoderPixelDecoder": (
        "input_shape transformer_dropout transformer_nheads transformer_dim_feedforward "
        "transformer_enc_layers transformer_pre_norm conv_dim mask_dim norm"
    ),
    "modeling.pixel_decoder.semantic_fpn.SemanticFPNPixelDecoder": (
        "input_shape conv_dim mask_dim norm"
    ),
    "modeling.pixel_decoder.fapn.FaPNPixelDecoder": "input_shape conv_dim mask_dim norm",
    "modeling.pixel_decoder.bifpn.BiFPNPixelDecoder": (
        "input_shape conv_dim mask_dim norm num_layers last_bottom_up"
    ),
    "modeling.pixel_decoder.ops.modules.MSDeformAttn": "d_model n_levels n_heads n_points",
    "modeling.transformer_decoder.mask2former_transformer_decoder"
    ".MultiScaleMaskedTransformerDecoder": (
        "in_channels mask_classification num_classes hidden_dim num_queries nheads "
        "dim_feedforward dec_layers pre_norm mask_dim enforce_input_project"
    ),
    "modeling.transformer_decoder.maskformer_transformer_decoder.StandardTransformerDecoder": (
        "in_channels mask_classification num_classes hidden_dim num_queries nheads dropout "
        "dim_feedforward enc_layers dec_layers pre_norm deep_supervision mask_dim "
        "enforce_input_project"
    ),
    "modeling.transformer_decoder.position_encoding.PositionEmbeddingSine": (
        "num_pos_feats temperature normalize scale"
    ),
}


def find(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"mask2former.{module}"), name)


def parameters(function):
    parameters = inspect.signature(function).parameters.values()
    return [p for p in parameters if p.name != "self"]


def names(parameters):
    return [p.name for p in parameters]


def build_on_meta(recipe):
    """The model of a recipe on the meta device, without memory for its weights."""
    cfg = load_config(str(CONFIGS / recipe), ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize("module", IMPORT_SURFACE)
def test_names_of_the_original_modules(module):
    imported = importlib.import_module(module)
    assert [name for name in IMPORT_SURFACE[module] if not hasattr(imported, name)] == []


def test_top_level_names_are_exported():
    assert set(IMPORT_SURFACE["mask2former"]) <= set(mask2former.__all__)


@pytest.mark.parametrize("name", ["PredictionFilter", "Predictor", "Result"])
def test_names_for_inference(name):
    assert name in mask2former.__all__
    assert getattr(mask2former, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Predictors'"):
        _ = mask2former.Predictors


@pytest.mark.parametrize(("registry", "name"), REGISTERED)
def test_registered(registry, name):
    assert registry.get(name).__module__.startswith("mask2former.")


@pytest.mark.parametrize("path", METHODS)
def test_methods_of_subclassed_parts(path):
    for method, expected in METHODS[path].items():
        assert names(parameters(getattr(find(path), method))) == expected.split(), method


@pytest.mark.parametrize("path", CONSTRUCTORS)
def test_constructor_keywords(path):
    expected = CONSTRUCTORS[path].split()
    # `configurable` wraps constructors with functools.wraps, which keeps the signature.
    ours = parameters(find(path).__init__)
    assert [name for name in names(ours) if name in expected] == expected
    # Additional parameters must be optional.
    added = [p for p in ours if p.name not in expected]
    assert [p.name for p in added if p.default is inspect.Parameter.empty] == []


def test_attributes_of_subclassed_parts():
    model = build_on_meta(STATE_DICTS["r50_coco_panoptic"])
    for name in "backbone sem_seg_head criterion num_queries metadata size_divisibility".split():
        assert hasattr(model, name), name
    assert hasattr(model.sem_seg_head, "pixel_decoder")
    decoder = model.sem_seg_head.predictor
    for kind in ("cross_attention", "self_attention", "ffn"):
        assert len(getattr(decoder, f"transformer_{kind}_layers")) == 9
    for name in ("query_feat", "query_embed"):
        assert getattr(decoder, name).weight.shape == (100, 256)
    assert decoder.level_embed.weight.shape == (3, 256)
    for (
        name
    ) in "pe_layer input_proj decoder_norm class_embed mask_embed num_feature_levels".split():
        assert hasattr(decoder, name), name


@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dict(name):
    expected = (CONTRACTS / "state_dicts" / f"{name}.txt").read_text().splitlines()
    state_dict = build_on_meta(STATE_DICTS[name]).state_dict()
    ours = [
        f"{key} {str(value.dtype).removeprefix('torch.')} {'x'.join(map(str, value.shape)) or '-'}"
        for key, value in state_dict.items()
    ]
    assert sorted(ours) == sorted(expected)
    # The order matters: optimizer states in released checkpoints refer to parameters by index.
    assert ours == expected


@pytest.mark.parametrize("recipe", NUM_PARAMETERS)
def test_number_of_parameters(recipe):
    model = build_on_meta(recipe)
    assert sum(p.numel() for p in model.parameters()) == NUM_PARAMETERS[recipe]
