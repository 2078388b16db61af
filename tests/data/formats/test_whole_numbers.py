"""JSON whose whole numbers are floats, as pandas writes them, is read as if they were ints."""

import copy
import json
from typing import Any

import numpy as np
import own_data
import pycocotools.mask as mask_util
import pytest
from dataset_trees import write_json
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_coco_panoptic

from mask2former.data import (
    COCOInstanceNewBaselineDatasetMapper,
    COCOPanopticNewBaselineDatasetMapper,
)
from mask2former.data.check.images import ItemChecker
from mask2former.data.check.index import build_index
from mask2former.data.formats.coco_instances import read_instances
from mask2former.data.formats.coco_panoptic import read_panoptic
from mask2former.data.formats.coco_results import read_instance_results
from mask2former.data.formats.findings import Findings
from mask2former.data.loader import InferenceMapper
from mask2former.data.records import check_records

WHOLE = ("id", "image_id", "category_id", "iscrowd", "width", "height", "isthing", "size")


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


def as_floats(value: Any, key: str = "") -> Any:
    """A copy with the whole numbers of all keys as floats."""
    if isinstance(value, dict):
        return {k: as_floats(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [as_floats(v, key) for v in value]
    return float(value) if key in WHOLE else value


def same(value: Any, expected: Any) -> bool:
    """Equality that tells 1.0 from 1."""
    return json.dumps(value, default=repr) == json.dumps(expected, default=repr)


def instances(root):
    content = own_data.instances(root)
    mask = np.zeros((8, 12), np.uint8)
    mask[:4, 4:8] = 1
    rle = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
    content["annotations"][1]["segmentation"] = {"size": [8, 12], "counts": rle}
    content["annotations"][3]["iscrowd"] = 1
    return content


def read(tmp_path, content):
    file, findings = tmp_path / "instances.json", Findings()
    write_json(file, content)
    return read_instances(str(file), str(tmp_path / "images"), findings), findings


def test_instances(tmp_path):
    content = instances(tmp_path)
    expected, _ = read(tmp_path, content)
    data, findings = read(tmp_path, as_floats(content))
    assert findings.problems == findings.warnings == []
    assert same(data.records(), expected.records())
    assert same(data.as_coco().dataset, expected.as_coco().dataset)


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        (("annotations", 1, "category_id"), 3.5, "$.annotations[1].category_id"),
        (("annotations", 1, "image_id"), 1e300, "$.annotations[1].image_id"),
        (("annotations", 1, "iscrowd"), 2.0, "$.annotations[1].iscrowd"),
        (("images", 2, "height"), 8.5, "$.images[2].height"),
        (("images", 2, "height"), 0.0, "$.images[2].height"),
        (("images", 0, "id"), float("nan"), "$.images[0].id"),
    ],
)
def test_other_floats_are_named(path, value, place, tmp_path):
    content = as_floats(instances(tmp_path))
    content[path[0]][path[1]][path[2]] = value
    _, findings = read(tmp_path, content)
    assert place in findings.problems[0].why


def test_panoptic(tmp_path):
    content = own_data.panoptic(tmp_path)
    results = []
    for version in (content, as_floats(content)):
        write_json(tmp_path / "panoptic.json", version)
        findings = Findings()
        results.append(read_panoptic(str(tmp_path / "panoptic.json"), findings))
        assert findings.problems == findings.warnings == []
    expected, data = results
    assert same(data.annotations, expected.annotations)
    assert same(data.content, expected.content)
    assert same(data.images, expected.images)


def test_results(tmp_path):
    rle = {"size": [8, 12], "counts": [26, 3] + [5, 3] * 5 + [27]}
    result = {"image_id": 1, "category_id": 3, "segmentation": rle, "score": 1}
    results = []
    for version in ([result], as_floats([result])):
        write_json(tmp_path / "results.json", version)
        file = str(tmp_path / "results.json")
        results.append(read_instance_results(file, {1: (8, 12)}, {3, 7}, "gt.json"))
    assert same(*results)


def loaded(kind, root):
    """The records of Detectron2's loader, the samples of training and test, and the check."""
    if kind == "instance":
        name = "theirs_instance"
        register_coco_instances(name, {}, str(root / "instances.json"), str(root / "images"))
        make = COCOInstanceNewBaselineDatasetMapper
    else:
        name = "theirs_panoptic"
        ids = {3: 0, 7: 1}
        metadata = {
            "thing_classes": own_data.CLASSES,
            "stuff_classes": own_data.CLASSES,
            "thing_dataset_id_to_contiguous_id": ids,
            "stuff_dataset_id_to_contiguous_id": {9: 2},
        }
        folders = (str(root / part) for part in ("images", "panoptic", "panoptic.json"))
        register_coco_panoptic(name, metadata, *folders)
        make = COCOPanopticNewBaselineDatasetMapper
    index = build_index(name)
    reports = [*map(ItemChecker(index), index.items)]
    problems = index.problems + [p for report in reports for p in report.problems]
    findings = Findings()
    records = check_records(DatasetCatalog.get(name), name, findings)
    mapper = make(True, tfm_gens=[], image_format="RGB", num_classes=3)
    trained = [mapper(copy.deepcopy(record)) for record in records]
    tested = [InferenceMapper(get_cfg())(record) for record in records]
    return problems + findings.problems, trained, tested


@pytest.mark.parametrize("kind", ["instance", "panoptic"])
def test_data_that_detectron2_loads(kind, tmp_path):
    content = instances(tmp_path) if kind == "instance" else own_data.panoptic(tmp_path)
    file = tmp_path / f"{kind if kind == 'panoptic' else 'instances'}.json"
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(f"theirs_{kind}", None)
    write_json(file, content)
    _, expected, expected_test = loaded(kind, tmp_path)
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop(f"theirs_{kind}")
    write_json(file, as_floats(content))
    problems, trained, tested = loaded(kind, tmp_path)
    assert problems == [] and len(trained) == len(tested) == 3
    keys = ("height", "width", "image_id")
    for ours, theirs in zip(trained + tested, expected + expected_test, strict=True):
        assert same({k: ours.get(k) for k in keys}, {k: theirs.get(k) for k in keys})
    for ours, theirs in zip(trained, expected, strict=True):
        assert ours["instances"].gt_classes.tolist() == theirs["instances"].gt_classes.tolist()
        assert (ours["instances"].gt_masks == theirs["instances"].gt_masks).all()
