"""tools/demo.py with a tiny model of random weights."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from load_script import load_script
from PIL import Image

from mask2former.config import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/shapes/panoptic-segmentation/maskformer2_R18_quickstart.yaml"
TINY = [
    "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "64",
    "MODEL.MASK_FORMER.HIDDEN_DIM", "16", "MODEL.MASK_FORMER.DIM_FEEDFORWARD", "16",
    "MODEL.MASK_FORMER.DEC_LAYERS", "2", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "5",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32", "MODEL.SEM_SEG_HEAD.MASK_DIM", "16",
]  # fmt: skip


demo = load_script("tools/demo.py")


@pytest.fixture(scope="module")
def opts(tmp_path_factory) -> list[str]:
    torch.manual_seed(0)
    model = build_model(load_config(str(CONFIG), TINY))
    path = tmp_path_factory.mktemp("model") / "model.pth"
    torch.save({"model": model.state_dict()}, path)
    return [*TINY, "MODEL.WEIGHTS", str(path)]


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("a.jpg", (40, 60, 3)), ("b.png", (64, 48, 3)), ("grey.jpg", (32, 32))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def run(opts, *arguments) -> None:
    demo.main(["--config-file", str(CONFIG), *map(str, arguments), "--opts", *opts])


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def test_folder_draws_the_first_task(opts, images, tmp_path):
    run(opts, "--input", images, "--output", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "grey.png"]
    assert size(tmp_path / "out/a.png") == (60, 40)
    assert size(tmp_path / "out/b.png") == (48, 64)
    assert size(tmp_path / "out/grey.png") == (32, 32)


def test_all_tasks_glob_and_repeated_images(opts, images, tmp_path):
    keep_all = ["MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", "0.0"]
    keep_all += ["MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", "0.0"]
    arguments = ["--input", f"{images}/*.jpg", images / "a.jpg", "--task", "all"]
    arguments += ["--confidence-threshold", "0"]
    run([*opts, *keep_all], *arguments, "--output", tmp_path / "out")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    tasks = ["instance", "panoptic", "semantic"]
    assert names == [f"{stem}_{task}.png" for stem in ("a", "grey") for task in tasks]
    original = np.asarray(Image.open(images / "a.jpg"))
    for task in tasks:
        drawing = np.asarray(Image.open(tmp_path / f"out/a_{task}.png").convert("RGB"))
        assert np.abs(drawing.astype(int) - original).max() > 30, task
    # The same input gives the same drawing.
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    run([*opts, *keep_all], *arguments, "--output", tmp_path / "out")
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_single_drawing_to_a_file(opts, images, tmp_path):
    target = tmp_path / "new" / "drawing.png"
    run(opts, "--input", images / "a.jpg", "--output", target, "--task", "semantic")
    assert size(target) == (60, 40)


def test_unreadable_images_are_reported_and_others_drawn(opts, images, tmp_path):
    whole = (images / "a.jpg").read_bytes()
    (images / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "fake.jpg").write_text("no image")
    with pytest.raises(SystemExit) as error:
        run(opts, "--input", images, "--output", tmp_path / "out")
    message = str(error.value)
    assert "2 images could not be predicted" in message
    assert "broken.jpg" in message and "fake.jpg" in message and "a.jpg:" not in message
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "grey.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{images}/*.gif", "--output", "out"], r"\*\.gif: no image file"),
        (["--input", "{images}/missing.jpg", "--output", "out"], "missing.jpg: no image file"),
        (["--input", "{images}", "--output", "{images}"], "b.png would be overwritten"),
        (["--input", "{images}", "--output", "out.png"], "there are 4 drawings"),
        (
            ["--input", "{images}/a.jpg", "--task", "all", "--output", "out.png"],
            "there are 3 drawings",
        ),
        (["--input", "{images}/a.jpg", "--output", "{images}/notes.txt"], "is a file"),
        (["--input", "{images}/a.jpg", "{images}/sub/a.jpg", "--output", "out"], "both be written"),
    ],
)
def test_bad_paths(opts, images, tmp_path, monkeypatch, arguments, message):
    (images / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(images / "sub" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(opts, *(argument.format(images=images) for argument in arguments))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images"]


def test_disabled_task(opts, images, tmp_path):
    off = ["MODEL.MASK_FORMER.TEST.INSTANCE_ON", "False"]
    arguments = ["--input", images, "--output", tmp_path / "out", "--task", "instance"]
    with pytest.raises(SystemExit, match=r"panoptic, semantic only: .*INSTANCE_ON True"):
        run([*opts, *off], *arguments)


def test_weights_are_required(opts, images, tmp_path):
    arguments = ["--input", images, "--output", tmp_path / "out"]
    with pytest.raises(SystemExit, match=r"MODEL\.WEIGHTS"):
        run(TINY, *arguments)
    with pytest.raises(SystemExit, match="does not exist"):
        run([*TINY, "MODEL.WEIGHTS", str(tmp_path / "none.pth")], *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_full_disk(opts, images, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    for image in images.iterdir():
        os.symlink("/dev/full", output / f"{image.stem}.png.tmp")
    with pytest.raises(SystemExit, match=r"^error: Cannot write \S*\.png: No space left on device"):
        run(opts, "--input", images, "--output", output)
    assert not list(output.glob("*.png"))


def test_missing_gpu(opts, images, tmp_path):
    with pytest.raises(SystemExit, match="MODEL.DEVICE cpu"):
        run([*opts, "MODEL.DEVICE", "cuda"], "--input", images, "--output", tmp_path / "out")


def test_bad_threshold(opts, images, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(opts, "--input", images, "--output", tmp_path, "--confidence-threshold", "50")
    assert "not in 0 to 1" in capsys.readouterr().err


def test_custom_data_of_the_config(opts, images, tmp_path, monkeypatch):
    """With ten classes, like the model."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))
    (tmp_path / "labels").mkdir()
    Image.fromarray(np.zeros((64, 48), np.uint8)).save(tmp_path / "labels" / "b.png")
    entry = {
        "NAME": "demo_own",
        "TYPE": "semantic",
        "IMAGE_ROOT": str(images),
        "LABEL_ROOT": str(tmp_path / "labels"),
        "CLASSES": [f"class {i}" for i in range(10)],
    }
    own = ["DATASETS.CUSTOM", repr([entry])]
    own += ["DATASETS.TRAIN", "('demo_own',)", "DATASETS.TEST", "('demo_own',)"]
    own += ["MODEL.MASK_FORMER.TEST.PANOPTIC_ON", "False"]
    arguments = ["--input", images / "a.jpg", "--output", tmp_path / "out", "--task", "semantic"]
    run([*opts, *own], *arguments)
    assert size(tmp_path / "out/a.png") == (60, 40)


def test_dataset_does_not_fit_the_model(opts, images, tmp_path):
    arguments = ["--input", images, "--output", tmp_path / "out"]
    with pytest.raises(
        SystemExit, match="'shapes_vall' is not registered; did you mean shapes_val"
    ):
        run([*opts, "DATASETS.TEST", "('shapes_vall',)"], *arguments)
    with pytest.raises(
        SystemExit, match="NUM_CLASSES is 10, but data set 'coco_2017_val_panoptic'"
    ):
        run([*opts, "DATASETS.TEST", "('coco_2017_val_panoptic',)"], *arguments)
