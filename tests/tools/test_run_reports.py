"""tools/compare_runs.py and tools/analyze_errors.py on evaluations of random scenes."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from evaluation import random_scenes as scenes
from load_script import load_script
from PIL import Image

from mask2former.evaluation import build_evaluator
from mask2former.evaluation.panoptic_errors import KINDS

NAME = "scenes_panoptic"
analyze_errors = load_script("tools/analyze_errors.py")
compare_runs = load_script("tools/compare_runs.py")


LABELS = f"label_errors_{NAME}_segm"
RESULTS = f"results_{NAME}_segm.json"
OTHER = "scenes/other"
LAST, FIXED = "results_scenes_other_segm.json", "coco_instances_results.json"


def evaluate(records, predictions, output_dir, name=NAME):
    cfg = CfgNode({"OUTPUT_DIR": str(output_dir), "MODEL": {"MASK_FORMER": {"TEST": {}}}})
    for task in ("PANOPTIC_ON", "INSTANCE_ON", "SEMANTIC_ON"):
        cfg.MODEL.MASK_FORMER.TEST[task] = True
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    for record in records:
        outputs = scenes.outputs_of(predictions[record["image_id"]], NAME)
        evaluator.process([record], [outputs])
    return evaluator.evaluate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs: a, and b with all objects of even images one class up."""
    folder = tmp_path_factory.mktemp("runs")
    scenes.write_scenes(folder, seed=3)
    records = scenes.register(folder)
    images = folder / "images"
    images.mkdir()
    for image in json.loads((folder / "instances.json").read_text())["images"]:
        size = image["height"], image["width"], 3
        Image.fromarray(np.full(size, 128, np.uint8)).save(images / image["file_name"])
    MetadataCatalog.get(NAME).image_root = str(images)
    predictions = torch.load(folder / "predictions.pt")
    results = {"a": evaluate(records, predictions, folder / "a")}
    for image_id in range(2, scenes.NUM_IMAGES + 1, 2):
        prediction = predictions[image_id]
        prediction["scores"] = [0.99] * len(prediction["scores"])
        prediction["classes"] = [{1: 3, 3: 4, 4: 1}[c] for c in prediction["classes"]]
        for info in prediction["panoptic_seg"][1]:
            info["category_id"] = (info["category_id"] + 1) % len(scenes.NAMES)
            info["isthing"] = info["category_id"] in scenes.THINGS
    results["b"] = evaluate(records, predictions, folder / "b")
    yield folder, results
    scenes.unregister()


def table(folder, task):
    return json.loads((folder / "inference" / f"per_class_{NAME}_{task}.json").read_text())


def test_class_tables_average_to_the_results(folder):
    folder, results = folder
    for task, metric in (("panoptic_seg", "PQ"), ("segm", "AP"), ("sem_seg", "mIoU")):
        column = "IoU" if metric == "mIoU" else metric
        rows = table(folder / "a", task)["classes"]
        values = [row[column] for row in rows if row[column] is not None]
        assert np.mean(values) == pytest.approx(results["a"][task][metric], abs=1e-9)
        assert (folder / "a" / "inference" / f"per_class_{NAME}_{task}.md").is_file()
    instances = json.loads((folder / "instances.json").read_text())["annotations"]
    objects = sum(not annotation["iscrowd"] for annotation in instances)
    assert sum(row["gt"] for row in table(folder / "a", "segm")["classes"]) == objects


def test_each_segment_error_has_one_kind(folder):
    folder, _ = folder
    for run in ("a", "b"):
        rows = table(folder / run, "panoptic_seg")["classes"]
        name = f"segment_errors_{NAME}_panoptic_seg.json"
        content = json.loads((folder / run / "inference" / name).read_text())
        errors = [error for image in content["images"].values() for error in image]
        for is_fp, column in ((True, "FP"), (False, "FN")):
            assert sum(e[0] is is_fp for e in errors) == sum(row[column] for row in rows)
        assert not {e[1] for e in errors} - set(KINDS)


def test_comparison(folder, tmp_path, capsys):
    folder, results = folder
    compare_runs.main(
        [str(folder / "a"), str(folder / "b"), "--output", str(tmp_path), "--resamples", "200"]
    )
    content = json.loads((tmp_path / "comparison.json").read_text())[NAME]
    for task, metric in (("panoptic_seg", "PQ"), ("segm", "AP"), ("sem_seg", "mIoU")):
        for side in "ab":
            value = content[task]["metrics"][metric][side][0]
            assert value == pytest.approx(results[side][task][metric], abs=1e-6)
    assert content["sem_seg"]["metrics"]["mIoU"]["difference"] == [0, 0, 0]
    assert content["panoptic_seg"]["metrics"]["PQ"]["difference"][2] < 0
    printed = capsys.readouterr().out
    assert "**A is better in PQ by" in printed and "No difference in mIoU shown" in printed
    assert "Only 7 images" in printed


def test_comparison_of_seeds(folder, tmp_path, capsys):
    folder, _ = folder
    runs = [tmp_path / name for name in ("1", "2", "3")]
    for run in runs:
        shutil.copytree(folder / "a", run)
    compare_runs.main([f"{runs[0]}+{runs[1]}", f"{runs[2]}+{folder / 'b'}", "--resamples", "100"])
    printed = capsys.readouterr().out
    assert "Each run:" in printed and "One run per side" not in printed


def _without(name):
    def change(run):
        (run / "inference" / name).unlink()

    return change


def _moved_gt(run):
    path = run / "inference" / f"per_class_{NAME}_segm.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"gt_file": "/nowhere/gt.json"}))


def _other_results(run):
    path = run / "inference" / RESULTS
    path.write_text(json.dumps(json.loads(path.read_text())[::3]))


def _one_image_less(run):
    path = run / "inference" / f"per_image_{NAME}_panoptic_seg.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"images": content["images"][1:]}))


@pytest.mark.parametrize(
    "change, message",
    [
        (shutil.rmtree, "is not a folder"),
        (lambda run: shutil.rmtree(run / "inference"), "has no per_class_"),
        (_one_image_less, "7 images and"),
    ],
)
def test_incomplete_runs_are_refused(folder, tmp_path, change, message):
    folder, _ = folder
    shutil.copytree(folder / "b", tmp_path / "b")
    change(tmp_path / "b")
    with pytest.raises(SystemExit, match=message):
        compare_runs.main([str(folder / "a"), str(tmp_path / "b"), "--resamples", "100"])


BROKEN_MASKS = [
    (_without(RESULTS), f"{RESULTS} is missing"),
    (_moved_gt, "/nowhere/gt.json"),
    (_other_results, "is of another evaluation"),
]


@pytest.mark.parametrize("change, message", BROKEN_MASKS)
def test_task_with_broken_files_is_left_out(folder, tmp_path, change, message, capsys):
    folder, _ = folder
    shutil.copytree(folder / "b", tmp_path / "b")
    change(tmp_path / "b")
    compare_runs.main([str(folder / "a"), str(tmp_path / "b"), "--resamples", "100"])
    printed = capsys.readouterr().out
    (note,) = [line for line in printed.splitlines() if line.startswith("note: ")]
    assert f"segm on {NAME} is left out: " in note and message in note
    assert "PQ by" in printed and "mIoU shown" in printed and "in AP" not in printed
    # Nor are errors counted of other results than those of the table.
    with pytest.raises(SystemExit, match=message):
        analyze_errors.main([str(tmp_path / "b"), "--output", str(tmp_path / "report")])


@pytest.fixture
def two_test_sets(folder, tmp_path):
    """A run with two test sets of instances, of which the second one has one prediction each."""
    folder, _ = folder
    metadata = {k: v for k, v in MetadataCatalog.get(NAME).as_dict().items() if k != "name"}
    MetadataCatalog.get(OTHER).set(**metadata)
    predictions = torch.load(folder / "predictions.pt")
    records = DatasetCatalog.get(NAME)
    DatasetCatalog.register(OTHER, lambda: records)
    results = {NAME: evaluate(records, predictions, tmp_path / "run")}
    for prediction in predictions.values():
        for key in ("scores", "classes", "masks"):
            prediction[key] = prediction[key][:1]
    results[OTHER] = evaluate(records, predictions, tmp_path / "run", OTHER)
    yield tmp_path / "run", results
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove(OTHER)


def test_two_test_sets_keep_their_instances(two_test_sets, tmp_path, capsys):
    run, results = two_test_sets
    contents = [(run / "inference" / name).read_bytes() for name in (RESULTS, LAST, FIXED)]
    assert contents[0] != contents[1] == contents[2]
    analyze_errors.main([str(run), "--output", str(tmp_path / "report")])
    page = (tmp_path / "report" / "error_analysis.md").read_text()
    for name in (NAME, OTHER):
        part = page.partition(f"## {name}, segm")[2].partition("\n## ")[0]
        assert f"AP50 is {results[name]['segm']['AP50']:.2f}." in part
        assert (tmp_path / "report" / f"label_errors_{name.replace('/', '_')}_segm.csv").is_file()
    compare_runs.main([str(run), str(shutil.copytree(run, tmp_path / "b")), "--resamples", "100"])
    assert "note" not in capsys.readouterr().out.partition("report")[2].partition("# Comp")[0]


def test_run_named_twice(folder):
    run = str(folder[0] / "a")
    with pytest.raises(SystemExit, match="names a run twice"):
        compare_runs.main([f"{run}+{run}", run])


def test_error_analysis(folder, tmp_path):
    folder, _ = folder
    output = tmp_path / "report"
    analyze_errors.main([str(folder / "b"), "--output", str(output)])
    page = (output / "error_analysis.md").read_text()
    for text in ("by TIDE", "this project", "by pixels", f"{LABELS}.png", "wrong class"):
        assert text in page
    with (output / f"{LABELS}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == sorted(rows, key=lambda row: -float(row["rank"]))
    wrong = [row for row in rows if row["kind"] == "wrong class"]
    # Classes of even images were changed.
    assert wrong and {int(row["image_id"]) % 2 for row in wrong[:2]} == {0}
    for name in (f"{LABELS}.png", "error_analysis.png"):
        assert Image.open(output / name).size[0] > 200
    missing = tmp_path / "none"
    with pytest.raises(SystemExit, match="--images"):
        analyze_errors.main([str(folder / "b"), "--output", str(output), "--images", str(missing)])
