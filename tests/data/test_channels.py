"""Images of 1, 4 and 6 channels: from files to losses, predictions and drawings."""

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from PIL import Image

from mask2former.checkpoint import Mask2FormerCheckpointer
from mask2former.data.augmentations import ResizeShortestEdge
from mask2former.data.dataset_mappers import MaskFormerSemanticDatasetMapper
from mask2former.data.lazy_augmentation import augment
from mask2former.data.loader import InferenceMapper

HEIGHT, WIDTH = 48, 64


def picture(channels: int) -> np.ndarray:
    generator = np.random.default_rng(channels)
    return generator.integers(0, 256, (HEIGHT, WIDTH, channels), np.uint8)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
@pytest.mark.parametrize("flip", [False, True])
def test_each_band_is_augmented_as_a_grey_image(channels, flip):
    """With four channels Pillow would weigh the first three by the fourth."""
    image = picture(channels)
    augmentations = [
        ResizeShortestEdge([30], 100, "choice"),
        T.RandomCrop("absolute", (20, 24)),
        T.RandomFlip(prob=float(flip)),
    ]
    np.random.seed(3)
    result, labels, transforms = augment(augmentations, image, image[:, :, 0].astype(float))
    assert result.shape == (20, 24, channels) and labels.shape == (20, 24)
    crop = transforms.transforms[1]
    for i in range(channels):
        grey = Image.fromarray(image[:, :, i]).resize((40, 30), Image.Resampling.BILINEAR)
        expected = np.asarray(grey)[crop.y0 : crop.y0 + 20, crop.x0 : crop.x0 + 24]
        np.testing.assert_array_equal(result[:, :, i], expected[:, ::-1] if flip else expected)


@pytest.fixture
def cfg_of(tiny_cfg):
    """The config for a number of channels and a backbone."""

    def make(channels: int, backbone: str = "build_resnet_backbone"):
        cfg = tiny_cfg.clone()
        cfg.DATASETS.TRAIN = ("tests_channels",)
        metadata = MetadataCatalog.get("tests_channels")
        metadata.ignore_label, metadata.thing_dataset_id_to_contiguous_id = 255, {1: 0}
        cfg.INPUT.FORMAT = "L" if channels == 1 else "BANDS"
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (32,), 32
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [110.0] * channels, [60.0] * channels
        cfg.MODEL.BACKBONE.NAME = backbone
        swin = cfg.MODEL.SWIN
        swin.EMBED_DIM, swin.DEPTHS, swin.NUM_HEADS = 16, [1] * 4, [1, 2, 4, 8]
        return cfg

    return make


def write(folder, channels: int) -> dict:
    """A record of an image of three classes: as a grey PNG, an RGBA PNG, or an array."""
    image, labels = picture(channels), np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:, 20:40], labels[:, 40:] = 1, 2
    file = folder / ("image.npy" if channels == 6 else "image.png")
    if channels == 6:
        np.save(file, image)
    else:
        Image.fromarray(image[:, :, 0] if channels == 1 else image).save(file)
    Image.fromarray(labels).save(folder / "labels.png")
    return {"file_name": str(file), "sem_seg_file_name": str(folder / "labels.png")}


@pytest.mark.parametrize("backbone", ["build_resnet_backbone", "D2SwinTransformer"])
@pytest.mark.parametrize("channels", [1, 4, 6])
def test_from_files_to_losses(tmp_path, cfg_of, channels, backbone):
    cfg, record = cfg_of(channels, backbone), write(tmp_path, channels)
    cfg.INPUT.CROP.ENABLED = True
    model = build_model(cfg)
    sample = MaskFormerSemanticDatasetMapper(cfg, True)(record)
    assert sample["image"].shape[0] == channels
    sum(model.train()([sample]).values()).backward()
    names = {"build_resnet_backbone": "stem.conv1.weight"}
    stem = model.backbone.get_parameter(names.get(backbone, "patch_embed.proj.weight"))
    assert stem.shape[1] == channels and stem.grad.abs().sum(dim=(0, 2, 3)).min() > 0
    image = InferenceMapper(cfg)(record)
    with torch.no_grad():
        (outputs,) = model.eval()([image])
    assert outputs["sem_seg"].shape[1:] == (HEIGHT, WIDTH)


def test_a_file_with_other_channels_is_named(tmp_path, cfg_of):
    record = write(tmp_path, 6)
    with pytest.raises(ValueError, match=r"image\.npy .* 6 bands, but MODEL.PIXEL_MEAN has 4"):
        MaskFormerSemanticDatasetMapper(cfg_of(4), True)(record)


@pytest.mark.parametrize("backbone", ["build_resnet_backbone", "D2SwinTransformer"])
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_weights_for_colours_are_adapted(tmp_path, cfg_of, tiny_cfg, caplog, backbone, channels):
    """An image with the same values in all channels gives what it gives as colours."""
    cfg = cfg_of(channels, backbone)
    tiny_cfg.MODEL.BACKBONE.NAME, tiny_cfg.MODEL.SWIN = backbone, cfg.MODEL.SWIN
    colours, model = build_model(tiny_cfg), build_model(cfg)
    path = str(tmp_path / "weights.pth")
    torch.save({"model": colours.state_dict()}, path)
    with pytest.raises(ValueError, match=r"does not fit"):  # not to evaluate or resume
        Mask2FormerCheckpointer(model).load(path)
    Mask2FormerCheckpointer(model, partial_init=True).load(path, checkpointables=[])
    (line,) = (r.getMessage() for r in caplog.records if "input channels" in r.getMessage())
    assert path in line and "MODEL.PIXEL_MEAN" in line
    grey = torch.randn(1, 1, 64, 64)
    expected = colours.eval().backbone(grey.expand(1, 3, 64, 64))
    # Four channels repeat the first one, so that only the mean over channels is kept.
    for name, map_ in model.eval().backbone(grey.expand(1, channels, 64, 64)).items():
        if channels in (1, 6):
            torch.testing.assert_close(map_, expected[name], rtol=1e-3, atol=1e-3)
        else:
            assert map_.shape == expected[name].shape


def test_weights_with_matching_names_of_detectron2(tmp_path, cfg_of, tiny_cfg):
    """ImageNet weights have the names within the backbone."""
    state = build_model(tiny_cfg).backbone.state_dict()
    path = str(tmp_path / "weights.pth")
    torch.save({"model": state, "matching_heuristics": True}, path)
    model = build_model(cfg_of(1))
    Mask2FormerCheckpointer(model, partial_init=True).load(path, checkpointables=[])
    stem = model.backbone.stem.conv1.weight
    assert torch.equal(stem, state["stem.conv1.weight"].sum(1, keepdim=True))
