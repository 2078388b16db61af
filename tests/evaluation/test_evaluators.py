"""Official metrics on a data set of three images with results worked out by hand.

Contiguous classes: 0 wall (stuff), 1 cat (thing), 2 sky (stuff), 3 dog (thing, no ground truth).
Thing ids are neither 0 to n - 1 nor dense, as in panoptic data sets. Images are 40 × 60.

    image 1   cat in the left third, sky elsewhere
    image 2   cat in the top half except for a crowd of cats in the corner, wall below, some void
    image 3   sky only
"""

import copy
import json
import math
import sys

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes, Instances
from panopticapi.utils import id2rgb
from PIL import Image
from pycocotools import mask as mask_util

from mask2former.evaluation import InstanceSegEvaluator, PanopticEvaluator, build_evaluator
from mask2former.evaluation.semantic_evaluation import SemanticEvaluator, load_label_map
from mask2former.modeling.postprocessing import boxes_of

DATASET_IDS = [10, 20, 30, 40]
NAMES = ["wall", "cat", "sky", "dog"]
IS_THING = [False, True, False, True]
HEIGHT, WIDTH = 40, 60
VOID = -1


def _segments():
    """Segments per image: (class, is crowd, mask)."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    left, top = columns < 20, rows < 20
    corner, void = top & (columns >= 50), (rows >= 30) & (columns < 10)
    everywhere = np.ones_like(left)
    return {
        1: [(1, 0, left), (2, 0, ~left)],
        2: [(1, 0, top & ~corner), (1, 1, corner), (0, 0, ~top & ~void)],
        3: [(2, 0, everywhere)],
    }


SEGMENTS = _segments()


def _semantic_gt(image_id):
    labels = np.full((HEIGHT, WIDTH), 255)
    for class_id, _, mask in SEGMENTS[image_id]:
        labels[mask] = class_id
    return labels


@pytest.fixture
def dataset(tmp_path):
    """Write the data set and register it under four names."""
    panoptic, annotations, records = [], [], []
    categories = [
        {"id": DATASET_IDS[c], "name": NAMES[c], "isthing": int(IS_THING[c])} for c in range(4)
    ]
    for image_id, segments in SEGMENTS.items():
        ids = np.zeros((HEIGHT, WIDTH), dtype=int)
        infos = []
        for number, (class_id, iscrowd, mask) in enumerate(segments, start=1):
            # Ids above 255 need more than one PNG channel.
            segment_id = 300 * number
            ids[mask] = segment_id
            info = {
                "id": segment_id,
                "category_id": DATASET_IDS[class_id],
                "iscrowd": iscrowd,
                "area": int(mask.sum()),
            }
            infos.append(info)
            if IS_THING[class_id]:
                rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
                rle["counts"] = rle["counts"].decode()
                annotations.append(
                    info
                    | {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "segmentation": rle,
                        "bbox": mask_util.toBbox(rle).tolist(),
                    }
                )
        Image.fromarray(id2rgb(ids)).save(tmp_path / f"{image_id}.png")
        semantic = tmp_path / f"semantic_{image_id}.png"
        Image.fromarray(_semantic_gt(image_id).astype(np.uint8)).save(semantic)
        panoptic.append(
            {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": infos}
        )
        records.append(
            {
                "file_name": f"images/{image_id}.jpg",
                "image_id": image_id,
                "pan_seg_file_name": str(tmp_path / f"{image_id}.png"),
                "sem_seg_file_name": str(semantic),
                "segments_info": [
                    info | {"category_id": DATASET_IDS.index(info["category_id"])} for info in infos
                ],
            }
        )

    def write(name, **content):
        path = tmp_path / name
        path.write_text(json.dumps(content))
        return str(path)

    images = [{"id": i, "height": HEIGHT, "width": WIDTH} for i in SEGMENTS]
    instances_json = write(
        "instances.json",
        info={},
        images=images,
        annotations=annotations,
        categories=[c for c in categories if c["isthing"]],
    )
    panoptic_json = write(
        "panoptic.json", images=images, annotations=panoptic, categories=categories
    )
    things = {DATASET_IDS[c]: c for c in range(4) if IS_THING[c]}
    stuff = {DATASET_IDS[c]: c for c in range(4) if not IS_THING[c]}
    metadata = {
        "json_file": instances_json,
        "panoptic_json": panoptic_json,
        "panoptic_root": str(tmp_path),
        # Like Detectron2's standard COCO panoptic data sets: both name all classes.
        "thing_classes": NAMES,
        "stuff_classes": NAMES,
        "thing_dataset_id_to_contiguous_id": things,
        "stuff_dataset_id_to_contiguous_id": stuff,
        "ignore_label": 255,
    }
    no_semantic = [{k: v for k, v in r.items() if k != "sem_seg_file_name"} for r in records]
    everything = {"stuff_dataset_id_to_contiguous_id": stuff | things}
    types = {
        "ev_panoptic": ("coco_panoptic_seg", no_semantic, {}),
        "ev_panoptic_semantic": ("coco_panoptic_seg", records, everything),
        "ev_instances": ("coco", records, {}),
        "ev_semantic": ("sem_seg", records, everything),
    }
    for name, (evaluator_type, data, extra) in types.items():
        DatasetCatalog.register(name, lambda data=data: data)
        MetadataCatalog.get(name).set(evaluator_type=evaluator_type, **(metadata | extra))
    yield records
    for name in [n for n in DatasetCatalog.list() if n.startswith("ev_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def config(tmp_path, *tasks):
    cfg = CfgNode({"OUTPUT_DIR": str(tmp_path / "output"), "MODEL": {"MASK_FORMER": {}}})
    switches = {f"{t}_ON": t in tasks for t in ("PANOPTIC", "INSTANCE", "SEMANTIC")}
    cfg.MODEL.MASK_FORMER.TEST = CfgNode(switches)
    return cfg


def perfect_outputs(image_id):
    """Model outputs equal to the ground truth, without crowds."""
    segments = [(c, mask) for c, iscrowd, mask in SEGMENTS[image_id] if not iscrowd]
    return model_outputs(segments)


def model_outputs(segments, scores=None):
    """Model outputs for segments (class, mask)."""
    panoptic = torch.zeros(HEIGHT, WIDTH, dtype=torch.int32)
    semantic = torch.zeros(4, HEIGHT, WIDTH)
    infos = []
    for number, (class_id, mask) in enumerate(segments, start=1):
        panoptic[torch.from_numpy(mask)] = number
        semantic[class_id][torch.from_numpy(mask)] = 1
        infos.append({"id": number, "isthing": IS_THING[class_id], "category_id": class_id})
    things = [(c, mask) for c, mask in segments if IS_THING[c]]
    instances = Instances((HEIGHT, WIDTH))
    masks = np.stack([m for _, m in things]) if things else np.zeros((0, HEIGHT, WIDTH))
    instances.pred_masks = torch.from_numpy(masks).float()
    instances.pred_boxes = Boxes(torch.zeros(len(things), 4))
    instances.scores = torch.tensor(scores or [0.9] * len(things))
    instances.pred_classes = torch.tensor([c for c, _ in things], dtype=torch.int64)
    return {"panoptic_seg": (panoptic, infos), "instances": instances, "sem_seg": semantic}


def change_metadata(name, **changes):
    metadata = MetadataCatalog.pop(name).as_dict() | changes
    metadata.pop("name")
    MetadataCatalog.get(name).set(**metadata)


def evaluate(evaluator, records, outputs):
    """Run an evaluator over outputs by image id, as Detectron2 does."""
    evaluator.reset()
    for record in records:
        evaluator.process([record], [outputs[record["image_id"]]])
    return evaluator.evaluate()


@pytest.mark.parametrize("name", ["ev_panoptic", "ev_panoptic_semantic"])
def test_gt_scores_100(dataset, tmp_path, name):
    evaluator = build_evaluator(config(tmp_path, "PANOPTIC", "INSTANCE", "SEMANTIC"), name)
    outputs = {i: perfect_outputs(i) for i in SEGMENTS}
    # The crowd is a cat in the semantic ground truth.
    outputs[2]["sem_seg"][1][torch.from_numpy(SEGMENTS[2][1][2])] = 1
    results = evaluate(evaluator, dataset, outputs)
    assert results["panoptic_seg"]["PQ"] == 100
    assert results["panoptic_seg"]["PQ_th"] == results["panoptic_seg"]["PQ_st"] == 100
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["segm"]["AP-cat"] == pytest.approx(100)
    assert math.isnan(results["segm"]["AP-dog"]), (
        "without ground truth: no AP, and not part of the mean"
    )
    assert results["sem_seg"]["mIoU"] == 100
    assert math.isnan(results["sem_seg"]["IoU-dog"])
    assert set(results) == {"panoptic_seg", "segm", "sem_seg"}, "no box AP"


def test_panoptic_quality_by_hand(dataset, tmp_path):
    outputs = {i: perfect_outputs(i) for i in SEGMENTS}
    left, right = SEGMENTS[1][0][2], SEGMENTS[1][1][2]
    # Image 1: the cat keeps 3/4 of its height, IoU 0.75; the sky is exact.
    partial = left & (np.arange(HEIGHT) < 30)[:, None]
    outputs[1] = model_outputs([(1, partial), (2, right)])
    # Image 2: no predictions, so one cat and one wall are missed.
    outputs[2] = model_outputs([])
    # Image 3: half of the sky is predicted as wall. The sky has IoU 0.5, which is no match: one
    # false negative and one false positive of sky, and a false positive of wall.
    half = SEGMENTS[2][2][2] | (np.arange(HEIGHT) >= 20)[:, None]
    outputs[3] = model_outputs([(2, ~half), (0, half)])
    evaluator = build_evaluator(config(tmp_path, "PANOPTIC"), "ev_panoptic")
    assert isinstance(evaluator, PanopticEvaluator)
    results = evaluate(evaluator, dataset, outputs)["panoptic_seg"]
    cat = 0.75 / (1 + 0.5 * 1)
    wall = 0.0
    sky = 1.0 / (1 + 0.5 * 1 + 0.5 * 1)
    assert results["PQ"] == pytest.approx(100 * (cat + wall + sky) / 3)
    assert results["PQ_th"] == pytest.approx(100 * cat)
    assert results["PQ_st"] == pytest.approx(100 * (wall + sky) / 2)
    assert results["SQ_th"] == pytest.approx(75)
    assert results["RQ_th"] == pytest.approx(100 * 1 / 1.5)


def test_panoptic_quality_without_things(dataset, tmp_path):
    """Only stuff, where the official code divides by zero."""
    path = tmp_path / "panoptic.json"
    gt = json.loads(path.read_text())
    gt["annotations"] = gt["annotations"][2:]
    path.write_text(json.dumps(gt))
    evaluator = build_evaluator(config(tmp_path, "PANOPTIC"), "ev_panoptic")
    results = evaluate(evaluator, dataset[2:], {3: perfect_outputs(3)})["panoptic_seg"]
    assert results["PQ"] == results["PQ_st"] == 100
    assert math.isnan(results["PQ_th"])


@pytest.mark.parametrize("name", ["ev_panoptic", "ev_panoptic_semantic"])
def test_panoptic_json_without_categories(dataset, tmp_path, name):
    """Categories come from the metadata; in one data set stuff lists all classes."""
    outputs = {i: perfect_outputs(i) for i in SEGMENTS} | {2: model_outputs([])}
    evaluator = build_evaluator(config(tmp_path, "PANOPTIC"), name)
    expected = evaluate(evaluator, dataset, copy.deepcopy(outputs))
    gt = json.loads((tmp_path / "panoptic.json").read_text())
    del gt["categories"]
    (tmp_path / "panoptic.json").write_text(json.dumps(gt))
    assert evaluate(evaluator, dataset, outputs) == expected
    assert expected["panoptic_seg"]["PQ_th"] != expected["panoptic_seg"]["PQ_st"]


@pytest.mark.parametrize("use_fast_impl", [True, False])
@pytest.mark.parametrize("area, pq", [(0, 100), (1, 100), (None, 100), (10**6, 0)])
def test_panoptic_areas(dataset, tmp_path, area, pq, use_fast_impl):
    """Too small ones give no PQ above 100; larger ones count, as those of occluded segments."""
    path = tmp_path / "panoptic.json"
    gt = json.loads(path.read_text())
    for annotation in gt["annotations"]:
        for segment in annotation["segments_info"]:
            segment["area"] = area
            if not segment["iscrowd"]:
                del segment["iscrowd"]
    path.write_text(json.dumps(gt))
    evaluator = PanopticEvaluator("ev_panoptic", use_fast_impl=use_fast_impl)
    results = evaluate(evaluator, dataset, {i: perfect_outputs(i) for i in SEGMENTS})
    assert results["panoptic_seg"]["PQ"] == pq


def test_panoptic_image_without_prediction(dataset, tmp_path):
    evaluator = build_evaluator(config(tmp_path, "PANOPTIC"), "ev_panoptic")
    with pytest.raises(ValueError, match=r"2 images of .*panoptic.json have no .* 1.png"):
        evaluate(evaluator, dataset[2:], {3: perfect_outputs(3)})


def test_average_precision_by_hand(dataset, tmp_path):
    """One of two cats matches, at IoU 0.75; a predicted dog without ground truth has no effect."""
    left = SEGMENTS[1][0][2]
    partial = left & (np.arange(HEIGHT) < 30)[:, None]
    outputs = {
        1: model_outputs([(1, partial), (3, left)], scores=[0.5, 0.9]),
        2: model_outputs([]),
        3: model_outputs([]),
    }
    evaluator = build_evaluator(config(tmp_path, "INSTANCE"), "ev_instances")
    assert isinstance(evaluator, InstanceSegEvaluator)
    results = evaluate(evaluator, dataset, outputs)["segm"]
    # Precision 1 up to recall 1/2: 51 of the 101 recall points. At 6 of the 10 IoU thresholds.
    assert results["AP50"] == pytest.approx(100 * 51 / 101)
    assert results["AP75"] == pytest.approx(100 * 51 / 101)
    assert results["AP"] == pytest.approx(100 * 51 / 101 * 0.6)
    assert results["AP-cat"] == pytest.approx(results["AP"])


@pytest.mark.parametrize("tasks", [("segm",), ("bbox", "segm"), None])
@pytest.mark.parametrize("use_fast_impl", [True, False])
def test_instance_tasks_and_limits(dataset, tmp_path, tasks, use_fast_impl):
    """Detectron2's arguments. Of thirteen detections, the last one is correct."""
    left = SEGMENTS[1][0][2]
    outputs = {i: model_outputs([]) for i in SEGMENTS}
    scores = [0.9] * 12 + [0.5]
    outputs[1] = model_outputs([(1, ~left)] * 12 + [(1, left)], scores=scores)
    arguments = ("ev_instances", tasks, False, str(tmp_path / "instances"))

    def evaluated(**limit):
        evaluator = InstanceSegEvaluator(*arguments, use_fast_impl=use_fast_impl, **limit)
        results = evaluate(evaluator, dataset, outputs)
        assert set(results) == set(tasks or ("bbox", "segm"))
        return results["segm"]

    limited, results = evaluated(max_dets_per_image=12), evaluated()
    assert limited["AP"] == limited["AR12"] == results["AR10"] == 0
    assert results["AR100"] == pytest.approx(50)
    # Precision 1/13 up to recall 1/2: 51 of the 101 recall points.
    assert results["AP"] == pytest.approx(100 * 51 / 101 / 13)


def test_boxes_made_from_masks(dataset, tmp_path):
    """TEST.BOXES lets Detectron2's box AP be computed; boxes of zeros have none."""
    outputs = {i: perfect_outputs(i) for i in SEGMENTS}
    for expected in (0, 100):
        evaluator = InstanceSegEvaluator("ev_instances", ("bbox", "segm"), False, str(tmp_path))
        results = evaluate(evaluator, dataset, outputs)
        assert results["segm"]["AP"] == pytest.approx(100)
        assert results["bbox"]["AP"] == pytest.approx(expected)
        for output in outputs.values():
            masks = output["instances"].pred_masks > 0
            output["instances"].pred_boxes = boxes_of(masks.any(2), masks.any(1))


def test_crowds_are_ignored(dataset, tmp_path):
    outputs = {i: perfect_outputs(i) for i in SEGMENTS}
    cat, crowd = SEGMENTS[2][0][2], SEGMENTS[2][1][2]
    outputs[2] = model_outputs([(1, crowd), (1, cat)], scores=[0.99, 0.9])
    evaluator = build_evaluator(config(tmp_path, "INSTANCE"), "ev_instances")
    assert evaluate(evaluator, dataset, outputs)["segm"]["AP"] == pytest.approx(100)


def test_no_instance_predicted_anywhere(dataset, tmp_path):
    evaluator = build_evaluator(config(tmp_path, "INSTANCE"), "ev_instances")
    results = evaluate(evaluator, dataset, {i: model_outputs([]) for i in SEGMENTS})
    assert math.isnan(results["segm"]["AP"])


def test_stuff_class_of_instance(dataset, tmp_path):
    outputs = {i: perfect_outputs(i) for i in SEGMENTS}
    outputs[1]["instances"].pred_classes[:] = 2
    evaluator = build_evaluator(config(tmp_path, "INSTANCE"), "ev_panoptic")
    with pytest.raises(ValueError, match="Class 2 .* is not a thing class of data set ev_panoptic"):
        evaluate(evaluator, dataset, outputs)


def test_mean_iou_by_hand(dataset, tmp_path):
    outputs = {i: perfect_outputs(i) for i in SEGMENTS}
    # Image 2 (100 void pixels) is all wall. Ground truth: 1200 cat with the crowd, 1100 wall.
    everything = np.ones((HEIGHT, WIDTH), dtype=bool)
    outputs[2] = model_outputs([(0, everything)])
    # Image 1 is all dog, which is always wrong: 800 cat and 1600 sky pixels are missed.
    outputs[1] = model_outputs([(3, everything)])
    evaluator = build_evaluator(config(tmp_path, "SEMANTIC"), "ev_semantic")
    assert isinstance(evaluator, SemanticEvaluator)
    results = evaluate(evaluator, dataset, outputs)["sem_seg"]
    wall = 1100 / (1100 + 1200)
    cat = 0.0
    sky = 2400 / (2400 + 1600)
    assert results["IoU-wall"] == pytest.approx(100 * wall)
    assert results["mIoU"] == pytest.approx(100 * (wall + cat + sky) / 3)
    correct, total = 1100 + 2400, 2400 + 2300 + 2400
    assert results["pACC"] == pytest.approx(100 * correct / total)


def test_choice_of_evaluators(dataset, tmp_path, caplog):
    def chosen(name, *tasks):
        evaluator = build_evaluator(config(tmp_path, *tasks), name)
        if isinstance(evaluator, DatasetEvaluators):
            return [type(e) for e in evaluator._evaluators]
        return [type(evaluator)]

    everything = ("PANOPTIC", "INSTANCE", "SEMANTIC")
    assert chosen("ev_panoptic", *everything) == [
        PanopticEvaluator,
        InstanceSegEvaluator,
        SemanticEvaluator,
    ]
    assert chosen("ev_panoptic", "SEMANTIC", "INSTANCE") == [
        InstanceSegEvaluator,
        SemanticEvaluator,
    ]
    assert chosen("ev_instances", *everything) == [InstanceSegEvaluator]
    assert chosen("ev_semantic", *everything) == [SemanticEvaluator]

    change_metadata("ev_panoptic", json_file=None)
    assert chosen("ev_panoptic", "PANOPTIC", "INSTANCE") == [PanopticEvaluator]
    assert "Instances are not evaluated on ev_panoptic" in caplog.text


@pytest.mark.parametrize("evaluator_type", ["ade20k_panoptic_seg", "mapillary_vistas_panoptic_seg"])
def test_evaluators_of_other_panoptic_sets(dataset, tmp_path, evaluator_type):
    change_metadata("ev_panoptic_semantic", evaluator_type=evaluator_type)
    cfg = config(tmp_path, "PANOPTIC", "INSTANCE", "SEMANTIC")
    evaluators = build_evaluator(cfg, "ev_panoptic_semantic")._evaluators
    assert [type(e) for e in evaluators] == [
        PanopticEvaluator,
        InstanceSegEvaluator,
        SemanticEvaluator,
    ]


@pytest.mark.parametrize(
    ("evaluator_type", "task", "module"),
    [
        ("cityscapes_sem_seg", "SEMANTIC", "cityscapesscripts.evaluation.evalPixelLevel"),
        ("cityscapes_instance", "INSTANCE", "cityscapesscripts.evaluation.evalInstanceLevel"),
        ("lvis", "INSTANCE", "lvis.eval"),
    ],
)
def test_missing_official_package(dataset, tmp_path, monkeypatch, evaluator_type, task, module):
    suffix = "SemanticLabeling" if "cityscapes" in module else ""
    monkeypatch.setitem(sys.modules, module + suffix, None)
    change_metadata("ev_instances", evaluator_type=evaluator_type)
    package = module.partition(".")[0]
    with pytest.raises(ImportError, match=f"ev_instances uses .*pip install --no-deps {package}"):
        build_evaluator(config(tmp_path, task), "ev_instances")


def test_nothing_to_evaluate(dataset, tmp_path):
    with pytest.raises(ValueError, match="Nothing to evaluate on 'ev_semantic'.*SEMANTIC_ON"):
        build_evaluator(config(tmp_path, "PANOPTIC"), "ev_semantic")
    MetadataCatalog.get("ev_voc").evaluator_type = "pascal_voc"
    with pytest.raises(ValueError, match="'ev_voc' has evaluator_type 'pascal_voc'"):
        build_evaluator(config(tmp_path, "INSTANCE"), "ev_voc")
    MetadataCatalog.remove("ev_voc")


def test_semantic_classes_differ_from_panoptic_ones(dataset, tmp_path):
    change_metadata("ev_panoptic", stuff_classes=["wall", "sky"])
    with pytest.raises(ValueError, match=r"evaluated on ev_panoptic.*2 names.*\[0, 1, 2, 3\]"):
        build_evaluator(config(tmp_path, "SEMANTIC"), "ev_panoptic")


def test_labels_outside_the_classes(dataset, tmp_path):
    labels = _semantic_gt(3).astype(np.uint8)
    labels[0, 0] = 7
    Image.fromarray(labels).save(tmp_path / "semantic_3.png")
    evaluator = build_evaluator(config(tmp_path, "SEMANTIC"), "ev_semantic")
    outputs = {i: perfect_outputs(i) for i in SEGMENTS}
    with pytest.raises(
        ValueError, match=r"semantic_3.png has labels \[7\].* 0 to 3 and the ignore label 255"
    ):
        evaluate(evaluator, dataset, outputs)
    floats = _semantic_gt(3).astype(np.float32)
    floats[0, 0] = np.nan
    Image.fromarray(floats).save(tmp_path / "semantic_3.png", format="TIFF")
    with pytest.raises(ValueError, match=r"semantic_3.png has labels .* not whole numbers: nan;"):
        evaluate(evaluator, dataset, outputs)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "semantic_3.png")
    with pytest.raises(ValueError, match=r"semantic_3.png has shape \(40, 60, 3\)"):
        evaluate(evaluator, dataset, outputs)


def test_ignore_label_of_the_dataset(dataset, tmp_path):
    """As in ADE20K with 847 classes: 16-bit labels with ignore label 65535."""
    for image_id in SEGMENTS:
        labels = _semantic_gt(image_id)
        labels[labels == 255] = 65535
        path = tmp_path / f"semantic_{image_id}.tif"
        Image.fromarray(labels.astype(np.uint16)).save(path)
        dataset[image_id - 1]["sem_seg_file_name"] = str(path)
    change_metadata("ev_semantic", ignore_label=65535)
    evaluator = build_evaluator(config(tmp_path, "SEMANTIC"), "ev_semantic")
    outputs = {i: perfect_outputs(i) for i in SEGMENTS}
    outputs[2]["sem_seg"][1][torch.from_numpy(SEGMENTS[2][1][2])] = 1
    assert evaluate(evaluator, dataset, outputs)["sem_seg"]["mIoU"] == 100


def test_label_maps_keep_their_values(tmp_path):
    labels = np.array([[0, 1], [300, 65535]], dtype=np.uint16)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    loaded = load_label_map(str(tmp_path / "labels.png"), dtype=int)
    assert loaded.dtype == int
    assert loaded.tolist() == labels.tolist()
