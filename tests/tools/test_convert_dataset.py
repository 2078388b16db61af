"""tools/convert_dataset.py from the command line to a training sample, and on real data."""

import json
import shutil
from pathlib import Path

import annotation_samples as samples
import numpy as np
import own_data
import pytest
import yaml
from dataset_trees import write_json
from detectron2.data import DatasetCatalog, MetadataCatalog
from load_script import load_script
from panoptic_source import write_source
from panopticapi.utils import rgb2id
from PIL import Image

from mask2former.config import load_config
from mask2former.data import build_mapper
from mask2former.data.datasets.custom_entries import register_entries
from mask2former.data.formats.annotation_formats import FORMATS

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "configs/shapes/panoptic-segmentation/maskformer2_R18_quickstart.yaml"
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs real data beside the repository")

tool = load_script("tools/convert_dataset.py")


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


@pytest.fixture
def source(tmp_path, monkeypatch):
    write_source(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    """Return the exit status, or the message of an error."""
    with pytest.raises(SystemExit) as error:
        tool.main([*map(str, arguments), "--workers", "1"])
    return error.value.code


def panoptic(*arguments):
    return run("panoptic", "instances.json", "my_train", *arguments)


def entries(capsys):
    """The entries of DATASETS.CUSTOM that were printed."""
    lines = capsys.readouterr().out.splitlines()
    return yaml.safe_load("\n".join(line for line in lines if line.startswith("- {")))


def test_converted_data_trains(source, capsys):
    """The printed entry, in a config, gives a sample with the right classes and masks."""
    assert not panoptic("--labels", "labels", "--classes", "classes.txt")
    custom = entries(capsys)
    assert custom[0]["NAME"] == "my_train" and custom[0]["TYPE"] == "panoptic"
    datasets = {"CUSTOM": custom, "TRAIN": ["my_train"], "TEST": ["my_train"]}
    scales = {"IMAGE_SIZE": 12, "MIN_SCALE": 1.0, "MAX_SCALE": 1.0, "RANDOM_FLIP": "none"}
    file = source / "my.yaml"
    content = {"_BASE_": str(BASE), "DATASETS": datasets, "INPUT": scales}
    file.write_text(yaml.safe_dump(content))
    cfg = load_config(str(file), [])
    assert MetadataCatalog.get("my_train").stuff_classes == ["cup", "plate", "table", "wall"]
    record = DatasetCatalog.get("my_train")[0]
    instances = build_mapper(cfg)(record)["instances"]
    areas = instances.gt_masks.flatten(1).sum(1).tolist()
    classes = instances.gt_classes.tolist()
    assert dict(zip(classes, areas, strict=True)) == {0: 32, 1: 16, 2: 12, 3: 31}
    report = json.loads((source / "my_train/check/report.json").read_text())["my_train"]
    assert report["problems"] == report["warnings"] == []
    assert (source / "my_train/check/contact_sheet_my_train.png").is_file()
    assert not [name for name in DatasetCatalog if "converted" in name]


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format(tmp_path, monkeypatch, capsys, name):
    """Any format → COCO instances and, with a background, panoptic: registered as printed."""
    samples.SAMPLES[name](tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert not run("instances", "data", "new/my_objects.json")
    assert not run("panoptic", "data", "my_scenes", "--background", "table")
    custom = entries(capsys)
    assert [entry["TYPE"] for entry in custom] == ["instance", "panoptic"]
    register_entries(custom)
    objects, scenes = (DatasetCatalog.get(entry["NAME"]) for entry in custom)
    assert [len(record["annotations"]) for record in objects] == [2, 0]
    assert [[s["area"] for s in record["segments_info"]] for record in scenes] == [
        [48, 32, 16],
        [96],
    ]
    assert MetadataCatalog.get("my_scenes").thing_classes == samples.CLASSES
    for folder in ("new/my_objects_check", "my_scenes/check"):
        (report,) = json.loads((tmp_path / folder / "report.json").read_text()).values()
        assert report["problems"] == []
    assert "already" in run("instances", "data", "new/my_objects.json")


def test_report_of_what_has_no_segment(source, capsys):
    content = json.loads((source / "instances.json").read_text())
    hidden = [
        content["annotations"][0] | {"id": 100 + i, "segmentation": [[1, 1, 2, 1, 2, 2, 1, 2]]}
        for i in range(12)
    ]
    content["annotations"] = [*hidden, *content["annotations"]]
    write_json(source / "instances.json", content)
    shutil.copy("labels/a.png", "labels/spare.png")
    options = ("--labels", "labels", "--classes", "classes.txt", "--overlap", "order")
    assert not panoptic(*options, "--no-check", "--min-area", "17")
    lines = capsys.readouterr().out.splitlines()
    ids = ", ".join(str(100 + i) for i in range(10))
    assert (
        f"  12 objects are hidden by others and have no segment: annotations {ids}, ... (12)"
        in lines
    )
    assert (
        "  3 objects have fewer than 17 visible pixels and have no segment: annotations 11, 13, 15"
        in lines
    )
    assert "  1 label maps have no image in SOURCE: not used" in lines
    assert any(line.startswith("  12 pixels of 'cup' in the label maps belong") for line in lines)
    assert not (source / "my_train/check").exists()


def test_problems_set_the_status(source, capsys):
    """The result is as wanted, but an image is missing."""
    (source / "images/c.jpg").unlink()
    assert panoptic("--background", "table") == 1
    assert "problem: " in capsys.readouterr().out
    assert not panoptic("--background", "table", "--no-check", "--overwrite")


@pytest.mark.parametrize(
    "arguments, why",
    [
        (("--labels", "labels"), "must be given together"),
        (("--labels", "none", "--classes", "classes.txt"), "label maps none does not exist"),
        (("--labels", "labels", "--classes", "no.txt"), "No such file or directory: 'no.txt'"),
        (("--image-root", "none"), "folder of the images none does not exist"),
        (("--stuff", "road"), "stuff class 'road' is not one"),
    ],
)
def test_errors_are_one_line(source, arguments, why):
    message = panoptic(*arguments)
    assert message.startswith("error: ") and why in message and "\n" not in message
    assert not (source / "my_train").exists()


def test_missing_source(source):
    for command in ("instances", "panoptic", "semantic"):
        message = run(command, "none.json", "out")
        assert message.startswith("error: ") and "none.json" in message


def test_existing_output(source):
    assert not panoptic("--no-check")
    assert "my_train/panoptic exists already" in panoptic("--no-check")
    assert not panoptic("--no-check", "--overwrite")


def test_images_are_found(source):
    """In the layouts of COCO and of a folder that holds everything."""
    for folder, json_file in (
        ("train", "annotations/instances_train.json"),
        ("images/train", "annotations/instances_train.json"),
        (".", "instances.json"),
    ):
        root = source / "new" / folder.replace("/", "_") / "root"
        (root / json_file).parent.mkdir(parents=True)
        (root / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy("instances.json", root / json_file)
        assert "Name their folder (--image-root)" in run("panoptic", root / json_file, root / "out")
        for stem in own_data.STEMS:
            shutil.copy(f"images/{stem}.jpg", root / folder)
        assert not run("panoptic", root / json_file, root / "out")


def test_back_to_label_maps(source, capsys):
    assert not panoptic("--labels", "labels", "--classes", "classes.txt", "--no-check")
    assert not run("semantic", "my_train/panoptic.json", "my_labels")
    assert "label maps of 4 classes, void is 255" in capsys.readouterr().out
    labels = np.array(Image.open("my_labels/labels/a.png"))
    values, counts = np.unique(labels, return_counts=True)
    assert values.tolist() == [0, 1, 2, 3, 255] and counts.tolist() == [32, 16, 12, 31, 5]


@pytest.mark.parametrize(
    "arguments",
    [
        ("panoptic", "instances.json", "out", "--min-area", "0"),
        ("panoptic", "instances.json", "out", "--workers", "0"),
        ("panoptic", "instances.json", "out", "--overlap", "depth"),
        ("instances", "instances.json"),
        (),
    ],
)
def test_refused_arguments(arguments):
    with pytest.raises(SystemExit) as error:
        tool.parse_args(arguments)
    assert error.value.code == 2


@needs_data
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_data(tmp_path, split):
    """Equals panoptic annotations that were made independently, larger objects below smaller."""
    nuts = DATA / "nuts"
    output = tmp_path / "out"
    options = ("--background", "background", "--no-check")
    assert not run("panoptic", nuts / f"instances_{split}.json", output, *options)
    expected = json.loads((nuts / f"panoptic_{split}.json").read_text())
    content = json.loads((output / "panoptic.json").read_text())
    found = {annotation["image_id"]: annotation for annotation in content["annotations"]}
    keys = ("category_id", "area", "bbox", "iscrowd")
    for annotation in expected["annotations"]:
        other = found[annotation["image_id"]]
        ids, other_ids = (
            rgb2id(np.array(Image.open(folder / entry["file_name"])))
            for folder, entry in (
                (nuts / f"panoptic_{split}", annotation),
                (output / "panoptic", other),
            )
        )
        pairs = {
            (a, b) for a, b in zip(ids.ravel().tolist(), other_ids.ravel().tolist(), strict=True)
        }
        new_ids = dict(pairs)
        assert len(new_ids) == len(pairs) == len(set(new_ids.values()))
        by_id = {segment["id"]: segment for segment in other["segments_info"]}
        assert len(by_id) == len(annotation["segments_info"])
        for segment in annotation["segments_info"]:
            match = by_id[new_ids[segment["id"]]]
            assert [match[key] for key in keys] == [segment[key] for key in keys]
