"""One ONNX file: its numbers, its sizes, its operators, and its int8 version."""

import pytest
import torch

from mask2former.export import ExportOptions, export_model, load_exported
from mask2former.export.programs import _quantised

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def test_onnx_of_any_size(predictor, tmp_path):
    path = str(tmp_path / "model.onnx")
    options = ExportOptions(format="onnx", max_size=256)
    description = export_model(predictor, path, options)
    assert description.parity["within"] and len(description.parity["rows"]) == 6
    model = onnx.load(path)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, "height", "width"]
    operators = {node.op_type for node in model.graph.node}
    assert "Gather" in operators and "GridSample" not in operators

    image = torch.randint(0, 256, (48, 60, 3), dtype=torch.uint8).numpy()
    live, own = predictor(image), load_exported(path)(image)
    assert torch.equal(own["panoptic_seg"][0], live["panoptic_seg"][0])
    assert own["panoptic_seg"][1] == live["panoptic_seg"][1]

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
