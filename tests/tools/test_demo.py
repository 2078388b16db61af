"""tools/demo.py with a tiny model of random weights."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from load_script import load_script
from PIL import Image
from pycocotools.coco import COCO

from mask2former.config import load_config
from mask2former.inference import video_run
from mask2former.inference.model_file import save_model_folder
from mask2former.inference.video import VideoReader, VideoWriter, can_show_windows

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


# ---- folders, results, report ----

KEEP_ALL = ["MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD", "0.0"]
KEEP_ALL += ["MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD", "0.0"]


@pytest.fixture
def tree(images) -> Path:
    """Two images of one name in two folders, and a broken one."""
    (images / "sub").mkdir()
    Image.new("RGB", (30, 20), (200, 0, 0)).save(images / "sub" / "a.jpg")
    (images / "sub" / "broken.png").write_bytes(b"no image")
    return images


def test_names_that_differ_in_little(opts, tmp_path):
    """Each image, of a width of its own, has its drawing and its result file."""
    names = ["a.jpg", "a.png", "a.jpeg", "a.jpg.png", "a_png.jpg", "a.jpeg.png/c.jpg"]
    names += ["results.jpg"]  # as the folder of --save
    for i, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32 + i, 32)).save(path)
    arguments = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--task", "panoptic"]
    run(opts, *arguments, "--save", "panoptic")
    files = {p for p in (tmp_path / "out").rglob("*.png") if p.is_file()}
    results = {p for p in files if tmp_path / "out/results" in p.parents}
    for written in (results, files - results):
        assert sorted(size(path)[0] for path in written) == [32 + i for i in range(len(names))]


def report_data(path: Path) -> dict:
    (data,) = re.findall(r'id="data">(.*?)</script>', path.read_text(), re.S)
    return json.loads(data)


def test_subfolders_results_and_report(opts, tree, tmp_path):
    output, html = tree / "out", tmp_path / "new" / "report.html"
    arguments = ["--input", tree, "--output", output, "--html", html, "--top-k", "3"]
    arguments += ["--save", "json", "panoptic", "--task", "panoptic", "--batch-size", "3"]
    for _ in range(2):  # the second run does not read what the first has written
        with pytest.raises(SystemExit, match=r"1 images could not be predicted:\n\s*\S*broken.png"):
            run([*opts, *KEEP_ALL], *arguments)
    drawings = sorted(p.relative_to(output).as_posix() for p in output.rglob("*.png"))
    names = ["a.png", "b.png", "grey.png", "sub/a.png"]
    assert drawings == sorted([*names, *(f"results/panoptic/{name}" for name in names)])
    assert size(output / "sub/a.png") == (30, 20)

    coco = COCO(output / "results/images.json")
    loaded = coco.loadRes(str(output / "results/coco_instances_results.json"))
    assert [image["file_name"] for image in coco.imgs.values()] == [
        "a.jpg",
        "b.png",
        "grey.jpg",
        "sub/a.jpg",
    ]
    assert [len(loaded.getAnnIds(i)) for i in coco.imgs] == [3, 3, 3, 3]
    data = report_data(html)
    assert [image["name"] for image in data["images"]] == list(
        image["file_name"] for image in coco.imgs.values()
    )
    ((name, reason),) = data["broken"]
    assert name == "sub/broken.png" and reason.startswith(f"{tree}/sub/broken.png cannot be read")
    assert data["unit"] == "segment" and all(image["pred"] for image in data["images"])
    assert data["notes"][1].startswith("No ground truth: ")  # Shapes were not written here


def test_report_of_instances_without_drawings(opts, images, tmp_path):
    html = tmp_path / "report.html"
    arguments = ["--input", images, "--html", html, "--task", "instance", "--min-score", "0.05"]
    run(opts, *arguments, "--confidence-threshold", "0.3", "--min-score-class", "circle=1")
    data = report_data(html)
    assert data["score"] == 0.3 and len(data["classes"]) == 10
    circle = data["classes"].index("circle")
    predicted = [one for image in data["images"] for one in image["pred"]]
    assert predicted and all(score >= 0.1 and label != circle for label, score, _ in predicted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "report.html"]


def test_not_recursive(opts, tree, tmp_path):
    run(opts, "--input", tree, "--no-recursive", "--output", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == ["a.png", "b.png", "grey.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--html", "report.txt"], "does not end in .html"),
        (["--save", "json"], "--save writes to the folder --output"),
        (["--dataset", "shapes_val", "--output", "out"], "--dataset is for --html and --save"),
        (["--output", "out", "--batch-size", "0"], "--batch-size is 0"),
        (["--output", "out", "--overlap", "8"], "--overlap is of tiles: add --tile-size"),
        (["--output", "out", "--tile-size", "32", "--overlap", "17"], "--overlap is 17, not 0 to"),
        (["--output", "out", "--max-frames", "2"], "--max-frames is for --video-input and"),
    ],
)
def test_wrong_combinations(opts, images, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(opts, "--input", images, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-score", "2"], "min_score is 2.0; allowed: 0 to 1"),
        (["--min-score-class", "cow=0.5"], "cow"),
        (["--min-score-class", "circle"], "circle is not CLASS=SCORE"),
        (["--html", "a.html", "--dataset", "nowhere"], "'nowhere' is not registered"),
    ],
)
def test_wrong_values(opts, images, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(opts, "--input", images, "--output", "out", *arguments)
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob("out/*"))


def test_tiles(opts, images, clip, tmp_path, monkeypatch):
    """Of images and videos; one of 60 x 40 pixels in four tiles of 32."""
    model = demo.Predictor.outputs
    seen = []
    monkeypatch.setattr(
        demo.Predictor,
        "outputs",
        lambda self, batch, *a, **k: (
            seen.append([x.shape for x in batch]) or model(self, batch, *a, **k)
        ),
    )
    tiles = ["--tile-size", 32, "--overlap", 4, "--batch-size", 4]
    run(opts, "--input", images / "a.jpg", "--output", tmp_path / "a.png", *tiles)
    assert size(tmp_path / "a.png") == (60, 40)
    assert seen == [[(32, 32, 3)] * 4]
    run(opts, "--video-input", clip, "--output", tmp_path / "b.mp4", "--max-frames", 1, *tiles)
    assert (tmp_path / "b.mp4").is_file() and len(seen) > 1


def test_windows_need_an_opencv_with_windows(opts, images, capsys):
    if can_show_windows():
        pytest.skip("this OpenCV has windows, and may not have a display")
    with pytest.raises(SystemExit):
        run(opts, "--input", images)
    assert "--output is missing: " in capsys.readouterr().err


def test_model_folder(opts, images, tmp_path):
    cfg = load_config(str(CONFIG), opts)
    torch.manual_seed(0)
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    save_model_folder(build_model(cfg), cfg, metadata, str(tmp_path / "model"))
    arguments = ["--model", str(tmp_path / "model"), "--input", str(images)]
    demo.main([*arguments, "--output", str(tmp_path / "a"), "--opts", "MODEL.DEVICE", "cpu"])
    run(opts, "--input", images, "--output", tmp_path / "b")
    drawn = [[p.read_bytes() for p in sorted((tmp_path / name).iterdir())] for name in "ab"]
    assert len(drawn[0]) == 3 and drawn[0] == drawn[1]


# ---- videos ----


@pytest.fixture
def clip(tmp_path) -> Path:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, (32, 48), 10) as writer:
        for i in range(4):
            writer.write(np.full((32, 48, 3), 40 * i, np.uint8))
    return path


def test_video_to_a_file_and_to_a_folder(opts, clip, tmp_path):
    run(opts, "--video-input", clip, "--output", tmp_path / "drawn.webm")
    run(opts, "--video-input", clip, "--output", tmp_path / "out", "--max-frames", "2")
    for name, number in (("drawn.webm", 4), ("out/clip.mp4", 2)):
        with VideoReader(tmp_path / name) as reader:
            assert (reader.size, reader.fps) == ((32, 48), pytest.approx(10))
            assert len(list(reader)) == number


def test_broken_video(opts, clip, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(SystemExit, match=r"^error: \S*broken.mp4 cannot be read as a video"):
        run(opts, "--video-input", broken, "--output", tmp_path / "drawn.mp4")
    # Of several, the others are predicted.
    with pytest.raises(SystemExit, match=r"1 of 2 videos could not be predicted:\n  \S*broken.mp4"):
        run(opts, "--video-input", broken, clip, "--output", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["clip.mp4"]
    assert not (tmp_path / "drawn.mp4").exists()


def test_interrupted_video_leaves_nothing(opts, clip, tmp_path, monkeypatch):
    calls = []

    def draw(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return np.zeros((32, 48, 3), np.uint8)

    monkeypatch.setattr(demo, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        run(opts, "--video-input", clip, "--output", tmp_path / "out/drawn.mp4")
    assert list((tmp_path / "out").iterdir()) == []


def test_camera_records_until_it_is_interrupted(opts, clip, tmp_path, monkeypatch):
    """The camera is a file here; the video is as long as the recording."""

    class Camera(VideoReader):
        def __init__(self, source):
            assert source == 0
            super().__init__(clip)

        def __iter__(self):
            yield from super().__iter__()
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "VideoReader", Camera)
    monkeypatch.setattr(video_run, "VideoReader", Camera)
    seconds = iter([0, 0.0, 0.5, 0.5, 1.0])
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr(video_run, "time", clock)
    run(opts, "--webcam", "--output", tmp_path / "recorded.mp4")
    with VideoReader(tmp_path / "recorded.mp4") as reader:
        assert len(list(reader)) == 10  # 1 second at 10 frames per second


def test_no_camera(opts, tmp_path):
    with pytest.raises(SystemExit, match="camera 999 cannot be opened"):
        run(opts, "--webcam", "999", "--output", tmp_path / "a.mp4")
