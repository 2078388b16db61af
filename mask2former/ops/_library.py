"""The compiled library of the operators: its file, what it was built for; loaded on import.

The library is no Python module: it only registers ``torch.ops.mask2former.*``. One file works with
every torch from 2.11 on and every Python version, see ``setup.py``.
"""

import ctypes
import functools
from pathlib import Path

import torch

_FILE = Path(__file__).resolve().parents[1] / "_C.abi3.so"
# None if the library was not built: no compiler, or an installation without it.
LIBRARY_PATH: Path | None = _FILE.resolve() if _FILE.exists() else None
# The oldest torch that the library runs on, as in setup.py.
MIN_TORCH = "2.11"
REMEDY = "to build it, reinstall mask2former on a machine with a C++ compiler: pip install -e ."


def is_loaded() -> bool:
    return LIBRARY_PATH is not None and str(LIBRARY_PATH) in torch.ops.loaded_libraries


def load() -> None:
    """Load the library if it was built and is not loaded yet.

    Raises:
        ImportError: the file cannot be loaded, or another copy has registered the operators.
    """
    if LIBRARY_PATH is None or is_loaded():
        return
    # A second registration would abort the process without a message.
    if hasattr(torch.ops.mask2former, "ms_deform_attn"):
        others = [path for path in torch.ops.loaded_libraries if Path(path).name == _FILE.name]
        raise ImportError(
            f"cannot load {LIBRARY_PATH}: another copy of mask2former has registered the operators "
            f"in this process ({', '.join(sorted(others)) or 'not loaded through torch.ops'}); "
            "use one copy only"
        )
    try:
        torch.ops.load_library(LIBRARY_PATH)
    except OSError as error:
        raise ImportError(
            f"cannot load {LIBRARY_PATH} with torch {torch.__version__} (it needs torch "
            f"{MIN_TORCH} or newer): {error.__cause__ or error}; {REMEDY}"
        ) from error


@functools.cache
def _call(function_name: str) -> str:
    """Call a function of the library without arguments that returns a string."""
    assert LIBRARY_PATH is not None, "not built"
    function = getattr(ctypes.CDLL(str(LIBRARY_PATH)), function_name)
    function.restype = ctypes.c_char_p
    return function().decode()


def cuda_architectures() -> str:
    """Compute capabilities with CUDA kernels, such as "8.0 9.0+PTX"; "" without CUDA kernels."""
    return _call("mask2former_cuda_architectures") if is_loaded() else ""


def cpu_instructions() -> str:
    """The instruction set that the CPU kernels use on this machine; "" if not built."""
    return _call("mask2former_cpu_instructions") if is_loaded() else ""


def describe() -> str:
    """One line with the available kernels and their file."""
    if LIBRARY_PATH is None:
        return "compiled operators: none were built, the PyTorch formulation runs"
    architectures = cuda_architectures()
    cuda = f"CUDA ({architectures})" if architectures else "no CUDA"
    megabytes = LIBRARY_PATH.stat().st_size / 1e6
    return (
        f"compiled operators: CPU ({cpu_instructions()}), {cuda}, "
        f"for torch >= {MIN_TORCH}, {LIBRARY_PATH} ({megabytes:.1f} MB)"
    )


load()
