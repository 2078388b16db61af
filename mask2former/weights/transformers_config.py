"""config.json and preprocessor_config.json of the `transformers` package ↔ our config.

`transformers` ignores the entry "mask2former" that is written to config.json and keeps it when it
saves the model again: what our predictor needs and the package has no key for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode

from ..config import load_config
from ..utils.project_files import project_root

STAGES = ["stage1", "stage2", "stage3", "stage4"]
OURS = "mask2former"
TASKS = ("panoptic", "instance", "semantic")
_RECIPES = {
    "panoptic": "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
    "instance": "coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml",
    "semantic": "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml",
}
_RESNET_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_BASIC = (18, 34)  # depths of ResNets without bottleneck
_FFN_OF_ENCODER = 1024  # in both, of the pixel decoder

# Key of config.json → ours, with the package's default.
_KEYS: dict[str, tuple[str, Any]] = {
    "feature_size": ("MODEL.SEM_SEG_HEAD.CONVS_DIM", 256),
    "mask_feature_size": ("MODEL.SEM_SEG_HEAD.MASK_DIM", 256),
    "hidden_dim": ("MODEL.MASK_FORMER.HIDDEN_DIM", 256),
    "encoder_layers": ("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 6),
    "decoder_layers": ("MODEL.MASK_FORMER.DEC_LAYERS", 10),
    "num_attention_heads": ("MODEL.MASK_FORMER.NHEADS", 8),
    "dropout": ("MODEL.MASK_FORMER.DROPOUT", 0.0),
    "dim_feedforward": ("MODEL.MASK_FORMER.DIM_FEEDFORWARD", 2048),
    "pre_norm": ("MODEL.MASK_FORMER.PRE_NORM", False),
    "enforce_input_projection": ("MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ", False),
    "common_stride": ("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 4),
    "ignore_value": ("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 255),
    "num_queries": ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 100),
    "no_object_weight": ("MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", 0.1),
    "class_weight": ("MODEL.MASK_FORMER.CLASS_WEIGHT", 2.0),
    "mask_weight": ("MODEL.MASK_FORMER.MASK_WEIGHT", 5.0),
    "dice_weight": ("MODEL.MASK_FORMER.DICE_WEIGHT", 5.0),
    "train_num_points": ("MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 12544),
    "oversample_ratio": ("MODEL.MASK_FORMER.OVERSAMPLE_RATIO", 3.0),
    "importance_sample_ratio": ("MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO", 0.75),
    "use_auxiliary_loss": ("MODEL.MASK_FORMER.DEEP_SUPERVISION", True),
}
_SWIN_KEYS: dict[str, tuple[str, Any]] = {
    "patch_size": ("MODEL.SWIN.PATCH_SIZE", 4),
    "embed_dim": ("MODEL.SWIN.EMBED_DIM", 96),
    "depths": ("MODEL.SWIN.DEPTHS", [2, 2, 6, 2]),
    "num_heads": ("MODEL.SWIN.NUM_HEADS", [3, 6, 12, 24]),
    "window_size": ("MODEL.SWIN.WINDOW_SIZE", 7),
    "mlp_ratio": ("MODEL.SWIN.MLP_RATIO", 4.0),
    "qkv_bias": ("MODEL.SWIN.QKV_BIAS", True),
    "hidden_dropout_prob": ("MODEL.SWIN.DROP_RATE", 0.0),
    "attention_probs_dropout_prob": ("MODEL.SWIN.ATTN_DROP_RATE", 0.0),
    "drop_path_rate": ("MODEL.SWIN.DROP_PATH_RATE", 0.1),
    "image_size": ("MODEL.SWIN.PRETRAIN_IMG_SIZE", 224),
}
_DEFAULT_BACKBONE = {"model_type": "swin", "depths": [2, 2, 18, 2], "drop_path_rate": 0.3}
# What our model has no option for: key → the only value.
_FIXED = {
    "activation_function": "relu",
    "encoder_feedforward_dim": _FFN_OF_ENCODER,
    "feature_strides": [4, 8, 16, 32],
}
_SWIN_FIXED = {"hidden_act": "gelu", "use_absolute_embeddings": False, "layer_norm_eps": 1e-5}
_RESNET_FIXED = {"hidden_act": "relu", "downsample_in_first_stage": False}
# Of `Mask2FormerImageProcessor`.
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_SIZE = {"shortest_edge": 800, "longest_edge": 1333}


def _value(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return list(cfg) if isinstance(cfg, list | tuple) else cfg


# ---- our config → theirs ----


def _refuse(reason: str) -> ValueError:
    return ValueError(f"transformers' Mask2Former has no counterpart of this model: {reason}.")


def backbone_config(cfg: CfgNode) -> dict[str, Any]:
    """The entry "backbone_config" of config.json.

    Raises:
        ValueError: `transformers` cannot build this backbone.
    """
    name = cfg.MODEL.BACKBONE.NAME
    channels = {"num_channels": len(cfg.MODEL.PIXEL_MEAN)}
    if name == "D2SwinTransformer":
        swin = cfg.MODEL.SWIN
        if swin.APE or not swin.PATCH_NORM or swin.QK_SCALE is not None:
            raise _refuse(
                "MODEL.SWIN has APE, a QK_SCALE or no PATCH_NORM, of which its Swin has other forms"
            )
        values = {key: _value(cfg, ours) for key, (ours, _) in _SWIN_KEYS.items()}
        return {"model_type": "swin", **channels, **values, **_SWIN_FIXED, "out_features": STAGES}
    if name == "build_resnet_backbone":
        return channels | _resnet_config(cfg)
    if name in ("TimmBackbone", "build_timm_backbone"):
        from .timm_features import feature_indices

        timm_name = cfg.MODEL.TIMM.NAME
        return {
            "model_type": "timm_backbone",
            **channels,
            "backbone": timm_name,
            "features_only": True,
            "freeze_batch_norm_2d": cfg.MODEL.TIMM.NORM == "FrozenBN",
            "out_indices": list(feature_indices(timm_name, len(cfg.MODEL.PIXEL_MEAN))),
        }
    raise _refuse(
        f"MODEL.BACKBONE.NAME is {name}; allowed: D2SwinTransformer, build_resnet_backbone and "
        "TimmBackbone"
    )


def _resnet_config(cfg: CfgNode) -> dict[str, Any]:
    resnet = cfg.MODEL.RESNETS
    width = resnet.RES2_OUT_CHANNELS
    is_basic = resnet.DEPTH in _BASIC
    if resnet.DEPTH not in _RESNET_BLOCKS:
        raise _refuse(f"MODEL.RESNETS.DEPTH is {resnet.DEPTH}")
    if not is_basic and (resnet.NUM_GROUPS != 1 or 4 * resnet.WIDTH_PER_GROUP != width):
        raise _refuse(
            f"MODEL.RESNETS has bottlenecks of {resnet.NUM_GROUPS} groups of "
            f"{resnet.WIDTH_PER_GROUP} channels for {width} output channels, its ResNet always a "
            "quarter of the output channels"
        )
    if resnet.get("STEM_TYPE", "basic") != "basic":
        raise _refuse(f"MODEL.RESNETS.STEM_TYPE is {resnet.STEM_TYPE}, its stem one convolution")
    dilations = resnet.RES5_DILATION, resnet.get("RES4_DILATION", 1)
    if dilations != (1, 1) or any(resnet.DEFORM_ON_PER_STAGE):
        raise _refuse("MODEL.RESNETS has dilated or deformable convolutions")
    if resnet.NORM not in ("FrozenBN", "BN", "SyncBN"):
        raise _refuse(f"MODEL.RESNETS.NORM is {resnet.NORM}, its ResNet has batch norms")
    return {
        "model_type": "resnet",
        "embedding_size": resnet.STEM_OUT_CHANNELS,
        "hidden_sizes": [width * 2**stage for stage in range(4)],
        "depths": list(_RESNET_BLOCKS[resnet.DEPTH]),
        "layer_type": "basic" if is_basic else "bottleneck",
        "downsample_in_bottleneck": not is_basic and resnet.STRIDE_IN_1X1,
        **_RESNET_FIXED,
        "out_features": STAGES,
    }


def model_config(cfg: CfgNode, class_names: Sequence[str], things: Sequence[int] | None) -> dict:
    """config.json of a model.

    Args:
        cfg: of our model.
        class_names: in the order of their ids.
        things: ids of the thing classes; None if the data does not tell things from stuff.

    Raises:
        ValueError: `transformers` cannot build this model.
    """
    head, model = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
    if cfg.MODEL.META_ARCHITECTURE != "MaskFormer" or head.NAME != "MaskFormerHead":
        raise _refuse(f"its architecture is {cfg.MODEL.META_ARCHITECTURE} with {head.NAME}")
    decoders = head.PIXEL_DECODER_NAME, model.TRANSFORMER_DECODER_NAME
    if decoders != ("MSDeformAttnPixelDecoder", "MultiScaleMaskedTransformerDecoder"):
        raise _refuse(f"its decoders are {' and '.join(decoders)}")
    levels = list(head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES)
    points = head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS
    if levels != ["res3", "res4", "res5"] or points != 4 or head.NORM != "GN":
        raise _refuse(
            f"its pixel decoder has the levels {', '.join(levels)}, {points} points and the norm "
            f"{head.NORM}; allowed: res3, res4, res5, 4 points, GN"
        )
    if len(class_names) != head.NUM_CLASSES:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {head.NUM_CLASSES}, but the data set names "
            f"{len(class_names)} classes: name the data set of the training in DATASETS.TEST."
        )
    test = model.TEST
    switches = {"panoptic": test.PANOPTIC_ON, "instance": test.INSTANCE_ON}
    switches["semantic"] = test.SEMANTIC_ON
    ours: dict[str, Any] = {
        "tasks": [task for task in TASKS if switches[task]],
        "object_mask_threshold": test.OBJECT_MASK_THRESHOLD,
        "overlap_threshold": test.OVERLAP_THRESHOLD,
        "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
    }
    if things is not None:
        ours["thing_ids"] = sorted(things)
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "backbone_config": backbone_config(cfg),
        **{key: _value(cfg, our_key) for key, (our_key, _) in _KEYS.items()},
        **_FIXED,
        "id2label": {str(i): name for i, name in enumerate(class_names)},
        "label2id": {name: i for i, name in enumerate(class_names)},
        OURS: ours,
    }


def image_processor(cfg: CfgNode) -> dict[str, Any]:
    """preprocessor_config.json: RGB images scaled to [0, 1], then normalised.

    Raises:
        ValueError: the images of the model are no colours.
    """
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise _refuse(f"INPUT.FORMAT is {cfg.INPUT.FORMAT}, its image processor makes RGB images")
    order = -1 if cfg.INPUT.FORMAT == "BGR" else 1
    divisor = cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
    return {
        "image_processor_type": "Mask2FormerImageProcessor",
        "do_resize": cfg.INPUT.MIN_SIZE_TEST > 0,
        "size": {
            "shortest_edge": cfg.INPUT.MIN_SIZE_TEST or _SIZE["shortest_edge"],
            "longest_edge": cfg.INPUT.MAX_SIZE_TEST,
        },
        "size_divisor": divisor if divisor > 0 else 32,
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in cfg.MODEL.PIXEL_MEAN][::order],
        "image_std": [value / 255 for value in cfg.MODEL.PIXEL_STD][::order],
        "ignore_index": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        "do_reduce_labels": False,
        "num_labels": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
    }


# ---- their config → ours ----


def _require(content: Mapping[str, Any], fixed: Mapping[str, Any], path: str) -> None:
    for key, only in fixed.items():
        value = content.get(key, only)
        if (list(value) if isinstance(value, list | tuple) else value) != only:
            raise ValueError(f"{path} has {key} {value!r}; our model supports {only!r} only.")


def _mapped(content: Mapping[str, Any], keys: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    result = {}
    for key, (ours, default) in keys.items():
        value = content.get(key, default)
        if isinstance(default, int) and isinstance(value, list | tuple) and len(set(value)) == 1:
            value = value[0]  # height and width
        # Numbers are floats where ours are.
        result[ours] = float(value) if isinstance(default, float) else value
    return result


def our_config(
    content: Mapping[str, Any],
    processor: Mapping[str, Any],
    num_classes: int,
    tasks: Sequence[str],
    path: str,
) -> CfgNode:
    """Our config of a model of `transformers`, on top of the recipe of its task.

    Args:
        content: config.json.
        processor: preprocessor_config.json; empty: the package's defaults.
        num_classes: K.
        tasks: what to predict.
        path: of config.json, for errors.

    Raises:
        ValueError: our model has no such option.
    """
    _require(content, _FIXED, path)
    task = next(task for task in TASKS if task in tasks)
    values = _mapped(content, _KEYS) | _backbone_values(content, path) | input_values(processor)
    ours = content.get(OURS) or {}
    test = "MODEL.MASK_FORMER.TEST"
    values |= {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": num_classes,
        "MODEL.WEIGHTS": "",
        f"{test}.PANOPTIC_ON": "panoptic" in tasks,
        f"{test}.INSTANCE_ON": "instance" in tasks,
        f"{test}.SEMANTIC_ON": "semantic" in tasks,
    }
    for key, our_key in {
        "object_mask_threshold": f"{test}.OBJECT_MASK_THRESHOLD",
        "overlap_threshold": f"{test}.OVERLAP_THRESHOLD",
        "detections_per_image": "TEST.DETECTIONS_PER_IMAGE",
    }.items():
        if key in ours:
            values[our_key] = ours[key]
    recipe = project_root() / "configs" / _RECIPES[task]
    return load_config(str(recipe), [item for pair in values.items() for item in pair])


def _backbone_values(content: Mapping[str, Any], path: str) -> dict[str, Any]:
    backbone = content.get("backbone_config") or {}
    if not backbone and content.get("backbone"):
        # Of versions before 5: a name, of timm unless the other key says otherwise.
        if not content.get("use_timm_backbone", False):
            raise ValueError(
                f"{path} names the backbone {content['backbone']!r} of the Hugging Face hub without"
                " its backbone_config: save the model again with transformers 5."
            )
        backbone = {"model_type": "timm_backbone", "backbone": content["backbone"]}
    backbone = backbone or _DEFAULT_BACKBONE
    kind = backbone.get("model_type")
    if backbone.get("num_channels", 3) != 3:
        raise ValueError(f"{path} is of images with {backbone['num_channels']} channels, not 3.")
    if kind == "swin":
        _require(backbone, _SWIN_FIXED, path)
        return {"MODEL.BACKBONE.NAME": "D2SwinTransformer"} | _mapped(backbone, _SWIN_KEYS)
    if kind == "resnet":
        return _resnet_values(backbone, path)
    if kind == "timm_backbone":
        norm = "FrozenBN" if backbone.get("freeze_batch_norm_2d") else "BN"
        return {
            "MODEL.BACKBONE.NAME": "TimmBackbone",
            "MODEL.TIMM.NAME": backbone.get("backbone"),
            "MODEL.TIMM.NORM": norm,
        }
    raise ValueError(
        f"{path} has a backbone of the type {kind!r}; allowed: swin, resnet and timm_backbone."
    )


def _resnet_values(backbone: Mapping[str, Any], path: str) -> dict[str, Any]:
    _require(backbone, _RESNET_FIXED, path)
    depths = tuple(backbone.get("depths", _RESNET_BLOCKS[50]))
    is_basic = backbone.get("layer_type", "bottleneck") == "basic"
    kinds = {
        blocks: depth for depth, blocks in _RESNET_BLOCKS.items() if (depth in _BASIC) == is_basic
    }
    if depths not in kinds:
        raise ValueError(
            f"{path} has a ResNet with {list(depths)} blocks; allowed: those of the depths "
            f"{', '.join(map(str, _RESNET_BLOCKS))}."
        )
    sizes = list(backbone.get("hidden_sizes", [256, 512, 1024, 2048]))
    if sizes != [sizes[0] * 2**stage for stage in range(4)]:
        raise ValueError(f"{path} has a ResNet of the widths {sizes}, of which each must double.")
    return {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.RESNETS.DEPTH": kinds[depths],
        "MODEL.RESNETS.STEM_OUT_CHANNELS": backbone.get("embedding_size", 64),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": sizes[0],
        "MODEL.RESNETS.WIDTH_PER_GROUP": 64 if is_basic else sizes[0] // 4,
        "MODEL.RESNETS.STRIDE_IN_1X1": bool(backbone.get("downsample_in_bottleneck", False)),
        "MODEL.RESNETS.NORM": "FrozenBN",
    }


def input_values(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Image size and normalisation, in the units of our images: RGB, 0 to 255.

    A fixed height and width, to which the package stretches images, becomes the shortest edge, with
    the ratio of its default to the longest.
    """
    size = processor.get("size", _SIZE)
    if isinstance(size, int):  # of the first versions
        size = {"shortest_edge": size, "longest_edge": processor.get("max_size", 1333)}
    shortest = size.get("shortest_edge") or min(size.get("height", 800), size.get("width", 800))
    longest = size.get("longest_edge") or round(shortest * 1333 / 800)
    scale = 1 / processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1
    mean, std = processor.get("image_mean", _MEAN), processor.get("image_std", _STD)
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    return {
        "INPUT.FORMAT": "RGB",
        "INPUT.MIN_SIZE_TEST": shortest if processor.get("do_resize", True) else 0,
        "INPUT.MAX_SIZE_TEST": longest,
        "MODEL.PIXEL_MEAN": [round(value * scale, 6) for value in mean],
        "MODEL.PIXEL_STD": [round(value * scale, 6) for value in std],
    }
