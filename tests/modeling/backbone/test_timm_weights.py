"""Weights of timm in MODEL.WEIGHTS: names, coverage, folders, names to download."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.modeling.backbone import TimmBackbone, TimmViTBackbone
from mask2former.modeling.backbone.timm_weights import local_file

timm = pytest.importorskip("timm")

MODELS = {
    "test_convnext": TimmBackbone,
    "test_efficientnet": TimmBackbone,
    "test_vit": TimmViTBackbone,
    "test_vit3": TimmViTBackbone,
}


class Model(nn.Module):
    """What the checkpointer sees of a model."""

    def __init__(self, name, mean=None, **options):
        super().__init__()
        self.backbone = MODELS.get(name, TimmBackbone)(name=name, **options)
        self.sem_seg_head = nn.Linear(1, 1)
        source = timm.get_pretrained_cfg(name)
        for key, values in (("pixel_mean", mean or source.mean), ("pixel_std", source.std)):
            self.register_buffer(key, 255 * torch.tensor(values).view(-1, 1, 1), persistent=False)


def whole_model(name, seed=3, **options):
    """A classification model of timm, with all tensors random."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **options)
    state = model.state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value))
    return model


def save(model, path):
    weights = model if isinstance(model, dict) else model.state_dict()
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in weights.items()}, path)
    else:
        torch.save(weights, path)
    return str(path)


def load(model, path, **options):
    Mask2FormerCheckpointer(model, partial_init=True, **options).load(path, checkpointables=[])


@pytest.mark.parametrize("file", ["model.safetensors", "model.pth", "pytorch_model.bin"])
@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_timm_fills_the_backbone(tmp_path, caplog, name, file):
    peer, model = whole_model(name), Model(name)
    head = model.sem_seg_head.weight.clone()
    with caplog.at_level(logging.INFO):
        load(model, save(peer, tmp_path / file))
    expected = peer.state_dict()
    loaded = model.backbone.timm_model.state_dict()
    assert loaded
    for key, value in loaded.items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, expected[key]), key
    assert torch.equal(model.sem_seg_head.weight, head)
    assert f"fills all {sum('num_batches' not in key for key in loaded)} parameters" in caplog.text
    assert "head.fc.weight" in caplog.text or "classifier" in caplog.text or "head." in caplog.text
    assert "were trained with MODEL.PIXEL_MEAN" not in caplog.text


@pytest.mark.parametrize("wrap", ["state_dict", "model", "module.", "model.module."])
def test_wrapped_files(tmp_path, wrap):
    weights = whole_model("test_convnext").state_dict()
    wrapped = {wrap: weights}
    if wrap.endswith("."):
        wrapped = {f"{wrap}{key}": value for key, value in weights.items()}
    model = Model("test_convnext")
    load(model, save(wrapped, tmp_path / "model.pth"))
    name = "stages.0.blocks.0.conv_dw.weight"
    assert torch.equal(model.backbone.body.state_dict()[name], weights[name])


def test_a_checkpoint_of_a_training_is_loaded_as_it_is(tmp_path):
    saved, model = Model("test_vit", out_channels=8), Model("test_vit", out_channels=8)
    Mask2FormerCheckpointer(saved, str(tmp_path)).save("model")
    path = str(tmp_path / "model.pth")
    Mask2FormerCheckpointer(model).load(path)
    for key, value in saved.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    with pytest.raises(ValueError, match=r"backbone plain vision tr.* instead of timm model of"):
        other = Model("test_convnext")
        Mask2FormerCheckpointer(other).load(path)


@pytest.mark.parametrize("in_channels", [1, 4])
@pytest.mark.parametrize("name", ["test_convnext", "test_vit"])
def test_stems_of_other_channels(tmp_path, name, in_channels):
    """As timm does: one channel gets the sum over colours, four a scaled repetition."""
    peer, model = whole_model(name), Model(name, in_channels=in_channels)
    load(model, save(peer, tmp_path / "model.pth"))
    key = "stem.0.weight" if name == "test_convnext" else "patch_embed.proj.weight"
    ours, theirs = (m.state_dict()[key] for m in (model.backbone.timm_model, peer))
    assert ours.shape[1] == in_channels
    if in_channels == 1:
        torch.testing.assert_close(ours, theirs.sum(1, keepdim=True))
    else:
        torch.testing.assert_close(ours, theirs[:, [0, 1, 2, 0]] * 0.75)


def test_position_embeddings_of_another_size(tmp_path):
    peer, model = whole_model("test_vit", img_size=320), Model("test_vit")
    assert peer.pos_embed.shape != model.backbone.timm_model.pos_embed.shape
    load(model, save(peer, tmp_path / "model.pth"))
    assert torch.equal(model.backbone.timm_model.cls_token, peer.cls_token)


def test_pixel_values_of_the_weights(tmp_path, caplog):
    model = Model("tf_efficientnet_lite0", mean=(0.485, 0.456, 0.406))
    load(model, save(whole_model("tf_efficientnet_lite0"), tmp_path / "model.pth"))
    assert "were trained with MODEL.PIXEL_MEAN [127.5, 127.5, 127.5] and" in caplog.text
    assert "but the config has [123.675, 116.28, 103.53] and [127.5, 127.5, 127.5]" in caplog.text


def test_frozen_norms_without_weights(caplog):
    load(Model("resnet10t"), "")
    assert "'resnet10t' are frozen" in caplog.text and "MODEL.TIMM.NORM to BN" in caplog.text
    caplog.clear()
    load(Model("resnet10t", norm="BN"), "")
    load(Model("test_convnext"), "")
    assert caplog.text == ""


MISFITS = {
    "incomplete": (
        lambda weights: weights.pop("stages.1.blocks.0.mlp.fc1.weight"),
        r"model\.pth does not fit timm's 'test_convnext': 1 tensors are missing \(stages\.1\.bl",
    ),
    "deeper": (
        lambda weights: weights.update({"stages.1.blocks.9.gamma": torch.ones(1)}),
        r"1 tensors are of layers that the model lacks \(stages\.1\.blocks\.9\.gamma\)",
    ),
    "wider": (
        lambda weights: weights.update({"stages.0.blocks.0.gamma": torch.ones(3)}),
        r"1 tensors have another shape \(stages\.0\.blocks\.0\.gamma \(3,\) instead of \(24,\)",
    ),
    "not finite": (
        lambda weights: weights["stages.0.blocks.0.gamma"].fill_(float("nan")),
        r"1 of its weights hold NaN",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_files_that_do_not_fit(tmp_path, case):
    change, message = MISFITS[case]
    weights = whole_model("test_convnext").state_dict()
    change(weights)
    with pytest.raises(ValueError, match=message):
        load(Model("test_convnext"), save(weights, tmp_path / "model.pth"))


@pytest.mark.parametrize("other", ["test_efficientnet", "test_vit", "resnet10t"])
def test_files_of_another_model(tmp_path, other):
    path = save(whole_model(other), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth .*'test_convnext'"):
        load(Model("test_convnext"), path)


def folder_of(tmp_path, name, weights="model.safetensors"):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 1000}))
    if weights:
        save(whole_model(name), tmp_path / weights)
    return str(tmp_path)


def test_a_folder_of_hugging_face(tmp_path):
    model = Model("test_convnext")
    load(model, folder_of(tmp_path, "test_convnext"))
    expected = whole_model("test_convnext").state_dict()
    for key, value in model.backbone.body.state_dict().items():
        assert torch.equal(value, expected[key])


def test_a_folder_of_another_model(tmp_path):
    folder = folder_of(tmp_path, "test_convnext2")
    with pytest.raises(ValueError, match=r"config\.json says .* 'test_convnext2', but the config"):
        load(Model("test_convnext"), folder)


def test_a_folder_without_weights(tmp_path):
    folder = folder_of(tmp_path, "test_convnext", weights="")
    with pytest.raises(ValueError, match=r"without any of model\.safetensors, .*pytorch_model"):
        load(Model("test_convnext"), folder)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load(Model("test_convnext"), folder)


def test_names_to_download(tmp_path, monkeypatch):
    """Without network: what is asked for, and what is said if it does not come."""
    hub = pytest.importorskip("huggingface_hub")
    path, asked = save(whole_model("test_convnext"), tmp_path / "model.safetensors"), []

    def download(repository, file, revision=None):
        asked.append((repository, file))
        return path

    monkeypatch.setattr(hub, "hf_hub_download", download)
    model = Model("test_convnext")
    load(model, "timm://test_convnext.r160_in1k")
    assert asked == [("timm/test_convnext.r160_in1k", "model.safetensors")]
    expected = whole_model("test_convnext").state_dict()["stem.0.weight"]
    assert torch.equal(model.backbone.body.state_dict()["stem.0.weight"], expected)

    def fail(*_, **__):
        raise OSError("no route to host\ndetails")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"cannot be downloaded: no route to host\. Without netw"):
        load(model, "timm://test_convnext.r160_in1k")
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is 'test_convnxt'.*Did you mean"):
        load(model, "timm://test_convnxt")


def test_other_paths_stay(tmp_path):
    for path in ("detectron2://a.pkl", "model.pth?matching_heuristics=True", str(tmp_path)):
        assert local_file(path) == path


def test_files_with_names_of_transformers(tmp_path):
    weights = {"vit.encoder.layer.0.attention.attention.query.weight": torch.zeros(1, 1)}
    path = save(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="names of the transformers package. Name timm's file"):
        load(Model("test_vit"), path)
