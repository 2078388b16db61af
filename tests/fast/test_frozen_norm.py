"""Folded convolutions equal Detectron2's; a replaced, patched or hooked norm runs as written."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from torch import nn

from mask2former.fast import frozen_norm
from mask2former.fast.frozen_norm import ConvWithFrozenNorm, fold_frozen_norms, norms_together
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


def chain() -> nn.Sequential:
    """Folded convolutions with a bias, another eps, and half precision buffers."""
    layers = nn.Sequential(
        Conv2d(3, 4, 3, norm=frozen(4)),
        Conv2d(4, 6, 1, bias=True, norm=frozen(6)),
        Conv2d(6, 4, 3, norm=frozen(4)),
        Conv2d(4, 2, 1, norm=frozen(2)),
    )
    layers[2].norm.eps = 0.5
    layers[3].norm.half()
    return fold_frozen_norms(layers)


def outputs_and_gradients(layers: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    out = layers(x)
    return [out, *torch.autograd.grad(out.square().sum(), list(layers.parameters()))]


def test_norms_computed_together_change_no_number(monkeypatch):
    layers, x = chain(), torch.randn(2, 3, 9, 7)
    expected = outputs_and_gradients(layers, x)
    computed = []
    original = frozen_norm._scale_and_offset
    monkeypatch.setattr(
        frozen_norm, "_scale_and_offset", lambda *args: computed.append(1) or original(*args)
    )
    with norms_together(layers.modules()):
        result = outputs_and_gradients(layers, x)
    assert len(computed) == 3  # kinds of norms; none in backward
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    # Whoever changes a norm, also so that it leaves no trace, is seen by the next pass.
    layers[0].norm.running_var.data.copy_(torch.rand(4))
    changed = layers(x)
    assert not torch.equal(changed, expected[0])
    with norms_together(layers.modules()):
        assert torch.equal(layers(x), changed)


def test_norms_together_end_with_the_pass():
    layers, x = chain(), torch.randn(1, 3, 9, 7)
    expected = layers(x)
    with pytest.raises(RuntimeError, match="interrupted"), norms_together(layers.modules()):
        with norms_together([]):
            assert torch.equal(layers(x), expected)
        copied = copy.deepcopy(layers)
        assert [vars(a).keys() == vars(b).keys() for a, b in zip(layers, copied, strict=True)]
        raise RuntimeError("interrupted")
    layers[0].norm.bias.add_(1.0)
    copied[0].norm.bias.add_(1.0)
    assert not torch.equal(layers(x), expected)
    assert torch.equal(layers(x), copied(x))


def test_backward_uses_the_norms_of_the_forward():
    layers, x = chain(), torch.randn(1, 3, 9, 7)
    out, *expected = outputs_and_gradients(layers, x)
    loss = layers(x).square().sum()
    layers[0].norm.weight.mul_(3.0)
    result = torch.autograd.grad(loss, list(layers.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_norm_that_trains_gets_gradients(monkeypatch, on_cpu):
    layers, x = chain(), torch.randn(1, 3, 9, 7)
    del layers[0].norm.weight
    layers[0].norm.weight = nn.Parameter(torch.rand(4))
    layers[3].norm.float()
    plain = run_plain(copy.deepcopy(layers))
    plain(x).square().sum().backward()
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda x: on_cpu))
    with norms_together(layers.modules()):
        layers(x).square().sum().backward()
    torch.testing.assert_close(layers[0].norm.weight.grad, plain[0].norm.weight.grad)


def test_offsets_of_a_backbone_that_leaves_autocast(monkeypatch):
    """They are not rounded, though they were computed under autocast."""
    conv = fold_frozen_norms(Conv2d(4, 6, 1, bias=False, norm=frozen(6)))
    x = torch.randn(2, 4, 9, 7)
    expected = conv(x)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda x: False))
    with torch.autocast("cpu", torch.bfloat16), norms_together([conv]):
        with torch.autocast("cpu", enabled=False):
            torch.testing.assert_close(conv(x), expected)


def test_a_model_computes_its_norms_once(tiny_cfg, make_input, monkeypatch):
    model = build_model(tiny_cfg)
    computed = []
    original = frozen_norm._scale_and_offset
    monkeypatch.setattr(
        frozen_norm, "_scale_and_offset", lambda *args: computed.append(1) or original(*args)
    )
    sum(model([make_input(32, 48, [0])]).values()).backward()
    assert computed == [1]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3])
def test_weight_for_an_accelerator(dtype, kernel):
    """Folded in the layout of the input and the dtype of autocast; gradients as the parameter's."""
    torch.manual_seed(0)
    conv = fold_frozen_norms(Conv2d(4, 6, kernel, bias=True, norm=frozen(6)))
    x = torch.randn(2, 4, 9, 7).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        scale, offset = frozen_norm._terms(conv)
        weight, bias = conv._folded_for(x, scale, offset)
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert weight.dtype == bias.dtype == (dtype or torch.float32)
        out = nn.functional.conv2d(x, weight, bias)
        expected = conv(x)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(expected)
    grads = [
        torch.autograd.grad((y * weights).sum(), list(conv.parameters())) for y in (out, expected)
    ]
    for grad, other, parameter in zip(*grads, conv.parameters(), strict=True):
        assert grad.dtype == parameter.dtype and grad.stride() == parameter.stride()
        torch.testing.assert_close(grad, other)


def test_scaling_is_differentiable_twice():
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(3, 1, 1, 1, dtype=torch.float64)

    def scaled(x):
        return frozen_norm._ScaleTo.apply(x, scale, torch.float64, torch.channels_last)

    assert torch.autograd.gradcheck(scaled, x) and torch.autograd.gradgradcheck(scaled, x)
    expected = torch.func.grad(lambda x: (x * scale).square().sum())(x)
    assert torch.equal(torch.func.grad(lambda x: scaled(x).square().sum())(x), expected)


def test_on_the_meta_device():
    """As for counting operations without computing."""
    conv = fold_frozen_norms(Conv2d(3, 4, 3, norm=frozen(4))).to("meta")
    with norms_together([conv]):
        assert conv(torch.empty(2, 3, 9, 7, device="meta")).shape == (2, 4, 7, 5)


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
