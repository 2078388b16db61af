"""Encoded masks are identical to those of Detectron2 and pycocotools."""

import numpy as np
import pytest
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_util

from mask2former.evaluation.mask_encoding import EncodesMasks, encode_masks


def reference(masks):
    encoded = [mask_util.encode(np.array(m, order="F", dtype=np.uint8)) for m in masks.numpy()]
    return [rle | {"counts": rle["counts"].decode()} for rle in encoded]


def random_masks(seed, number=6):
    """Noise of random density, block size and image size."""
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 90, size=2)
    masks = np.zeros((number, height, width), dtype=np.uint8)
    for mask in masks:
        noise = (random.random((height, width)) < random.random() ** 2).astype(np.uint8)
        block = np.ones(random.integers(1, 12, size=2), dtype=np.uint8)
        mask[:] = np.kron(noise, block)[:height, :width]
    return torch.from_numpy(masks)


@pytest.mark.parametrize("seed", range(40))
def test_random_masks(seed):
    masks = random_masks(seed)
    assert encode_masks(masks) == reference(masks)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float64, torch.float32, torch.float16]
)
def test_dtypes(dtype):
    masks = random_masks(1).to(dtype)
    assert encode_masks(masks) == reference(masks)


def test_bfloat16():
    masks = random_masks(2)
    assert encode_masks(masks.bfloat16()) == reference(masks)


def test_values_below_one_are_background():
    masks = torch.tensor([[[0.999, 1.0], [0.5, 0.0]]])
    assert encode_masks(masks) == reference(masks) == reference(masks.floor())


def test_edges():
    masks = torch.zeros(4, 50, 70)
    masks[1] = 1
    masks[2, :, 10:12] = 1
    masks[3, -1, -1] = 1
    assert encode_masks(masks) == reference(masks)
    # Not contiguous.
    masks = masks.transpose(1, 2)[::2]
    assert encode_masks(masks) == reference(masks)
    assert encode_masks(torch.zeros(0, 5, 7)) == []


@pytest.mark.gpu
def test_masks_on_a_gpu():
    masks = random_masks(3)
    for dtype in (torch.float32, torch.bfloat16, torch.bool):
        assert encode_masks(masks.cuda().to(dtype)) == reference(masks)


class Evaluator(EncodesMasks, COCOEvaluator):
    """Needs no data set, since nothing is evaluated."""

    def __init__(self):
        self._cpu_device = torch.device("cpu")
        self.reset()


def instances(number):
    masks = random_masks(4, number)
    fields = {
        "pred_boxes": Boxes(torch.arange(4.0 * number).reshape(number, 4)),
        "scores": torch.linspace(0, 1, number),
        "pred_classes": torch.arange(number),
        "pred_masks": masks.float(),
    }
    return Instances(tuple(masks.shape[1:]), **fields)


def test_results_equal_detectron2():
    evaluator = Evaluator()
    for image_id, number in ((5, 3), (6, 0), (9, 2)):
        evaluator.process([{"image_id": image_id}], [{"instances": instances(number)}])
    assert evaluator._predictions == [
        {"image_id": 5, "instances": instances_to_coco_json(instances(3), 5)},
        {"image_id": 6, "instances": []},
        {"image_id": 9, "instances": instances_to_coco_json(instances(2), 9)},
    ]


def test_instances_without_masks_and_other_outputs():
    evaluator = Evaluator()
    boxes_alone = instances(2)
    boxes_alone.remove("pred_masks")
    proposals = Instances((3, 4), proposal_boxes=Boxes(torch.zeros(1, 4)))
    outputs = [{"instances": boxes_alone}, {"proposals": proposals}, {"sem_seg": None}]
    evaluator.process([{"image_id": i} for i in range(3)], outputs)
    boxes_result, proposals_result = evaluator._predictions
    assert boxes_result == {"image_id": 0, "instances": instances_to_coco_json(boxes_alone, 0)}
    assert len(proposals_result["proposals"]) == 1


def test_outputs_are_not_modified():
    evaluator, output = Evaluator(), {"instances": instances(2)}
    evaluator.process([{"image_id": 1}], [output])
    assert output["instances"].has("pred_masks")
