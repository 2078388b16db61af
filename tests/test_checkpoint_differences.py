"""What a checkpoint of another model is told to be: one cause, both values, one remedy."""

import functools
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from mask2former.architecture import SETTINGS, describe_parts
from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.checkpoint_differences import compare, explain
from mask2former.modeling.backbone.swin import SwinTransformer

STATE_DICTS = Path(__file__).parent / "contracts" / "state_dicts"


@functools.cache
def published(name):
    """Names and shapes of a published checkpoint, without the losses' class weights."""
    shapes = {}
    for line in (STATE_DICTS / f"{name}.txt").read_text().splitlines():
        key, _, *shape = line.split()
        shapes[key] = tuple(map(int, shape[0].split("x"))) if shape else ()
    del shapes["criterion.empty_weight"]
    return shapes


def differences(file, model):
    common = file.keys() & model.keys()
    return compare(
        model,
        [name for name in model if file.get(name) != model[name]],
        {name: shape for name, shape in file.items() if name not in model},
        [(name, file[name], model[name]) for name in common if file[name] != model[name]],
    )


PARTS = {
    "r50_coco_panoptic": "ResNet-50",
    "r101_coco_instance": "ResNet-101",
    "swin_t_coco_panoptic": "Swin-T",
    "swin_l_coco_panoptic": "Swin-L",
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_published_checkpoints(name):
    shapes = published(name)
    assert describe_parts(shapes) == {
        "backbone": PARTS[name],
        "pixel decoder": "MSDeformAttnPixelDecoder",
        "transformer decoder": "MultiScaleMaskedTransformerDecoder",
    }
    values = {setting.key.rpartition(".")[2]: setting.value(shapes) for setting in SETTINGS}
    assert values == {
        "NUM_OBJECT_QUERIES": 200 if name.startswith("swin_l") else 100,
        "NUM_CLASSES": 80 if "instance" in name else 133,
        "DEC_LAYERS": 10,
        "TRANSFORMER_ENC_LAYERS": 6,
        "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": 3,
        "HIDDEN_DIM": 256,
        "CONVS_DIM": 256,
        "MASK_DIM": 256,
        "DIM_FEEDFORWARD": 2048,
        "NHEADS": 8,
        "WINDOW_SIZE": {"Swin-T": 7, "Swin-L": 12}.get(PARTS[name]),
    }


@pytest.mark.parametrize("file", PARTS)
@pytest.mark.parametrize("model", PARTS)
def test_published_checkpoints_differ_by_backbone_queries_and_classes(file, model):
    found = differences(published(file), published(model))
    text = explain(found, set())
    assert (text == "") == (file == model)
    backbone = f"backbone {PARTS[file]} instead of {PARTS[model]}"
    assert (backbone in text) == (file != model)
    # All is explained by these.
    assert {key.what for key in found.settings} <= {
        "number of object queries",
        "number of classes",
    }
    assert not found.missing and not found.unexpected and not found.misshapen


def test_unknown_models():
    model = {"body.weight": (2,), "body.bias": (2,), "neck.weight": (3,)}
    text = explain(differences({"layers.weight": (2,), "body.bias": (2,)}, model), {"neck.weight"})
    assert text.startswith("another architecture. Use the config file that the checkpoint was")
    assert "1 parameters missing in the file (body.weight)" in text
    assert "1 buffers missing in the file (neck.weight)" in text
    assert "1 unknown to the model (layers.weight)" in text
    text = explain(differences(model | {"body.bias": (4,)}, model), set())
    assert text.startswith("1 of another shape (body.bias (4,) instead of (2,)). Use the config")


def change(cfg, key, value):
    *path, last = key.split(".")
    node = cfg
    for name in path:
        node = node[name]
    node[last] = value


def saved(cfg, tmp_path, **entries):
    model = build_model(cfg)
    path = tmp_path / "other.pth"
    torch.save({"model": model.state_dict() | entries}, path)
    return model, str(path)


HEAD, MASK_FORMER = "MODEL.SEM_SEG_HEAD", "MODEL.MASK_FORMER"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (f"{MASK_FORMER}.NUM_OBJECT_QUERIES", 9, "number of object queries: 9 in the file, 7 "),
        (
            f"{HEAD}.NUM_CLASSES",
            40,
            r"number of classes: 40 in the file \(as for YouTube-VIS, by the video",
        ),
        (f"{MASK_FORMER}.DEC_LAYERS", 3, "number of decoder layers, .*: 3 in the file, 5 in"),
        (
            f"{HEAD}.TRANSFORMER_ENC_LAYERS",
            1,
            "number of encoder layers in the pixel decoder: 1 in.* 2 ",
        ),
        (f"{MASK_FORMER}.HIDDEN_DIM", 32, "width of the transformer decoder: 32 in.* 64 "),
        (f"{HEAD}.CONVS_DIM", 32, "width of the pixel decoder: 32 in.* 64 "),
        (f"{HEAD}.MASK_DIM", 16, "width of the mask embeddings: 16 in.* 32 "),
        (f"{MASK_FORMER}.DIM_FEEDFORWARD", 48, "width of the feed-forward layers: 48 in.* 128 "),
        (f"{MASK_FORMER}.NHEADS", 8, "number of attention heads: 8 in.* 4 "),
    ],
)
def test_another_value_of_a_setting(tiny_cfg, tmp_path, key, value, message):
    model = build_model(tiny_cfg)
    change(tiny_cfg, key, value)
    _, path = saved(tiny_cfg, tmp_path)
    with pytest.raises(ValueError, match=f"another {message}.*Set {key} to {value}") as error:
        Mask2FormerCheckpointer(model).load(path)
    # The only cause.
    text = str(error.value)
    assert text.count("another ") == 1
    assert "missing" not in text and "unknown" not in text and "shape" not in text


def test_another_number_of_levels(tiny_cfg, tmp_path):
    model = build_model(tiny_cfg)
    key = f"{HEAD}.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
    change(tiny_cfg, key, ["res2", "res3", "res4", "res5"])
    _, path = saved(tiny_cfg, tmp_path)
    with pytest.raises(ValueError, match=rf"4 in the file, 3 in.* Name 4 features in {key}\."):
        Mask2FormerCheckpointer(model).load(path)


def test_other_parts(tiny_cfg, tmp_path):
    model = build_model(tiny_cfg)
    tiny_cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "TransformerEncoderPixelDecoder"
    tiny_cfg.MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME = "StandardTransformerDecoder"
    tiny_cfg.MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE = "transformer_encoder"
    other, path = saved(tiny_cfg, tmp_path)
    message = (
        "another architecture: pixel decoder TransformerEncoderPixelDecoder instead of "
        "MSDeformAttnPixelDecoder, transformer decoder StandardTransformerDecoder instead of "
        "MultiScaleMaskedTransformerDecoder. Use the config file that the checkpoint was trained "
        "with. The file is of MaskFormer, the predecessor of Mask2Former."
    )
    with pytest.raises(ValueError, match=message) as error:
        Mask2FormerCheckpointer(model).load(path)
    assert str(error.value).endswith(message)

    # Before version 2 the pixel decoder was not named.
    old = {k.replace(".pixel_decoder.", "."): v for k, v in other.state_dict().items()}
    torch.save({"model": old}, path)
    Mask2FormerCheckpointer(other).load(path)
    with pytest.raises(ValueError, match="transformer decoder Standard.*of MaskFormer, the pred"):
        Mask2FormerCheckpointer(model).load(path)


@pytest.mark.parametrize("training", [False, True])
def test_another_backbone(tiny_cfg, tmp_path, training):
    model = build_model(tiny_cfg)
    tiny_cfg.MODEL.RESNETS.DEPTH = 34
    _, path = saved(tiny_cfg, tmp_path)
    message = r"another architecture: backbone ResNet-34 instead of ResNet-18\. Use the config fil"
    checkpointer = Mask2FormerCheckpointer(model, partial_init=training)
    with pytest.raises(ValueError, match=message):
        checkpointer.load(path, checkpointables=[])


@pytest.mark.parametrize(("in_file", "in_config"), [(18, 34), (34, 18)])
def test_imagenet_weights_of_another_backbone(tiny_cfg, tmp_path, in_file, in_config):
    """Name matching would take the blocks that both have."""
    path = tmp_path / "backbone.pth"
    tiny_cfg.MODEL.RESNETS.DEPTH = in_file
    torch.save(build_model(tiny_cfg).backbone.state_dict(), path)
    tiny_cfg.MODEL.RESNETS.DEPTH = in_config
    checkpointer = Mask2FormerCheckpointer(build_model(tiny_cfg), partial_init=True)
    with pytest.raises(ValueError, match=f"ResNet-{in_file} instead of ResNet-{in_config}"):
        checkpointer.load(f"{path}?matching_heuristics=True", checkpointables=[])


def test_imagenet_weights_of_another_swin(tmp_path):
    """Name matching gives up on these."""

    def build(depths):
        model = torch.nn.Module()
        model.backbone = SwinTransformer(embed_dim=8, depths=depths, num_heads=[1, 1, 1, 1])
        return model

    path = tmp_path / "swin.pth"
    torch.save(build([2, 2, 2, 2]).backbone.state_dict(), path)
    checkpointer = Mask2FormerCheckpointer(build([2, 2, 6, 2]), partial_init=True)
    message = "backbone Swin of width 8 and depths 2-2-2-2 instead of Swin of .* depths 2-2-6-2"
    with pytest.raises(ValueError, match=message):
        checkpointer.load(f"{path}?matching_heuristics=True", checkpointables=[])


def test_missing_and_unknown_names(tiny_cfg, tmp_path):
    model, path = saved(tiny_cfg, tmp_path, extra=torch.ones(2))
    with pytest.raises(ValueError, match=r"\): 1 unknown to the model \(extra\)\. .*remove them"):
        Mask2FormerCheckpointer(model).load(path)

    weights = model.state_dict()
    decoder = "sem_seg_head.predictor.decoder_norm"
    del weights[f"{decoder}.bias"], weights["backbone.stem.conv1.norm.running_mean"]
    torch.save({"model": weights}, path)
    message = (
        rf"\): 1 parameters missing in the file \({decoder}\.bias\)\. .*"
        r"1 buffers missing in the file \(backbone\.stem\.conv1\.norm\.running_mean\)"
    )
    with pytest.raises(ValueError, match=message):
        Mask2FormerCheckpointer(model).load(path)


def test_parts_that_the_file_lacks(tiny_cfg, tmp_path):
    model, path = saved(tiny_cfg, tmp_path)
    backbone = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save(backbone, path)
    Mask2FormerCheckpointer(model, partial_init=True).load(path, checkpointables=[])
    message = "no pixel decoder and no transformer decoder in the file.*can only start a training"
    with pytest.raises(ValueError, match=message):
        Mask2FormerCheckpointer(model).load(path)

    torch.save({k.removeprefix("backbone."): v for k, v in backbone.items()}, path)
    checkpointer = Mask2FormerCheckpointer(model, partial_init=True)
    with pytest.raises(ValueError, match=r"no backbone and.* append \?matching_heuristics=True"):
        checkpointer.load(path, checkpointables=[])
    checkpointer.load(f"{path}?matching_heuristics=True", checkpointables=[])


@pytest.mark.parametrize(
    ("name", "project"),
    [
        ("model.pixel_level_module.encoder.weight", "the transformers package"),
        ("model.transformer_module.queries.weight", "the transformers package"),
        ("pixel_level_module.encoder.weight", "the transformers package"),
        ("panoptic_head.query_embed.weight", "MMDetection"),
        ("decode_head.query_embed.weight", "MMSegmentation"),
        ("layer1.0.conv1.weight", r"a ResNet of torchvision, to convert with tools/convert_weig"),
        ("layers.0.blocks.0.attn.qkv.weight", "a Swin Transformer of its authors' release, to co"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_files_of_other_projects(tiny_cfg, tmp_path, name, project, training):
    path = tmp_path / "model.pth"
    torch.save({name: torch.ones(2)}, path)
    checkpointer = Mask2FormerCheckpointer(build_model(tiny_cfg), partial_init=training)
    with pytest.raises(
        ValueError, match=rf"model\.pth does .*\): its names are those of {project}"
    ):
        checkpointer.load(str(path), checkpointables=[])
