"""From a predictor to a file, its description and its parity table."""

import copy
import gc
import os
from dataclasses import asdict
from typing import Any

import torch

from ..modeling.backbone.swin import SwinTransformer
from ..predictor import Predictor
from ..utils.files import require_writable
from .metadata import ExportedDescription, SizeRule, describe, write_description
from .network import ExportNetwork, convert, example_images, require_exportable, size_divisor
from .options import FORMATS, PRECISIONS, ExportOptions
from .parity import measure, parity_shapes, table
from .postprocess import PostprocessedNetwork
from .programs import compile_program, save_onnx, save_program, save_traced, trace_program
from .runtimes import Runtime


class ParityError(ValueError):
    """The exported file differs too much from the model."""


def export_model(
    predictor: Predictor, path: str | os.PathLike, options: ExportOptions
) -> ExportedDescription:
    """Export a model, compare the file with it, and write the description beside it.

    Args:
        predictor: its model, config and class names are exported.
        path: the file; its suffix must be that of the format.
        options: what to export.

    Returns:
        What `path`.json says.

    Raises:
        ValueError: the model or the options do not allow it.
        ParityError: the file was written, but its outputs differ from the model's by more than the
            tolerance.
        WriteError: the file cannot be written.
    """
    path = os.fspath(path)
    suffix = FORMATS[options.format]
    if not path.endswith(suffix) or (suffix == ".pt2" and path.endswith(FORMATS["aoti"])):
        raise ValueError(f"{path} does not end in {suffix}, the suffix of format {options.format}")
    require_writable(os.path.dirname(path) or ".")
    model: Any = predictor.model
    require_exportable(model)
    rule = _size_rule(model, options)
    example_size = _example_size(rule, options, model)
    channels = len(predictor.cfg.MODEL.PIXEL_MEAN)
    reference = _network(model, options, torch.float32)
    dtype = PRECISIONS[options.precision]
    network = reference
    if dtype != torch.float32:
        # Converting is in place, and the reference stays in full precision.
        network = convert(_network(copy.deepcopy(model), options, dtype), dtype)
    batch = options.batch if rule.fixed is not None else 2
    example = example_images(channels, example_size, batch, model.device)
    if options.format == "torchscript":
        save_traced(network, example, path, options)
    else:
        program = trace_program(network, example, rule, options)
        if options.format == "torch":
            save_program(program, path)
        elif options.format == "aoti":
            compile_program(program, path)
        else:
            save_onnx(program, path, network.outputs, options)
        del program
    del network
    gc.collect()
    description = describe(
        predictor.cfg,
        predictor.metadata,
        predictor.class_names,
        options=options,
        sizes=rule,
        outputs=reference.outputs,
    )
    tolerance = options.largest_difference
    runtime = Runtime(path, description, model.device.type)
    rows = measure(reference, runtime, parity_shapes(rule, example_size), channels, model.device)
    description.parity = {
        "tolerance": tolerance,
        "within": tolerance is None or all(row.is_within(tolerance) for row in rows),
        "rows": [asdict(row) for row in rows],
        "table": table(rows, tolerance),
    }
    write_description(path, description)
    if not description.parity["within"]:
        raise ParityError(
            f"{path} differs from the model by more than {tolerance:g}:\n"
            f"{description.parity['table']}\nDo not use it, or allow more with --tolerance."
        )
    return description


def _network(model: Any, options: ExportOptions, dtype: torch.dtype) -> ExportNetwork:
    if options.postprocess == "none":
        return ExportNetwork(model, dtype).eval()
    return PostprocessedNetwork(model, options.postprocess, dtype).eval()


def _size_rule(model: Any, options: ExportOptions) -> SizeRule:
    divisor = size_divisor(model)
    if options.size is not None and any(x % divisor or x <= 0 for x in options.size):
        raise ValueError(
            f"size is {options.size[0]}x{options.size[1]}, but this model takes multiples of "
            f"{divisor} pixels only"
        )
    if not options.is_dynamic:
        return SizeRule(divisor, divisor, options.max_size, options.size, options.batch)
    # With one position at the coarsest stride the exporter would fix that size.
    smallest, largest = 2 * divisor, options.max_size // divisor * divisor
    if largest < 4 * divisor:
        raise ValueError(
            f"max_size is {options.max_size}; it must be at least {4 * divisor} pixels"
        )
    return SizeRule(divisor, smallest, largest)


def _example_size(rule: SizeRule, options: ExportOptions, model: Any) -> tuple[int, int]:
    """Height and width to trace with: different, so that the exporter sees two sizes.

    Raises:
        ValueError: the model has windows, and the largest size is too small for two of them.
    """
    if options.size is not None:
        return options.size
    if not isinstance(model.backbone, SwinTransformer):
        return 4 * rule.divisor, min(6 * rule.divisor, rule.largest)
    # With one window on the coarsest map the exporter would take that number as a constant.
    layers: Any = model.backbone.layers
    steps = 1 + max(layer.window_size for layer in layers)
    if rule.largest < (steps + 2) * rule.divisor:
        raise ValueError(
            f"max_size is {options.max_size}; for the windows of this Swin backbone it must be at "
            f"least {(steps + 2) * rule.divisor} pixels"
        )
    return steps * rule.divisor, (steps + 2) * rule.divisor
