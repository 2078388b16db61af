"""Round trips with the transformers package: it loads what we write, we load what it writes."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import NUM_CLASSES, randomise, small_config

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.config_parts import get_value
from mask2former.weights.transformers import (
    is_transformers_folder,
    load_transformers_folder,
    save_transformers_folder,
)
from mask2former.weights.transformers_config import input_values

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
DATA = "tests_weights_panoptic"
NAMES = ["cat", "dog", "sky", "grass", "road"]
MetadataCatalog.get(DATA).set(
    stuff_classes=NAMES,
    thing_classes=["cat", "dog"],
    thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
)
SIZE = (96, 128)  # multiples of 32: neither side pads
# Backbone, pre-norm, other keys.
KINDS = {
    "swin": ("swin", False, {}),
    "resnet": ("resnet", True, {}),
    "stride in 1x1": ("resnet", False, {"MODEL__RESNETS__STRIDE_IN_1X1": True}),
    "bgr": (
        "swin",
        False,
        {"INPUT__FORMAT": "BGR", "MODEL__PIXEL_MEAN": [103.53, 116.28, 123.675]},
    ),
    "basic blocks": (
        "resnet",
        False,
        {
            "MODEL__RESNETS__DEPTH": 18,
            "MODEL__RESNETS__RES2_OUT_CHANNELS": 64,
            "MODEL__RESNETS__STEM_OUT_CHANNELS": 64,
        },
    ),
}


def config(kind):
    backbone, pre_norm, others = KINDS[kind]
    others = {"INPUT__MIN_SIZE_TEST": min(SIZE), "INPUT__MAX_SIZE_TEST": 1333} | others
    cfg = small_config(backbone, pre_norm, **others)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (DATA,)
    return cfg


def random_model(cfg, seed=0):
    model = build_model(cfg)
    randomise(model, seed)
    return model.eval()


def peer_of(folder):
    peer, report = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        str(folder), output_loading_info=True
    )
    assert not any(report.values()), report
    return peer.eval()


def image(seed=1):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def ours_on(model, rgb, channels="RGB"):
    """Outputs of our network for an image."""
    order = -1 if channels == "BGR" else 1
    pixels = torch.from_numpy(rgb[..., ::order].copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        outputs = model.forward_network((pixels - model.pixel_mean) / model.pixel_std)
    return outputs["pred_logits"], outputs["pred_masks"]


def peer_on(folder, rgb):
    """Outputs of the package for an image, with its image processor."""
    processor = transformers.AutoImageProcessor.from_pretrained(str(folder))
    inputs = processor(images=Image.fromarray(rgb), return_tensors="pt")
    with torch.no_grad():
        outputs = peer_of(folder)(**inputs)
    return outputs.class_queries_logits, outputs.masks_queries_logits


def assert_close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.std() > 0.1
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Function kind → (our config, our random model, the folder written)."""
    done = {}

    def write(kind):
        if kind not in done:
            folder = tmp_path_factory.mktemp("models") / kind.replace(" ", "_")
            cfg = config(kind)
            model = random_model(cfg)
            save_transformers_folder(model.state_dict(), cfg, str(folder))
            done[kind] = cfg, model, folder
        return done[kind]

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_loads_what_we_write(written, kind):
    cfg, model, folder = written(kind)
    assert_close(ours_on(model, image(), cfg.INPUT.FORMAT), peer_on(folder, image()))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_we_load_what_we_wrote(written, kind):
    cfg, model, folder = written(kind)
    read, weights, metadata = load_transformers_folder(str(folder))
    other = build_model(read).eval()
    assert not any(other.load_state_dict(weights))
    # Images are RGB in both, whatever our format was.
    theirs = ours_on(other, image())
    assert_close(ours_on(model, image(), cfg.INPUT.FORMAT), theirs)
    assert metadata["stuff_classes"] == NAMES and metadata["thing_classes"] == ["cat", "dog"]
    assert list(other.metadata.thing_dataset_id_to_contiguous_id.values()) == [0, 1]
    keys = ["MODEL.MASK_FORMER", "INPUT.MIN_SIZE_TEST", "MODEL.SEM_SEG_HEAD"]
    for key in [*keys, "MODEL.SWIN"] if KINDS[kind][0] == "swin" else keys:
        assert get_value(cfg, key) == get_value(read, key), key


def peer_folder(folder, backbone="swin", seed=3):
    """A random model that the package itself saves, in shards."""
    if backbone == "swin":
        backbone_config = transformers.SwinConfig(
            embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], window_size=3,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
    else:
        backbone_config = transformers.ResNetConfig(
            embedding_size=16, hidden_sizes=[32, 64, 128, 256], depths=[3, 4, 6, 3],
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
    settings = transformers.Mask2FormerConfig(
        backbone_config=backbone_config, feature_size=64, mask_feature_size=32, hidden_dim=64,
        encoder_layers=1, decoder_layers=3, num_attention_heads=4, dim_feedforward=48,
        num_queries=6, id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)}, class_weight=3.0,
        enforce_input_projection=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    peer = transformers.Mask2FormerForUniversalSegmentation(settings).eval()
    with torch.no_grad():
        for name, value in peer.state_dict().items():
            if value.is_floating_point() and not name.endswith(("running_var", "empty_weight")):
                value.add_(torch.randn_like(value) * (0.02 if value.dim() > 1 else 0.2))
    peer.save_pretrained(str(folder), max_shard_size="300KB")
    transformers.Mask2FormerImageProcessor(
        size={"shortest_edge": 96, "longest_edge": 200}, num_labels=len(NAMES), ignore_index=254
    ).save_pretrained(str(folder))
    return peer


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_we_load_what_the_package_writes(tmp_path, backbone, caplog):
    folder = tmp_path / f"mask2former-{backbone}-mine-panoptic"
    peer_folder(folder, backbone)
    assert (folder / "model.safetensors.index.json").is_file()
    assert is_transformers_folder(str(folder))
    with caplog.at_level(logging.INFO):
        cfg, weights, metadata = load_transformers_folder(str(folder))
    model = build_model(cfg).eval()
    assert not any(model.load_state_dict(weights))
    assert_close(ours_on(model, image()), peer_on(folder, image()))
    kind = "Swin" if backbone == "swin" else "ResNet"
    assert f"is a Mask2Former of the transformers package ({kind}, 5 classes" in caplog.text
    assert cfg.MODEL.MASK_FORMER.CLASS_WEIGHT == 3.0
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (96, 200)
    test = cfg.MODEL.MASK_FORMER.TEST
    assert test.PANOPTIC_ON and test.INSTANCE_ON and test.SEMANTIC_ON
    assert metadata["stuff_classes"] == NAMES

    # As MODEL.WEIGHTS, with our config: the folder, and the index in it.
    for path in (folder, folder / "model.safetensors.index.json"):
        other = build_model(cfg).eval()
        caplog.clear()
        with caplog.at_level(logging.INFO):
            Mask2FormerCheckpointer(other).load(str(path))
        for name, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name
        number = sum(name.startswith("backbone.") for name in model.state_dict())
        assert f"backbone {number} of {number}, pixel decoder" in caplog.text
        assert "criterion 0 of 1 (1 from the config)" in caplog.text


def hub_layout(source, folder):
    """The same model as version 4 of the package left it on the hub."""
    tensors, old = load_file(source / "model.safetensors"), {}
    for name, value in tensors.items():
        if "swin.layernorm" in name:
            continue  # it did not exist
        old[name] = value
        if name.endswith("relative_position_bias_table"):
            index = name.replace("bias_table", "index")
            old[index] = torch.zeros(25, 25, dtype=torch.int64)
    content = json.loads((source / "config.json").read_text())
    del content["mask2former"]
    content |= {
        "_name_or_path": "facebook/mask2former-swin-tiny-coco-panoptic",
        "backbone": None,
        "use_pretrained_backbone": False,
        "use_timm_backbone": False,
        "torch_dtype": "float32",
        "transformers_version": "4.26.0.dev0",
    }
    content["backbone_config"] |= {
        "path_norm": True,
        "stage_names": ["stem", "stage1", "stage2", "stage3", "stage4"],
        "feature_map": ["stage1"],
        "num_layers": 4,
        "patch_size": [4, 4],
        "mlp_ratio": 4,
        "chunk_size_feed_forward": 0,
    }
    processor = json.loads((source / "preprocessor_config.json").read_text())
    del processor["size_divisor"], processor["do_reduce_labels"]
    processor |= {"_max_size": 1333, "reduce_labels": False, "size": {"height": 96, "width": 128}}
    folder.mkdir()
    torch.save(old, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def test_published_layout(written, tmp_path):
    _, model, source = written("swin")
    folder = tmp_path / "snapshot"
    hub_layout(source, folder)
    cfg, weights, _ = load_transformers_folder(str(folder))
    other = build_model(cfg).eval()
    assert not any(other.load_state_dict(weights))
    assert_close(ours_on(model, image()), ours_on(other, image()))
    assert cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON  # by its name
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (96, 160)

    # The names of version 5 in memory, and those of the model without its head.
    tensors = torch.load(folder / "pytorch_model.bin")
    new = {
        name.replace("encoder.encoder.layers", "encoder.swin.encoder.layers")
        .replace("encoder.embeddings", "encoder.swin.embeddings")
        .replace("attention.self.query", "attention.q_proj")
        .replace("attention.self.key", "attention.k_proj")
        .replace("attention.self.value", "attention.v_proj")
        .replace("attention.self.relative", "attention.relative_position_bias.relative")
        .replace("attention.output.dense", "attention.o_proj")
        .replace("intermediate.dense", "mlp.fc1")
        .replace(".output.dense", ".mlp.fc2"): value
        for name, value in tensors.items()
        if not name.endswith("relative_position_index")
    }
    (folder / "pytorch_model.bin").unlink()
    save_file(new, folder / "model.safetensors")
    _, again, _ = load_transformers_folder(str(folder / "model.safetensors"))
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


def test_options_that_no_shape_shows_must_agree(written):
    _, _, folder = written("resnet")
    for key, value, message in (
        ("MODEL__MASK_FORMER__PRE_NORM", False, "pre_norm True, but .*PRE_NORM False: set it to T"),
        ("MODEL__RESNETS__STRIDE_IN_1X1", True, "downsample_in_bottleneck False, but the config"),
    ):
        model = build_model(small_config("resnet", True, **{key: value}))
        with pytest.raises(ValueError, match=message):
            Mask2FormerCheckpointer(model).load(str(folder))


def test_other_normalisation_is_warned_of(written, caplog):
    cfg, _, folder = written("swin")
    cfg = cfg.clone()
    cfg.MODEL.PIXEL_MEAN = [103.53, 116.28, 123.675]
    Mask2FormerCheckpointer(build_model(cfg)).load(str(folder))
    assert "PIXEL_MEAN [123.675, 116.28, 103.53] and" in caplog.text
    assert "but the config has [103.53, 116.28, 123.675]" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("activation_function", "gelu", r"config\.json has activation_function 'gelu'; our model"),
        ("encoder_feedforward_dim", 512, "encoder_feedforward_dim 512; our model supports 1024"),
        ("model_type", "maskformer", "a model of the type 'maskformer', not 'mask2former'"),
        ("id2label", {"0": "a"}, "names 1 classes in id2label, but the weights have 5"),
        ("backbone_config", {"model_type": "dinat"}, "a backbone of the type 'dinat'; allowed: "),
        ("backbone_config", {"model_type": "swin", "hidden_act": "relu"}, "hidden_act 'relu'"),
        (
            "backbone_config",
            {"model_type": "resnet", "depths": [1, 1, 1, 1]},
            r"a ResNet with \[1, 1, 1, 1\] blocks; allowed: those of the depths 18, 34",
        ),
        (
            "backbone_config",
            {"model_type": "resnet", "hidden_sizes": [8, 16, 32, 32]},
            r"widths \[8, 16, 32, 32\], of which each must double",
        ),
        ("backbone_config", {"model_type": "swin", "num_channels": 4}, "4 channels, not 3"),
    ],
)
def test_models_that_ours_cannot_be(written, tmp_path, key, value, message):
    _, _, source = written("swin")
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(ValueError, match=message):
        load_transformers_folder(str(folder))


def test_damaged_folders(written, tmp_path):
    _, _, source = written("swin")
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    key = next(name for name in tensors if name.endswith("attention.self.key.weight"))
    save_file({k: v for k, v in tensors.items() if k != key}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: of the three .* only 2 are in"):
        load_transformers_folder(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model, without any of model\.safetensors, "):
        load_transformers_folder(str(folder))
    index = folder / "model.safetensors.index.json"
    for places, message in (
        ({"a": "../x.safetensors"}, r"index\.json names '\.\./x\.safetensors', which is not"),
        ({"a": "x.safetensors"}, r"names the shard x\.safetensors, which does not exist"),
        ({"a": 1}, "has no 'weight_map'"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_transformers_folder(str(folder))
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json cannot be read as JSON"):
        load_transformers_folder(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_transformers_folder(str(folder))


@pytest.mark.parametrize(
    ("backbone", "others", "message"),
    [
        ("swin", {"MODEL__SWIN__APE": True}, "MODEL.SWIN has APE"),
        ("resnet", {"MODEL__RESNETS__NUM_GROUPS": 2}, "bottlenecks of 2 groups"),
        ("resnet", {"MODEL__SEM_SEG_HEAD__PIXEL_DECODER_NAME": "BasePixelDecoder"}, "decoders are"),
        ("swin", {"INPUT__FORMAT": "BANDS", "INPUT__COLOR_AUG_SSD": False}, "INPUT.FORMAT is BAND"),
        ("swin", {"MODEL__SEM_SEG_HEAD__NUM_CLASSES": 7}, "names 2 and 5 classes, but .* is 7"),
    ],
)
def test_models_that_the_package_cannot_be(tmp_path, backbone, others, message):
    cfg = small_config(backbone, False, **others)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (DATA,)
    with pytest.raises(ValueError, match=message):
        save_transformers_folder({}, cfg, str(tmp_path / "model"))
    assert not list(tmp_path.iterdir())


def test_folders_are_replaced_on_request_only(written, tmp_path):
    cfg, model, _ = written("swin")
    folder, weights = tmp_path / "model", model.state_dict()
    save_transformers_folder(weights, cfg, str(folder))
    with pytest.raises(FileExistsError, match="model exists: name another, or set --overwrite"):
        save_transformers_folder(weights, cfg, str(folder))
    (folder / "of_before").write_text("x")
    # Nothing is lost if the new one cannot be written.
    with pytest.raises(ValueError, match="1 tensors have no counterpart .*: of_another"):
        save_transformers_folder(
            weights | {"of_another": torch.ones(1)}, cfg, str(folder), overwrite=True
        )
    assert (folder / "of_before").exists()
    save_transformers_folder(weights, cfg, str(folder), overwrite=True)
    assert not (folder / "of_before").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    other = tmp_path / "data"
    other.mkdir()
    with pytest.raises(FileExistsError, match="not a model of transformers: it is not replaced"):
        save_transformers_folder(weights, cfg, str(other), overwrite=True)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({}, ("RGB", 800, 1333, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])),
        (
            {"size": 640, "max_size": 2560, "image_mean": [0, 0.5, 1], "image_std": [1, 1, 0.5]},
            ("RGB", 640, 2560, [0, 127.5, 255], [255, 255, 127.5]),
        ),
        # Not resized, not scaled, not normalised.
        (
            {
                "do_resize": False,
                "do_rescale": False,
                "image_mean": [9, 9, 9],
                "image_std": [2] * 3,
            },
            ("RGB", 0, 1333, [9, 9, 9], [2, 2, 2]),
        ),
        (
            {"do_normalize": False, "size": {"height": 384, "width": 480}},
            ("RGB", 384, 640, [0, 0, 0], [255, 255, 255]),
        ),
    ],
)
def test_image_processors_by_hand(processor, expected):
    assert tuple(input_values(processor).values()) == expected


def test_number_of_classes():
    assert len(NAMES) == NUM_CLASSES
