"""Metrics of a file beside those of its model, and the options of the program."""

import json
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from mask2former.export import accuracy
from mask2former.export.loading import ExportedMaskFormer
from mask2former.export.metadata import read_description

ROOT = Path(__file__).parents[2]


def test_metrics_of_model_and_file(predictor, traced_file, monkeypatch):
    folders = []

    def test(cfg, model):
        folders.append(cfg.OUTPUT_DIR)
        percent = 50.25 if isinstance(model, ExportedMaskFormer) else 50.5
        return {"panoptic_seg": {"PQ": percent, "SQ": 80.0}, "sem_seg": {"mIoU": 70.0}}

    monkeypatch.setattr(accuracy.Trainer, "test", test)
    description = read_description(traced_file)
    table = accuracy.add_accuracy(predictor, traced_file, description)
    name = predictor.cfg.DATASETS.TEST[0]
    assert table.splitlines()[2:] == [
        f"| {name} | panoptic_seg | PQ | 50.50 | 50.25 | -0.25 |",
        f"| {name} | sem_seg | mIoU | 70.00 | 70.00 | +0.00 |",
    ]
    content = json.loads(Path(f"{traced_file}.json").read_text())
    assert content["accuracy"]["rows"][0]["exported"] == 50.25
    assert read_description(traced_file).accuracy["table"] == table
    # The files of an evaluation do not replace those of the training run, and do not stay.
    assert predictor.cfg.OUTPUT_DIR not in folders and not any(map(os.path.exists, folders))


def test_evaluation_needs_data(predictor):
    predictor.cfg.DATASETS.TEST = ()
    with pytest.raises(ValueError, match="DATASETS.TEST names no data set"):
        accuracy.check_evaluation(predictor.cfg)


def test_program_refuses_to_evaluate_postprocessed_files(tmp_path, capsys):
    spec = spec_from_file_location("export_program", ROOT / "tools/export.py")
    program = module_from_spec(spec)
    spec.loader.exec_module(program)
    arguments = ["--model", "none", "--format", "onnx", "--output", str(tmp_path / "model.onnx")]
    with pytest.raises(SystemExit, match="error: --evaluate .* leave out --postprocess"):
        program.main([*arguments, "--postprocess", "panoptic", "--evaluate"])
    with pytest.raises(SystemExit, match="error: .*none"):
        program.main([*arguments, "--evaluate"])
    assert not any(tmp_path.iterdir()) and "export_program" not in sys.modules
