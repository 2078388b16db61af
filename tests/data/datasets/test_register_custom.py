"""Your own data: the register functions and DATASETS.CUSTOM."""

import json
import os

import own_data
import pytest
from dataset_trees import photograph, write_json
from detectron2.data import DatasetCatalog, MetadataCatalog

from mask2former.data import register_instances, register_panoptic, register_semantic
from mask2former.data.datasets.custom_entries import register_entries
from mask2former.data.datasets.register_custom import is_own

pytestmark = pytest.mark.usefixtures("empty_catalogs")


def metadata(name="own_train"):
    return MetadataCatalog.get(name)


def test_instances(tmp_path):
    own_data.instances(tmp_path)
    register_entries([own_data.entry("instance", tmp_path)])
    assert is_own("own_train")
    assert metadata().thing_classes == ["cup", "plate"]
    assert metadata().thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert metadata().evaluator_type == "coco"
    records = DatasetCatalog.get("own_train")
    assert [os.path.basename(record["file_name"]) for record in records] == [
        "a.jpg",
        "b.jpg",
        "c.jpg",
    ]
    assert [a["category_id"] for a in records[0]["annotations"]] == [0, 1]


def test_panoptic(tmp_path):
    own_data.panoptic(tmp_path)
    own_data.instances(tmp_path)
    json_file = str(tmp_path / "instances.json")
    register_entries([own_data.entry("panoptic", tmp_path, INSTANCES_JSON=json_file)])
    # Things come first, whatever their order in the JSON.
    assert metadata().stuff_classes == ["cup", "plate", "table"]
    assert metadata().thing_classes == ["cup", "plate"]
    assert metadata().stuff_dataset_id_to_contiguous_id == {3: 0, 7: 1, 9: 2}
    assert metadata().json_file == json_file
    segments = DatasetCatalog.get("own_train")[0]["segments_info"]
    assert [segment["category_id"] for segment in segments] == [0, 1, 2]


def test_semantic(tmp_path):
    own_data.semantic(tmp_path)
    (tmp_path / "classes.txt").write_text("cup\nplate\ntable\n\n")
    classes = str(tmp_path / "classes.txt")
    entry = own_data.entry("semantic", tmp_path, CLASSES=classes, IGNORE_LABEL=7, IMAGE_EXT=".jpg")
    register_entries([entry])
    assert metadata().stuff_classes == ["cup", "plate", "table"]
    assert len({tuple(colour) for colour in metadata().stuff_colors}) == 3
    assert metadata().ignore_label == 7
    record = DatasetCatalog.get("own_train")[2]
    assert record["file_name"].endswith("images/c.jpg")
    assert record["sem_seg_file_name"].endswith("labels/c.png")


def test_paths_relative_to_working_directory_or_home(tmp_path, monkeypatch):
    own_data.instances(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    register_instances("one", "home/images", "home/instances.json")
    register_instances("two", "~/images", "~/instances.json")
    assert len(DatasetCatalog.get("one")) == len(DatasetCatalog.get("two")) == 3


def test_same_name_again(tmp_path):
    own_data.instances(tmp_path)
    entry = own_data.entry("instance", tmp_path)
    register_entries([entry, entry])
    register_entries([entry])
    own_data.panoptic(tmp_path)
    with pytest.raises(ValueError, match="'own_train' is already registered with type 'instance'"):
        register_entries([own_data.entry("panoptic", tmp_path)])
    content = json.loads((tmp_path / "instances.json").read_text())
    content["categories"][0] = {"id": 3, "name": "mug"}
    write_json(tmp_path / "instances.json", content)
    with pytest.raises(ValueError, match="with class names .*'cup', 'plate'.*'mug', 'plate'"):
        register_entries([entry])
    DatasetCatalog.register("other", list)
    with pytest.raises(ValueError, match="'other' is already registered by other code"):
        register_entries([entry | {"NAME": "other"}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"TYPE": "boxes"}, r"CUSTOM\[1\] \(own_val\) has TYPE 'boxes'; allowed: panoptic, inst"),
        ({"TYPE": None}, "has TYPE None"),
        ({"INSTANCE_JSON": "x"}, "key 'INSTANCE_JSON', .* Did you mean INSTANCES_JSON"),
        ({"LABEL_ROOT": "x"}, "key 'LABEL_ROOT', which is unknown for type instance"),
        ({"NAME": 3}, "has NAME 3; it must be a str"),
        ({"IMAGE_ROOT": None}, "has IMAGE_ROOT None; it must be a str"),
        ({"IMAGE_ROOT": "nowhere"}, r"'own_val': folder nowhere \(in /.*of the images does not"),
        (
            {"INSTANCES_JSON": "no.json"},
            r"'own_val': instance JSON no\.json \(in /.* does not exist",
        ),
    ],
)
def test_wrong_entries(tmp_path, change, message):
    own_data.instances(tmp_path)
    entries = [own_data.entry("instance", tmp_path)]
    entries.append(entries[0] | {"NAME": "own_val"} | change)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        register_entries(entries)


def test_entries_that_lack_keys(tmp_path):
    with pytest.raises(ValueError, match=r"CUSTOM\[0\] has no TYPE; allowed"):
        register_entries([{"IMAGE_ROOT": "x"}])
    with pytest.raises(ValueError, match=r"\(n\) lacks IMAGE_ROOT, LABEL_ROOT, CLASSES, which ty"):
        register_entries([{"NAME": "n", "TYPE": "semantic"}])
    with pytest.raises(ValueError, match=r"CUSTOM\[0\] is 'n'; it must be a mapping such as"):
        register_entries(["n"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"CLASSES": ["cup", False, "table"]}, r"class 1 \(from 0\) of classes is False.*quote"),
        ({"CLASSES": []}, "classes is empty"),
        ({"CLASSES": ["cup", "plate", "cup"]}, "names 'cup' more than once"),
        ({"CLASSES": "none.txt"}, r"class list none\.txt .* does not exist"),
        ({"CLASSES": 3}, "has CLASSES 3; it must be a str or list or tuple"),
        ({"IGNORE_LABEL": 2}, "ignore_label 2 is the label of class 'table'"),
        ({"IGNORE_LABEL": True}, "has IGNORE_LABEL True; it must be a int"),
        ({"IMAGE_EXT": "png"}, r"images holds no \*\.png file .* extensions there are '\.jpg'"),
        ({"LABEL_ROOT": "empty"}, "folder empty .* does not exist"),
    ],
)
def test_wrong_semantic_entries(tmp_path, change, message):
    own_data.semantic(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        register_entries([own_data.entry("semantic", tmp_path, **change)])
    assert "own_train" not in DatasetCatalog


def test_blank_line_in_a_class_list(tmp_path):
    own_data.semantic(tmp_path)
    (tmp_path / "classes.txt").write_text("cup\n\ntable\n")
    with pytest.raises(ValueError, match=r"class 1 \(from 0\) of .*classes.txt is ''"):
        register_semantic(
            "s", str(tmp_path / "images"), str(tmp_path / "labels"), str(tmp_path / "classes.txt")
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [', "is not valid JSON"),
        ("[]", "is a list; COCO JSON is an object"),
        ('{"images": []}', "has no list 'categories'"),
        ('{"categories": []}', "lists no categories"),
        (
            '{"categories": [{"id": 1, "name": null}]}',
            "1: a category has no 'name'",
        ),
        ('{"_via_img_metadata": {}}', "is a file of the VGG Image Annotator"),
        ('{"a.jpg9": {"filename": "a.jpg", "regions": []}}', "is a file of the VGG Image Ann"),
        ('{"shapes": [], "imagePath": "a.jpg"}', "is a file of LabelMe"),
        ("0 0.5 0.5 0.25 0.25\n1 0.1 0.1 0.2 0.2\n", "is a label file of YOLO"),
        ('[{"image_id": 1, "score": 0.5}]', "is a list of predictions"),
        ('{"categories": [{"id": 1}]}', "has no 'name'"),
        ('{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "id 1 occurs more"),
        (
            '{"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            "name 'a' occurs more",
        ),
    ],
)
def test_damaged_json(tmp_path, text, message):
    own_data.images(tmp_path)
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=rf"'broken'.*{message}"):
        register_instances("broken", str(tmp_path / "images"), str(tmp_path / "broken.json"))


def test_inconsistent_panoptic_json(tmp_path):
    content = own_data.panoptic(tmp_path)
    entry = own_data.entry("panoptic", tmp_path)
    write_json(tmp_path / "instances.json", {"categories": [{"id": 3, "name": "cup"}]})
    with pytest.raises(ValueError, match=r"\{3: cup\} \(1\), but the things of .*plate\} \(2\)"):
        register_entries([entry | {"INSTANCES_JSON": str(tmp_path / "instances.json")}])
    del content["categories"][1]["isthing"]
    write_json(tmp_path / "panoptic.json", content)
    with pytest.raises(ValueError, match="'table'.* has no 'isthing'"):
        register_entries([entry])
    with pytest.raises(FileNotFoundError, match="folder .* of the semantic PNGs does not exist"):
        register_panoptic(
            *("p", str(tmp_path / "images"), str(tmp_path / "panoptic")),
            panoptic_json=str(tmp_path / "panoptic.json"),
            sem_seg_root="absent",
        )


def test_advice_is_not_that_of_the_benchmarks(tmp_path):
    """DETECTRON2_DATASETS has no effect on data that is registered by its paths."""
    content = own_data.panoptic(tmp_path)
    write_json(tmp_path / "panoptic.json", content | {"annotations": content["annotations"] * 2})
    register_entries([own_data.entry("panoptic", tmp_path)])
    message = (
        r"^Data set 'own_train' cannot be used: .*json, 1: .* image_id 1 occurs more than once"
    )
    with pytest.raises(ValueError, match=message) as caught:
        DatasetCatalog.get("own_train")
    assert "DETECTRON2_DATASETS" not in str(caught.value)


def test_annotation_of_an_unknown_category(tmp_path):
    content = own_data.instances(tmp_path)
    content["annotations"][0]["category_id"] = 4
    write_json(tmp_path / "instances.json", content)
    register_entries([own_data.entry("instance", tmp_path)])
    with pytest.raises(
        ValueError, match=r"'own_train' cannot be used: .*annotation 10: .*category_id 4"
    ):
        DatasetCatalog.get("own_train")


def test_classes_of_roboflow(tmp_path):
    """_classes.csv beside the masks; other tables are refused, not taken for names."""
    for name in ("a.jpg", "a_mask.png"):
        photograph(tmp_path / name)
    file = tmp_path / "_classes.csv"
    keys = {"image_root": str(tmp_path), "label_root": str(tmp_path), "classes": str(file)}
    file.write_text("Pixel Value, Class\n0, background\n1, leaf\n")
    register_semantic("own_csv", **keys, label_ext="_mask.png")
    assert MetadataCatalog.get("own_csv").stuff_classes == ["background", "leaf"]
    for text, message in (
        ("name,r,g,b\nroad,1,2,3\n", "only that of Roboflow is read"),
        ("Pixel Value, Class\n1, leaf\n", "are not 0, 1, 2, .*state VALUE_MAP"),
        ("", "only that of Roboflow is read"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            register_semantic("own_csv2", **keys, label_ext="_mask.png")
