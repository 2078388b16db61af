"""tools/benchmark beyond `op`, on tiny cases: rows, files, wrong numbers, invalid options."""

import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
from load_script import load_script

from mask2former.utils.memory import KEEP_VARIABLE
from mask2former.utils.twins import runs_fast

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
OURS, UPSTREAM, PEER = "mask2former", "upstream steps", "transformers"


tool = load_script("tools/benchmark")
modules = {name: module for name, (module, _) in tool.COMMANDS.items()}
contenders = sys.modules["contenders"]
upstream_steps = sys.modules["upstream_steps"]
processes = sys.modules["processes"]

SMALL_MODEL = f"""
_BASE_: {CONFIGS / "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"}
MODEL:
  RESNETS: {{STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 16, WIDTH_PER_GROUP: 4}}
  SEM_SEG_HEAD: {{CONVS_DIM: 32, MASK_DIM: 32, TRANSFORMER_ENC_LAYERS: 1}}
  MASK_FORMER:
    HIDDEN_DIM: 32
    NUM_OBJECT_QUERIES: 30
    NHEADS: 4
    DIM_FEEDFORWARD: 256
    DEC_LAYERS: 4
"""
SMALL = {
    "model": ["--devices", "cpu", "--sizes", "64x64", "--batches", "2"],
    "train": ["--devices", "cpu", "--sizes", "64x64", "--targets", "3", "--points", "50"],
    "postprocess": ["--devices", "cpu", "--sizes", "64x64", "--outputs", "same,50x70"],
    "data": ["--images", "2", "--jitter", "64"],
    "evaluate": ["--images", "2", "--instances", "5"],
}


@pytest.fixture
def small(tmp_path):
    """Arguments of a tiny run of each subcommand."""
    config = tmp_path / "small.yaml"
    config.write_text(SMALL_MODEL)
    model = ["--config", str(config)]
    return {
        name: arguments + (model if name in ("model", "train") else [])
        for name, arguments in SMALL.items()
    }


@pytest.fixture
def forks(monkeypatch) -> None:
    """Processes of contenders are forked, which saves the time of their imports."""
    fake = SimpleNamespace(Popen=forked.Popen, PIPE=subprocess.PIPE)
    monkeypatch.setattr(processes, "subprocess", fake)


@pytest.fixture
def kept(monkeypatch) -> list[bool]:
    """Records calls of keep_freed_memory, which would affect the other tests of this process."""
    calls = []
    monkeypatch.setattr(tool, "keep_freed_memory", lambda: calls.append(True))
    return calls


@pytest.fixture
def run_with_chart(tmp_path, small, kept):
    """A function (name, *arguments) → exit status and report of a tiny run of a subcommand."""

    def run_small(name: str, *arguments: str) -> tuple[int, dict]:
        common = ["--quick", "--rounds", "2", "--output", str(tmp_path / "out")]
        status = tool.main([name, *small[name], *common, *arguments])
        return status, json.loads((tmp_path / "out" / f"{name}.json").read_text())

    return run_small


@pytest.fixture
def run(run_with_chart, monkeypatch):
    """`run_with_chart` without drawing the chart, which takes longer than many of the runs."""
    monkeypatch.setattr(sys.modules["report"], "bar_chart", lambda title, bars: b"")
    return run_with_chart


def table_of(markdown: str) -> list[list[str]]:
    lines = [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    header, separator, *rows = lines
    assert set(separator) == {"---"} and all(len(row) == len(header) for row in rows)
    return rows


def check_files(tmp_path, name: str, report: dict, output: str) -> None:
    folder = tmp_path / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{name}.{suffix}" for suffix in ("json", "md", "png")
    ]
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    markdown = (folder / f"{name}.md").read_text()
    assert output == markdown
    assert len(table_of(markdown)) == len(report["results"])
    assert report["benchmark"] == name and report["machine"]["cores"] >= 1
    assert report["command"].startswith(f"python tools/benchmark {name} ")
    for row in report["results"]:
        assert "error" not in row, row["error"]
        assert row["rounds"] == 2
        assert row["wall_seconds"]["min"] <= row["wall_seconds"]["median"]
        assert len(row["cpu_seconds"]["samples"]) == 2


def names_of(report: dict, *keys: str) -> list[tuple]:
    return [tuple(row[key] for key in (*keys, "contender")) for row in report["results"]]


def test_model(run_with_chart, tmp_path, capsys):
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    status, report = run_with_chart("model", "--precisions", "fp32,bf16", "--threads", "1")
    assert status == 0 and torch.get_num_threads() == threads
    check_files(tmp_path, "model", report, capsys.readouterr().out)
    expected = []
    for precision in ("fp32", "bf16"):
        for stage in modules["model"].STAGES:
            names = [OURS, UPSTREAM, PEER] if stage == "forward" else [OURS, UPSTREAM]
            expected += [(precision, stage, name) for name in names]
    assert names_of(report, "precision", "part") == expected
    for row in report["results"]:
        assert row["ratios"][UPSTREAM]["median"] > 0
        assert (PEER in row["ratios"]) == (row["part"] == "forward")
        counted = row["part"] != "post-processing"
        assert (row["multiply_adds"] is not None) == counted == ("times_arithmetic" in row)
    adds = {row["part"]: row["multiply_adds"] for row in report["results"]}
    assert adds["forward"] == adds["end to end"] > adds["backbone"] + adds["pixel decoder"]
    assert any("Panoptic pixels that differ, upstream steps: " in note for note in report["notes"])


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    "name, arguments, least",
    [
        # At least the semantic scores of two images, (133, 64, 64) in float32.
        ("model", ["--stages", "end to end", "--contenders", OURS], 2 * 133 * 64 * 64 * 4),
        # At least the gradients.
        ("train", ["--contenders", OURS], 2**20),
    ],
)
def test_memory_is_measured_in_a_new_process(name, arguments, least, run):
    status, report = run(name, "--memory", *arguments)
    assert status == 0
    assert report["results"][-1]["peak_bytes"] >= least


def test_memory_of_postprocessing():
    """In a process that was started, with the allocator that its environment asks for."""
    arguments = {"contender": UPSTREAM, "task": "panoptic", "size": [64, 64], "output": "same"}
    # At least the upsampled masks of all queries.
    assert processes.peak_in_process("postprocess", arguments, 1) >= 100 * 64 * 64 * 4


class InThread:
    """Stands in for `processes.Alone`, which takes seconds to start: serves the same commands."""

    def __init__(self, subcommand, arguments, threads, environment):
        self._commands, self._replies = queue.SimpleQueue(), queue.SimpleQueue()
        tasks = modules[subcommand].tasks_alone(json.loads(json.dumps(arguments)))
        served = tasks, iter(self._commands.get, None), self
        self._thread = threading.Thread(target=processes.serve, args=served, daemon=True)
        self._thread.start()

    def __enter__(self) -> "InThread":
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.put(None)
        self._thread.join()

    def ask(self, order: str):
        self._commands.put(order)
        return json.loads(self._replies.get(timeout=60))

    def write(self, text: str) -> None:
        if text.strip():
            self._replies.put(text)

    def flush(self) -> None:
        pass


OWN_PROCESSES = {
    "model": (["--stages", "forward", "--modes", "eager"], ["forward"]),
    "train": ([], modules["train"].PARTS),
    "postprocess": (["--tasks", "semantic", "--outputs", "same"], ["semantic"]),
}


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    "name, process",
    [
        ("model", InThread),
        ("train", InThread),
        ("postprocess", InThread),
        ("postprocess", processes.Alone),
    ],
)
def test_processes_of_their_own(name, process, run, monkeypatch):
    """With the allocator of their programs: ours keeps freed memory, the other does not."""
    environments = {}
    arguments, parts = OWN_PROCESSES[name]
    if name != "postprocess":
        arguments = [*arguments, "--contenders", f"{OURS},upstream"]
    if process is InThread:
        arguments = [*arguments, "--memory"]

    class Watched(process):
        def __init__(self, subcommand, arguments, threads, environment):
            environments.setdefault(arguments["contender"], environment)
            super().__init__(subcommand, arguments, threads, environment)

    monkeypatch.setattr(processes, "Alone", Watched)
    status, report = run(name, "--processes", "own", "--allocator", "programs", *arguments)
    assert status == 0
    assert environments == {OURS: {KEEP_VARIABLE: "1"}, UPSTREAM: {KEEP_VARIABLE: "0"}}
    assert names_of(report, "part") == [(p, who) for p in parts for who in (OURS, UPSTREAM)]
    for row in report["results"]:
        assert len(row["wall_seconds"]["samples"]) == 2
        assert min(row["cpu_seconds"]["samples"]) >= 0 and row["ratios"][UPSTREAM]["median"] > 0
        measures_memory = process is InThread and row["part"] == parts[-1]
        assert (row.get("peak_bytes") is not None) == measures_memory


@pytest.mark.usefixtures("forks")
def test_process_that_fails(capfd):
    arguments = {"contender": "nobody", "task": "all", "size": [64, 64], "output": "same"}
    with (
        processes.Alone("postprocess", arguments, 1, {}) as alone,
        pytest.raises(RuntimeError, match="ended with status 1"),
    ):
        alone.ask("start")
    assert "KeyError: 'nobody'" in capfd.readouterr().err


def test_model_with_weights(run, tmp_path, small):
    _, model = contenders.build(tool.make_parser().parse_args(["model", *small["model"]]))
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    weights = ["--weights", str(tmp_path / "weights.pth"), "--contenders", OURS]
    status, report = run("model", *weights, "--stages", "end to end")
    assert status == 0
    assert names_of(report, "part") == [("end to end", OURS)]


@pytest.mark.parametrize("modes", ["eager,compiled", "compiled"])
def test_compiled_takes_turns_with_eager(modes, run, monkeypatch):
    compiled = []

    def compile(module, mode):
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile)
    arguments = ["--contenders", f"{OURS},{UPSTREAM}", "--stages", "backbone,forward"]
    status, report = run("model", "--modes", modes, *arguments)
    assert status == 0 and len(compiled) == 2
    both = [f"{OURS} compiled", f"{UPSTREAM} compiled"]
    if modes == "compiled":
        assert names_of(report, "part") == [("forward", name) for name in both]
        return
    assert names_of(report, "part") == [
        ("backbone", OURS),
        ("backbone", UPSTREAM),
        ("forward", both[0]),
        ("forward", OURS),
        ("forward", both[1]),
        ("forward", UPSTREAM),
    ]
    assert {OURS, UPSTREAM} == set(rows_of(report, both[0])[0]["ratios"])


def test_train_with_other_checkpointing(run):
    status, report = run("train", "--contenders", f"{OURS},none,blocks")
    assert status == 0
    names = (OURS, "no checkpointing", "checkpointed blocks")
    assert names_of(report, "part") == [
        (part, name) for part in modules["train"].PARTS for name in names
    ]


def test_train(run_with_chart, tmp_path, capsys):
    pytest.importorskip("transformers")
    status, report = run_with_chart("train", "--contenders", f"{OURS},{UPSTREAM},{PEER}")
    assert status == 0
    check_files(tmp_path, "train", report, capsys.readouterr().out)
    parts = modules["train"].PARTS
    assert names_of(report, "part") == [
        (part, name) for part in parts for name in (OURS, UPSTREAM, PEER)
    ]
    for row in report["results"]:
        assert (row["part"] == "step") == ("host_syncs" in row) == ("operator_calls" in row)
    ours, upstream, peer = report["results"][-3:]
    assert ours["host_syncs"] <= 3
    # The others copy costs per image and layer: 2 images, 4 layers.
    assert min(peer["host_syncs"], upstream["host_syncs"]) >= 2 * 4
    assert 1000 < ours["operator_calls"] < upstream["operator_calls"]
    assert ours["peak_bytes"] is None
    *parts, step = (row["wall_seconds"]["samples"] for row in rows_of(report, OURS))
    assert np.sum(parts, axis=0) == pytest.approx(step)


def test_train_in_half_precision(run):
    status, report = run("train", "--precisions", "bf16,fp16", "--contenders", f"{OURS},{UPSTREAM}")
    assert status == 0
    parts = modules["train"].PARTS
    assert names_of(report, "precision", "part") == [
        (precision, part, name)
        for precision in ("bf16", "fp16")
        for part in parts
        for name in (OURS, UPSTREAM)
    ]


def test_fp16_scales_the_loss_until_steps_are_not_skipped(small):
    train = modules["train"]
    options = tool.make_parser().parse_args(["train", *small["train"]])
    cfg, model = train._build(options)
    inputs = train.make_batch((64, 64), 1, 3, 133, "cpu")
    step = train.Step(OURS, cfg, model, options, "cpu", inputs, "fp16")
    scales, gradients = [], step.gradients

    def overflow_twice() -> None:
        gradients()
        scales.append(step._scaler.get_scale())
        if len(scales) <= 2:
            step.model.sem_seg_head.predictor.query_feat.weight.grad.fill_(float("inf"))

    step.gradients = overflow_twice
    before = step.model.sem_seg_head.predictor.query_feat.weight.detach().clone()
    step.warm_up()
    # The random model overflows by itself too.
    assert len(scales) > 2 and scales == [2.0 ** (16 - i) for i in range(len(scales))]
    assert step.model.sem_seg_head.predictor.query_feat.weight.ne(before).any()
    for precision in ("fp32", "bf16"):
        step.set_precision(precision)
        step.warm_up()
        assert step._scaler.get_scale() == 1.0


def test_operator_calls_are_counted():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    forward, backward = modules["train"].CountCalls(), modules["train"].CountCalls()
    with forward, torch.no_grad():
        (x * 2).exp()
    y = (x * 2).exp()
    with backward:
        y.backward(torch.tensor([3.0, 4.0]))
    assert forward.number == 2
    assert backward.number >= 2  # at least a product each


def test_step_follows_the_device_in_the_config(small, monkeypatch):
    """Ours is prepared for its device before it moves; the batch stays on the host."""
    seen = []
    monkeypatch.setattr(
        contenders, "apply_config", lambda cfg, model: seen.append(cfg.MODEL.DEVICE)
    )
    train = modules["train"]
    options = tool.make_parser().parse_args(["train", *small["train"]])
    cfg, model = train._build(options)
    step = train.Step(OURS, cfg, model, options, "meta", [], "fp32")
    assert seen == ["meta"] and step.model.device.type == "meta"
    assert cfg.MODEL.DEVICE == "cpu" and model.device.type == "cpu"


def test_batch_is_on_the_host(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x)
    (item,) = modules["train"].make_batch((64, 96), 1, 3, 133, "cuda")
    fields = item["instances"].get_fields()
    assert all(x.device.type == "cpu" for x in (item["image"], *fields.values()))
    assert sorted(pinned) == [(3,), (3, 64, 96), (3, 64, 96)]


def rows_of(report: dict, name: str) -> list[dict]:
    return [row for row in report["results"] if row["contender"] == name]


def test_postprocess(run_with_chart, tmp_path, capsys):
    status, report = run_with_chart("postprocess", "--tasks", "panoptic,all")
    assert status == 0
    check_files(tmp_path, "postprocess", report, capsys.readouterr().out)
    assert names_of(report, "output", "part") == [
        (output, task, name)
        for output in ("64x64", "50x70")
        for task in ("panoptic", "all")
        for name in (OURS, UPSTREAM)
    ]


def test_timing_switches_no_part_to_plain(small):
    train, postprocess = modules["train"], modules["postprocess"]
    options = tool.make_parser().parse_args(["train", *small["train"]])
    cfg, model = train._build(options)
    inputs = train.make_batch((64, 64), 1, 3, 133, "cpu")
    stubs = postprocess.make_models("all", postprocess.make_outputs((64, 64), "cpu"))
    for name in (OURS, UPSTREAM):
        step = train.Step(name, cfg, model, options, "cpu", inputs, "fp32")
        assert runs_fast(step.model, "forward_network") == (name == OURS)
        assert runs_fast(step.model.criterion) == (name == OURS)
        assert runs_fast(stubs[name], "forward_inference") == (name == OURS)


def test_postprocess_has_segments():
    postprocess = modules["postprocess"]
    calls = postprocess.make_calls("all", (256, 320), "same", "cpu")
    for call in calls.values():
        result = call()
        ids, segments = result["panoptic_seg"]
        assert len(segments) > 8 and (ids > 0).float().mean() > 0.4
        assert len(result["instances"]) > 30
    assert postprocess.check(calls) == 0


def test_data(run_with_chart, tmp_path, capsys):
    status, report = run_with_chart("data")
    assert status == 0
    check_files(tmp_path, "data", report, capsys.readouterr().out)
    assert names_of(report, "part") == [
        (task, name)
        for task in ("panoptic", "instance", "semantic")
        for name in (OURS, "expanded", UPSTREAM)
    ]


def test_evaluate(run_with_chart, tmp_path, capsys):
    status, report = run_with_chart("evaluate")
    assert status == 0
    check_files(tmp_path, "evaluate", report, capsys.readouterr().out)
    assert names_of(report, "task", "part") == [
        (task, part, name)
        for task in ("segm AP", "PQ")
        for part in ("process", "evaluate", "both")
        for name in (OURS, "official")
    ]
    assert {row["digits"] for row in rows_of(report, OURS)} == {"same"}
    assert [note.split(":")[0] for note in report["notes"]] == ["segm AP", "PQ"]


# ---- wrong numbers ----


def scaled(monkeypatch, cls: type, method: str, factor: float) -> None:
    """Scale the results of a method."""
    original = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda *args, **kw: original(*args, **kw) * factor)


@pytest.mark.parametrize("name", ["model", "train"])
def test_wrong_model_is_not_timed(name, run_with_chart, monkeypatch, tmp_path):
    scaled(monkeypatch, upstream_steps.UpstreamAttention, "forward", 1.1)
    status, report = run_with_chart(name, "--contenders", f"{OURS},{UPSTREAM}")
    assert status == 1
    assert all("error" not in row for row in rows_of(report, OURS))
    (row,) = rows_of(report, UPSTREAM)
    assert "wall_seconds" not in row and row["wrong"]
    assert row["error"].startswith("WrongNumbers: relative error against mask2former: ")
    assert (
        "Failed: upstream steps (cpu, 64x64, batch 2, fp32, "
        in (tmp_path / "out" / f"{name}.md").read_text()
    )


@pytest.mark.parametrize("name", ["model", "train", "postprocess"])
def test_freed_memory_is_kept_with_allocator_kept_only(name, small, kept, monkeypatch):
    variables = []

    def note_variable(options) -> int:
        variables.append(os.environ.get(KEEP_VARIABLE))
        return 0

    monkeypatch.setattr(modules[name], "run", note_variable)
    monkeypatch.delenv(KEEP_VARIABLE, raising=False)
    for allocator in ("system", "programs"):
        assert tool.main([name, *small[name], "--allocator", allocator]) == 0
    assert not kept and KEEP_VARIABLE not in os.environ
    assert tool.main([name, *small[name]]) == 0
    assert kept and variables == ["0", "0", None]


def test_rounding_is_told_from_wrong_numbers_in_float64(run, monkeypatch):
    """Rounding decides a bit of an attention mask and moves results beyond the tolerance."""
    original = upstream_steps.UpstreamAttention.forward

    def rounded(*args, **kw):
        result = original(*args, **kw)
        return result * 1.01 if result.dtype == torch.float32 else result

    monkeypatch.setattr(upstream_steps.UpstreamAttention, "forward", rounded)
    status, report = run("model", "--contenders", f"{OURS},{UPSTREAM}", "--stages", "forward")
    assert status == 0
    (row,) = rows_of(report, UPSTREAM)
    assert row["wall_seconds"]["median"] > 0
    assert any(
        note.startswith("Compared in float64: upstream steps (cpu, ") for note in report["notes"]
    )


def test_wrong_predictions_are_not_timed(run, monkeypatch):
    plain_model = contenders.plain_model

    def wrong_model(cfg, ours):
        model = plain_model(cfg, ours)
        semantic_inference = model.semantic_inference
        model.semantic_inference = lambda *args: semantic_inference(*args) * 1.001
        return model

    monkeypatch.setattr(contenders, "plain_model", wrong_model)
    status, report = run("postprocess", "--tasks", "semantic,panoptic", "--outputs", "same")
    assert status == 1
    assert [("error" in row, row["part"]) for row in rows_of(report, UPSTREAM)] == [
        (True, "semantic"),
        (False, "panoptic"),
    ]


def test_wrong_samples_are_not_timed(run, monkeypatch):
    data = modules["data"]

    def other_image(record, augmentations):
        sample = original(record, augmentations)
        sample["image"][0, 0, 0] += 1
        return sample

    original = data.panoptic_sample
    monkeypatch.setattr(data, "panoptic_sample", other_image)
    status, report = run("data", "--mappers", "panoptic")
    assert status == 1
    (row,) = rows_of(report, UPSTREAM)
    assert row["error"] == "WrongNumbers: image of 000001.jpg differs from mask2former"


def test_wrong_digits_are_not_timed(run, monkeypatch):
    evaluate = modules["evaluate"]
    original = evaluate.digits

    def other_digits(contender):
        results = original(contender)
        if contender.name == OURS:
            results["PQ"] += "1"
        return results

    monkeypatch.setattr(evaluate, "digits", other_digits)
    status, report = run("evaluate", "--tasks", "PQ")
    assert status == 1
    assert all("error" not in row for row in rows_of(report, "official"))
    (row,) = rows_of(report, OURS)
    assert "1 of 9 results differ from the official ones: PQ is " in row["error"]


def test_missing_peer_is_named(run_with_chart, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, report = run_with_chart(
        "model", "--stages", "forward", "--contenders", f"{OURS},{PEER}"
    )
    assert status == 0
    assert [row["contender"] for row in report["results"]] == [OURS]
    assert "transformers" in report["absent"]["cpu"][PEER]


# ---- options ----


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model", "--sizes", "60x64"], "invalid size '60x64'"),
        (["model", "--contenders", "upstream"], "--contenders must include mask2former"),
        (["model", "--contenders", "mine"], "unknown contender 'mine'"),
        (["model", "--config", "no.yaml"], "no.yaml is not a file"),
        (["model", "--weights", "no.pth"], "no.pth is not a file"),
        (["model", "--precisions", "fp8"], "unknown precision 'fp8', known are fp32, bf16"),
        (["model", "--stages", "all"], "unknown stage 'all'"),
        (
            ["model", "--modes", "compiled", "--stages", "backbone"],
            "--modes compiled times the stage forward",
        ),
        (
            ["model", "--devices", "cpu", "--upstream-op", "original"],
            "--upstream-op original: does not run on cpu",
        ),
        (
            ["postprocess", "--quick", "--allocator", "programs"],
            "--allocator programs needs --processes own",
        ),
        (["train", "--targets", "0"], "invalid positive value: '0'"),
        (["train", "--points", "x"], "invalid positive value: 'x'"),
        (
            ["postprocess", "--outputs", "10"],
            "invalid output size '10': must be HEIGHTxWIDTH",
        ),
        (["postprocess", "--tasks", "boxes"], "unknown task 'boxes'"),
        (["data", "--mappers", "video"], "unknown mapper 'video'"),
        (["evaluate", "--tasks", "mIoU"], "unknown task 'mIoU'"),
        (["sleep"], "invalid choice: 'sleep'"),
    ],
)
def test_invalid_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_older_names_of_the_upstream_steps():
    arguments = ["--contenders", f"{OURS},published", "--published-op", "original"]
    options = tool.make_parser().parse_args(["model", *arguments])
    assert options.contenders == [OURS, UPSTREAM] and options.upstream_op == "original"


def test_host_syncs_are_counted():
    train = modules["train"]
    x = torch.tensor([0.0, 1.0, 2.0])

    def three_syncs() -> None:
        x.sum().item()
        x[x > 0] * 2
        x.cpu()
        torch.tensor([1, 2]).cpu()  # indices are on the host already
        x[torch.tensor([0])] + x.mean() + x.argmax().item()

    cpu = torch.Tensor.cpu
    assert train.count_syncs(three_syncs, "cpu") == 3
    assert torch.Tensor.cpu is cpu


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["model", "train", "postprocess"])
def test_on_a_gpu(name, run):
    status, report = run(name, "--devices", "cuda", *GPU.get(name, []))
    assert status == 0
    for row in report["results"]:
        assert row["wall_seconds"]["median"] > 0
        assert ("peak_bytes" in row) or row["part"] in modules["train"].PARTS


# The kernels of the original release are not a package that tests need.
GPU = dict.fromkeys(("model", "train"), ["--upstream-op", "pytorch-stacked"])
