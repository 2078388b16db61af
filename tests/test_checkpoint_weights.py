"""Where files keep weights, under which names, and what of them starts another model."""

import logging
import pickle

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.checkpoint_weights import update_names

PREDICTOR = "sem_seg_head.predictor"
QUERIES = (f"{PREDICTOR}.query_feat.weight", f"{PREDICTOR}.query_embed.weight")
CLASS_LAYER = (f"{PREDICTOR}.class_embed.weight", f"{PREDICTOR}.class_embed.bias")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(3, 2)


def equal(model, weights):
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "key",
    ["model", "state_dict", "model_state_dict", "module", "ema_state", "model_ema", "ema"],
)
@pytest.mark.parametrize("file", ["model.pth", "model.pkl"])
def test_keys_of_weights(tmp_path, key, file):
    weights, target = Model().state_dict(), Model()
    data = {key: weights, "epoch": 3}
    if file.endswith("pkl"):
        data[key] = {name: value.numpy() for name, value in weights.items()}
        (tmp_path / file).write_bytes(pickle.dumps(data))
    else:
        torch.save(data, tmp_path / file)
    rest = Mask2FormerCheckpointer(target).load(str(tmp_path / file))
    assert equal(target, weights)
    assert rest == {"epoch": 3}


def test_several_sets_of_weights(tmp_path, caplog):
    weights, average, target = Model().state_dict(), Model().state_dict(), Model()
    path = tmp_path / "model.pth"
    torch.save({"ema_state": average, "state_dict": weights}, path)
    Mask2FormerCheckpointer(target).load(str(path))
    assert equal(target, weights)
    assert "those under 'state_dict' are used, not those under 'ema_state'" in caplog.text


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_names_of_wrapped_models(tmp_path, prefix):
    weights, target = Model().state_dict(), Model()
    torch.save({f"{prefix}{name}": v for name, v in weights.items()}, tmp_path / "model.pth")
    Mask2FormerCheckpointer(target).load(str(tmp_path / "model.pth"))
    assert equal(target, weights)


def test_average_that_the_run_restores(tmp_path, caplog):
    """A hook of the user may save one under such a key."""
    model, average = Model(), Model()
    Mask2FormerCheckpointer(model, str(tmp_path), ema=average).save("model")
    target, restored = Model(), Model()
    Mask2FormerCheckpointer(target, ema=restored).load(str(tmp_path / "model.pth"))
    assert equal(target, model.state_dict())
    assert equal(restored, average.state_dict())
    assert "several sets" not in caplog.text


def test_averaged_model_of_torch(tmp_path):
    averaged, target = torch.optim.swa_utils.AveragedModel(Model()), Model()
    torch.save(averaged.state_dict(), tmp_path / "model.pth")
    Mask2FormerCheckpointer(target).load(str(tmp_path / "model.pth"))
    assert equal(target, averaged.module.state_dict())


def test_a_prefix_of_the_model_stays():
    weights = {"model.a": torch.ones(1)}
    update_names(weights, {"model.a": torch.ones(1)})
    assert list(weights) == ["model.a"]
    # And one that not all names have.
    weights = {"module.a": torch.ones(1), "b": torch.ones(1)}
    update_names(weights, {"a": torch.ones(1)})
    assert set(weights) == {"module.a", "b"}


def start(cfg, weights, tmp_path):
    """Start a training of a new model from weights of another."""
    path = tmp_path / "other.pth"
    torch.save({"model": weights}, path)
    model = build_model(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Mask2FormerCheckpointer(model, partial_init=True).load(str(path), checkpointables=[])
    return model.state_dict(), before


@pytest.mark.parametrize("in_file", [3, 12])
@pytest.mark.parametrize("old_names", [False, True])
def test_fine_tuning_with_another_number_of_queries(tiny_cfg, tmp_path, caplog, in_file, old_names):
    ours = tiny_cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES
    tiny_cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = in_file
    weights = dict(build_model(tiny_cfg).state_dict())
    tiny_cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = ours
    saved = {
        k.replace("query_feat", "static_query") if old_names else k: weights[k] for k in weights
    }
    loaded, before = start(tiny_cfg, saved, tmp_path)
    num_kept = min(in_file, ours)
    for name, value in loaded.items():
        if name in QUERIES:
            assert torch.equal(value[:num_kept], weights[name][:num_kept])
            assert torch.equal(value[num_kept:], before[name][num_kept:])
        else:
            assert torch.equal(value, weights[name]), name
    rest = (
        "the other 4 keep their random initialisation"
        if in_file < ours
        else "its other 5 are not used"
    )
    assert (
        f"Fine-tuning with another number of queries, {ours} (MODEL.MASK_FORMER.NUM_OBJECT_QUERIES)"
        f" instead of {in_file}: the first {num_kept} rows of {QUERIES[1]}, {QUERIES[0]} come from "
    ) in caplog.text
    assert rest in caplog.text


def test_fine_tuning_to_other_classes_and_queries(tiny_cfg, tmp_path, caplog):
    weights = build_model(tiny_cfg).state_dict()
    tiny_cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 9
    tiny_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5
    loaded, before = start(tiny_cfg, weights, tmp_path)
    for name in CLASS_LAYER:
        assert torch.equal(loaded[name], before[name])
    assert loaded["criterion.empty_weight"].tolist() == before["criterion.empty_weight"].tolist()
    changed = {*CLASS_LAYER, *QUERIES, "criterion.empty_weight"}
    assert all(torch.equal(loaded[k], weights[k]) for k in loaded if k not in changed)
    assert "has 3 classes and the config 5 (MODEL.SEM_SEG_HEAD.NUM_CLASSES)" in caplog.text
    assert "another number of queries, 9" in caplog.text


def test_fine_tuning_with_fewer_decoder_layers(tiny_cfg, tmp_path, caplog):
    weights = build_model(tiny_cfg).state_dict()
    tiny_cfg.MODEL.MASK_FORMER.DEC_LAYERS = 3
    loaded, _ = start(tiny_cfg, weights, tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in loaded.items())
    assert "of another architecture (another number of decoder layers" in caplog.text
    assert ": 5 in the file, 3 in the config)" in caplog.text


def test_queries_of_another_width_are_an_error(tiny_cfg, tmp_path):
    weights = build_model(tiny_cfg).state_dict()
    tiny_cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 9
    tiny_cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 32
    with pytest.raises(ValueError, match="queries: 7 in .*width of the transformer decoder: 64"):
        start(tiny_cfg, weights, tmp_path)


@pytest.mark.parametrize(
    ("head", "layer"),
    [("PerPixelBaselineHead", "weight"), ("PerPixelBaselinePlusHead", "query_embed.weight")],
)
def test_per_pixel_baselines_keep_no_row_of_other_classes(tiny_cfg, tmp_path, caplog, head, layer):
    def change(num_classes):
        tiny_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = num_classes
        tiny_cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = num_classes

    tiny_cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    tiny_cfg.MODEL.SEM_SEG_HEAD.NAME = head
    tiny_cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "TransformerEncoderPixelDecoder"
    tiny_cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "transformer_encoder"
    change(4)
    weights = build_model(tiny_cfg).state_dict()
    change(6)
    loaded, before = start(tiny_cfg, weights, tmp_path)
    name = f"{PREDICTOR}.{layer}"
    assert torch.equal(loaded[name], before[name])
    assert "has 4 classes and the config 6" in caplog.text


@pytest.mark.parametrize("change", ["missing", "other size", "other values"])
@pytest.mark.parametrize("training", [False, True])
def test_class_weights_are_the_configs(tiny_cfg, tmp_path, caplog, change, training):
    model, path = build_model(tiny_cfg), tmp_path / "model.pth"
    weights = build_model(tiny_cfg).state_dict()
    expected = model.criterion.empty_weight.tolist()
    if change == "missing":
        del weights["criterion.empty_weight"]
    elif change == "other size":
        weights["criterion.empty_weight"] = torch.ones(9)
    else:
        weights["criterion.empty_weight"] = torch.tensor([1, 1, 1, 0.4])
    torch.save({"model": weights}, path)
    with caplog.at_level(logging.WARNING):
        Mask2FormerCheckpointer(model, partial_init=training).load(str(path))
    assert model.criterion.empty_weight.tolist() == expected
    said = f"NO_OBJECT_WEIGHT 0.4; this training uses the config's, {expected[-1]:g}"
    assert (said in caplog.text) == (training and change == "other values")


def test_class_weights_of_a_criterion_of_another_kind_are_loaded(tiny_cfg, tmp_path):
    model, path = build_model(tiny_cfg), tmp_path / "model.pth"
    weights = model.state_dict() | {"criterion.empty_weight": torch.tensor([2.0, 1.0, 3.0, 0.1])}
    torch.save({"model": weights}, path)
    Mask2FormerCheckpointer(model).load(str(path))
    assert model.criterion.empty_weight.tolist() == pytest.approx([2, 1, 3, 0.1])


@pytest.mark.parametrize("whole_norm", [False, True])
def test_statistics_of_frozen_norms_must_be_in_the_file(tiny_cfg, tmp_path, whole_norm):
    """Detectron2 fills them with zeros and ones if the file does not say its version."""
    model, path = build_model(tiny_cfg), tmp_path / "model.pth"
    norm = "backbone.stem.conv1.norm"
    names = [f"{norm}.running_mean"]
    if whole_norm:
        names = [f"{norm}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    weights = dict(model.state_dict())
    for name in names:
        del weights[name]
    torch.save({"model": weights}, path)
    with pytest.raises(ValueError, match=rf"{len(names)} buffers missing .*{norm}\.running_mean"):
        Mask2FormerCheckpointer(model).load(str(path))
    # A start from old ImageNet weights, whose norms are affine only.
    Mask2FormerCheckpointer(model, partial_init=True).load(str(path), checkpointables=[])
