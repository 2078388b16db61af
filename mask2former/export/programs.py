"""Writers of each format: network → file.

Shape letters: B batch, C channels, H W image size in pixels.
"""

import logging
import os
import shutil
import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops.ms_deform_attn import exported_as
from ..utils.files import MissingPackageError, atomic_write
from .metadata import SizeRule
from .network import INPUT, ExportNetwork
from .options import ExportOptions


def trace_program(
    network: nn.Module, example: Tensor, sizes: SizeRule, options: ExportOptions
) -> torch.export.ExportedProgram:
    """The program of a network for any batch, height and width.

    Args:
        network: images (B, C, H, W) → tensors.
        example: images; B, H and W differ from each other and from 1.
        sizes: which sizes are to be taken.
        options: the formulation of deformable attention.

    Raises:
        ValueError: a part of the network does not allow it; names the reason of torch.export.
    """
    steps = sizes.largest // sizes.divisor
    height, width = (torch.export.Dim(x, min=1, max=steps) for x in ("height", "width"))
    dims = {
        0: torch.export.Dim("batch", min=1, max=1024),
        2: sizes.divisor * height,
        3: sizes.divisor * width,
    }
    with torch.no_grad(), exported_as(options.op):
        try:
            return torch.export.export(network, (example,), dynamic_shapes=(dims,))
        # The exporter raises errors of many types, such as those of Dynamo.
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ValueError(
                f"torch.export cannot trace this model with free image sizes "
                f"({type(error).__name__}: {' '.join(lines[:2])}). A part of it computes with "
                "sizes in a way that only holds for one: export with format torchscript and a "
                "size, or use another backbone or pixel decoder (see docs/export.md)."
            ) from error


def save_program(program: torch.export.ExportedProgram, path: str) -> None:
    """Write a program of torch.export."""
    with atomic_write(path, "wb") as file:
        torch.export.save(program, file)


def compile_program(program: torch.export.ExportedProgram, path: str) -> None:
    """Compile a program with AOTInductor, for this device, and write the package.

    Raises:
        ValueError: there is no C++ compiler, or it fails.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"AOTInductor needs a C++ compiler, and {compiler} is not there: install g++, or name "
            "one in the environment variable CXX"
        )
    with tempfile.TemporaryDirectory() as folder:
        package = os.path.join(folder, "model.pt2")
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=package)
        except RuntimeError as error:
            raise ValueError(
                f"AOTInductor cannot compile this program ({type(error).__name__}: "
                f"{str(error).strip().splitlines()[0]}); export with format torch instead"
            ) from error
        _copy(package, path)


def save_onnx(
    program: torch.export.ExportedProgram,
    path: str,
    outputs: tuple[str, ...],
    options: ExportOptions,
) -> None:
    """Translate a program to ONNX, check and write it, quantised if asked for.

    Raises:
        MissingPackageError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: an operator cannot be translated, or the model is over 2 GB.
    """
    onnx = _onnx_package()
    # It decomposes the program twice. With fused attention, whose outputs are laid out otherwise,
    # the first pass would write views that the second one cannot take.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        try:
            translated = torch.onnx.export(
                program,
                (),
                input_names=[INPUT],
                output_names=list(outputs),
                opset_version=options.opset,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            # A bare assertion has no text.
            reason = (str(error.__cause__ or "").strip() or str(error)).splitlines()[0]
            raise ValueError(
                f"the ONNX exporter cannot translate this program: {reason}"
            ) from error
    assert translated is not None
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "model.onnx")
        onnx.save(_named_sizes(translated.model_proto), file)
        if options.precision == "int8":
            file = _quantised(file, os.path.join(folder, "int8.onnx"))
        onnx.checker.check_model(file, full_check=True)
        _copy(file, path)


def _onnx_package() -> Any:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"format onnx needs the package {error.name}: pip install onnx onnxscript onnxruntime"
        ) from error
    # It warns of every Split that it leaves as it is.
    logging.getLogger("onnxscript.optimizer").setLevel(logging.ERROR)
    return onnx


def _named_sizes(model: Any) -> Any:
    """Name the free dimensions of the input, which the exporter numbers."""
    shape = model.graph.input[0].type.tensor_type.shape
    for index, name in ((0, "batch"), (2, "height"), (3, "width")):
        shape.dim[index].dim_param = name
    return model


def _quantised(file: str, target: str) -> str:
    """Quantise the matrix products with weights to int8, dynamically; convolutions stay fp32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        file, target, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8
    )
    return target


def save_traced(network: ExportNetwork, example: Tensor, path: str, options: ExportOptions) -> None:
    """Trace a network for the size and batch of the example, and write it as TorchScript."""
    with torch.no_grad(), exported_as(options.op), warnings.catch_warnings():
        # Of each size that becomes a constant, as intended; and of its deprecation.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, example, check_trace=False)
    with atomic_write(path, "wb") as file:
        torch.jit.save(traced, file)


def _copy(source: str, path: str) -> None:
    with open(source, "rb") as content, atomic_write(path, "wb") as file:
        shutil.copyfileobj(content, file)
