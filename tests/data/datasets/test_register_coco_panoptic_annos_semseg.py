"""Registration of COCO panoptic with semantic labels, and the loader of its format."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from mask2former.data.datasets import register_coco_panoptic_annos_semseg as module

META = {
    "thing_dataset_id_to_contiguous_id": {4: 0, 9: 1},
    "stuff_dataset_id_to_contiguous_id": {4: 0, 9: 1, 30: 2},
}


@pytest.fixture
def data(tmp_path) -> dict[str, str]:
    """A data set of two images on disk; returns the loader's arguments."""
    for folder in ("images", "panoptic", "semantic"):
        (tmp_path / folder).mkdir()
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    for name in ("1", "2"):
        image.save(tmp_path / "images" / f"{name}.jpg")
        image.save(tmp_path / "panoptic" / f"{name}.png")
        image.save(tmp_path / "semantic" / f"{name}.png")
    segments = [
        {"id": 5, "category_id": 30, "iscrowd": 0, "area": 3, "bbox": [0, 0, 3, 1]},
        {"id": 6, "category_id": 9, "iscrowd": 1, "area": 3, "bbox": [0, 1, 3, 1]},
    ]
    write(
        tmp_path / "panoptic.json",
        {
            "annotations": [
                {"image_id": 1, "file_name": "1.png", "segments_info": segments},
                {"image_id": 2, "file_name": "2.png", "segments_info": []},
            ]
        },
    )
    return {
        "json_file": str(tmp_path / "panoptic.json"),
        "image_dir": str(tmp_path / "images"),
        "gt_dir": str(tmp_path / "panoptic"),
        "semseg_dir": str(tmp_path / "semantic"),
        "meta": META,
    }


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))


class TestLoader:
    def test_records(self, data, tmp_path):
        first, second = module.load_coco_panoptic_json(**data)
        assert {k: v for k, v in first.items() if k != "segments_info"} == {
            "file_name": str(tmp_path / "images" / "1.jpg"),
            "image_id": 1,
            "pan_seg_file_name": str(tmp_path / "panoptic" / "1.png"),
            "sem_seg_file_name": str(tmp_path / "semantic" / "1.png"),
        }
        stuff, thing = first["segments_info"]
        assert (stuff["category_id"], stuff["isthing"], stuff["iscrowd"]) == (2, False, 0)
        assert (thing["category_id"], thing["isthing"], thing["iscrowd"]) == (1, True, 1)
        assert thing["id"] == 6 and thing["bbox"] == [0, 1, 3, 1]
        assert second["segments_info"] == []

    @pytest.mark.parametrize("semseg_dir", [None, "/nowhere"])
    def test_without_semantic_folder(self, data, semseg_dir):
        records = module.load_coco_panoptic_json(**data | {"semseg_dir": semseg_dir})
        assert len(records) == 2
        assert all("sem_seg_file_name" not in record for record in records)

    def test_image_names_of_the_json(self, data, tmp_path):
        content = json.loads(Path(data["json_file"]).read_text())
        content["images"] = [{"id": 1, "file_name": "other.png"}, {"id": 2}]
        write(Path(data["json_file"]), content)
        Image.new("RGB", (6, 4)).save(tmp_path / "images" / "other.png")
        files = [Path(r["file_name"]).name for r in module.load_coco_panoptic_json(**data)]
        assert files == ["other.png", "2.jpg"]
        content["images"].pop()
        write(Path(data["json_file"]), content)
        with pytest.raises(
            ValueError, match=r"panoptic\.json, 2: the JSON does not list the image"
        ):
            module.load_coco_panoptic_json(**data)

    @pytest.mark.parametrize("key", ["json_file", "image_dir", "gt_dir"])
    def test_missing_path(self, data, key):
        match = "/nowhere.*does not exist.*DETECTRON2_DATASETS"
        with pytest.raises(FileNotFoundError, match=match):
            module.load_coco_panoptic_json(**data | {key: "/nowhere"})

    @pytest.mark.parametrize("file", ["images/1.jpg", "panoptic/1.png", "semantic/1.png"])
    def test_missing_file(self, data, file, tmp_path):
        (tmp_path / file).unlink()
        with pytest.raises(FileNotFoundError, match=f"{file}, named by .*does not exist"):
            module.load_coco_panoptic_json(**data)

    def test_no_images(self, data):
        write(Path(data["json_file"]), {"annotations": []})
        with pytest.raises(ValueError, match=r"panoptic\.json has no annotations"):
            module.load_coco_panoptic_json(**data)

    def test_unknown_category(self, data):
        meta = META | {"stuff_dataset_id_to_contiguous_id": {}}
        match = r"panoptic\.json, 1\.png: segment 5 has category_id 30"
        with pytest.raises(ValueError, match=match):
            module.load_coco_panoptic_json(**data | {"meta": meta})


class TestRegistration:
    def test_coco_metadata(self):
        metadata = module.get_metadata()
        assert len(metadata["thing_classes"]) == len(metadata["thing_colors"]) == 80
        assert len(metadata["stuff_classes"]) == len(metadata["stuff_colors"]) == 133
        assert metadata["stuff_classes"][:80] == metadata["thing_classes"]
        assert metadata["thing_classes"][0] == "person" and metadata["thing_classes"][79] == (
            "toothbrush"
        )
        things = metadata["thing_dataset_id_to_contiguous_id"]
        stuff = metadata["stuff_dataset_id_to_contiguous_id"]
        # COCO's ids have gaps: toothbrush is 90, banner 92, rug (the last) 200.
        assert (things[1], things[90]) == (0, 79)
        assert (stuff[1], stuff[90], stuff[92], stuff[200]) == (0, 79, 80, 132)
        assert sorted(things.values()) == list(range(80))
        assert sorted(stuff.values()) == list(range(133))

    @pytest.mark.parametrize("split", ["train", "val", "val_100"])
    def test_names(self, split):
        name = f"coco_2017_{split}_panoptic_with_sem_seg"
        assert name in DatasetCatalog
        metadata = MetadataCatalog.get(name)
        builtin = MetadataCatalog.get(f"coco_2017_{split}_panoptic")
        assert metadata.evaluator_type == "coco_panoptic_seg"
        assert (metadata.ignore_label, metadata.label_divisor) == (255, 1000)
        assert metadata.sem_seg_root.endswith(
            {"train": "train2017", "val": "val2017", "val_100": "val2017_100"}[split]
        )
        assert "coco/panoptic_semseg_" in metadata.sem_seg_root
        # Same files as Detectron2's data sets.
        for key in ("image_root", "panoptic_root", "panoptic_json", "json_file"):
            assert metadata.get(key) == builtin.get(key)
        # As in the original, thing_classes of the builtin panoptic names list only things.
        assert builtin.thing_classes == metadata.thing_classes
        assert len(builtin.thing_classes) == len(builtin.thing_colors) == 80

    def test_registering_again_changes_nothing(self):
        name = "coco_2017_val_panoptic_with_sem_seg"
        before = MetadataCatalog.get(name).as_dict().copy()
        module.register_all_coco_panoptic_annos_sem_seg("/elsewhere")
        assert MetadataCatalog.get(name).as_dict() == before

    def test_own_data_set(self, data):
        name = "tests_own_panoptic"
        args = (data["image_dir"], data["gt_dir"], data["json_file"], None, None)
        try:
            module.register_coco_panoptic_annos_sem_seg(name, META, *args)
            assert len(DatasetCatalog.get(name)) == 2
            assert MetadataCatalog.get(name).panoptic_json == data["json_file"]
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)

    def test_error_of_missing_coco_names_the_path(self, tmp_path):
        """Names are registered without data; only loading fails."""
        name = "tests_absent_panoptic"
        root = str(tmp_path / "absent")
        try:
            module.register_coco_panoptic_annos_sem_seg(
                name, META, root, root, f"{root}/panoptic.json", root, None
            )
            with pytest.raises(FileNotFoundError, match=r"absent/panoptic\.json does not exist"):
                DatasetCatalog.get(name)
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
