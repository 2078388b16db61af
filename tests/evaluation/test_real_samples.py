"""The evaluators on real annotations, skipped without the samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_util

from mask2former.data.datasets.register_custom import register_semantic
from mask2former.evaluation import SemanticPQ, build_evaluator

DATA = Path(__file__).parents[2].parent / "shared" / "data"
COCO = DATA / "evaluators" / "coco_ap"
CITYSCAPES = DATA / "cityscapes" / "gtFine"
ADE20K = DATA / "ade20k_sample"
THINGS = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]


def config(tmp_path, task):
    cfg = CfgNode({"OUTPUT_DIR": str(tmp_path / "output")})
    cfg.MODEL = CfgNode({"MASK_FORMER": {"TEST": {task: True}}})
    return cfg


@pytest.mark.skipif(not COCO.is_dir(), reason="needs the sample of the COCO API")
def test_sample_results_of_the_coco_api(tmp_path):
    """Model outputs built from the sample give the metrics of pycocotools."""
    gt = json.loads((COCO / "instances_val2014_100.json").read_text())
    results = json.loads((COCO / "instances_val2014_fakesegm100_results.json").read_text())
    category_ids = [category["id"] for category in gt["categories"]]
    MetadataCatalog.get("ev_coco").set(
        evaluator_type="coco",
        json_file=str(COCO / "instances_val2014_100.json"),
        thing_dataset_id_to_contiguous_id={k: i for i, k in enumerate(category_ids)},
    )
    evaluator = build_evaluator(config(tmp_path, "INSTANCE_ON"), "ev_coco")
    evaluator.reset()
    for image in gt["images"]:
        pred = [r for r in results if r["image_id"] == image["id"]]
        instances = Instances((image["height"], image["width"]))
        masks = [mask_util.decode(r["segmentation"]) for r in pred]
        empty = np.zeros((0, image["height"], image["width"]))
        instances.pred_masks = torch.from_numpy(np.stack(masks) if masks else empty)
        instances.pred_boxes = Boxes(torch.zeros(len(pred), 4))
        instances.scores = torch.tensor([r["score"] for r in pred], dtype=torch.float64)
        classes = [category_ids.index(r["category_id"]) for r in pred]
        instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    metrics = evaluator.evaluate()["segm"]
    figures = """
        AP .319545 AP50 .562288 AP75 .298927 APs .387374 APm .310183 APl .326934
        AR1 .268230 AR10 .415449 AR100 .416839 ARs .469450 ARm .376759 ARl .381472
    """.split()
    for name, figure in zip(figures[::2], figures[1::2], strict=True):
        assert f"{metrics[name] / 100:.6f}" == f"0{figure}", name
    MetadataCatalog.remove("ev_coco")


@pytest.mark.skipif(not CITYSCAPES.is_dir(), reason="needs the sample of Cityscapes")
@pytest.mark.parametrize("evaluator_type", ["cityscapes_sem_seg", "cityscapes_instance"])
def test_cityscapes_gt_scores_100(tmp_path, evaluator_type):
    pytest.importorskip("cityscapesscripts", reason="the optional package is not installed")
    from cityscapesscripts.helpers.labels import id2label, trainId2label

    file = sorted(CITYSCAPES.glob("val/*/*_gtFine_instanceIds.png"))[0]
    gt_dir = tmp_path / "real" / "city"
    gt_dir.mkdir(parents=True)
    for kind in ("instanceIds", "labelIds"):
        name = file.name.replace("instanceIds", kind)
        (gt_dir / name).symlink_to(file.with_name(name))
    instance_ids = np.array(Image.open(file))
    labels = np.array(Image.open(gt_dir / name))
    if evaluator_type == "cityscapes_sem_seg":
        task = "SEMANTIC_ON"
        label_ids = np.array([trainId2label[k].id for k in range(19)], dtype=np.uint8)
        output = {"sem_seg": torch.from_numpy(labels == label_ids[:, None, None]).byte()}
    else:
        task = "INSTANCE_ON"
        ids = np.unique(instance_ids[instance_ids >= 1000])
        ids = [i for i in ids if not id2label[i // 1000].ignoreInEval]
        instances = Instances(instance_ids.shape)
        instances.pred_masks = torch.from_numpy(np.stack([instance_ids == i for i in ids]))
        instances.scores = torch.ones(len(ids))
        classes = [THINGS.index(id2label[i // 1000].name) for i in ids]
        instances.pred_classes = torch.tensor(classes)
        output = {"instances": instances}
    metadata = {"gt_dir": str(gt_dir.parent), "thing_classes": THINGS}
    MetadataCatalog.get("real_city").set(evaluator_type=evaluator_type, **metadata)
    evaluator = build_evaluator(config(tmp_path, task), "real_city")
    MetadataCatalog.remove("real_city")
    evaluator.reset()
    image = file.name.replace("gtFine_instanceIds", "leftImg8bit")
    evaluator.process([{"file_name": image}], [output])
    metrics = next(iter(evaluator.evaluate().values()))
    known = {name: value for name, value in metrics.items() if not np.isnan(value)}
    assert len(known) > 3
    assert known == pytest.approx(dict.fromkeys(known, 100.0))


@pytest.mark.skipif(not ADE20K.is_dir(), reason="needs the sample of ADE20K")
def test_ade20k(tmp_path):
    """mIoU and PQ of the ground truth, and of the ground truth moved by 25 pixels."""
    # 0 is other, 1 to 150 are the classes.
    for file in (ADE20K / "annotations").glob("*.png"):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        labels = np.array(Image.open(file)) - np.uint8(1)
        Image.fromarray(labels).save(tmp_path / "annotations" / file.name)
    classes = [str(i) for i in range(150)]
    register_semantic("real_ade", str(ADE20K / "images"), str(tmp_path / "annotations"), classes)
    evaluator = build_evaluator(config(tmp_path, "SEMANTIC_ON"), "real_ade")
    for shift in (0, 25):
        evaluator.reset()
        quality = SemanticPQ(classes, 255)
        for record in DatasetCatalog.get("real_ade"):
            gt = np.array(Image.open(record["sem_seg_file_name"]))
            pred = np.roll(gt, shift, axis=1).astype(int)
            # The model cannot predict "other".
            pred[pred == 255] = 149
            scores = torch.from_numpy(pred == np.arange(150)[:, None, None]).byte()
            evaluator.process([record], [{"sem_seg": scores}])
            quality.add(gt, pred)
        metrics, segment_metrics = evaluator.evaluate()["sem_seg"], quality.results()
        assert metrics["mIoU"] == pytest.approx(segment_metrics["mIoU"], rel=1e-12)
        if shift == 0:
            assert metrics["mIoU"] == segment_metrics["PQ"] == 100
        else:
            assert 0 < segment_metrics["PQ"] < metrics["mIoU"] < 100
    DatasetCatalog.remove("real_ade")
    MetadataCatalog.remove("real_ade")
