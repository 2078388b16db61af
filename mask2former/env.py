"""``python -m mask2former.env``: what this environment has, and what is missing.

    python -m mask2former.env             versions, devices, the compiled op and its self-test
    python -m mask2former.env --install   installs what is missing and keeps what is installed

Exits with status 1 if something needed is missing or the compiled op fails. Importing this module
needs only the standard library, because it also runs where nothing else is installed.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from .utils.project_files import project_root
from .utils.required_modules import INSTALL, REQUIRED, missing_modules

# Module → what needs it.
OPTIONAL = {
    "cityscapesscripts": "evaluation on Cityscapes",
    "lvis": "evaluation on LVIS",
    "tifffile": "TIFF images of any number of channels",
}
# Versions at the head of a log.
_SHOWN = ("torch", "torchvision", "detectron2", "numpy", "timm", "cv2", "pycocotools", "hotcoco")


def version(module: str) -> str:
    """Version of a module, or "missing"."""
    if importlib.util.find_spec(module) is None:
        return "missing"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(REQUIRED.get(module, module))
    # Detectron2 and OpenCV come under several names; reading all distributions takes a while.
    try:
        return importlib.metadata.version(_distributions()[module][0])
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return "installed, version unknown"


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def describe(*, self_test: bool) -> tuple[list[str], list[str]]:
    """What this environment has, as lines of text, and what is wrong, with the remedy.

    Args:
        self_test: whether to compare the compiled op with the PyTorch formulation, in float32.
    """
    problems = []
    missing = missing_modules()
    if missing:
        problems.append(f"missing: {', '.join(missing)}. Install: {INSTALL}")
    lines = [f"Python {platform.python_version()} in {sys.prefix}, {platform.platform()}"]
    lines.append(", ".join(f"{name} {version(name)}" for name in _SHOWN))
    absent = [f"{name} ({use})" for name, use in OPTIONAL.items() if version(name) == "missing"]
    if absent:
        lines.append(f"optional, not installed: {', '.join(absent)}")
    if "torch" in missing:
        return lines, problems
    import torch

    lines += _devices(torch)
    if not missing:
        op_lines, op_problems = _op(self_test)
        lines += op_lines
        problems += op_problems
    return lines, problems


def _devices(torch: Any) -> list[str]:
    lines = [f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    if not torch.cuda.is_available():
        build = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU torch"
        )
        return [*lines, f"GPU: none ({build})"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        lines.append(
            f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute "
            f"capability {properties.major}.{properties.minor}, CUDA {torch.version.cuda}"
        )
    return lines


def _op(self_test: bool) -> tuple[list[str], list[str]]:
    """State of multi-scale deformable attention, and its problems."""
    import torch

    from .ops import __main__ as ops_program
    from .ops import _library
    from .ops._kernels import COMPILED_DEVICES

    lines, problems = [_library.describe()], []
    if not _library.is_loaded():
        problems.append(
            f"without compiled operators a CPU is tens of times slower: {_library.REMEDY}"
        )
    elif torch.cuda.is_available() and "cuda" not in COMPILED_DEVICES:
        problems.append(
            "there is a GPU, but the operators were built without CUDA kernels: install nvcc and "
            "build again with FORCE_CUDA=1"
        )
    for device in sorted(COMPILED_DEVICES) if self_test else []:
        if device == "cuda" and not torch.cuda.is_available():
            continue
        error, repeats = ops_program.self_test(device, "fused", torch.float32)
        # Not "error > 1e-5": NaN fails.
        passed = error <= 1e-5 and repeats
        lines.append(
            f"self-test on {device}: {'passed' if passed else 'FAILED'}, largest difference "
            f"{error:.0e} of the PyTorch formulation"
        )
        if not passed:
            problems.append(f"the op fails on {device}: run python -m mask2former.ops")
    return lines, problems


def install() -> int:
    """Install what is missing; packages that are installed keep their versions."""
    if importlib.util.find_spec("pip") is None:
        print(
            f"error: {sys.prefix} has no pip, which installs Detectron2: run `python -m "
            "ensurepip`, or create the environment with `uv venv --seed`.",
            file=sys.stderr,
        )
        return 1
    script = project_root() / "tools" / "setup_env.py"
    return subprocess.run([sys.executable, str(script), "--keep-installed", "runtime"]).returncode


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mask2former.env",
        description="What this environment has for Mask2Former, and what is missing.",
    )
    parser.add_argument(
        "--install", action="store_true", help="install what is missing, and nothing else"
    )
    args = parser.parse_args(argv)
    if args.install:
        status = install()
        if status:
            return status
        importlib.invalidate_caches()
    lines, problems = describe(self_test=True)
    print("\n".join(lines))
    print("\n".join(f"problem: {problem}" for problem in problems) or "nothing is missing")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
