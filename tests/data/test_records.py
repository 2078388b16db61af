"""Records of functions registered by other projects: mistakes are named, and the check agrees."""

import copy
import math

import numpy as np
import own_data
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from mask2former import COCOInstanceNewBaselineDatasetMapper, add_maskformer2_config
from mask2former.data.check.index import build_index
from mask2former.data.formats.findings import Findings
from mask2former.data.loader import build_train_loader
from mask2former.data.records import check_records

ABSENT = object()


@pytest.fixture
def record(tmp_path) -> dict:
    own_data.images(tmp_path)
    square = [0, 0, 4, 0, 4, 4, 0, 4]
    box = {"bbox": [0.0, 0, 4, 4], "bbox_mode": BoxMode.XYWH_ABS}
    return {
        "file_name": str(tmp_path / "images/a.jpg"),
        "height": 8,
        "width": np.int64(12),
        "image_id": 1,
        "annotations": [
            {"category_id": 0, "segmentation": [square], "iscrowd": 0, **box},
            {"category_id": 1, "segmentation": {"size": [8, 12], "counts": [40, 5, 51]}},
            {"category_id": np.int32(1), "segmentation": np.ones((8, 12), np.uint8)},
        ],
    }


def train(records, monkeypatch) -> None:
    """Build the training loader and load a sample."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
    DatasetCatalog.register("theirs", lambda: copy.deepcopy(records))
    MetadataCatalog.get("theirs").set(thing_classes=["cup", "plate"], evaluator_type="coco")
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATALOADER.NUM_WORKERS = ("theirs",), 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.DEVICE = 1, "cpu"
    mapper = COCOInstanceNewBaselineDatasetMapper(True, tfm_gens=[], image_format="RGB")
    next(iter(build_train_loader(cfg, mapper)))


def test_sound_records(record, monkeypatch):
    train([record], monkeypatch)
    assert not build_index("theirs").problems


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("file_name",), ABSENT, "has no 'file_name'"),
        (("file_name",), 7, "has the file_name '7', which is no text"),
        (("height",), -1, "has the height '-1'"),
        (("width",), "12", "has the width '12'"),
        (("annotations",), 3, "has annotations '3', which is no list"),
        (("annotations", 0), None, r"annotations\[0\] is 'None', not a dict"),
        (("annotations", 0, "category_id"), ABSENT, r"annotations\[0\] has no 'category_id'"),
        (("annotations", 1, "category_id"), "cup", r"annotations\[1\] has category_id 'cup'"),
        (("annotations", 1, "category_id"), 0.5, r"annotations\[1\] has category_id 0\.5"),
        (("annotations", 0, "iscrowd"), "no", r"annotations\[0\] has iscrowd 'no'"),
        (("annotations", 0, "bbox"), [0, 0, math.nan, 4], r"annotations\[0\] has bbox .*nan"),
        (("annotations", 0, "bbox"), [0, 0, 4], r"annotations\[0\] has bbox .* four finite"),
        (("annotations", 0, "bbox_mode"), ABSENT, r"annotations\[0\] has a bbox without 'bbox_m"),
        (("annotations", 0, "segmentation"), "x", r"annotations\[0\] has segmentation 'x'"),
        (("annotations", 1, "segmentation", "size"), ABSENT, r"annotations\[1\] .* no RLE with"),
        (
            ("annotations", 1, "segmentation", "counts"),
            [40, 5],
            r"annotations\[1\] has an RLE that cannot be decoded: it counts 45 of 96",
        ),
    ],
)
def test_malformed_records(record, monkeypatch, path, value, message):
    parent = record
    for key in path[:-1]:
        parent = parent[key]
    if value is ABSENT:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    named = rf"'theirs' cannot be used: .*, record 0 \(from 0\): .*{message}"
    with pytest.raises(ValueError, match=named):
        train([record], monkeypatch)
    assert len(build_index("theirs").problems) == 1


def test_no_dicts(record, monkeypatch):
    with pytest.raises(ValueError, match=r"theirs, record 1 \(from 0\): is '3', not a dict"):
        train([record, 3], monkeypatch)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ({"category_id": 0}, "has no 'id'"),
        ({"id": 0, "category_id": 0}, "has id 0; it must be the colour"),
        ({"id": 1.5, "category_id": 0}, "has id 1.5; it must be the colour"),
        ({"id": 1}, "has no 'category_id'"),
    ],
)
def test_segments(segment, message):
    findings = Findings()
    sound = {"file_name": "a.jpg", "segments_info": [{"id": 1, "category_id": 0}]}
    broken = {"file_name": "b.jpg", "segments_info": [segment]}
    assert check_records([sound, broken], "theirs", findings) == [sound]
    (problem,) = findings.problems
    assert problem.file == "b.jpg" and message in problem.why
