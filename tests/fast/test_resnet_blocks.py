"""Checkpointed ResNets: same outputs, gradients and statistics; less saved."""

import copy
import pickle

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import Tensor, nn

from mask2former.fast.checkpointing import set_checkpointing
from mask2former.fast.frozen_norm import fold_frozen_norms
from mask2former.fast.resnet_blocks import RecomputedBottleneckBlock, recompute_block


def backbone_of(cfg, depth: int, norm: str, name: str = "build_resnet_backbone") -> nn.Module:
    cfg.MODEL.BACKBONE.NAME = name
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NORM, resnets.RES2_OUT_CHANNELS = depth, norm, 64
    resnets.STEM_TYPE = "deeplab"
    torch.manual_seed(0)
    return fold_frozen_norms(build_backbone(cfg, ShapeSpec(channels=3)).train())


def step(backbone: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step, and the bytes that it saves for backward."""
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = sum(map_.square().sum() for map_ in backbone(x).values())
    loss.backward()
    return {name: p.grad for name, p in backbone.named_parameters()}, sum(storages.values())


@pytest.mark.parametrize(
    ("depth", "norm", "name"),
    [
        (18, "FrozenBN", "build_resnet_backbone"),
        (50, "FrozenBN", "build_resnet_backbone"),
        (50, "BN", "build_resnet_backbone"),
        (50, "GN", "build_resnet_deeplab_backbone"),
    ],
)
def test_same_numbers_and_less_saved(tiny_cfg, depth, norm, name):
    plain = backbone_of(tiny_cfg, depth, norm, name)
    backbone = copy.deepcopy(plain)
    set_checkpointing(plain, "selective")
    set_checkpointing(backbone, "blocks")
    x = torch.randn(2, 3, 64, 96)
    expected, everything = step(plain, x)
    grads, saved = step(backbone, x)
    assert saved < 0.5 * everything
    for key, grad in expected.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-5, msg=key)
    assert backbone.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value), key


def test_inference_and_copies(tiny_cfg):
    plain = backbone_of(tiny_cfg, 50, "BN").eval()
    backbone = copy.deepcopy(plain)
    set_checkpointing(backbone, "blocks")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for other in (backbone, copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
            assert type(other.res3[1]) is RecomputedBottleneckBlock
            assert torch.equal(other(x)["res5"], plain(x)["res5"])


def test_blocks_of_other_projects_run_as_they_are():
    class Own(BottleneckBlock):
        pass

    own = Own(8, 8, bottleneck_channels=4)
    replaced = BottleneckBlock(8, 8, bottleneck_channels=4)
    replaced.forward = lambda x: x
    assert not recompute_block(own) and type(own) is Own
    assert not recompute_block(replaced) and type(replaced) is BottleneckBlock
    assert not recompute_block(nn.ReLU())
