"""Names, class tables, metadata and records of the benchmark data sets.

The numbers are those of the original release.
"""

import dataset_trees
import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES
from detectron2.projects.deeplab import add_deeplab_config

from mask2former import add_maskformer2_config
from mask2former.data.dataset_mappers import build_mapper
from mask2former.data.datasets import (
    register_ade20k_full,
    register_ade20k_instance,
    register_ade20k_panoptic,
    register_coco_stuff_10k,
    register_mapillary_vistas,
    register_mapillary_vistas_panoptic,
)

REGISTER_ALL = (
    register_ade20k_full.register_all_ade20k_full,
    register_ade20k_instance.register_all_ade20k_instance,
    register_ade20k_panoptic.register_all_ade20k_panoptic,
    register_coco_stuff_10k.register_all_coco_stuff_10k,
    register_mapillary_vistas.register_all_mapillary_vistas,
    register_mapillary_vistas_panoptic.register_all_mapillary_vistas_panoptic,
)

# Name → evaluator type, ignore label, number of stuff classes, of thing classes, of thing ids.
NAMES = {
    "coco_2017_{train,test}_stuff_10k_sem_seg": ("sem_seg", 255, 171, 0, 0),
    "ade20k_full_sem_seg_{train,val}": ("sem_seg", 65535, 847, 0, 0),
    "ade20k_panoptic_{train,val}": ("ade20k_panoptic_seg", 255, 150, 100, 100),
    "ade20k_instance_{train,val}": ("coco", None, 0, 100, 100),
    "mapillary_vistas_sem_seg_{train,val}": ("sem_seg", 65, 65, 0, 0),
    "mapillary_vistas_panoptic_{train,val}": ("mapillary_vistas_panoptic_seg", 65, 65, 65, 37),
}

# Name → paths of its files below the root.
PATHS = {
    "coco_2017_test_stuff_10k_sem_seg": {
        "image_root": "coco/coco_stuff_10k/images_detectron2/test",
        "sem_seg_root": "coco/coco_stuff_10k/annotations_detectron2/test",
    },
    "ade20k_full_sem_seg_train": {
        "image_root": "ADE20K_2021_17_01/images_detectron2/training",
        "sem_seg_root": "ADE20K_2021_17_01/annotations_detectron2/training",
    },
    "ade20k_panoptic_val": {
        "image_root": "ADEChallengeData2016/images/validation",
        "panoptic_root": "ADEChallengeData2016/ade20k_panoptic_val",
        "panoptic_json": "ADEChallengeData2016/ade20k_panoptic_val.json",
        "sem_seg_root": "ADEChallengeData2016/annotations_detectron2/validation",
        "json_file": "ADEChallengeData2016/ade20k_instance_val.json",
    },
    "ade20k_instance_train": {
        "image_root": "ADEChallengeData2016/images/training",
        "json_file": "ADEChallengeData2016/ade20k_instance_train.json",
    },
    "mapillary_vistas_sem_seg_val": {
        "image_root": "mapillary_vistas/validation/images",
        "sem_seg_root": "mapillary_vistas/validation/labels",
    },
    "mapillary_vistas_panoptic_train": {
        "image_root": "mapillary_vistas/training/images",
        "panoptic_root": "mapillary_vistas/training/panoptic",
        "panoptic_json": "mapillary_vistas/training/panoptic/panoptic_2018.json",
        "sem_seg_root": "mapillary_vistas/training/labels",
        "json_file": None,
    },
}


def both_splits(pattern: str) -> list[str]:
    prefix, rest = pattern.split("{")
    splits, suffix = rest.split("}")
    return [prefix + split + suffix for split in splits.split(",")]


@pytest.fixture
def registered(empty_catalogs, tmp_path):
    """All benchmark data sets, registered below `tmp_path`."""
    builtin.register_all_ade20k(str(tmp_path))
    for register in REGISTER_ALL:
        register(str(tmp_path))
    return tmp_path


class TestMetadata:
    @pytest.mark.parametrize("pattern", NAMES)
    def test_names_on_import(self, pattern):
        evaluator_type, ignore_label, num_stuff, num_things, num_thing_ids = NAMES[pattern]
        for name in both_splits(pattern):
            assert name in DatasetCatalog
            metadata = MetadataCatalog.get(name)
            assert metadata.evaluator_type == evaluator_type
            assert metadata.get("ignore_label") == ignore_label
            assert len(metadata.get("stuff_classes", ())) == num_stuff
            assert len(metadata.get("thing_classes", ())) == num_things
            assert len(metadata.get("thing_dataset_id_to_contiguous_id", ())) == num_thing_ids
            if "panoptic" in name:
                assert metadata.label_divisor == 1000
                assert len(metadata.stuff_colors) == len(metadata.stuff_classes)
                assert len(metadata.thing_colors) == len(metadata.thing_classes)

    @pytest.mark.parametrize("name", PATHS)
    def test_paths(self, registered, name):
        metadata = MetadataCatalog.get(name)
        for key, path in PATHS[name].items():
            assert metadata.get(key) == (path and str(registered / path)), key

    def test_ade20k_classes(self):
        panoptic = MetadataCatalog.get("ade20k_panoptic_val")
        instance = MetadataCatalog.get("ade20k_instance_val")
        assert panoptic.stuff_classes[0] == "wall" and panoptic.stuff_classes[149] == "flag"
        assert panoptic.stuff_classes[6] == "road, route"
        # Detectron2 abbreviates names; the order is the same.
        first = [name.split(",")[0] for name in panoptic.stuff_classes]
        theirs = [name.split(",")[0] for name in ADE20K_SEM_SEG_CATEGORIES]
        assert sum(a == b for a, b in zip(first, theirs, strict=True)) > 140
        assert panoptic.stuff_dataset_id_to_contiguous_id == {i: i for i in range(150)}
        # A thing keeps its id among the 150 in the panoptic task and gets 0 to 99 as an instance.
        ids = panoptic.thing_dataset_id_to_contiguous_id
        assert all(key == value for key, value in ids.items())
        assert list(ids)[:3] == [7, 8, 10] and list(ids)[-1] == 149
        assert list(instance.thing_dataset_id_to_contiguous_id) == list(ids)
        assert list(instance.thing_dataset_id_to_contiguous_id.values()) == list(range(100))
        assert instance.thing_classes[0] == "bed" and instance.thing_classes[99] == "flag"
        assert instance.thing_colors == panoptic.thing_colors
        semantic = MetadataCatalog.get("ade20k_sem_seg_val")
        assert semantic.stuff_colors == panoptic.stuff_colors

    def test_deep_import(self):
        from mask2former.data.datasets.register_ade20k_panoptic import ADE20K_150_CATEGORIES

        assert ADE20K_150_CATEGORIES[7] == {
            "color": [204, 5, 255], "id": 7, "isthing": 1, "name": "bed",
        }  # fmt: skip

    def test_other_classes(self):
        full = MetadataCatalog.get("ade20k_full_sem_seg_val")
        assert full.stuff_classes[1] == "building, edifice"
        stuff = MetadataCatalog.get("coco_2017_train_stuff_10k_sem_seg")
        assert stuff.stuff_classes[0] == "person" and stuff.stuff_classes[170] == "wood"
        assert stuff.stuff_dataset_id_to_contiguous_id[182] == 170
        semantic = MetadataCatalog.get("mapillary_vistas_sem_seg_val")
        panoptic = MetadataCatalog.get("mapillary_vistas_panoptic_val")
        assert semantic.stuff_classes == panoptic.stuff_classes == panoptic.thing_classes
        assert semantic.stuff_colors == panoptic.stuff_colors
        assert semantic.stuff_classes[0] == "Bird" and semantic.stuff_classes[64] == "Ego Vehicle"
        assert panoptic.stuff_dataset_id_to_contiguous_id == {i + 1: i for i in range(65)}
        assert panoptic.thing_dataset_id_to_contiguous_id[1] == 0
        assert 65 not in panoptic.thing_dataset_id_to_contiguous_id

    def test_registering_again_changes_nothing(self):
        before = {n: MetadataCatalog.get(n).as_dict().copy() for n in MetadataCatalog.list()}
        for register in REGISTER_ALL:
            register("/elsewhere")
        register_ade20k_panoptic._add_colors()
        assert {n: MetadataCatalog.get(n).as_dict() for n in before} == before

    def test_names_registered_by_other_projects_stay(self, empty_catalogs):
        DatasetCatalog.register("ade20k_panoptic_val", lambda: ["theirs"])
        MetadataCatalog.get("ade20k_panoptic_val").set(ignore_label=7, stuff_classes=["x"])
        MetadataCatalog.get("ade20k_sem_seg_val").set(stuff_colors=[[1, 2, 3]])
        register_ade20k_panoptic.register_all_ade20k_panoptic("/elsewhere")
        register_ade20k_panoptic._add_colors()
        assert DatasetCatalog.get("ade20k_panoptic_val") == ["theirs"]
        assert MetadataCatalog.get("ade20k_panoptic_val").ignore_label == 7
        assert MetadataCatalog.get("ade20k_sem_seg_val").stuff_colors == [[1, 2, 3]]
        assert "ade20k_panoptic_train" in DatasetCatalog


def make_mapper(kind: str, name: str, num_classes: int):
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.INPUT.DATASET_MAPPER_NAME = f"mask_former_{kind}"
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (8,), 12
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.COLOR_AUG_SSD = False
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = num_classes
    cfg.DATASETS.TRAIN = (name,)
    return build_mapper(cfg)


def mapped(kind: str, name: str, num_classes: int) -> tuple[int, list[int], list[int]]:
    """Number of records; classes and areas of the targets of the first one."""
    records = DatasetCatalog.get(name)
    instances = make_mapper(kind, name, num_classes)(records[0])["instances"]
    return len(records), instances.gt_classes.tolist(), instances.gt_masks.sum((1, 2)).tolist()


class TestFromDownloadToMapper:
    """Tiny data sets in the official layouts: preparation, records, training samples."""

    def test_ade20k_semantic(self, registered, prepare):
        dataset_trees.ade20k(registered)
        prepare("prepare_ade20k_sem_seg")
        expected = [0, 2, 6, 48], [24, 4, 28, 28]
        assert mapped("semantic", "ade20k_sem_seg_train", 150) == (2, *expected)

    def test_ade20k_full(self, registered, prepare):
        dataset_trees.ade20k_full(registered)
        prepare("prepare_ade20k_full_sem_seg")
        assert mapped("semantic", "ade20k_full_sem_seg_train", 847) == (2, [0, 846], [36, 36])

    def test_ade20k_panoptic(self, registered, prepare):
        dataset_trees.ade20k(registered)
        prepare("prepare_ade20k_sem_seg")
        prepare("prepare_ade20k_pan_seg")
        # Objects cover 16 pixels of the wall and the sky.
        expected = [0, 6, 48, 7, 12, 7, 12], [12, 28, 28, 4, 4, 4, 4]
        assert mapped("panoptic", "ade20k_panoptic_train", 150) == (2, *expected)
        (record,) = DatasetCatalog.get("ade20k_panoptic_val")
        base = registered / "ADEChallengeData2016"
        assert {k: v for k, v in record.items() if k != "segments_info"} == {
            "file_name": str(base / "images/validation/ADE_val_00000001.jpg"),
            "image_id": "ADE_val_00000001",
            "pan_seg_file_name": str(base / "ade20k_panoptic_val/ADE_val_00000001.png"),
            "sem_seg_file_name": str(
                base / "annotations_detectron2/validation/ADE_val_00000001.png"
            ),
        }
        segments = [(s["category_id"], s["isthing"]) for s in record["segments_info"]]
        assert segments == [(i, False) for i in (0, 2, 6, 48)] + [(i, True) for i in (7, 12, 7, 12)]

    def test_ade20k_instance(self, registered, prepare):
        dataset_trees.ade20k(registered)
        prepare("prepare_ade20k_ins_seg")
        # bed is class 0; person, 12 of the 150, follows windowpane and cabinet.
        expected = [0, 3, 0, 3], [4, 4, 4, 4]
        assert mapped("instance", "ade20k_instance_train", 100) == (2, *expected)
        (record,) = DatasetCatalog.get("ade20k_instance_val")
        assert record["image_id"] == "ADE_val_00000001"

    def test_coco_stuff_10k(self, registered, prepare):
        dataset_trees.coco_stuff_10k(registered)
        prepare("prepare_coco_stuff_10k_sem_seg")
        expected = [0, 9, 11, 170], [36, 6, 6, 36]
        assert mapped("semantic", "coco_2017_train_stuff_10k_sem_seg", 171) == (2, *expected)

    def test_mapillary_vistas(self, registered):
        categories = register_mapillary_vistas_panoptic.MAPILLARY_VISTAS_SEM_SEG_CATEGORIES
        dataset_trees.mapillary_vistas(registered, categories)
        expected = [0, 64], [42, 42]
        assert mapped("semantic", "mapillary_vistas_sem_seg_train", 65) == (2, *expected)
        expected = [0, 0, 64], [21, 21, 42]
        assert mapped("panoptic", "mapillary_vistas_panoptic_train", 65) == (2, *expected)
        (record,) = DatasetCatalog.get("mapillary_vistas_panoptic_val")
        assert record["image_id"] == "c"
        assert [s["isthing"] for s in record["segments_info"]] == [True, True, False]
        sample = make_mapper("panoptic", "mapillary_vistas_panoptic_train", 65)(record)
        assert np.unique(sample["sem_seg"]).tolist() == [0, 64, 65]
