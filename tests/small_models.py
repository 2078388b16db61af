"""Small models for comparisons with the transformers package: the original recipes, but narrow."""

from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from mask2former.config import load_config
from mask2former.ops import MSDeformAttn

NUM_CLASSES = 5
NUM_QUERIES = 12
NUM_PREDICTIONS = 10
NUM_HEADS = 4
# The ResNet model has projections between pixel and transformer decoder, the Swin model none.
HIDDEN_DIM = {"swin": 64, "resnet": 48}
CONFIGS = Path(__file__).parents[1] / "configs"


def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter a random value, such that activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, std: float) -> None:
        tensor.normal_(0, std, generator=generator)

    def affine(norm: nn.Module) -> None:
        norm.weight.uniform_(0.5, 1.5, generator=generator)
        normal(norm.bias, 0.2)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                normal(module.weight, module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    normal(module.bias, 0.2)
            elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
                affine(module)
            elif isinstance(module, FrozenBatchNorm2d):
                affine(module)
                normal(module.running_mean, 0.2)
                module.running_var.uniform_(0.3, 0.7, generator=generator)
            elif isinstance(module, nn.Embedding):
                normal(module.weight, 1)
            elif isinstance(module, nn.MultiheadAttention):
                normal(module.in_proj_weight, module.embed_dim**-0.5)
                normal(module.in_proj_bias, 0.2)
        for name, parameter in model.named_parameters():
            if name.endswith(("level_embed", "relative_position_bias_table")):
                normal(parameter, 1)
        for module in model.modules():
            if isinstance(module, MSDeformAttn):
                # In pixels: some samples lie outside the map.
                normal(module.sampling_offsets.bias, 3)
        # The features before it are positive. Without their mean, masks are neither all foreground
        # nor all background.
        mask_features = model.sem_seg_head.pixel_decoder.mask_features
        mask_features.weight -= mask_features.weight.mean(1, keepdim=True)
        mask_features.bias.zero_()


def small_config(backbone: str, pre_norm: bool, **others: Any) -> CfgNode:
    """The original recipe on the CPU, with fewer and narrower layers.

    Args:
        backbone: "swin" or "resnet".
        pre_norm: of the transformer decoder.
        others: more config keys, with __ for dots.
    """
    recipe = "swin/maskformer2_swin_tiny" if backbone == "swin" else "maskformer2_R50"
    overrides = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.SWIN.EMBED_DIM": 16,
        "MODEL.SWIN.DEPTHS": [2, 2, 2, 2],
        "MODEL.SWIN.NUM_HEADS": [1, 2, 4, 8],
        "MODEL.SWIN.WINDOW_SIZE": 5,
        "MODEL.SWIN.DROP_PATH_RATE": 0.0,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": NUM_CLASSES,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 64,
        "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 2,
        "MODEL.MASK_FORMER.HIDDEN_DIM": HIDDEN_DIM[backbone],
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": NUM_QUERIES,
        "MODEL.MASK_FORMER.NHEADS": NUM_HEADS,
        "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 96,
        "MODEL.MASK_FORMER.PRE_NORM": pre_norm,
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 200,
        **{key.replace("__", "."): value for key, value in others.items()},
    }
    path = CONFIGS / "coco" / "panoptic-segmentation" / f"{recipe}_bs16_50ep.yaml"
    return load_config(str(path), [x for item in overrides.items() for x in item])
