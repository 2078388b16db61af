"""The preparation of ADE20K: semantic, full, panoptic and instance annotations."""

import json
import os
from pathlib import Path

import dataset_trees
import numpy as np
import pytest
from dataset_trees import HEIGHT, WIDTH, ade20k_labels, ade20k_objects
from PIL import Image
from pycocotools import mask as mask_util

TRAIN = dataset_trees.ADE20K_STEMS["training"]
ONE = ["--workers", "1"]


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def read_ids(path: Path) -> np.ndarray:
    return read(path).astype(int) @ [1, 256, 65536]


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def contents(root: Path) -> dict[str, bytes]:
    return {name: content for name, (_, content) in snapshot(root).items()}


# ---- semantic ----


def test_semantic(script, tmp_path, capsys):
    base = dataset_trees.ade20k(tmp_path)
    main = script("prepare_ade20k_sem_seg").main
    main(["--root", str(tmp_path), "--workers", "2"])
    for folder, stems in dataset_trees.ADE20K_STEMS.items():
        output = base / "annotations_detectron2" / folder
        assert sorted(p.name for p in output.iterdir()) == [f"{stem}.png" for stem in stems]
        for stem in stems:
            labels = read(output / f"{stem}.png")
            assert labels.dtype == np.uint8 and labels.shape == (HEIGHT, WIDTH)
            # wall, sky, road, skyscraper, other
            assert [labels[0, 0], labels[4, 0], labels[0, 4], labels[0, 8], labels[7, 0]] == [
                0, 2, 6, 48, 255,
            ]  # fmt: skip
            assert np.bincount(labels.ravel())[[0, 2, 6, 48, 255]].tolist() == [24, 4, 28, 28, 12]
    before = snapshot(tmp_path)
    main(["--root", str(tmp_path), *ONE])
    assert snapshot(tmp_path) == before
    assert "0 files written, 2 existed already" in capsys.readouterr().out
    main(["--root", str(tmp_path), *ONE, "--force"])
    assert contents(tmp_path) == {name: content for name, (_, content) in before.items()}


def test_semantic_continues_after_an_interruption(script, tmp_path, interrupted):
    """Files are complete or absent; the next run writes missing and truncated ones."""
    base = dataset_trees.ade20k(tmp_path)
    module = script("prepare_ade20k_sem_seg")
    with interrupted(module, "save_image", 1):
        module.main(["--root", str(tmp_path), *ONE])
    output = base / "annotations_detectron2" / "training"
    assert [p.name for p in output.iterdir()] == [f"{TRAIN[0]}.png"]

    # An interrupted run of the original script leaves a truncated file.
    whole = (output / f"{TRAIN[0]}.png").read_bytes()
    (output / f"{TRAIN[0]}.png").write_bytes(whole[:-20])
    module.main(["--root", str(tmp_path), *ONE])
    assert (output / f"{TRAIN[0]}.png").read_bytes() == whole
    assert (output / f"{TRAIN[1]}.png").read_bytes() == whole


def test_semantic_of_real_labels(script, shared_data, tmp_path):
    sample = shared_data / "ade20k_sample" / "annotations"
    folder = tmp_path / "ADEChallengeData2016" / "annotations"
    folder.mkdir(parents=True)
    (folder / "validation").symlink_to(sample)
    script("prepare_ade20k_sem_seg").main(["--root", str(tmp_path), "--splits", "validation", *ONE])
    sources = sorted(sample.glob("*.png"))
    assert len(sources) == 3
    for source in sources:
        labels = read(source).astype(int)
        output = read(folder.parent / "annotations_detectron2" / "validation" / source.name)
        np.testing.assert_array_equal(output, np.where(labels == 0, 255, labels - 1))


# ---- full ----


def test_full(script, tmp_path):
    base = dataset_trees.ade20k_full(tmp_path)
    main = script("prepare_ade20k_full_sem_seg").main
    main(["--root", str(tmp_path), *ONE])
    for folder, stems in dataset_trees.ADE20K_STEMS.items():
        images, labels = (base / f"{k}_detectron2" / folder for k in ("images", "annotations"))
        assert sorted(p.name for p in images.iterdir()) == [f"{stem}.jpg" for stem in stems]
        assert sorted(p.name for p in labels.iterdir()) == [f"{stem}.tif" for stem in stems]
        expected = np.full((HEIGHT, WIDTH), 65535)
        expected[1:-1, :6], expected[1:-1, 6:] = 0, 846
        for stem in stems:
            written = read(labels / f"{stem}.tif")
            assert written.dtype == np.uint16
            np.testing.assert_array_equal(written, expected)
            source = base / "images" / "ADE" / folder / "urban" / "street" / f"{stem}.jpg"
            assert (images / f"{stem}.jpg").read_bytes() == source.read_bytes()
    before = snapshot(tmp_path)
    main(["--root", str(tmp_path), *ONE])
    assert snapshot(tmp_path) == before
    main(["--root", str(tmp_path), *ONE, "--force"])
    assert contents(tmp_path) == {name: content for name, (_, content) in before.items()}


def test_full_copies_if_links_fail(script, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("no links here")

    base = dataset_trees.ade20k_full(tmp_path)
    monkeypatch.setattr(os, "link", refuse)
    script("prepare_ade20k_full_sem_seg").main(["--root", str(tmp_path), *ONE])
    image = base / "images_detectron2" / "training" / f"{TRAIN[0]}.jpg"
    assert image.stat().st_nlink == 1 and read(image).shape == (HEIGHT, WIDTH, 3)


# ---- instances ----


def test_instances(script, tmp_path, capsys):
    base = dataset_trees.ade20k(tmp_path)
    main = script("prepare_ade20k_ins_seg").main
    main(["--root", str(tmp_path), "--workers", "2"])
    content = json.loads((base / "ade20k_instance_train.json").read_text())
    assert content["images"] == [
        {"id": stem, "file_name": f"{stem}.jpg", "width": WIDTH, "height": HEIGHT} for stem in TRAIN
    ]
    assert len(content["categories"]) == 100
    assert content["categories"][0] == {"id": 7, "name": "bed"}
    annotations = content["annotations"]
    assert [a["id"] for a in annotations] == list(range(1, 9))
    assert [a["image_id"] for a in annotations] == [TRAIN[0]] * 4 + [TRAIN[1]] * 4
    # bed, person, bed, person, in the order of the object numbers
    assert [a["category_id"] for a in annotations[:4]] == [7, 12, 7, 12]
    boxes = [[0, 0, 2, 2], [2, 0, 2, 2], [0, 2, 2, 2], [0, 4, 2, 2]]
    assert [a["bbox"] for a in annotations[:4]] == boxes
    assert {(a["area"], a["iscrowd"]) for a in annotations} == {(4, 0)}
    for annotation, number in zip(annotations, [1, 2, 3, 9] * 2, strict=True):
        assert set(annotation) == {
            "id", "image_id", "iscrowd", "category_id", "bbox", "segmentation", "area",
        }  # fmt: skip
        mask = mask_util.decode(annotation["segmentation"])
        np.testing.assert_array_equal(mask, ade20k_objects()[..., 1] == number)
    before = snapshot(tmp_path)
    main(["--root", str(tmp_path), *ONE])
    assert snapshot(tmp_path) == before
    assert "ade20k_instance_val.json is complete: nothing to do" in capsys.readouterr().out
    (base / "ade20k_instance_val.json").write_text('{"images": [')  # truncated
    main(["--root", str(tmp_path), *ONE])
    assert contents(tmp_path) == {name: content for name, (_, content) in before.items()}


# ---- panoptic ----


def test_panoptic_validation_equals_the_original(script, tmp_path):
    base = dataset_trees.ade20k(tmp_path)
    script("prepare_ade20k_pan_seg").main(["--root", str(tmp_path), *ONE])
    content = json.loads((base / "ade20k_panoptic_val.json").read_text())
    stem = dataset_trees.ADE20K_STEMS["validation"][0]
    entry = {"id": stem, "file_name": f"{stem}.jpg", "width": WIDTH, "height": HEIGHT}
    assert content["images"] == [entry]
    assert len(content["categories"]) == 150
    assert content["categories"][7] == {
        "id": 7, "name": "bed", "isthing": 1, "color": [204, 5, 255],
    }  # fmt: skip
    (annotation,) = content["annotations"]
    assert (annotation["image_id"], annotation["file_name"]) == (stem, f"{stem}.png")
    segments = annotation["segments_info"]
    # Stuff by class, then things by number. Areas of stuff include hidden pixels.
    assert [(s["category_id"], s["area"], s["bbox"], s["iscrowd"]) for s in segments] == [
        (0, 24, [0, 0, 4, 7], 0),
        (2, 4, [0, 4, 2, 2], 0),
        (6, 28, [4, 0, 4, 7], 0),
        (48, 28, [8, 0, 4, 7], 0),
        (7, 4, [0, 0, 2, 2], 0),
        (12, 4, [2, 0, 2, 2], 0),
        (7, 4, [0, 2, 2, 2], 0),
        (12, 4, [0, 4, 2, 2], 0),
    ]
    # Stuff and the first thing of a class have the colour of the class.
    ids = [s["id"] for s in segments]
    grey = 140 * (1 + 256 + 65536)
    assert ids[:4] == [120 * (1 + 256 + 65536), 6 + 230 * 256 + 230 * 65536, grey, grey]
    assert ids[4:6] == [204 + 5 * 256 + 255 * 65536, 150 + 5 * 256 + 61 * 65536]
    assert len(set(ids)) == 7 and 0 not in ids
    png = read_ids(base / "ade20k_panoptic_val" / f"{stem}.png")
    labels, numbers = ade20k_labels(), ade20k_objects()[..., 1]
    expected = np.zeros((HEIGHT, WIDTH), int)
    for label, segment in zip((1, 3, 7, 49), ids[:4], strict=True):
        expected[labels == label] = segment
    for number, segment in zip((1, 2, 3, 9), ids[4:], strict=True):
        expected[numbers == number] = segment
    np.testing.assert_array_equal(png, expected)
    # Other things have a colour near that of the class.
    for segment, color in ((ids[6], (204, 5, 255)), (ids[7], (150, 5, 61))):
        channels = np.array([segment % 256, segment // 256 % 256, segment // 65536])
        assert np.abs(channels - color).max() <= 30


def test_panoptic_training_segments_are_distinct(script, tmp_path):
    base = dataset_trees.ade20k(tmp_path)
    script("prepare_ade20k_pan_seg").main(["--root", str(tmp_path), "--workers", "2"])
    content = json.loads((base / "ade20k_panoptic_train.json").read_text())
    assert [a["image_id"] for a in content["annotations"]] == list(TRAIN)
    for annotation in content["annotations"]:
        segments = annotation["segments_info"]
        # The sky is hidden by a person.
        assert [s["category_id"] for s in segments] == [0, 6, 48, 7, 12, 7, 12]
        ids = [s["id"] for s in segments]
        png = read_ids(base / "ade20k_panoptic_train" / annotation["file_name"])
        assert set(ids) == set(np.unique(png).tolist()) - {0} and len(set(ids)) == 7
        assert (png[:7, 8:] == ids[2]).all() and (png[:7, 4:8] == ids[1]).all()


def test_panoptic_again(script, tmp_path, capsys, interrupted):
    """Every run writes the same bytes; an interrupted run leaves no JSON of other PNGs."""
    base = dataset_trees.ade20k(tmp_path)
    module = script("prepare_ade20k_pan_seg")
    module.main(["--root", str(tmp_path), *ONE])
    before = snapshot(tmp_path)
    module.main(["--root", str(tmp_path), *ONE])
    assert snapshot(tmp_path) == before
    assert "ade20k_panoptic_train.json is complete: nothing to do" in capsys.readouterr().out

    (base / "ade20k_panoptic_train" / f"{TRAIN[1]}.png").unlink()
    with interrupted(module, "save_image", 1):
        module.main(["--root", str(tmp_path), *ONE])
    assert not (base / "ade20k_panoptic_train.json").exists()
    module.main(["--root", str(tmp_path), *ONE])
    assert contents(tmp_path) == {name: content for name, (_, content) in before.items()}


def test_colors_of_many_things_are_distinct(script):
    module = script("prepare_ade20k_pan_seg")
    next_color = module.ColorGenerator("name", distinct_stuff=True)
    colors = [next_color(category) for category in module.CATEGORIES for _ in range(40)
              if category["isthing"]]  # fmt: skip
    stuff = [next_color(category) for category in module.CATEGORIES if not category["isthing"]]
    assert len({*colors, *stuff}) == len(colors) + len(stuff) == 4050
    assert (0, 0, 0) not in colors and stuff[0] == (120, 120, 120)


# ---- errors ----

SCRIPTS = ("prepare_ade20k_sem_seg", "prepare_ade20k_pan_seg", "prepare_ade20k_ins_seg")


@pytest.mark.parametrize("name", [*SCRIPTS, "prepare_ade20k_full_sem_seg"])
def test_wrong_folder(script, name, tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)does not exist\. Expected: the folder ADE.*--root"):
        script(name).main(["--root", str(tmp_path / "nowhere")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_instance_annotations_not_downloaded(script, name, tmp_path):
    base = dataset_trees.ade20k(tmp_path)
    (base / "annotations_instance").rename(base / "elsewhere")
    with pytest.raises(SystemExit, match=r"annotations_instance/training does not exist.*\.tar"):
        script(name).main(["--root", str(tmp_path)])


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("prepare_ade20k_sem_seg", "annotations"),
        ("prepare_ade20k_pan_seg", "annotations"),
        ("prepare_ade20k_pan_seg", "annotations_instance"),
        ("prepare_ade20k_ins_seg", "annotations_instance"),
    ],
)
def test_bad_files(script, name, folder, workers, tmp_path):
    base = dataset_trees.ade20k(tmp_path)
    path = base / folder / "training" / f"{TRAIN[1]}.png"
    whole = path.read_bytes()
    run = ["--root", str(tmp_path), "--workers", workers]

    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match=rf"{path} cannot be read, download it again"):
        script(name).main(run)
    dataset_trees.save(path, np.full((HEIGHT, WIDTH), 151, np.uint8))
    with pytest.raises(SystemExit, match=rf"{path} is not "):
        script(name).main(run)
    if name != "prepare_ade20k_sem_seg":  # which does not read images
        channels = () if folder == "annotations" else (3,)
        dataset_trees.save(path, np.zeros((4, 5, *channels), np.uint8))
        with pytest.raises(SystemExit, match=rf"{path} is 5x4 pixels, its image .* 12x8"):
            script(name).main(run)
        path.unlink()
        with pytest.raises(SystemExit, match=rf"{path} does not exist"):
            script(name).main(run)
    assert not list(base.glob("*_train.json"))
    assert not list(base.rglob("*.tmp"))


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_object_of_two_classes(script, name, tmp_path):
    base = dataset_trees.ade20k(tmp_path)
    path = base / "annotations_instance" / "training" / f"{TRAIN[0]}.png"
    for class_id, classes in ((101, r"\[1, 101\]"), (4, r"\[1, 4\]")):
        objects = ade20k_objects()
        objects[0, 0, 0] = class_id
        dataset_trees.save(path, objects)
        with pytest.raises(SystemExit, match=rf"{path}: object 1 has the classes {classes}"):
            script(name).main(["--root", str(tmp_path), *ONE])


def test_full_without_segmentation(script, tmp_path):
    base = dataset_trees.ade20k_full(tmp_path)
    path = base / "images/ADE/training/urban/street" / f"{TRAIN[0]}_seg.png"
    path.unlink()
    with pytest.raises(SystemExit, match=rf"{path} does not exist"):
        script("prepare_ade20k_full_sem_seg").main(["--root", str(tmp_path), *ONE])
    dataset_trees.save(path, np.zeros((HEIGHT, WIDTH), np.uint8))
    with pytest.raises(SystemExit, match=rf"{path} is not a segmentation"):
        script("prepare_ade20k_full_sem_seg").main(["--root", str(tmp_path), *ONE])


def test_bad_options(script, capsys):
    with pytest.raises(SystemExit):
        script("prepare_ade20k_sem_seg").main(["--workers", "0"])
    assert "--workers must be at least 1, not 0" in capsys.readouterr().err
