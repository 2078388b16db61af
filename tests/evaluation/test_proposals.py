import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from load_script import load_script
from PIL import Image
from pycocotools import mask as mask_util

from mask2former.config import load_config
from mask2former.data.datasets.register_custom import register_instances
from mask2former.evaluation import LayerProposals, ProposalEvaluator, layer_proposals

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/shapes/instance-segmentation/maskformer2_R18_quickstart.yaml"
SMALL = """
    MODEL.DEVICE cpu MODEL.RESNETS.NORM FrozenBN MODEL.SEM_SEG_HEAD.CONVS_DIM 32
    MODEL.SEM_SEG_HEAD.MASK_DIM 32 MODEL.MASK_FORMER.HIDDEN_DIM 32 MODEL.MASK_FORMER.NHEADS 4
    MODEL.MASK_FORMER.DIM_FEEDFORWARD 64 INPUT.MIN_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0
    DATASETS.TRAIN ('proposals_val',) DATASETS.TEST ('proposals_val',)
    MODEL.SEM_SEG_HEAD.NUM_CLASSES 2
""".split()


tool = load_script("tools/evaluate_proposals.py")


def rectangle(top, left, height, width):
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


# COCO calls objects below 32 x 32 pixels small.
OBJECTS = [(4, rectangle(0, 0, 40, 40)), (9, rectangle(44, 0, 20, 20))]


@pytest.fixture
def dataset(tmp_path):
    """One image with two objects of different classes."""
    Image.new("RGB", (64, 64), "green").save(tmp_path / "1.jpg")
    annotations = []
    for category_id, mask in OBJECTS:
        rle = mask_util.encode(np.asfortranarray(mask))
        box, area = mask_util.toBbox(rle).tolist(), int(mask_util.area(rle))
        rle["counts"] = rle["counts"].decode()
        annotation = {"id": len(annotations) + 1, "image_id": 1, "category_id": category_id}
        annotation |= {"segmentation": rle, "bbox": box, "area": area, "iscrowd": 0}
        annotations.append(annotation)
    content = {
        "info": {},
        "images": [{"id": 1, "file_name": "1.jpg", "height": 64, "width": 64}],
        "annotations": annotations,
        "categories": [{"id": 4, "name": "box"}, {"id": 9, "name": "tile"}],
    }
    (tmp_path / "gt.json").write_text(json.dumps(content))
    register_instances("proposals_val", str(tmp_path), str(tmp_path / "gt.json"))
    DatasetCatalog.get("proposals_val")
    yield "proposals_val"
    DatasetCatalog.remove("proposals_val")
    MetadataCatalog.remove("proposals_val")


def evaluate(evaluator, masks, scores):
    instances = Instances((64, 64))
    instances.pred_masks = torch.from_numpy(np.array(masks)).reshape(-1, 64, 64).float()
    instances.pred_boxes = Boxes(torch.zeros(len(masks), 4))
    instances.scores = torch.tensor(scores)
    instances.pred_classes = torch.zeros(len(masks), dtype=torch.int64)
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    return evaluator.evaluate()["proposals"]


def test_recall_by_hand(dataset):
    evaluator = ProposalEvaluator(dataset)
    exact = [mask for _, mask in OBJECTS]
    results = evaluate(evaluator, exact, [0.1, 0.2])
    assert results["AR@100"] == results["ARs@100"] == results["ARm@100"] == 100
    assert math.isnan(results["ARl@100"])
    # IoU 3/4 with the large object: a match at 6 of 10 thresholds. The small one is missed.
    results = evaluate(evaluator, [rectangle(0, 0, 40, 30)], [0.5])
    assert results["AR@100"] == pytest.approx(100 * 0.6 / 2)
    assert results["ARm@100"] == pytest.approx(60)
    assert results["ARs@100"] == 0
    assert evaluate(evaluator, [], [])["AR@100"] == 0


def test_number_of_proposals(dataset):
    evaluator = ProposalEvaluator(dataset, num_proposals=1)
    results = evaluate(evaluator, [mask for _, mask in OBJECTS], [0.1, 0.2])
    assert results["ARs@1"] == 100 and results["ARm@1"] == 0, (
        "the small object has the higher score"
    )
    assert results["AR@1"] == 50


def test_dataset_without_annotation_file(dataset):
    MetadataCatalog.get("no_instances").evaluator_type = "sem_seg"
    with pytest.raises(ValueError, match="on no_instances: its metadata has no COCO json_file"):
        ProposalEvaluator("no_instances")
    MetadataCatalog.remove("no_instances")


def test_layers_by_hand():
    # Class probabilities 0.2, 0.3 and 0.5 for no object.
    logits = torch.tensor([[[0.2, 0.3, 0.5]]]).log() + 7
    layers = [
        {"pred_logits": logits - i, "pred_masks": torch.full((1, 1, 2, 2), float(i))}
        for i in range(3)
    ]
    outputs = layers[2] | {"aux_outputs": layers[:2]}
    for layer in range(3):
        chosen = layer_proposals(outputs, layer)
        assert (chosen["pred_masks"] == layer).all()
        assert chosen["pred_logits"].softmax(-1).flatten().tolist() == pytest.approx([0.5, 0.5])
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"layer is {layer}, but the decoder predicts at 0 to"):
            layer_proposals(outputs, layer)


@torch.no_grad()
def test_proposals_of_a_model(tiny_cfg, make_input):
    test = tiny_cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON, test.SEMANTIC_ON = False, False
    tiny_cfg.TEST.DETECTIONS_PER_IMAGE = 100
    torch.manual_seed(0)
    model = build_model(tiny_cfg).eval()
    batch = [make_input(48, 64, []) | {"height": 96, "width": 128}]
    layers = [LayerProposals(model, layer)(batch)[0]["instances"] for layer in range(5)]
    assert not model.sem_seg_head._forward_hooks
    for instances in layers:
        assert instances.pred_masks.shape == (7, 96, 128), "one proposal per query"
        assert (instances.pred_classes == 0).all()
        assert (instances.scores >= 0).all() and (instances.scores <= 1).all()
    assert not torch.equal(layers[0].pred_masks, layers[-1].pred_masks)
    # The last layer has the same masks as the model's own instances.
    own = {mask.numpy().tobytes() for mask in model(batch)[0]["instances"].pred_masks}
    assert own == {mask.numpy().tobytes() for mask in layers[-1].pred_masks}


def test_tool(dataset, tmp_path, capsys, restore_loggers):
    cfg = load_config(str(CONFIG), SMALL)
    weights = tmp_path / "model.pth"
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    options = [*SMALL, "OUTPUT_DIR", str(tmp_path / "out"), "MODEL.WEIGHTS", str(weights)]
    command = ["--config-file", str(CONFIG), "--layer", "0,2", *options]
    results = tool.main(tool.parse_args(command))
    assert list(results["proposals_val"]) == ["layer 0", "layer 2"]
    assert list(results["proposals_val"]["layer 0"])[0] == "AR@100"
    written = json.loads((tmp_path / "out" / "proposals.json").read_text())
    for layer, metrics in results["proposals_val"].items():
        assert written["proposals_val"][layer]["AR@100"] == metrics["AR@100"]
    assert "| layer 2 | AR@100" in (tmp_path / "out" / "proposals.md").read_text()
    command[3] = "0,99"
    with pytest.raises(ValueError, match="layer is 99, but the decoder predicts at 0 to"):
        tool.main(tool.parse_args(command))


@pytest.mark.parametrize("option", [["--layer", "a"], ["--layer", "0", "--num-proposals", "0"]])
def test_bad_options(option, capsys):
    with pytest.raises(SystemExit):
        tool.parse_args(["--config-file", str(CONFIG), *option])
    assert option[-2] in capsys.readouterr().err
