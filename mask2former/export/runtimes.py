"""Running exported files: images (B, C, H, W) → outputs by name.

Each runtime checks sizes first, so that a wrong one is reported in words.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..utils.files import MissingPackageError
from .metadata import ExportedDescription

Runner = Callable[[Tensor], Sequence[Tensor]]


class Runtime:
    """An exported file, loaded.

    Args:
        path: the file.
        description: what is beside it.
        device: "cpu" or "cuda"; files of torch and aoti run where they were exported.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        ValueError: the file cannot be loaded, or the device does not exist.
    """

    def __init__(self, path: str, description: ExportedDescription, device: str = "cpu"):
        try:
            self.path, self.description, self.device = path, description, torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device is {device!r}; allowed: such as 'cpu' or 'cuda'") from error
        try:
            self._run = _LOADERS[description.options.format](path, self.device)
        except MissingPackageError:
            raise
        # Loaders of damaged files raise errors of many types.
        except Exception as error:
            raise ValueError(
                f"{path} cannot be loaded as {description.options.format} "
                f"({type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}). It was "
                f"written with {_text(description.versions)}; this is torch {torch.__version__}."
            ) from error

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Run on normalised images (B, C, H, W), float32.

        Raises:
            ValueError: the file does not take that size.
        """
        self.description.sizes.check(tuple(images.shape))
        outputs = self._run(images.to(self.device, torch.float32).contiguous())
        return dict(zip(self.description.outputs, outputs, strict=True))


def _text(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _load_torch(path: str, device: torch.device) -> Runner:
    # Guards of the exporter also refuse sizes, such as a batch of one, over memory layouts that the
    # program does not depend on: the parity table covers them, and `SizeRule` checks sizes.
    module = torch.export.load(path).module(check_guards=False).to(device)
    return lambda images: module(images)


def _load_aoti(path: str, device: torch.device) -> Runner:
    package: Any = torch._inductor.aoti_load_package(path)
    return lambda images: package(images)


def _load_torchscript(path: str, device: torch.device) -> Runner:
    module = torch.jit.load(path, map_location=device).eval()

    def run(images: Tensor) -> Sequence[Tensor]:
        # The profiling executor would compile anew in the first calls.
        with torch.jit.optimized_execution(False):
            return module(images)

    return run


def _load_onnx(path: str, device: torch.device) -> Runner:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"{path} needs the package onnxruntime: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers.insert(0, "CUDAExecutionProvider")
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    (name,) = (x.name for x in session.get_inputs())

    def run(images: Tensor) -> Sequence[Tensor]:
        outputs = session.run(None, {name: images.cpu().numpy()})
        return [torch.from_numpy(x).to(device) for x in outputs]

    return run


_LOADERS: dict[str, Callable[[str, torch.device], Runner]] = {
    "torch": _load_torch,
    "aoti": _load_aoti,
    "onnx": _load_onnx,
    "torchscript": _load_torchscript,
}
