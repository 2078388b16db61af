"""YOLO polygons: layouts of data.yaml, labels, and what is refused."""

import annotation_samples as samples
import pytest
from dataset_trees import photograph

from mask2former.data.formats.annotation_formats import FORMATS, ReadOptions, recognise_format

TRIANGLE = "0 0 0 0.5 0 0.5 1\n"  # (0, 0), (6, 0), (6, 8)


def read(root, split=None, **options):
    return FORMATS["yolo"].read(root, ReadOptions(split=split, **options))


def dataset(root, yaml, *, folder="train/images", label=TRIANGLE):
    """An image of 12 x 8 pixels in a folder, with a label."""
    photograph(root / folder / "a.jpg")
    labels = folder.replace("images", "labels")
    samples.write_text(root / labels / "a.txt", label)
    samples.write_text(root / "data.yaml", yaml)


def polygons(content):
    return [item.segmentation for image in content.images for item in image.objects]


TRIANGLE_PIXELS = [[[0, 0, 6, 0, 6, 8]]]


@pytest.mark.parametrize(
    ("yaml", "folder"),
    [
        ("train: images/train\nnames: [cup]", "images/train"),
        ("train: [images/train]\nnc: 1\nnames: [cup]", "images/train"),
        ("path: .\ntrain: ./images/train\nnames: {0: cup}", "images/train"),
        ("path: data\ntrain: images/train\nnames: {'0': cup}", "data/images/train"),
        # Roboflow names folders relative to another one.
        ("train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cup']", "train/images"),
        # Written on another machine.
        ("path: /content/set\ntrain: train/images\nnames: [cup]", "train/images"),
        ("train: /content/set/train/images\nnames: [cup]", "train/images"),
        ("train: set-1/train/images\nnames: [cup]", "train/images"),
        (r"train: train\images" + "\nnames: [cup]", "train/images"),
        # Labels beside the images.
        ("train: data\nnames: [cup]", "data"),
    ],
)
def test_layouts(tmp_path, yaml, folder):
    dataset(tmp_path, yaml, folder=folder)
    content = read(tmp_path, "train")
    assert content.classes == ["cup"]
    assert polygons(content) == TRIANGLE_PIXELS
    assert content.images[0].path == tmp_path / folder / "a.jpg"


@pytest.mark.parametrize(
    "line",
    ["images/train/a.jpg", "./images/train/a.jpg", "data/images/train/a.jpg", "/x/train/a.jpg"],
)
def test_list_of_images(tmp_path, line):
    """As CVAT exports it, and with paths of other machines."""
    dataset(tmp_path, "train: train.txt\nnames: [cup]", folder="images/train")
    samples.write_text(tmp_path / "train.txt", f"{line}\n\n")
    if line.startswith("/x"):
        (tmp_path / "train").symlink_to(tmp_path / "images" / "train")
        (tmp_path / "images" / "train" / "a.txt").write_text(TRIANGLE)
    assert polygons(read(tmp_path)) == TRIANGLE_PIXELS


def test_valid_is_val(tmp_path):
    """Roboflow: the key is val, the folder valid."""
    yaml = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: [cup]"
    dataset(tmp_path, yaml, folder="valid/images")
    for split in ("val", "valid"):
        assert polygons(read(tmp_path, split)) == TRIANGLE_PIXELS
    with pytest.raises(ValueError, match="has the splits train, val, test; state which"):
        read(tmp_path)
    with pytest.raises(ValueError, match="has no split 'dev', only train, val, test"):
        read(tmp_path, "dev")
    with pytest.raises(FileNotFoundError, match=r"names '\.\./test/images', which does not exist"):
        read(tmp_path, "test")


def test_images_elsewhere(tmp_path):
    dataset(tmp_path / "data", "", folder="train/images")
    samples.write_text(tmp_path / "configs" / "cups.yaml", "train: train/images\nnames: [cup]")
    root = tmp_path / "configs" / "cups.yaml"
    assert polygons(read(root, image_root=tmp_path / "data")) == TRIANGLE_PIXELS


def test_without_yaml(tmp_path):
    """As Label Studio exports it."""
    dataset(tmp_path, "", folder="images")
    (tmp_path / "data.yaml").unlink()
    samples.write_text(tmp_path / "classes.txt", "cup\nplate\n")
    assert recognise_format(tmp_path)[0].name == "yolo"
    content = read(tmp_path)
    assert content.classes == ["cup", "plate"]
    assert polygons(content) == TRIANGLE_PIXELS


def test_classes(tmp_path):
    dataset(tmp_path, "train: train/images\nnc: 2", label="1 0 0 1 0 1 1\n")
    assert read(tmp_path).classes == ["class_0", "class_1"]
    content = read(tmp_path, classes=("cup", "plate"))
    assert content.classes == ["cup", "plate"]
    assert content.images[0].objects[0].class_name == "plate"
    dataset(tmp_path, "train: train/images\nnames: [7, 1.5]")
    assert read(tmp_path).classes == ["7", "1.5"]


def test_no_objects(tmp_path):
    """Without label file, with an empty one, with blank lines."""
    dataset(tmp_path, "train: train/images\nnames: [cup]")
    for name, text in (("b", None), ("c", ""), ("d", "\n \n")):
        photograph(tmp_path / "train" / "images" / f"{name}.jpg")
        if text is not None:
            samples.write_text(tmp_path / "train" / "labels" / f"{name}.txt", text)
    content = read(tmp_path)
    assert [len(image.objects) for image in content.images] == [1, 0, 0, 0]


def test_slightly_outside_is_clipped(tmp_path, caplog):
    dataset(tmp_path, "train: train/images\nnames: [cup]", label="0 -0.01 0 0.5 0 0.5 1 0 1.02\n")
    content = read(tmp_path)
    (polygon,) = content.images[0].objects[0].segmentation
    assert min(polygon) == 0
    assert max(polygon[::2]) == 6
    assert max(polygon[1::2]) == 8
    assert not caplog.records
    dataset(tmp_path, "train: train/images\nnames: [cup]", label="0 0 0 1.5 0 1.5 1 0 1\n")
    assert polygons(read(tmp_path)) == [[[0, 0, 12, 0, 12, 8, 0, 8]]]
    assert "x 0 to 18, y 0 to 8, beyond the 12 x 8 pixels of the image. It is clip" in caplog.text


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", "line 1: 4 numbers after the class are a box, which has no mask; ex"),
        (TRIANGLE + "0 0.5 0.5 0.2 0.2 7", "line 2: 5 numbers after the class are a box"),
        ("0 0 0 1 0 1 1 0", r"line 1: 7 numbers after the class; a polygon is x1 y1 x2"),
        ("0 0.1 0.1", "line 1: 2 numbers after the class; a polygon is"),
        ("1 0 0 1 0 1 1", "line 1: the class 1 is not one of the 1, which count from 0"),
        ("-1 0 0 1 0 1 1", "line 1: the class -1 is not"),
        ("0.5 0 0 1 0 1 1", "line 1: the class 0.5 is not"),
        ("cup 0 0 1 0 1 1", "line 1: 'cup 0 0 1 0 1 1' is no list of numbers"),
        ("0 nan 0 1 0 1 1", "line 1: a polygon has coordinates that are not finite"),
        ("nan 0 0 1 0 1 1", "line 1: the class nan is not"),
        ("0 0 0 100 0 100 90", "line 1: .* x 0 to 1200, .* by more than its longest side"),
        ("0 1.2 0 1.5 0 1.5 1", "line 1: a polygon .*: it is outside of it; correct or remove"),
    ],
)
def test_bad_labels(tmp_path, label, message):
    dataset(tmp_path, "train: train/images\nnames: [cup]", label=label)
    file = tmp_path / "train" / "labels" / "a.txt"
    with pytest.raises(ValueError, match=f"^{file}, {message}"):
        read(tmp_path)


def test_all_problems_are_counted(tmp_path):
    label = "0 0.5 0.5 0.2 0.2\n" * 3
    dataset(tmp_path, "train: train/images\nnames: [cup]", label=label)
    with pytest.raises(ValueError, match=r"line 1: .*There are 3 problems\.$"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: [", r"data\.yaml cannot be read as YAML: .*line"),
        ("- a", "has no KEY: VALUE entries"),
        ("train: train/images\nnames: cup", "has no list of class names 'names'"),
        ("train: train/images\nnc: 2\nnames: [cup]", "nc is 2, but there are 1 names"),
        ("train: train/images\nnames: [cup, cup]", "names the class 'cup' more than once"),
        ("train: train/images\nnames: [yes, no]", "a class is named True. YAML reads words"),
        ("train: train/images\nnames: {1: cup}", "the keys of names must be 0 to 0"),
        ("train: train/images\nnames: {}", "names no class"),
        ("train: 3\nnames: [cup]", "train is 3; it must be a path or a list of paths"),
        ("train: train/images\nnames: [cup]\nkpt_shape: [5, 3]", "it describes poses"),
        ("names: [cup]", "names no images"),
        ("train: !!python/name:os.system\nnames: [cup]", "cannot be read as YAML"),
    ],
)
def test_bad_yaml(tmp_path, yaml, message):
    dataset(tmp_path, yaml)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "data.yaml")


def test_files_that_do_not_fit(tmp_path):
    dataset(tmp_path, "train: train/images\nnames: [cup]")
    with pytest.raises(FileNotFoundError, match=r"holds no data\.yaml with 'names' and"):
        read(tmp_path / "train" / "images")
    samples.write_text(tmp_path / "train" / "labels" / "z.txt", TRIANGLE)
    samples.write_text(tmp_path / "train" / "labels" / "classes.txt", "cup")
    with pytest.raises(FileNotFoundError, match=r"z\.txt has no image of its name in .*images"):
        read(tmp_path)
    for file in (tmp_path / "train" / "labels").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"none of the 1 images has a label file; that of"):
        read(tmp_path)
    (tmp_path / "train" / "images" / "a.jpg").unlink()
    with pytest.raises(ValueError, match="there are no images in .*train/images"):
        read(tmp_path)


def test_the_same_image_twice(tmp_path):
    dataset(tmp_path, "train: train.txt\nnames: [cup]", folder="images/train")
    samples.write_text(tmp_path / "train.txt", "images/train/a.jpg\n./images/train/a.jpg\n")
    with pytest.raises(ValueError, match=r"train\.txt, line 2.*occurs more than once.*line 1"):
        read(tmp_path)


def test_two_configs(tmp_path):
    dataset(tmp_path, "train: train/images\nnames: [cup]")
    (tmp_path / "cups.yaml").write_text("train: train/images\nnames: [plate]")
    assert read(tmp_path).classes == ["cup"]  # data.yaml is the usual name
    (tmp_path / "data.yaml").rename(tmp_path / "plates.yml")
    with pytest.raises(ValueError, match=r"several files that describe YOLO data .*name one"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        ("images/train", "train"),
        ("images/train2017", "train2017"),
        ("train/images", "train"),
        ("images", None),
    ],
)
def test_folders_without_yaml(tmp_path, folder, split):
    """As Ultralytics gives its samples, whose YAML files are in their package."""
    dataset(tmp_path, "", folder=folder, label="\n" + TRIANGLE)
    if split is not None:
        dataset(tmp_path, "", folder=folder.replace(split, "val"), label="")
    (tmp_path / "data.yaml").unlink()
    samples.write_text(tmp_path / "README.txt", "not a label file")
    assert recognise_format(tmp_path)[0].name == "yolo"
    content = read(tmp_path, split, classes=("cup", "plate"))
    assert content.classes == ["cup", "plate"]
    assert [image.path.parent for image in content.images] == [tmp_path / folder]
    assert polygons(content) == TRIANGLE_PIXELS
    with pytest.raises(ValueError, match="has no data.yaml and no classes.txt: name all classes"):
        read(tmp_path, split)
    if split is not None:
        with pytest.raises(ValueError, match=f"has the splits {split}, val; state which to read"):
            read(tmp_path, classes=("cup", "plate"))


def test_folders_that_are_no_splits(tmp_path):
    """Images beside folders, or a folder without labels: all are read."""
    dataset(tmp_path, "", folder="images/kitchen")
    photograph(tmp_path / "images" / "b.jpg")
    (tmp_path / "data.yaml").unlink()
    assert len(read(tmp_path, classes=("cup",)).images) == 2


def test_other_texts_are_not_recognised(tmp_path):
    dataset(tmp_path, "", folder="images", label="a photograph of 1 cup\n")
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(ValueError, match="holds no annotations of a known format"):
        recognise_format(tmp_path)


def test_yaml_above_its_folder(tmp_path):
    """`path` of Ultralytics is relative to the folder of all its data sets."""
    dataset(tmp_path / "coco8-seg", "", folder="images/train")
    (tmp_path / "coco8-seg" / "data.yaml").unlink()
    file = tmp_path / "coco8-seg.yaml"
    samples.write_text(file, "path: ../datasets/coco8-seg\ntrain: images/train\nnames: {0: cup}")
    assert polygons(read(file, "train")) == TRIANGLE_PIXELS


def test_boxes_as_masks(tmp_path):
    """Boxes among polygons, as in exports of mixed projects; a score makes no box."""
    dataset(tmp_path, "train: train/images\nnames: [cup]", label=f"{TRIANGLE}0 0.5 0.5 0.5 0.25\n")
    with pytest.raises(ValueError, match="line 2: 4 numbers .* set BOXES_AS_MASKS: True"):
        read(tmp_path)
    box = [3, 3, 9, 3, 9, 5, 3, 5]
    assert polygons(read(tmp_path, boxes_as_masks=True)) == [*TRIANGLE_PIXELS, [box]]
    samples.write_text(tmp_path / "train" / "labels" / "a.txt", "0 0.5 0.5 0.5 0.25 0.9\n")
    with pytest.raises(ValueError, match="line 1: 5 numbers after the class are a box"):
        read(tmp_path, boxes_as_masks=True)


def test_images_without_label_file_are_said(tmp_path, caplog):
    dataset(tmp_path, "train: train/images\nnames: [cup]")
    for name in "bcd":
        photograph(tmp_path / "train" / "images" / f"{name}.jpg")
    samples.write_text(tmp_path / "train" / "labels" / "d.txt", "")
    read(tmp_path)
    assert "b.jpg: has no label file, like 1 more of the 4 images" in caplog.text


def test_labels_apart_from_images(tmp_path):
    """An export without images: the labels beside data.yaml come before stray ones."""
    dataset(tmp_path / "export", "train: images/train\nnames: [cup]", folder="images/train")
    images = tmp_path / "photographs"
    (tmp_path / "export" / "images").rename(images)
    (images / "images").mkdir()
    (images / "train").rename(images / "images" / "train")
    samples.write_text(images / "labels" / "train" / "a.txt", "")
    assert polygons(read(tmp_path / "export", image_root=images)) == TRIANGLE_PIXELS
    other = tmp_path / "other"
    other.mkdir()
    photograph(tmp_path / "export" / "images" / "train" / "a.jpg")
    with pytest.raises(ValueError, match=r"IMAGE_ROOT is .*other, but none of the 1 images"):
        read(tmp_path / "export", image_root=other)


def test_new_names_do_not_name_labels(tmp_path):
    dataset(tmp_path, "train: train/images\nnc: 2")
    assert read(tmp_path, classes=("cup", "dish"), rename={"cup": "dish"}).classes[0] == "cup"
    with pytest.raises(ValueError, match=r"data\.yaml: .*'crockery' is a new name of RENAME"):
        read(tmp_path, classes=("crockery", "spoon"), rename={"cup": "crockery"})
