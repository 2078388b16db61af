"""Hierarchical backbones of timm: shapes, gradients, norms, freezing, recipes.

Shape letters: B batch, C channels, H W pixels.
"""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_backbone, build_model
from torch import nn

from mask2former.config import load_config
from mask2former.modeling.backbone import TimmBackbone
from mask2former.modeling.backbone.timm import _with_whole_strides
from mask2former.modeling.backbone.timm_models import on_meta

timm = pytest.importorskip("timm")

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted((CONFIGS / "coco/panoptic-segmentation/timm").glob("*.yaml"))
CONVNEXT = "coco/panoptic-segmentation/timm/maskformer2_convnext_tiny_bs16_50ep.yaml"
# Small models of families that differ in layout (NHWC, windows), norms and blocks.
MODELS = (
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "resnet10t",
    "swinv2_cr_tiny_ns_224",
    "mobilenetv3_small_050",
)
# No multiple of 32 or of a window.
ODD = (97, 131)
STRIDES = (4, 8, 16, 32)


def build(name, seed=0, **options):
    """A backbone whose parameters are random, also those that are initialised to 0."""
    torch.manual_seed(seed)
    backbone = TimmBackbone(name=name, **options)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return backbone


def odd_shapes(backbone):
    return [
        (spec.channels, -(-ODD[0] // spec.stride), -(-ODD[1] // spec.stride))
        for spec in backbone.output_shape().values()
    ]


def weighted_sum(features):
    generator = torch.Generator().manual_seed(1)
    return sum((x * torch.randn(x.shape, generator=generator)).mean() for x in features.values())


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_gradients(name):
    backbone = build(name, norm="BN").train()
    assert [spec.stride for spec in backbone.output_shape().values()] == [*STRIDES]
    features = backbone(torch.randn(2, 3, *ODD))
    assert [tuple(x.shape[1:]) for x in features.values()] == odd_shapes(backbone)
    weighted_sum(features).backward()
    without = [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    depths = {backbone.parameter_depth(n) for n, _ in backbone.named_parameters()}
    assert depths == set(range(backbone.num_depths))


@pytest.mark.parametrize("in_channels", [1, 4])
@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet"])
def test_number_of_channels(name, in_channels):
    backbone = build(name, in_channels=in_channels)
    features = backbone(torch.randn(1, in_channels, *ODD))
    assert [tuple(x.shape[1:]) for x in features.values()] == odd_shapes(backbone)


# The second pads its convolutions as TensorFlow does, with kernels of 3 at strides of 2.
@pytest.mark.parametrize("name", ["test_efficientnet", "tf_mobilenetv3_small_minimal_100"])
def test_maps_are_those_of_timm(name):
    """Of an image that needs no padding."""
    backbone = build(name).eval()
    peer = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4))
    peer.load_state_dict(backbone.body.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, features = peer.eval()(images), backbone(images)
    for ours, theirs in zip(features.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_padding_behind_a_stem_without():
    """Sides of 15, of which constant padding would make a map that is one smaller."""
    images = [torch.empty(1, 3, 32, 64, device="meta")]
    model = on_meta("pnasnet5large")
    same = timm.layers.Conv2dSame
    padded = {name for name, module in model.named_modules() if type(module) is same}
    indices = [i for i, info in enumerate(model.feature_info) if info["reduction"] >= 4]
    constant = _with_whole_strides(model, indices, images)
    assert constant and padded - constant
    assert all(name.startswith("cell_stem_0") for name in padded - constant)
    with torch.device("meta"):
        backbone = TimmBackbone(name="pnasnet5large", norm="BN", out_features=["res2", "res3"])
    features = backbone(images[0])
    assert [tuple(x.shape[2:]) for x in features.values()] == [(8, 16), (4, 8)]


def test_padding_leaves_what_it_does_not_reach():
    backbone = build("test_convnext").eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        whole = backbone(images)
        cut = backbone(images[..., :60, :90])
        padded = images.clone()
        padded[..., 60:, :] = 0
        padded[..., 90:] = 0
        expected = backbone(padded)
    for name, map_ in cut.items():
        height, width = map_.shape[-2:]
        torch.testing.assert_close(map_, expected[name][..., :height, :width])
        assert whole[name].shape == expected[name].shape


def test_one_pixel():
    features = build("test_convnext").eval()(torch.randn(1, 3, 1, 1))
    assert {tuple(x.shape[2:]) for x in features.values()} == {(1, 1)}


def test_windows_larger_than_the_image():
    """MaxViT takes multiples of its window at stride 32, here 7 × 32 pixels."""
    backbone = build("maxvit_rmlp_pico_rw_256", norm="FrozenBN").eval()
    assert backbone.size_divisibility == 32
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, *ODD))
    assert [tuple(x.shape[1:]) for x in features.values()] == odd_shapes(backbone)


def test_some_features():
    """What lies behind the last one is left out; its weights would get no gradient."""
    backbone = build("test_convnext", out_features=["res4", "res2"])
    assert list(backbone.output_shape()) == ["res2", "res4"]
    features = backbone(torch.randn(2, 3, 64, 64))
    assert [x.shape[-1] for x in features.values()] == [16, 4]
    weighted_sum(features).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert not any("stages.3" in name for name, _ in backbone.named_parameters())


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN"])
def test_norms(norm):
    backbone = build("resnet10t", norm=norm).train()
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    trained = {name for name, _ in backbone.named_parameters()}
    if norm != "SyncBN":  # which needs a GPU in training
        backbone(torch.randn(2, 3, 64, 64))
    moved = {n for n, b in backbone.named_buffers() if not torch.equal(b, before[n])}
    assert bool(moved) == (norm == "BN")
    assert ("body.layer1.0.bn1.weight" in trained) == (norm != "FrozenBN")
    has_sync = any(isinstance(module, nn.SyncBatchNorm) for module in backbone.modules())
    assert has_sync == (norm == "SyncBN")
    names = backbone.state_dict().keys() | {"body.bn1.num_batches_tracked"}
    assert {n for n in names if "num_batches" not in n} == {
        n for n in build("resnet10t", norm="BN").state_dict() if "num_batches" not in n
    }


def test_frozen_norms_keep_the_activation_and_the_numbers():
    trained, frozen = (build("test_efficientnet", norm=norm).eval() for norm in ("BN", "FrozenBN"))
    frozen.load_state_dict(trained.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(frozen(images).values(), trained(images).values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


FROZEN = {  # what is frozen last, what is trained first
    0: (None, "conv1.0.weight"),
    1: ("bn1.weight", "layer1.0.conv1.weight"),
    2: ("layer1.0.bn2.weight", "layer2.0.conv1.weight"),
    3: ("layer2.0.bn2.weight", "layer3.0.conv1.weight"),
    5: ("layer4.0.bn2.weight", None),
}


@pytest.mark.parametrize("freeze_at", FROZEN)
def test_freezing(freeze_at):
    backbone = build("resnet10t", norm="BN", freeze_at=freeze_at)
    backbone.eval().train()
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))
    last_frozen, first_trained = FROZEN[freeze_at]
    parameters = dict(backbone.named_parameters())
    if last_frozen:
        assert not parameters[f"body.{last_frozen}"].requires_grad
        prefix = f"body.{last_frozen.rpartition('.')[0]}."
        statistics = [n for n in before if n.startswith(prefix)]
        assert statistics
        for name in statistics:
            assert torch.equal(before[name], backbone.get_buffer(name)), name
    if first_trained:
        assert parameters[f"body.{first_trained}"].requires_grad
        assert not torch.equal(
            before["body.layer4.0.bn2.running_mean"],
            backbone.get_buffer("body.layer4.0.bn2.running_mean"),
        )
    trained = [backbone.parameter_depth(n) for n, p in parameters.items() if p.requires_grad]
    fixed = [backbone.parameter_depth(n) for n, p in parameters.items() if not p.requires_grad]
    assert max(fixed, default=-1) < min(trained, default=99)


def test_freezing_a_model_that_misnames_its_stages():
    """timm's MViTv2 says block.0 where it means stages.0."""
    with torch.device("meta"):
        backbone = TimmBackbone(name="mvitv2_tiny", freeze_at=2)
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert not any(name.startswith("body.stages.0.") for name in trained)
    assert any(name.startswith("body.stages.1.") for name in trained)


def test_freezing_survives_copies():
    backbone = build("resnet10t", norm="BN", freeze_at=2)
    for one in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        one.train()
        assert not one.body.layer1[0].bn1.training
        assert one.body.layer2[0].bn1.training
    with pytest.raises(ValueError, match=r"FREEZE_AT is 6; allowed with 'resnet10t': 0 to 5"):
        backbone.freeze(6)


@pytest.mark.parametrize("name", ["test_convnext", "resnet10t"])
def test_checkpointing_gives_the_same_gradients(name):
    grads = []
    for enabled in (False, True):
        backbone = build(name).train()
        backbone.set_checkpointing(enabled)
        weighted_sum(backbone(torch.ones(2, 3, 64, 64))).backward()
        grads.append([p.grad for p in backbone.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_model_without_checkpointing():
    backbone = build("selecsls42b")
    backbone.set_checkpointing(False)
    with pytest.raises(ValueError, match="'selecsls42b' has no activation checkpointing"):
        backbone.set_checkpointing(True)


WRONG = {
    "unknown name": ({"name": "convnext_tinny"}, r"'convnext_tinny'.*Did you mean convnext_tiny"),
    "unknown weights": ({"name": "resnet10t.nothing"}, r"allowed: resnet10t\.c3_in1k"),
    "plain transformer": ({"name": "test_vit"}, r"strides \[16\].*MODEL\.VIT\.NAME"),
    "other strides": ({"name": "levit_128"}, r"\[16, 32, 64\]; allowed: models with strides \[4"),
    "one size": ({"name": "gcvit_xxtiny"}, "does not take images of any size"),
    "no drop path": (
        {"name": "selecsls42b", "drop_path_rate": 0.1},
        r"MODEL\.TIMM\.DROP_PATH_RATE is 0\.1; allowed: 0, because 'selecsls42b'",
    ),
    "feature": ({"name": "test_convnext", "out_features": ["p2"]}, r"OUT_FEATURES\) is \['p2'\]"),
    "no feature": ({"name": "test_convnext", "out_features": []}, r"OUT_FEATURES\) is \[\]"),
    "norm": ({"name": "test_convnext", "norm": "GN"}, r"MODEL\.TIMM\.NORM\) is 'GN'; allowed: Fr"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**arguments)


def test_wrong_name_in_a_config():
    with pytest.raises(ValueError, match=r"MODEL\.TIMM\.NAME is 'resnet5O', .*Did you mean"):
        load_config(str(CONFIGS / CONVNEXT), ["MODEL.TIMM.NAME", "resnet5O"])
    with pytest.raises(ValueError, match=r"'MODEL\.TIMM\.NAMES', which is not a config key"):
        load_config(str(CONFIGS / CONVNEXT), ["MODEL.TIMM.NAMES", "resnet50"])


def test_timm_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match=r"needs the package timm.*pip install 'timm>=1\.0\.31'"):
        TimmBackbone(name="resnet10t")


@pytest.mark.parametrize("builder", ["TimmBackbone", "build_timm_backbone"])
def test_from_config(builder):
    cfg = load_config(
        str(CONFIGS / CONVNEXT),
        [
            *("MODEL.BACKBONE.NAME", builder, "MODEL.BACKBONE.FREEZE_AT", 2),
            *("MODEL.TIMM.NAME", "resnet10t", "MODEL.TIMM.NORM", "BN"),
        ],
    )
    cfg.MODEL.TIMM.OUT_FEATURES = ["res3", "res5"]
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.2
    cfg.MODEL.PIXEL_MEAN = [0.0] * 5
    backbone = build_backbone(cfg)
    assert isinstance(backbone, TimmBackbone)
    assert list(backbone.output_shape()) == ["res3", "res5"]
    assert backbone.body.conv1[0].in_channels == 5
    assert backbone.body.layer4[0].drop_path.drop_prob == pytest.approx(0.2)
    assert not backbone.body.layer1[0].conv1.weight.requires_grad
    assert backbone.body.layer2[0].bn1.weight.requires_grad


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes(path):
    lines = path.read_text().splitlines()
    relative = path.relative_to(CONFIGS)
    assert lines[1] == f"#   tools/train_net.py --config-file configs/{relative} --num-gpus 8"
    cfg = load_config(str(path), ["MODEL.DEVICE", "meta"])
    section = cfg.MODEL.VIT if cfg.MODEL.BACKBONE.NAME == "TimmViTBackbone" else cfg.MODEL.TIMM
    assert cfg.MODEL.WEIGHTS == f"timm://{section.NAME}"
    source = timm.get_pretrained_cfg(section.NAME)
    assert cfg.MODEL.PIXEL_MEAN == pytest.approx([255 * x for x in source.mean], abs=0.01)
    assert cfg.MODEL.PIXEL_STD == pytest.approx([255 * x for x in source.std], abs=0.01)
    with torch.device("meta"):
        model = build_model(cfg)
    shapes = model.backbone.output_shape().values()
    assert [spec.stride for spec in shapes] == [*STRIDES]
