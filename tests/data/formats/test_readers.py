"""What readers make of sound data, of absent keys and of doubtful values."""

import json
import logging

import annotation_samples
import numpy as np
import own_data
import pycocotools.mask as mask_util
import pytest
from dataset_trees import photograph, save, write_json
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image

from mask2former import add_maskformer2_config
from mask2former.data.datasets.custom_entries import register_entries
from mask2former.data.formats.coco_instances import read_instances
from mask2former.data.formats.coco_panoptic import read_panoptic
from mask2former.data.formats.findings import Findings
from mask2former.data.formats.masks import rle_problems
from mask2former.data.formats.semantic_folders import read_semantic_folders
from mask2former.evaluation.ground_truth import check_ground_truth, read_coco


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    test = cfg.MODEL.MASK_FORMER.TEST
    test.PANOPTIC_ON = test.INSTANCE_ON = test.SEMANTIC_ON = True
    return cfg


# ---- COCO instances ----


def read(tmp_path, content, findings=None, **arguments):
    write_json(tmp_path / "instances.json", content)
    findings = findings or Findings()
    root = str(tmp_path / "images")
    return read_instances(str(tmp_path / "instances.json"), root, findings, **arguments)


def test_records_equal_detectron2(tmp_path):
    """All forms of sound annotations; images out of order; unknown keys."""
    content = own_data.instances(tmp_path)
    mask = np.zeros((8, 12), np.uint8)
    mask[2:5, 3:9] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    annotations = content["annotations"]
    annotations[0]["segmentation"] = {"size": [8, 12], "counts": rle["counts"].decode()}
    annotations[1] |= {"iscrowd": 1, "segmentation": {"size": [8, 12], "counts": [40, 5, 51]}}
    annotations[2]["segmentation"].append([1, 2.5, 3, 4, 5.25, 6])
    annotations[3] |= {"keypoints": [1, 2, 2, 3, 4, 1], "score": 0.5}
    del annotations[4]["iscrowd"], annotations[4]["area"]
    del annotations[5]["bbox"]
    content["images"].reverse()
    content["categories"][0]["supercategory"] = "things"
    data = read(tmp_path, content | {"info": {"year": 1}})
    expected = load_coco_json(str(tmp_path / "instances.json"), str(tmp_path / "images"), "theirs")
    assert data.records() == expected
    assert json.dumps(data.records(), default=repr) == json.dumps(expected, default=repr)


def test_absent_keys_have_one_meaning(tmp_path):
    content = own_data.instances(tmp_path)
    for annotation in content["annotations"]:
        annotation["area"] = None
        del annotation["iscrowd"]
    content["annotations"][0]["iscrowd"] = None
    for image in content["images"]:
        del image["height"], image["width"]
    findings = Findings()
    data = read(tmp_path, content, findings)
    assert findings.problems == findings.warnings == []
    assert [record["height"] for record in data.records()] == [8, 8, 8]
    assert data.records()[0]["annotations"][0]["iscrowd"] == 0
    evaluated = data.as_coco().dataset["annotations"]
    assert [(a["area"], a["iscrowd"]) for a in evaluated] == [(32, 0), (16, 0)] * 3


def test_ids_are_kept_as_written(tmp_path):
    content = own_data.instances(tmp_path)
    for image in content["images"]:
        image["id"] = f"{image['id']:03d}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"{annotation['image_id']:03d}"
        annotation["id"] = f"a{annotation['id']}"
    data = read(tmp_path, content)
    assert [record["image_id"] for record in data.records()] == ["001", "002", "003"]
    coco = read_coco(str(tmp_path / "instances.json"))
    assert sorted(coco.imgs) == ["001", "002", "003"] and sorted(coco.anns) == [1, 2, 3, 4, 5, 6]
    content["images"][1]["id"] = 2
    findings = Findings()
    read(tmp_path, content, findings)
    assert "some image ids are numbers and some are texts" in findings.problems[0].why


def test_parts_that_are_left_out_are_said(tmp_path, caplog):
    content = own_data.instances(tmp_path)
    square = content["annotations"][0]["segmentation"][0]
    content["annotations"][0]["segmentation"] = [square, [1, 2, 3, 4]]
    content["annotations"][1]["segmentation"] = [[4, 0, 15, 0, 15, 4, 4, 4]]
    write_json(tmp_path / "instances.json", content)
    register_entries([own_data.entry("instance", tmp_path)])
    assert DatasetCatalog.get("own_train")[0]["annotations"][0]["segmentation"] == [square]
    assert "annotation 10: has a polygon of 4 coordinates" in caplog.text
    assert "annotation 11: a polygon spans x 4 to 15, y 0 to 4, beyond the 12 x 8" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bbox": [0, 0, 4, None]},
            r"10: \$\.annotations\[0\]\.bbox\[3\]: expected 'int \| float'",
        ),
        (
            {"segmentation": [[0, 0, 4, 8]]},
            "annotation 10: has a polygon of 4 .* 3 points, not a box",
        ),
        ({"segmentation": [[0, 0, 30, 0, 4, 4]]}, "x 0 to 30, .* by more than its longest side"),
        ({"segmentation": None}, "annotation 10: has no segmentation"),
        ({"area": -1}, "annotation 10: has area -1"),
        ({"image_id": 9}, "10: the annotation belongs to image 9, which the JSON does not list"),
        ({"ignore": 1}, "annotation 10: the annotation has 'ignore'"),
        ({"iscrowd": "0"}, r"10: \$\.annotations\[0\]\.iscrowd: expected"),
    ],
)
def test_refused_annotations(tmp_path, change, message):
    content = own_data.instances(tmp_path)
    content["annotations"][0] |= change
    write_json(tmp_path / "instances.json", content)
    register_entries([own_data.entry("instance", tmp_path)])
    with pytest.raises(ValueError, match=rf"'own_train' cannot be used: .*, {message}|{message}"):
        DatasetCatalog.get("own_train")


def test_missing_images(tmp_path):
    own_data.instances(tmp_path)
    register_entries([own_data.entry("instance", tmp_path)])
    (tmp_path / "images/b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"images/b\.jpg does not exist: 1 of 3 images are"):
        DatasetCatalog.get("own_train")


@pytest.mark.parametrize("target", ["nothing.jpg", "b.jpg"])
def test_links_to_nothing(tmp_path, target):
    """A listing shows them like files."""
    own_data.instances(tmp_path)
    own_data.semantic(tmp_path)
    register_entries(
        [own_data.entry("instance", tmp_path), own_data.entry("semantic", tmp_path, "own_labels")]
    )
    (tmp_path / "images/b.jpg").unlink()
    (tmp_path / "images/b.jpg").symlink_to(target)
    with pytest.raises(FileNotFoundError, match=r"images/b\.jpg does not exist: 1 of 3 images are"):
        DatasetCatalog.get("own_train")
    match = r"'own_labels' .*images/b\.jpg is a link to a file that does not exist"
    with pytest.raises(FileNotFoundError, match=match):
        DatasetCatalog.get("own_labels")


def test_links_to_files(tmp_path):
    own_data.instances(tmp_path)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "images").mkdir()
    for stem in own_data.STEMS:
        (tmp_path / f"images/{stem}.jpg").symlink_to(tmp_path / f"elsewhere/{stem}.jpg")
    register_entries([own_data.entry("instance", tmp_path)])
    assert len(DatasetCatalog.get("own_train")) == 3


def test_rles_of_random_masks():
    """Sound RLEs pass, and no damaged one changes the verdict on its neighbours."""
    random = np.random.default_rng(0)
    rles, sizes = [], []
    for share in np.linspace(0, 1, 200):
        height, width = random.integers(1, 60, 2)
        mask = random.random((height, width)) < share
        rles.append(mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"])
        sizes.append(int(height * width))
    assert rle_problems(rles, sizes) == [None] * 200
    for place in random.integers(200, size=40).tolist():
        damaged = list(rles)
        damaged[place] = rles[place][:-1]
        found = [i for i, why in enumerate(rle_problems(damaged, sizes)) if why]
        assert found == [place]


# ---- COCO panoptic ----


def test_panoptic_content(tmp_path):
    content = own_data.panoptic(tmp_path)
    content["info"] = {"year": 1}
    segment = content["annotations"][0]["segments_info"][0]
    del segment["iscrowd"], segment["area"]
    segment["note"] = "kept"
    write_json(tmp_path / "panoptic.json", content)
    findings = Findings()
    data = read_panoptic(str(tmp_path / "panoptic.json"), findings)
    assert findings.problems == findings.warnings == []
    segment["iscrowd"] = 0
    assert data.content == content and list(data.content) == list(content)
    assert data.image_size(data.annotations[0]) == (8, 12)


@pytest.mark.parametrize("segment_id", [0, -1, 1 << 24])
def test_ids_that_no_segment_can_have(tmp_path, segment_id):
    content = own_data.panoptic(tmp_path)
    content["annotations"][0]["segments_info"][0]["id"] = segment_id
    write_json(tmp_path / "panoptic.json", content)
    register_entries([own_data.entry("panoptic", tmp_path)])
    with pytest.raises(
        ValueError, match=rf"panoptic\.json, a\.png: a segment has the id {segment_id}"
    ):
        DatasetCatalog.get("own_train")


# ---- folders ----


def test_mixed_extensions_are_all_read(tmp_path):
    own_data.semantic(tmp_path)
    (tmp_path / "images/b.jpg").rename(tmp_path / "images/b.JPEG")
    photograph(tmp_path / "images/c.png")
    photograph(tmp_path / "images/d.png")
    findings = Findings()
    folders = (str(tmp_path / "images"), str(tmp_path / "labels"))
    pairs = read_semantic_folders(*folders, findings, "jpg", "png")
    images = [image.rpartition("/")[2] for image, _ in pairs]
    assert images == ["a.jpg", "b.JPEG", "c.jpg"] and not findings.problems
    assert [f.file.rpartition("/")[2] for f in findings.warnings] == ["d.png", "b.JPEG"]


def test_ends_of_names(tmp_path):
    """As of ISIC and Cityscapes; what macOS writes beside files is no image."""
    for name in ("a", "b"):
        photograph(tmp_path / "images" / f"{name}_photo.jpg")
        photograph(tmp_path / "labels" / f"{name}_mask.png")
        (tmp_path / "labels" / f"._{name}_mask.png").write_bytes(b"\0")
    findings = Findings()
    folders = (str(tmp_path / "images"), str(tmp_path / "labels"))
    pairs = read_semantic_folders(*folders, findings, "_photo.jpg", "_mask.png")
    assert [tuple(p.rpartition("/")[2] for p in pair) for pair in pairs] == [
        ("a_photo.jpg", "a_mask.png"),
        ("b_photo.jpg", "b_mask.png"),
    ]
    assert findings == Findings()


@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_images_and_labels_in_one_folder(tmp_path, extension):
    """As Roboflow gives masks: a file is an image or a label, never both."""
    for name in (f"a.{extension}", "a_mask.png", f"b.{extension}"):
        photograph(tmp_path / name)
    findings = Findings()
    pairs = read_semantic_folders(str(tmp_path), str(tmp_path), findings, extension, "_mask.png")
    assert pairs == [(str(tmp_path / f"a.{extension}"), str(tmp_path / "a_mask.png"))]
    (problem,) = findings.problems
    assert problem.file.endswith(f"b.{extension}") and "has no label map" in problem.why
    assert not findings.warnings


def test_label_of_a_class_that_is_ignored(tmp_path, caplog):
    own_data.semantic(tmp_path)
    for stem in own_data.STEMS:
        save(tmp_path / "labels" / f"{stem}.png", np.uint8(255) * (own_data.labels() > 0))
    register_entries([own_data.entry("semantic", tmp_path, CLASSES=["background", "cup"])])
    DatasetCatalog.get("own_train")
    assert "no pixel has the class 'cup', but some have the ignore label 255" in caplog.text


# ---- before a run ----


def test_sound_ground_truth(tmp_path, cfg, caplog):
    caplog.set_level(logging.WARNING)
    own_data.instances(tmp_path)
    own_data.panoptic(tmp_path)
    own_data.semantic(tmp_path)
    for kind in ("instance", "panoptic", "semantic"):
        register_entries([own_data.entry(kind, tmp_path, kind)])
        check_ground_truth(cfg, kind)
    assert not caplog.records


def test_test_split_without_annotations(tmp_path, cfg, caplog):
    content = own_data.instances(tmp_path)
    del content["annotations"]
    write_json(tmp_path / "instances.json", content)
    register_entries([own_data.entry("instance", tmp_path)])
    check_ground_truth(cfg, "own_train")
    assert "its images are predicted, but not evaluated" in caplog.text


@pytest.mark.parametrize("mode", ["L", "P"])
def test_panoptic_png_of_another_mode(tmp_path, cfg, mode):
    own_data.panoptic(tmp_path)
    register_entries([own_data.entry("panoptic", tmp_path)])
    png = tmp_path / "panoptic/c.png"
    Image.open(png).convert(mode).save(png)
    with pytest.raises(ValueError, match=rf"c\.png is an image of mode {mode}"):
        check_ground_truth(cfg, "own_train")


def test_label_that_no_class_has(tmp_path, cfg):
    own_data.semantic(tmp_path)
    register_entries([own_data.entry("semantic", tmp_path, IMAGE_EXT="jpg")])
    save(tmp_path / "labels/c.png", own_data.labels() + 1)
    with pytest.raises(ValueError, match=r"c\.png has labels \[3\]; valid are 0 to 2"):
        check_ground_truth(cfg, "own_train")


def test_label_map_of_another_size(tmp_path, cfg):
    own_data.semantic(tmp_path)
    register_entries([own_data.entry("semantic", tmp_path)])
    save(tmp_path / "labels/b.png", own_data.labels()[:4])
    with pytest.raises(ValueError, match=r"b\.png has \(height, width\) \(4, 12\), but its image"):
        check_ground_truth(cfg, "own_train")
    save(tmp_path / "labels/b.png", np.stack([own_data.labels()] * 3, -1))
    with pytest.raises(ValueError, match=r"b\.png is an image of mode RGB: a label map has one"):
        check_ground_truth(cfg, "own_train")


@pytest.mark.parametrize(
    ("id", "why", "text"),
    [
        (None, "is not valid JSON", "a.json is not valid JSON."),
        (None, "the label map has no image", "a.json: the label map has no image."),
        (None, "$.objects: expected array", "a.json: $.objects: expected array."),
        (3, "has no mask", "a.json, 3: has no mask."),
        (0, "the annotation has no mask", "a.json, 0: the annotation has no mask."),
    ],
)
def test_text_of_a_problem(id, why, text):
    findings = Findings()
    findings.problem("a.json", id, why)
    with pytest.raises(ValueError) as error:
        findings.raise_first("own")
    assert str(error.value) == f"Data set 'own' cannot be used: {text}"


def test_crowds_of_cvat(tmp_path):
    """CVAT marks every mask as a crowd, which training leaves out: a warning says so."""
    content = annotation_samples.coco_content([])
    own = own_data.instances(tmp_path)
    content |= {key: own[key] for key in ("images", "annotations", "categories")}
    rle = {"size": [8, 12], "counts": [40, 5, 51]}
    content["annotations"][0] |= {"iscrowd": 1, "segmentation": rle}
    findings = Findings()
    read(tmp_path, content, findings)
    assert not findings.problems
    assert [finding.why for finding in findings.warnings] == [
        "1 masks are marked as crowds (iscrowd 1) and are neither trained nor evaluated. CVAT and "
        "Datumaro mark every mask so; if each is one object, read the data with TYPE: coco"
    ]
    findings = Findings()
    read(tmp_path, content | {"licenses": []}, findings)
    assert not findings.warnings
