"""Errors of the loaders when files are missing or do not match."""

import json
from pathlib import Path

import dataset_trees
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from mask2former.data.datasets import (
    loading,
    register_ade20k_full,
    register_ade20k_instance,
    register_ade20k_panoptic,
    register_mapillary_vistas,
    register_mapillary_vistas_panoptic,
)

LAYOUT = r"DETECTRON2_DATASETS names .*datasets/README\.md shows the layout"


def test_class_list_of_the_wrong_length():
    with pytest.raises(
        ValueError, match=r"ade20k_150\.json lists 150 classes, but the data set has 151"
    ):
        loading.read_categories("ade20k_150", 151)


# ---- semantic ----


class TestSemantic:
    @pytest.fixture
    def base(self, empty_catalogs, tmp_path, prepare) -> Path:
        base = dataset_trees.ade20k_full(tmp_path)
        prepare("prepare_ade20k_full_sem_seg")
        register_ade20k_full.register_all_ade20k_full(str(tmp_path))
        return base

    def test_records(self, base):
        records = DatasetCatalog.get("ade20k_full_sem_seg_train")
        assert [sorted(record) for record in records] == [["file_name", "sem_seg_file_name"]] * 2
        assert records[1]["file_name"].endswith("training/ADE_train_00000002.jpg")
        assert records[1]["sem_seg_file_name"].endswith("training/ADE_train_00000002.tif")

    @pytest.mark.parametrize(
        ("kind", "what"), [("images", "images"), ("annotations", "label maps")]
    )
    def test_missing_folder(self, base, kind, what):
        folder = base / f"{kind}_detectron2" / "training"
        folder.rename(base / "elsewhere")
        match = rf"Folder {folder} of the {what} does not exist\. Run `python .*full.*{LAYOUT}"
        with pytest.raises(FileNotFoundError, match=match):
            DatasetCatalog.get("ade20k_full_sem_seg_train")

    @pytest.mark.parametrize(
        ("file", "what"),
        [
            ("annotations_detectron2/training/ADE_train_00000002.tif", "label maps"),
            ("images_detectron2/training/ADE_train_00000002.jpg", "images"),
        ],
    )
    def test_image_without_annotation(self, base, file, what):
        """Detectron2 would train on the other images."""
        (base / file).unlink()
        match = rf"{base / file} does not exist: 1 of 2 {what} are missing\. Run `python"
        with pytest.raises(FileNotFoundError, match=match):
            DatasetCatalog.get("ade20k_full_sem_seg_train")

    def test_no_images(self, base):
        for kind in ("images", "annotations"):
            for file in (base / f"{kind}_detectron2" / "training").iterdir():
                file.unlink()
        with pytest.raises(FileNotFoundError, match=r"images_detectron2/training holds no \.jpg"):
            DatasetCatalog.get("ade20k_full_sem_seg_train")


def test_vistas_missing(empty_catalogs, tmp_path):
    register_mapillary_vistas.register_all_mapillary_vistas(str(tmp_path))
    register_mapillary_vistas_panoptic.register_all_mapillary_vistas_panoptic(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"training/images .*Vistas v1\.2 \(not v2\.0\)"):
        DatasetCatalog.get("mapillary_vistas_sem_seg_train")
    with pytest.raises(FileNotFoundError, match=r"panoptic_2018\.json does not exist.* v1\.2"):
        DatasetCatalog.get("mapillary_vistas_panoptic_train")


# ---- instances ----


class TestInstances:
    @pytest.fixture
    def base(self, empty_catalogs, tmp_path, prepare) -> Path:
        base = dataset_trees.ade20k(tmp_path)
        prepare("prepare_ade20k_ins_seg")
        register_ade20k_instance.register_all_ade20k_instance(str(tmp_path))
        return base

    @pytest.fixture
    def json_file(self, base) -> Path:
        return base / "ade20k_instance_train.json"

    def load(self):
        return DatasetCatalog.get("ade20k_instance_train")

    def test_missing_json(self, json_file):
        json_file.unlink()
        match = rf"Instance JSON {json_file} does not exist\. Run `python .*_ins_seg.*{LAYOUT}"
        with pytest.raises(FileNotFoundError, match=match):
            self.load()

    def test_missing_images(self, base):
        images = base / "images" / "training"
        (images / "ADE_train_00000001.jpg").unlink()
        match = r"training/ADE_train_00000001\.jpg does not exist: 1 of 2 images are missing"
        with pytest.raises(FileNotFoundError, match=match):
            self.load()
        images.rename(base / "elsewhere")
        with pytest.raises(FileNotFoundError, match=rf"Folder {images} of the images does not"):
            self.load()

    def test_damaged_json(self, json_file):
        content = json.loads(json_file.read_text())
        bed, *others = content["categories"]
        one_less = content | {"categories": others}
        renamed = content | {"categories": [bed | {"name": "cot"}, *others]}
        renumbered = content | {"categories": [bed | {"id": 3}, *others]}
        incomplete = json.loads(json_file.read_text())
        del incomplete["annotations"][0]["image_id"]
        repeated = json.loads(json_file.read_text())
        repeated["annotations"][1]["id"] = 1
        for text, reason in (
            (json.dumps(one_less), "lists 99 categories, but 100 are registered"),
            (json.dumps(renamed), "7: the category is 'cot' here, but registered as 'bed'"),
            (json.dumps(renumbered), "3: the category 'bed' is not registered under this id"),
            (json.dumps(repeated), "1: annotations: id 1 occurs more than once"),
            (json.dumps(incomplete), r"1: an annotation has no 'image_id' \(\$.annotations\[0\]\)"),
            (json_file.read_text()[:500], "is not valid JSON: .*"),
        ):
            json_file.write_text(text)
            match = rf"{json_file},? {reason}\..* Run `python .*_ins_seg"
            with pytest.raises(ValueError, match=match):
                self.load()


# ---- panoptic ----


class TestPanoptic:
    @pytest.fixture
    def base(self, empty_catalogs, tmp_path, prepare) -> Path:
        base = dataset_trees.ade20k(tmp_path)
        prepare("prepare_ade20k_sem_seg")
        prepare("prepare_ade20k_pan_seg")
        register_ade20k_panoptic.register_all_ade20k_panoptic(str(tmp_path))
        return base

    @pytest.fixture
    def json_file(self, base) -> Path:
        return base / "ade20k_panoptic_train.json"

    @pytest.fixture
    def content(self, json_file) -> dict:
        return json.loads(json_file.read_text())

    def load(self, split: str = "train") -> list[dict]:
        return DatasetCatalog.get(f"ade20k_panoptic_{split}")

    def test_missing_json(self, json_file):
        json_file.unlink()
        match = rf"Panoptic JSON {json_file} does not exist\. Run `python .*_pan_seg.*{LAYOUT}"
        with pytest.raises(FileNotFoundError, match=match):
            self.load()

    @pytest.mark.parametrize(
        ("folder", "extension", "what"),
        [
            ("images/training", "jpg", "images"),
            ("ade20k_panoptic_train", "png", "panoptic PNGs"),
            ("annotations_detectron2/training", "png", "semantic PNGs"),
        ],
    )
    def test_missing_files(self, base, folder, extension, what):
        file = base / folder / f"ADE_train_00000002.{extension}"
        file.unlink()
        match = rf"{file} does not exist: 1 of 2 {what} are missing\. Run `python"
        with pytest.raises(FileNotFoundError, match=match):
            self.load()
        (base / folder).rename(base / "elsewhere")
        match = rf"Folder {base / folder} of the {what} does not exist\. Run `python"
        with pytest.raises(FileNotFoundError, match=match):
            self.load()

    def test_image_without_annotation(self, json_file, content):
        content["annotations"].pop()
        json_file.write_text(json.dumps(content))
        match = rf"{json_file} has no annotation of the image ADE_train_00000002\.jpg \(1 images"
        with pytest.raises(ValueError, match=match):
            self.load()
        json_file.write_text(json.dumps(content | {"annotations": []}))
        with pytest.raises(ValueError, match=rf"{json_file} has no annotations"):
            self.load()

    def test_truncated_json(self, json_file):
        json_file.write_text(json_file.read_text()[:500])
        with pytest.raises(ValueError, match=rf"{json_file} is not valid JSON.*--force"):
            self.load()

    def test_other_classes(self, json_file, content):
        fewer = content | {"categories": content["categories"][:133]}
        json_file.write_text(json.dumps(fewer))
        match = rf"{json_file} lists 133 cat.* but 150 are reg.* 17 are missing, such as id 133"
        with pytest.raises(ValueError, match=match):
            self.load()
        more = content | {"categories": [*content["categories"], {"id": 150}]}
        json_file.write_text(json.dumps(more))
        assert len(self.load()) == 2, "an unused class is not an error"
        content["annotations"][1]["segments_info"][0]["category_id"] = 150
        json_file.write_text(json.dumps(content))
        match = rf"{json_file}, ADE_train_00000002\.png: segment \d+ has category_id 150, .* 150 cl"
        with pytest.raises(ValueError, match=match):
            self.load()

    def test_png_with_other_ids(self, base):
        png = base / "ade20k_panoptic_train" / "ADE_train_00000001.png"
        pixels = np.array(Image.open(png))
        pixels[7, 0] = 1, 2, 0
        dataset_trees.save(png, pixels)
        match = rf"{png} has the segment id 513 \(1 unknown ids\), which .*train\.json does not li"
        with pytest.raises(ValueError, match=match):
            self.load()
        png.write_bytes(png.read_bytes()[:60])
        with pytest.raises(ValueError, match=rf"{png} cannot be read as an image"):
            self.load()

    def test_repeated_ids_in_evaluation_only(self, base, json_file):
        """In the original release, road and skyscraper share an id."""
        assert len(self.load("val")) == 1
        release = (base / "ade20k_panoptic_val.json").read_text().replace("_val_", "_train_")
        one = json.loads(json_file.read_text())
        one["annotations"][0]["segments_info"] = json.loads(release)["annotations"][0][
            "segments_info"
        ]
        json_file.write_text(json.dumps(one))
        grey = 140 * 65793
        match = (
            rf"train\.json, ADE_train_00000001\.png: two segments have the same id {grey}.*--force"
        )
        with pytest.raises(ValueError, match=match):
            self.load()
