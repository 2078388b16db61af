"""tools/benchmark op on levels of a few positions: results, reports, invalid options."""

import json
import sys
import types
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from load_script import load_script

tool = load_script("tools/benchmark")
backends = sys.modules["op_backends"]
CASE = backends.Case("projections", "cpu", "fp32", 64, 96, 2)


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    small = ["--devices", "cpu", "--sizes", "64x96", "--batches", "1", "--rounds", "2"]
    status = tool.main(["op", *small, "--output", str(tmp_path), *arguments])
    return status, json.loads((tmp_path / "op.json").read_text())


def table_of(markdown: str) -> list[dict[str, str]]:
    lines = [line.strip("|").split("|") for line in markdown.splitlines() if line.startswith("|")]
    header, separator, *rows = [[cell.strip() for cell in line] for line in lines]
    assert set(separator) == {"---"}
    assert all(len(row) == len(header) for row in rows)
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_report(tmp_path, capsys):
    threads = torch.get_num_threads()
    status, report = run(tmp_path, "--backends", "pytorch,pytorch-stacked", "--threads", "1,2")
    assert status == 0
    assert torch.get_num_threads() == threads
    assert report["benchmark"] == "op" and report["baseline"] == "pytorch"
    assert report["command"].startswith("python tools/benchmark op --devices cpu")
    assert {"cpu", "cores", "torch", "compiled_for", "library_cuda"} <= report["machine"].keys()
    rows = report["results"]
    assert [(row["pass"], row["backend"], row["threads"]) for row in rows] == [
        (passes, name, threads)
        for passes in ("forward", "forward+backward")
        for name in ("pytorch", "pytorch-stacked")
        for threads in (1, 2)
    ]
    for row in rows:
        assert (row["height"], row["width"], row["batch"], row["rounds"]) == (64, 96, 1, 2)
        assert row["wall_seconds"]["min"] <= row["wall_seconds"]["median"]
        assert len(row["wall_seconds"]["samples"]) == 2
        assert row["ratio"]["q1"] <= row["ratio"]["median"] <= row["ratio"]["q3"]
        assert row["bytes_per_second"] * row["wall_seconds"]["median"] == pytest.approx(
            row["bytes_moved"]
        )
        assert row["peak_bytes"] is None and "device_seconds" not in row
    # A backend is as fast as itself.
    assert rows[0]["ratio"]["median"] == rows[0]["scaling"]["median"] == 1.0
    assert (tmp_path / "op.png").read_bytes().startswith(b"\x89PNG")
    markdown = (tmp_path / "op.md").read_text()
    assert capsys.readouterr().out == markdown
    table = table_of(markdown)
    assert len(table) == len(rows)
    assert table[1]["threads"] == "2" and table[0]["times pytorch"] == "1.00 (1.00-1.00)"


def test_quick_keeps_given_options(tmp_path):
    _, report = run(tmp_path, "--quick", "--backends", "pytorch", "--passes", "backward")
    (row,) = report["results"]
    assert (row["height"], row["rounds"], row["pass"]) == (64, 2, "backward")
    assert "scaling" not in row


def test_memory_on_a_cpu_is_measured_in_a_new_process(tmp_path):
    _, report = run(tmp_path, "--backends", "pytorch", "--passes", "forward", "--memory")
    (row,) = report["results"]
    # At least its output, (1, 126, 256) in float32: levels of 2x3, 4x6 and 8x12.
    assert row["peak_bytes"] >= 126 * 256 * 4


@pytest.mark.parametrize("inputs", backends.INPUTS)
@pytest.mark.parametrize("dtype", backends.DTYPES)
def test_available_backends_agree(inputs, dtype):
    case = replace(CASE, inputs=inputs, dtype=dtype)
    x = backends.make_inputs(case)
    usable, absent, failed = backends.usable_backends(
        case, list(backends.BACKENDS), x, backends.random_gradient(x)
    )
    assert {"pytorch", "pytorch-stacked"} <= set(usable)
    assert "original" in absent
    assert not set(failed) & {"fused", "classic"}


def test_wrong_numbers_are_not_timed_and_fail_the_run(tmp_path, monkeypatch):
    wrong = backends.Backend(lambda x: 1.001 * backends.BACKENDS["pytorch"].call(x), module="torch")
    monkeypatch.setitem(backends.BACKENDS, "classic", wrong)
    status, report = run(tmp_path, "--backends", "pytorch,classic", "--passes", "forward")
    assert status == 1
    pytorch, row = report["results"]
    assert "error" not in pytorch
    assert row["backend"] == "classic" and "wall_seconds" not in row
    assert "output 1.0e-03, value 1.0e-03" in row["error"]
    markdown = (tmp_path / "op.md").read_text()
    assert table_of(markdown)[1]["wall ms"] == "n/a"
    assert "Failed: classic (projections, cpu, fp32, 64x96, batch 1): WrongNumbers" in markdown


def fail(x):
    raise RuntimeError("needs a compiler\nand a page of text")


@pytest.mark.parametrize("module, status", [("torch", 0), (None, 1)])
def test_failures_are_reported(tmp_path, monkeypatch, module, status):
    monkeypatch.setitem(backends.BACKENDS, "classic", backends.Backend(fail, module=module))
    result, report = run(tmp_path, "--backends", "pytorch,classic", "--passes", "forward")
    assert result == status
    assert report["results"][1]["error"] == "RuntimeError: needs a compiler"


def test_missing_backends_are_named(tmp_path, capsys, monkeypatch):
    missing = backends.Backend(fail, module="no_such_module", package="no-such-package")
    monkeypatch.setitem(backends.BACKENDS, "classic", missing)
    status, report = run(tmp_path, "--backends", "pytorch,original,classic", "--passes", "forward")
    assert status == 0
    assert report["absent"]["cpu"] == {
        "original": "does not run on cpu",
        "classic": "no no-such-package: No module named 'no_such_module'",
    }
    output = capsys.readouterr()
    assert "- Not measured on cpu: original (does not run on cpu), classic (no " in output.out
    assert output.err.count("Not measured on cpu: original (does not run on cpu), classic") == 1


def test_calls_of_the_original_extension(monkeypatch):
    """With a stand-in, as the extension needs a GPU; it has a function for each pass."""

    def forward(value, shapes, starts, locations, weights, im2col_step):
        assert starts.tolist() == [0, 6, 30] and im2col_step == value.shape[0]
        assert {x.dtype for x in (value, locations, weights)} == {torch.float32}
        x = backends.Inputs(value, locations, weights, None, shapes.tolist(), shapes, starts)
        return backends.BACKENDS["pytorch"].call(x)

    def backward(value, shapes, starts, locations, weights, grad_output, im2col_step):
        leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
        with torch.enable_grad():
            out = forward(leaves[0], shapes, starts, *leaves[1:], im2col_step)
        return torch.autograd.grad(out, leaves, grad_output)

    extension = types.ModuleType("MultiScaleDeformableAttention")
    extension.ms_deform_attn_forward, extension.ms_deform_attn_backward = forward, backward
    monkeypatch.setitem(sys.modules, extension.__name__, extension)
    original = replace(backends.BACKENDS["original"], devices=("cpu",))
    monkeypatch.setitem(backends.BACKENDS, "original", original)
    for inputs, dtype in product(backends.INPUTS, backends.DTYPES):
        case = replace(CASE, inputs=inputs, dtype=dtype)
        x = backends.make_inputs(case)
        result = backends.usable_backends(case, ["original"], x, backends.random_gradient(x))
        assert result == (["original"], {}, {})


def test_bytes_moved():
    queries = 2 * 3 + 4 * 6 + 8 * 12
    value = 2 * queries * 256
    samples = 2 * queries * 8 * 3 * 4
    forward = 4 * (2 * value + 3 * samples) + queries * 3 * 8
    backward = 4 * (3 * value + 6 * samples) + queries * 3 * 8
    assert CASE.bytes_moved("forward") == forward
    assert CASE.bytes_moved("backward") == backward
    assert CASE.bytes_moved("forward+backward") == forward + backward
    half = replace(CASE, dtype="bf16")
    assert forward - half.bytes_moved("forward") == 2 * 2 * value
    classic = replace(CASE, inputs="locations")
    assert forward - classic.bytes_moved("forward") == queries * 3 * 8


def test_inputs():
    x = backends.make_inputs(CASE)
    assert x.shapes == [(2, 3), (4, 6), (8, 12)]
    assert x.starts.tolist() == [0, 6, 30]
    assert x.value.shape == (2, 126, 8, 32) and x.points.shape == (2, 126, 8, 3, 4, 2)
    assert x.reference.shape == (1, 126, 3, 2)
    # The first position of the last level, at half a pixel of 12x8.
    torch.testing.assert_close(x.reference[0, 30, 0], torch.tensor([0.5 / 12, 0.5 / 8]))
    torch.testing.assert_close(x.points, backends.make_inputs(CASE).points, rtol=0, atol=0)
    # Samples stay away from where the gradient jumps.
    fraction = (x.locations() * x.device_shapes.flip(-1)[:, None, :] - 0.5) % 1
    assert 1 / 64 - 1e-4 < fraction.min() and fraction.max() < 63 / 64 + 1e-4
    # Head 0 looks right, point p p pixels away, over all queries and levels.
    mean = x.points[:, :, 0].mean((0, 1, 2))
    torch.testing.assert_close(mean[:, 0], torch.arange(1.0, 5.0), rtol=0, atol=0.3)
    torch.testing.assert_close(mean[:, 1], torch.zeros(4), rtol=0, atol=0.3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--backends", "pytorch,nonsense"],
            "unknown backend 'nonsense', known are fused, classic",
        ),
        (["--devices", "tpu"], "unknown device 'tpu', known are cpu, cuda"),
        (["--dtypes", "fp8"], "unknown dtype 'fp8', known are fp32, bf16, fp16"),
        (["--passes", "backwards"], "unknown pass 'backwards'"),
        (
            ["--sizes", "500x512"],
            "invalid size '500x512': must be HEIGHTxWIDTH, both multiples of 32",
        ),
        (["--sizes", "512"], "invalid size '512'"),
        (["--sizes", "axb"], "invalid size 'axb'"),
        (["--batches", "0"], "invalid batch size '0': must be at least 1"),
        (["--threads", ""], "invalid thread count ''"),
        (["--rounds", "0"], "invalid positive value: '0'"),
        (["--backends", "pytorch", "--baseline", "classic"], "--baseline classic is not among"),
    ],
)
def test_invalid_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tool.main(["op", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_cuda_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        tool.main(["op", "--devices", "cuda"])
    assert "torch finds no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
def test_report_on_a_gpu(tmp_path):
    arguments = [
        "--devices",
        "cuda",
        "--dtypes",
        "fp32,bf16",
        "--passes",
        ",".join(backends.PASSES),
    ]
    status, report = run(tmp_path, *arguments)
    assert status == 0
    assert report["machine"]["gpu"]
    for row in report["results"]:
        if "error" not in row:
            assert row["device_seconds"]["median"] > 0 and row["peak_bytes"] > 0
