"""Checks of the data sets that Detectron2 registers: Cityscapes, ADE20K semantic, COCO and LVIS."""

import importlib
import importlib.util
import json
from pathlib import Path

import dataset_trees
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from PIL import Image

from mask2former.data.datasets.checks import check_builtin

SHARED_DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"

needs_cityscapesscripts = pytest.mark.skipif(
    importlib.util.find_spec("cityscapesscripts") is None, reason="cityscapesscripts is missing"
)


@pytest.fixture
def root(empty_catalogs, tmp_path) -> Path:
    """The folder below which Detectron2's data sets are registered."""
    register(tmp_path)
    return tmp_path


def register(root: Path) -> None:
    builtin.register_all_coco(str(root))
    builtin.register_all_lvis(str(root))
    builtin.register_all_ade20k(str(root))
    builtin.register_all_cityscapes(str(root))
    builtin.register_all_cityscapes_panoptic(str(root))


@pytest.fixture
def base(root) -> Path:
    return dataset_trees.cityscapes(root)


@pytest.fixture
def prepared(base, monkeypatch, capsys) -> Path:
    """Cityscapes after the official scripts."""
    if importlib.util.find_spec("cityscapesscripts") is None:
        pytest.skip("cityscapesscripts is missing")
    preparation = "cityscapesscripts.preparation"
    monkeypatch.setenv("CITYSCAPES_DATASET", str(base))
    importlib.import_module(f"{preparation}.createTrainIdLabelImgs").main()
    convert = importlib.import_module(f"{preparation}.createPanopticImgs").convert2panoptic
    convert(setNames=["train", "val"])
    return base


TASKS = ("instance_seg", "sem_seg", "panoptic")


class TestCityscapes:
    @pytest.mark.parametrize("task", TASKS)
    def test_not_downloaded(self, root, task):
        match = r"leftImg8bit/train/? of the images does not exist\. Download gtFine_trainvaltest"
        with pytest.raises(FileNotFoundError, match=match):
            check_builtin(f"cityscapes_fine_{task}_train")

    def test_not_prepared(self, base):
        """The error gives the command that prepares the data."""
        labels = r"aachen_000000_000019_gtFine_labelTrainIds\.png does not exist: 2 of 2 .*"
        for task in ("sem_seg", "panoptic"):
            command = rf"CITYSCAPES_DATASET={base} python -m .*createTrainIdLabelImgs`"
            with pytest.raises(FileNotFoundError, match=labels + command):
                check_builtin(f"cityscapes_fine_{task}_train")
        for split, city in (("train", "aachen"), ("val", "frankfurt")):
            folder = base / "gtFine" / split / city
            for path in list(folder.glob("*_labelIds.png")):
                copy = path.with_name(path.name.replace("labelIds", "labelTrainIds"))
                copy.write_bytes(path.read_bytes())
        check_builtin("cityscapes_fine_sem_seg_train")
        match = rf"cityscapes_panoptic_val\.json does not exist.*{base} python -m .*createPanopticI"
        with pytest.raises(FileNotFoundError, match=match):
            check_builtin("cityscapes_fine_panoptic_val")

    def test_prepared(self, prepared):
        for split in ("train", "val"):
            for task in TASKS:
                name = f"cityscapes_fine_{task}_{split}"
                check_builtin(name)
                assert len(DatasetCatalog.get(name)) == 2
        (segments,) = {
            tuple((s["category_id"], s["iscrowd"]) for s in record["segments_info"])
            for record in DatasetCatalog.get("cityscapes_fine_panoptic_train")
        }
        # road; a group of persons (trainId 11), which is a crowd; a car (13)
        assert segments == ((0, 0), (11, 1), (13, 0))
        annotations = DatasetCatalog.get("cityscapes_fine_instance_seg_val")[0]["annotations"]
        crowds = sorted((a["category_id"], bool(a["iscrowd"])) for a in annotations)
        assert crowds == [(0, True), (2, False)]
        record = DatasetCatalog.get("cityscapes_fine_sem_seg_val")[0]
        labels = np.array(Image.open(record["sem_seg_file_name"]))
        # The group has the label of persons; polygons include their border.
        assert [labels[0, 0], labels[5, 5], labels[5, 25]] == [0, 13, 11]

    @needs_cityscapesscripts
    @pytest.mark.parametrize("end", ["labelIds.png", "instanceIds.png", "polygons.json"])
    @pytest.mark.parametrize("task", ["instance_seg", "sem_seg"])
    def test_image_without_annotation(self, base, task, end):
        path = base / "gtFine" / "train" / "aachen" / f"aachen_000001_000019_gtFine_{end}"
        path.unlink()
        match = rf"{path} does not exist: 1 of 2 {end} of aachen are missing\. Download"
        with pytest.raises(FileNotFoundError, match=match):
            check_builtin(f"cityscapes_fine_{task}_train")

    def test_foreign_files(self, base):
        city = base / "leftImg8bit" / "train" / "aachen"
        (city / "Thumbs.db").write_bytes(b"")
        with pytest.raises(ValueError, match=rf"{city}/Thumbs\.db is not a Cityscapes image"):
            check_builtin("cityscapes_fine_sem_seg_train")
        for path in city.iterdir():
            path.unlink()
        with pytest.raises(FileNotFoundError, match=r"leftImg8bit/train/? holds no images"):
            check_builtin("cityscapes_fine_sem_seg_train")

    def test_inconsistent_panoptic_files(self, prepared):
        name, gt = "cityscapes_fine_panoptic_val", prepared / "gtFine"
        json_file = gt / "cityscapes_panoptic_val.json"
        content = json.loads(json_file.read_text())
        odd = content["annotations"].pop()
        json_file.write_text(json.dumps(content))
        match = rf"Image {odd['image_id']} has no annotation in {json_file} \(1 such images\)\. Run"
        with pytest.raises(ValueError, match=match):
            check_builtin(name)
        content["annotations"].append(odd | {"image_id": "zurich"})
        json_file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"{json_file}, zurich: the JSON does not list the"):
            check_builtin(name)
        json_file.write_text("{}")
        with pytest.raises(ValueError, match=rf"{json_file} has no list 'annotations'"):
            check_builtin(name)
        json_file.write_text(json.dumps({"annotations": [odd]}))
        (gt / "cityscapes_panoptic_val" / odd["file_name"]).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{odd['file_name']} does not exist: 1 of 1"):
            check_builtin(name)

    def test_path_with_a_dot(self, empty_catalogs, tmp_path):
        """Detectron2 would look for `_labelTrainIds.png` in the wrong place."""
        root = tmp_path / "v1.0"
        dataset_trees.cityscapes(root)
        register(root)
        with pytest.raises(ValueError, match=r"v1\.0/cityscapes/.* must have no dot"):
            check_builtin("cityscapes_fine_panoptic_train")

    def test_missing_package(self, base, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match="`pip install cityscapesscripts`"):
            check_builtin("cityscapes_fine_instance_seg_train")

    @pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no real images in {SHARED_DATA}")
    def test_real_panoptic(self, empty_catalogs):
        register(SHARED_DATA)
        check_builtin("cityscapes_fine_panoptic_train")
        records = DatasetCatalog.get("cityscapes_fine_panoptic_train")
        assert len(records) == 8
        assert all(Path(record["sem_seg_file_name"]).is_file() for record in records)
        # The sample has no polygons.
        match = r"_000000_000019_gtFine_polygons\.json does not exist: 8 of 8"
        with pytest.raises(FileNotFoundError, match=match):
            check_builtin("cityscapes_fine_sem_seg_train")


class TestOthers:
    def test_ade20k_semantic(self, root, prepare):
        command = r"Run `python datasets/prepare_ade20k_sem_seg\.py`"
        base = dataset_trees.ade20k(root)
        with pytest.raises(FileNotFoundError, match=rf"detectron2/training .*exist\. {command}"):
            check_builtin("ade20k_sem_seg_train")
        prepare("prepare_ade20k_sem_seg")
        check_builtin("ade20k_sem_seg_train")
        (base / "annotations_detectron2" / "training" / "ADE_train_00000002.png").unlink()
        with pytest.raises(FileNotFoundError, match=rf"_00000002\.png .*1 of 2 .*{command}"):
            check_builtin("ade20k_sem_seg_train")

    @pytest.mark.parametrize(
        ("name", "file", "page"),
        [
            ("coco_2017_train", "coco/annotations/instances_train2017.json", "cocodataset"),
            ("coco_2017_val_panoptic", "coco/annotations/panoptic_val2017.json", "cocodataset"),
            ("lvis_v1_train", "lvis/lvis_v1_train.json", "lvisdataset"),
        ],
    )
    def test_coco_and_lvis(self, root, monkeypatch, name, file, page):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n: True if n == "lvis" else find_spec(n)
        )
        with pytest.raises(FileNotFoundError, match=rf"{file} does not exist\. .*{page}"):
            check_builtin(name)
        dataset_trees.write_json(root / file, {})
        images = MetadataCatalog.get(name).image_root
        with pytest.raises(FileNotFoundError, match=rf"Folder {images} of the images"):
            check_builtin(name)
        Path(images).mkdir(parents=True)
        if "panoptic" in name:
            with pytest.raises(FileNotFoundError, match=r"panoptic_val2017 of the panoptic PNGs"):
                check_builtin(name)
            (root / "coco" / "panoptic_val2017").mkdir()
        with pytest.raises(ValueError, match=rf"{name}' cannot be used: .*{file} has no list '"):
            check_builtin(name)

    def test_lvis_package(self, root, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match="'lvis_v1_val' .* `pip install lvis`"):
            check_builtin("lvis_v1_val")

    @pytest.mark.parametrize("name", ["shapes_train", "voc_2007_val", "lvis_v0.5_val", "unknown"])
    def test_other_names_are_ignored(self, empty_catalogs, name):
        check_builtin(name)
        assert name not in MetadataCatalog.list()
