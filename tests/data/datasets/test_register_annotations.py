"""Other annotation formats as data sets: recognised, converted once, registered."""

import logging
import multiprocessing
import os
from pathlib import Path

import annotation_samples
import own_data
import pytest
from dataset_trees import photograph
from detectron2.data import DatasetCatalog, MetadataCatalog

from mask2former.data import register_annotations
from mask2former.data.check.images import ItemChecker
from mask2former.data.check.index import build_index
from mask2former.data.datasets import annotation_cache
from mask2former.data.datasets import register_annotations as module
from mask2former.data.datasets.custom_entries import register_entries
from mask2former.data.formats.annotation_formats import FORMATS
from mask2former.utils.files import WriteError

pytestmark = pytest.mark.usefixtures("empty_catalogs")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MASK2FORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entry(root: Path, name: str = "own_train", **others) -> dict:
    return {"NAME": name, "TYPE": "auto", "ROOT": str(root), "SPLIT": "train"} | others


def test_recognised_format(tmp_path, cache, caplog):
    own_data.yolo(tmp_path / "yolo")
    register_entries([entry(tmp_path / "yolo")])
    (line,) = [r.message for r in caplog.records if r.levelno == logging.INFO]
    assert "'own_train': TYPE yolo (" in line and "data.yaml" in line
    assert line.endswith("split train: 2 images, 3 objects, 3 classes: cat, dog, bird")
    metadata = MetadataCatalog.get("own_train")
    assert metadata.thing_classes == ["cat", "dog", "bird"]
    assert metadata.evaluator_type == "coco"
    first, second = DatasetCatalog.get("own_train")
    assert first["file_name"] == str(tmp_path / "yolo/images/train/train0.jpg")
    assert (first["height"], first["width"]) == (8, 12)
    assert [a["category_id"] for a in second["annotations"]] == [0, 1]
    assert second["annotations"][1]["bbox"] == [9, 4, 3, 4]
    assert not build_index("own_train").problems
    assert [file.suffix for file in cache.iterdir()] == [".json"]


@pytest.mark.parametrize("kind", list(FORMATS))
def test_every_format(tmp_path, cache, kind):
    annotation_samples.SAMPLES[kind](tmp_path / "data")
    register_entries([{"NAME": "one", "TYPE": "auto", "ROOT": str(tmp_path / "data")}])
    changes = {"CLASSES": ["plate", "mug"], "RENAME": {"cup": "mug"}, "SHARE": [0.0, 1.0]}
    register_entries([{"NAME": "two", "TYPE": kind, "ROOT": str(tmp_path / "data")} | changes])
    assert MetadataCatalog.get("one").thing_classes == annotation_samples.CLASSES
    assert MetadataCatalog.get("two").thing_classes == ["plate", "mug"]
    for name, ids in (("one", [0, 1]), ("two", [1, 0])):
        first, second = DatasetCatalog.get(name)
        assert sorted(a["category_id"] for a in first["annotations"]) == sorted(ids)
        assert second["annotations"] == []
        index = build_index(name)
        report = ItemChecker(index)(index.items[0])
        assert not index.problems and not report.problems
        assert report.pixels == {ids[0]: 32, ids[1]: 16}


def test_stated_format_and_python(tmp_path, cache):
    own_data.yolo(tmp_path / "yolo")
    register_entries([entry(tmp_path / "yolo", TYPE="yolo")])
    options = {"split": "val", "rename": {"bird": None}, "classes": ["dog", "cat"]}
    register_annotations("own_val", str(tmp_path / "yolo"), "yolo", **options)
    assert MetadataCatalog.get("own_val").thing_classes == ["dog", "cat"]
    with pytest.raises(ValueError, match="type 'yoli' is unknown; allowed: auto, .*yolo"):
        register_annotations("x", str(tmp_path / "yolo"), "yoli")


def test_shares_do_not_depend_on_the_split_read(tmp_path, cache):
    own_data.yolo(tmp_path / "yolo", train=20)
    entries = [
        entry(tmp_path / "yolo", "a", SHARE=[0.0, 0.5]),
        entry(tmp_path / "yolo", "b", SHARE=[0.5, 1.0]),
        entry(tmp_path / "yolo", "c"),
    ]
    register_entries(entries)
    a, b, c = ([r["file_name"] for r in DatasetCatalog.get(name)] for name in "abc")
    assert sorted(a + b) == sorted(c) and len(c) == 20 and a and b


def test_converted_once_and_again_after_changes(tmp_path, cache, monkeypatch):
    calls = []
    convert = module.coco_instances
    monkeypatch.setattr(module, "coco_instances", lambda *a: calls.append(1) or convert(*a))
    own_data.yolo(tmp_path / "yolo")

    def register(name: str, **options) -> int:
        register_entries([entry(tmp_path / "yolo", name, **options)])
        return len(calls)

    assert register("a") == register("b") == register("b") == 1
    assert register("c", SPLIT="val") == 2
    # What a training writes into the folder of the data is none of it.
    (tmp_path / "yolo/output").mkdir()
    (tmp_path / "yolo/output/training.lock").write_text("")
    (tmp_path / "yolo/output/metrics.json").write_text("{}")
    assert register("d") == 2
    (tmp_path / "yolo/labels/train/train0.txt").write_text("")
    assert register("e") == 3
    assert len(DatasetCatalog.get("e")[0]["annotations"]) == 0
    # In one process a data set stays as it was registered.
    assert register("a") == 3
    assert len(DatasetCatalog.get("a")[0]["annotations"]) == 1
    monkeypatch.setattr(annotation_cache, "_code_version", lambda: "other readers")
    assert register("f") == 4


def test_files_outside_the_root(tmp_path, cache):
    own_data.yolo(tmp_path / "elsewhere")
    yaml = (tmp_path / "elsewhere/data.yaml").read_text()
    (tmp_path / "root").mkdir()
    yaml = yaml.replace("path: .", f"path: {tmp_path}/elsewhere")
    (tmp_path / "root/data.yaml").write_text(yaml)
    register_entries([entry(tmp_path / "root", "a")])
    assert [len(r["annotations"]) for r in DatasetCatalog.get("a")] == [1, 2]
    (tmp_path / "elsewhere/labels/train/train0.txt").write_text("")
    register_entries([entry(tmp_path / "root", "b")])
    assert [len(r["annotations"]) for r in DatasetCatalog.get("b")] == [0, 2]
    photograph(tmp_path / "elsewhere/images/train/train2.jpg")
    register_entries([entry(tmp_path / "root", "c")])
    assert [len(r["annotations"]) for r in DatasetCatalog.get("c")] == [0, 2, 0]


def test_lists_and_new_folders_outside_the_root(tmp_path, cache):
    """A list of images, a folder of images v2, and a folder that is new, with ROOT a file."""
    own_data.yolo(tmp_path / "else/images/v")
    (tmp_path / "else/images/v/images").rename(tmp_path / "else/images/v/images_v2")
    data = tmp_path / "else/images/v"
    (data / "images_v2").rename(data / "images")
    (data / "list.txt").write_text("images/train/train0.jpg\n")
    names = "names: [cat, dog, bird]\n"
    (tmp_path / "a.yaml").write_text(f"path: {data}\ntrain: list.txt\n{names}")
    (tmp_path / "b.yaml").write_text(f"path: {data}\ntrain: images/train\n{names}")

    def counts(file: str, name: str) -> list[int]:
        register_entries([entry(tmp_path / file, name, TYPE="yolo")])
        return [len(r["annotations"]) for r in DatasetCatalog.get(name)]

    assert counts("a.yaml", "a1") == [1]
    (data / "list.txt").write_text("images/train/train0.jpg\nimages/train/train1.jpg\n")
    assert counts("a.yaml", "a2") == [1, 2]
    assert counts("b.yaml", "b1") == [1, 2]
    photograph(data / "images/train/more/train2.jpg")
    assert sorted(counts("b.yaml", "b2")) == [0, 1, 2]
    (data / "labels/train/more").mkdir()
    (data / "labels/train/more/train2.txt").write_text("0 0 0 1 0 1 1\n")
    assert sorted(counts("b.yaml", "b3")) == [1, 1, 2]


def test_shares_stay_when_a_folder_is_new(tmp_path, cache):
    """ROOT is a file: names are relative to its folder."""
    data = tmp_path / "yolo"
    own_data.yolo(data, train=20)
    (data / "images/train").rename(data / "images/a")
    (data / "labels/train").rename(data / "labels/a")
    (data / "data.yaml").write_text("train: images\nnames: [cat, dog, bird]\n")
    options = {"TYPE": "yolo", "SHARE": [0.0, 0.5]}
    register_entries([entry(data / "data.yaml", "before", **options)])
    photograph(data / "images/b/new.jpg")
    register_entries([entry(data / "data.yaml", "after", **options)])
    before, after = ({r["file_name"] for r in DatasetCatalog.get(n)} for n in ("before", "after"))
    assert before and after - {str(data / "images/b/new.jpg")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ROOT": "nowhere"}, r"'own_train': ROOT nowhere does not exist \(in /"),
        ({"IMAGE_ROOT": "nowhere"}, r"'own_train': IMAGE_ROOT nowhere is no folder"),
        ({"SPLIT": "test"}, r"'own_train': .*train.*val"),
        ({"CLASS_ATTRIBUTE": "type"}, "CLASS_ATTRIBUTE is for TYPE via, but this is yolo"),
        ({"MASK_ROOT": "."}, "MASK_ROOT is for TYPE mask_files, but this is yolo"),
        ({"MASK_ROOT": "nowhere"}, r"'own_train': MASK_ROOT nowhere is no folder"),
        ({"BOXES_AS_MASKS": 1}, "BOXES_AS_MASKS 1; it must be a bool"),
        ({"SPLIT": 3}, "SPLIT 3; it must be a str"),
        ({"RENAME": {"cet": "x"}}, "names the class 'cet'.* Did you mean 'cat'"),
        ({"TYPE": "boxes"}, "TYPE 'boxes'; allowed: panoptic, instance, semantic, auto, yolo"),
        ({"INSTANCES_JSON": "x"}, "'INSTANCES_JSON', which is unknown for type auto.*SHARE"),
        ({"CLASSES": ["cat"]}, "'own_train': .*/yolo: the data has the class 'dog', which"),
    ],
)
def test_wrong_entries(tmp_path, cache, change, message):
    own_data.yolo(tmp_path / "yolo")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        register_entries([entry(tmp_path / "yolo") | change])
    assert "own_train" not in DatasetCatalog


def test_objects_without_a_pixel_are_said(tmp_path, cache, caplog):
    own_data.yolo(tmp_path / "yolo")
    label = "0 0.5 0.5 0.5 0.5 0.5 0.5\n"
    (tmp_path / "yolo/labels/train/train0.txt").write_text(label)
    register_entries([entry(tmp_path / "yolo")])
    assert "1 objects cover no pixel, such as" in caplog.text and "train0.jpg" in caplog.text


def test_unknown_format(tmp_path, cache):
    photograph(tmp_path / "data/a.jpg")
    with pytest.raises(ValueError, match=r"'own_train': .*data holds no annotations of a known"):
        register_entries([entry(tmp_path / "data")])


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_cache_without_permission(tmp_path, cache):
    own_data.yolo(tmp_path / "yolo")
    cache.mkdir(mode=0o500)
    with pytest.raises(WriteError, match=f"Cannot write {cache}.*MASK2FORMER_CACHE names another"):
        register_entries([entry(tmp_path / "yolo")])


def test_cache_in_the_place_of_a_file(tmp_path, cache):
    own_data.yolo(tmp_path / "yolo")
    cache.write_text("")
    with pytest.raises(WriteError, match=f"Cannot write {cache}.*MASK2FORMER_CACHE names another"):
        register_entries([entry(tmp_path / "yolo")])
    assert "own_train" not in DatasetCatalog


def make_slowly(path: str, log: str) -> None:
    with open(log, "a") as file:
        file.write("made\n")
    Path(path).write_text("content")


def ask(log: str) -> None:
    for i in range(20):
        path = annotation_cache.cached("x", ".txt", [i], lambda p: make_slowly(p, log))
        assert Path(path).read_text() == "content"


def test_several_processes_at_once(tmp_path, cache):
    log = str(tmp_path / "log")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ask, args=(log,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(list(cache.iterdir())) == 20
    assert Path(log).read_text().count("made") == 20


def test_nothing_is_left_of_a_failed_conversion(cache):
    def fail(path: str) -> None:
        Path(path).write_text("half")
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        annotation_cache.cached("x", ".json", [], fail)
    assert list(cache.iterdir()) == []
