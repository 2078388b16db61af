"""What other projects do to a model: hooks on its modules, methods replaced, parts replaced.

Each hook and each replaced method must be called as often as in plain mode (MODEL.FAST False), with
the same values. One change at a time, because one change may make several parts run as written.
"""

import copy
import types

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import Tensor, nn

from mask2former import maskformer_model
from mask2former.fast.table import TABLE
from mask2former.maskformer_model import MaskFormer
from mask2former.modeling import criterion, matcher
from mask2former.modeling.layers import FFNLayer
from mask2former.modeling.meta_arch.mask_former_head import MaskFormerHead
from mask2former.modeling.pixel_decoder.msdeformattn import MSDeformAttnPixelDecoder

# Detectron2 declares these; they are not called in a forward pass.
NOT_METHODS = {"__init__", "__repr__", "__getstate__", "__setstate__", "__getattr__"}
CLASSES = dict.fromkeys(
    (
        *(row.plain for row in TABLE),
        *(kind for row in TABLE for kind in row.parts.values()),
        *(MaskFormerHead, FFNLayer, Conv2d, FrozenBatchNorm2d, nn.GroupNorm),
    )
)
METHODS = [
    (kind, name)
    for kind in CLASSES
    for name, value in vars(kind).items()
    if isinstance(value, types.FunctionType | staticmethod) and name not in NOT_METHODS
]


@pytest.fixture
def models(tiny_cfg, same_points) -> list[MaskFormer]:
    """The same small model, fast and plain; all random points are drawn alike."""
    tiny_cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 1
    tiny_cfg.MODEL.MASK_FORMER.DEC_LAYERS = 2
    resnet = tiny_cfg.MODEL.RESNETS
    resnet.DEPTH, resnet.STEM_OUT_CHANNELS = 50, 8
    resnet.RES2_OUT_CHANNELS, resnet.WIDTH_PER_GROUP = 16, 4
    built = []
    for fast in (True, False):
        tiny_cfg.MODEL.FAST = fast
        built.append(build_model(tiny_cfg))
    built[1].load_state_dict(built[0].state_dict())
    return built


@pytest.fixture
def run(make_input):
    """Function (model, training): one forward pass, in training with backward."""
    batch = [make_input(32, 48, [0, 2, 1], seed=1), make_input(25, 35, [2], seed=2)]

    def run(model: MaskFormer, training: bool):
        model.train(training)
        with torch.set_grad_enabled(training):
            results = model(batch)
        if training:
            sum(results.values()).backward()
            model.zero_grad()
        return results

    return run


def tensors_of(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in tensors_of(value[key])]
    if isinstance(value, list | tuple):
        return [x for item in value for x in tensors_of(item)]
    return []


def hooked(model: MaskFormer, names: list[str], training: bool, run) -> dict[str, list]:
    """What hooks on some modules see in one run: for each name (kind of hook, tensors)."""
    seen: dict[str, list] = {name: [] for name in names}
    handles = []
    for name in names:
        calls, module = seen[name], model.get_submodule(name)

        def before(module, args, kwargs, calls=calls):
            calls.append(("before", tensors_of(args) + tensors_of(kwargs)))

        def after(module, args, output, calls=calls):
            calls.append(("after", tensors_of(output)))

        def backward(module, grad_input, grad_output, calls=calls):
            calls.append(("backward", tensors_of(grad_output)))

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
        if training and not name.startswith("backbone"):  # it changes activations in place
            handles.append(module.register_full_backward_hook(backward))
    run(model, training)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("training", [True, False])
def test_hooks_see_what_they_see_in_plain_mode(models, run, training):
    fast, plain = models
    names = [
        name
        for name, _ in plain.named_modules()
        if name and (not name.startswith("backbone.res") or name.startswith("backbone.res4.1"))
    ]
    expected = hooked(plain, names, training, run)
    for name in names:
        seen = hooked(fast, [name], training, run)[name]
        assert [kind for kind, _ in seen] == [kind for kind, _ in expected[name]], name
        for (kind, values), (_, others) in zip(seen, expected[name], strict=True):
            assert len(values) == len(others), (name, kind)
            for value, other in zip(values, others, strict=True):
                scale = max(1.0, other.double().abs().max().item() if other.numel() else 0.0)
                message = f"{name}, {kind}"
                torch.testing.assert_close(
                    value, other, rtol=1e-4, atol=1e-4 * scale, msg=lambda m, x=message: f"{x}: {m}"
                )


def counting(function, calls: list):
    """A function that counts its calls, of the same kind."""
    plain = function.__func__ if isinstance(function, staticmethod) else function

    def wrapped(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    return staticmethod(wrapped) if isinstance(function, staticmethod) else wrapped


@pytest.mark.parametrize("training", [True, False])
def test_methods_replaced_on_classes(models, run, training):
    counts = []
    for model, together in ((models[1], True), (models[0], False)):
        calls = {method: [] for method in METHODS}
        with pytest.MonkeyPatch.context() as patch:
            for kind, name in METHODS:
                wrapped = counting(vars(kind)[name], calls[kind, name])
                patch.setattr(kind, name, wrapped)
                if not together:
                    run(model, training)
                    patch.undo()
            if together:
                run(model, training)
        counts.append({f"{kind.__name__}.{name}": len(x) for (kind, name), x in calls.items()})
    assert counts[1] == counts[0]
    assert counts[0]["CrossAttentionLayer.forward_post"] == 1


@pytest.mark.parametrize("training", [True, False])
def test_methods_replaced_on_instances(models, run, training):
    """On the last instance of each class."""
    counts = []
    for model, together in ((models[1], True), (models[0], False)):
        instances = {}
        for module in model.modules():
            for kind in CLASSES:
                if isinstance(module, kind):
                    instances[kind] = module
        calls = {(kind, name): [] for kind, name in METHODS if kind in instances}
        for (kind, name), seen in calls.items():
            wrapped = counting(getattr(instances[kind], name), seen)
            vars(instances[kind])[name] = wrapped
            if not together:
                run(model, training)
                del vars(instances[kind])[name]
        if together:
            run(model, training)
        counts.append({f"{kind.__name__}.{name}": len(x) for (kind, name), x in calls.items()})
    assert counts[1] == counts[0]


@pytest.mark.parametrize(
    ("module", "name", "training"),
    [
        (criterion, "calculate_uncertainty", True),
        (criterion, "sigmoid_ce_loss_jit", True),
        (criterion, "dice_loss_jit", True),
        (matcher, "batch_dice_loss_jit", True),
        (matcher, "batch_sigmoid_ce_loss_jit", True),
        (maskformer_model, "panoptic_inference", False),
        (maskformer_model, "sem_seg_postprocess", False),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_functions_replaced_in_their_module(models, run, monkeypatch, module, name, training):
    calls = []
    monkeypatch.setattr(module, name, counting(getattr(module, name), calls))
    counts = []
    for model in models:
        calls.clear()
        run(model, training)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_a_module_compiled_in_place_is_called(models, run):
    for path in (
        "sem_seg_head.predictor",
        "sem_seg_head.predictor.transformer_cross_attention_layers.0.multihead_attn",
        "sem_seg_head.pixel_decoder.transformer.encoder",
        "criterion.matcher",
    ):
        model, calls = copy.deepcopy(models[0]), []
        module = model.get_submodule(path)
        # What `module.compile()` sets.
        module._compiled_call_impl = counting(module._call_impl, calls)
        run(model, True)
        assert calls, path


def test_modules_are_called_where_call_is_replaced(models, run, monkeypatch):
    original, counts = nn.Module.__call__, []
    for model in models:
        calls: list[str] = []

        def call(module, *args, calls=calls, **kwargs):
            calls.append(type(module).__name__)
            return original(module, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "__call__", call)
            run(model, True)
        counts.append([name.replace("ConvWithFrozenNorm", "Conv2d") for name in calls])
    assert counts[0] == counts[1]


def test_a_matcher_sees_masks_of_all_layers_as_tensors(models, run):
    seen = []

    def hook(module, args):
        layers = [args[0], *args[0].get("aux_outputs", [])]
        seen.append([type(layer["pred_masks"]) for layer in layers])

    models[0].criterion.matcher.register_forward_pre_hook(hook)
    run(models[0], True)
    assert seen == [[Tensor, Tensor], [Tensor]]


def test_batch_norms_of_the_pixel_decoder_count_once(tiny_cfg, run):
    tiny_cfg.MODEL.SEM_SEG_HEAD.NORM = "BN"
    model = build_model(tiny_cfg)
    run(model, True)
    norm = model.sem_seg_head.pixel_decoder.layer_1.norm
    assert norm.num_batches_tracked == 1


def test_replaced_convolution_of_the_pixel_decoder_runs_once(models, run):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, x):
            self.calls += 1
            return self.inner(nn.functional.dropout(x))

    decoder = models[0].sem_seg_head.pixel_decoder
    decoder.mask_features = Wrapped(decoder.mask_features)
    run(models[0], True)
    assert decoder.mask_features.calls == 1


def test_an_activation_module_runs_once(models, run):
    layer = models[0].sem_seg_head.pixel_decoder.transformer.encoder.layers[0]
    layer.activation, calls = nn.GELU(), []
    layer.activation.register_forward_hook(lambda *args: calls.append(1))
    run(models[0], True)
    assert calls == [1]


def test_modules_of_another_package_get_contiguous_images(models, run):
    class Flat(nn.Module):
        def forward(self, x):
            return x.view(-1).view(x.shape)

    stem = models[0].backbone.stem
    stem.conv1 = nn.Sequential(Flat(), stem.conv1)
    run(models[0], False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamically_quantised_linear_layers(models, run):
    masks = []
    for model in models:
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
        masks.append(run(quantised, False)[0]["sem_seg"])
    torch.testing.assert_close(*masks, rtol=1e-2, atol=1e-2)


def test_a_pixel_decoder_with_the_original_constructor(tiny_cfg):
    class Subclass(MSDeformAttnPixelDecoder):
        def __init__(self, input_shape, *, own, **arguments):
            super().__init__(input_shape, **arguments)

    features = build_model(tiny_cfg).backbone.output_shape()
    arguments = MSDeformAttnPixelDecoder.from_config(tiny_cfg, features)
    assert set(arguments) == {
        "input_shape",
        "conv_dim",
        "mask_dim",
        "norm",
        "transformer_dropout",
        "transformer_nheads",
        "transformer_dim_feedforward",
        "transformer_enc_layers",
        "transformer_in_features",
        "common_stride",
    }
    Subclass(**arguments, own=1)
    tiny_cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 2
    arguments = MSDeformAttnPixelDecoder.from_config(tiny_cfg, features)
    assert arguments["transformer_num_points"] == 2


def test_a_replaced_forward_inference_gets_all_layers(models, run):
    fast, seen = models[0], []
    fast.forward_inference = lambda outputs, inputs, images: seen.extend(outputs) or []
    run(fast, False)
    assert "aux_outputs" in seen
