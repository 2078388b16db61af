"""Every section of docs/extending.md, run as it stands from a folder outside the repository."""

import json
import os
import re
import sys
from pathlib import Path

import forked
import pytest
from small_resnet import SMALL_RESNET

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = {
    title: dict(re.findall(r"```(python|yaml)\n(.*?)```", text, re.DOTALL))
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
}
SMALL = SMALL_RESNET | {
    "MODEL.DEVICE": "cpu",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NHEADS": 4,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "INPUT.IMAGE_SIZE": 64,
    "INPUT.MIN_SIZE_TEST": 64,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "LOGGING.PICTURES": 0,
    "LOGGING.HARD_EXAMPLES": 0,
    "SOLVER.MAX_ITER": 1,
    "SEED": 1,
}
# Runs each program as `python train.py` does, one after the other: imports take seconds.
DRIVER = """
import json, runpy, sys, traceback
results = {}
for folder, arguments in json.load(sys.stdin):
    sys.argv = arguments
    try:
        runpy.run_path(f"{folder}/train.py", run_name="__main__")
        results[folder] = None
    except BaseException:
        results[folder] = traceback.format_exc()
with open("results.json", "w") as file:
    json.dump(results, file)
"""
BUILT_IN = {f"loss_{kind}{layer}" for kind in ("ce", "mask", "dice") for layer in ("", "_0", "_1")}


def slug(title):
    return title.lower().replace(" ", "_")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which every program has run, with results.json."""
    folder = tmp_path_factory.mktemp("extending")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DETECTRON2_DATASETS": str(folder),
    }
    prepare = [sys.executable, str(ROOT / "datasets" / "prepare_shapes.py"), "--size", "64"]
    prepare += ["--output", str(folder / "shapes"), "--num-train", "8", "--num-val", "2"]
    forked.run(prepare, check=True)
    jobs = []
    for title, blocks in SECTIONS.items():
        own = folder / slug(title)
        own.mkdir()
        (own / "train.py").write_text(blocks["python"])
        config = blocks["yaml"].replace("_BASE_: configs", f"_BASE_: {ROOT / 'configs'}")
        (own / "own.yaml").write_text(config)
        options = SMALL | {"OUTPUT_DIR": own / "output"}
        pairs = [str(item) for pair in options.items() for item in pair]
        jobs.append((slug(title), ["train.py", "--config-file", f"{own}/own.yaml", *pairs]))
    command = [sys.executable, "-W", "ignore", "-c", DRIVER]
    program = forked.run(command, input=json.dumps(jobs), env=environment, cwd=folder)
    assert program.returncode == 0, program.stderr[-3000:]
    return folder


def test_sections_are_complete():
    assert list(SECTIONS) == [
        "A loss",
        "A matcher",
        "A criterion",
        "A dataset mapper",
        "An evaluator type",
        "Config keys",
        "A meta-architecture",
        "A backbone",
        "A pixel decoder",
        "A transformer decoder",
        "A cross-attention",
    ]
    for title, blocks in SECTIONS.items():
        assert set(blocks) == {"python", "yaml"}, title


@pytest.mark.parametrize("title", SECTIONS)
def test_is_short(title):
    assert len(SECTIONS[title]["python"].splitlines()) < 30


@pytest.mark.parametrize("title", SECTIONS)
def test_section_runs(folder, title):
    """One training step and an evaluation."""
    error = json.loads((folder / "results.json").read_text())[slug(title)]
    assert error is None, error
    output = folder / slug(title) / "output"
    row = json.loads((output / "metrics.json").read_text().splitlines()[0])
    extra = {f"loss_boundary{layer}" for layer in ("", "_0", "_1")} if title == "A loss" else set()
    losses = {name for name in row if name.startswith("loss")}
    assert losses == BUILT_IN | extra
    assert all(0 < row[name] < 100 for name in losses)
    evaluation = json.loads((output / "evaluation.json").read_text())
    if title == "An evaluator type":
        assert 0 <= evaluation["my_val"]["segments"]["mean"] <= 100
    else:
        assert "PQ" in evaluation["shapes_val_panoptic"]["panoptic_seg"]


def test_sections_change_what_they_say(folder):

    def metrics(title):
        text = (folder / slug(title) / "output" / "metrics.json").read_text()
        return json.loads(text.splitlines()[0])

    # The seed is the same, so the section that only adds a loss has the other losses unchanged.
    plain, halved, grey = map(metrics, ("A loss", "A meta-architecture", "A dataset mapper"))
    squared = metrics("A criterion")
    assert halved["loss_ce"] == pytest.approx(plain["loss_ce"], rel=1e-5)
    assert halved["loss_ce_0"] == pytest.approx(plain["loss_ce_0"] / 2, rel=1e-5)
    assert grey["loss_ce"] != plain["loss_ce"]
    assert squared["loss_ce"] == pytest.approx(plain["loss_ce"], rel=1e-5)
    assert squared["loss_mask"] < plain["loss_mask"]  # (1 - p)² < -ln p
    written = (folder / slug("Config keys") / "output" / "config.yaml").read_text()
    assert "TEMPERATURE: 2.0" in written
