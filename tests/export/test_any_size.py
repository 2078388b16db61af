"""Files for any batch and size, as programs of torch.export and as ONNX.

Tracing takes most of the time, so that both are made of one program.
"""

import functools

import pytest
import torch

from mask2former.export import ExportOptions, export_model, exporter, load_exported
from mask2former.export.programs import _quantised, trace_program

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
_programs = []


@pytest.fixture(autouse=True)
def one_program(monkeypatch):
    def trace(*args):
        if not _programs:
            _programs.append(trace_program(*args))
        return _programs[0]

    monkeypatch.setattr(exporter, "trace_program", trace)
    # Reading a program takes seconds too.
    monkeypatch.setattr(torch.export, "load", functools.cache(torch.export.load))


def test_program(predictor, tmp_path, assert_same_predictions):
    path = str(tmp_path / "model.pt2")
    description = export_model(predictor, path, ExportOptions(max_size=256))
    shapes = {tuple(row["shape"]) for row in description.parity["rows"]}
    assert shapes == {(1, 128, 192), (2, 224, 160), (3, 64, 128)}
    assert description.parity["within"]
    assert_same_predictions(path)

    # Sizes are free, so images may be resized otherwise than in the config of the model.
    larger = ("INPUT.MIN_SIZE_TEST", "128", "INPUT.MAX_SIZE_TEST", "192")
    assert_same_predictions(path, opts=larger)
    with pytest.raises(ValueError, match=r"MAX_SIZE_TEST is 300, but \S*model.pt2 takes up to 256"):
        load_exported(path, opts=["INPUT.MAX_SIZE_TEST", "300"])

    targets = {str(node.target) for node in _programs[0].graph.nodes}
    assert not any("mask2former" in target for target in targets)
    outputs = load_exported(path).model.forward_network(torch.zeros(5, 3, 256, 64))
    assert outputs["pred_logits"].shape == (5, 7, 4)
    assert outputs["pred_masks"].shape == (5, 7, 64, 16)


def test_onnx(predictor, tmp_path, assert_same_predictions):
    path = str(tmp_path / "model.onnx")
    description = export_model(predictor, path, ExportOptions(format="onnx", max_size=256))
    assert description.parity["within"] and len(description.parity["rows"]) == 6
    model = onnx.load(path)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, "height", "width"]
    operators = {node.op_type for node in model.graph.node}
    assert "Gather" in operators and "GridSample" not in operators
    assert_same_predictions(path)

    quantised = _quantised(path, str(tmp_path / "int8.onnx"))
    images = torch.randn(1, 3, 64, 96).numpy()
    logits, close = (
        onnxruntime.InferenceSession(x, providers=["CPUExecutionProvider"]).run(
            ["pred_logits"], {"images": images}
        )[0]
        for x in (path, quantised)
    )
    # Random weights of few channels, class logits enlarged: a coarse bound.
    assert 0 < abs(logits - close).max() < abs(logits).max()
