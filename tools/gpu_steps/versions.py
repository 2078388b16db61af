"""The machine, and versions of what matters. Fails without a GPU or without kernels for it.

python tools/gpu_steps/versions.py FOLDER [--device cpu]
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys

import torch
from step_result import make_parser, write_result

from mask2former.ops import _library

PACKAGES = ("torchvision", "triton", "numpy", "transformers", "deformops", "ms-deform-attn")


def output_of(*command: str) -> str:
    """The last line that a command prints; empty without the program."""
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True)
    return (result.stdout.strip().splitlines() or [""])[-1]


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> int:
    options = make_parser(__doc__).parse_args()
    numbers = {
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": output_of("nvcc", "--version"),
        "cores": os.cpu_count(),
        "operators": _library.describe(),
        **{package: version_of(package) for package in PACKAGES},
    }
    problem = ""
    if torch.cuda.is_available():
        free, total = (x / 2**30 for x in torch.cuda.mem_get_info())
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        major, minor = torch.cuda.get_device_capability()
        numbers |= {
            "gpus": torch.cuda.device_count(),
            "gpu": f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}",
            "driver": output_of("nvidia-smi", *query),
            "memory": f"{free:.1f} of {total:.1f} GiB free",
        }
        if not _library.cuda_architectures():
            problem = "the operators were built without CUDA kernels"
    elif options.device == "cuda":
        problem = "torch finds no CUDA device"
    write_result(options.folder, numbers | ({"problem": problem} if problem else {}))
    return int(bool(problem))


if __name__ == "__main__":
    sys.exit(main())
