"""Memory layout of images and weights in the network."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mask2former.fast.model import network


class Contiguous(nn.Module):
    """A module of another package, which may expect one layout."""

    def forward(self, x):
        return x.contiguous()


def add_module(model):
    model.sem_seg_head.pixel_decoder.mask_features = Contiguous()


def hook(model):
    model.backbone.res2.register_forward_hook(lambda module, args, out: None)


def replace_forward(model):
    model.backbone.res3.forward = model.backbone.res3.forward


class Done(Exception):
    """The backbone has run."""


@pytest.fixture
def layouts(tiny_cfg, monkeypatch):
    """Function (device, training, change): for each convolution of the backbone, whether its input
    and weight are channels-last."""
    seen = []
    conv2d = F.conv2d

    def record(x, weight, *args):
        seen.append(tuple(t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight)))
        return conv2d(x, weight, *args)

    def fake(x):
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")

    def stop(features):
        raise Done

    def run(device, training, change=None):
        model = build_model(tiny_cfg).train(training)
        model.sem_seg_head.pixel_decoder.forward_features = stop
        if change is not None:
            change(model)
        # Fake tensors, so that no GPU is needed.
        on_device = FakeTensorMode() if device == "cuda" else nullcontext()
        with monkeypatch.context() as patch, on_device, torch.set_grad_enabled(training):
            if device == "cuda":
                for module in model.modules():
                    for name, x in module._parameters.items():
                        module._parameters[name] = x if x is None else nn.Parameter(fake(x))
                    for name, x in module._buffers.items():
                        module._buffers[name] = x if x is None else fake(x)
            patch.setattr(F, "conv2d", record)
            with pytest.raises(Done):
                network(model, torch.zeros(2, 3, 64, 96, device=device))
        return seen

    return run


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_of_the_backbone_are_channels_last_off_the_cpu(layouts, training):
    seen = layouts("cuda", training)
    assert set(seen) == {(True, True)}


@pytest.mark.parametrize(("training", "expected"), [(True, False), (False, True)])
def test_on_a_cpu_images_are_channels_last_in_inference_only(layouts, training, expected):
    assert {x for x, _ in layouts("cpu", training)} == {expected}


@pytest.mark.parametrize("change", [add_module, hook, replace_forward])
def test_contiguous_where_other_code_may_see_the_layout(layouts, change):
    assert not any(x for x, _ in layouts("cuda", True, change))
