"""A briefly trained model gives the same results in the transformers package, end to end."""

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image
from small_models import small_config

from mask2former.predictor import Predictor
from mask2former.weights.transformers import load_transformers_folder, save_transformers_folder

transformers = pytest.importorskip("transformers")

# Classes 0 and 1 are things, 2 is stuff.
DATA = "tests_weights_trained"
MetadataCatalog.get(DATA).set(
    stuff_classes=["box", "disc", "ground"],
    thing_classes=["box", "disc"],
    thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
)
HEIGHT, WIDTH = 64, 96
LABELS = [0, 0, 1, 2]
COLOURS = [(200, 40, 40), (200, 40, 160), (40, 200, 60), (30, 60, 200)]


def scene():
    """An RGB image, and its four masks (T, H, W)."""
    masks = torch.zeros(4, HEIGHT, WIDTH, dtype=torch.bool)
    masks[0, 4:36, 4:36] = True
    masks[1, 8:40, 56:88] = True
    masks[2, 40:60, 36:60] = True
    masks[3] = ~masks[:3].any(0)
    image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    for mask, colour in zip(masks, COLOURS, strict=True):
        image[mask.numpy()] = colour
    return image, masks


def config(backbone, **others):
    cfg = small_config(
        backbone,
        False,
        MODEL__SEM_SEG_HEAD__NUM_CLASSES=3,
        MODEL__SEM_SEG_HEAD__TRANSFORMER_ENC_LAYERS=1,
        MODEL__MASK_FORMER__DEC_LAYERS=3,
        INPUT__MIN_SIZE_TEST=HEIGHT,
        MODEL__MASK_FORMER__TEST__OBJECT_MASK_THRESHOLD=0.5,
        **others,
    )
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (DATA,)
    return cfg


def train(cfg, num_steps):
    """A model that has seen nothing but the scene."""
    torch.manual_seed(0)
    model = build_model(cfg).train()
    image, masks = scene()
    instances = Instances((HEIGHT, WIDTH), gt_classes=torch.tensor(LABELS), gt_masks=masks)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(num_steps):
        loss = sum(model([{"image": pixels, "instances": instances}]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    # No map is smaller than the window, which the package would shrink.
    cfg = config("swin", MODEL__SWIN__WINDOW_SIZE=2)
    return cfg, train(cfg, num_steps=40)


def predictions(folder):
    """Of the package: its outputs and its image processor."""
    processor = transformers.AutoImageProcessor.from_pretrained(str(folder))
    model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        outputs = model(**processor(images=Image.fromarray(scene()[0]), return_tensors="pt"))
    return processor, outputs, model.config


def ours(model):
    pixels = torch.from_numpy(scene()[0]).permute(2, 0, 1)
    with torch.no_grad():
        return model([{"image": pixels, "height": HEIGHT, "width": WIDTH}])[0]


def agreement(one, other):
    return (torch.as_tensor(one) == torch.as_tensor(other)).float().mean().item()


@pytest.mark.parametrize(
    "tasks", [("panoptic", "instance", "semantic"), ("instance",), ("semantic",)]
)
def test_results_are_the_same(trained, tmp_path, tasks):
    cfg, model = trained
    cfg = cfg.clone()
    test = cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON, test.INSTANCE_ON, test.SEMANTIC_ON = (
        task in tasks for task in ("panoptic", "instance", "semantic")
    )
    task_model = build_model(cfg).eval()
    task_model.load_state_dict(model.state_dict())
    folder = tmp_path / "model"
    save_transformers_folder(model.state_dict(), cfg, str(folder))
    processor, outputs, config = predictions(folder)
    results, size = ours(task_model), [(HEIGHT, WIDTH)]
    gt_semantic = torch.zeros(HEIGHT, WIDTH, dtype=torch.int64)
    for mask, label in zip(scene()[1], LABELS, strict=True):
        gt_semantic[mask] = label

    if "semantic" in tasks:
        semantic = processor.post_process_semantic_segmentation(outputs, target_sizes=size)[0]
        our_semantic = results["sem_seg"].argmax(0)
        assert agreement(semantic, our_semantic) > 0.97
        assert agreement(our_semantic, gt_semantic) > 0.9
    if "instance" in tasks:
        found = processor.post_process_instance_segmentation(
            outputs, threshold=0.5, target_sizes=size
        )[0]
        instances = results["instances"]
        confident = instances[instances.scores > 0.5]
        labels = sorted(s["label_id"] for s in found["segments_info"])
        things = [label for label in labels if label != 2 or tasks == ("instance",)]
        assert things.count(0) == 2 and things.count(1) == 1
        assert things == sorted(confident.pred_classes.tolist())
    if "panoptic" in tasks:
        found = processor.post_process_panoptic_segmentation(
            outputs, threshold=0.5, target_sizes=size, label_ids_to_fuse={2}
        )[0]
        our_ids, our_segments = results["panoptic_seg"]
        assert sorted(s["label_id"] for s in found["segments_info"]) == LABELS
        assert sorted(s["category_id"] for s in our_segments) == LABELS
        label_of = {s["id"]: s["label_id"] for s in found["segments_info"]}
        our_label_of = {s["id"]: s["category_id"] for s in our_segments}
        theirs = torch.tensor(
            [label_of.get(i, -1) for i in found["segmentation"].flatten().tolist()]
        )
        mine = torch.tensor([our_label_of.get(i, -1) for i in our_ids.flatten().tolist()])
        assert agreement(theirs, mine) > 0.95

    # And back: the folder alone says what was trained.
    read, weights, metadata = load_transformers_folder(str(folder))
    again = build_model(read).eval()
    again.load_state_dict(weights)
    assert read.MODEL.MASK_FORMER.TEST == cfg.MODEL.MASK_FORMER.TEST
    back = ours(again)
    assert back.keys() == results.keys()
    names = ["box", "disc", "ground"]
    assert config.id2label == dict(enumerate(names))
    assert metadata.get("stuff_classes") == (None if tasks == ("instance",) else names)
    if "semantic" in tasks:
        torch.testing.assert_close(back["sem_seg"], results["sem_seg"], atol=1e-4, rtol=1e-4)
    if "instance" in tasks:
        torch.testing.assert_close(
            back["instances"].scores, results["instances"].scores, atol=1e-4, rtol=1e-4
        )
    if "panoptic" in tasks:
        assert agreement(back["panoptic_seg"][0], results["panoptic_seg"][0]) == 1
        predictor = Predictor.from_pretrained(str(folder), device="cpu")
        predicted = predictor.predict(scene()[0])
        assert agreement(predicted.panoptic.segment_ids, results["panoptic_seg"][0]) == 1
        assert predicted.class_names == ("box", "disc", "ground")


def test_resnet_with_trained_norms(tmp_path):
    """Statistics that training has moved become those of the package."""
    cfg = config("resnet", MODEL__RESNETS__NORM="BN")
    model = train(cfg, num_steps=3)
    save_transformers_folder(model.state_dict(), cfg, str(tmp_path / "model"))
    _, outputs, _ = predictions(tmp_path / "model")
    pixels = torch.from_numpy(scene()[0]).permute(2, 0, 1)[None]
    with torch.no_grad():
        ours = model.forward_network((pixels - model.pixel_mean) / model.pixel_std)
    for one, other in (
        (ours["pred_logits"], outputs.class_queries_logits),
        (ours["pred_masks"], outputs.masks_queries_logits),
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
