"""The modules that the package needs, and the error if one is missing.

Needs only the standard library, because it runs where nothing else is installed.
"""

import importlib
import importlib.util
import sys

# Module → distribution. What pyproject.toml lists, and the two without a release of their own.
REQUIRED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "detectron2": "sal-detectron2",
    "panopticapi": "panopticapi-lite",
    "numpy": "numpy",
    "hotcoco": "hotcoco",
    "msgspec": "msgspec",
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "pycocotools": "pycocotools",
    "yaml": "pyyaml",
    "defusedxml": "defusedxml",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "timm": "timm",
    "cloudpickle": "cloudpickle",
    "fvcore": "fvcore",
    "hydra": "hydra-core",
    "iopath": "iopath",
    "matplotlib": "matplotlib",
    "omegaconf": "omegaconf",
    "packaging": "packaging",
    "shapely": "shapely",
    "tabulate": "tabulate",
    "tensorboard": "tensorboard",
    "termcolor": "termcolor",
    "tqdm": "tqdm",
    "yacs": "yacs",
}
INSTALL = "python -m mask2former.env --install"


def missing_modules() -> list[str]:
    """Modules of `REQUIRED` that cannot be found."""
    importlib.invalidate_caches()
    return [name for name in REQUIRED if importlib.util.find_spec(name) is None]


def explain(error: ModuleNotFoundError) -> ModuleNotFoundError | None:
    """The error with what is missing and how to get it; None if it is of another module."""
    if error.name is None or error.name.partition(".")[0] not in REQUIRED:
        return None
    text = ", ".join(missing_modules()) or error.name
    return ModuleNotFoundError(
        f"{error}. Mask2Former needs {text}, not installed in {sys.prefix}. `{INSTALL}` installs "
        "what is missing and keeps what is installed.",
        name=error.name,
    )


def is_env_program() -> bool:
    """Whether this process is `python -m mask2former.env`, which reports what is missing."""
    return ("-m", "mask2former.env") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
