import json
import os
import pickle

import pytest
import torch
from detectron2.evaluation import DatasetEvaluator

from mask2former.evaluation import results_table, write_results
from mask2former.evaluation.results import WritesPredictions
from mask2former.utils.files import WriteError

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


class Upstream(DatasetEvaluator):
    """Like Detectron2's evaluators."""

    def __init__(self, output_dir):
        self._output_dir = output_dir

    def evaluate(self, img_ids=None):
        # It would write files of its own.
        assert not self._output_dir
        self._eval_box_proposals([])
        assert not self._output_dir
        self.write(img_ids)
        return {"segm": {}}

    def _eval_box_proposals(self, predictions):
        if self._output_dir:
            with open(os.path.join(self._output_dir, "box_proposals.pkl"), "wb") as file:
                pickle.dump(predictions, file)


class Evaluator(WritesPredictions, Upstream):
    def write(self, img_ids):
        self.write_predictions("predictions.json", img_ids)
        self.write_predictions("predictions.pth", {"ids": img_ids})


def test_predictions(tmp_path):
    folder = tmp_path / "new" / "inference"
    evaluator = Evaluator(str(folder))
    assert evaluator.evaluate(img_ids=[1, 2]) == {"segm": {}}
    assert evaluator._output_dir == str(folder)
    assert json.loads((folder / "predictions.json").read_text()) == [1, 2]
    assert torch.load(folder / "predictions.pth") == {"ids": [1, 2]}
    assert pickle.loads((folder / "box_proposals.pkl").read_bytes()) == []
    assert len(os.listdir(folder)) == 3
    for nowhere in (None, ""):
        assert Evaluator(nowhere).evaluate() == {"segm": {}}


@pytest.mark.parametrize("name", ["predictions.json", "predictions.pth"])
def test_predictions_on_a_full_disk(tmp_path, name):
    evaluator = Evaluator(str(tmp_path))
    evaluator.evaluate([1])
    os.symlink("/dev/full", tmp_path / f"{name}.tmp")
    with pytest.raises(WriteError, match=rf"Cannot write \S*/{name}: No space left on device\. Fr"):
        evaluator.evaluate([2])
    assert evaluator._output_dir == str(tmp_path)
    assert torch.load(tmp_path / "predictions.pth") == {"ids": [1]}
    assert sorted(os.listdir(tmp_path)) == [
        "box_proposals.pkl",
        "predictions.json",
        "predictions.pth",
    ]


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for write in (
        Evaluator(str(tmp_path / "file")).evaluate,
        lambda: write_results(str(tmp_path / "file"), RESULTS),
    ):
        with pytest.raises(WriteError, match=r"/file\S*: a file is in the place of a folder"):
            write()
