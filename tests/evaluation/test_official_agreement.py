"""The evaluators agree with the official code called directly.

Ground truth and predictions are random (`random_scenes.py`). The input files of the official code
are written here, independently of the evaluators.
"""

import contextlib
import importlib
import io
import json
import os
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from evaluation import random_scenes as scenes
from panopticapi.evaluation import pq_compute
from panopticapi.utils import id2rgb
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mask2former.evaluation import (
    InstanceSegEvaluator,
    PanopticEvaluator,
    ProposalEvaluator,
    SemanticPQ,
)
from mask2former.evaluation.official_packages import numpy_with_old_names, replaced

for package in ("cityscapesscripts", "lvis"):
    pytest.importorskip(package, reason=f"the optional package {package} is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write_scenes(folder)
    scenes.register(folder)
    yield folder
    scenes.unregister()


@pytest.fixture(scope="module")
def results(folder):
    return scenes.evaluate(folder, folder / "output")


@pytest.fixture(scope="module")
def predictions(folder):
    return torch.load(folder / "predictions.pt")


@pytest.fixture(scope="module")
def coco_results(predictions):
    """Instances in the COCO result format."""
    return [
        {
            "image_id": image_id,
            "category_id": scenes.DATASET_IDS[class_id],
            "score": score,
            "segmentation": scenes.encode(mask.numpy()),
        }
        for image_id, p in predictions.items()
        for class_id, score, mask in zip(p["classes"], p["scores"], p["masks"], strict=False)
    ]


def run_coco(folder, results, use_cats=1):
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(folder / "instances.json"))
        evaluation = COCOeval(gt, gt.loadRes([dict(r) for r in results]), iouType="segm")
        evaluation.params.useCats = use_cats
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value if value >= 0 else float("nan") for value in evaluation.stats]


def run_panoptic(gt_json, gt_folder, pred_json, pred_folder):
    with contextlib.redirect_stdout(io.StringIO()):
        averages = pq_compute(*map(str, (gt_json, pred_json, gt_folder, pred_folder)))
    return {
        key.upper() + suffix: 100 * averages[group][key]
        for group, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st"))
        if group in averages
        for key in ("pq", "sq", "rq")
    }


def test_panoptic_quality(folder, results, predictions, tmp_path):
    gt = json.loads((folder / "panoptic.json").read_text())
    annotations = []
    for image_id, prediction in predictions.items():
        segment_ids, infos = prediction["panoptic_seg"]
        Image.fromarray(id2rgb(segment_ids.numpy())).save(tmp_path / f"{image_id}.png")
        segments = [
            {"id": i["id"], "category_id": scenes.DATASET_IDS[i["category_id"]]} for i in infos
        ]
        annotations.append(
            {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments}
        )
    (tmp_path / "pred.json").write_text(json.dumps(gt | {"annotations": annotations}))
    expected = run_panoptic(
        folder / "panoptic.json", folder / "panoptic", tmp_path / "pred.json", tmp_path
    )
    assert 20 < expected["PQ"] < 90
    # The official sums depend on the number of CPU cores in their last bits.
    expected = pytest.approx(expected, rel=1e-12, abs=0)
    assert results["scenes_panoptic"]["panoptic_seg"] == expected
    assert results["scenes_cityscapes"]["panoptic_seg"] == expected


def test_mask_ap(folder, results, coco_results):
    names = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()
    expected = dict(zip(names, run_coco(folder, coco_results), strict=True))
    assert 20 < expected["AP"] < 90
    metrics = results["scenes_panoptic"]["segm"]
    np.testing.assert_equal({name: metrics[name] for name in names}, expected)
    assert list(metrics)[:12] == names


def test_proposals(folder, results, coco_results):
    car = [result | {"category_id": 13} for result in coco_results]
    expected = run_coco(folder, car, use_cats=0)[8:]
    metrics = results["proposals"]["proposals"]
    assert list(metrics) == ["AR@100", "ARs@100", "ARm@100", "ARl@100"]
    np.testing.assert_equal(list(metrics.values()), expected)


def test_lvis(folder, results, coco_results):
    module = importlib.import_module("lvis.eval")
    with replaced(module, np=numpy_with_old_names()):
        evaluation = module.LVISEval(str(folder / "instances.json"), coco_results, "segm")
        evaluation.run()
    expected = {k: 100 * v for k, v in evaluation.get_results().items() if k.startswith("AP")}
    assert expected["AP"] > 20
    assert {"APr", "APc", "APf"} <= set(expected)
    assert results["scenes_lvis"]["segm"] == expected


def test_semantic_iou(folder, results, predictions):
    pixels = np.zeros((5, 5), dtype=np.int64)
    for image_id, prediction in predictions.items():
        gt = np.array(Image.open(folder / "semantic" / f"{image_id}.png"))
        pred = prediction["sem_seg"].argmax(0).numpy()
        for g, p in zip(gt[gt != 255], pred[gt != 255], strict=True):
            pixels[g, p] += 1
    union = pixels.sum(0) + pixels.sum(1) - pixels.diagonal()
    expected = 100 * (pixels.diagonal() / union).mean()
    metrics = results["scenes_panoptic"]["sem_seg"]
    assert metrics["mIoU"] == pytest.approx(expected, rel=1e-12)
    # Cityscapes averages over the same five classes: the ground truth has no others.
    assert results["scenes_cityscapes"]["sem_seg"]["IoU"] == pytest.approx(expected, rel=1e-12)
    assert metrics["pACC"] == pytest.approx(100 * pixels.trace() / pixels.sum(), rel=1e-12)


def official_cityscapes(name, predictions, gt):
    module = importlib.import_module(f"cityscapesscripts.evaluation.{name}")
    args = module.args
    args.quiet, args.JSONOutput, args.colorized = True, False, False
    folder = Path(predictions[0]).parent
    args.predictionPath = str(folder)
    args.gtInstancesFile = str(folder / "gtInstances.json")
    # The official code fails to write NumPy integers to JSON.
    changes = {"np": numpy_with_old_names(), "writeDict2JSON": lambda *args: None}
    with replaced(module, **changes):
        return module.evaluateImgLists(predictions, gt, args)


def test_cityscapes_instances(folder, results, predictions, tmp_path):
    files, gt = [], []
    for image_id, p in predictions.items():
        lines = []
        for class_id, score, mask in zip(p["classes"], p["scores"], p["masks"], strict=False):
            name = f"{image_id}_{len(lines)}.png"
            Image.fromarray(mask.numpy().astype(np.uint8)).save(tmp_path / name)
            lines.append(f"{name} {scenes.CITYSCAPES_IDS[class_id]} {score}\n")
        (tmp_path / f"{image_id}.txt").write_text("".join(lines))
        files.append(str(tmp_path / f"{image_id}.txt"))
        gt.append(str(folder / f"gt/city/{scenes.stem(image_id)}_gtFine_instanceIds.png"))
    expected = official_cityscapes("evalInstanceLevelSemanticLabeling", files, gt)["averages"]
    metrics = results["scenes_cityscapes"]["segm"]
    assert metrics["AP"] == 100 * expected["allAp"]
    assert metrics["AP50"] == 100 * expected["allAp50%"]
    assert metrics["AP-car"] == 100 * expected["classes"]["car"]["ap"]
    assert 10 < metrics["AP"] < 90


def test_cityscapes_semantic(folder, results, predictions, tmp_path):
    files, gt = [], []
    for image_id, p in predictions.items():
        labels = np.array(scenes.CITYSCAPES_IDS)[p["sem_seg"].argmax(0).numpy()]
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / f"{image_id}.png")
        files.append(str(tmp_path / f"{image_id}.png"))
        gt.append(str(folder / f"gt/city/{scenes.stem(image_id)}_gtFine_labelIds.png"))
    expected = official_cityscapes("evalPixelLevelSemanticLabeling", files, gt)
    metrics = results["scenes_cityscapes"]["sem_seg"]
    assert metrics["IoU"] == 100 * expected["averageScoreClasses"]
    assert metrics["iIoU"] == 100 * expected["averageScoreInstClasses"]
    assert metrics["IoU_sup"] == 100 * expected["averageScoreCategories"]
    assert metrics["iIoU_sup"] == 100 * expected["averageScoreInstCategories"]
    assert metrics["IoU-car"] == 100 * expected["classScores"]["car"]


def test_semantic_pq(folder, predictions, tmp_path):
    """Compare with the official code on panoptic files with one segment per class."""
    quality = SemanticPQ(scenes.NAMES, 255)
    annotations = {"gt": [], "pred": []}
    for image_id, p in predictions.items():
        maps = {
            "gt": np.array(Image.open(folder / "semantic" / f"{image_id}.png")).astype(int),
            "pred": p["sem_seg"].argmax(0).numpy(),
        }
        # Blocks of 8 x 8, since speckles would make all classes equally good.
        maps["pred"] = maps["pred"][::8, ::8].repeat(8, 0).repeat(8, 1)
        maps["pred"] = maps["pred"][tuple(slice(n) for n in maps["gt"].shape)]
        quality.add(maps["gt"], maps["pred"])
        for kind, labels in maps.items():
            (tmp_path / kind).mkdir(exist_ok=True)
            segments = np.where(labels == 255, 0, labels + 1)
            Image.fromarray(id2rgb(segments)).save(tmp_path / kind / f"{image_id}.png")
            infos = [
                {"id": int(k), "category_id": int(k) - 1, "iscrowd": 0, "area": int(n)}
                for k, n in zip(*np.unique(segments, return_counts=True), strict=True)
                if k
            ]
            annotations[kind].append(
                {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": infos}
            )
    categories = [{"id": c, "name": n, "isthing": 0} for c, n in enumerate(scenes.NAMES)]
    for kind, listed in annotations.items():
        content = {"images": [], "annotations": listed, "categories": categories}
        (tmp_path / f"{kind}.json").write_text(json.dumps(content))
    expected = panoptic_of_stuff(tmp_path, categories)
    metrics = quality.results()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-12), name
    assert 10 < expected["PQ"] < 90


def panoptic_of_stuff(folder, categories):
    """Run the official code without its average over things, which fails without any."""
    evaluation = importlib.import_module("panopticapi.evaluation")
    listed = [
        json.loads((folder / f"{kind}.json").read_text())["annotations"] for kind in ("gt", "pred")
    ]
    by_id = {c["id"]: c for c in categories}
    with contextlib.redirect_stdout(io.StringIO()):
        stat = evaluation.pq_compute_single_core(
            0, list(zip(*listed, strict=True)), folder / "gt", folder / "pred", by_id
        )
    average, per_class = stat.pq_average(by_id, isthing=None)
    expected = {key.upper(): 100 * average[key] for key in ("pq", "sq", "rq")}
    return expected | {f"PQ-{c['name']}": 100 * per_class[c["id"]]["pq"] for c in categories}


@pytest.mark.parametrize("kind", [InstanceSegEvaluator, PanopticEvaluator, ProposalEvaluator])
def test_use_fast_impl_false(folder, results, predictions, tmp_path, kind):
    """`use_fast_impl=False` changes neither results nor files."""
    arguments = {} if kind is ProposalEvaluator else {"output_dir": str(tmp_path)}
    evaluator = kind("scenes_panoptic", use_fast_impl=False, **arguments)
    evaluator.reset()
    for image_id, prediction in predictions.items():
        record = {"image_id": image_id, "file_name": f"{scenes.stem(image_id)}_leftImg8bit.png"}
        evaluator.process([record], [scenes.outputs_of(prediction, "scenes_panoptic")])
    ((task, metrics),) = evaluator.evaluate().items()
    expected = results["proposals" if kind is ProposalEvaluator else "scenes_panoptic"][task]
    np.testing.assert_equal(metrics, expected)
    assert list(metrics) == list(expected)
    for file in tmp_path.glob("*.json"):
        assert file.read_text() == (folder / "output" / "inference" / file.name).read_text()
    # Predictions, a table per class and, of segments, counts per image.
    number = {InstanceSegEvaluator: 3, PanopticEvaluator: 3, ProposalEvaluator: 0}[kind]
    assert len(list(tmp_path.glob("*.json"))) == number


def test_two_workers_equal_one(folder, results):
    command = [sys.executable, scenes.__file__, folder]
    done = forked.run_ranks(2, command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    two_workers = json.loads((folder / "results_2.json").read_text())
    np.testing.assert_equal(two_workers, json.loads(json.dumps(results)))
    files = [file for file in (folder / "output/inference").iterdir() if file.suffix == ".json"]
    names = {file.name for file in files}
    assert {"sem_seg_predictions.json", "coco_instances_results.json", "predictions.json"} <= names
    assert {name.split("_")[1] for name in names if name.startswith("per_")} == {"class", "image"}
    for file in files:
        written = (folder / "output_2" / "inference" / file.name).read_text()
        assert json.loads(written) == json.loads(file.read_text())
    assert not Path("matches.json").exists(), "intermediate results of the official script"


def test_encoding_is_lossless():
    mask = np.random.default_rng(0).random((9, 5)) < 0.5
    assert (mask_util.decode(scenes.encode(mask)) == mask).all()
