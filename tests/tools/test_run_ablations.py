"""tools/run_ablations.py: rows of the paper's tables, trained and shown beside its numbers."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from load_script import load_script
from small_resnet import SMALL_RESNET
from uninitialised import build_uninitialised

from mask2former.config import load_config
from mask2former.config_file import read_config_file
from mask2former.data.datasets.register_shapes import register_all_shapes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TINY = SMALL_RESNET | {
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NHEADS": 4,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 64,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 256,
    "INPUT.IMAGE_SIZE": 64,
    "INPUT.MIN_SIZE_TEST": 64,
    "SOLVER.IMS_PER_BATCH": 2,
    "LOGGING.PICTURES": 0,
    "LOGGING.HARD_EXAMPLES": 0,
    "SOLVER.MAX_ITER": 2,
}

# {table: recipe on which its rows build}
BASES = {
    "4a": "coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml",
    "architectures-panoptic": "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
    "architectures-semantic": "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml",
}

tool = load_script("tools/run_ablations.py")
page = sys.modules["ablation_page"]
speed = sys.modules["ablation_speed"]
TABLES = tool.read_tables(CONFIGS / "ablations/paper.yaml")


def own_values(param):
    path = CONFIGS / param.values[1].config
    return tool.own_values(path) if path.is_file() else {}


ROWS = [
    pytest.param(table, row, id=f"{table.key}-{row.slug}")
    for table in TABLES.values()
    for row in table.rows
    if row.config
]
ABLATIONS = [param for param in ROWS if param.values[0].kind == "ablation"]


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_every_row_has_a_config(table, row):
    """The header repeats the paper's numbers and names the command."""
    path = CONFIGS / row.config
    load_config(str(path), ["MODEL.DEVICE", "cpu"])
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert f"--config-file configs/{row.config}" in header
    for metric in ("AP", "PQ", "mIoU"):
        if metric in row.paper:
            assert re.search(rf"\b{row.paper[metric]}\b", header), (metric, header)


@pytest.mark.parametrize(
    ("table", "row"),
    # A row without differences is the recipe, which tests/tools/test_analyze_model.py counts.
    [p for p in ABLATIONS if "FLOPs" in p.values[1].paper and own_values(p)],
)
def test_multiply_adds_of_the_paper(table, row, monkeypatch):
    monkeypatch.setattr(tool, "build_model", build_uninitialised)
    # Close to the mean over all sizes.
    monkeypatch.setattr(tool, "COCO_SIZES", {(450, 640): 1})
    size = tool.model_size(CONFIGS / row.config, fps=False)
    assert size["FLOPs"] == pytest.approx(row.paper["FLOPs"], rel=0.03)


@pytest.mark.parametrize(("table", "row"), ABLATIONS)
def test_rows_state_only_their_differences(table, row, tmp_path):
    """Applied to a recipe, a row changes its own keys only, and the model can be built."""
    file = read_config_file(str(CONFIGS / row.config))
    own_base = yaml.safe_load((CONFIGS / row.config).read_text())["_BASE_"]
    assert own_base == f"../../{BASES.get(table.key, BASES['4a'])}"
    base = tool.task_recipe(tool.SHAPES, row.recipe) if row.recipe else tool.SHAPES
    config = tmp_path / "row.yaml"
    tool.write_row_config(row, base, config)
    base, changed = (load_config(str(path), ["MODEL.DEVICE", "cpu"]) for path in (base, config))
    flat, flat_base = ({k: v for k, v in _leaves(cfg)} for cfg in (changed, base))
    differing = {key for key in flat if flat[key] != flat_base[key]}
    assert differing <= file.own_keys
    build_uninitialised(changed)


def _leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# What the recipe of a row sets, but its model does not use.
UNUSED = {
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS",
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD",
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD",
    "MODEL.MASK_FORMER.CLASS_WEIGHT",
    "MODEL.MASK_FORMER.DICE_WEIGHT",
    "MODEL.MASK_FORMER.MASK_WEIGHT",
}


@pytest.mark.parametrize(
    ("row", "recipe", "unused"),
    [
        ("panoptic_maskformer", "coco-panoptic/maskformer_panoptic_R50_bs64_554k", set()),
        ("semantic_maskformer", "ade20k-150/maskformer_R50_bs16_160k", UNUSED),
        (
            "semantic_per_pixel_baseline_plus",
            "ade20k-150/per_pixel_baseline_plus_R50_bs16_160k",
            UNUSED,
        ),
        (
            "semantic_per_pixel_baseline",
            "ade20k-150/per_pixel_baseline_R50_bs16_160k",
            {
                *UNUSED,
                "MODEL.MASK_FORMER.DROPOUT",
                "MODEL.MASK_FORMER.DEC_LAYERS",
                "MODEL.MASK_FORMER.TRANSFORMER_IN_FEATURE",
            },
        ),
    ],
)
def test_architectures_are_those_of_maskformers_recipes(row, recipe, unused):
    files = (f"ablations/architectures/{row}.yaml", f"maskformer/{recipe}.yaml")
    ours, theirs = (
        dict(_leaves(load_config(str(CONFIGS / file), ["MODEL.DEVICE", "cpu"]).MODEL, "MODEL."))
        for file in files
    )
    assert {key for key in ours if ours[key] != theirs[key]} <= unused


def test_one_query_per_class_of_the_base(tmp_path):
    """ADE20K has 150 classes, Shapes 10."""
    rows = {row.name: row for row in TABLES["architectures-semantic"].rows}
    row = rows["per-pixel baseline plus"]
    base = tool.task_recipe(tool.SHAPES, row.recipe)
    tool.write_row_config(row, base, tmp_path / "row.yaml")
    head = load_config(str(tmp_path / "row.yaml"), ["MODEL.DEVICE", "cpu"]).MODEL
    assert head.MASK_FORMER.NUM_OBJECT_QUERIES == head.SEM_SEG_HEAD.NUM_CLASSES == 10


def test_figure_3_has_the_layers_that_it_asks_for(tmp_path):
    """Shapes' model has three layers, that of COCO nine."""

    def layers(base, *rows):
        args = tool.parse_args(["fig3", "--output", str(tmp_path), "--base", str(base)])
        runs = tool.plan(tool.choose(TABLES, ["fig3"], rows or None), args)
        (config,) = {tool.load_config(str(r.config), r.opts).dump() for r in runs.values()}
        return yaml.safe_load(config)["MODEL"]["MASK_FORMER"]["DEC_LAYERS"] - 1

    assert layers(tool.SHAPES) == 9
    assert layers(tool.SHAPES, "layer 3", "layer 6") == 6
    assert layers(tool.SHAPES, "learnable queries", "layer 3") == 3
    assert layers(CONFIGS / BASES["architectures-panoptic"], "layer 3") == 9


def test_order_differences():
    paper = {"a": 3.0, "b": 2.0, "c": 2.0, "d": 1.0}
    assert page.order_differences(paper, paper) == []
    # b and c are equal in the paper: they have no order. e is not in the paper.
    here = {"a": 1.5, "b": 1.0, "c": 2.0, "d": 1.2, "e": 9.0}
    assert page.order_differences(paper, here) == [("c", "a"), ("d", "b")]


def test_rows_of_one_name(tmp_path):
    """Their configs would overwrite each other."""
    rows = [{"name": "row"}, {"name": "row+"}]
    content = {"4a": {"kind": "ablation", "title": "Title", "rows": rows}}
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"4a have the same name in files: \['row', 'row'\]"):
        page.read_tables(tmp_path / "paper.yaml")


def test_page(tmp_path):
    rows = [
        page.Row("one", "", "", None, {"AP": 2.0, "FLOPs": 10}),
        page.Row("two", "", "", None, {"AP": 1.0}),
    ]
    table = page.Table("4a", "ablation", "Title", rows)
    results = {
        ("4a", "one"): [page.Result({"AP": 1.0}, 2**20, 60), page.Result({"AP": 3.0}, 2**21, 60)],
        ("4a", "two"): [page.Result({"AP": 4.0}, 2**20, 120)],
    }
    text = page.write_page(tmp_path, [table], results, {}, "base.yaml").read_text()
    assert "| one   | 2.0 (1)     | 2.0 ± 1.4 (2) |" in text
    assert "two > one (+2.0 here, -1.0 in the paper)" in text
    assert "Trained: base.yaml, 2 seeds." in text
    assert re.search(r"\| seeds +\|$.*\| 2 +\|$.*\| 1 +\|$", text, re.MULTILINE | re.DOTALL)
    assert "mIoU of semantic models on ADE20K" in text
    assert (tmp_path / "table_4a.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "ablations.json").read_text())
    assert content[0]["runs"][1] == {"scores": {"AP": 3.0}, "memory": 2**21, "seconds": 60}
    # Nothing was trained: no plot, no order.
    text = page.write_page(tmp_path / "counted", [table], {}, {}, "base.yaml").read_text()
    assert "Trained" not in text and "order" not in text
    # Not a table of the paper's.
    text = page.write_page(tmp_path, [table._replace(key="other")], {}, {}, "").read_text()
    assert "## Title\n" in text
    assert not (tmp_path / "counted/table_4a.png").exists()


def test_recipes_of_other_tasks():
    path = tool.task_recipe(tool.SHAPES, "instance-segmentation")
    assert path.parts[-2:] == ("instance-segmentation", tool.SHAPES.name)
    with pytest.raises(FileNotFoundError, match="recipe per task"):
        tool.task_recipe(CONFIGS / "lvis/instance-segmentation/a.yaml", "panoptic-segmentation")


@pytest.mark.parametrize(
    ("table", "base"),
    [
        ("7a", "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"),
        ("7b", "ade20k/panoptic-segmentation/maskformer2_R50_bs16_160k.yaml"),
        ("7c", "cityscapes/panoptic-segmentation/maskformer2_R50_bs16_90k.yaml"),
    ],
)
def test_table_7_has_the_numbers_of_its_recipes(table, base):
    for row in TABLES[table].rows:
        text = tool.task_recipe(CONFIGS / base, row.recipe).read_text()
        for metric, score in row.paper.items():
            assert f"{metric} {score}" in text


@pytest.mark.parametrize("metric", ["mIoU", "IoU"])
def test_results_of_a_run(tmp_path, metric):
    """The official evaluation of Cityscapes writes IoU. A metric without a value is left out."""
    tasks = {"sem_seg": {metric: 70.5, "iIoU": 1.0}, "segm": {"AP": None, "AP50": 2.0}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"val": tasks}))
    (tmp_path / "run.json").write_text(json.dumps({"memory": 3, "seconds": 4}))
    result = tool.read_result(tool.Run("name", tmp_path / "config.yaml", tmp_path, []))
    assert result == page.Result({"mIoU": 70.5}, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["9"], "table '9' is not one of 1, 2, 3, 4a"),
        (["4a", "--rows", "wrong"], "row 'wrong' is not one of Mask2Former, no masked"),
        (["4a", "--base", "missing.yaml"], "missing.yaml"),
        (["4a", "--opts", "SOLVER.MAX_ITERS", "3"], "Did you mean SOLVER.MAX_ITER"),
        (["4a", "--opts", "DATASETS.TEST", "('a','b')"], r"TEST is \['a', 'b'\], but a table"),
        (["fig3", "--opts", "MODEL.MASK_FORMER.DEC_LAYERS", "4"], "needs 9 decoder layers.* 3:"),
    ],
)
def test_mistakes_are_found_before_training(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "train_all", lambda *_: pytest.fail("training started"))
    monkeypatch.setattr(tool, "prepare_data", lambda: None)
    with pytest.raises(SystemExit, match=message):
        tool.main([*arguments, "--output", str(tmp_path)])


def test_two_tables_of_one_training(tmp_path, monkeypatch, capsys):
    """Rows without differences share a training; a second call trains nothing."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Programs read the variable, this process has read it before.
    for catalog in (DatasetCatalog, MetadataCatalog):
        others = {k: v for k, v in catalog.data.items() if not k.startswith("shapes_")}
        monkeypatch.setattr(catalog, "data", others)
    register_all_shapes(str(tmp_path / "data"))
    monkeypatch.setattr(tool, "sizes_of", lambda *_: {})  # tested above
    prepare = [sys.executable, str(ROOT / "datasets/prepare_shapes.py"), "--size", "64"]
    prepare += ["--output", str(tmp_path / "data/shapes"), "--num-train", "4", "--num-val", "2"]
    forked.run(prepare, check=True)
    programs = SimpleNamespace(**vars(subprocess) | {"run": forked.run})
    monkeypatch.setattr(tool, "subprocess", programs)

    common = ["--output", str(tmp_path / "out"), "--opts"]
    common += [str(item) for pair in TINY.items() for item in pair]

    def call(*opts):
        tool.main(["4a", "fig3", "--rows", "Mask2Former", "layer 3", *common, *opts])

    call()
    assert "[1/1] 4a_mask2former seed 1" in capsys.readouterr().out
    content = json.loads((tmp_path / "out/ablations.json").read_text())
    assert content[0]["runs"][0]["scores"].keys() == {"AP", "PQ", "mIoU"}
    assert content[0]["runs"][0]["memory"] > 2**27
    assert content[1]["runs"][0]["scores"].keys() == {"AR"}

    # Latency, with settings of inference: thresholds that keep one query and all.
    (run,) = tool.plan(
        tool.choose(TABLES, ["4a"], ["Mask2Former"]), tool.parse_args(["4a", *common])
    ).values()
    key = "MODEL.MASK_FORMER.TEST.PRUNE_QUERIES"
    rows = [
        page.Row("row", "", "", None, {}, {f"{key}_AFTER": 1, f"{key}_THRESHOLD": x})
        for x in (1.0, 0.0)
    ]
    whole, pruned = tool.measure([(row, run) for row in rows])
    assert whole["queries"] == 30 >= pruned["queries"] >= 1
    assert whole["relative"] == 1 and whole["latency"] > 0
    assert pruned["relative"] == pytest.approx(pruned["latency"] / whole["latency"])

    programs.Popen = programs.run = lambda *_, **__: pytest.fail("started a program")
    call()
    # Another table with a row without differences reuses the run.
    tool.main(["4b", "--rows", "Mask2Former", *common])
    with pytest.raises(SystemExit, match="different SOLVER.BASE_LR: delete that folder"):
        call("SOLVER.BASE_LR", "0.1")


def test_speed_rows_share_a_training(tmp_path):
    """Settings of inference are no training of their own; `--base` is not read."""
    rows = ["nine layers", "nine layers, pruned after 3 above 0.9", "three layers"]
    args = tool.parse_args(["speed", "--output", str(tmp_path), "--base", "missing.yaml"])
    runs = tool.plan(tool.choose(TABLES, ["speed"], rows), args)
    whole, pruned, three = runs.values()
    assert whole == pruned != three
    layers = [
        load_config(str(r.config), r.opts).MODEL.MASK_FORMER.DEC_LAYERS for r in runs.values()
    ]
    assert layers == [10, 10, 4]
    row = {row.name: row for row in TABLES["speed"].rows}[rows[1]]
    test = load_config(str(pruned.config), tool.test_opts(row, pruned)).MODEL.MASK_FORMER.TEST
    assert (test.PRUNE_QUERIES_AFTER, test.PRUNE_QUERIES_THRESHOLD) == (3, 0.9)


def test_speed_rows_on_the_page(tmp_path):
    """Settings of inference change the latency, not the parameters of the row without them."""
    whole = page.Row("whole", "a.yaml", "", None, {})
    table = page.Table(
        "speed", "speed", "Title", [whole, whole._replace(name="cut", test={"A": 1})]
    )
    sizes = {
        "a.yaml": {"params": 2.0, "queries": 30.0, "latency": 40.0, "relative": 1.0},
        "a.yaml cut": {"queries": 12.25, "latency": 34.0, "relative": 0.85},
    }
    text = page.write_page(tmp_path, [table], {}, sizes, "base.yaml").read_text()
    cells = [
        [x.strip() for x in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    assert cells[0] == ["row", "params (M)", "queries left", "latency (ms)", "latency, relative"]
    assert cells[2:] == [
        ["whole", "2.0", "30.0", "40.0", "1.00"],
        ["cut", "", "12.2", "34.0", "0.85"],
    ]


def test_evaluation_with_settings_is_not_repeated(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(speed.subprocess, "run", lambda command, **_: commands.append(command))
    run = tool.Run("name", tmp_path / "a.yaml", tmp_path, ["SEED", "1"])
    row = page.Row("cut after 1", "a.yaml", "", None, {}, {"KEY": 1})
    folder = tmp_path / "test/cut_after_1"
    folder.mkdir(parents=True)
    assert tool.evaluate(row, run, 0) == tool.evaluate(row, run, 0) == folder
    assert len(commands) == 1 and "--eval-only" in commands[0]
    opts = ["SEED", "1", "KEY", "1", "OUTPUT_DIR", str(folder), "MODEL.WEIGHTS"]
    assert commands[0][-8:] == [*opts, str(tmp_path / "model_final.pth")]
    tool.evaluate(row._replace(test={"KEY": 2}), run, 0)
    assert len(commands) == 2


def test_an_interrupt_starts_no_further_training(tmp_path, monkeypatch):
    started = []

    def interrupted(run, *_):
        started.append(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "train", interrupted)
    args = tool.parse_args(["4a", "--output", str(tmp_path)])
    runs = [tool.Run(str(i), tmp_path, tmp_path / str(i), []) for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        tool.train_all(runs, args)
    assert len(started) == 1


def test_each_job_has_its_own_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(tool.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,5,7")
    assert tool.devices_of_jobs(2, 2) == ["1,3", "5,7"]
    assert tool.devices_of_jobs(0, 2) == [None, None]
    with pytest.raises(ValueError, match="--jobs 3 with --num-gpus 2 needs 6 GPUs.* has 4"):
        tool.devices_of_jobs(2, 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert tool.devices_of_jobs(1, 2) == ["0", "1"]
