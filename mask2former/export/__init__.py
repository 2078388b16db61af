"""Trained models as files that run without this project's code: torch.export, ONNX, TorchScript.

    report = export_model(predictor, "model.onnx", ExportOptions(format="onnx"))
    result = load_exported("model.onnx").predict("image.jpg")

A file comes with `FILE.json`: config, class names, pixel mean and standard deviation, sizes, input
and output names, versions, and the parity table.
"""

from .exporter import export_model
from .loading import build_exported_model, load_exported
from .options import FORMATS, ExportOptions

__all__ = ["FORMATS", "ExportOptions", "build_exported_model", "export_model", "load_exported"]
