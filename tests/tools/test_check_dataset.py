"""tools/check_dataset.py on small data sets, intact and broken, and on real ones."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import own_data
import pytest
import yaml
from dataset_trees import photograph, save, write_json
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from load_script import load_script
from PIL import Image

from mask2former.data.check import run as run_checks
from mask2former.data.datasets.register_coco_panoptic_annos_semseg import (
    get_metadata,
    register_coco_panoptic_annos_sem_seg,
)

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "configs/shapes/panoptic-segmentation/maskformer2_R18_quickstart.yaml"
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs real data beside the repository")


tool = load_script("tools/check_dataset.py")


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


@pytest.fixture
def config(tmp_path):
    """Custom data sets of all three types."""
    own_data.panoptic(tmp_path)
    own_data.instances(tmp_path)
    own_data.semantic(tmp_path)
    entries = [
        own_data.entry("panoptic", tmp_path, "own_panoptic"),
        own_data.entry("instance", tmp_path, "own_instances"),
        own_data.entry("semantic", tmp_path, "own/semantic"),
    ]
    datasets = {"CUSTOM": entries, "TRAIN": ["own_panoptic"], "TEST": ["own/semantic"]}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"_BASE_": str(BASE), "DATASETS": datasets}))
    return str(path)


def run(output, *arguments):
    """Return the exit status and the report."""
    with pytest.raises(SystemExit) as error:
        tool.main([*map(str, arguments), "--output", str(output)])
    file = output / "report.json"
    return error.value.code, json.loads(file.read_text()) if file.exists() else None


@pytest.mark.parametrize("workers", [1, 2])
def test_intact_data(config, tmp_path, workers):
    names = ["own_panoptic", "own_instances", "own/semantic"]
    output = tmp_path / "new" / "out"
    status, report = run(output, *names, "--config-file", config, "--workers", workers)
    assert not status
    assert list(report) == names
    panoptic, instances, semantic = report.values()
    for summary in report.values():
        assert summary["problems"] == summary["warnings"] == summary["classes_never_seen"] == []
        assert summary["num_images"] == 3 and summary["num_images_without_annotation"] == 0
        assert summary["image_sizes"]["width"] == {"min": 12, "median": 12.0, "max": 12}
        assert summary["image_sizes"]["most_frequent"] == [{"width": 12, "height": 8, "images": 3}]
    assert panoptic["classes"] == [
        {"id": 0, "name": "cup", "images": 3, "objects": 3, "pixels": 96, "share": 1 / 3},
        {"id": 1, "name": "plate", "images": 3, "objects": 3, "pixels": 48, "share": 1 / 6},
        {"id": 2, "name": "table", "images": 3, "objects": 3, "pixels": 144, "share": 1 / 2},
    ]
    assert [entry["pixels"] for entry in instances["classes"]] == [96, 48]
    assert [entry["pixels"] for entry in semantic["classes"]] == [96, 48, 144]
    assert instances["object_sizes"] == panoptic["object_sizes"]
    assert instances["object_sizes"]["small"] == instances["num_objects"] == 6
    assert instances["object_sizes"]["pixels"] == {"min": 16, "median": 24.0, "max": 32}
    sheets = ["own_instances", "own_panoptic", "own_semantic"]
    expected = [f"contact_sheet_{name}.png" for name in sheets] + ["report.json", "report.md"]
    assert sorted(os.listdir(output)) == expected
    text = (output / "report.md").read_text()
    assert "## own/semantic" in text
    assert "| 1 | plate | 3 | 3 | 48 | 16.67% |" in text


def test_every_problem_is_reported(config, tmp_path, capsys):
    whole = (tmp_path / "images/a.jpg").read_bytes()
    (tmp_path / "images/a.jpg").write_bytes(whole[: len(whole) // 2])
    labels = own_data.labels()
    labels[0, 0] = 9
    save(tmp_path / "labels/b.png", labels)
    (tmp_path / "panoptic/c.png").write_bytes(b"")
    names = ["own_panoptic", "own/semantic"]
    status, report = run(tmp_path / "out", "--config-file", config)
    assert status == 1 and list(report) == names
    images, labels = tmp_path / "images", tmp_path / "labels"
    problems = [[(f["file"], f["id"]) for f in report[name]["problems"]] for name in names]
    assert problems == [
        [(f"{images}/a.jpg", 1), (f"{tmp_path}/panoptic/c.png", 3)],
        [(f"{images}/a.jpg", None), (f"{labels}/b.png", None)],
    ]
    printed = capsys.readouterr().out
    assert "own_panoptic: 3 images, 2 problems, 0 warnings, 0 of 3 classes never seen" in printed
    assert f"problem: {images}/a.jpg, 1: cannot be read as an image" in printed
    markdown = (tmp_path / "out/report.md").read_text()
    assert f"| {labels}/b.png |  | has labels that are neither in [0, 3)" in markdown


def test_unreadable_dataset(config, tmp_path):
    """Broken after registration: a report without contact sheet, and the next one is checked."""
    tool.resolve_names(tool.parse_args(["--config-file", config]))
    (tmp_path / "instances.json").write_text("{")
    status, report = run(tmp_path / "out", "own_instances", "own_panoptic", "--workers", "1")
    assert status == 1
    assert report["own_instances"]["num_images"] == 0
    assert report["own_instances"]["object_sizes"]["pixels"] is None
    assert report["own_panoptic"]["problems"] == []
    expected = ["contact_sheet_own_panoptic.png", "report.json", "report.md"]
    assert sorted(os.listdir(tmp_path / "out")) == expected


def test_class_count_differs_from_the_model(config, tmp_path):
    options = ["--opts", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5"]
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as error:
        tool.main(["--config-file", config, "--output", str(output), *options])
    assert error.value.code == 1
    (problem,) = json.loads((output / "report.json").read_text())["own_panoptic"]["problems"]
    assert problem["file"] == config and "NUM_CLASSES is 5" in problem["why"]


def test_unseen_classes_and_unlisted_files(config, tmp_path):
    content = json.loads((tmp_path / "instances.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 3][:1]
    content["images"].pop()
    write_json(tmp_path / "instances.json", content)
    status, report = run(tmp_path / "out", "own_instances", "--config-file", config)
    summary = report["own_instances"]
    assert not status
    assert summary["classes_never_seen"] == ["plate"]
    assert summary["num_images_without_annotation"] == 1
    assert [finding["file"] for finding in summary["warnings"]] == [f"{tmp_path}/images/c.jpg"]
    assert "Never seen (1): plate" in (tmp_path / "out/report.md").read_text()


def test_contact_sheet_shows_annotations(config, tmp_path):
    for stem in own_data.STEMS:
        photograph(tmp_path / "images" / f"{stem}.jpg")
    run(tmp_path / "out", "own/semantic", "--config-file", config)
    with Image.open(tmp_path / "out/contact_sheet_own_semantic.png") as sheet:
        # Three drawings of 12 x 8, an empty cell, and margins of 8 pixels.
        assert sheet.size == (8 + 3 * (12 + 8) + 1 + 8, 8 + 8 + 8)
        assert np.asarray(sheet).std() > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_set"], "error: Data set 'no_such_set' is not registered"),
        (["--config-file", "nowhere.yaml"], r"error: Config file 'nowhere\.yaml' does not exist"),
        (["--config-file", "{config}", "--opts", "A", "1"], "error: The command line sets 'A'"),
    ],
)
def test_errors(config, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        tool.main([argument.format(config=config) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a data set NAME or --config-file"),
        (["a", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["a", "--opts", "A", "1"], "--opts overrides a config"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tool.main(arguments)
    assert message in capsys.readouterr().err


def test_report_on_a_full_disk(config, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    os.symlink("/dev/full", output / "report.json.tmp")
    with pytest.raises(SystemExit, match=r"^error: Cannot write \S*report\.json: No space left on"):
        tool.main(["--config-file", str(config), "--output", str(output), "--workers", "1"])
    assert not list(output.iterdir())
    output.rmdir()
    output.touch()
    with pytest.raises(SystemExit, match=r"^error: Cannot write \S*output: a file is in the place"):
        tool.main(["--config-file", str(config), "--output", str(output)])


@needs_data
def test_real_coco(tmp_path, monkeypatch):
    """50 COCO images, registered like `coco_2017_val` and `coco_2017_val_panoptic`."""
    monkeypatch.setattr(run_checks, "_NUM_EXAMPLES", 1)
    coco = DATA / "coco"
    metadata = {k: v for k, v in get_metadata().items() if k.startswith("thing_")}
    instances = str(coco / "annotations/instances_val2017.json")
    images = str(coco / "val2017")
    register_coco_instances("real_instances", metadata, instances, images)
    register_coco_panoptic_annos_sem_seg(
        *("real_panoptic", get_metadata(), images, str(coco / "panoptic_val2017")),
        *(str(coco / "annotations/panoptic_val2017.json"), None, instances),
    )
    status, report = run(tmp_path, "real_instances", "real_panoptic", "--workers", "2")
    assert not status
    assert report["real_instances"]["num_objects"] == sum(
        report["real_panoptic"]["object_sizes"][size] for size in ("small", "medium", "large")
    )
    for summary in report.values():
        assert summary["num_images"] == 50 and summary["problems"] == summary["warnings"] == []


def test_label_maps_without_class(config, tmp_path):
    for stem in own_data.STEMS:
        save(tmp_path / "labels" / f"{stem}.png", np.full((8, 12), 255, np.uint8))
    status, report = run(tmp_path / "out", "own/semantic", "--config-file", config)
    why = "every pixel of every label map has the ignore label 255"
    # Only evaluated, according to the config.
    assert status == 0 and any(why in w["why"] for w in report["own/semantic"]["warnings"])
    text = Path(config).read_text().replace("- own/semantic", "- own_instances")
    Path(config).write_text(text.replace("- own_panoptic", "- own/semantic"))
    status, report = run(tmp_path / "out", "own/semantic", "--config-file", config)
    problems = report["own/semantic"]["problems"]
    assert status == 1 and any(why in problem["why"] for problem in problems), problems


def test_folder_of_a_labelling_tool(tmp_path, capfd, monkeypatch):
    # As in a program of its own.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger("mask2former"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("mask2former"), "propagate", True)
    own_data.yolo(tmp_path / "pets")
    entry = {"NAME": "pets", "TYPE": "auto", "ROOT": str(tmp_path / "pets"), "SPLIT": "train"}
    path = tmp_path / "pets.yaml"
    content = {"CUSTOM": [entry], "TRAIN": ["pets"], "TEST": []}
    base = ROOT / "configs/shapes/instance-segmentation/maskformer2_R18_quickstart.yaml"
    path.write_text(yaml.safe_dump({"_BASE_": str(base), "DATASETS": content}))
    status, report = run(tmp_path / "out", "--config-file", path, "--workers", 1)
    assert status == 0
    assert report["pets"]["num_images"] == 2 and report["pets"]["num_objects"] == 3
    assert report["pets"]["classes_never_seen"] == ["bird"]
    assert "'pets': TYPE yolo (" in capfd.readouterr().err
