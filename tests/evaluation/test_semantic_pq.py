import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from load_script import load_script
from PIL import Image

from mask2former.data.datasets.register_custom import register_semantic
from mask2former.evaluation import SemanticPQ, build_evaluator

CLASSES = ["road", "tree", "sky"]
NAME = "pq_tool_val"


tool = load_script("tools/evaluate_pq_for_semantic_segmentation.py")


def columns(*labels, height=2):
    """A label map of 10 columns; given as (label, number of columns), ..."""
    return np.repeat([label for label, _ in labels], [n for _, n in labels])[None].repeat(height, 0)


def test_quality_by_hand():
    quality = SemanticPQ(CLASSES, 255)
    # Road: 4 of 6 columns, IoU 4/6. Sky: 4 shared, 4 + 6 - 4 in all, IoU 4/6. No tree anywhere.
    quality.add(columns((0, 6), (2, 4)), columns((0, 4), (2, 6)))
    # Sky matches. Road does not, at IoU 1/2: a false negative and a false positive.
    quality.add(columns((0, 4), (255, 4), (2, 2)), columns((0, 2), (1, 6), (2, 2)))
    results = quality.results()
    # Tree has 6 columns, 4 of them void: more than half, so no false positive.
    assert math.isnan(results["PQ-tree"])
    road = (4 / 6) / (1 + 0.5 * 2)
    sky = (4 / 6 + 1) / 2
    assert results["PQ-road"] == pytest.approx(100 * road)
    assert results["PQ-sky"] == pytest.approx(100 * sky)
    assert results["PQ"] == pytest.approx(100 * (road + sky) / 2)
    assert results["SQ"] == pytest.approx(100 * (4 / 6 + sky) / 2)
    assert results["RQ"] == pytest.approx(100 * (0.5 + 1) / 2)
    # Pixels: road 6 of 4 + 6, sky 6 of 6 + 2, and there is no tree in the ground truth.
    assert results["mIoU"] == pytest.approx(100 * (6 / 10 + 6 / 8) / 2)


def test_order_of_images():
    """Sums are exact, so any order of the images gives the same bits."""
    random = np.random.default_rng(0)
    images = [
        (columns((0, 90 + n)), columns((0, 60 + n), (1, 30))) for n in random.integers(99, size=40)
    ]
    results = []
    for order in (images, images[::-1], sorted(images, key=lambda image: image[0].size)):
        quality = SemanticPQ(CLASSES, 255)
        for gt, prediction in order:
            quality.add(gt, prediction)
        results.append(quality.results()["PQ-road"])
    assert results[0] == results[1] == results[2]


def test_void_is_ignored():
    quality = SemanticPQ(CLASSES, 255)
    quality.add(columns((0, 5), (255, 5)), columns((0, 10)))
    assert quality.results()["PQ"] == 100
    # Exactly half of the tree is void, not more than half: a false positive.
    quality.add(columns((0, 5), (255, 5)), columns((0, 4), (1, 2), (0, 4)))
    assert quality.results()["PQ-tree"] == 0


def test_unpredicted_pixels():
    quality = SemanticPQ(CLASSES, 255)
    quality.add(columns((0, 10)), columns((0, 6), (-1, 4)))
    assert quality.results()["PQ"] == pytest.approx(60)
    quality = SemanticPQ(CLASSES, 255)
    quality.add(columns((0, 10)), columns((-1, 10)))
    assert quality.results()["PQ"] == 0
    assert math.isnan(SemanticPQ(CLASSES, 255).results()["PQ"])


def test_size_mismatch():
    with pytest.raises(ValueError, match=r"shape \(2, 10\), the ground truth has \(3, 10\)"):
        SemanticPQ(CLASSES, 255).add(columns((0, 10), height=3), columns((0, 10)))


@pytest.fixture
def predictions(tmp_path):
    """Register two images; return the results file of perfect predictions."""
    gt = {"a": columns((0, 6), (2, 4)), "b": columns((0, 4), (255, 4), (2, 2))}
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name, labels in gt.items():
        Image.new("RGB", (10, 2)).save(tmp_path / "images" / f"{name}.jpg")
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "labels" / f"{name}.png")
    register_semantic(NAME, str(tmp_path / "images"), str(tmp_path / "labels"), CLASSES)
    cfg = CfgNode({"OUTPUT_DIR": str(tmp_path)})
    cfg.MODEL = CfgNode({"MASK_FORMER": {"TEST": {"SEMANTIC_ON": True}}})
    evaluator = build_evaluator(cfg, NAME)
    evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        labels = torch.from_numpy(gt[Path(record["file_name"]).stem]).clamp(max=2)
        scores = torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1)
        evaluator.process([record], [{"sem_seg": scores}])
    evaluator.evaluate()
    yield tmp_path / "inference" / "sem_seg_predictions.json"
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def test_tool(predictions, tmp_path, capsys):
    options = ["--dataset-name", NAME, "--json-file", str(predictions)]
    tool.main([*options, "--output-dir", str(tmp_path / "out")])
    assert "semantic_pq | PQ" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "semantic_pq.json").read_text())[NAME]["semantic_pq"]
    assert written["PQ"] == written["mIoU"] == 100


def test_tool_with_dataset_ids(predictions):
    MetadataCatalog.get(NAME).stuff_dataset_id_to_contiguous_id = {3: 0, 5: 1, 9: 2}
    masks = json.loads(predictions.read_text())
    for mask in masks:
        mask["category_id"] = [3, 5, 9][mask["category_id"]]
    predictions.write_text(json.dumps(masks))
    assert tool.evaluate(NAME, str(predictions))["PQ"] == 100
    masks[0]["category_id"] = 4
    predictions.write_text(json.dumps(masks))
    with pytest.raises(ValueError, match=r"\$\[0\]\.category_id: category_id 4 is not one"):
        tool.evaluate(NAME, str(predictions))


def test_tool_with_bad_input(predictions):
    for name, message in (("nothing_val", "'nothing_val' is not registered"), (NAME, "absent")):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            tool.main(["--dataset-name", name, "--json-file", "absent.json"])
    masks = json.loads(predictions.read_text())
    predictions.write_text(json.dumps([m for m in masks if "a.jpg" in m["file_name"]]))
    with pytest.raises(ValueError, match="no prediction for 1 of 2 images of .*, the first is b"):
        tool.evaluate(NAME, str(predictions))
    predictions.write_text(json.dumps([{"image_id": 1}]))
    with pytest.raises(ValueError, match=r"\$\[0\]: a mask has no 'file_name' .* must have file_n"):
        tool.evaluate(NAME, str(predictions))
    predictions.write_text("{}")
    with pytest.raises(ValueError, match="is not a sem_seg_predictions.json"):
        tool.evaluate(NAME, str(predictions))
