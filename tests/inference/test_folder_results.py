"""Objects of a report and result files of a folder, of predictions and ground truth by hand."""

import json
from pathlib import Path

import numpy as np
import own_data
import pycocotools.mask as mask_utils
import pytest
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from panopticapi.utils import rgb2id
from PIL import Image
from pycocotools.coco import COCO

from mask2former.data.class_labels import category_ids
from mask2former.data.datasets.custom_entries import register_entries
from mask2former.inference import InstanceMasks, InstanceResult, PanopticResult, Result, Segment
from mask2former.inference.folder_results import FolderResults
from mask2former.inference.report_objects import GroundTruth, ReportObject, predicted_objects

SIZE = own_data.HEIGHT, own_data.WIDTH
LABELS = own_data.labels()  # 0: 32 pixels, 1: 16, 2: 48
SHARES = [32 / 96, 16 / 96, 48 / 96]
METADATA = Metadata(
    thing_dataset_id_to_contiguous_id={3: 0, 7: 1}, stuff_dataset_id_to_contiguous_id={9: 2}
)


def result() -> Result:
    masks = InstanceMasks.from_full(np.stack([LABELS == 0, LABELS == 1]))
    ids = np.array([5, 300, 70_000], np.int32)[LABELS]
    segments = [Segment(5, 0, True, 0.9, 32), Segment(300, 1, True, 0.2, 16)]
    segments.append(Segment(70_000, 2, False, None, 48))
    return Result(
        SIZE,
        tuple(own_data.CLASSES),
        instances=InstanceResult(masks, np.array([0.8, 0.05]), np.array([0, 1])),
        panoptic=PanopticResult(ids, segments),
        semantic=LABELS,
        metadata=METADATA,
    )


def masks_of(objects: list[ReportObject], size: tuple[int, int] = SIZE) -> dict[int, np.ndarray]:
    return {x.label: mask_utils.decode({"size": list(size), "counts": x.counts}) for x in objects}


# ---- objects of a report ----


@pytest.mark.parametrize(
    "task, labels, scores",
    [
        ("instance", [0], [0.8]),
        ("panoptic", [0, 1, 2], [0.9, 0.2, None]),
        ("semantic", [0, 1, 2], [None, None, None]),
    ],
)
def test_predicted_objects(task, labels, scores):
    objects = predicted_objects(result(), task, SIZE, min_score=0.1)
    assert [x.label for x in objects] == labels
    assert [x.score for x in objects] == [s and pytest.approx(s) for s in scores]
    assert [x.area for x in objects] == pytest.approx([SHARES[label] for label in labels])
    for label, mask in masks_of(objects).items():
        np.testing.assert_array_equal(mask, LABELS == label)
    small = masks_of(predicted_objects(result(), task, (4, 6), min_score=0.1), (4, 6))
    for label, mask in small.items():
        np.testing.assert_array_equal(mask, LABELS[1::2, 1::2] == label)


def test_nothing_predicted():
    empty = Result(
        SIZE,
        ("a",),
        instances=InstanceResult(InstanceMasks.empty(SIZE), np.zeros(0), np.zeros(0)),
        panoptic=PanopticResult(np.zeros(SIZE, np.int32), []),
    )
    assert predicted_objects(empty, "instance", SIZE) == []
    assert predicted_objects(empty, "panoptic", SIZE) == []


@pytest.fixture(scope="module")
def ground_truth(tmp_path_factory) -> dict[str, GroundTruth]:
    """Of the three kinds of data; instance data with a crowd."""
    root = tmp_path_factory.mktemp("gt")
    with pytest.MonkeyPatch.context() as patch:
        for catalog in (DatasetCatalog, MetadataCatalog):
            patch.setattr(catalog, "data", dict(catalog.data))
        for kind in ("semantic", "panoptic", "instances"):
            getattr(own_data, kind)(root / kind)
        content = json.loads((root / "instances/instances.json").read_text())
        content["annotations"][3]["iscrowd"] = 1  # the plate of b.jpg
        (root / "instances/instances.json").write_text(json.dumps(content))
        kinds = {"semantic": "semantic", "panoptic": "panoptic", "instance": "instances"}
        entries = [own_data.entry(k, root / folder, f"gt_{k}") for k, folder in kinds.items()]
        register_entries(entries)
        yield {kind: GroundTruth(f"gt_{kind}") for kind in kinds}


@pytest.mark.parametrize("kind, num", [("semantic", 3), ("panoptic", 3), ("instance", 2)])
def test_ground_truth_of_each_kind(ground_truth, kind, num):
    gt = ground_truth[kind]
    record = gt.find(Path("elsewhere/b.jpg"))
    assert record["file_name"].endswith("b.jpg")
    objects = gt.objects(record, kind, SIZE, SIZE)
    assert [x.label for x in objects] == [0, 1, 2][:num]
    assert [x.area for x in objects] == pytest.approx(SHARES[:num])
    assert [x.is_crowd for x in objects] == [False, kind == "instance", False][:num]
    for label, mask in masks_of(objects).items():
        np.testing.assert_array_equal(mask, LABELS == label)
    # Another task gets what there is, instances the things only.
    things = gt.objects(record, "instance", SIZE, SIZE)
    assert len(things) == {"semantic": 3, "panoptic": 2, "instance": 2}[kind]


def test_ground_truth_is_found_by_path_or_only_name(ground_truth):
    gt = ground_truth["instance"]
    record = gt.find(Path("a.jpg"))
    assert gt.find(Path(record["file_name"]), by_name=False) is record
    assert gt.find(Path("a.jpg"), by_name=False) is None
    assert gt.find(Path("other.jpg")) is None
    assert gt.image_ids() == [1, 2, 3]


def test_ground_truth_errors(ground_truth):
    with pytest.raises(ValueError, match="'nothing' is not registered"):
        GroundTruth("nothing")
    gt = ground_truth["semantic"]
    with pytest.raises(ValueError, match=r"a.png has \(height, width\) \(8, 12\), .* \(9, 9\)"):
        gt.objects(gt.find(Path("a.jpg")), "semantic", (9, 9), (9, 9))


# ---- result files ----


def test_files_are_in_the_formats_of_coco(tmp_path):
    results = FolderResults(
        tmp_path,
        ["json", "panoptic", "semantic"],
        class_names=own_data.CLASSES,
        things=[0, 1],
        category_ids=category_ids(METADATA),
        known_image_ids=[1, 7],
    )
    results.add(Path("sub/a"), "sub/a.jpg", result(), 7)
    results.add(Path("b"), "b.jpg", result())
    written = [path.relative_to(tmp_path).as_posix() for path in results.finish()]
    assert written == [
        "coco_instances_results.json",
        "images.json",
        "panoptic.json",
        "panoptic",
        "semantic",
    ]
    coco = COCO(tmp_path / "images.json")
    assert coco.imgs[8]["file_name"] == "b.jpg"  # 7 and below are taken
    loaded = coco.loadRes(str(tmp_path / "coco_instances_results.json"))
    assert {a["category_id"] for a in loaded.loadAnns(loaded.getAnnIds(7))} == {3, 7}
    (cup,) = loaded.loadAnns(loaded.getAnnIds(8, catIds=3))
    assert cup["score"] == pytest.approx(0.8) and cup["bbox"] == [0, 0, 4, 8]
    np.testing.assert_array_equal(loaded.annToMask(cup), LABELS == 0)

    content = json.loads((tmp_path / "panoptic.json").read_text())
    assert [category["isthing"] for category in content["categories"]] == [1, 1, 0]
    first = content["annotations"][0]
    assert (first["image_id"], first["file_name"]) == (7, "sub/a.png")
    ids = rgb2id(np.asarray(Image.open(tmp_path / "panoptic/sub/a.png")))
    for segment, category, box, area in zip(
        first["segments_info"],
        (3, 7, 9),
        ([0, 0, 4, 8], [4, 0, 4, 4], [4, 0, 8, 8]),
        (32, 16, 48),
        strict=True,
    ):
        assert (segment["category_id"], segment["bbox"]) == (category, box)
        assert segment["area"] == (ids == segment["id"]).sum() == area
    labels = np.asarray(Image.open(tmp_path / "semantic/b.png"))
    np.testing.assert_array_equal(labels, np.array([3, 7, 9])[LABELS])


def test_no_image_gives_valid_files(tmp_path):
    results = FolderResults(tmp_path, ["json"], class_names=["a"], things=[])
    results.finish()
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []
    assert json.loads((tmp_path / "images.json").read_text())["categories"] == [
        {"id": 0, "name": "a", "isthing": 0}
    ]
