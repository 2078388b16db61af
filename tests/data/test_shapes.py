"""The Shapes data set: prepare_shapes.py writes consistent and reproducible files; registration."""

import importlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools.coco import COCO

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--num-train", "8", "--num-val", "4", "--size", "64"]


@pytest.fixture(scope="module")
def prepare_shapes():
    sys.path.insert(0, str(ROOT / "datasets"))
    yield importlib.import_module("prepare_shapes")
    sys.path.remove(str(ROOT / "datasets"))


@pytest.fixture(scope="module")
def shapes(prepare_shapes, tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets") / "shapes"
    prepare_shapes.main(["--output", str(root), *SMALL])
    return root


def read_files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def read_json(root: Path, name: str) -> dict:
    return json.loads((root / "annotations" / f"{name}.json").read_text())


def segment_map(root: Path, split: str, annotation: dict) -> np.ndarray:
    image = np.array(Image.open(root / f"panoptic_{split}" / annotation["file_name"])).astype(int)
    return image @ [1, 256, 65536]


def test_layout(shapes):
    names = {name.rsplit("/", 1)[0] for name in read_files(shapes)}
    folders = ["images/{}", "panoptic_{}", "panoptic_semseg_{}"]
    assert names == {f.format(s) for f in folders for s in ("train", "val")} | {"annotations"}
    assert len(read_json(shapes, "panoptic_train")["images"]) == 8
    assert len(read_json(shapes, "instances_val")["images"]) == 4
    # The temporary folder is removed.
    assert [p.name for p in shapes.parent.iterdir()] == ["shapes"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_panoptic_annotations_agree_with_pngs(shapes, split):
    content = read_json(shapes, f"panoptic_{split}")
    class_of = {c["id"]: i for i, c in enumerate(content["categories"])}
    sizes = {i["id"]: (i["width"], i["height"]) for i in content["images"]}
    assert all(48 <= side <= 80 for size in sizes.values() for side in size)
    for annotation in content["annotations"]:
        name = annotation["file_name"]
        with Image.open(shapes / "images" / split / name.replace(".png", ".jpg")) as image:
            assert image.size == sizes[annotation["image_id"]] and image.mode == "RGB"
        segments = segment_map(shapes, split, annotation)
        semantic = np.array(Image.open(shapes / f"panoptic_semseg_{split}" / name))
        assert semantic.shape == segments.shape == sizes[annotation["image_id"]][::-1]
        assert (semantic[segments == 0] == 255).all()
        assert {s["id"] for s in annotation["segments_info"]} == set(np.unique(segments)) - {0}
        for segment in annotation["segments_info"]:
            mask = segments == segment["id"]
            assert segment["area"] == mask.sum()
            x, y, width, height = segment["bbox"]
            assert mask[y : y + height, x : x + width].sum() == mask.sum()
            assert mask[y].any() and mask[y + height - 1].any()
            assert mask[:, x].any() and mask[:, x + width - 1].any()
            assert (semantic[mask] == class_of[segment["category_id"]]).all()
        stuff = [s["category_id"] for s in annotation["segments_info"] if s["category_id"] > 100]
        assert len(stuff) == len(set(stuff)), "a stuff class has two segments"


@pytest.mark.parametrize("split", ["train", "val"])
def test_instances_equal_panoptic_things(shapes, split):
    panoptic = read_json(shapes, f"panoptic_{split}")
    coco = COCO(str(shapes / "annotations" / f"instances_{split}.json"))
    for annotation in panoptic["annotations"]:
        segments = segment_map(shapes, split, annotation)
        things = [s for s in annotation["segments_info"] if s["category_id"] < 100]
        instances = coco.loadAnns(coco.getAnnIds(annotation["image_id"]))
        keys = ("category_id", "iscrowd", "area", "bbox")
        assert [[s[k] for k in keys] for s in things] == [[s[k] for k in keys] for s in instances]
        for thing, instance in zip(things, instances, strict=True):
            mask = coco.annToMask(instance).astype(bool)
            np.testing.assert_array_equal(mask, segments == thing["id"])


def test_rare_cases(shapes):
    annotations = read_json(shapes, "panoptic_train")["annotations"]
    instances = read_json(shapes, "instances_train")["annotations"]
    assert {s["category_id"] > 100 for s in annotations[1]["segments_info"]} == {True}
    assert annotations[2]["segments_info"] == []
    assert any(s["iscrowd"] for s in annotations[3]["segments_info"])
    kinds = Counter((type(a["segmentation"]), a["iscrowd"]) for a in instances)
    assert kinds[list, 0] > 0 and kinds[dict, 0] > 0 and kinds[dict, 1] > 0 and kinds[list, 1] == 0
    assert all(isinstance(a["segmentation"]["counts"], list) for a in instances if a["iscrowd"]), (
        "a crowd is not an uncompressed RLE"
    )
    assert all(isinstance(a["segmentation"], dict) for a in instances if a["category_id"] == 9), (
        "a ring, which has a hole, is a polygon"
    )


def test_polygon_by_hand(prepare_shapes):
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:4] = True
    polygon = np.reshape(prepare_shapes.trace_polygon(mask), (-1, 2)).tolist()
    assert sorted(polygon) == [[1, 1], [1, 3], [4, 1], [4, 3]]
    mask[1, 1] = False  # an L
    polygon = np.reshape(prepare_shapes.trace_polygon(mask), (-1, 2)).tolist()
    assert sorted(polygon) == [[1, 2], [1, 3], [2, 1], [2, 2], [4, 1], [4, 3]]
    assert prepare_shapes.bounding_box(mask) == [1, 1, 3, 2]
    mask[:] = True
    polygon = np.reshape(prepare_shapes.trace_polygon(mask), (-1, 2)).tolist()
    assert sorted(polygon) == [[0, 0], [0, 4], [5, 0], [5, 4]]
    mask[1, 2] = False
    assert prepare_shapes.trace_polygon(mask) is None  # a hole


def test_crowd_run_lengths_by_hand(prepare_shapes):
    mask = np.array([[False, True], [True, True]])
    # Columns from top to bottom: 0 1 | 1 1.
    assert prepare_shapes.encode_mask(mask, 1) == {"size": [2, 2], "counts": [1, 3]}
    # The first run counts zeros, even if there are none.
    assert prepare_shapes.encode_mask(~mask, 1) == {"size": [2, 2], "counts": [0, 1, 3]}


def test_reproducible_by_seed(prepare_shapes, shapes, tmp_path):
    prepare_shapes.main(["--output", str(tmp_path / "again"), *SMALL])
    assert read_files(tmp_path / "again") == read_files(shapes)
    few = ["--num-train", "2", "--num-val", "1", "--size", "64"]
    prepare_shapes.main(["--output", str(tmp_path / "fewer"), *few])
    prepare_shapes.main(["--output", str(tmp_path / "other"), *few, "--seed", "1"])
    fewer, other = read_files(tmp_path / "fewer"), read_files(tmp_path / "other")
    images = [name for name in fewer if name.endswith("g")]
    assert len(images) == 9
    assert all(read_files(shapes)[name] == fewer[name] for name in images)
    assert all(other[name] != fewer[name] for name in images if name.startswith("images"))


def test_complete_data_set_is_kept_unless_forced(prepare_shapes, shapes, tmp_path, capsys):
    root = tmp_path / "shapes"
    few = ["--output", str(root), "--num-train", "1", "--num-val", "1", "--size", "48"]
    prepare_shapes.main(few)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    prepare_shapes.main(few)
    assert "nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    with pytest.raises(SystemExit, match="add --force"):
        prepare_shapes.main([*few, "--seed", "5"])
    prepare_shapes.main([*few, "--seed", "5", "--force"])
    assert read_json(root, "panoptic_train")["info"]["seed"] == 5


def test_foreign_folder_is_never_replaced(prepare_shapes, tmp_path):
    (tmp_path / "precious.txt").write_text("data")
    with pytest.raises(SystemExit, match="does not contain Shapes"):
        prepare_shapes.main(["--output", str(tmp_path), *SMALL, "--force"])
    assert (tmp_path / "precious.txt").read_text() == "data"


def test_interrupted_run_leaves_nothing(prepare_shapes, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_shapes, "encode_mask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_shapes.main(["--output", str(tmp_path / "shapes"), *SMALL])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [("--num-train", "0"), ("--num-val", "0"), ("--size", "8"), ("--seed", "-1")],
)
def test_bad_options(prepare_shapes, option, value, capsys):
    with pytest.raises(SystemExit):
        prepare_shapes.parse_args([option, value])
    assert f"{option} must be at least" in capsys.readouterr().err


def registered(root: Path, monkeypatch):
    """Register the Shapes data set at `root` in empty catalogues."""
    from mask2former.data.datasets import register_shapes

    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", {})
    register_shapes.register_all_shapes(str(root.parent))
    return register_shapes


def test_registered_records(shapes, monkeypatch):
    registered(shapes, monkeypatch)
    instances = DatasetCatalog.get("shapes_train")
    panoptic = DatasetCatalog.get("shapes_train_panoptic")
    semantic = DatasetCatalog.get("shapes_train_sem_seg")
    assert len(instances) == len(panoptic) == len(semantic) == 8
    for instance, pan, sem in zip(instances, panoptic, semantic, strict=True):
        assert instance["file_name"] == pan["file_name"] == sem["file_name"]
        assert instance["image_id"] == pan["image_id"]
        assert pan["sem_seg_file_name"] == sem["sem_seg_file_name"]
        for key in ("file_name", "pan_seg_file_name", "sem_seg_file_name"):
            assert Path(pan[key]).is_file()
        things = [s["category_id"] for s in pan["segments_info"] if s["isthing"]]
        assert things == [a["category_id"] for a in instance["annotations"]]
        assert set(things) <= set(range(6))
        assert {s["category_id"] for s in pan["segments_info"] if not s["isthing"]} <= {6, 7, 8, 9}


def test_registered_metadata(shapes, monkeypatch):
    registered(shapes, monkeypatch)
    things = ["circle", "square", "triangle", "star", "ring", "cross"]
    types = {"": "coco", "_panoptic": "coco_panoptic_seg", "_sem_seg": "sem_seg"}
    for split in ("train", "val"):
        for suffix, evaluator_type in types.items():
            metadata = MetadataCatalog.get(f"shapes_{split}{suffix}")
            assert metadata.evaluator_type == evaluator_type
            if suffix != "_sem_seg":
                assert metadata.thing_classes == things
                assert metadata.thing_dataset_id_to_contiguous_id == {
                    1: 0, 3: 1, 4: 2, 7: 3, 9: 4, 12: 5,
                }  # fmt: skip
            if suffix:
                assert metadata.stuff_classes == [*things, "sky", "grass", "water", "brick"]
                assert metadata.stuff_dataset_id_to_contiguous_id[110] == 9
                assert metadata.ignore_label == 255


def test_registering_again_changes_nothing(shapes, monkeypatch, tmp_path):
    module = registered(shapes, monkeypatch)
    module.register_all_shapes(str(tmp_path))
    assert len(DatasetCatalog.get("shapes_val")) == 4
    assert MetadataCatalog.get("shapes_val").json_file.startswith(str(shapes))


@pytest.mark.parametrize("name", ["shapes_train", "shapes_val_panoptic", "shapes_val_sem_seg"])
def test_error_of_missing_data_set_gives_the_command(name, monkeypatch, tmp_path):
    registered(tmp_path / "shapes", monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"python datasets/prepare_shapes\.py"):
        DatasetCatalog.get(name)


def test_categories_are_ordered():
    categories = json.loads((ROOT / "mask2former/data/datasets/categories/shapes.json").read_text())
    # load_coco_json orders classes by id, panoptic loaders put things first.
    ids = [c["id"] for c in categories]
    assert ids == sorted(ids)
    assert [c["isthing"] for c in categories] == [1] * 6 + [0] * 4
