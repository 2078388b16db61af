"""Mistakes in files of data sets that Detectron2 loads; each error names file and record."""

import json
from pathlib import Path

import dataset_trees
import numpy as np
import own_data
import pytest
from dataset_trees import save, write_json
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin, register_coco_instances
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

from mask2former import add_maskformer2_config
from mask2former.data import COCOInstanceNewBaselineDatasetMapper
from mask2former.data.check.index import build_index
from mask2former.data.datasets.checks import check_builtin, drop_unusable_objects
from mask2former.data.loader import build_train_loader, explained_dataset_errors
from mask2former.evaluation.ground_truth import check_ground_truth, read_coco


@pytest.fixture
def root(empty_catalogs, tmp_path) -> Path:
    builtin.register_all_coco(str(tmp_path))
    builtin.register_all_lvis(str(tmp_path))
    builtin.register_all_cityscapes(str(tmp_path))
    return tmp_path


def edit(file: Path, change) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(file.read_text())
    change(content)
    write_json(file, content)


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_maskformer2_config(cfg)
    cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON = True
    return cfg


# ---- LVIS ----


@pytest.fixture
def lvis(root) -> Path:
    pytest.importorskip("lvis")
    dataset_trees.lvis(root, LVIS_CATEGORIES)
    return root / "lvis" / "lvis_v1_val.json"


def test_sound_lvis(lvis, cfg):
    check_builtin("lvis_v1_val")
    check_ground_truth(cfg, "lvis_v1_val")
    records = DatasetCatalog.get("lvis_v1_val")
    index = build_index("lvis_v1_val")
    assert not index.problems
    assert sorted(item.file_name for item in index.items) == sorted(r["file_name"] for r in records)
    assert index.contiguous_ids[793] == 792


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("annotations"), "has no list 'annotations'"),
        (lambda c: c["images"][0].pop("coco_url"), r"139: an image has no 'coco_url' \(\$\.images"),
        (
            lambda c: c["images"][0].update(coco_url="a.jpg"),
            r"139: \$\.images\[0\]\.coco_url: expected .* matching regex",
        ),
        (lambda c: c["images"][0].pop("height"), "139: an image has no 'height'"),
        (lambda c: c["annotations"][0].pop("bbox"), "1: an annotation has no 'bbox'"),
        (
            lambda c: c["annotations"][0].update(segmentation={"size": [8, 12], "counts": [96]}),
            r"1: \$\.annotations\[0\]\.segmentation: expected 'array'",
        ),
        (
            lambda c: c["annotations"][0].update(category_id=1204),
            "annotation 1: .* category_id 1204, which is not one of the categories",
        ),
        (
            lambda c: c["annotations"][0]["segmentation"].append([0, 0, 1, 1, 2, 0, 5]),
            "annotation 1: has a polygon of 7 coordinates",
        ),
    ],
)
def test_broken_lvis(lvis, change, message):
    edit(lvis, change)
    with (
        pytest.raises(ValueError, match=rf"'lvis_v1_val' cannot be used: .*{message}"),
        explained_dataset_errors(["lvis_v1_val"]),
    ):
        raise AssertionError("the loader runs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][1].pop("neg_category_ids"), "42: an image has no 'neg_category_"),
        (lambda c: c["annotations"][0].pop("area"), "1: an annotation has no 'area'"),
        (lambda c: c["categories"][6].update(frequency="x"), "7: .*frequency: invalid enum"),
    ],
)
def test_lvis_that_cannot_be_evaluated(lvis, cfg, change, message):
    edit(lvis, change)
    check_builtin("lvis_v1_val")
    with pytest.raises(ValueError, match=rf"lvis_v1_val\.json, {message}"):
        check_ground_truth(cfg, "lvis_v1_val")
    assert build_index("lvis_v1_val").problems


def test_missing_lvis_image(lvis, root):
    (root / "coco/train2017/000000000042.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"train2017/000000000042\.jpg does not .*: 1 of 2"):
        check_builtin("lvis_v1_val")


# ---- COCO panoptic ----


PANOPTIC = "coco_2017_val_panoptic"


@pytest.fixture
def panoptic(root) -> Path:
    meta = MetadataCatalog.get(PANOPTIC)
    ids = {**meta.thing_dataset_id_to_contiguous_id, **meta.stuff_dataset_id_to_contiguous_id}
    categories = [{"id": i, "name": meta.stuff_classes[c], "isthing": 0} for i, c in ids.items()]
    dataset_trees.coco_panoptic(root, categories)
    things = meta.thing_dataset_id_to_contiguous_id
    dataset_trees.coco_instances(
        root, [{"id": i, "name": meta.thing_classes[c]} for i, c in things.items()]
    )
    save(root / "coco/panoptic_stuff_val2017/000000000139.png", np.zeros((8, 12), np.uint8))
    return root / "coco/annotations/panoptic_val2017.json"


@pytest.mark.parametrize("name", [PANOPTIC, f"{PANOPTIC}_separated", f"{PANOPTIC}_stuffonly"])
def test_sound_panoptic(panoptic, name):
    check_builtin(name)
    assert len(DatasetCatalog.get(name)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("annotations"), "has no list 'annotations'"),
        (
            lambda c: c["annotations"][0]["segments_info"][0].pop("category_id"),
            r"has no 'category_id' \(\$\.annotations\[0\]\.segments_info\[0\]",
        ),
        (
            lambda c: c["annotations"][0]["segments_info"][0].update(category_id=999),
            "000000000139.png: segment 1000 has category_id 999",
        ),
        (
            lambda c: [c["annotations"][0].update(image_id="139"), c["images"][0].update(id="139")],
            "000000000139.png: the image_id is the text '139'",
        ),
        (
            lambda c: c["images"][0].update(file_name="139.png"),
            "000000000139.png: the image is 139.png, but Detectron2's loader takes",
        ),
    ],
)
def test_broken_panoptic(panoptic, change, message):
    edit(panoptic, change)
    with pytest.raises(ValueError, match=rf"panoptic_val2017\.json,? .*{message}"):
        check_builtin(PANOPTIC)
    assert build_index(PANOPTIC).problems


def test_missing_files_of_panoptic_versions(panoptic, root):
    label = root / "coco/panoptic_stuff_val2017/000000000139.png"
    label.rename(label.with_name("x.png"))
    with pytest.raises(FileNotFoundError, match=r"000000000139\.png does not exist: 1 of 1 semant"):
        check_builtin(f"{PANOPTIC}_separated")
    with pytest.raises(FileNotFoundError, match=r"x\.png: the label map has no image"):
        check_builtin(f"{PANOPTIC}_stuffonly")
    (root / "coco/val2017/000000000139.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"000000000139\.jpg does not exist: 1 of 1"):
        check_builtin(PANOPTIC)


# ---- Cityscapes ----


@pytest.fixture
def cityscapes(root) -> Path:
    """The folder of the annotations of aachen."""
    pytest.importorskip("cityscapesscripts")
    base = dataset_trees.cityscapes(root)
    for path in list(base.glob("gtFine/*/*/*_labelIds.png")):
        copy = path.with_name(path.name.replace("labelIds", "labelTrainIds"))
        copy.write_bytes(path.read_bytes())
    return base / "gtFine" / "train" / "aachen"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("imgWidth"), "an entry has no 'imgWidth'"),
        (lambda c: c.update(imgWidth=33), "states 33 x 16 pixels, but its image .* has 32 x 16"),
        (lambda c: c.pop("objects"), "an entry has no 'objects'"),
        (
            lambda c: c["objects"][1].update(label="cart"),
            r"\$\.objects\[1\]: the label 'cart' is no class of Cityscapes",
        ),
        (
            lambda c: c["objects"][1].update(polygon=[[0, 0], [3, 3]]),
            r"\$\.objects\[1\]: a polygon of 2 points",
        ),
        (
            lambda c: c["objects"][1].update(polygon=[[0, 0], [3, 3], [3]]),
            r"\$\.objects\[1\]\.polygon\[2\]: expected 'array' of length >= 2",
        ),
        (
            lambda c: c["objects"][1].update(polygon=[[0, 0], [3, 3], [0, 1e9]]),
            r"\$\.objects\[1\]: a polygon ends outside the 32 x 16 pixels",
        ),
    ],
)
def test_broken_polygons(cityscapes, change, message):
    file = cityscapes / "aachen_000001_000019_gtFine_polygons.json"
    edit(file, change)
    with pytest.raises(ValueError, match=rf"{file}.* {message}"):
        check_builtin("cityscapes_fine_instance_seg_train")
    (problem,) = build_index("cityscapes_fine_instance_seg_train").problems
    assert problem.file == str(file)


def test_damaged_polygons(cityscapes):
    file = cityscapes / "aachen_000001_000019_gtFine_polygons.json"
    for data in (b"", b"{", b"\xff\xfe"):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{file} is not valid JSON"):
            check_builtin("cityscapes_fine_sem_seg_train")


@pytest.mark.parametrize("end", ["instanceIds", "labelTrainIds"])
def test_label_maps_of_cityscapes(cityscapes, end):
    file = cityscapes / f"aachen_000001_000019_gtFine_{end}.png"
    for array, message in (
        (np.zeros((8, 32), np.uint8), r"is 32 x 8 pixels, but its image .* 32 x 16"),
        (np.zeros((16, 32, 3), np.uint8), r"is an image of mode RGB: a label map has one channel"),
    ):
        save(file, array)
        with pytest.raises(ValueError, match=rf"{file} {message}"):
            check_builtin("cityscapes_fine_sem_seg_train")
    file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{file} cannot be read as an image"):
        check_builtin("cityscapes_fine_sem_seg_train")


# ---- other loaders ----


@pytest.mark.parametrize("error", [KeyError("bbox"), TypeError("x")])
def test_errors_of_other_loaders(empty_catalogs, error):
    def load():
        raise error

    DatasetCatalog.register("theirs", load)
    MetadataCatalog.get("theirs").json_file = "a.json"
    match = rf"'?theirs'? cannot be used: reading it ended with {type(error).__name__}.*=a\.json"
    with pytest.raises(ValueError, match=match), explained_dataset_errors(["theirs"]):
        DatasetCatalog.get("theirs")


# ---- objects that Detectron2's COCO loader drops ----


@pytest.fixture
def coco_with_unusable_objects(tmp_path, monkeypatch):
    """Annotation 10 has no segmentation, 11 and 12 only short polygons, 13 an empty one besides."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
        catalog.pop("theirs", None)
    content = own_data.instances(tmp_path)
    annotations = content["annotations"]
    annotations[0]["segmentation"] = []
    annotations[1]["segmentation"] = [[0, 0, 4, 8]]
    annotations[2]["segmentation"] = [[], [0, 0, 1, 1, 2]]
    annotations[3]["segmentation"].append([])
    annotations[4]["segmentation"] = None
    del annotations[4]["bbox"]
    write_json(tmp_path / "instances.json", content)
    paths = (str(tmp_path / "instances.json"), str(tmp_path / "images"))
    register_coco_instances("theirs", {}, *paths)
    return paths


def test_unusable_objects_are_left_out(coco_with_unusable_objects, cfg, tmp_path, caplog):
    caplog.set_level("WARNING")
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TRAIN = ("theirs",)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 1
    check_ground_truth(cfg, "theirs")
    gt = read_coco(*coco_with_unusable_objects, "theirs")
    assert sorted(gt.anns) == [13, 15]
    mapper = COCOInstanceNewBaselineDatasetMapper(True, tfm_gens=[], image_format="RGB")
    loader = build_train_loader(cfg, mapper)
    records = [loader.dataset._records[i] for i in range(3)]
    counts = [len(record["annotations"]) for record in records]
    assert counts == [len(gt.imgToAnns[record["image_id"]]) for record in records] == [0, 1, 1]
    samples = [mapper(record) for record in records]
    assert [len(sample["instances"]) for sample in samples] == counts

    index = build_index("theirs")
    assert not index.problems
    assert [len(item.annotations) for item in index.items] == counts
    texts = [finding.text() for finding in index.warnings]
    image = tmp_path / "images" / "a.jpg"
    assert texts[0] == (
        f"{image}, annotation 10: has no segmentation; it must be a list of polygons or an RLE. "
        "The object is left out"
    )
    assert f"{image}, annotation 11: has a polygon of 4 coordinates" in texts[1]
    assert texts[3].endswith(
        "annotation 13: has a polygon of 0 coordinates; a polygon is x1, y1, "
        "x2, y2, ... of at least 3 points. That part is left out"
    )
    assert [text.endswith("The object is left out") for text in texts] == [1, 1, 1, 0, 1]
    for text in texts:
        assert text in caplog.text


def test_unusable_objects_are_refused_elsewhere(coco_with_unusable_objects, cfg):
    with pytest.raises(ValueError, match="annotation 10: has no segmentation"):
        read_coco(*coco_with_unusable_objects)
    records = [{"file_name": "/x/a.jpg", "annotations": [{"category_id": 0}]}]
    # Of a data set that another loader reads.
    DatasetCatalog.register("others", lambda: records)
    drop_unusable_objects(["theirs", "others"], records)
    assert len(records[0]["annotations"]) == 1


def test_only_unusable_objects(coco_with_unusable_objects, cfg):
    def change(content):
        for annotation in content["annotations"]:
            annotation["segmentation"] = [[0, 0, 4, 8]]

    edit(Path(coco_with_unusable_objects[0]), change)
    cfg.DATASETS.TRAIN = ("theirs",)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = 0, 1
    with pytest.raises(ValueError, match=r"theirs.* has nothing to train on"):
        build_train_loader(cfg, lambda record: record)
    index = build_index("theirs", for_training=True)
    assert "has nothing to train on" in index.problems[0].why
