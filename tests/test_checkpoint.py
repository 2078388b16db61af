"""Which parameters a checkpoint must provide, and the errors if it does not."""

import os
import pickle
import re
import resource
import sys

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors.torch import save_file
from torch import nn

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.utils.files import WriteError


class Model(nn.Module):
    """The parts with rules of their own: backbone, head, class-dependent layers."""

    def __init__(self, num_classes=3, width=4, backbone_width=4):
        super().__init__()
        self.backbone = nn.Sequential()
        self.backbone.stem = nn.Conv2d(3, backbone_width, 1)
        self.backbone.norm = nn.BatchNorm2d(backbone_width)
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.proj = nn.Linear(backbone_width, width)
        self.sem_seg_head.class_embed = nn.Linear(width, num_classes + 1)
        self.criterion = nn.Module()
        self.criterion.register_buffer("empty_weight", torch.ones(num_classes + 1))
        self.register_buffer("pixel_mean", torch.zeros(3), persistent=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter)


def write(path, data):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(data, protocol=2))
    else:
        torch.save(data, path)
    return str(path)


def numpy_weights(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def equal(first, second, prefix=""):
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(v, states[1][k]) for k, v in states[0].items() if k.startswith(prefix))


def start_training(model, path):
    Mask2FormerCheckpointer(model, partial_init=True).load(path, checkpointables=[])


@pytest.mark.parametrize("heuristics", [False, True])
def test_model_of_the_original_release(tmp_path, heuristics):
    source, target = Model(), Model()
    data = {"model": numpy_weights(source), "__author__": "someone"}
    if heuristics:
        data["matching_heuristics"] = True
    Mask2FormerCheckpointer(target).load(write(tmp_path / "model_final.pkl", data))
    assert equal(source, target)


def test_imagenet_backbone(tmp_path, caplog):
    """As in Detectron2's model zoo: names without prefix, and an unused classifier."""
    source, target = Model(), Model()
    head = {k: v.clone() for k, v in target.sem_seg_head.state_dict().items()}
    weights = {f"{k}": v.numpy() for k, v in source.backbone.state_dict().items()}
    weights["fc.weight"] = np.zeros((1000, 4), dtype=np.float32)
    data = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    path = write(tmp_path / "R-50.pkl", data)
    start_training(target, path)
    assert equal(source, target, "backbone")
    assert all(torch.equal(v, head[k]) for k, v in target.sem_seg_head.state_dict().items())
    assert "not found in the checkpoint" in caplog.text

    # It cannot be evaluated.
    with pytest.raises(
        ValueError, match=r"R-50\.pkl does not fit.*4 parameters missing .*\(sem_seg"
    ):
        Mask2FormerCheckpointer(target).load(path)


def test_fine_tuning_to_other_classes(tmp_path, caplog):
    source, target = Model(num_classes=3), Model(num_classes=8)
    for name in ("model.pth", "model.pkl"):
        data = {"model": numpy_weights(source), "__author__": "x", "matching_heuristics": True}
        path = write(tmp_path / name, data)
        start_training(target, path)
        assert equal(source.backbone, target.backbone)
        assert torch.equal(source.sem_seg_head.proj.weight, target.sem_seg_head.proj.weight)
        assert "Fine-tuning to other classes: sem_seg_head.class_embed.bias, sem" in caplog.text
        assert "has 3 classes and the config 8" in caplog.text
        with pytest.raises(
            ValueError, match=r"number of classes: 3 in the file, 8 .*NUM_CLASSES to 3\."
        ):
            Mask2FormerCheckpointer(target).load(path)
        caplog.clear()


def test_another_architecture(tmp_path):
    target = Model()
    wider = write(tmp_path / "wider.pth", {"model": Model(width=6).state_dict()})
    for load in (start_training, lambda m, p: Mask2FormerCheckpointer(m).load(p)):
        with pytest.raises(ValueError, match=r"wider\.pth .*Model with Sequential.*head.proj.bias"):
            load(target, wider)

    stranger = write(tmp_path / "stranger.pth", {"model": {"layers.0.weight": torch.ones(2)}})
    with pytest.raises(ValueError, match=r"stranger\.pth.*1 unknown to the model \(layers.0.wei"):
        start_training(target, stranger)

    # Backbone weights of another width, whose names match only by suffix.
    weights = {k: v.numpy() for k, v in Model(backbone_width=5).backbone.state_dict().items()}
    data = {"model": weights, "__author__": "x", "matching_heuristics": True}
    with pytest.raises(ValueError, match=r"backbone.stem.bias \(5,\) instead of \(4,\)"):
        start_training(target, write(tmp_path / "backbone.pkl", data))


def test_resume_must_fit_completely(tmp_path):
    Mask2FormerCheckpointer(Model(num_classes=3), str(tmp_path)).save("model_0000001")
    checkpointer = Mask2FormerCheckpointer(Model(num_classes=8), str(tmp_path), partial_init=True)
    with pytest.raises(ValueError, match=r"model_0000001\.pth does not fit.*3 in the file, 8"):
        checkpointer.resume_or_load("", resume=True)


def test_harmless_differences(tmp_path):
    source, target = Model(), Model()
    weights = source.state_dict()
    del weights["backbone.norm.num_batches_tracked"]
    weights |= {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    Mask2FormerCheckpointer(target).load(write(tmp_path / "old.pth", {"model": weights}))
    assert equal(source.sem_seg_head, target.sem_seg_head)


def test_state_dict_of_a_distributed_model_without_the_model_key(tmp_path):
    source, target = Model(), Model()
    weights = {f"module.{name}": value for name, value in source.state_dict().items()}
    Mask2FormerCheckpointer(target).load(write(tmp_path / "ddp.pth", weights))
    assert equal(source, target)


def test_name_matching_by_query(tmp_path):
    source, target = Model(), Model()
    path = write(tmp_path / "backbone.pth", source.backbone.state_dict())
    start_training(target, f"{path}?matching_heuristics=True")
    assert equal(source.backbone, target.backbone)


def test_nothing_to_load():
    start_training(Model(), "")
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        Mask2FormerCheckpointer(Model()).resume_or_load("", resume=False)
    with pytest.raises(FileNotFoundError, match=r"nowhere/model\.pth does not exist"):
        start_training(Model(), "nowhere/model.pth")


def test_no_network():
    """As on a cluster node that starts a published recipe, whose backbone has a URL."""
    url = "http://127.0.0.1:9/R-50.pkl"
    with pytest.raises(ValueError, match=rf"Checkpoint {url} cannot be downloaded: .*WEIGHTS to"):
        start_training(Model(), url)


def test_files_without_a_state_dict(tmp_path):
    for name, data in {
        "number.pkl": {"model": {"w": 3}, "__author__": "x"},
        "list.pkl": [1, 2],
        "training.pth": {"state_dict": {}, "epoch": 3},
        "list.pth": [1, 2],
    }.items():
        with pytest.raises(ValueError, match=rf"Checkpoint \S*{name}"):
            start_training(Model(), write(tmp_path / name, data))


def test_malicious_file_and_a_good_one_afterwards(tmp_path):
    trace = tmp_path / "trace"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    checkpointer = Mask2FormerCheckpointer(Model(), partial_init=True)
    for name in ("bad.pkl", "bad.pth"):
        path = write(tmp_path / name, {"model": {"w": 1}, "__author__": Payload()})
        with pytest.raises(ValueError, match=rf"{name} was not loaded: it refers to \S+\.mkdir,"):
            checkpointer.load(path, checkpointables=[])
        assert not trace.exists()
    good = Model()
    checkpointer.load(write(tmp_path / "good.pth", good.state_dict()), checkpointables=[])
    assert equal(good, checkpointer.model)


def test_kill_while_saving_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    first, second = Model(), Model()
    Mask2FormerCheckpointer(first, str(tmp_path)).save("model_final")

    def torn_save(data, file):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", torn_save)
        Mask2FormerCheckpointer(second, str(tmp_path)).save("model_final")
    target = Model()
    Mask2FormerCheckpointer(target, str(tmp_path)).resume_or_load("", resume=True)
    assert equal(first, target)


def test_saved_files_load_in_detectron2(tmp_path):
    source, target = Model(), Model()
    Mask2FormerCheckpointer(source, str(tmp_path)).save("model_final", iteration=3)
    extra = DetectionCheckpointer(target, str(tmp_path)).resume_or_load("", resume=True)
    assert equal(source, target)
    assert extra["iteration"] == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["sem_seg_head.proj.weight", "backbone.norm.running_var"])
@pytest.mark.parametrize("file", ["model.pth", "model.pkl"])
def test_weights_that_are_not_finite(tmp_path, value, name, file):
    weights = numpy_weights(Model())
    weights[name] = weights[name].copy()
    weights[name].flat[1] = value
    path = write(tmp_path / file, {"model": weights, "__author__": "x"})
    for load in (start_training, lambda model, path: Mask2FormerCheckpointer(model).load(path)):
        with pytest.raises(ValueError, match=rf"{file}: 1 of its weights hold NaN .*\({name}\)"):
            load(Model(), path)


def test_masks_of_a_model_may_be_infinite(tmp_path):
    def masked():
        model = Model()
        model.register_buffer("mask", torch.tensor([0, -float("inf")]))
        return model

    weights = masked().state_dict()
    Mask2FormerCheckpointer(masked()).load(write(tmp_path / "model.pth", weights))
    weights["mask"][0] = float("nan")
    with pytest.raises(ValueError, match=r"1 of its weights hold NaN .*\(mask\)"):
        Mask2FormerCheckpointer(masked()).load(write(tmp_path / "model.pth", weights))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("matching", [False, True])
def test_weights_of_another_kind(tmp_path, dtype, matching):
    source = Model()
    weights = source.backbone.state_dict() if matching else source.state_dict()
    name = "stem.weight" if matching else "backbone.stem.weight"
    weights[name] = weights[name].to(dtype)
    path = write(tmp_path / "model.pth", weights)
    query = "?matching_heuristics=True" if matching else ""
    with pytest.raises(
        ValueError, match=rf"model\.pth\S*: {name} holds {dtype}, but the model need"
    ):
        start_training(Model(), path + query)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision(tmp_path, dtype):
    source, target = Model(), Model()
    weights = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in source.state_dict().items()
    }
    Mask2FormerCheckpointer(target).load(write(tmp_path / "model.pth", weights))
    assert torch.equal(target.backbone.stem.weight, weights["backbone.stem.weight"].float())


def test_safetensors(tmp_path):
    source, target = Model(), Model()
    path = str(tmp_path / "model.safetensors")
    save_file(source.state_dict(), path, metadata={"format": "pt"})
    Mask2FormerCheckpointer(target).load(path)
    assert equal(source, target)

    # Under any name, of a wrapped model, and with name matching.
    os.rename(path, tmp_path / "model.bin")
    start_training(target, str(tmp_path / "model.bin"))
    save_file({f"module.{k}": v for k, v in source.state_dict().items()}, path)
    target = Model()
    Mask2FormerCheckpointer(target).load(path)
    assert equal(source, target)
    save_file(source.backbone.state_dict(), path)
    target = Model()
    start_training(target, f"{path}?matching_heuristics=True")
    assert equal(source, target, "backbone")
    with pytest.raises(
        ValueError, match=r"model\.safetensors\S* does not fit the model.*4 parameters"
    ):
        Mask2FormerCheckpointer(target).load(f"{path}?matching_heuristics=True")


def test_safetensors_of_transformers(tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_file({"class_predictor.bias": torch.zeros(4)}, path)
    with pytest.raises(
        ValueError, match=r"model\.safetensors .* those of the transformers package"
    ):
        start_training(Model(), path)


def test_safetensors_without_its_package(tmp_path, monkeypatch):
    path = str(tmp_path / "model.safetensors")
    save_file(Model().state_dict(), path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match=r"model\.safetensors is a sa.*`pip install safetensors`"):
        Mask2FormerCheckpointer(Model()).load(path)


def test_unknown_query(tmp_path):
    path = write(tmp_path / "model.pth", Model().state_dict())
    with pytest.raises(ValueError, match=r"model\.pth\?a=1: nothing reads a"):
        Mask2FormerCheckpointer(Model()).load(f"{path}?a=1")


def test_state_of_another_object(tmp_path):
    """Whatever it raises, the file is named."""

    class Other:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            return state["a"] + 1

    checkpointer = Mask2FormerCheckpointer(Model(), str(tmp_path), other=Other())
    checkpointer.save("model")
    with pytest.raises(ValueError, match=r"model\.pth: the state of training .* has no entry 'a'"):
        checkpointer.load(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("file", ["odd.pth", "odd.pkl"])
def test_odd_structures(tmp_path, file):
    """All are refused, with the file's name."""
    weights = numpy_weights(Model())
    caffe2, matching = {"__author__": "Caffe2"}, {"__author__": "x", "matching_heuristics": True}
    for data in [
        *(3, None, "text", [], (), {}, {1: 2}, {"model": 3}, {"model": []}, {"model": {}}),
        *({"blobs": 3}, {"blobs": {1: weights}}, {"blobs": {"a": None}}, {"blobs": {}}),
        *({"model": {1: weights["criterion.empty_weight"]}}, {"model": {"": np.ones(2)}}),
        *({"model": value} | matching for value in ({}, 3, {"": np.ones(2)}, {"weight": None})),
        *({"model": {"w": np.array(value)}} | matching for value in ("text", b"bytes", "")),
        *({"model": {"w": np.ones(2)}} | matching, {"model": {"weight": np.ones(())}} | matching),
        {"model": {"cls_score_w": np.ones(())}} | matching | caffe2,
        {"model": {"bbox_pred_w": np.ones(())}} | matching | caffe2,
        {"model": {name: np.ones(()) for name in weights}} | matching,
        {"model": {"stem.bias": np.ones(4), "bias": np.ones(4)}} | matching | {"__author__": 3},
    ]:
        path = write(tmp_path / file, data)
        with pytest.raises(ValueError, match=rf"Checkpoint \S*{file}"):
            Mask2FormerCheckpointer(Model()).load(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\x89PNG\r\n\xff\xfe", "holds something else than the name of a file"),
        (b"model\0.pth", "holds something else than the name of a file"),
        (b"model.pth\nmodel.pth", "holds something else than the name of a file"),
        (b"m" * 10_000, "holds something else than the name of a file"),
        (b"model_0000009.pth", "names model_0000009.pth, which is not a file in its folder"),
        (b"folder", "names folder, which is not a file in its folder"),
        (b"..", "names .., which is not a file in its folder"),
        (b"../other/model.pth", "names ../other/model.pth, but a checkpoint must be in the same"),
        (b"/other/model.pth", "names /other/model.pth, but a checkpoint must be in the same"),
    ],
)
def test_broken_last_checkpoint(tmp_path, content, problem):
    folder = tmp_path / "output"
    for name in ("other", "output", "output/folder"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "model.pth", Model().state_dict())
    checkpointer = Mask2FormerCheckpointer(Model(), str(folder), partial_init=True)
    (folder / "last_checkpoint").write_bytes(content)
    expected = (
        rf"output/last_checkpoint {re.escape(problem)}.* \(the newest is model\.pth\), or del"
    )
    with pytest.raises(ValueError, match=expected):
        checkpointer.resume_or_load("", resume=True)
    (folder / "last_checkpoint").write_text("model.pth\n")
    checkpointer.resume_or_load("", resume=True)


@pytest.mark.parametrize("kind", ["folder", "dangling link", "pipe"])
def test_last_checkpoint_that_is_no_file(tmp_path, kind):
    path = tmp_path / "last_checkpoint"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nowhere")
    checkpointer = Mask2FormerCheckpointer(Model(), str(tmp_path), partial_init=True)
    with pytest.raises(
        ValueError, match=r"last_checkpoint is not a file, or a .*its folder has no"
    ):
        checkpointer.resume_or_load("", resume=True)


def test_without_last_checkpoint(tmp_path):
    for folder in ("", str(tmp_path)):
        checkpointer = Mask2FormerCheckpointer(Model(), folder, partial_init=True)
        assert not checkpointer.has_checkpoint()
        assert checkpointer.get_checkpoint_file() == ""


def test_weights_that_the_system_cannot_read():
    # Reading it at 0 fails, for every user.
    with pytest.raises(ValueError, match=r"/proc/self/mem cannot be read: Input/output error\. Ma"):
        start_training(Model(), "/proc/self/mem")


@pytest.mark.parametrize("size", [0, 1, 1000, 20_000, 39_000])
def test_save_that_fails_at_any_size(tmp_path, size):
    """torch hides the system's error."""
    model = Model(width=2000)
    checkpointer = Mask2FormerCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    assert (tmp_path / "model_0000001.pth").stat().st_size > 40_000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(WriteError) as caught:
            checkpointer.save("model_0000002")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.search(r"model_0000002\.pth: File too large\. Raise the limit", str(caught.value))
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    checkpointer.resume_or_load("", resume=True)
