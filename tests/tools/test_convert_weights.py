"""tools/convert_weights.py: names, loading into our backbones, and rejected files."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_backbone
from load_script import load_script
from safetensors.torch import save_file
from torch import nn

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.config import load_config
from mask2former.utils.files import load_pickle
from mask2former.weights.backbones import RESNET_KEYS, convert_resnet

ROOT = Path(__file__).resolve().parents[2]
COCO = ROOT / "configs/coco/panoptic-segmentation"
SMALL_SWIN = [
    "MODEL.SWIN.EMBED_DIM", "24", "MODEL.SWIN.DEPTHS", "[2, 2, 2, 2]",
]  # fmt: skip


tool = load_script("tools/convert_weights.py")


class WithBackbone(nn.Module):
    """A model reduced to its backbone, for Detectron2's name matching."""

    def __init__(self, config: str, opts: list[str]):
        super().__init__()
        cfg = load_config(str(COCO / config), ["MODEL.DEVICE", "cpu", *opts])
        self.backbone = build_backbone(cfg)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill all parameters and statistics with random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                # Around 1 where a norm divides or multiplies, small elsewhere.
                around_one = value.dim() == 1 and not name.endswith("bias")
                value.copy_(0.9 + 0.2 * noise if around_one else 0.1 * noise - 0.05)
    return model


def load(model: nn.Module, path: Path) -> None:
    Mask2FormerCheckpointer(model, partial_init=True).load(str(path), checkpointables=[])


@pytest.mark.parametrize(
    ("name", "config", "opts"),
    [
        ("resnet50", "maskformer2_R50_bs16_50ep.yaml", []),
        ("resnet101", "maskformer2_R101_bs16_50ep.yaml", ["MODEL.RESNETS.NORM", "BN"]),
    ],
)
def test_torchvision_resnet_gives_the_same_features(name, config, opts, tmp_path, capsys):
    theirs = randomised(getattr(torchvision.models, name)(weights=None)).eval()
    source, target = tmp_path / "in.pth", tmp_path / "out.pkl"
    torch.save(theirs.state_dict(), source)
    tool.main([str(source), str(target)])
    out = capsys.readouterr().out
    number = len(theirs.state_dict()) - 2
    assert f"is a ResNet of torchvision or timm: wrote {number} tensors" in out
    assert "left out: fc.weight, fc.bias" in out

    model = WithBackbone(config, opts).eval()
    load(model, target)
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model.backbone(image)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for i in range(1, 5):
            x = getattr(theirs, f"layer{i}")(x)
            torch.testing.assert_close(ours[f"res{i + 1}"], x, rtol=1e-4, atol=1e-6)

    written = load_pickle(str(target))
    assert written["__author__"] == "torchvision" and written["matching_heuristics"] is True
    names = {f"backbone.{key}" for key in written["model"]}
    assert names >= model.state_dict().keys()
    assert all(isinstance(value, np.ndarray) for value in written["model"].values())


def test_resnet_names_by_hand():
    names = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_mean": "stem.conv1.norm.running_mean",
        "layer1.0.conv2.weight": "res2.0.conv2.weight",
        "layer3.22.bn3.bias": "res4.22.conv3.norm.bias",
        "layer4.0.downsample.0.weight": "res5.0.shortcut.weight",
        "layer4.0.downsample.1.running_var": "res5.0.shortcut.norm.running_var",
    }
    renamed, left_out = convert_resnet(dict.fromkeys([*names, "fc.bias"], torch.zeros(1)))
    assert list(renamed) == list(names.values())
    assert left_out == ["fc.bias"]


def official_swin(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """Backbone weights in the form of the authors' ImageNet models."""
    weights = {k: v for k, v in backbone.state_dict().items() if not k.startswith("norm")}
    weights["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    weights |= {"norm.weight": torch.ones(192), "norm.bias": torch.zeros(192)}
    weights |= {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    return weights


def test_swin_fills_the_backbone(tmp_path, capsys):
    theirs = randomised(WithBackbone("swin/maskformer2_swin_tiny_bs16_50ep.yaml", SMALL_SWIN))
    source, target = tmp_path / "in.pth", tmp_path / "out.pkl"
    torch.save({"model": official_swin(theirs.backbone)}, source)
    tool.main([str(source), str(target)])
    out = capsys.readouterr().out
    assert "is an official Swin Transformer" in out
    left_out = "layers.0.blocks.1.attn_mask, norm.weight, norm.bias, head.weight, head.bias"
    assert f"left out: {left_out}" in out

    model = WithBackbone("swin/maskformer2_swin_tiny_bs16_50ep.yaml", SMALL_SWIN)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    load(model, target)
    expected = theirs.state_dict()
    for key, value in model.state_dict().items():
        # ImageNet models lack the norms of the four outputs, which keep their initial values.
        source_of_key = fresh if key.startswith("backbone.norm") else expected
        assert torch.equal(value, source_of_key[key]), key
    written = load_pickle(str(target))
    assert {k: v for k, v in written.items() if k != "model"} == {
        "__author__": "third_party",
        "matching_heuristics": True,
    }


SWIN = {
    "patch_embed.proj.weight": torch.zeros(1),
    "layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(1),
    "layers.0.downsample.reduction.weight": torch.zeros(1),
}
RESNET = {name: torch.zeros(1) for name in sorted(RESNET_KEYS)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2], "does not hold a state dict, but list"),
        ({}, r"does not hold a state dict, but \[\]"),
        ({"model": {}, "epoch": 3}, r"does not hold a state dict, but \[\]"),
        ({"epoch": 3, "state": {}}, r"does not hold a state dict, but \['epoch', 'state'\]"),
        ({"a": torch.zeros(1)}, "neither a ResNet of torchvision .* nor .*: its first keys are a"),
        ({"sem_seg_head.predictor.x": torch.zeros(1)}, "a whole segmentation model"),
        ({"backbone.conv1.weight": torch.zeros(1)}, "a backbone inside another model"),
        ({"features.1.0.attn.qkv.weight": torch.zeros(1)}, "torchvision's Swin"),
        ({"layers.0.blocks.0.attn.logit_scale": torch.zeros(1)}, "Swin V2"),
        (RESNET | {"layer1.0.se.fc1.weight": torch.zeros(1)}, "1 unknown keys: layer1.0.se"),
        (SWIN | {"absolute_pos_embed": torch.zeros(1)}, "1 unknown keys: absolute_pos_embed"),
    ],
)
def test_other_files_are_rejected(data, message, tmp_path):
    source, target = tmp_path / "in.pth", tmp_path / "out.pkl"
    torch.save(data, source)
    with pytest.raises(SystemExit, match=message) as error:
        tool.main([str(source), str(target)])
    assert "in.pth" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_bad_paths_and_unsafe_files(tmp_path, capsys):
    source = tmp_path / "in.pth"
    with pytest.raises(SystemExit, match="in.pth does not exist"):
        tool.main([str(source), str(tmp_path / "out.pkl")])
    torch.save(RESNET, source)
    with pytest.raises(SystemExit, match="out.pth: the output must end in .pkl"):
        tool.main([str(source), str(tmp_path / "out.pth")])
    with pytest.raises(SystemExit, match="nowhere"):
        tool.main([str(source), str(tmp_path / "nowhere" / "out.pkl")])
    os.symlink("/dev/full", tmp_path / "out.pkl.tmp")
    with pytest.raises(SystemExit, match=r"error: Cannot write \S*out\.pkl: No space left on dev"):
        tool.main([str(source), str(tmp_path / "out.pkl")])
    done = tmp_path / "done.pkl"
    done.write_bytes(pickle.dumps({"model": {}, "__author__": "torchvision"}))
    with pytest.raises(SystemExit, match="already in Detectron2's format"):
        tool.main([str(done), str(tmp_path / "out.pkl")])
    source.write_bytes(pickle.dumps({"model": Evil()}, protocol=2))
    with pytest.raises(SystemExit, match=r"in.pth was not loaded|in.pth cannot be read"):
        tool.main([str(source), str(tmp_path / "out.pkl")])
    assert "run" not in capsys.readouterr().out
    source.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(SystemExit, match="in.pth cannot be read"):
        tool.main([str(source), str(tmp_path / "out.pkl")])
    assert not (tmp_path / "out.pkl").exists()


def test_safetensors_and_values_that_are_not_finite(tmp_path):
    source, target = tmp_path / "in.safetensors", tmp_path / "out.pkl"
    save_file(RESNET, source)
    tool.main([str(source), str(target)])
    assert len(load_pickle(str(target))["model"]) == len(RESNET)
    save_file(RESNET | {"bn1.weight": torch.tensor([float("nan")])}, source)
    with pytest.raises(
        SystemExit, match=r"in\.safetensors holds NaN .* in stem\.conv1\.norm\.weig"
    ):
        tool.main([str(source), str(target)])


def test_existing_output_is_replaced_only_when_complete(tmp_path, monkeypatch):
    source, target = tmp_path / "in.pth", tmp_path / "out.pkl"
    torch.save(RESNET, source)
    target.write_text("before")

    def interrupted(result, file):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pickle, "dump", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tool.main([str(source), str(target)])
    assert target.read_text() == "before"
    tool.main([str(source), str(target)])
    assert sorted(load_pickle(str(target))["model"])[0] == "res2.0.conv1.weight"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "out.pkl"]


def as_efficientnet_pytorch(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of timm's EfficientNet under the names of efficientnet-pytorch.

    Both register their modules in the order of use, so the names follow from the order alone.
    """
    blocks = [block for stage in model.blocks for block in stage]
    old = ["_conv_stem", "_bn0"]
    for i, block in enumerate(blocks):
        has_se = any("se" in name.split(".") for name, _ in block.named_parameters())
        parts = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
        parts[4:4] = ["_se_reduce", "_se_expand"] if has_se else []
        old += [f"_blocks.{i}.{part}" for part in (parts if i else parts[2:])]
    old += ["_conv_head", "_bn1", "_fc"]
    state = model.state_dict()
    new = list(dict.fromkeys(name.rpartition(".")[0] for name in state))
    names = dict(zip(new, old, strict=True))
    return {f"{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in state.items()}


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_b0"])
def test_efficientnet_gets_the_names_of_timm(name, tmp_path, capsys):
    timm = pytest.importorskip("timm")
    model = randomised(timm.create_model(name, num_classes=7))
    source, target = tmp_path / "in.pth", tmp_path / "out.pth"
    torch.save(as_efficientnet_pytorch(model), source)
    tool.main([str(source), str(target)])
    assert "is an EfficientNet of efficientnet-pytorch: wrote " in capsys.readouterr().out
    converted = torch.load(target)
    assert converted.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(converted[key], value), key


def test_efficientnet_files_that_are_damaged(tmp_path):
    timm = pytest.importorskip("timm")
    weights = as_efficientnet_pytorch(timm.create_model("tf_efficientnet_lite0"))
    source = tmp_path / "in.pth"
    torch.save(weights, source)
    with pytest.raises(SystemExit, match=r"out\.pkl: the output must end in \.pth"):
        tool.main([str(source), str(tmp_path / "out.pkl")])
    without = {k: v for k, v in weights.items() if not k.startswith("_blocks.3._project_conv")}
    torch.save(without, source)
    with pytest.raises(SystemExit, match=r"but: block \d+ has no projection, or one before it"):
        tool.main([str(source), str(tmp_path / "out.pth")])
    torch.save({**weights, "_blocks.0._other.weight": torch.ones(1)}, source)
    with pytest.raises(SystemExit, match="1 unknown keys: _blocks.0._other.weight"):
        tool.main([str(source), str(tmp_path / "out.pth")])
    assert not (tmp_path / "out.pth").exists()
