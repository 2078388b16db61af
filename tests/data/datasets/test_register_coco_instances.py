"""Detectron2's COCO names with the loader of this project."""

import pytest
from dataset_trees import photograph, write_json
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from mask2former.data.datasets import loading
from mask2former.data.datasets.register_coco_instances import replace_coco_loaders


@pytest.mark.parametrize("name", ["coco_2017_train", "coco_2017_val"])
def test_names_have_the_checked_loader(name):
    assert DatasetCatalog[name].func is loading.load_instances
    assert DatasetCatalog[name].args[0] == MetadataCatalog.get(name).json_file


@pytest.mark.usefixtures("empty_catalogs")
def test_same_records_and_metadata(tmp_path):
    photograph(tmp_path / "images" / "7.jpg")
    things = [c for c in COCO_CATEGORIES if c["isthing"]]
    annotation = {"id": 1, "image_id": 7, "category_id": 90, "iscrowd": 0, "area": 6.0}
    annotation |= {"segmentation": [[1, 1, 5, 1, 1, 4]], "bbox": [1, 1, 4, 3]}
    content = {
        "images": [{"id": 7, "file_name": "7.jpg", "height": 8, "width": 12}],
        "annotations": [annotation],
        "categories": [{"id": c["id"], "name": c["name"]} for c in reversed(things)],
    }
    write_json(tmp_path / "coco.json", content)
    paths = str(tmp_path / "coco.json"), str(tmp_path / "images")
    register_coco_instances("coco_2017_val", {}, *paths)
    replace_coco_loaders()
    records = DatasetCatalog.get("coco_2017_val")
    assert records == load_coco_json(*paths, "theirs")
    assert records[0]["annotations"][0]["category_id"] == 79
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert MetadataCatalog.get("coco_2017_val").get(key) == MetadataCatalog.get("theirs").get(
            key
        )


@pytest.mark.usefixtures("empty_catalogs")
def test_loader_of_other_code_stays():
    DatasetCatalog.register("coco_2017_train", list)
    replace_coco_loaders()
    assert DatasetCatalog["coco_2017_train"] is list
