"""Drawing functions."""

import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from mask2former.utils.visualization import (
    contact_sheet,
    draw_panoptic_gt,
    draw_prediction,
    magnify,
    make_visualizer,
)

GREY = np.full((40, 60, 3), 128, np.uint8)


@pytest.fixture
def metadata():
    return Metadata(
        name="drawn",
        thing_classes=["dot"],
        thing_colors=[[255, 0, 0]],
        stuff_classes=["dot", "sea"],
        stuff_colors=[[255, 0, 0], [0, 0, 255]],
    )


def changed(drawing: np.ndarray) -> np.ndarray:
    assert drawing.dtype == np.uint8
    return np.abs(drawing[..., :3].astype(int) - 128).max(-1) > 20


def test_semantic_colours(metadata):
    logits = torch.zeros(2, 40, 60)
    logits[1] = 1
    drawing = draw_prediction(GREY, {"sem_seg": logits}, metadata, "semantic", scale=2)
    assert drawing.shape == (80, 120, 3)
    red, green, blue = drawing[10, 10].tolist()
    assert blue > 200 and red < 60 and green < 60


def test_same_pixels_as_detectron2(metadata):
    generator = np.random.default_rng(0)
    masks = generator.random((3, 20, 30)).repeat(2, 1).repeat(2, 2) > 0.5  # parts reach the border
    drawings = []
    for make in (Visualizer, make_visualizer):
        visualizer = make(GREY, metadata, scale=2)
        colors = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
        boxes = np.array([[-5, -5, 20, 20], [30, 10, 70, 50], [0, 0, 60, 40]])
        labels = ["a", "b", "c"]
        visualizer.overlay_instances(
            masks=masks, boxes=boxes, labels=labels, assigned_colors=colors
        )
        drawings.append(visualizer.output.get_image())
    assert changed(drawings[0]).any()
    np.testing.assert_array_equal(*drawings)


def test_instances_below_the_threshold_are_not_drawn(metadata):
    image = np.full((100, 300, 3), 128, np.uint8)
    masks = torch.zeros(2, 100, 300)
    masks[0, 20:, :60] = 1
    masks[1, 20:, 240:] = 1
    instances = Instances((100, 300), scores=torch.tensor([0.9, 0.3]))
    instances.pred_classes, instances.pred_masks = torch.tensor([0, 0]), masks
    instances.pred_boxes = Boxes(torch.zeros(2, 4))  # as inference returns them
    outputs = {"instances": instances}
    drawn = changed(draw_prediction(image, outputs, metadata, "instance"))
    assert drawn[25:95, 2:58].mean() > 0.5 and not drawn[:, 150:].any()
    drawn = changed(
        draw_prediction(image, outputs, metadata, "instance", confidence_threshold=0.95)
    )
    assert not drawn.any()


def test_panoptic_gt_and_prediction(metadata, tmp_path):
    # Segment ids above 255 need all channels of the PNG.
    ids = np.zeros((40, 60), np.int64)
    ids[:, :30] = 70_000
    png = np.stack([ids & 255, (ids >> 8) & 255, ids >> 16], -1).astype(np.uint8)
    Image.fromarray(png).save(tmp_path / "pan.png")
    infos = [{"id": 70_000, "category_id": 1, "isthing": False}]
    record = {"pan_seg_file_name": str(tmp_path / "pan.png"), "segments_info": infos}
    gt = draw_panoptic_gt(GREY, record, metadata)
    assert changed(gt)[2:10, 2:10].all() and not changed(gt)[:, 40:].any()
    outputs = {"panoptic_seg": (torch.as_tensor(ids), infos)}
    np.testing.assert_array_equal(draw_prediction(GREY, outputs, metadata, "panoptic"), gt)


def test_panoptic_thing_ids_among_all_classes():
    """ADE20K lists 100 thing names, whose contiguous ids go up to 149."""
    metadata = Metadata(
        name="numbered",
        thing_classes=["dot"],
        stuff_classes=["sea", "dot"],
        stuff_colors=[[0, 0, 255], [255, 0, 0]],
        stuff_dataset_id_to_contiguous_id={0: 0, 1: 1},
        thing_dataset_id_to_contiguous_id={1: 1},
    )
    segments = torch.ones(40, 60, dtype=torch.int32)
    outputs = {"panoptic_seg": (segments, [{"id": 1, "isthing": True, "category_id": 1}])}
    assert changed(draw_prediction(GREY, outputs, metadata, "panoptic")).any()


def test_empty_gt_and_prediction(metadata, tmp_path):
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "pan.png")
    record = {"pan_seg_file_name": str(tmp_path / "pan.png"), "segments_info": []}
    assert not changed(draw_panoptic_gt(GREY, record, metadata)).any()
    empty = Instances((40, 60), scores=torch.zeros(0), pred_masks=torch.zeros(0, 40, 60))
    empty.pred_classes = torch.zeros(0, dtype=torch.long)
    assert not changed(draw_prediction(GREY, {"instances": empty}, metadata, "instance")).any()


@pytest.mark.parametrize("task", ["semantic", "depth"])
def test_missing_output(metadata, task):
    with pytest.raises(ValueError, match=f"no output for task '{task}'"):
        draw_prediction(GREY, {"instances": None}, metadata, task)


def test_contact_sheet(tmp_path):
    red, blue = np.zeros((10, 20, 3), np.uint8), np.zeros((30, 40, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    path = tmp_path / "sheet.png"
    contact_sheet([[red, blue], [blue, red]], path, margin=5)
    sheet = np.asarray(Image.open(path))
    # Two columns of 40 and two rows of 30 pixels, three margins of 5 each way.
    assert sheet.shape == (75, 95, 3)
    assert (sheet[5:15, 5:25] == [255, 0, 0]).all() and (sheet[15:35, 5:45] == 255).all()
    assert (sheet[40:70, 5:45] == [0, 0, 255]).all() and (sheet[40:50, 50:70] == [255, 0, 0]).all()
    contact_sheet([[red]], path, ["a title"], margin=5)
    assert np.asarray(Image.open(path)).shape == (20 + 24, 30, 3)


def test_contact_sheet_needs_a_table(tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"same number of images, not \[1, 2\]"):
        contact_sheet([[image], [image, image]], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="same number"):
        contact_sheet([], tmp_path / "sheet.png")
    with pytest.raises(ValueError, match="2 titles for 1 columns"):
        contact_sheet([[image]], tmp_path / "sheet.png", ["a", "b"])


def test_magnified_image_matches_drawings(metadata):
    image = np.zeros((41, 53, 3), np.uint8)
    logits = torch.ones(2, 41, 53)
    drawing = draw_prediction(image, {"sem_seg": logits}, metadata, "semantic", scale=2.5)
    assert magnify(image, 2.5).shape == drawing.shape
