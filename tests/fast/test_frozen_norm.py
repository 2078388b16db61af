"""Folded convolutions equal Detectron2's; a replaced, patched or hooked norm runs as written."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from torch import nn

from mask2former.fast.frozen_norm import ConvWithFrozenNorm, fold_frozen_norms
from mask2former.utils.twins import run_plain


def frozen(channels: int) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels)
    for buffer in norm.buffers():
        buffer.uniform_(0.5, 2.0)
    return norm


def relative(x, reference) -> float:
    return ((x - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, nn.functional.relu])
@pytest.mark.parametrize("grad", [False, True])
def test_equals_convolution_then_norm(bias, activation, grad):
    plain = Conv2d(
        4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=bias,
        norm=frozen(6), activation=activation,
    )  # fmt: skip
    folded = fold_frozen_norms(copy.deepcopy(plain))
    assert type(folded) is ConvWithFrozenNorm
    x = torch.randn(2, 4, 9, 7)
    inputs = [x.clone().requires_grad_(grad) for _ in range(2)]
    with torch.set_grad_enabled(grad):
        expected, result = plain(inputs[0]), folded(inputs[1])
    assert relative(result, expected) < 1e-6
    if grad:
        weights = torch.randn_like(expected)
        (expected * weights).sum().backward()
        (result * weights).sum().backward()
        assert relative(inputs[1].grad, inputs[0].grad) < 1e-5
        for a, b in zip(plain.parameters(), folded.parameters(), strict=True):
            assert relative(b.grad, a.grad) < 1e-5


def test_only_frozen_norms_are_folded():
    layers = nn.Sequential(
        Conv2d(3, 4, 1),
        Conv2d(4, 4, 1, norm=nn.BatchNorm2d(4)),
        Conv2d(4, 4, 1, norm=frozen(4)),
        nn.Conv2d(4, 4, 1),
    )
    fold_frozen_norms(layers)
    assert [type(layer) for layer in layers] == [Conv2d, Conv2d, ConvWithFrozenNorm, nn.Conv2d]


def test_half_precision_with_a_variance_below_its_range():
    conv = Conv2d(2, 2, 1, norm=frozen(2))
    conv.norm.running_var.fill_(1e-7)
    x = torch.randn(1, 2, 4, 4)
    expected = conv(x)
    result = fold_frozen_norms(conv).half()(x.half())
    assert result.dtype == torch.float16
    assert relative(result.float(), expected) < 1e-2


def test_backbone_of_a_model_is_folded(tiny_cfg):
    """With the parameters, names and outputs of Detectron2's."""
    torch.manual_seed(0)
    plain = build_backbone(tiny_cfg).eval()
    torch.manual_seed(0)
    folded = build_model(tiny_cfg).backbone.eval()
    for backbone in (plain, folded):
        torch.manual_seed(1)
        for module in backbone.modules():
            if isinstance(module, FrozenBatchNorm2d):
                for buffer in module.buffers():
                    buffer.uniform_(0.5, 2.0)
    state = folded.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert any(isinstance(module, ConvWithFrozenNorm) for module in folded.modules())
    # In double precision: in single, rounding moves an activation over the kink of a ReLU.
    plain, folded = plain.double(), folded.double()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected, result = plain(x), folded(x)
    for name in expected:
        assert relative(result[name], expected[name]) < 1e-12
        expected[name].square().sum().backward(retain_graph=True)
        result[name].square().sum().backward(retain_graph=True)
    for a, b in zip(plain.parameters(), folded.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or relative(b.grad, a.grad) < 1e-12
    # A changed norm, as after loading a checkpoint, takes effect at once.
    for module in folded.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.bias.add_(1.0)
    assert relative(folded(x)["res2"], expected["res2"]) > 0.1


def test_folded_weight_is_not_saved_for_backward():
    layer = fold_frozen_norms(Conv2d(64, 64, 3, norm=frozen(64)))
    saved = []

    def pack(x):
        saved.append(x.shape)
        return x

    x = torch.randn(1, 64, 3, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(x).sum().backward()
    # The factors of the weight, but nothing of its size.
    assert saved and max(shape.numel() for shape in saved) == 64


class Negated(FrozenBatchNorm2d):
    def forward(self, x):
        return -super().forward(x)


def hook(layer):
    layer.norm.register_forward_hook(lambda module, args, out: -out)


def patch(layer):
    forward = layer.norm.forward
    layer.norm.forward = lambda x: -forward(x)


def replace(layer):
    norm, layer.norm = layer.norm, Negated(4)
    layer.norm.load_state_dict(norm.state_dict())


@pytest.mark.parametrize("touch", [hook, patch, replace])
def test_touched_norm_takes_effect(touch):
    layer = fold_frozen_norms(Conv2d(3, 4, 1, norm=frozen(4)))
    x = torch.randn(1, 3, 5, 5)
    expected = -layer(x)
    touch(layer)
    torch.testing.assert_close(layer(x), expected)


def test_patched_class_takes_effect(monkeypatch):
    layer = fold_frozen_norms(Conv2d(3, 4, 1, norm=frozen(4)))
    x = torch.randn(1, 3, 5, 5)
    expected = -layer(x)
    forward = FrozenBatchNorm2d.forward
    monkeypatch.setattr(FrozenBatchNorm2d, "forward", lambda self, x: -forward(self, x))
    torch.testing.assert_close(layer(x), expected)


def test_plain_modules_are_not_folded(tiny_cfg):
    layer = run_plain(Conv2d(3, 4, 1, norm=frozen(4)))
    assert type(fold_frozen_norms(layer)) is Conv2d
    tiny_cfg.MODEL.FAST = False
    model = build_model(tiny_cfg)
    assert not any(isinstance(module, ConvWithFrozenNorm) for module in model.modules())
