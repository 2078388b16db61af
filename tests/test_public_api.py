"""What other projects and published files rely on, frozen: names, state dicts, model sizes.

Config defaults and recipes are frozen in test_config.py. The facts in contracts/ were read off the
published release. state_dicts/*.txt have one line for each entry, in its order: name, dtype, shape.
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
TOP_LEVEL = """
    add_maskformer2_config COCOInstanceNewBaselineDatasetMapper
    COCOPanopticNewBaselineDatasetMapper MaskFormerInstanceDatasetMapper
    MaskFormerPanopticDatasetMapper MaskFormerSemanticDatasetMapper InstanceSegEvaluator MaskFormer
    SemanticSegmentorWithTTA
""".split()
# Module (within the package) and names, as other projects import them.
DEEP = {
    "config": "add_maskformer2_config",
    "maskformer_model": "MaskFormer",
    "test_time_augmentation": "SemanticSegmentorWithTTA",
    "data.datasets.register_coco_panoptic_annos_semseg": "get_metadata",
    "modeling.backbone.swin": "D2SwinTransformer SwinTransformer PatchEmbed",
    "modeling.criterion": "SetCriterion calculate_uncertainty dice_loss_jit sigmoid_ce_loss_jit",
    "modeling.matcher": "HungarianMatcher batch_dice_loss_jit batch_sigmoid_ce_loss_jit",
    "modeling.meta_arch.mask_former_head": "MaskFormerHead",
    "modeling.pixel_decoder.fpn": (
        "build_pixel_decoder BasePixelDecoder TransformerEncoderPixelDecoder"
    ),
    "modeling.pixel_decoder.msdeformattn": "MSDeformAttnPixelDecoder",
    "modeling.pixel_decoder.ops.functions": "MSDeformAttnFunction",
    "modeling.pixel_decoder.ops.modules": "MSDeformAttn",
    "modeling.transformer_decoder.mask2former_transformer_decoder": (
        "MultiScaleMaskedTransformerDecoder SelfAttentionLayer CrossAttentionLayer FFNLayer MLP "
        "_get_activation_fn"
    ),
    "modeling.transformer_decoder.maskformer_transformer_decoder": (
        "TRANSFORMER_DECODER_REGISTRY build_transformer_decoder StandardTransformerDecoder"
    ),
    "modeling.transformer_decoder.position_encoding": "PositionEmbeddingSine",
    "utils.misc": "is_dist_avail_and_initialized nested_tensor_from_tensor_list NestedTensor",
}
REGISTERED = [
    (META_ARCH_REGISTRY, "MaskFormer"),
    (SEM_SEG_HEADS_REGISTRY, "MaskFormerHead"),
    (SEM_SEG_HEADS_REGISTRY, "MSDeformAttnPixelDecoder"),
    (SEM_SEG_HEADS_REGISTRY, "BasePixelDecoder"),
    (SEM_SEG_HEADS_REGISTRY, "TransformerEncoderPixelDecoder"),
    (BACKBONE_REGISTRY, "D2SwinTransformer"),
    (TRANSFORMER_DECODER_REGISTRY, "MultiScaleMaskedTransformerDecoder"),
    (TRANSFORMER_DECODER_REGISTRY, "StandardTransformerDecoder"),
]
# Parameters of each method that subclasses override or call, after self.
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
    "modeling.matcher.HungarianMatcher": {"forward": "outputs targets"},
    "modeling.criterion.SetCriterion": {
        "forward": "outputs targets",
        "loss_labels": "outputs targets indices num_masks",
        "loss_masks": "outputs targets indices num_masks",
        "get_loss": "loss outputs targets indices num_masks",
    },
    "modeling.pixel_decoder.fpn.BasePixelDecoder": {"forward_features": "features"},
    "modeling.pixel_decoder.msdeformattn.MSDeformAttnPixelDecoder": {
        "forward_features": "features"
    },
}
# Keywords of constructors that other projects call without a config.
CONSTRUCTORS = {
    "modeling.matcher.HungarianMatcher": "cost_class cost_mask cost_dice num_points",
    "modeling.criterion.SetCriterion": (
        "num_classes matcher weight_dict eos_coef losses num_points oversample_ratio "
        "importance_sample_ratio"
    ),
    "maskformer_model.MaskFormer": (
        "backbone sem_seg_head criterion num_queries object_mask_threshold overlap_threshold "
        "metadata size_divisibility sem_seg_postprocess_before_inference pixel_mean pixel_std "
        "semantic_on panoptic_on instance_on test_topk_per_image"
    ),
    "modeling.meta_arch.mask_former_head.MaskFormerHead": (
        "input_shape num_classes pixel_decoder loss_weight ignore_value transformer_predictor "
        "transformer_in_feature"
    ),
    "modeling.pixel_decoder.msdeformattn.MSDeformAttnPixelDecoder": (
        "input_shape transformer_dropout transformer_nheads transformer_dim_feedforward "
        "transformer_enc_layers conv_dim mask_dim norm transformer_in_features common_stride"
    ),
    "modeling.pixel_decoder.fpn.TransformerEncoderPixelDecoder": (
        "input_shape transformer_dropout transformer_nheads transformer_dim_feedforward "
        "transformer_enc_layers transformer_pre_norm conv_dim mask_dim norm"
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
    """The model of a recipe without memory for its weights."""
    cfg = load_config(str(CONFIGS / recipe), ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_top_level_name(name):
    assert hasattr(mask2former, name)
    assert name in mask2former.__all__


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module in DEEP for name in DEEP[module].split()]
)
def test_deep_import(module, name):
    assert hasattr(importlib.import_module(f"mask2former.{module}"), name)


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
    # A configurable constructor is wrapped; functools.wraps keeps its signature.
    ours = parameters(find(path).__init__)
    assert [name for name in names(ours) if name in expected] == expected
    # More are fine where old calls need not know them.
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
    published = (CONTRACTS / "state_dicts" / f"{name}.txt").read_text().splitlines()
    state_dict = build_on_meta(STATE_DICTS[name]).state_dict()
    ours = [
        f"{key} {str(value.dtype).removeprefix('torch.')} {'x'.join(map(str, value.shape)) or '-'}"
        for key, value in state_dict.items()
    ]
    assert sorted(ours) == sorted(published)
    # The order too: optimizer states in published checkpoints number the parameters.
    assert ours == published


@pytest.mark.parametrize("recipe", NUM_PARAMETERS)
def test_number_of_parameters(recipe):
    model = build_on_meta(recipe)
    assert sum(p.numel() for p in model.parameters()) == NUM_PARAMETERS[recipe]
