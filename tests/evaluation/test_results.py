import json

import pytest

from mask2former.evaluation import results_table, write_results

RESULTS = {
    "shapes_val": {
        "panoptic_seg": {"PQ": 52.125, "PQ_th": float("nan")},
        "sem_seg": {"mIoU": 40, "IoU-a|b": 30.0, "min(IoU, B-Iou)-a|b": 20.0, "IoU-c-d": 50.0},
        "segm": {"AP": 1.0, "AP-a|b": float("nan")},
    },
    "other": {"segm": {"AP": 12.3456}},
}


def test_files(tmp_path):
    write_results(str(tmp_path / "new" / "folder"), RESULTS)
    written = json.loads((tmp_path / "new/folder/evaluation.json").read_text())
    assert written["shapes_val"]["panoptic_seg"] == {"PQ": 52.125, "PQ_th": None}
    assert written["shapes_val"]["sem_seg"]["min(IoU, B-Iou)-a|b"] == 20.0
    assert written["other"] == {"segm": {"AP": 12.3456}}
    assert (tmp_path / "new/folder/evaluation.md").read_text() == results_table(RESULTS)
    assert sorted(p.name for p in (tmp_path / "new/folder").iterdir()) == [
        "evaluation.json",
        "evaluation.md",
    ]
    write_results(str(tmp_path), {"a": {}}, "proposals")
    assert json.loads((tmp_path / "proposals.json").read_text()) == {"a": {}}


def test_interrupted_writing_keeps_the_old_files(tmp_path):
    write_results(str(tmp_path), RESULTS)
    before = (tmp_path / "evaluation.json").read_text()
    with pytest.raises(TypeError):
        write_results(str(tmp_path), {"a": {"segm": {"AP": "no number"}}})
    assert (tmp_path / "evaluation.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evaluation.json", "evaluation.md"]


def test_table():
    table = results_table(RESULTS)
    summary, title, classes = table.strip().split("\n\n")
    cells = [[c.strip() for c in line.strip("|").split(" | ")] for line in summary.split("\n")]
    assert cells[0] == ["data set", "task", "metric", "value"]
    assert cells[2:] == [
        ["shapes_val", "panoptic_seg", "PQ", "52.125"],
        ["shapes_val", "panoptic_seg", "PQ_th", "–"],
        ["shapes_val", "sem_seg", "mIoU", "40.000"],
        ["shapes_val", "segm", "AP", "1.000"],
        ["other", "segm", "AP", "12.346"],
    ]
    assert title == "Classes of shapes_val:"
    rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in classes.split("\n")]
    assert rows[0] == ["class", "sem_seg/IoU", "sem_seg/min(IoU, B-Iou)", "segm/AP"]
    assert rows[2:] == [[r"a\|b", "30.000", "20.000", "–"], ["c-d", "50.000", "", ""]]


def test_nothing_evaluated():
    assert results_table({"a": {}}).startswith("|")
