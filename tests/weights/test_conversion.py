"""MODEL.WEIGHTS takes backbones of other libraries under the names that they have there."""

import logging

import pytest
import timm
import torch
import torchvision
from detectron2.modeling import build_model
from small_models import randomise, small_config
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.weights.metadata import known_data, tasks_of, thing_ids_of
from mask2former.weights.timm_features import feature_indices, feature_names
from mask2former.weights.transformers import load_transformers_folder, save_transformers_folder

IMAGE = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                around_one = value.dim() == 1 and not name.endswith("bias")
                value.copy_(0.9 + 0.2 * noise if around_one else 0.1 * noise - 0.05)
    return model.eval()


def start(cfg, weights, path):
    """A new model that a training starts from weights."""
    torch.save(weights, path)
    model = build_model(cfg).eval()
    Mask2FormerCheckpointer(model, partial_init=True).load(str(path), checkpointables=[])
    return model


RESNET18 = {
    "MODEL__RESNETS__DEPTH": 18,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 64,
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 64,
}


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_resnet_as_it_is(tmp_path, caplog, library):
    make = torchvision.models.resnet18 if library == "torchvision" else timm.models.resnet18
    theirs = randomised(make())
    with caplog.at_level(logging.INFO):
        model = start(
            small_config("resnet", False, **RESNET18), theirs.state_dict(), tmp_path / "w"
        )
    assert (
        "is a ResNet of torchvision or timm: its names are converted; left out: fc" in caplog.text
    )
    assert "backbone 100 of 100, pixel decoder 0 of " in caplog.text
    with torch.no_grad():
        ours = model.backbone(IMAGE)
        stem = theirs.bn1(theirs.conv1(IMAGE)).relu()
        x = nn.functional.max_pool2d(stem, 3, 2, 1)
        for i in range(1, 5):
            x = getattr(theirs, f"layer{i}")(x)
            torch.testing.assert_close(ours[f"res{i + 1}"], x, rtol=1e-4, atol=1e-5)


def test_stride_in_the_first_convolution_is_warned_of(tmp_path, caplog):
    cfg = small_config(
        "resnet",
        False,
        MODEL__RESNETS__STRIDE_IN_1X1=True,
        MODEL__RESNETS__RES2_OUT_CHANNELS=256,
        MODEL__RESNETS__WIDTH_PER_GROUP=64,
        MODEL__RESNETS__STEM_OUT_CHANNELS=64,
    )
    start(cfg, torchvision.models.resnet50().state_dict(), tmp_path / "w.pth")
    assert "MODEL.RESNETS.STRIDE_IN_1X1 True: set it to False" in caplog.text


def small_timm_swin() -> SwinTransformer:
    # All maps are larger than the window: timm does not shift windows otherwise, we do.
    return SwinTransformer(
        img_size=192, window_size=3, embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8),
        num_classes=4, strict_img_size=False,
    )  # fmt: skip


def test_swin_of_timm(tmp_path, caplog):
    theirs = randomised(small_timm_swin())
    cfg = small_config("swin", False, MODEL__SWIN__WINDOW_SIZE=3)
    with caplog.at_level(logging.INFO):
        model = start(cfg, theirs.state_dict(), tmp_path / "w.pth")
    assert "is a Swin Transformer of timm: its names are converted" in caplog.text
    with torch.no_grad():
        image = torch.rand(1, 3, 192, 192, generator=torch.Generator().manual_seed(1))
        x = theirs.patch_embed(image)
        ours = model.backbone(image)
        for i, layer in enumerate(theirs.layers):
            x = layer(x)
            # Ours normalises its maps; the norms are new, so with weights 1 and 0.
            expected = nn.functional.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2)
            torch.testing.assert_close(ours[f"res{i + 2}"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("key", ["model", None])
def test_swin_of_its_authors(tmp_path, caplog, key):
    cfg = small_config("swin", False)
    theirs = build_model(cfg)
    randomise(theirs, 0)
    weights = {k: v for k, v in theirs.backbone.state_dict().items() if not k.startswith("norm")}
    weights |= {"norm.weight": torch.ones(128), "head.weight": torch.ones(4, 128)}
    weights["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 25, 25)
    with caplog.at_level(logging.INFO):
        model = start(cfg, {key: weights} if key else weights, tmp_path / "w.pth")
    assert "is an official Swin Transformer: its names are converted" in caplog.text
    for name, value in model.backbone.state_dict().items():
        if not name.startswith("norm"):
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_backbones_of_transformers(tmp_path, caplog, backbone):
    transformers = pytest.importorskip("transformers")
    if backbone == "swin":
        settings = transformers.SwinConfig(
            embed_dim=16, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=5
        )
        theirs = transformers.SwinForImageClassification(settings)
        cfg = small_config("swin", False)
    else:
        settings = transformers.ResNetConfig(
            embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2],
            layer_type="basic",
        )  # fmt: skip
        theirs = transformers.ResNetForImageClassification(settings)
        cfg = small_config("resnet", False, **RESNET18)
    theirs.save_pretrained(str(tmp_path / "model"))
    model = build_model(cfg)
    with caplog.at_level(logging.INFO):
        Mask2FormerCheckpointer(model, partial_init=True).load(
            str(tmp_path / "model"), checkpointables=[]
        )
    assert "is a backbone of the transformers package" in caplog.text
    stem = model.backbone.patch_embed.proj if backbone == "swin" else model.backbone.stem.conv1
    their_stem = next(m for m in theirs.modules() if isinstance(m, nn.Conv2d))
    assert torch.equal(stem.weight, their_stem.weight)
    # All but the norms of Swin's four maps, which are not in a classifier.
    own = 8 if backbone == "swin" else 0
    number = len([k for k in model.backbone.state_dict() if "num_batches" not in k])
    assert f"backbone {number - own} of {number}," in caplog.text


def test_backbone_of_timm_both_ways(tmp_path):
    transformers = pytest.importorskip("transformers")
    cfg = small_config("resnet", False)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TIMM.NAME = "TimmBackbone", "convnext_atto"
    cfg.DATASETS.TEST = ("coco_2017_val_panoptic_with_sem_seg",)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 133
    model = build_model(cfg)
    randomise(model, 0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("gamma"):  # of which the initial values hide mistakes
                value.fill_(0.5)
    folder = tmp_path / "model"
    save_transformers_folder(model.state_dict(), cfg, str(folder))
    peer, report = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(
        str(folder), output_loading_info=True
    )
    assert not any(report.values()), report
    read, weights, metadata = load_transformers_folder(str(folder))
    again = build_model(read).eval()
    again.load_state_dict(weights)
    assert len(metadata["thing_classes"]) == 80 and len(metadata["stuff_classes"]) == 133
    with torch.no_grad():
        expected = model.eval().forward_network(IMAGE)
        theirs = peer.eval()(pixel_values=IMAGE)
        ours = again.forward_network(IMAGE)
    assert expected["pred_logits"].std() > 0.1
    for logits in (theirs.class_queries_logits, ours["pred_logits"]):
        torch.testing.assert_close(expected["pred_logits"], logits, atol=1e-4, rtol=1e-4)
    for masks in (theirs.masks_queries_logits, ours["pred_masks"]):
        torch.testing.assert_close(expected["pred_masks"], masks, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_window7_224", "cannot use MODEL.TIMM.NAME 'swin_tiny.*"),
        ("vit_tiny_patch16_224", r"no maps of the strides \[4, 8, 32\]"),
    ],
)
def test_models_of_timm_that_the_package_cannot_use(name, message):
    with pytest.raises(ValueError, match=message):
        feature_indices(name)


def test_feature_numbers_by_hand():
    # ResNets of timm have a map of stride 2 before these.
    assert feature_indices("resnet18") == (1, 2, 3, 4)
    assert "layer4.1.bn2.running_var" in feature_names("resnet18")


def test_data_sets_known_by_their_classes():
    from detectron2.data import MetadataCatalog

    coco = MetadataCatalog.get("coco_2017_val_panoptic_with_sem_seg")
    found = known_data([name.replace("-merged", " merged").upper() for name in coco.stuff_classes])
    assert found is coco
    assert thing_ids_of(found, 133) == list(range(80))
    assert known_data(["cat", "dog"]) is None
    ade = MetadataCatalog.get("ade20k_panoptic_val")
    names = [name.partition(",")[0].replace("window ", "windowpane") for name in ade.stuff_classes]
    assert known_data(names) is ade
    assert known_data(names[::-1]) is None


@pytest.mark.parametrize(
    ("content", "folder", "expected"),
    [
        ({"mask2former": {"tasks": ["semantic"]}}, "/x/coco-panoptic", ["semantic"]),
        ({"_name_or_path": "facebook/mask2former-swin-tiny-coco-instance"}, "/x/y", ["instance"]),
        ({}, "/x/semantic/mask2former-panoptic", ["panoptic", "instance", "semantic"]),
        ({}, "/c/models--facebook--m2f-ade-semantic/snapshots/0a1b", ["semantic"]),
        ({"mask2former": {"tasks": ["other"]}}, "/x/semantic/model", ["instance", "semantic"]),
    ],
)
def test_tasks_by_hand(content, folder, expected):
    assert tasks_of(content, None, folder) == expected


def test_things_make_a_panoptic_model(caplog):
    assert tasks_of({}, [0, 1], "/x/model") == ["panoptic", "instance", "semantic"]
    assert "/x/model does not say for which task it was trained" in caplog.text
