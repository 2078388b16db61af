"""Tables, charts and files of reports."""

import json

import pytest
import torch
from load_script import load_script

report = load_script("tools/benchmark/report.py")


def test_constant_columns_go_above_the_table():
    rows = [
        {"size": "64x96", "backend": "a", "ms": "1", "GB/s": ""},
        {"size": "64x96", "backend": "b", "ms": "2", "GB/s": ""},
    ]
    assert report.markdown_table(rows).splitlines() == [
        "All rows: size 64x96.",
        "",
        "| backend | ms |",
        "|---|---|",
        "| a | 1 |",
        "| b | 2 |",
    ]
    assert report.markdown_table(rows[:1]).splitlines()[0] == "| size | backend | ms | GB/s |"
    assert report.markdown_table([]) == "No results."


def test_machine_description():
    machine = report.describe_machine(["cpu"], ["torch", "no-such-distribution"])
    assert machine["cores"] >= 1 and machine["cpu"]
    assert machine["torch"].startswith(torch.__version__.split("+")[0])
    assert machine["no-such-distribution"] == "not installed"
    assert "gpu" not in machine


@pytest.mark.parametrize("seconds, text", [(0.00012345, "0.123"), (0.0995, "99.5"), (1.5, "1500")])
def test_milliseconds(seconds, text):
    assert report.milliseconds(seconds) == text


@pytest.mark.parametrize(
    "bars",
    [
        [],
        [("one", "a", 1e-3, "")],
        [("one", "a", 1e-3, "2 times b"), ("one", "b", 2e-3, ""), ("two", "a", 5.0, "")],
    ],
)
def test_chart_is_a_png(bars):
    assert report.bar_chart("title", bars).startswith(b"\x89PNG\r\n")


def test_report_files_are_atomic(tmp_path):
    folder = tmp_path / "new" / "folder"
    report.write_report(folder, "op", {"x": 1}, "text\n\n", b"chart")
    assert json.loads((folder / "op.json").read_text()) == {"x": 1}
    assert (folder / "op.md").read_text() == "text\n"
    assert (folder / "op.png").read_bytes() == b"chart"
    assert sorted(path.name for path in folder.iterdir()) == ["op.json", "op.md", "op.png"]
    with pytest.raises(TypeError):
        report.write_report(folder, "op", {"x": object()}, "", b"")
    assert json.loads((folder / "op.json").read_text()) == {"x": 1}
