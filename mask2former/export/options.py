"""What to export, and how: checked before anything slow begins.

Shape letters: B batch, H W image size in pixels.
"""

from dataclasses import dataclass

import torch

from ..ops.ms_deform_attn import EXPORTED_FORMULATIONS

# Format → suffix of its files.
FORMATS = {"torch": ".pt2", "aoti": ".aoti.pt2", "onnx": ".onnx", "torchscript": ".ts"}
PRECISIONS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,  # before quantisation
}
POSTPROCESSING = ("none", "instance", "panoptic", "semantic")
# Largest difference to the model in PyTorch, in fp32, see `parity.py`.
TOLERANCES = {"torch": 1e-4, "aoti": 1e-4, "torchscript": 1e-4, "onnx": 1e-3}
MIN_OPSET = 17


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        format: "torch", a program of torch.export; "aoti", compiled by AOTInductor for this kind of
            machine; "onnx"; "torchscript", traced for one size.
        op: deformable attention as "gather", "gridsample", or "custom", this project's op.
        postprocess: "none" for class and mask logits, or the task whose results are computed too.
        precision: "fp32", "fp16", "bf16", or "int8": linear layers quantised dynamically.
        size: (H, W) of a traced file's images; of the others an example.
        batch: B of a traced file.
        max_size: largest height and width of the others, in pixels.
        opset: of ONNX.
        tolerance: largest difference allowed; None: 1e-4 (ONNX: 1e-3) in fp32, any in others.
    """

    format: str = "torch"
    op: str = "gather"
    postprocess: str = "none"
    precision: str = "fp32"
    size: tuple[int, int] | None = None
    batch: int = 1
    max_size: int = 4096
    opset: int = 18
    tolerance: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("format", tuple(FORMATS)),
            ("op", EXPORTED_FORMULATIONS),
            ("postprocess", POSTPROCESSING),
            ("precision", tuple(PRECISIONS)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        if self.op == "custom" and self.format == "onnx":
            raise ValueError(
                "op is 'custom', but ONNX runtimes do not have this project's op; choose gather"
            )
        if self.format == "torchscript" and self.size is None:
            raise ValueError(
                "a TorchScript file is traced for one image size: give a size such as 800x1216"
            )
        if self.opset < MIN_OPSET:
            raise ValueError(f"opset is {self.opset}; it must be at least {MIN_OPSET}")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; it must be at least 1")
        if self.precision == "bf16" and self.format == "onnx":
            raise ValueError(
                "precision is 'bf16', for which onnxruntime lacks many CPU kernels; choose fp16 or "
                "int8"
            )
        if self.precision == "int8" and self.format != "onnx":
            raise ValueError(
                f"precision is 'int8' with format {self.format!r}: the dynamically quantised "
                "layers of torch.ao hold packed weights that torch.export does not trace, and the "
                "package that replaces them (torchao) is not used here. int8 is for format onnx; "
                "choose bf16 or fp16"
            )

    @property
    def is_dynamic(self) -> bool:
        """Whether batch and image size are free."""
        return self.format != "torchscript"

    @property
    def largest_difference(self) -> float | None:
        """The tolerance that holds; None for any difference."""
        if self.tolerance is not None:
            return self.tolerance
        return TOLERANCES[self.format] if self.precision == "fp32" else None
