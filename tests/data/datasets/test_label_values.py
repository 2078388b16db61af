"""Label images of any values: VALUE_MAP, palettes, colours, ignored values."""

import numpy as np
import own_data
import pytest
import torch
from dataset_trees import save
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from mask2former.data.check.images import ItemChecker
from mask2former.data.check.index import build_index, find_unlisted
from mask2former.data.datasets.custom_entries import register_entries
from mask2former.data.datasets.label_values import make_labels
from mask2former.data.formats.images import read_image
from mask2former.evaluation.semantic_evaluation import build_semantic_evaluator

pytestmark = pytest.mark.usefixtures("empty_catalogs")

VALUES = np.array([[0, 7, 200], [255, 7, 0]])
ROAD, SKY, VOID = (128, 64, 128), (70, 130, 180), (0, 0, 0)


def mapped(tmp_path, image, name="a.png", *, value_map, ignore=(), ignore_label=None, **options):
    """The labels of an image with a value map."""
    path = tmp_path / name
    image.save(path)
    classes, rename = options.get("classes"), options.get("rename")
    labels = make_labels("d", classes, value_map, ignore_label, ignore, rename)
    return labels, labels.map_file(str(path)).tolist()


@pytest.mark.parametrize("mode", ["L", "I;16", "I", "P", "RGB", "RGBA", "LA", "F"])
def test_integers_in_any_kind_of_image(tmp_path, mode):
    array = VALUES.astype(np.uint8)
    if mode == "P":
        image = Image.fromarray(array).convert("P")
        image.putpalette([i // 3 for i in range(768)][::-1])
    elif mode == "I;16":
        image = Image.fromarray(VALUES.astype(np.uint16))
    else:
        image = Image.fromarray(array).convert(mode)
    value_map = {0: "background", 7: "cup", 200: "cup"}
    name = "a.tif" if mode in "IF" else "a.png"
    labels, result = mapped(tmp_path, image, name, value_map=value_map, ignore=[255])
    assert labels.classes == ["background", "cup"] and labels.ignore_label == 255
    assert result == [[0, 1, 1], [255, 1, 0]]


def test_one_bit_images(tmp_path):
    image = Image.fromarray(np.array([[False, True]]))
    _, result = mapped(tmp_path, image, value_map={0: "background", 1: "cup"})
    assert result == [[0, 1]]


@pytest.mark.parametrize("as_palette", [False, True])
@pytest.mark.parametrize(
    "value_map",
    [
        {"#804080": "road", "#4682B4": "sky", "#000000": None},
        {"128, 64, 128": "road", "70 130 180": "sky", "0,0,0": None},
        {ROAD: "road", SKY: "sky", VOID: None},
    ],
)
def test_colours(tmp_path, as_palette, value_map):
    image = Image.fromarray(np.array([[ROAD, SKY], [VOID, ROAD]], np.uint8))
    if as_palette:
        image = Image.fromarray(np.array([[2, 1], [0, 2]], np.uint8)).convert("P")
        image.putpalette([*VOID, *SKY, *ROAD])
    labels, result = mapped(tmp_path, image, value_map=value_map)
    assert result == [[0, 1], [255, 0]]
    assert labels.classes == ["road", "sky"]
    assert labels.colours == [list(ROAD), list(SKY)]


def test_order_and_merged_classes(tmp_path):
    image = Image.fromarray(VALUES.astype(np.uint8))
    value_map = {0: "background", 7: "cup", 200: "mug", 255: "table"}
    rename = {"mug": "cup", "table": None}
    classes = ["cup", "background"]
    labels, result = mapped(tmp_path, image, value_map=value_map, classes=classes, rename=rename)
    assert labels.classes == classes
    assert result == [[1, 0, 0], [255, 0, 1]]


def test_classes_without_value_map(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2, 3, 255]], np.uint8))
    options = {"classes": ["a", "b", "c"], "rename": {"b": "a"}, "value_map": None}
    labels, result = mapped(tmp_path, image, ignore=[3], **options)
    assert labels.classes == ["a", "c"] and result == [[0, 0, 1, 255, 255]]


def test_the_ignore_label_stays_where_it_fits(tmp_path):
    """So that other splits, which need no map, have the same."""
    image = Image.fromarray(np.array([[0, 11, 30]], np.uint8))
    classes = [f"c{i}" for i in range(11)]
    options = {"classes": classes, "value_map": None, "ignore_label": 11}
    labels, result = mapped(tmp_path, image, ignore=[30], **options)
    assert labels.ignore_label == 11 and result == [[0, 11, 11]]


def test_more_classes_than_eight_bits(tmp_path):
    image = Image.fromarray(np.array([[0, 299, 300]], np.uint16))
    labels, result = mapped(
        tmp_path, image, value_map={i: f"c{i}" for i in range(300)} | {300: None}
    )
    assert labels.dtype() is np.uint16 and result == [[0, 299, 65535]]


@pytest.mark.parametrize(
    ("value_map", "ignore", "message"),
    [
        ({0: "a", "#ff0000": "b"}, (), r"mix colours \(\(255, 0, 0\)\) and integers \(0\)"),
        ({0: "a"}, ("#ff0000",), "mix colours"),
        ({0: "a"}, (0,), "the value 0 of the ignored labels has the class 'a'"),
        ({"red": "a"}, (), "has 'red', which is neither an integer nor a colour"),
        ({(1, 2): "a"}, (), "neither an integer nor a colour"),
        ({(1, 2, 256): "a"}, (), "neither an integer nor a colour"),
        ({True: "a"}, (), "has True, which is neither"),
        ({0: True}, (), "has 0: True, which is no class name.*quote"),
        ({0: None}, (), "VALUE_MAP has no class"),
        ({"#ff0000": "a", "255,0,0": "b"}, (), "the value '255,0,0' more than once"),
    ],
)
def test_wrong_maps(value_map, ignore, message):
    with pytest.raises(ValueError, match=message):
        make_labels("d", None, value_map, None, ignore, None)
    with pytest.raises(ValueError, match="has neither CLASSES nor VALUE_MAP"):
        make_labels("d", None, None, None, (), None)


def test_values_that_the_map_lacks(tmp_path):
    image = Image.fromarray(VALUES.astype(np.uint8))
    with pytest.raises(ValueError, match=r"a\.png has the value 7 \(2 pixels\), 200 \(1 pixels\)"):
        mapped(tmp_path, image, value_map={0: "a", 255: "b"})
    with pytest.raises(ValueError, match=r"a\.png has the value #070707 \(2 pixels\)"):
        mapped(tmp_path, image, value_map={"#000000": "a", "#ffffff": "b", "#c8c8c8": "b"})
    colours = Image.fromarray(np.array([[ROAD, SKY]], np.uint8))
    with pytest.raises(ValueError, match=r"a\.png is an image of colours, but VALUE_MAP has int"):
        mapped(tmp_path, colours, value_map={0: "a"})
    with pytest.raises(ValueError, match=r"JPEG changes values: save label images as PNG"):
        mapped(tmp_path, colours, "a.jpg", value_map={"#804080": "road"})


# ---- registered ----


def binary(tmp_path, *, folder=""):
    """Images and masks of 0 and 255: 48 of 96 pixels are an object."""
    own_data.images(tmp_path)
    for stem in own_data.STEMS:
        labels = np.uint8(255) * (own_data.labels() < 2)
        save(tmp_path / "labels" / folder / f"{stem}.png", labels)
    entry = own_data.entry("semantic", tmp_path, VALUE_MAP={0: "background", 255: "object"})
    del entry["CLASSES"]
    return entry


def test_loader_evaluator_and_check_see_the_same_labels(tmp_path):
    register_entries([binary(tmp_path)])
    metadata = MetadataCatalog.get("own_train")
    assert metadata.stuff_classes == ["background", "object"] and metadata.ignore_label == 255
    records = DatasetCatalog.get("own_train")
    expected = (own_data.labels() < 2).astype(int)
    assert len(records) == 3
    for record in records:
        assert (read_image(record["sem_seg_file_name"]) == expected).all()
    evaluator = build_semantic_evaluator("own_train", None)
    evaluator.reset()
    scores = np.stack([1 - expected, expected]).astype(np.float32)
    for record in records:
        evaluator.process([record], [{"sem_seg": torch.from_numpy(scores)}])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(100)
    index = build_index("own_train")
    assert not index.problems and not find_unlisted([index])
    report = ItemChecker(index)(index.items[0])
    assert not report.problems and report.pixels == {0: 48, 1: 48}


def test_problems_name_the_label_image(tmp_path):
    entry = binary(tmp_path)
    save(tmp_path / "labels/b.png", np.full((8, 12), 7, np.uint8))
    save(tmp_path / "labels/c.png", np.zeros((4, 12), np.uint8))
    register_entries([entry])
    with pytest.raises(ValueError, match=r"labels/b\.png has the value 7 \(96.*There are 2 prob"):
        DatasetCatalog.get("own_train")
    problems = build_index("own_train").problems
    assert [problem.file.rpartition("/")[2] for problem in problems] == ["b.png", "c.png"]
    assert "(4, 12), but its image" in problems[1].why
    # Corrected files are read again.
    for stem in "bc":
        save(tmp_path / f"labels/{stem}.png", np.zeros((8, 12), np.uint8))
    assert len(DatasetCatalog.get("own_train")) == 3


def test_nested_folders_and_several_extensions(tmp_path):
    entry = binary(tmp_path, folder="train/town")
    (tmp_path / "images/train/town").mkdir(parents=True)
    for stem, extension in zip(own_data.STEMS, ("jpg", "JPG", "jpeg"), strict=True):
        (tmp_path / f"images/{stem}.jpg").rename(tmp_path / f"images/train/town/{stem}.{extension}")
    register_entries([entry | {"IMAGE_EXT": ["jpeg", "jpg"], "LABEL_EXT": ["png", "tif"]}])
    records = DatasetCatalog.get("own_train")
    assert [r["file_name"].rpartition("images/")[2] for r in records] == [
        "train/town/a.jpg",
        "train/town/b.JPG",
        "train/town/c.jpeg",
    ]
    assert records[0]["sem_seg_file_name"].endswith("/train/town/a.png")
    (tmp_path / "images/train/town/a.jpeg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.jpg has the same name .*a\.jpeg"):
        DatasetCatalog.get("own_train")
    (tmp_path / "images/train/town/a.jpeg").unlink()
    (tmp_path / "images/train/town/a.jpg").unlink()
    (tmp_path / "images/train/town/a.jpg").symlink_to("nothing.jpg")
    with pytest.raises(FileNotFoundError, match=r"a\.jpg is a link to a file that does not exist"):
        DatasetCatalog.get("own_train")
