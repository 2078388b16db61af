"""The preparation of COCO: semantic labels from panoptic annotations, and COCO-Stuff 10k."""

import json
from pathlib import Path

import dataset_trees
import numpy as np
import pytest
from dataset_trees import HEIGHT, WIDTH
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image
from scipy.io import savemat

ONE = ["--workers", "1"]
SEMANTIC = "prepare_coco_semantic_annos_from_panoptic_annos"
STUFF = "prepare_coco_stuff_10k_sem_seg"


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def mtimes(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


# ---- semantic labels from panoptic annotations ----


def test_semantic_from_panoptic(script, tmp_path, capsys):
    base = dataset_trees.coco_panoptic(tmp_path, COCO_CATEGORIES)
    script(SEMANTIC).main(["--root", str(tmp_path), "--workers", "2"])
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[:, 6:], expected[0], expected[-1] = 132, 255, 79
    for split, count in (("train2017", 2), ("val2017", 1)):
        outputs = sorted((base / f"panoptic_semseg_{split}").iterdir())
        assert [p.name for p in outputs] == [
            p.name for p in sorted((base / f"panoptic_{split}").iterdir())
        ]
        assert len(outputs) == count
        for output in outputs:
            assert read(output).dtype == np.uint8
            np.testing.assert_array_equal(read(output), expected)
    before = mtimes(tmp_path)
    script(SEMANTIC).main(["--root", str(tmp_path), *ONE])
    assert mtimes(tmp_path) == before
    assert "0 files written, 2 existed already" in capsys.readouterr().out


def test_labels_equal_the_registered_ids(script):
    """For any order of the categories in the JSON."""
    expected = {category["id"]: label for label, category in enumerate(COCO_CATEGORIES)}
    module = script(SEMANTIC)
    assert module.contiguous_ids(COCO_CATEGORIES) == expected
    assert module.contiguous_ids(COCO_CATEGORIES[::-1]) == expected


def test_semantic_from_real_panoptic(script, shared_data, tmp_path):
    coco = tmp_path / "coco"
    coco.mkdir()
    for name in ("annotations", "panoptic_val2017"):
        (coco / name).symlink_to(shared_data / "coco" / name)
    script(SEMANTIC).main(["--root", str(tmp_path), "--splits", "val2017"])
    content = json.loads((coco / "annotations" / "panoptic_val2017.json").read_text())
    label_of = {category["id"]: label for label, category in enumerate(COCO_CATEGORIES)}
    assert len(content["annotations"]) == 50
    for annotation in content["annotations"]:
        ids = read(coco / "panoptic_val2017" / annotation["file_name"]).astype(int)
        ids = ids @ [1, 256, 65536]
        labels = read(coco / "panoptic_semseg_val2017" / annotation["file_name"])
        assert (labels[ids == 0] == 255).all()
        for segment in annotation["segments_info"]:
            assert (labels[ids == segment["id"]] == label_of[segment["category_id"]]).all()


def test_semantic_bad_input(script, tmp_path):
    main = script(SEMANTIC).main
    run = ["--root", str(tmp_path), "--splits", "val2017", *ONE]
    with pytest.raises(SystemExit, match=r"panoptic_val2017\.json does not exist\. Expected: the"):
        main(run)
    base = dataset_trees.coco_panoptic(tmp_path, COCO_CATEGORIES)
    png = base / "panoptic_val2017" / "000000000139.png"
    whole = png.read_bytes()

    pixels = read(png).copy()
    pixels[0, 0] = 9
    dataset_trees.save(png, pixels)
    with pytest.raises(SystemExit, match=rf"{png} has the segment id {9 * 65793} \(1 unkno"):
        main(run)
    dataset_trees.save(png, pixels[..., 0])
    with pytest.raises(SystemExit, match=rf"{png} is not a panoptic PNG"):
        main(run)
    png.write_bytes(whole[:-30])
    with pytest.raises(SystemExit, match=rf"{png} cannot be read, download it again"):
        main(run)
    png.unlink()
    with pytest.raises(SystemExit, match=rf"{png} does not exist"):
        main(run)
    png.parent.rmdir()
    with pytest.raises(SystemExit, match=rf"{png.parent} does not exist\. Expected: the panoptic"):
        main(run)
    png.parent.mkdir()
    json_file = base / "annotations" / "panoptic_val2017.json"
    json_file.write_text(json.dumps({"annotations": [], "categories": COCO_CATEGORIES[:80]}))
    with pytest.raises(
        SystemExit, match=r"not a COCO panoptic JSON .*133 classes, .* got 80 and 80"
    ):
        main(run)
    json_file.write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(SystemExit, match=rf"{json_file} is not a COCO panoptic JSON .*categories"):
        main(run)
    json_file.write_text('{"images": [')
    with pytest.raises(SystemExit, match=rf"{json_file} is not valid JSON, download it again"):
        main(run)


# ---- COCO-Stuff 10k ----


def test_stuff_10k(script, tmp_path):
    base = dataset_trees.coco_stuff_10k(tmp_path)
    script(STUFF).main(["--root", str(tmp_path), *ONE])
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    # Id 12 is unused: traffic light (10) is label 9, fire hydrant (11) 10, stop sign (13) 11.
    expected[:, 6:], expected[0], expected[-1, :6], expected[-1, 6:] = 170, 255, 9, 11
    for split, stems in (
        ("train", ["COCO_train2014_000000000077", "x"]),
        ("test", ["COCO_train2014_000000000092"]),
    ):
        labels = base / "annotations_detectron2" / split
        images = base / "images_detectron2" / split
        assert sorted(p.name for p in labels.iterdir()) == [f"{stem}.png" for stem in stems]
        assert sorted(p.name for p in images.iterdir()) == [f"{stem}.jpg" for stem in stems]
        for stem in stems:
            assert read(labels / f"{stem}.png").dtype == np.uint8
            np.testing.assert_array_equal(read(labels / f"{stem}.png"), expected)
    before = mtimes(tmp_path)
    script(STUFF).main(["--root", str(tmp_path), *ONE])
    assert mtimes(tmp_path) == before


def test_stuff_10k_bad_input(script, tmp_path):
    main, run = script(STUFF).main, ["--root", str(tmp_path), *ONE]
    with pytest.raises(SystemExit, match=r"imageLists/train\.txt does not exist\. Expected: coco/"):
        main(run)
    base = dataset_trees.coco_stuff_10k(tmp_path)
    path = base / "annotations" / "x.mat"
    whole = path.read_bytes()
    for classes in (
        np.full((HEIGHT, WIDTH), 12),
        np.full((HEIGHT, WIDTH), 183),
        np.zeros((1, 2, 3)),
    ):
        savemat(path, {"S": classes.astype(np.uint16)})
        with pytest.raises(SystemExit, match=rf"{path} has class ids unknown to COCO-Stuff"):
            main(run)
    savemat(path, {"S": np.ones((3, 4), np.uint16)})
    with pytest.raises(SystemExit, match=rf"{path} is 4x3 pixels, its image .*x\.jpg 12x8"):
        main(run)
    savemat(path, {"T": np.ones((3, 4), np.uint16)})
    with pytest.raises(SystemExit, match=rf"{path} cannot be read, download it again"):
        main(run)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit, match=rf"{path} cannot be read, download it again"):
        main(run)
    path.unlink()
    with pytest.raises(SystemExit, match=rf"{path} does not exist"):
        main(run)
