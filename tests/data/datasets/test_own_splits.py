"""Splits of one file or folder, and changed classes, for all three tasks of your own data."""

import json
import re
from pathlib import Path

import own_data
import pytest
from dataset_trees import save, write_json
from detectron2.data import DatasetCatalog, MetadataCatalog

from mask2former.data.check.images import ItemChecker
from mask2former.data.check.index import build_index
from mask2former.data.datasets.custom_entries import register_entries
from mask2former.evaluation.ground_truth import read_coco, read_panoptic_gt

pytestmark = pytest.mark.usefixtures("empty_catalogs")

NUM_IMAGES = 20


def many(kind: str, root: Path) -> dict:
    """An entry for data with 20 images."""
    getattr(own_data, {"instance": "instances"}.get(kind, kind))(root)
    if kind == "panoptic":
        own_data.instances(root)
    names = own_data.many_images(root, NUM_IMAGES - len(own_data.STEMS))
    for name in names:
        if kind == "semantic":
            save(root / f"labels/{name[:2]}.png", own_data.labels())
    for file in ("instances.json", "panoptic.json"):
        if not (root / file).exists():
            continue
        content = json.loads((root / file).read_text())
        first = [a for a in content["annotations"] if a["image_id"] == 1]
        for i, name in enumerate(names, 100):
            content["images"].append(content["images"][0] | {"id": i, "file_name": name})
            for j, annotation in enumerate(first):
                new = annotation | {"image_id": i}
                if file == "panoptic.json":
                    new["file_name"] = f"{name[:2]}.png"
                    png = (root / "panoptic/a.png").read_bytes()
                    (root / "panoptic" / new["file_name"]).write_bytes(png)
                else:
                    new["id"] = 1000 * i + j
                content["annotations"].append(new)
        write_json(root / file, content)
    if kind == "panoptic":
        return own_data.entry(kind, root, INSTANCES_JSON=str(root / "instances.json"))
    return own_data.entry(kind, root)


def files(name: str) -> list[str]:
    return [record["file_name"] for record in DatasetCatalog.get(name)]


@pytest.mark.parametrize("kind", ["instance", "panoptic", "semantic"])
def test_shares_of_one_source(tmp_path, kind):
    entry = many(kind, tmp_path)
    train, val = {"SHARE": [0.0, 0.7]}, {"SHARE": [0.7, 1.0], "NAME": "own_val"}
    register_entries([entry | train, entry | val, entry | {"NAME": "all"}])
    parts = [files("own_train"), files("own_val")]
    assert sorted(parts[0] + parts[1]) == sorted(files("all"))
    assert len(files("all")) == NUM_IMAGES and min(map(len, parts)) > 0
    train, val, whole = (MetadataCatalog.get(n).as_dict() for n in ("own_train", "own_val", "all"))
    key = "thing_classes" if kind == "instance" else "stuff_classes"
    assert train[key] == val[key] == whole[key]
    # What the evaluators and the check read has the same images.
    for name, part in zip(("own_train", "own_val"), parts, strict=True):
        metadata = MetadataCatalog.get(name)
        if kind != "semantic":
            coco = read_coco(metadata.json_file, metadata.image_root, name)
            assert len(coco.imgs) == len(part) and len(coco.anns) == 2 * len(part)
        if kind == "panoptic":
            assert len(read_panoptic_gt(metadata).annotations) == len(part)
        index = build_index(name)
        assert not index.problems
        assert [item.file_name for item in index.items] == part
        assert not ItemChecker(index)(index.items[0]).problems
        # The files of the other split belong there.
        assert not index.folders


@pytest.mark.parametrize("kind", ["instance", "panoptic", "semantic"])
def test_list_of_images(tmp_path, kind):
    entry = many(kind, tmp_path)
    (tmp_path / "val.txt").write_text("b\nimages/03.jpg\n")
    register_entries([entry | {"IMAGE_LIST": str(tmp_path / "val.txt")}])
    assert [Path(file).name for file in files("own_train")] == (
        ["03.jpg", "b.jpg"] if kind == "semantic" else ["b.jpg", "03.jpg"]
    )
    (tmp_path / "val.txt").write_text("b\nzz.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"'listed'.*names 'zz\.jpg', which is no image"):
        register_entries([entry | {"NAME": "listed", "IMAGE_LIST": str(tmp_path / "val.txt")}])
        files("listed")


def test_renamed_instances(tmp_path):
    own_data.instances(tmp_path)
    entry = own_data.entry("instance", tmp_path)
    register_entries([entry | {"RENAME": {"plate": "dish", "cup": None}}])
    metadata = MetadataCatalog.get("own_train")
    # Ids stay, so that predictions fit the source.
    assert metadata.thing_dataset_id_to_contiguous_id == {7: 0}
    assert metadata.thing_classes == ["dish"]
    records = DatasetCatalog.get("own_train")
    assert [len(record["annotations"]) for record in records] == [1, 1, 1]
    assert records[0]["annotations"][0]["bbox"] == [4, 0, 4, 4]
    register_entries([entry | {"NAME": "merged", "RENAME": {"plate": "cup"}}])
    assert MetadataCatalog.get("merged").thing_classes == ["cup"]
    assert [a["category_id"] for a in DatasetCatalog.get("merged")[0]["annotations"]] == [0, 0]


def test_left_out_objects_are_counted(tmp_path, caplog):
    own_data.instances(tmp_path)
    entry = own_data.entry("instance", tmp_path)
    with caplog.at_level("INFO"):
        register_entries([entry | {"RENAME": {"plate": None}, "SHARE": [0.0, 1.0]}])
    assert "'own_train': RENAME leaves out class 'plate': 3 objects are background" in caplog.text
    assert "SHARE [0, 1], SHARE_SEED 0: 3 of 3 images, 3 objects" in caplog.text


def test_order_of_classes(tmp_path):
    own_data.instances(tmp_path)
    own_data.panoptic(tmp_path)
    register_entries(
        [
            own_data.entry("instance", tmp_path, "one", CLASSES=["fork", "plate", "cup"]),
            own_data.entry("panoptic", tmp_path, "two", CLASSES=["table", "plate", "cup"]),
        ]
    )
    assert MetadataCatalog.get("one").thing_classes == ["fork", "plate", "cup"]
    assert [a["category_id"] for a in DatasetCatalog.get("one")[0]["annotations"]] == [2, 1]
    # Things come before stuff.
    assert MetadataCatalog.get("two").stuff_classes == ["plate", "cup", "table"]
    segments = DatasetCatalog.get("two")[0]["segments_info"]
    assert [segment["category_id"] for segment in segments] == [1, 0, 2]


def test_merged_things_of_panoptic_data(tmp_path):
    entry = many("panoptic", tmp_path)
    register_entries([entry | {"RENAME": {"plate": "crockery", "cup": "crockery"}}])
    metadata = MetadataCatalog.get("own_train")
    assert metadata.stuff_classes == ["crockery", "table"]
    assert metadata.thing_classes == ["crockery"]
    coco = read_coco(metadata.json_file, metadata.image_root, "own_train")
    assert {a["category_id"] for a in coco.anns.values()} == {3}
    segments = DatasetCatalog.get("own_train")[0]["segments_info"]
    assert [segment["category_id"] for segment in segments] == [0, 0, 1]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("panoptic", {"RENAME": {"cup": None}}, "leaves out cup, but each pixel of the panoptic"),
        ("panoptic", {"RENAME": {"cup": "table"}}, "merges cup, table, but only things can be"),
        ("panoptic", {"CLASSES": ["cup", "plate", "table", "x"]}, "'x', which is no class of the"),
        ("instance", {"RENAME": {"plat": "x"}}, r"'own_train': .*'plat'.*Did you mean 'plate'"),
        ("instance", {"CLASSES": ["cup"]}, "the data has the class 'plate', which CLASSES does"),
        ("instance", {"RENAME": {"cup": 3}}, "RENAME has 'cup': 3; it maps"),
        ("instance", {"RENAME": [1]}, r"has RENAME \[1\]; it must be a mapping of class names"),
        ("instance", {"SHARE": [0.9, 0.1]}, "SHARE is .* must be .low, high. with"),
        ("instance", {"SHARE": 0.9}, r"SHARE 0\.9; it must be a list of two numbers"),
        ("instance", {"SHARE": ["a", 1]}, "list of two numbers, .* not 'a'"),
        ("instance", {"SHARE": [0, 1e-9]}, "holds none of the 3 images"),
        ("instance", {"SHARE_SEED": 3}, "SHARE_SEED is 3, but there is no SHARE"),
        ("instance", {"SHARE_SEED": 0.5}, "SHARE_SEED 0.5; it must be a int"),
        ("semantic", {"RENAME": {"cup": "x"}, "IGNORE_LABELS": 3}, "IGNORE_LABELS 3; it must be"),
        ("semantic", {"VALUE_MAP": ["a"]}, "VALUE_MAP .'a'.; it must be a mapping"),
        ("semantic", {"IMAGE_EXT": []}, "image_ext lists no extension, such as 'png'"),
        ("semantic", {"IMAGE_EXT": [3]}, "IMAGE_EXT .3.; it must be a str or list of str, not 3"),
        ("semantic", {"RENAME": {"cupp": "x"}}, "'cupp', which the data does not .*mean 'cup'"),
    ],
)
def test_wrong_changes(tmp_path, kind, change, message):
    getattr(own_data, {"instance": "instances"}.get(kind, kind))(tmp_path)
    with pytest.raises(ValueError, match=message):
        register_entries([own_data.entry(kind, tmp_path) | change])
    assert "own_train" not in DatasetCatalog


def test_semantic_labels_do_not_follow_a_renamed_panoptic_class(tmp_path):
    own_data.panoptic(tmp_path)
    own_data.semantic(tmp_path)
    entry = own_data.entry("panoptic", tmp_path, SEM_SEG_ROOT=str(tmp_path / "labels"))
    with pytest.raises(ValueError, match="SEM_SEG_ROOT has labels of the classes as they are"):
        register_entries([entry | {"RENAME": {"cup": "mug"}}])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"SHARE": [0.7, 1.0]}, r"SHARE \[0, 0\.8\] and \[0\.7, 1\] overlap"),
        ({"SHARE": [0.8, 1.0], "SHARE_SEED": 1}, "have different SHARE_SEED"),
        ({"SHARE": [0.8, 1.0]}, None),
        ({}, r"SHARE \[0, 0\.8\] and \[0, 1\] overlap"),
        ({"SHARE": [0.7, 1.0], "IMAGE_ROOT": "./"}, r"SHARE \[0, 0\.8\] and \[0\.7, 1\] overlap"),
    ],
)
def test_images_in_two_splits(tmp_path, caplog, other, message):
    entry = many("semantic", tmp_path)
    if "IMAGE_ROOT" in other:  # another spelling of the folder
        other = other | {"IMAGE_ROOT": f"{entry['IMAGE_ROOT']}/../{Path(entry['IMAGE_ROOT']).name}"}
    register_entries([entry | {"SHARE": [0.0, 0.8]}, entry | {"NAME": "own_val"} | other])
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (message is not None)
    if message is not None:
        assert "'own_train' and 'own_val' are of one source" in warnings[0]
        assert re.search(message, warnings[0])


def test_damaged_source(tmp_path):
    content = own_data.instances(tmp_path)
    content["annotations"][0]["category_id"] = 4
    write_json(tmp_path / "instances.json", content)
    message = r"'own_train' .*instances\.json, annotation 10: .*category_id 4, which is not one"
    with pytest.raises(ValueError, match=message):
        register_entries([own_data.entry("instance", tmp_path, SHARE=[0.0, 1.0])])


def test_images_without_name_size_or_annotation(tmp_path):
    content = own_data.instances(tmp_path)
    image = content["images"][0]
    del image["width"], image["height"]
    content["images"][1] = {"id": 2, "coco_url": "http://images.cocodataset.org/b.jpg"}
    content["annotations"] = content["annotations"][:1]
    write_json(tmp_path / "instances.json", content)
    register_entries([own_data.entry("instance", tmp_path, SHARE=[0.0, 1.0])])
    records = DatasetCatalog.get("own_train")
    assert [(Path(r["file_name"]).name, r["height"], r["width"]) for r in records] == [
        ("a.jpg", 8, 12),
        ("b.jpg", 8, 12),
        ("c.jpg", 8, 12),
    ]
    assert [len(record["annotations"]) for record in records] == [1, 0, 0]
